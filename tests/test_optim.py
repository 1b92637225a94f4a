"""Schedules in a run that goes on: the rates of each step, and weights equal to those of a run planned so."""

import lightning as L
import pytest
from test_resume import EVERY_STEP, Killed, same, tiny_module

from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData, Source
from indiclip.optim import WarmupStableDecay
from indiclip.training.fault_tolerance.checkpoints import Checkpoints, DurableCheckpointIO


class Rates(L.Callback):
    """Those of each step, as shares of the peak; ends the run before a step."""

    def __init__(self, stop=None):
        self.stop, self.found = stop, []

    def on_train_batch_start(self, trainer, module, *_):
        if trainer.global_step == self.stop:
            raise Killed
        self.found.append(trainer.optimizers[0].param_groups[0]["lr"] / module.lr)


def train(folder, schedule, steps, stop=None, goes_on_from=None):
    """The rates of the steps of a run, and its weights."""
    module, rates = tiny_module(), Rates(stop)
    module.lr, module.warmup_steps, module.lr_schedule = 1e-3, 2, schedule
    run = L.Trainer(
        accelerator="cpu", max_steps=steps, default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        callbacks=[rates, Checkpoints(folder / "checkpoints", **EVERY_STEP)], plugins=[DurableCheckpointIO()],
    )  # fmt: skip
    source = Source("contrastive", Mela(40, 32, "single", seed=1), 4, max_tokens=16)
    data = MultiTaskData([source], steps_per_epoch=100, patch_size=8)
    try:
        run.fit(module, datamodule=data, ckpt_path=goes_on_from, weights_only=True)
    except Killed:
        return rates.found, None
    return rates.found, module.state_dict()


def test_a_decay_branches_off_any_checkpoint_of_the_stable_phase(tmp_path):
    """By hand: up over two steps, stable, and down over the last three, whatever the first run was planned for."""
    schedule = WarmupStableDecay(3, "linear")
    planned, _ = train(tmp_path / "stable", schedule, 100, stop=6)
    assert planned == pytest.approx([0, 0.5, 1, 1, 1, 1])
    stable = tmp_path / "stable" / "checkpoints"
    down = [1, 2 / 3, 1 / 3]
    first, weights = train(tmp_path / "first", schedule, 7, goes_on_from=stable / "4.ckpt")
    second, _ = train(tmp_path / "second", schedule, 9, goes_on_from=stable / "4.ckpt")
    sooner, _ = train(tmp_path / "sooner", WarmupStableDecay(0.3, "linear"), 6, goes_on_from=stable / "4.ckpt")
    assert first == pytest.approx(down)
    assert second == pytest.approx([1, 1, *down])
    assert sooner == pytest.approx([1, 0.5])
    whole, expected = train(tmp_path / "whole", schedule, 7)
    assert whole == pytest.approx([0, 0.5, 1, 1, *down])
    assert same(weights, expected)
