"""`--trainer.profiler indiclip.Profiler`: where the time of a step goes, by part, and a trace of every operator."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler as LightningProfiler
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from indiclip.distributed import rank_and_world
from indiclip.lightning_internals import profiled_module
from indiclip.module import MultiTask
from indiclip.names import check_range
from indiclip.planning.parts import IMAGE_TOWER, PROJECTIONS, TEXT_TOWER, parts_of, within_part
from indiclip.training.trace import COMMUNICATION, DATA, LOSS, OPTIMIZER, VALIDATION, PartTimes, part_times

# Lightning's name of an action, behind its last dot -> the range that it is in the trace.
_RANGES = {"train_dataloader_next": DATA, "batch_to_device": DATA, "training_step": LOSS, "backward": "backward"}
_VALIDATION_BEGINS = "on_validation_model_eval"  # the first hook of a validation
_AFTER_A_STEP = (_VALIDATION_BEGINS, "on_train_epoch_end")  # what is no part of the last step


class Profiler(LightningProfiler):
    """Profiles some steps of `fit` by part: data, towers, heads, loss, optimizer, communication.

        indiclip fit --config conf/quickstart.yaml --trainer.profiler indiclip.Profiler
        indiclip fit --config conf/quickstart.yaml --trainer.profiler indiclip.Profiler --trainer.profiler.skip 100

    A table is printed, and written to `profile.txt` in the run's folder; `trace.json` beside it is read by
    https://ui.perfetto.dev and chrome://tracing. The backward pass of an operator counts for the part that the operator
    is in, gradient clipping and the checks of a step for the optimizer; communication is what no computation hides. A
    validation between the steps does not count. On CUDA times are those of the device. The first rank is profiled,
    which makes its steps slower while it lasts.

    Args:
        dirpath: Folder of the files; the command puts it into the run's.
        skip: Steps before, in which memory and kernels are still looked for.
        steps: How many are profiled; the trace of each takes some MB.
    """

    def __init__(self, dirpath: str | None = None, skip: int = 10, steps: int = 3) -> None:
        super().__init__(dirpath=dirpath)
        self.skip, self.steps = skip, steps
        self._seen = 0  # steps that have begun
        self._profile: Any = None  # torch's, while it records
        self._ranges = _OpenRanges()
        self._hooks = ExitStack()
        self._table = ""
        check_range({"trainer.profiler.skip": skip}, 1)  # last: Lightning tears down what was refused, too
        check_range({"trainer.profiler.steps": steps}, 1)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports every start and stop

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        self._seen, self._table = 0, ""  # each run is profiled

    def start(self, action_name: str) -> None:
        action = action_name.rpartition(".")[2]
        if action == "train_dataloader_next":
            self._step_begins()
        elif action == "on_train_end" or (action in _AFTER_A_STEP and self._seen == self.skip + self.steps):
            self._end()
        if self._profile is None:
            return
        if action in _RANGES:
            self._ranges.enter(_RANGES[action])
        elif action == _VALIDATION_BEGINS:
            _synchronize()  # what the device still does is of the step
            self._ranges.enter(VALIDATION)

    def stop(self, action_name: str) -> None:
        where, _, action = action_name.rpartition(".")
        ends_validation = action == "on_validation_end" and where.startswith("[Strategy]")  # its last hook
        if ends_validation and self._profile is not None:
            _synchronize()
        if ends_validation or action in _RANGES:
            self._ranges.leave()

    def _step_begins(self) -> None:
        number, self._seen = self._seen, self._seen + 1
        if rank_and_world()[0] != 0:
            return
        if number == self.skip - 1:
            # The first of its steps warms torch's profiler up.
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            plan = schedule(wait=0, warmup=1, active=self.steps, repeat=1)
            self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
            self._profile.start()
            self._mark(profiled_module(self))
        elif self._profile is not None:
            if number == self.skip + self.steps:
                self._end()
                return
            if number == self.skip:
                _synchronize()
            self._profile.step()

    def _mark(self, module: Any) -> None:
        """Have the parts of the model record when they run."""
        assert isinstance(module, MultiTask)
        heads = module.each_head()
        self._hooks.enter_context(parts_of(module, heads, self._ranges))
        for head in heads:
            self._hooks.enter_context(within_part(head, "loss", head.name, self._ranges))
        self._parts = [IMAGE_TOWER, TEXT_TOWER, PROJECTIONS, *(head.name for head in heads)]

    def _end(self) -> None:
        if self._profile is not None:
            _synchronize()
            self._profile.stop()
            self._profile = None
        self._hooks.close()

    def _write(self, recorded: Any) -> None:
        folder = Path(self.dirpath or ".")
        folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(folder / "trace.json"))
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
        times = part_times(events, self._parts)
        self._table = _table(times, [DATA, *self._parts, LOSS, OPTIMIZER, COMMUNICATION])
        (folder / "profile.txt").write_text(self._table)

    def summary(self) -> str:
        """The table; empty before it was measured."""
        return self._table

    def describe(self) -> None:
        """Print it; Lightning calls this at the end of a run."""
        if rank_and_world()[0] != 0 or not self._seen:
            return
        self._end()
        if not self._table:
            print(f"trainer.profiler: the run had {self._seen} steps, and skip is {self.skip}: none was profiled")
            return
        print(f"{self._table}trace {Path(self.dirpath or '.') / 'trace.json'}")

    def teardown(self, stage: str | None) -> None:
        self._end()
        super().teardown(stage)


class _OpenRanges:
    """Named ranges of the trace that are open, one within the other."""

    def __init__(self) -> None:
        self._open: list[record_function] = []

    def enter(self, name: str, *_: Any) -> None:
        self._open.append(record_function(name))
        self._open[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(self, *_: Any) -> None:
        if self._open:  # else profiling began in the middle of it
            self._open.pop().__exit__(None, None, None)


def _synchronize() -> None:
    """Wait for the device, so that the work of the profiled steps lies within them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _table(times: PartTimes, order: list[str]) -> str:
    table = Table("part")
    for name in ("ms per step", "share", "calls"):
        table.add_column(name, justify="right")
    for part in [*order, *sorted(times.seconds.keys() - {*order})]:
        seconds, calls = times.seconds.get(part, 0.0), times.calls.get(part, 0) / times.steps
        table.add_row(part, f"{1e3 * seconds:,.2f}", f"{seconds / times.step:.1%}", f"{calls:.3g}" if calls else "")
    table.add_row("step", f"{1e3 * times.step:,.2f}", "", "")
    console = Console(width=78)
    with console.capture() as captured:
        console.print(f"Profile of {times.steps} steps, times of the {'GPU' if times.on_device else 'processor'}")
        console.print(table)
    return captured.get()
