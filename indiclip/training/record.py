"""What a run leaves in its folder: history, metrics, the report."""

import errno
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from indiclip import json_lines
from indiclip.datasets.inventory import Inventory
from indiclip.lightning_internals import validate_now
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.plan import apportion
from indiclip.loading.source_groups import source_keys
from indiclip.masking import mask
from indiclip.module import MultiTask
from indiclip.presentation import Measure, Picture
from indiclip.sharding import gathered_weights
from indiclip.training.ema import scored_weights
from indiclip.training.fault_tolerance.ranks import folder_of
from indiclip.training.report.headline import Drawn, earlier_run, headlines
from indiclip.training.report.report import held_out, held_out_pictures, language_tables, write_report
from indiclip.training.report.run_names import HeadNames

# What `metrics.json` does without.
_OF_THE_PAGE = ("history", "heads", "earlier", "model", "learned", "sources")


class RunRecord(Callback):
    """Writes `history.jsonl`, `metrics.json` and `report.html` into the run's folder.

    `history.jsonl` has a line per logging step; a resumed run goes on in it. `indiclip validate` and `test` leave the
    other two in the folder's `validate/` or `test/`, in place of what the last one left there, and say which
    `checkpoint` was scored. Where nothing can be written, they say so and go on.

    Args:
        pictures: Held-out images per head in the report; fewer where it would be larger than 3 MB.
    """

    def __init__(self, pictures: int = 12) -> None:
        self.pictures = pictures
        self._began: float | None = None  # when training did, less the seconds of the runs that this one goes on from
        self._scored = -1  # the last step after which the history has held-out scores, when this run goes on in it
        self._loaded_step = 0  # of the checkpoint
        self._scoring_since = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = folder_of(trainer)
        if stage == "fit":
            self._recorded = trainer.strategy.broadcast(_step_of(self._folder / "metrics.json"))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scoring_since = time.monotonic()

    on_test_start = on_validation_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Go on in the history of the run, or begin one."""
        self._step = trainer.global_step
        self._began = time.monotonic()
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            rows = read_history(self._folder) if trainer.ckpt_path else []
            # Not what TaskGradients said of a step that comes again, which it does before the step is counted.
            kept = [row for row in rows if row["step"] < self._step + ("seconds" in row)]
            self._began -= max((row.get("seconds", 0.0) for row in kept), default=0.0)
            scored = [row["step"] for row in kept if any(name.startswith("val/") for name in row)]
            self._scored = max(scored, default=-1)
            json_lines.rewrite(self._folder / "history.jsonl", kept)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == trainer.max_steps:
            trainer.should_stop = True  # else Lightning ends in mid-epoch without a last validation
        if step != self._step and every and step % every == 0:
            self._write_row(trainer, "train/", "throughput/")
        self._step = step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that was killed between this row and the next checkpoint goes through the held-out data again.
        if self._began is not None and not trainer.sanity_checking and self._scored < trainer.global_step:
            self._write_row(trainer, "val/")
            self._scored = trainer.global_step
        if self._began is None and trainer.state.fn == "validate":
            self._write_scores(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_scores(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation and self._scored < trainer.global_step:
            validate_now(trainer)  # where `check_val_every_n_epoch` or `max_time` left it out

    def add(self, trainer: Trainer, values: dict[str, float]) -> None:
        """A row for what another callback measured at this step, which nobody need measure again."""
        if self._began is None or not trainer.is_global_zero:
            return
        step = trainer.global_step
        # A run that was killed before its next checkpoint may come by here again.
        if not any(row["step"] == step and values.keys() <= row.keys() for row in read_history(self._folder)):
            self._append(trainer, finite(values))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._began is not None:
            link = self._folder / "checkpoints" / "last.ckpt"
            last = str(link.resolve()) if link.exists() else getattr(trainer.checkpoint_callback, "last_model_path", "")
            saved = f"{last}, from which --ckpt_path last goes on" if last else "none"
            rank = f", rank {trainer.global_rank}" if trainer.world_size > 1 else ""
            where = f"{self._folder}{rank}, after step {trainer.global_step}; last checkpoint: {saved}"
            exception.add_note(f"(while training {where})")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._began is not None:
            self._write(trainer, pl_module)
        elif trainer.is_global_zero:  # what the folder holds stays
            print(f"no step is left: {trainer.global_step} are done; more need another trainer.max_steps or max_epochs")

    def after_fit(self, trainer: Trainer, pl_module: LightningModule, data: LightningDataModule) -> None:
        """Validate and write what is missing where a run was stopped between its last step and its end."""
        if self._began is None and self._recorded < trainer.global_step:
            self._begin(trainer)
            trainer.validate(pl_module, datamodule=data, verbose=False)
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights, pictures = self._draw(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        data: MultiTaskData = trainer.datamodule  # type: ignore[attr-defined]
        assert self._began is not None
        about: dict[str, Any] = {"step": trainer.global_step, "seconds": round(time.monotonic() - self._began, 1)}
        about |= {"weights": weights} | _about(pl_module, data)
        record = _record(self._folder, about, trainer, data.inventories())
        _write_files(self._folder, self._folder.name, record, pictures)
        _print_scores(record)
        print_listed("unreadable samples", self._folder / "quarantine.jsonl")
        print_listed("steps that were not finite and were skipped", self._folder / "nonfinite.jsonl")
        Console().print(f"report [bold]{escape(str(self._folder / 'report.html'))}[/]", soft_wrap=True)

    def _write_scores(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What `validate` and `test` leave."""
        weights, pictures = self._draw(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        data: MultiTaskData = trainer.datamodule  # type: ignore[attr-defined]
        assert trainer.state.fn is not None
        command, checkpoint = trainer.state.fn.value, trainer.ckpt_path
        folder = self._folder / command
        about: dict[str, Any] = {"step": self._loaded_step, "seconds": round(time.monotonic() - self._scoring_since, 1)}
        times = [row.get("seconds", 0.0) for row in read_history(self._folder) if row["step"] <= self._loaded_step]
        about |= {"trained_seconds": max(times, default=0.0)}
        about |= {"weights": weights if checkpoint else "the initial weights"}
        about |= {"checkpoint": str(checkpoint) if checkpoint else None}
        held_out = {key: of for key, of in data.inventories().items() if key.startswith("data.val")}
        record = _record(folder, about | _about(pl_module, data), trainer, held_out)
        _print_scores(record)
        try:
            _write_files(folder, f"{self._folder.name}: {command}", record, pictures)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            warnings.warn(f"{folder}: {error.strerror}; the scores are not written", stacklevel=1)
        else:
            print_listed("unreadable samples", folder / "quarantine.jsonl")
            Console().print(f"scores and report [bold]{escape(str(folder))}[/]", soft_wrap=True)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str, dict[str, list[Picture]]]:
        """Which weights are scored, in words, and on the first rank the pictures of each head."""
        assert isinstance(pl_module, MultiTask)
        data: MultiTaskData = trainer.datamodule  # type: ignore[attr-defined]
        with scored_weights(trainer, pl_module) as weights, gathered_weights(pl_module):
            if not trainer.is_global_zero:
                return weights, {}
            with trainer.precision_plugin.forward_context():
                batches = data.first_val_batches(self.pictures)
                return weights, held_out_pictures(pl_module, batches, self.pictures)

    def _write_row(self, trainer: Trainer, *prefixes: str) -> None:
        if trainer.is_global_zero:
            values = {k: v for k, v in finite(trainer.callback_metrics).items() if k.startswith(prefixes)}
            self._append(trainer, values)

    def _append(self, trainer: Trainer, values: dict[str, float | None]) -> None:
        assert self._began is not None
        seconds = round(time.monotonic() - self._began, 1)
        append_history(self._folder, {"step": trainer.global_step, "seconds": seconds, **values})


