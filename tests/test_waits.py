"""Between two logging steps the host never waits for the device: whole runs, and a step on a GPU that is not there.

What is left waits for a reason: StepSync and the progress bar for the end of the step before, so that the host runs no
further ahead; an optimizer that is not fused, which the host must keep from stepping where a loss is not finite; the
loss scale of `16-mixed`, likewise; torchvision's own losses, in its detector; TaskGradients in its steps.
"""

import json

import pytest
import torch
from experiments import config
from fake_gpu import NoWaits, attention_kernel, moved, on_fake_gpu, step_batch
from helpers import tiny_encoder
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from processes import two_ranks
from torch._subclasses import FakeTensorMode
from trouble import Reads

from heads.contrastive import Contrastive
from heads.counting import Counting
from heads.densepose import DensePose
from heads.detection import Detection
from indiclip import flex
from indiclip.module import MultiTask
from indiclip.training.ema import EMA
from indiclip.training.fault_tolerance.later import Later
from indiclip.training.fault_tolerance.step_sync import StepSync


def part(class_path, **options):
    return {"class_path": class_path, "init_args": options}


@pytest.mark.slow
def test_no_value_is_read_between_logging_steps(tmp_path):
    """Two ranks, all heads, averages of the weights, clipping, the progress bar: through all of Lightning's loop."""
    scenes = part(
        "indiclip.generated.mela.Mela", num_scenes=16, size=48, people=1.0, depth=True, languages=["en", "hi"]
    )
    sources = [
        {"task": task, "dataset": scenes, "batch_size": 4, "max_tokens": 36} for task in ("contrastive", "scenes")
    ]
    detection = part("heads.detection.Detection", task="scenes", num_classes=17, out_channels=16, num_convs=1)
    densepose = part("heads.densepose.DensePose", task="scenes", roi_size=7, channels=16, num_convs=1)
    counting = part("heads.counting.Counting", task="scenes", channels=16, ask_boxes=True)
    tree = config(trainer__max_steps=7, data__steps_per_epoch=7, data__train=sources, data__val=[])
    tree["model"]["heads"] += [detection, densepose, counting, part("heads.depth.Depth", task="scenes")]
    tree["trainer"] |= {"log_every_n_steps": 3, "gradient_clip_val": 1.0, "enable_checkpointing": False}
    tree["trainer"]["callbacks"] = [
        part("trouble.Waits", folder=str(tmp_path)),
        part("indiclip.training.ema.EMA"),
        part("indiclip.training.callbacks.TaskProgress", plain_seconds=0.0),
    ]
    done, _ = two_ranks(tmp_path, tree)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "samples/s" in done.stdout
    for rank in range(2):
        rows = [json.loads(line) for line in (tmp_path / f"waits-{rank}.jsonl").read_text().splitlines()]
        waits = {row["step"]: row["waits"] for row in rows}
        assert sorted(waits) == [0, 1, 2, 3, 4, 5, 6, 7]
        assert [waits[step] for step in (1, 2, 4, 5)] == [[]] * 4  # 3 and 6 are logged, and 0 is before the first
        assert waits[3]


def test_reads_are_found():
    numbers = torch.arange(3.0)
    with Reads() as reads:
        numbers.sum().item()
        bool(numbers.any())
        numbers[numbers > 1]
        numbers.nonzero()
    names = [found.split()[0] for found in reads.found]
    assert names == ["_local_scalar_dense", "_local_scalar_dense", "index", "nonzero"]


class Event:
    """As `torch.cuda.Event`."""

    def record(self):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


class FakeTrainer:
    """As much of a Trainer as a step asks for."""

    precision, world_size, global_rank, global_step, is_global_zero, training = "bf16-mixed", 1, 0, 1, True, True


def test_a_whole_step_on_a_gpu_waits_for_nothing(monkeypatch):
    """Losses, logging as Lightning does it, the ranks' agreement, clipping, AdamW, averages: all but the backward pass,
    for which the GPU's driver is needed. What is set up once, in the first step, may wait."""
    monkeypatch.setattr(torch.autograd, "grad", lambda _, leaves, *gradient: [torch.zeros_like(x) for x in leaves])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(flex, "_compiled", lambda: attention_kernel)
    read = []
    monkeypatch.setattr(Later, "read", lambda later: read.append(later) or [0.0] * later._numbers.numel())
    options = {"task": "t"}
    heads = [
        Contrastive(**options),
        Detection(num_classes=17, out_channels=16, num_convs=1, **options),
        DensePose(roi_size=7, channels=16, num_convs=1, **options),
        Counting(channels=16, ask_boxes=True, **options),
    ]
    module, batch, trainer = MultiTask(tiny_encoder(batch_norm=True), heads), step_batch(), FakeTrainer()
    sync, ema = StepSync(), EMA()
    sync._losses, sync._on_the_way, sync._voted, sync._agreed = {}, [], False, 0
    ema._step = 0
    monkeypatch.setattr("torchmetrics.metric.deepcopy", torch.clone)  # of fake numbers, which have no storage
    results = _ResultCollection(training=True)

    def log_dict(values, batch_size):
        for name, value in values.items():
            results.log("training_step", name, value, on_step=True, on_epoch=False, batch_size=batch_size)

    module.log_dict = log_dict
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        on_fake_gpu(mode, module)
        module._device = torch.device("cuda", 0)  # as Lightning notes it
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)

        def step():
            trainer.global_step += 1
            on_device = {"t": moved(batch, "cuda")}
            sync.on_train_batch_start(trainer, module, on_device, 0)
            assert module.training_step(on_device, 0).device.type == "cuda"
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
            sync.on_after_backward(trainer, module)
            sync.on_before_optimizer_step(trainer, module, optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            ema.on_train_batch_end(trainer, module)
            sync.on_train_batch_end(trainer, module)

        step()
        assert len(read) == 0
        with NoWaits():
            step()
        assert len(read) == 1  # of the step before
        assert {value.device.type for value in results.metrics(on_step=True)["log"].values()} == {"cuda"}


@pytest.mark.gpu
def test_numbers_come_later_from_a_real_gpu():
    torch.cuda.set_sync_debug_mode("error")
    try:
        later = Later(torch.full((3,), 2.0, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert later.read() == [2.0, 2.0, 2.0]
    assert later.arrived
