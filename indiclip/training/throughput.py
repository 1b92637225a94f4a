"""How fast a run is while it runs: samples and tokens per second, MFU, waiting for data, peak memory."""

import resource
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer

from indiclip.distributed import gathered
from indiclip.lightning_internals import around_saves, forget_fetches, forget_saves, time_fetches
from indiclip.module import Batches, MultiTask
from indiclip.names import check_range, with_prefix
from indiclip.planning.hardware import installed
from indiclip.planning.step_flops import StepFlops, step_flops, text_lengths
from indiclip.training.fault_tolerance.ranks import callbacks_of


class Work(NamedTuple):
    """What a rank's step goes through: samples, tokens of both towers, model FLOPs (0 where they are not known)."""

    samples: int
    tokens: int
    flops: float = 0.0


class Rates(NamedTuple):
    """Of one rank's recent steps; `waiting` is the share of their time that the rank waited for a batch."""

    samples: float
    tokens: float
    flops: float
    waiting: float


class _Step(NamedTuple):
    seconds: float
    waiting: float
    work: Work


class Meter:
    """Rates over the last steps, from the end of one to the end of the next, without the pauses between them.

    On a GPU the host runs at most one step ahead, so that over a window its clock is right without waiting.

    Args:
        window: Steps. The first of a run, in which memory and kernels are looked for, counts until there is another.
        clock: Gives seconds.
    """

    def __init__(self, window: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._steps: deque[_Step] = deque(maxlen=window)
        self._clock = clock
        self._ended: float | None = None  # when the last step did
        self._paused = self._waiting = self._wait_began = 0.0
        self._first: bool | None = None  # whether what is there is of the first step
        self._pauses = 0  # that are open, one within the other

    def wait_begins(self) -> None:
        self._wait_began = self._clock()

    def wait_ends(self) -> None:
        self._waiting += self._clock() - self._wait_began
        if self._ended is None:  # the loader has started
            self._ended, self._waiting, self._paused = self._clock(), 0.0, 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs inside is no training; pauses may be nested."""
        self.pause_begins()
        try:
            yield
        finally:
            self.pause_ends()

    def pause_begins(self) -> None:
        self._pauses += 1
        if self._pauses == 1:
            self._paused -= self._clock()

    def pause_ends(self) -> None:
        self._pauses -= 1
        if self._pauses == 0:
            self._paused += self._clock()

    def step_ends(self, work: Work) -> None:
        now = self._clock()
        if self._first:
            self._steps.clear()
        if self._ended is not None:
            self._steps.append(_Step(now - self._ended - self._paused, self._waiting, work))
        self._first = self._first is None
        self._ended, self._paused, self._waiting = now, 0.0, 0.0

    def rates(self) -> Rates | None:
        """None before the first step."""
        seconds = sum(step.seconds for step in self._steps)
        if seconds <= 0:
            return None
        samples, tokens, flops = (sum(column) for column in zip(*(step.work for step in self._steps), strict=True))
        waiting = sum(step.waiting for step in self._steps)
        return Rates(samples / seconds, tokens / seconds, flops / seconds, waiting / seconds)


class Throughput(Callback):
    """Logs `throughput/...` at the logging steps, of all ranks together.

    `samples_per_second` and `tokens_per_second` (image patches and text tokens that the towers read, padding aside) are
    sums over the ranks. `mfu` is the mean: the model's FLOPs without recomputation (of `indiclip plan`, scaled by each
    step's tokens) over the device's peak at `trainer.precision`; of FP8, over that of bf16. `waiting_for_data` is the
    mean share of time in which a rank waits for its loader. `peak_memory_gb` (1e9 bytes) is the largest rank's: of
    CUDA's tensors, else of the process. Validation, benchmark and the saving of checkpoints do not count as training.

    Args:
        peak_tflops: Of one device, for the MFU. None is that of the table of `indiclip plan`; where the device is not
            in it, as a CPU, there is no MFU.
        window: Steps that are looked back on.
    """

    def __init__(self, peak_tflops: float | None = None, window: int = 50) -> None:
        check_range({"Throughput.peak_tflops": peak_tflops}, without=0)
        check_range({"Throughput.window": window}, 1)
        self.peak_tflops, self.window = peak_tflops, window
        self.meter = Meter(window)
        self._peak: float | None = None  # FLOPS
        self._flops: StepFlops | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        assert isinstance(pl_module, MultiTask)
        heads = pl_module.each_head()
        self._captioned = {head.task for head in heads if "caption" in head.required_fields}
        self._peak = 1e12 * self.peak_tflops if self.peak_tflops else _known_peak(trainer)
        if self._peak is not None:  # before the model is sharded or compiled
            counted = _counted(trainer, pl_module) if trainer.is_global_zero else None
            self._flops = trainer.strategy.broadcast(counted)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter = Meter(self.window)
        time_fetches(trainer, self.meter.wait_begins, self.meter.wait_ends)
        around_saves(trainer, self.meter.pause)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batches, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, MultiTask)
        idle = [head.name for head in pl_module.each_head() if head.name not in pl_module.head_losses]
        self.meter.step_ends(self._work(batch, trainer.world_size, idle))
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step % every == 0 and (rates := self.meter.rates()) is not None:
            ranks = gathered((rates, peak_memory(pl_module.device)))
            pl_module.log_dict(self._over_ranks(ranks), batch_size=1)

    def _work(self, batches: Batches, world: int, idle: Sequence[str]) -> Work:
        """From what the loader gives on the host, and the heads that have not begun."""
        patches = sum(sum(batch["images"]["num_patches"]) for batch in batches.values())
        texts = sum(sum(text_lengths(batch)) for task, batch in batches.items() if task in self._captioned)
        samples = sum(len(batch["keys"]) for batch in batches.values())
        return Work(samples, patches + texts, self._flops.of(batches, world, idle) if self._flops else 0.0)

    def _over_ranks(self, ranks: list[tuple[Rates, float]]) -> dict[str, float]:
        rates = [rate for rate, _ in ranks]
        values = {
            "samples_per_second": sum(rate.samples for rate in rates),
            "tokens_per_second": sum(rate.tokens for rate in rates),
            "waiting_for_data": sum(rate.waiting for rate in rates) / len(rates),
            "peak_memory_gb": max(memory for _, memory in ranks) / 1e9,
        }
        if self._flops is not None and self._peak is not None:
            values["mfu"] = sum(rate.flops for rate in rates) / len(rates) / self._peak
        return {f"throughput/{name}": value for name, value in values.items()}

    def line(self, trainer: Trainer) -> str:
        """For the progress bar, from this rank's own steps: others are taken to be as fast."""
        if (rates := self.meter.rates()) is None:
            return ""
        parts = [
            f"{rates.samples * trainer.world_size:,.0f} samples/s",
            f"{with_prefix(rates.tokens * trainer.world_size, digits=1)}tok/s",
        ]
        if self._flops is not None and self._peak is not None:
            parts.append(f"MFU {rates.flops / self._peak:.0%}")
        memory = peak_memory(trainer.strategy.root_device)
        parts += [f"waiting {rates.waiting:.0%}", f"memory {memory / 1e9:.1f} GB"]
        return "  ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)

    def on_validation_start(self, *_: Any) -> None:
        self.meter.pause_begins()

    def on_validation_end(self, *_: Any) -> None:
        self.meter.pause_ends()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        forget_saves(trainer)
        forget_fetches(trainer)


@contextmanager
def paused(trainer: Trainer) -> Iterator[None]:
    """For other callbacks that work between steps: what runs inside does not count as training."""
    meters = [callback.meter for callback in callbacks_of(trainer, Throughput)]
    for meter in meters:
        meter.pause_begins()
    try:
        yield
    finally:
        for meter in meters:
            meter.pause_ends()


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that CUDA's tensors have taken, or else this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else 1024 * most)


def _known_peak(trainer: Trainer) -> float | None:
    """FLOPS of a device of the table, at the run's precision."""
    root = trainer.strategy.root_device
    device = installed(torch.cuda.get_device_name(root)) if root.type == "cuda" else None
    if device is None:
        return None
    in_float32 = "tf32" if torch.get_float32_matmul_precision() != "highest" else "fp32"
    return device.peak("bf16" if "16" in str(trainer.precision) else in_float32)


def _counted(trainer: Trainer, module: MultiTask) -> StepFlops | None:
    try:
        return step_flops(module, trainer.datamodule)  # type: ignore[attr-defined]
    except Exception as error:  # a head of somebody else may read the device's values, or do anything; ranks wait
        warnings.warn(f"Throughput: no MFU, since the model's FLOPs cannot be counted: {error}", stacklevel=2)
        return None
