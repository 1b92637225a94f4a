"""What a run shows and leaves while it trains: the start-up table, the progress line, task gradients, its record."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from indiclip.evals.report import held_out_pictures, write_report
from indiclip.module import Batches, MultiTask


class StartupTable(L.Callback):
    """Prints heads, sources, parameter counts and tokens per image before the first step."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, MultiTask)
        console = Console()
        console.print(_sources_table(trainer), _parts_table(pl_module))
        device = trainer.strategy.root_device
        console.print(
            f"run folder [bold]{Path(trainer.log_dir or '.')}[/]   {trainer.world_size} x {device.type}   precision "
            f"{trainer.precision}   steps {trainer.max_steps if trainer.max_steps > 0 else trainer.max_epochs}"
        )


def _sources_table(trainer: L.Trainer) -> Table:
    columns = ("task", "source", "samples", "batch", "tokens/image", "left out")
    table = Table(*columns, title="Sources", title_justify="left")
    data = trainer.datamodule  # type: ignore[attr-defined]
    for part, sources in (("train", data.train), ("val", data.val)):
        for source in sources:
            table.add_row(
                source.task,
                f"{type(source.dataset).__name__} ({part})",
                f"{len(source.dataset):,}",
                str(source.batch_size),
                f"<= {source.max_tokens}",
                ", ".join(f"{n:,} {what}" for what, n in getattr(source.dataset, "left_out", {}).items() if n),
            )
    return table


def _parts_table(module: MultiTask) -> Table:
    table = Table("part", "class", "parameters", "task", "weight", title="Model", title_justify="left")
    encoder = module.encoder
    rest = sum(p.numel() for p in encoder.parameters())
    for name, part in (("backbone", encoder.backbone), ("text", encoder.text)):
        count = sum(p.numel() for p in part.parameters())
        rest -= count
        table.add_row(name, type(part).__name__, f"{count:,}", "", "")
    table.add_row("pooling and projections", type(encoder).__name__, f"{rest:,}", "", "")
    for head in module.each_head():
        count = sum(p.numel() for p in head.parameters())
        table.add_row(f"head: {head.name}", type(head).__name__, f"{count:,}", head.task, f"{head.weight:g}")
    return table


