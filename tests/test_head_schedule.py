"""When heads take part: what has no gradient before they do, and that each is begun once, whatever run goes on."""

import lightning as L
import pytest
import torch
from helpers import tiny_encoder
from test_module import SMALL, mela_data, trainer
from test_same_numbers import OneStep, batches_of

from heads.contrastive import Contrastive
from heads.detection import Detection
from indiclip.head_schedule import start_steps
from indiclip.module import MultiTask
from indiclip.task_weights import Fixed, Uncertainty


@pytest.mark.parametrize("task_weights", [Fixed, Uncertainty])
def test_idle_is_what_a_step_gives_no_gradient(task_weights):
    """Oracle: autograd. DDP waits for a gradient of everything else: of the text tower too, which not all heads use."""
    module = OneStep(task_weights=task_weights)
    late = [head.name for head in module.each_head() if head.embeds_text or head.reads_text]
    module.starts = dict.fromkeys(late, 8)  # the step is 7
    module.training_step(batches_of(), 0).backward()
    without = {name for name, p in module.named_parameters() if p.requires_grad and p.grad is None}
    idle = {id(parameter) for parameter in module._idle_parameters()}
    assert without == {name for name, p in module.named_parameters() if id(p) in idle}
    assert any(name.startswith("encoder.text.") for name in without)
    assert not any(name.startswith("encoder.backbone.") for name in without)


class Begun(Detection):
    """Counts how often it is begun, in its state."""

    def bind(self, encoder):
        super().bind(encoder)
        self.register_buffer("count", torch.zeros(()))

    def begin(self, encoder):
        self.count += 1


@pytest.mark.parametrize(
    ("first_run", "second_run"), [(8, 8), (16, 5), (8, 16)], ids=["the same run", "a shorter one", "a longer one"]
)
def test_each_head_is_begun_once(tmp_path, first_run, second_run):
    """In a run that goes on too, and where it is shorter, so that the head should have begun before."""

    def fit(steps, stop, start, ckpt=None):
        torch.manual_seed(0)
        module = MultiTask(tiny_encoder(), [Contrastive(), Begun(**SMALL, start=start, name="late")], warmup_steps=0)

        class Stop(L.Callback):
            def on_train_batch_end(self, trainer, *_):
                trainer.should_stop = trainer.global_step >= stop

        run = trainer(tmp_path, max_steps=steps, limit_val_batches=0, callbacks=[Stop()], enable_checkpointing=False)
        run.fit(module, mela_data(), ckpt_path=ckpt, weights_only=False)
        return run, module.heads["late"].count

    run, count = fit(first_run, 4, 0.5)
    assert count == 0
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert fit(second_run, 99, 0.5, tmp_path / "x.ckpt")[1] == 1


def test_starts_by_hand():
    contrastive, late = Contrastive(), Contrastive(name="late", start=0.5)
    assert start_steps([contrastive, late], 9) == {"contrastive": 0, "late": 4}
    with pytest.raises(ValueError, match=r"heads\.late\.start: no head begins before step 4; expected one with"):
        start_steps([late], 9)
    with pytest.raises(
        ValueError, match=r"heads\.late\.start: found 1\.5; expected a share of the run's steps below 1"
    ):
        Contrastive(name="late", start=1.5)
