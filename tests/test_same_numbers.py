"""A step's losses and gradients are the same on any number of ranks and in any number of micro-batches.

The oracle is one process with the whole batch, in float64.
"""

from types import SimpleNamespace

import pytest
import torch
from experiments import ENCODER, config, fit
from helpers import tiny_encoder
from processes import on_ranks, two_ranks
from torch import nn
from torch.testing import assert_close

from heads.captioning import Captioning
from heads.contrastive import Contrastive
from heads.counting import Counting
from heads.densepose import DensePose
from heads.depth import Depth
from heads.detection import Detection
from indiclip.generated.mela import Mela
from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.module import MultiTask
from indiclip.preprocessing import Preprocessing
from indiclip.task_weights import Fixed, GradNorm, PCGrad, Uncertainty
from indiclip.training.record import read_history

EXACT = {"rtol": 1e-6, "atol": 1e-9}
LANGUAGES = ["en", "hi", "ta"]


def heads(loss="sigmoid"):
    return [
        Contrastive(loss=loss),
        Detection(17, task="scenes", out_channels=32, num_convs=1, scales=[1.0, 0.5]),
        DensePose(task="scenes", roi_size=7, channels=16, num_convs=1, box_jitter=0.08),
        Counting(task="scenes", channels=16, ask_boxes=True),
        Depth(task="scenes", channels=16),
        Captioning(task="scenes", depth=1, regions=True, max_tokens=20),
    ]


class OneStep(MultiTask):
    """A module outside of a Trainer: `step` gives what is logged of a step, and its gradients."""

    def __init__(
        self, seed=0, loss="sigmoid", lengths=(16, 32), batch_norm=True, dropout=0.0, task_weights=Fixed, **options
    ):
        encoder = tiny_encoder(seed, 64, lengths, batch_norm=batch_norm)
        for part in encoder.text.modules():
            if isinstance(part, nn.Dropout):
                part.p = dropout
        super().__init__(encoder, heads(loss), task_weights=task_weights(), **options)
        progress = SimpleNamespace(total=SimpleNamespace(processed=7))
        self._trainer = SimpleNamespace(
            global_rank=0, global_step=0, max_steps=1, precision_plugin=None,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
            _logger_connector=SimpleNamespace(should_update_logs=True),
        )  # fmt: skip
        self.logged = {}
        for name in ("contrastive", "captioning"):
            self.heads[name]._languages.update(LANGUAGES)  # no rank of so small a batch has all of them
        self.double()

    @property
    def trainer(self):
        return self._trainer

    def log_dict(self, values, **_):
        self.logged |= {name: float(value) for name, value in values.items()}

    def log(self, name, value, **_):
        self.logged[name] = float(value)

    def step(self, batches):
        """As DDP: gradients are means over the ranks."""
        self._seed()
        self.training_step(batches, 0).backward()
        gradients = {name: p.grad for name, p in self.named_parameters() if p.requires_grad}
        if torch.distributed.is_initialized():
            for gradient in gradients.values():
                torch.distributed.all_reduce(gradient)
                gradient /= torch.distributed.get_world_size()
        buffers = {name: b for name, b in self.named_buffers() if "running" in name or "task_weights" in name}
        return self.logged, gradients, buffers


class Emptied(Mela):
    """Some of its scenes show nothing."""

    empty = ()

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index in self.empty:
            objects = ("boxes", "classes", "crowd", "points", "dp_")
            sample |= {name: value[:0] for name, value in sample.items() if name.startswith(objects)}
        return sample


def batches_of(rank=0, world=1, empty=()):
    """A step with images of several sizes. Of every two scenes those numbered in `empty` show nothing."""
    scenes = Emptied(30, [32, 48], people=1.0, depth=True, languages=LANGUAGES, seed=2)
    sources = [
        Source("contrastive", Mela(50, 32, "single", languages=LANGUAGES, seed=1), 8, max_tokens=16),
        Source("scenes", scenes, 8, max_tokens=24),
    ]
    steps = Steps(sources, 5, Preprocessing(8), train=True, rank=rank, world_size=world)
    scenes.empty = {ref.index for i, ref in enumerate(steps.plans["scenes"].batch(3)) if i % 2 in empty}
    return steps[3]


def same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_close(torch.as_tensor(ours[name]), torch.as_tensor(value), **EXACT, msg=f"{name}: {{}}".format)


WHOLE = {
    "sigmoid": {},
    "softmax": {"loss": "softmax"},
    "one length": {"lengths": (), "batch_norm": False},
    "weights": {"task_weights": Uncertainty},
    "norms": {"task_weights": GradNorm},
    "projections": {"task_weights": PCGrad},
}


@pytest.mark.parametrize("empty", [(), (1,), (0, 1)], ids=["objects", "a rank without", "no objects"])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_together_are_one_process(tmp_path, world, empty):
    of_options = WHOLE.values() if not empty else [{}]

    def steps(rank=0, world=1):
        return [OneStep(**options).step(batches_of(rank, world, empty)) for options in of_options]

    expected = steps()
    for found in on_ranks(world, lambda rank: steps(rank, world), tmp_path):
        for ours, theirs in zip(found, expected, strict=True):
            same(ours, theirs)


@pytest.mark.parametrize("number", [2, 3, 8, 20])
@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_micro_batches_together_are_the_batch(number, options):
    expected = OneStep(**options).step(batches_of(empty=(1,)))
    same(OneStep(micro_batches=number, **options).step(batches_of(empty=(1,))), expected)