def _record(folder: Path, about: dict[str, Any], trainer: Trainer, data: dict[str, Inventory]) -> dict[str, Any]:
    """What the report shows: of the metrics, and of the lists in a folder."""
    return about | {
        "earlier": earlier_run(folder, {key: inventory.summary() for key, inventory in data.items()}),
        "data": data,
        "metrics": finite(trainer.callback_metrics),
        "quarantined": json_lines.read(folder / "quarantine.jsonl"),
        "nonfinite_steps": len(json_lines.read(folder / "nonfinite.jsonl")),
        "history": read_history(folder),
    }


def _write_files(folder: Path, title: str, record: dict[str, Any], pictures: dict[str, list[Picture]]) -> None:
    """Write `report.html` and, without the history and with counts for lists, `metrics.json`."""
    write_report(folder, title, record, pictures)
    summary = {name: value for name, value in record.items() if name not in _OF_THE_PAGE}
    summary["data"] = {key: inventory.summary() for key, inventory in record["data"].items()}
    summary["quarantined"] = len(record["quarantined"])
    metrics = (mask(json.dumps(summary, indent=2)) + "\n").encode()
    json_lines.write_whole(folder / "metrics.json", metrics)  # last: it says that all of this is done


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `history.jsonl`; none where there is no such file."""
    return json_lines.read(folder / "history.jsonl")


def append_history(folder: Path, row: dict[str, Any]) -> None:
    """Add a row to a run's `history.jsonl`."""
    json_lines.append(folder / "history.jsonl", [row])


