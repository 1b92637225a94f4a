"""The distillation head: with a cache, with a teacher beside, across ranks and shards, and when a run goes on."""

import numpy as np
import pytest
import torch
import yaml
from experiments import config, fit
from fake_gpu import NoWaits, attention_kernel, moved, on_fake_gpu, step_batch
from helpers import caption_batch, packed, step_losses, tiny_encoder
from test_same_numbers import OneStep, batches_of
from test_sharding import fitted, largest_difference, sharded, weights
from torch._subclasses import FakeTensorMode

from heads.captioning import Captioning
from heads.contrastive import Contrastive
from heads.distillation import Distillation
from indiclip import flex
from indiclip.checkpoint import load
from indiclip.cli import main
from indiclip.module import MultiTask
from indiclip.planning.step_model import count_loss
from indiclip.pretrained.read import read_weights
from indiclip.tasks.online_teacher import OnlineTeacher
from indiclip.temperature import logits_of
from indiclip.types import Texts

CAPTIONS = ["a kite", "दीया", "a pot", "a kite", "a drum"]
CROP = {"class_path": "torchvision.transforms.v2.RandomResizedCrop", "init_args": {"size": [16, 16]}}


def embeddings(encoder, batch):
    with torch.no_grad():
        return encoder.embed_features(encoder.features(batch["images"])), encoder.embed_text(CAPTIONS)


def taught_batch(teachers, scales):
    """With the fields of a cache, as float16."""
    batch = caption_batch(CAPTIONS)
    sides = zip(*(embeddings(teacher, batch) for teacher in teachers), strict=True)
    images, texts = (torch.stack(side, 1).half() for side in sides)
    fields = {"teacher_image": [*images], "teacher_text": [*texts], "teacher_scale": [torch.tensor(scales)] * 5}
    batch["targets"] |= packed(fields)
    return batch


def loss_of(head, batch, encoder):
    head.bind(encoder)
    return step_losses(head.loss(encoder.features(batch["images"]), batch, encoder)).terms["loss"]


def save(encoder, file, log_scale=2.0, logits="heads.contrastive.criterion"):
    state = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    state["heads.contrastive.criterion.logit_scale"] = torch.tensor([log_scale])
    state["heads.distillation.distance.logit_scale"] = torch.tensor([5.0])
    entries = {"encoder": encoder.to_config(), "state_dict": state}
    torch.save(entries | ({"logits": logits} if logits else {}), file)
    return str(file)


def test_a_teacher_beside_is_its_own_cache(tmp_path):
    """A teacher of another seed and length, read from a checkpoint with its own scale."""
    student, teacher = tiny_encoder(0), tiny_encoder(1, embed_dim=48).eval()
    file = save(teacher, tmp_path / "teacher.ckpt")
    online = Distillation(OnlineTeacher(file), task="t")
    batch = taught_batch([teacher], [float(np.exp(2.0))])
    first, second = (loss_of(head, batch, student) for head in (online, Distillation(task="t")))
    assert first.item() == pytest.approx(second.item(), rel=2e-3)  # of float16
    assert first.item() > 0.01
    assert not [name for name in online.state_dict() if "teacher" in name]
    assert [name for name, _ in online.named_parameters()] == ["distance.logit_scale"]
    other = Distillation(OnlineTeacher(file, logit_scale=50.0), task="t")
    assert loss_of(other, batch, student).item() > 2 * first.item()


def with_a_teacher(folder, **options):
    """A run that a checkpoint teaches, beside the student; in the folder `teacher.ckpt` is not there yet."""
    run = tree(**options)
    del run["data"]["overrides"], run["model"]["heads"][1]
    run["model"]["heads"][1]["init_args"]["teacher"] = {"weights": str(folder / "teacher.ckpt")}
    return run


def test_a_run_that_goes_on_with_another_teacher_is_refused(tmp_path, capsys):
    """As where the teacher's run has gone on meanwhile."""
    save(tiny_encoder(1), tmp_path / "teacher.ckpt")
    assert fit(tmp_path, with_a_teacher(tmp_path, max_steps=2)) == 0
    last = str(tmp_path / "runs" / "experiment" / "checkpoints" / "last.ckpt")
    longer = with_a_teacher(tmp_path)
    assert fit(tmp_path, longer, "--ckpt_path", last, "--name", "same") == 0
    save(tiny_encoder(2), tmp_path / "teacher.ckpt")
    capsys.readouterr()
    assert fit(tmp_path, longer, "--ckpt_path", last, "--name", "other") == 2
    assert "--ckpt_path: its run read other data: heads.beside.crc32_of_teacher: " in capsys.readouterr().err
    assert fit(tmp_path, longer, "--ckpt_path", last, "--name", "other", "--override", "true") == 0


def test_a_run_that_a_file_teaches_is_planned(tmp_path, capsys):
    save(tiny_encoder(1), tmp_path / "teacher.ckpt")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(with_a_teacher(tmp_path)))
    assert main(["plan", "--config", str(tmp_path / "run.yaml"), "--gpus-per-node", "1"]) == 0
    assert "beside" in capsys.readouterr().out


