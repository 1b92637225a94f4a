"""Unreadable samples: one list for the run, whatever the number of ranks, and an end when there are too many."""

from collections import Counter
from contextlib import suppress
from pathlib import Path

from lightning import Trainer

from indiclip import json_lines
from indiclip.distributed import gathered
from indiclip.module import Batches
from indiclip.training.fault_tolerance.ranks import AgreedStop
from indiclip.types import Quarantined


class Quarantine:
    """Writes `quarantine.jsonl`, each sample once, and counts."""

    def __init__(self) -> None:
        self._new: list[Quarantined] = []
        self._known: set[tuple[str, str]] = set()  # (task, key)

    def begin(self, trainer: Trainer, folder: Path, anew: bool) -> None:
        """Begin a new list, or know what is listed already, in a run that goes on. A collective."""
        self._new, rows = [], []
        if trainer.is_global_zero:
            file = folder / "quarantine.jsonl"
            if anew:
                with suppress(OSError):  # `validate` of a run that nobody can write to
                    file.unlink(missing_ok=True)
            rows = json_lines.read(file)
        self._known = trainer.strategy.broadcast({(row["task"], row["key"]) for row in rows})

    def collect(self, batches: Batches) -> None:
        """Take what a batch says."""
        for batch in batches.values():
            for found in batch.get("quarantined", []):
                if (found.task, found.key) not in self._known:  # each epoch meets it again
                    self._known.add((found.task, found.key))
                    self._new.append(found)

    @property
    def pending(self) -> int:
        """Samples that this rank has not told the others of."""
        return len(self._new)

    def act(self, trainer: Trainer, folder: Path) -> None:
        """Tell each other and write; all ranks call this.

        Raises:
            AgreedStop: A task has more than the data allows.
        """
        mine, self._new = self._new, []
        rows = {(row.task, row.key): row for of_rank in gathered(mine) for row in of_rank}
        if rows and trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            json_lines.append(folder / "quarantine.jsonl", [row._asdict() for row in rows.values()])
        self._known |= rows.keys()
        counts = Counter(task for task, _ in self._known)
        limits: dict[str, int] = getattr(trainer.datamodule, "quarantine_limits", {})  # type: ignore[attr-defined]
        for task, limit in limits.items():
            if counts[task] > limit and trainer.state.fn == "fit":
                last = next((row for row in reversed(rows.values()) if row.task == task), None)
                newest = f"; the last one: {last.shard} {last.key}: {last.reason}" if last else ""
                raise AgreedStop(
                    trainer,
                    f"data.quarantine: {counts[task]} samples of task {task!r} are unreadable, {limit} are allowed"
                    f"{newest}; all of them are in {folder / 'quarantine.jsonl'}",
                )
