"""A step's losses and gradients are the same on any number of ranks and in any number of micro-batches.

The oracle is one process with the whole batch, in float64.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_encoder
from processes import on_ranks
from torch import nn
from torch.testing import assert_close

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

EXACT = {"rtol": 1e-6, "atol": 1e-9}
LANGUAGES = ["en", "hi", "ta"]


def heads(loss="sigmoid"):
    return [
        Contrastive(loss=loss),
        Detection(17, task="scenes", out_channels=32, num_convs=1, scales=[1.0, 0.5]),
        DensePose(task="scenes", roi_size=7, channels=16, num_convs=1, box_jitter=0.08),
        Counting(task="scenes", channels=16, ask_boxes=True),
        Depth(task="scenes", channels=16),
    ]


class OneStep(MultiTask):
    """A module outside of a Trainer: `step` gives what is logged of a step, and its gradients."""

    def __init__(self, seed=0, loss="sigmoid", lengths=(16, 32), batch_norm=True, dropout=0.0, **options):
        encoder = tiny_encoder(seed, 64, lengths, batch_norm=batch_norm)
        for part in encoder.text.modules():
            if isinstance(part, nn.Dropout):
                part.p = dropout
        super().__init__(encoder, heads(loss), **options)
        progress = SimpleNamespace(total=SimpleNamespace(processed=7))
        self._trainer = SimpleNamespace(
            global_rank=0, global_step=0, max_steps=1, precision_plugin=None,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
            _logger_connector=SimpleNamespace(should_update_logs=True),
        )  # fmt: skip
        self.logged = {}
        self.heads["contrastive"]._languages.update(LANGUAGES)  # no rank of so small a batch has all of them
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
        return self.logged, gradients, {name: b for name, b in self.named_buffers() if "running" in name}


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
    scenes = Emptied(30, [32, 48], people=1.0, depth=True, seed=2)
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
    "weights": {"uncertainty_weighting": True},
}


@pytest.mark.parametrize("empty", [(), (1,), (0, 1)], ids=["objects", "a rank without", "no objects"])
@pytest.mark.parametrize("world", [2, 4])
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