def test_a_copy_of_the_student_stays_as_it_is_and_is_saved():
    student = tiny_encoder(0, batch_norm=True)
    head = Distillation(OnlineTeacher("initial"), task="contrastive")
    module = MultiTask(student, [Contrastive(task="contrastive"), head])
    module.train()
    before = {name: value.clone() for name, value in head.teacher.state_dict().items()}
    assert before
    assert not any(part.training for part in head.teacher.modules())
    assert not any(p.requires_grad for p in head.teacher.parameters())
    assert head.tower_copies() == [head.teacher.encoder.backbone, head.teacher.encoder.text]
    batch = caption_batch(CAPTIONS)
    batch["targets"]["caption"] = Texts(CAPTIONS, student.text.tokenizer.encode(CAPTIONS))
    student.text.tokenizer.encode = head.teacher.encoder.text.tokenizer.encode = None  # the loader has done that
    step_losses(head.loss(student.features(batch["images"]), batch, student)).terms["loss"].backward()
    assert student.backbone.vit.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in head.teacher.state_dict().items())


def test_a_teacher_beside_runs_once_for_each_part_of_a_batch(monkeypatch):
    """Although gradient caching has each part twice; and what it has said is not kept longer than the parts are."""
    heads = [Contrastive(), Distillation(OnlineTeacher("initial"), task="contrastive")]
    heads.append(Captioning(task="scenes", depth=1))
    monkeypatch.setattr("test_same_numbers.heads", lambda _: heads)
    module, teacher, seen = OneStep(micro_batches=3), heads[1].teacher, []
    teacher.encoder.backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0]["num_patches"])))
    batches = batches_of()
    first = dict(module.step(batches)[0])
    assert sum(seen) == len(batches["contrastive"]["keys"])
    assert len(teacher._said) == 0
    assert module.step(batches)[0] == first  # nothing of another step is taken for this one's
    assert sum(seen) == 2 * len(batches["contrastive"]["keys"])
    with torch.no_grad():
        heads[1].loss(module.encoder.features(batches["contrastive"]["images"]), batches["contrastive"], module.encoder)
    assert len(teacher._said) == 1
    del batches
    assert len(teacher._said) == 0


def test_other_patches_are_refused(tmp_path):
    file = save(tiny_encoder(1), tmp_path / "teacher.ckpt")
    student = tiny_encoder(0)
    student.backbone.patch_size = 4
    with pytest.raises(ValueError, match=r"heads.distillation.teacher.weights: .* has patch_size 8, the student 4"):
        Distillation(OnlineTeacher(file)).bind(student)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"contrastive": 1.0, "distillation": 3.0}, "heads.contrastive.criterion"),
        ({"contrastive": 0.0, "distillation": 3.0}, "heads.distillation.distance"),
        ({"contrastive": 0.0}, "heads.contrastive.criterion"),  # with the logits that `init_from` gave
        ({"contrastive": 0.0, "distillation": 1.0, "another": 1.0}, ""),
        ({"contrastive": 1.0, "second": 1.0, "distillation": 1.0}, ""),
    ],
)
def test_the_temperature_of_a_run_is_of_a_loss_that_trains(weights, expected):
    kinds = {"contrastive": Contrastive, "second": Contrastive}
    heads = [kinds.get(name, Distillation)(task="t", name=name, weight=weight) for name, weight in weights.items()]
    for head in heads:
        head.bind(tiny_encoder())
    assert logits_of(heads) == expected


def test_an_older_run_is_read_with_the_scale_of_its_contrastive_loss(tmp_path):
    assert read_weights(save(tiny_encoder(), tmp_path / "x.ckpt", logits=None)).logits() == {"logit_scale": 2.0}


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_distilled_run_is_read_and_teaches_at_the_scale_that_it_learned(tmp_path, weights_only):
    """Exports write what `load` gives; the bias of the contrastive loss, which is not trained, stays behind as well."""
    run = tree(max_steps=2)
    del run["data"]["overrides"], run["model"]["heads"][1]  # the teacher runs beside
    saved = {"save_weights_only": weights_only, "save_last": True}
    run["trainer"]["callbacks"] = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saved}]
    assert fit(tmp_path, run) == 0
    folder = tmp_path / "runs" / "experiment"
    state = weights(folder)
    learned, other = (float(state[f"heads.{of}.logit_scale"]) for of in ("beside.distance", "contrastive.criterion"))
    assert learned != pytest.approx(np.log(1 / 0.07), abs=1e-4)
    assert other == pytest.approx(np.log(10))
    encoder = load(folder)
    assert encoder.initial_logits == {"logit_scale": learned}
    teacher = OnlineTeacher(str(folder)).beside(encoder, "heads.distillation.teacher")
    assert teacher.logit_scale_ == encoder.logit_factor == pytest.approx(np.exp(learned))


def test_the_planner_counts_what_is_compared():
    """Products of all pairs of a rank with those of all: three of each length and one of each teacher, both ways."""
    head, student = Distillation(task="t"), tiny_encoder(0)
    teachers = [tiny_encoder(seed).eval() for seed in (1, 2)]
    loss_of(head, taught_batch(teachers, [10.0, 20.0]), student)
    pairs, lengths, teachers = 6, 16 + 32 + 64, 2 * 64
    for world in (1, 4):
        flops = count_loss(head.distance, pairs, 64, world).count.flops
        assert flops == 2 * 2 * pairs * pairs * world * (3 * lengths + teachers)