class TaskProgress(ProgressBar):
    """One line for the whole run: step, samples/s, each task's loss, time left.

    Args:
        refresh_seconds: Time between updates, so that reading losses does not make a GPU wait at every step.
        plain_seconds: Time between lines where the output is no terminal.
    """

    def __init__(self, refresh_seconds: float = 0.5, plain_seconds: float = 20.0) -> None:
        super().__init__()
        self.refresh_seconds, self.plain_seconds = refresh_seconds, plain_seconds
        self._enabled = True
        self._progress: Progress | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    @property
    def is_enabled(self) -> bool:
        return self._enabled

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._samples, self._since, self._shown = 0, time.monotonic(), time.monotonic()
        if not self.is_enabled or not trainer.is_global_zero:
            return
        self._console = Console()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        total = int(trainer.estimated_stepping_batches) if trainer.max_steps != -1 or trainer.max_epochs != -1 else None
        self._bar = self._progress.add_task("train", total=total, completed=trainer.global_step, rate="", losses="")
        self._progress.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batches, batch_idx: int
    ) -> None:
        self._samples += sum(len(part["keys"]) for part in batch.values()) * trainer.world_size
        now = time.monotonic()
        terminal = self._progress is not None and self._console.is_terminal
        if self._progress is None or now - self._shown < (self.refresh_seconds if terminal else self.plain_seconds):
            return
        self._shown = now
        assert isinstance(pl_module, MultiTask)
        losses = "  ".join(f"{name} {loss.item():.3f}" for name, loss in pl_module.head_losses.items())
        rate = f"{self._samples / (now - self._since):.0f} samples/s"
        self._progress.update(self._bar, completed=trainer.global_step, rate=rate, losses=losses)
        if not terminal:
            task = self._progress.tasks[0]
            left = f"{task.time_remaining:.0f} s left" if task.time_remaining is not None else ""
            self._console.print(
                f"step {trainer.global_step}/{task.total or '?'}  {rate}  {losses}  {left}", soft_wrap=True
            )
        if now - self._since > 10:  # a moving rate: what happened long ago does not count
            self._samples, self._since = 0, now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._progress is not None:
            self._progress.update(self._bar, description="validate")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._samples, self._since = 0, time.monotonic()
        if self._progress is not None:
            self._progress.update(self._bar, description="train", completed=trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close(trainer)

    def _close(self, trainer: L.Trainer) -> None:
        if self._progress is not None:
            self._progress.update(self._bar, completed=trainer.global_step)
            self._progress.stop()
            self._progress = None


class TaskGradients(L.Callback):
    """Logs what each task asks of the backbone: its gradient's norm, and the cosine between every two tasks.

    A cosine below zero says that two tasks pull against each other. Costs one more backward pass per task in the
    steps where it runs; what it reads is this rank's gradient, before any averaging.

    Args:
        every_n_steps: Steps between two readings.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if trainer.global_step % self.every_n_steps:
            return
        assert isinstance(pl_module, MultiTask)
        parameters = [p for p in pl_module.encoder.backbone.parameters() if p.requires_grad]
        gradients: dict[str, Tensor] = {}
        for name, part in pl_module.head_losses.items():
            parts = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
            gradients[name] = torch.cat([g.float().flatten() for g in parts if g is not None])
        for name, gradient in gradients.items():
            pl_module.log(f"train/{name}/backbone_grad_norm", gradient.norm(), batch_size=1)
        for first, second in itertools.combinations(gradients, 2):
            cosine = torch.nn.functional.cosine_similarity(gradients[first], gradients[second], dim=0)
            pl_module.log(f"train/grad_cosine/{first}_{second}", cosine, batch_size=1)


class RunRecord(L.Callback):
    """Writes `history.jsonl`, `skipped.jsonl`, `metrics.json` and `report.html` into the run's folder.

    `history.jsonl` has a line per logging step; a resumed run goes on in it.

    Args:
        pictures: Held-out images per head in the report.
    """

    def __init__(self, pictures: int = 12) -> None:
        self.pictures = pictures
        self.skipped: list[dict[str, str]] = []  # task, key, reason

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()
        if trainer.is_global_zero and trainer.log_dir:
            folder = Path(trainer.log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            kept = (
                [row for row in read_history(folder) if row["step"] <= trainer.global_step] if trainer.ckpt_path else []
            )
            (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batches, batch_idx: int
    ) -> None:
        self._count_skipped(trainer, batch)
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # else Lightning ends in mid-epoch without a last validation
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._append(trainer, "train/")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batches,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._count_skipped(trainer, batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._append(trainer, "val/")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not trainer.log_dir:
            return
        assert isinstance(pl_module, MultiTask)
        folder = Path(trainer.log_dir)
        record: dict[str, Any] = {
            "step": trainer.global_step,
            "seconds": round(time.monotonic() - self._started, 1),
            "metrics": _numbers(trainer.callback_metrics),
            "skipped": len(self.skipped),
        }
        (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
        record |= {"history": read_history(folder), "skipped": self.skipped}
        data = trainer.datamodule  # type: ignore[attr-defined]
        batches = data.first_val_batches(self.pictures)
        write_report(folder, folder.name, record, held_out_pictures(pl_module, batches, self.pictures))
        _print_summary(folder, record["metrics"])

    def _append(self, trainer: L.Trainer, prefix: str) -> None:
        if trainer.is_global_zero and trainer.log_dir:
            values = {k: v for k, v in _numbers(trainer.callback_metrics).items() if k.startswith(prefix)}
            row = {"step": trainer.global_step, "seconds": round(time.monotonic() - self._started, 1), **values}
            with (Path(trainer.log_dir) / "history.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _count_skipped(self, trainer: L.Trainer, batch: Batches) -> None:
        for part in batch.values():
            for task, key, reason in part.get("skipped", []):
                row = {"task": task, "key": key, "reason": reason}
                self.skipped.append(row)
                if trainer.log_dir:
                    with (Path(trainer.log_dir) / "skipped.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `history.jsonl`; none where there is no such file."""
    file = folder / "history.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in metrics.items()}


def _print_summary(folder: Path, metrics: dict[str, float]) -> None:
    table = Table("metric", "held out", title="Result", title_justify="left")
    for name, value in sorted(metrics.items()):
        if name.startswith(("val/", "eval/")):
            table.add_row(name, f"{value:.4g}")
    console = Console()
    console.print(table)
    console.print(f"report [bold]{folder / 'report.html'}[/]", soft_wrap=True)
