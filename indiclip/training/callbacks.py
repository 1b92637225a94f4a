"""What a run shows while it trains: the start-up table, the progress line, task gradients."""

import itertools
import math
import time
import warnings
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table
from torch import Tensor

from indiclip.distributed import mean_over_ranks
from indiclip.float8 import float8_layers
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source, keyed
from indiclip.module import Batches, MultiTask
from indiclip.task_weights import flat, gradients_of
from indiclip.training.fault_tolerance.later import Later
from indiclip.training.fault_tolerance.preemption import write_line
from indiclip.training.fault_tolerance.ranks import callbacks_of, folder_of
from indiclip.training.fault_tolerance.step_sync import StepSync
from indiclip.training.record import append_history
from indiclip.training.run_bar import RunBar, time_left
from indiclip.training.teachers import said_of
from indiclip.training.throughput import Throughput


class StartupTable(Callback):
    """Prints heads, sources, parameter counts and tokens per image before the first step."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = folder_of(trainer)
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, MultiTask)
        console = Console()
        data: MultiTaskData = trainer.datamodule  # type: ignore[attr-defined]
        console.print(_sources_table(data))
        for key, source in (keyed("data.train", data.train) | keyed("data.val", data.val)).items():
            inventory = source.dataset.inventory
            in_table = {f"{len(source.dataset):,} {unit}" for unit in inventory.present}
            if lines := [line for line in inventory.lines() if line not in in_table]:
                console.print(f"{key}: {'; '.join(lines)}", markup=False, soft_wrap=True)
        console.print(_parts_table(pl_module))
        for line in pl_module.encoder.initialised:
            console.print(f"init_from: {line}", markup=False, soft_wrap=True)
        if line := _frozen_line(pl_module):
            console.print(line, markup=False, soft_wrap=True)
        device = trainer.strategy.root_device
        if number := float8_layers(pl_module):
            emulated = "" if device.type == "cuda" else ", emulated: the same numbers, more slowly"
            console.print(f"float8, {pl_module.float8}: {number} linear layers of the towers{emulated}", soft_wrap=True)
        shown = "none (fast_dev_run)" if trainer.fast_dev_run else folder  # type: ignore[attr-defined]
        steps = f"steps {trainer.max_steps}" if trainer.max_steps > 0 else f"epochs {trainer.max_epochs}"
        threads = f"   threads {torch.get_num_threads()}" if device.type == "cpu" else ""
        console.print(
            f"run folder [bold]{shown}[/]   {trainer.world_size} x {device.type}{threads}   precision "
            f"{trainer.precision}   {steps}",
            soft_wrap=True,
        )
        for line in said_of(data):
            console.print(line, markup=False, soft_wrap=True)
        damaged = [found for source in (*data.train, *data.val) for found in source.dataset.damaged]
        if damaged:  # it is not known how many samples these places held
            found = damaged[0]
            console.print(
                f"{len({*damaged}):,} damaged places, listed in quarantine.jsonl, such as {found.shard}: {found.key}: "
                f"{found.reason}",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )


def _sources_table(data: MultiTaskData) -> Table:
    columns = ("task", "source", "samples", "batch", "tokens/image")
    table = Table(*columns, title="Sources", title_justify="left")
    for key, source in (keyed("train", data.train) | keyed("val", data.val)).items():
        table.add_row(
            source.task,
            f"{key} {type(source.dataset).__name__}",
            f"{len(source.dataset):,}",
            f"{source.batch_tokens:,} tokens" if source.batch_tokens else _batch_sizes(source),
            ", then ".join(f"<= {budget.most_kept}" for budget in source.budgets),
        )
    return table


def _batch_sizes(source: Source) -> str:
    sizes = ", then ".join(str(spec.samples) for _, spec in source.specs)
    return f"{sizes} in 1 of {source.every} steps" if source.every > 1 else sizes


def _parts_table(module: MultiTask) -> Table:
    encoder = module.encoder
    parts = [("encoder", encoder, "", ""), ("- backbone", encoder.backbone, "", ""), ("- text", encoder.text, "", "")]
    for head in module.each_head():
        late = f" from step {start}" if (start := module.starts.get(head.name)) else ""
        parts.append((head.name, head, head.task, f"{head.weight:g}{late}"))
    partly = _sizes(module)[1] != "all"
    columns = ("parameters", "trained") if partly else ("parameters",)
    table = Table("part", "class", *columns, "task", "weight", title="Model", title_justify="left")
    for name, part, task, weight in parts:
        sizes = _sizes(part)
        table.add_row(name, type(part).__name__, *(sizes if partly else sizes[:1]), task, weight)
        if part is encoder.text:
            table.add_section()
    for column in table.columns:
        column.overflow = "fold"  # in a narrow terminal, where the end of a name would be cut off
    return table


def _sizes(module: torch.nn.Module) -> tuple[str, str]:
    """How many parameters there are, and how many of them are trained."""
    whole = sum(parameter.numel() for parameter in module.parameters())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return f"{whole:,}", "all" if trained == whole else f"{trained:,}"


def _frozen_line(module: MultiTask) -> str:
    """What is not trained, and why; empty where everything is."""
    asked = [path for path in module.frozen if path not in module.unused]
    parts = [f"frozen: {', '.join(asked)}"] * bool(asked)
    parts += [f"used by no head, and not trained: {', '.join(module.unused)}"] * bool(module.unused)
    whole, trained = _sizes(module)
    return f"{'; '.join(parts)}; {trained} of {whole} parameters are trained" if parts else ""


class TaskProgress(ProgressBar):
    """The run's progress: steps, time left, each head's loss (of the step before), throughput; batches of a validation.

    A head's loss is the sum of what is logged as `train/<head>/...` of its losses, without the head's `weight`; of a
    head that took no part in that step, the one before.

    Args:
        refresh_seconds: Time between updates.
        plain_seconds: Time between lines where the output is no terminal.
    """

    def __init__(self, refresh_seconds: float = 0.5, plain_seconds: float = 20.0) -> None:
        super().__init__()
        self.refresh_seconds, self.plain_seconds = refresh_seconds, plain_seconds
        self._bar: RunBar | None = None
        self.enable()

    def disable(self) -> None:
        self.is_enabled = False

    def enable(self) -> None:
        self.is_enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._shown = time.monotonic()
        self._losses: tuple[list[str], Later] | None = None  # by head, of the step before, on their way to the host
        self._known: dict[str, float] = {}  # each head's last
        console = Console()
        self._seconds = self.refresh_seconds if console.is_interactive else self.plain_seconds
        if console.is_interactive:  # on all ranks: a terminal sends Ctrl-C to each of them
            for sync in callbacks_of(trainer, StepSync):
                sync.preemption.tell = self._tell
        if not self.is_enabled:  # as on all ranks but the first
            return
        self._bar = RunBar(console, self.refresh_seconds)
        total = int(trainer.estimated_stepping_batches) if trainer.max_steps != -1 or trainer.max_epochs != -1 else None
        self._training = self._bar.add_task("train", total=total, completed=trainer.global_step)
        self._validation: TaskID | None = None
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batches, batch_idx: int
    ) -> None:
        if self._bar is None or not self._is_time():
            return
        assert isinstance(pl_module, MultiTask)
        if self._losses is None:
            zero = torch.zeros((), device=pl_module.device)
            terms = pl_module.head_terms  # whose heads may be others in the next step
            self._losses = [*terms], Later(torch.stack([sum(of_head, zero) for of_head in terms.values()]))
            return
        names, losses_of_heads = self._losses
        if not losses_of_heads.arrived:
            return
        self._known |= zip(names, losses_of_heads.read(), strict=True)
        self._losses = None
        losses = [f"{name}\N{NO-BREAK SPACE}{loss:.3f}" for name, loss in self._known.items()]
        rates = [throughput.line(trainer) for throughput in callbacks_of(trainer, Throughput)]
        self._bar.numbers = "  ".join([*losses, *rates])
        self._show(self._training, trainer.global_step, f"  {self._bar.numbers}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._training, completed=trainer.global_step)
            batches = sum(trainer.num_val_batches)
            self._validation = self._bar.add_task("validate", total=batches if math.isfinite(batches) else None)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self._bar is not None and self._validation is not None:
            self._bar.advance(self._validation)
            if self._is_time():
                self._show(self._validation)

    def on_validation_end(self, *_: Any) -> None:
        if self._bar is not None and self._validation is not None:
            self._bar.remove_task(self._validation)
            self._validation = None

    def on_train_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._training, completed=trainer.global_step)
            self._bar.stop()
            self._bar = None

    on_exception = on_train_end

    def _is_time(self) -> bool:
        return time.monotonic() - self._shown >= self._seconds

    def _show(self, row: TaskID, completed: int | None = None, numbers: str = "") -> None:
        """Update a bar; where there is no terminal, print a line."""
        assert self._bar is not None
        self._shown = time.monotonic()
        self._bar.update(row, completed=completed)
        if not self._bar.console.is_interactive:
            task = next(task for task in self._bar.tasks if task.id == row)
            of = int(task.total) if task.total is not None else "?"
            line = f"{task.description} {int(task.completed)}/{of}{numbers}  {time_left(task)}"
            self._bar.console.print(line.replace("\N{NO-BREAK SPACE}", " ").rstrip(), markup=False, soft_wrap=True)

    def _tell(self, line: str) -> None:
        """In a signal handler: a line that is not to be erased when the bar is redrawn."""
        if self._bar is not None:
            self._bar.notice = line
        elif self.is_enabled:
            write_line(line)


class TaskGradients(Callback):
    """Logs what each task asks of the backbone: its gradient's norm, and the cosine between every two tasks.

    A cosine below zero says that two tasks pull against each other. Costs one more backward pass per task in the
    steps where it runs, and an exchange of gradients where there are more ranks: what is logged is of their means. Of a
    backbone that is trained in part only that part counts; of a frozen one there is nothing to log. Needs whole weights
    and the whole batch: neither shards nor `model.micro_batches`.

    Args:
        every_n_steps: Steps between two readings.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = folder_of(trainer)
        assert isinstance(pl_module, MultiTask)
        if pl_module.micro_batches > 1:
            raise ValueError(
                "trainer.callbacks: TaskGradients needs the gradients of the whole batch at once; model.micro_batches "
                f"is {pl_module.micro_batches}, expected 1"
            )
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            raise ValueError(
                "trainer.callbacks: TaskGradients needs whole weights, and this trainer.strategy shares them out; "
                "expected ddp"
            )
        if stage == "fit" and not any(parameter.requires_grad for parameter in pl_module.encoder.backbone.parameters()):
            warnings.warn("TaskGradients: the backbone is frozen, so there is nothing to log", stacklevel=2)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        step = trainer.global_step
        if step % self.every_n_steps:
            return
        assert isinstance(pl_module, MultiTask)
        values = gradient_numbers(pl_module)
        if not values:
            return
        # Not by `pl_module.log`, which would repeat them as if they were measured at every logging step.
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
        if trainer.is_global_zero:
            append_history(self._folder, {"step": step, **values})


def gradient_numbers(module: MultiTask) -> dict[str, float]:
    """Norm of each head's gradient on what is trained of the backbone, and cosines, from `module.head_losses`."""
    parameters = [p for p in module.encoder.backbone.parameters() if p.requires_grad]
    if not parameters:
        return {}
    of_heads = gradients_of(module.head_losses, parameters)
    gradients = {name: mean_over_ranks(flat(parts, parameters)) for name, parts in of_heads.items()}
    numbers = {f"train/{name}/backbone_grad_norm": float(gradient.norm()) for name, gradient in gradients.items()}
    for first, second in itertools.combinations(gradients, 2):
        cosine = torch.nn.functional.cosine_similarity(gradients[first], gradients[second], dim=0)
        numbers[f"train/grad_cosine/{first}_{second}"] = float(cosine)
    return numbers
