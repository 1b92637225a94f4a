"""Ranks agree in each step: a non-finite step changes nothing anywhere, and too many end the run with a report."""

import json
from functools import partial
from itertools import pairwise

import lightning as L
import pytest
import torch
from experiments import config, fit
from helpers import tiny_encoder
from lightning.pytorch.plugins.precision import MixedPrecision
from processes import two_ranks
from trouble import BadLoss, Unreadable

from heads.masked_modelling import MaskedModelling
from heads.self_distillation import SelfDistillation
from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.loading.views import View
from indiclip.module import MultiTask
from indiclip.tasks.patch_codebook import Codebook
from indiclip.training.fault_tolerance.ranks import AgreedStop
from indiclip.training.fault_tolerance.step_sync import StepSync
from indiclip.training.record import read_history
from indiclip.types import Quarantined


class Watch(L.Callback):
    """Everything that a step may change, after each of them."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        optimizer = trainer.optimizers[0]
        state = [value.clone() for slots in optimizer.state.values() for value in slots.values()]
        self.after.append([*(value.clone() for value in module.state_dict().values()), *state])


def train(folder, bad, steps=6, what="loss", vote=None, data=None, beside=(), optimizer=None, **options):
    watch = Watch()
    heads = [BadLoss(bad, what=what), *beside]
    module = MultiTask(tiny_encoder(batch_norm=True), heads, warmup_steps=1, optimizer=optimizer)
    logger = L.pytorch.loggers.TensorBoardLogger(str(folder), name="run", version="")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=logger, callbacks=[vote or StepSync(), watch], log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    source = data or Source("contrastive", Mela(64, 32, "single"), 4, max_tokens=16)
    trainer.fit(module, datamodule=MultiTaskData([source], steps_per_epoch=50, patch_size=8))
    return trainer, watch.after


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_bad_step_changes_nothing(tmp_path, what, clip):
    trainer, after = train(tmp_path, [2, 4], what=what, gradient_clip_val=clip)
    unchanged = [same(after[step], after[step - 1]) for step in range(1, 6)]
    assert unchanged == [False, True, False, True, False]
    assert all(torch.isfinite(value).all() for value in after[-1])
    rows = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 5]  # counted from 1, as in the history
    assert rows[0]["heads"] == (["trouble"] if what == "loss" else [])
    assert len(rows[0]["ranks"][0]["keys"]["contrastive"]) == 4
    assert trainer.callback_metrics["train/nonfinite_steps"] == 2


@pytest.mark.parametrize("fused", [True, False])
def test_averages_of_heads_do_not_count_a_bad_step(tmp_path, fused):
    """A teacher with the running mean of what it says, one of masked images, and a codebook of patches."""
    small = {"hidden_dim": 16, "bottleneck_dim": 8, "num_prototypes": 12, "local_view": None}
    masked = {"task": "contrastive", "losses": {"mim": 1.0}}
    beside = [
        SelfDistillation(**small, task="contrastive", centring="mean", dino_weight=0.0, koleo_weight=0.0),
        MaskedModelling(**masked, name="vectors", targets="teacher"),
        MaskedModelling(**masked, name="codes", codebook=Codebook(6, 0.9)),
    ]
    data = Source("contrastive", Mela(64, 32, "single"), 4, max_tokens=16, views=[View("global", max_tokens=16)])
    optimizer = partial(torch.optim.AdamW, fused=fused)
    _, after = train(tmp_path, [2], data=data, beside=beside, optimizer=optimizer, steps=4)
    assert [same(after[step], after[step - 1]) for step in (1, 2, 3)] == [False, True, False]


def test_averages_of_heads_do_not_count_a_step_that_a_scaler_skips(tmp_path):
    """After an overflow a GradScaler does not call the optimizer. Here each third step has one."""
    scaler = torch.amp.GradScaler("cpu", 1.0, growth_factor=2.0**120, backoff_factor=2.0**-120, growth_interval=2)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    head = MaskedModelling(task="contrastive", losses={"mim": 1.0}, targets="teacher", teacher_decay=0.5)
    trainer, after = train(tmp_path, [], beside=[head], steps=5, vote=L.Callback(), plugins=[precision])
    names = trainer.lightning_module.state_dict()
    teachers = [[value for name, value in zip(names, row, strict=False) if ".teacher." in name] for row in after]
    assert [same(*pair) for pair in pairwise(teachers)] == [False, True, False, False]


def test_the_steps_after_a_bad_one_are_those_of_a_run_without_it(tmp_path):
    """Skipping is all that happens: another run that is told to leave the step out ends with the same weights."""

    class LeaveOut(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.kept = {name: value.clone() for name, value in module.named_buffers()}

        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 2:
                optimizer.zero_grad(set_to_none=True)
                for name, value in module.named_buffers():
                    value.copy_(self.kept[name])

    _, skipped = train(tmp_path, [2])
    _, left_out = train(tmp_path / "other", [], vote=LeaveOut())
    assert same(skipped[-1], left_out[-1])


def test_without_the_vote_one_bad_step_ruins_the_run(tmp_path):
    _, after = train(tmp_path, [2], vote=L.Callback())
    assert not all(torch.isfinite(value).all() for value in after[-1])


def test_too_many_in_a_row_stop_the_run_and_say_who(tmp_path):
    with pytest.raises(AgreedStop) as caught:
        train(tmp_path, [1, 3, 4, 5, 6], steps=20, vote=StepSync(max_nonfinite=2))
    rows = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5, 6]
    keys = rows[-1]["ranks"][0]["keys"]["contrastive"]
    assert str(caught.value).startswith(
        "step 6: the loss of trouble (task contrastive) was not finite in 3 steps in a row; samples "
        f"{', '.join(keys[:3])}, ..."
    )
    assert caught.value.status == 1


def test_one_rank_of_two_is_enough(tmp_path):
    diary = {"class_path": "trouble.Diary", "init_args": {"folder": str(tmp_path / "diary")}}
    tree = config(trainer__max_steps=4)
    tree["model"]["heads"] = [{"class_path": "trouble.BadLoss", "init_args": {"bad": [1, 2], "rank": 1}}]
    tree["trainer"]["callbacks"] = [diary]
    done, folder = two_ranks(tmp_path, tree)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    assert [[found["rank"] for found in row["ranks"]] for row in rows] == [[1], [1]]
    of_rank_1 = [json.loads(line) for line in (tmp_path / "diary" / "keys-1.jsonl").read_text().splitlines()]
    assert rows[0]["ranks"][0]["keys"] == of_rank_1[1]["keys"]
    first, second = (torch.load(tmp_path / "diary" / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.isfinite(value).all() for value in first.values())
    assert json.loads((folder / "metrics.json").read_text())["nonfinite_steps"] == 2
    assert "step 2: the loss of trouble (task contrastive) is not finite: skipped (1 in a row)" in done.stdout
    assert read_history(folder)[-1]["step"] == 4


def test_a_task_with_too_many_unreadable_samples_stops_all_ranks(tmp_path):
    dataset = {"class_path": "trouble.Unreadable", "init_args": {"num": 400, "every": 4}}
    tree = config(trainer__max_steps=100)
    tree["data"] |= {"quarantine": 0.05, "steps_per_epoch": 100, "num_workers": 1}
    tree["data"]["train"][0] |= {"dataset": dataset, "batch_size": 8}
    done, folder = two_ranks(tmp_path, tree)
    assert done.statuses == [1, 0], done.stderr[-3000:]  # see AgreedStop
    rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert 20 < len(rows) < 30  # the limit is 20 of 400; a step adds a few
    assert len({row["key"] for row in rows}) == len(rows)
    assert {row["shard"] for row in rows} == {"s.tar"}
    lines = [line for line in done.stderr.splitlines() if line.startswith("indiclip: ")]
    assert len(lines) == 1
    assert f"data.quarantine: {len(rows)} samples of task 'contrastive' are unreadable, 20 are allowed" in lines[0]
    assert "s.tar s/" in lines[0]


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_list(tmp_path):
    dataset = {"class_path": "trouble.Unreadable", "init_args": {"num": 40, "every": 8}}
    tree = config(trainer__max_steps=4)
    tree["data"]["train"][0] |= {"dataset": dataset, "batch_size": 8}
    assert fit(tmp_path, tree) == 0
    file = tmp_path / "runs" / "experiment" / "quarantine.jsonl"
    first = file.read_text().splitlines()
    tree["trainer"]["max_steps"] = 12
    assert fit(tmp_path, tree, "--ckpt_path", "last") == 0
    rows = file.read_text().splitlines()
    assert rows[: len(first)] == first
    assert sorted(json.loads(row)["key"] for row in rows) == sorted(f"s/{index}" for index in range(0, 40, 8))
    assert fit(tmp_path, tree) == 0  # a new run, a new folder
    assert len((tmp_path / "runs" / "experiment-2" / "quarantine.jsonl").read_text().splitlines()) == 5


def test_damage_of_shards_is_counted_from_the_first_step(tmp_path):
    source = Source("contrastive", Unreadable(16, 100), 4, max_tokens=16)
    source.dataset.damaged = [Quarantined("", "a/7", "a.tar", "truncated tar")]
    train(tmp_path, [], steps=2, data=source)
    (row, *_) = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert row == {"task": "contrastive", "key": "a/7", "shard": "a.tar", "reason": "truncated tar"}