def _step_of(metrics: Path) -> int:
    """The step after which a `metrics.json` was written; 0 where there is none."""
    try:
        return int(json.loads(metrics.read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def finite(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Rounded; None for what is not finite, which JSON has no number for."""
    values = {name: float(value) for name, value in metrics.items()}
    return {name: round(value, 6) if math.isfinite(value) else None for name, value in values.items()}


def head_names(module: MultiTask, data: MultiTaskData) -> HeadNames:
    """What the heads and their metrics are called, for each held-out source of their tasks."""
    names: dict[str, tuple[str, dict[str, Measure]]] = {head.name: (head.title, {}) for head in module.each_head()}
    for key, source in zip(source_keys(data.val, train=False), data.val, strict=True):
        place = key.removeprefix(source.task)
        where = f" on {place[1:] if source.name else f'source {place[1:]}'}" if place else ""
        for head in module.each_head():
            if head.task == source.task:
                names[head.name + place] = (f"{head.title}{where}", head.measures(source.dataset))
    return names


def _about(module: LightningModule, data: MultiTaskData) -> dict[str, Any]:
    """What the report calls the heads, and its opening sentence is made of."""
    assert isinstance(module, MultiTask)
    parameters = sum(parameter.numel() for parameter in module.encoder.parameters())
    backbone = type(module.encoder.backbone).__name__
    sources: dict[str, list[Drawn]] = {}
    for source in data.train:
        dataset = getattr(source.dataset, "dataset", source.dataset)  # what a `Split` takes a part of
        per_step = None
        if source.batch_size is not None and source.clusters is None and len(source.specs) == 1:
            group = [other for other in data.train if other.task == source.task]  # which share the batch
            shares = apportion(source.batch_size, [other.weight for other in group])
            per_step = next(share for other, share in zip(group, shares, strict=True) if other is source)
        sources.setdefault(type(dataset).__name__, []).append(Drawn(len(source.dataset), per_step, source.every))
    return {
        "heads": head_names(module, data),
        "model": f"An encoder of {_short(parameters)} parameters ({backbone})",
        "learned": [head.title for head in module.each_head()],
        "sources": sources,
    }


def _short(number: int) -> str:
    """`2.5 million` of 2,491,968."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"


def print_listed(what: str, file: Path) -> None:
    """Say how many rows a file of the run has, where it has any."""
    if rows := json_lines.read(file):
        Console().print(f"{what}: {len(rows):,}, listed in [bold]{file}[/]", soft_wrap=True)


def _print_scores(record: dict[str, Any]) -> None:
    heads, earlier = record["heads"], record["earlier"]
    rows = headlines(record["metrics"], heads, earlier)
    last = [escape(f"{earlier.name} had")] if earlier.metrics else []
    headers = ("on held-out data", "reached", "trivial answer", "better", *last)
    table = Table(*headers, title="Result", title_justify="left")
    for row in rows:
        before = [row.before_words] if last else []
        what = f"{row.subject}: {row.words}"
        table.add_row(*map(escape, (what, row.value_words, row.trivial_words, row.better, *before)))
    console = Console()
    console.print(table if rows else "nothing was held out: there are no scores")
    if earlier.note:
        console.print(earlier.note, markup=False, soft_wrap=True)
    for title, columns, languages in language_tables(held_out(record["metrics"])[1], heads):
        shown = [escape(words) for words, _ in columns]
        table = Table("language", *shown, title=f"{escape(title)} by language", title_justify="left")
        for language, values in languages:
            table.add_row(language, *values)
        console.print(table)
