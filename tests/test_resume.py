"""A run that goes on is the run that was not interrupted: dropout, ranks; and full disks."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from experiments import ROOT, config, fit
from helpers import ARCHITECTURE
from processes import two_ranks

from heads.contrastive import Contrastive
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData, Source
from indiclip.module import MultiTask
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer
from indiclip.training import run_folder
from indiclip.training.cli import run
from indiclip.training.fault_tolerance.checkpoints import Checkpoints, DurableCheckpointIO
from indiclip.training.fault_tolerance.manifest import newest_good
from indiclip.training.fault_tolerance.ranks import AgreedStop
from indiclip.training.fault_tolerance.resume_validation import ResumeValidation
from indiclip.training.fault_tolerance.step_sync import StepSync


class Killed(BaseException):
    """Nothing catches it."""


class Kill(L.Callback):
    """Ends the run at the start of a batch; notes at which batch each checkpoint was taken, and the validations."""

    def __init__(self, batch=None, validations=None):
        self.batch, self.taken, self.validations = batch, [], validations if validations is not None else []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            raise Killed

    def on_validation_start(self, trainer, module):
        self.validations.append(trainer.global_step)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        self.taken.append((progress["processed"], checkpoint["global_step"]))


def tiny_module(dropout=0.0):
    """Image-text, with dropout in the text tower and dropped paths in the backbone."""
    torch.manual_seed(0)
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    backbone = NaFlexViT(width=32, depth=1, num_heads=2, patch_size=8, options={"drop_path_rate": dropout})
    text = TextTower(ByteTokenizer(), ARCHITECTURE | drops)
    return MultiTask(Encoder(backbone, text, 32, (16,)), [Contrastive()], warmup_steps=1)


def train(
    folder,
    kill=None,
    steps=4,
    dropout=0.3,
    checkpoints=None,
    going_on=False,
    steps_per_epoch=100,
    validations=None,
    held_out=True,
    more=(),
    source=None,
    num_workers=0,
    **options,
):
    """Weights at the end and the `Kill` callback; None for the weights of a killed run. `source`: what differs."""
    module = tiny_module(dropout)
    callback = Kill(kill, validations)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        callbacks=[callback, *more, ResumeValidation(), Checkpoints(folder / "checkpoints", **checkpoints or {})],
        plugins=[DurableCheckpointIO()],
        **options,
    )  # fmt: skip
    own = {"batch_size": 4, "max_tokens": 16} | (source or {})
    source = Source("contrastive", Mela(40, 32, "single", seed=1), **own)
    held = [source] * held_out
    data = MultiTaskData([source], held, num_workers=num_workers, steps_per_epoch=steps_per_epoch, patch_size=8)
    found = newest_good(folder / "checkpoints")[0] if going_on else None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=found, weights_only=True)
    except Killed:
        return None, callback
    return module.state_dict(), callback


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


EVERY_STEP = {"every_n_train_steps": 1, "save_top_k": -1}


def test_a_resumed_run_drops_out_what_the_uninterrupted_one_did(tmp_path):
    whole, _ = train(tmp_path / "whole", limit_val_batches=0)
    other, _ = train(tmp_path / "other", dropout=0.0, limit_val_batches=0)
    assert not same(whole, other)  # there is dropout
    for batch in (1, 3):
        folder = tmp_path / str(batch)
        train(folder, kill=batch, checkpoints=EVERY_STEP, limit_val_batches=0)
        torch.rand(7)  # the new process draws other numbers before it trains
        resumed, _ = train(folder, checkpoints=EVERY_STEP, going_on=True, limit_val_batches=0)
        assert same(whole, resumed)


def test_each_step_and_rank_draws_other_numbers():
    module = tiny_module()
    seeds = set()
    for rank in (0, 1):
        for step in (0, 1, 2):
            total = SimpleNamespace(total=SimpleNamespace(processed=step))
            loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=total))
            module._trainer = SimpleNamespace(global_rank=rank, fit_loop=loop)
            module.on_train_batch_start({}, 0)
            seeds.add(torch.default_generator.initial_seed())
    assert len(seeds) == 6


def test_a_run_of_epochs_goes_on_in_the_midst_of_one(tmp_path):
    """With `max_epochs` Lightning begins to load data before it is known where the run stands."""
    options = {"steps": -1, "max_epochs": 2, "steps_per_epoch": 4, "checkpoints": {"every_n_train_steps": 1}}
    whole, _ = train(tmp_path / "whole", **options)
    assert train(tmp_path / "a", kill=6, **options)[0] is None
    assert same(train(tmp_path / "a", going_on=True, **options)[0], whole)


@pytest.mark.parametrize(("checkpoints", "steps"), [({}, [3, 6]), ({"every_n_train_steps": 2}, [2, 4, 6])])
def test_a_run_without_held_out_data_saves_as_often(tmp_path, checkpoints, steps):
    _, callback = train(tmp_path, steps=6, steps_per_epoch=3, held_out=False, checkpoints=checkpoints)
    assert [step for _, step in callback.taken] == steps


def test_a_trial_saves_nothing(tmp_path):
    train(tmp_path, fast_dev_run=True)
    assert not (tmp_path / "checkpoints").exists()


def test_ranks_that_go_on_from_different_steps_end_together(monkeypatch):
    monkeypatch.setattr("indiclip.training.fault_tolerance.step_sync.gathered", lambda step: [step, step + 3])
    trainer = SimpleNamespace(global_step=2, local_rank=0, is_global_zero=True, strategy=SimpleNamespace(launcher=None))
    with pytest.raises(AgreedStop, match=r"--ckpt_path: the ranks go on from different steps: \[2, 5\]"):
        StepSync().on_train_start(trainer, None)


@pytest.mark.parametrize("checkpoints", [{}, {"every_n_train_steps": 4}, {"monitor": "train/loss"}])
@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}, {"max_epochs": 2, "steps": -1}])
def test_the_last_step_is_saved(tmp_path, checkpoints, options):
    weights, _ = train(tmp_path, checkpoints=checkpoints, **{"steps": 6, "steps_per_epoch": 5} | options)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == (10 if "max_epochs" in options else 6)
    assert same(last["state_dict"], weights)


def test_a_validation_is_not_done_again_by_the_run_that_goes_on(tmp_path):
    """Killed in the fifth step; the checkpoint of the third was due in the step before a validation."""
    for name, checkpoints in (("validation", {}), ("steps", {"every_n_train_steps": 3})):
        steps: list[int] = []
        options = {"steps": 6, "steps_per_epoch": 3, "checkpoints": checkpoints, "validations": steps}
        train(tmp_path / name, kill=4, **options)
        train(tmp_path / name, going_on=True, **options)
        assert steps == [3, 6]


def test_a_stop_with_a_monitor_leaves_one_file_however_often(tmp_path):
    """None of the best, by which the others are removed."""

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            trainer.checkpoint_callback.save_now(trainer)

    module = tiny_module(0.0)
    checkpoints = Checkpoints(tmp_path, monitor="val/contrastive/image_to_text_r1", mode="max")
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, callbacks=[Stop(), checkpoints],
        plugins=[DurableCheckpointIO()],
    )  # fmt: skip
    source = Source("contrastive", Mela(40, 32, "single", seed=1), 4, max_tokens=16)
    trainer.fit(module, datamodule=MultiTaskData([source], [source], steps_per_epoch=100, patch_size=8))
    assert {file.name for file in tmp_path.iterdir()} == {"stopped.ckpt", "last.ckpt", "manifest.json"}
    assert newest_good(tmp_path)[:2] == (tmp_path / "stopped.ckpt", 3)


def test_two_checkpoints_that_would_remove_each_others_files_are_refused(tmp_path):
    both = [Checkpoints(tmp_path), Checkpoints(tmp_path, monitor="val/contrastive/image_to_text_r1")]
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, callbacks=both)
    with pytest.raises(
        ValueError, match=r"two Checkpoints write '\{step\}' into .*; give one of them another filename"
    ):
        trainer.fit(tiny_module(0.0), datamodule=MultiTaskData([Source("contrastive", Mela(4, 32, "single"), 4)]))


@pytest.mark.parametrize(
    ("ranks", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun orders the nodes by itself
        ({"RANK": "8", "LOCAL_RANK": "0", "SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({"NODE_RANK": "1"}, False),  # Lightning's own start on two nodes
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, False),
    ],
)
def test_one_process_of_all_is_the_first(monkeypatch, ranks, first):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert run_folder.is_first_process() is first


def test_last_always_leads_to_a_checkpoint_and_none_piles_up(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    last = folder / "last.ckpt"
    replace, unlink, seen = Path.replace, Path.unlink, []

    def watched(function):
        def call(self, *args, **options):
            result = function(self, *args, **options)
            seen.append(last.exists() and last.resolve().name)
            return result

        return call

    monkeypatch.setattr(Path, "replace", watched(replace))
    monkeypatch.setattr(Path, "unlink", watched(unlink))
    options = {"checkpoints": {"every_n_train_steps": 1}, "limit_val_batches": 0}
    train(tmp_path, kill=2, **options)
    train(tmp_path, kill=3, going_on=True, **options)
    train(tmp_path, going_on=True, **options)
    assert {file.name for file in folder.iterdir()} == {"4.ckpt", "last.ckpt", "manifest.json"}
    assert last.readlink() == Path("4.ckpt")
    from_the_first_link = seen[seen.index("1.ckpt") :]
    assert list(dict.fromkeys(from_the_first_link)) == ["1.ckpt", "2.ckpt", "3.ckpt", "4.ckpt"]


def test_a_rank_that_cannot_save_ends_all_of_them(tmp_path):
    """The other one is not left in a barrier; the good checkpoint stays."""
    tree = config(trainer__max_steps=50)
    tree["data"]["steps_per_epoch"] = 50
    saves = {
        "class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints",
        "init_args": {"every_n_train_steps": 2},
    }
    tree["trainer"]["callbacks"] = [saves, {"class_path": "trouble.FullDisk", "init_args": {"step": 3}}]
    done, folder = two_ranks(tmp_path, tree)
    lines = [line for line in done.stderr.splitlines() if line.startswith("indiclip: ")]
    at = folder / "checkpoints"
    assert lines == [f"indiclip: {at}/4.ckpt: not saved: File too large; the last good one is {at}/2.ckpt"], done.stderr
    assert done.statuses == [1, 0]  # see AgreedStop
    assert "Traceback" not in done.stderr
    assert "Connection closed" not in done.stderr
    assert {file.name for file in at.iterdir()} == {"2.ckpt", "last.ckpt", "manifest.json"}
    assert newest_good(at)[:2] == (at / "2.ckpt", 2)


@pytest.mark.slow
def test_two_ranks_one_and_two_again_give_the_same_global_batches(tmp_path):
    tree = config()
    tree["data"]["steps_per_epoch"] = 4
    seen = {}
    for steps, ranks in [(2, 2), (4, 1), (6, 2)]:
        diary = tmp_path / f"diary{steps}"
        tree["trainer"] |= {"max_steps": steps, "devices": ranks}
        tree["trainer"]["callbacks"] = [{"class_path": "trouble.Diary", "init_args": {"folder": str(diary)}}]
        if ranks == 2:
            done, _ = two_ranks(tmp_path, tree, "--ckpt_path", "last")
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert fit(tmp_path, tree, "--ckpt_path", "last") == 0
        files = list(diary.glob("keys-*.jsonl"))
        assert len(files) == ranks
        for row in [json.loads(line) for file in files for line in file.read_text().splitlines()]:
            seen.setdefault(row["step"], []).extend(row["keys"]["contrastive"])
    data = MultiTaskData([Source("contrastive", Mela(12, 32, "single"), 4, max_tokens=16)], patch_size=8)
    plan = data.steps(data.train, train=True)
    assert {step: sorted(keys) for step, keys in seen.items()} == {
        step: sorted(plan[step]["contrastive"]["keys"]) for step in range(6)
    }


def test_one_line_is_for_the_first_start_and_for_the_next_ones(tmp_path, capsys):
    """README's; and what was never trained is not scored as if it were the last of a run."""
    tree = config()
    assert fit(tmp_path, tree, "--ckpt_path", "last", "--name", "b") == 0
    folder = tmp_path / "runs" / "b" / "checkpoints"
    command = ["validate", "--config", str(tmp_path / "experiment.yaml"), "--runs", str(tmp_path / "runs")]
    assert run([*command, "--ckpt_path", "last", "--name", "b"]) == 0
    assert f"going on from {folder}/2.ckpt: step 2" in capsys.readouterr().out
    assert run([*command, "--ckpt_path", "last", "--name", "a"]) == 2
    assert f"--ckpt_path last: no checkpoint of a in {tmp_path / 'runs'}" in capsys.readouterr().err
    text = re.findall(r"```\n(indiclip fit [^`]*--ckpt_path last.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    line = text.replace("\\\n", " ").replace("yours.yaml", str(tmp_path / "experiment.yaml")).replace("=500", "=1")
    for steps in (3, 4):
        flags = ["--runs", str(tmp_path / "runs"), "--trainer.max_steps", str(steps)]
        assert run([*shlex.split(line)[1:], *flags]) == 0
    out = capsys.readouterr().out
    assert "starting from the beginning" in out
    assert f"going on from {tmp_path}/runs/a/checkpoints/3.ckpt: step 3" in out
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == ["a", "b"]