@pytest.mark.parametrize("number", [1, 3])
def test_heads_of_one_task_share_their_embeddings(number, monkeypatch):
    """They are projected once, so batch norm counts one batch; two equal heads are one that weighs twice."""
    twins = {"one": [Contrastive(weight=2.0)], "two": [Contrastive(), Contrastive(name="b", task="contrastive")]}
    found = {}
    for name, pair in twins.items():
        monkeypatch.setattr(__name__ + ".heads", lambda _, pair=pair: [*pair, Captioning(task="scenes", depth=1)])
        module = OneStep(micro_batches=number)
        calls = []
        for projection in (module.encoder.image_projection, module.encoder.text_projection):
            projection.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found[name] = module.step(batches_of())[1:]
        assert len(calls) == 2
        assert module.encoder.image_pool.norm.num_batches_tracked == 1
    ours, theirs = ([{k: v for k, v in of.items() if k.startswith("encoder")} for of in found[n]] for n in twins)
    same(ours, theirs)


def test_languages_that_a_run_sees_first_in_a_later_part_change_no_gradient():
    """The first part logs more when it comes again; what is logged must not take the place of what is trained on."""
    module, batches = OneStep(micro_batches=8), batches_of()
    module.heads["captioning"]._languages.clear()
    languages = batches["scenes"]["targets"]["language"]
    assert languages[0] != languages[-1]
    same(module.step(batches)[1:], OneStep().step(batches)[1:])


def test_dropout_is_the_same_in_both_passes():
    """The gradient along a direction is that of finite differences; with other masks it would not be."""
    batches, module = batches_of(), OneStep(dropout=0.5, micro_batches=3)
    torch.manual_seed(1)
    directions = {name: torch.randn_like(p) for name, p in module.named_parameters()}

    def loss(step):
        moved = OneStep(dropout=0.5, micro_batches=3)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += step * directions[name]
        return moved.step(batches)[0]["train/loss"]

    gradients = module.step(batches)[1]
    expected = sum((gradients[name] * directions[name]).sum() for name in directions)
    # Not less than 1e-3: some of the targets are float32, and there are kinks.
    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(float(expected), rel=1e-3)


def test_towers_with_batch_norm_of_their_own_are_refused_in_parts():
    module = OneStep(micro_batches=2)
    module.encoder.backbone.stem = nn.BatchNorm2d(3)
    module._trainer.accumulate_grad_batches, module._trainer.precision, module._trainer.callbacks = 1, "32-true", []
    with pytest.raises(ValueError, match=r"model\.micro_batches: encoder\.backbone\.stem normalises over the batch"):
        module.check_trainer(module.trainer)


def test_under_bfloat16_losses_are_float32():
    module = OneStep(micro_batches=2).float()
    expected = dict(module.step(batches_of())[0])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module._outputs(batches_of())
        whole = outputs.pop("contrastive")
        losses = [whole.function(*whole.rows), *outputs.values()]
        assert {ratio.total.dtype for of in losses[1:] for ratio in of.terms.values()} == {torch.float32}
        assert losses[0].terms["loss"].dtype == torch.float32
        for name, value in module.step(batches_of())[0].items():
            assert value == pytest.approx(expected[name], rel=0.05, abs=0.02)


@pytest.mark.slow
def test_two_ranks_of_two_micro_batches_train_as_one_process_does(tmp_path):
    """Through the command: weights after three steps of gradient descent, and what is logged."""
    scenes = {
        "class_path": "indiclip.generated.mela.Mela",
        "init_args": {"num_scenes": 12, "size": 32, "people": 1.0, "seed": 1},
    }
    dense = {"task": "scenes", "dataset": scenes, "batch_size": 8, "max_tokens": 16}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    options = {"task": "scenes", "out_channels": 32, "num_convs": 1, "scales": [1.0, 0.5], "num_classes": 17}
    detection = {"class_path": "heads.detection.Detection", "init_args": options}
    found = {}
    for world, number in ((1, 1), (2, 1), (1, 4), (2, 2)):
        tree = config(model__optimizer=sgd, model__micro_batches=number, model__warmup_steps=0, trainer__max_steps=3)
        tree["model"]["encoder"] = ENCODER | {"batch_norm": True}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        tree["model"]["encoder"]["text"]["architecture"] |= dropout
        tree["model"]["heads"].append(detection)
        tree["data"] = {"train": [tree["data"]["train"][0] | {"batch_size": 8}, dense], "val": [], "steps_per_epoch": 3}
        tree["trainer"] |= {"precision": "64-true", "devices": world, "gradient_clip_val": 1.0}
        folder = tmp_path / f"{world}-{number}"
        folder.mkdir()
        if world == 1:
            assert fit(folder, tree) == 0
        else:
            ended, _ = two_ranks(folder, tree)
            assert ended.returncode == 0, ended.stderr[-3000:]
        run = folder / "runs" / "experiment"
        rows = [row for row in read_history(run) if "train/loss" in row]
        weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        found[world, number] = [{k: v for k, v in row.items() if k.startswith("train/")} for row in rows], weights
    rows, weights = found.pop((1, 1))
    assert [len(row) for row in rows] == [5, 5, 5]
    for other, of_other in found.values():
        same([of_other], [weights])
        for ours, theirs in zip(other, rows, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)  # Lightning logs in float32