def test_a_step_on_a_gpu_waits_for_nothing(monkeypatch):
    student, batch = tiny_encoder(batch_norm=True), step_batch()
    count = len(batch["keys"])
    rows = {"teacher_image": [torch.randn(2, 8).half()] * count, "teacher_text": [torch.randn(2, 8).half()] * count}
    batch["targets"] |= packed(rows | {"teacher_scale": [torch.ones(2)] * count})
    heads = [Distillation(task="t"), Distillation(OnlineTeacher("initial"), task="t", name="beside")]
    module = MultiTask(student, heads)
    monkeypatch.setattr(flex, "_compiled", lambda: attention_kernel)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_fake_gpu(mode, module)
        on_device = {"t": moved(batch, "cuda")}
        module._outputs(on_device)  # what is set up once may wait
        with NoWaits():
            outputs = module._outputs(on_device)
            losses = [step_losses(outputs[name]).terms["loss"] for name in ("distillation", "beside")]
    assert {loss.device.type for loss in losses} == {"cuda"}


def tree(max_steps=3, **options):
    """Contrastive alone for its scores; a cache that the run makes; and, beside it, a teacher that runs."""
    found = config(trainer__max_steps=max_steps, data__steps_per_epoch=2)
    teachers = {"make": {"models": ["initial"], "views": 2}}
    found["data"]["overrides"] = [{"task": "contrastive", "samples": 8, "augment": [CROP], "teachers": teachers}]
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    found["model"]["encoder"]["text"]["architecture"] |= no_dropout
    found["model"]["encoder"] |= {"batch_norm": True}
    options = {"task": "contrastive"}
    beside = options | {"name": "beside", "teacher": {"weights": "initial"}}
    found["model"] |= {"warmup_steps": 0, "lr": 0.01}
    found["model"]["heads"] = [
        {"class_path": "heads.contrastive.Contrastive", "init_args": {"weight": 0.0}},
        {"class_path": "heads.distillation.Distillation", "init_args": options},
        {"class_path": "heads.distillation.Distillation", "init_args": beside},
    ]
    return found


STOP = """
from lightning import Callback

class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 1:
            trainer.should_stop = True
"""


def test_a_run_goes_on_bit_equal_in_mid_epoch(tmp_path, monkeypatch, capsys):
    """Also the copy of the student, which the resumed run has from its checkpoint."""
    (tmp_path / "distillation_stop.py").write_text(STOP)
    monkeypatch.syspath_prepend(tmp_path)
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    assert fit(whole, tree()) == 0
    stopped = tree()
    stopped["trainer"]["callbacks"] = [{"class_path": "distillation_stop.Stop"}]
    assert fit(part, stopped) == 0
    last = part / "runs" / "experiment" / "checkpoints" / "last.ckpt"
    assert fit(part, tree(), "--ckpt_path", str(last)) == 0
    ends = [weights(folder / "runs" / "experiment") for folder in (whole, part)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert "val/contrastive/zero_shot" in (whole / "runs" / "experiment" / "metrics.json").read_text()


@pytest.mark.slow
def test_shards_and_micro_batches_end_at_the_weights_of_ddp(tmp_path):
    """Two ranks, of which the first makes the cache; towers in float64."""
    found = {}
    for name, strategy, parts in (("ddp", "ddp", 1), ("sharded", sharded(1, 2), 2)):
        run = tree()
        run["model"]["micro_batches"] = parts
        run["trainer"] |= {"strategy": strategy, "callbacks": [{"class_path": "trouble.Double"}]}
        done, folder = fitted(tmp_path / name, run, 2)
        assert done.returncode == 0, done.stderr
        found[name] = weights(folder)
    assert largest_difference(found["ddp"], found["sharded"]) < 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "runs/none"}, "weights: runs/none: no such run, checkpoint or folder"),
        ({"weights": "initial", "logit_scale": 0.0}, "logit_scale: found 0.0; expected above 0"),
    ],
)
def test_a_teacher_that_cannot_be_is_named_by_its_key(options, words):
    with pytest.raises(ValueError, match=f"^heads.beside.teacher.{words}"):
        Distillation(OnlineTeacher(**options), name="beside").bind(tiny_encoder())


def test_a_teacher_of_a_cache_that_cannot_be_is_named_by_its_key(tmp_path, capsys):
    missing = tree()
    missing["data"]["overrides"][0]["teachers"]["make"]["models"] = ["runs/none"]
    assert fit(tmp_path, missing) == 2
    assert "data.train[0].teachers.make.models: runs/none: no such" in capsys.readouterr().err


def test_a_head_without_its_data_is_one_line(tmp_path, capsys):
    without = tree()
    del without["data"]["overrides"]
    assert fit(tmp_path, without) == 2
    assert "data.train[0].teachers: found none, and heads.distillation reads them" in capsys.readouterr().err
