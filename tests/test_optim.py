"""Schedules in a run that goes on: the rates of each step, and weights equal to those of a run planned so."""

import lightning as L
import pytest
import torch
from test_resume import EVERY_STEP, Killed, same, tiny_module

from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData, Source
from indiclip.optim import Constant, Linear, RateStage, Staged, WarmupStableDecay
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


STAGED = Staged([RateStage(0.5, 0.5), RateStage(0.8, 2.0)], 0.25, schedule=Constant())


def test_a_stage_has_rates_of_its_own(tmp_path):
    """By hand: half, twice and a quarter of the rate in steps 0 to 3, 4 to 5 and 6 to 7, after two of warm-up; and a
    run that is killed on either side of the borders has the weights of one that was not.
    """
    rates, weights = train(tmp_path / "whole", STAGED, 8)
    assert rates == pytest.approx([0, 0.25, 0.5, 0.5, 2, 2, 0.25, 0.25])
    for step in (4, 5, 6):
        found, resumed = train(
            tmp_path / f"{step}", STAGED, 8, goes_on_from=tmp_path / f"whole/checkpoints/{step}.ckpt"
        )
        assert found == pytest.approx(rates[step:])
        assert same(resumed, weights)


def test_rates_go_from_one_stage_to_the_next_in_a_line():
    """By hand, on a line from 1 to 0 over ten steps: factor 1 up to step 4, then up to 3 over three steps, so 5/3, 7/3
    and 3; from step 7 on half of the rates, on the way to which 2.1667, 1.3333 and 0.5 stand.
    """
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = Staged([RateStage(4), RateStage(7, 3.0)], 0.5, warmup_steps=3, schedule=Linear())
    scheduler = schedule.scheduler(optimizer, 0, 10)
    found = []
    for _ in range(10):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    factors = [1, 1, 1, 1, 5 / 3, 7 / 3, 3, 3 - 2.5 / 3, 3 - 5 / 3, 0.5]
    assert found == pytest.approx([factor * (1 - step / 10) for step, factor in enumerate(factors)])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([RateStage(0.5), RateStage(0.5)], r"stages\[1\].until: found 0.5 after 0.5; expected more: stages ascend"),
        ([RateStage(0.5), RateStage(30)], r"stages\[1\].until: found 30 after 0.5; expected all shares, or all steps"),
        ([RateStage(0.5, -1.0)], r"model.lr_schedule.stages\[0\].factor: found -1.0; expected 0 or more"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        Staged(stages)
