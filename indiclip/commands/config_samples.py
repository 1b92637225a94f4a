"""What `indiclip check` does: the sources of a config are built as for training, and their samples are read."""

import re
import sys
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from indiclip.commands.findings import json_line, show_lines
from indiclip.commands.parallel import results
from indiclip.commands.reading import Range, ranges
from indiclip.datasets.inventory import Inventory
from indiclip.loading.plan import SampleRef
from indiclip.loading.source import keyed
from indiclip.loading.steps import Steps
from indiclip.training.checks import check
from indiclip.training.cli import IndiCLI
from indiclip.training.config_errors import one_line
from indiclip.training.initial_weights import leave_out_initial_weights

_ENDS = "ends the run: "
_READ = "samples read"  # a unit of the inventory
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[\d/]\S*")  # in reasons that are otherwise the same


def run(config: list[str], samples: int, read_all: bool, workers: int | None, as_json: bool, others: list[str]) -> int:
    """Build the sources and read them. Returns 1 where training would be stopped."""
    for word in others:  # of `fit`, which does not know these
        if near := get_close_matches(word.partition("=")[0], ["--samples", "--all", "--workers", "--json"], 1, 0.8):
            raise ValueError(f"{word}: no such option; nearest is {near[0]!r} (indiclip check --help)")
    model, data = build_config([word for file in config for word in ("--config", file)] + others)
    sources = keyed("data.train", data.train) | keyed("data.val", data.val)
    totals = {key: _held(key, source.dataset) for key, source in sources.items()}
    readers = {key: _Reader(source, data, None if read_all else samples) for key, source in sources.items()}
    begins = all(reader.read(0, 1).used[_READ] for reader in readers.values())
    if begins:  # a mistake is said before all is read
        check(model, data, "fit")
    pieces = ranges((key, len(reader.chosen)) for key, reader in readers.items())
    for piece, found in zip(pieces, results(partial(_read, readers), pieces, workers, "samples"), strict=True):
        totals[piece.url] += found
    stops = _stops(sources, totals, data.quarantine_limits)
    if not begins and not stops:
        check(model, data, "fit")
    _show(sources, totals, stops, as_json)
    return 1 if stops else 0


def build_config(words: list[str]) -> tuple[Any, Any]:
    """The model and the data of a config, as `indiclip fit` builds them."""
    return build_run(words)[:2]


def build_run(words: list[str], checkpoint: Path | None = None) -> tuple[Any, Any, Any]:
    """The model and the data of a config, as `indiclip fit` builds them, and the Trainer's arguments.

    Args:
        words: Of `fit`.
        checkpoint: Whose weights will be loaded, so that those to begin with are not read.
    """

    class Built(Exception):
        """Ends the command where training would begin."""

    class Builder(IndiCLI):
        def before_instantiate_classes(self) -> None:
            """Without a run folder."""
            if checkpoint is not None:
                leave_out_initial_weights(self.config["fit"].model, checkpoint)

        def instantiate_trainer(self, **_: Any) -> Any:
            raise Built(self.model, self.datamodule, self.config["fit"]["trainer"])

    sys.argv[1:] = ["fit", *words]
    try:
        Builder()
    except ValueError as error:
        raise ValueError(one_line(error)) from error
    except Built as built:
        return built.args[0], built.args[1], built.args[2]
    raise ValueError("fit: nothing to check was built")


def _held(key: str, dataset: Any) -> Inventory:
    """What a dataset's files hold."""
    total = Inventory()
    total += dataset.inventory
    try:
        total.verify()
    except AssertionError as error:
        raise ValueError(f"{key}: {type(dataset).__name__} loses something without a reason: {error}") from error
    return total


class _Reader:
    """Reads samples of a source as validation does: not augmented, and none in place of an unreadable one."""

    def __init__(self, source: Any, data: Any, most: int | None) -> None:
        self.dataset, size = source.dataset, len(source.dataset)
        self._steps = Steps([source], data.seed, data.preprocessing, train=False)
        self.chosen = np.linspace(0, size - 1, min(size, most or size)).round().astype(np.int64).tolist()

    def read(self, first: int, last: int) -> Inventory:
        """The samples `chosen[first:last]`: read, or unreadable by reason without what differs from one to another."""
        (task,), found = self._steps.sources, Inventory()
        self._steps.unreadable()  # what its files lack as a whole is no sample
        for index in self.chosen[first:last]:
            try:
                self._steps.read(task, SampleRef(0, index, 0))
                reasons = [one.reason for one in self._steps.unreadable()]
            except Exception as error:  # of the dataset or the transform
                reasons = [f"{_ENDS}{type(error).__name__}: {error}"]
            found.present[_READ] += 1
            found.used[_READ] += not reasons
            for reason in reasons:
                kind = " ".join(_VARYING.sub("...", reason).split())[:80]
                found.leave_out(_READ, kind, f"{self.dataset.key(index)}: {' '.join(reason.split())[:160]}")
        return found


def _read(readers: dict[str, _Reader], piece: Range) -> Inventory:
    return readers[piece.url].read(piece.first, piece.last)


def _stops(sources: dict[str, Any], totals: dict[str, Inventory], limits: dict[str, int]) -> list[str]:
    """Why training would be stopped: as `Quarantine` counts, estimated where not every sample was read."""
    reasons = {f"{key}: {reason}" for key, total in totals.items() for _, reason, _, _ in total.left_out()}
    stops = sorted(reason for reason in reasons if _ENDS in reason)
    for task, limit in limits.items():
        expected, about = 0.0, ""
        for key, source in sources.items():
            if source.task == task:
                read, size = totals[key].present[_READ], len(source.dataset)
                expected += len(source.dataset.damaged) + (read - totals[key].used[_READ]) * size / max(read, 1)
                about = about if read == size else "about "
        if expected > limit:
            found = f"{about}{expected:,.0f} samples of task {task!r} are unreadable, {limit:,} are allowed"
            stops.append(f"data.quarantine: {found}")
    return stops


def _show(sources: dict[str, Any], totals: dict[str, Inventory], stops: list[str], as_json: bool) -> None:
    rows = [
        {
            "source": key,
            "dataset": type(source.dataset).__name__,
            "task": source.task,
            "samples": len(source.dataset),
            "damaged": [f"{lost.shard}: {lost.key}: {lost.reason}" for lost in source.dataset.damaged],
            "inventory": totals[key].summary(),
        }
        for key, source in sources.items()
    ]
    if as_json:
        print(json_line({"clean": not stops, "stops": stops, "sources": rows}), end="")
        return
    for row in rows:
        print(f"{row['source']}: {row['dataset']} for the task {row['task']}, {row['samples']:,} samples")
        show_lines(totals[row["source"]])
        print(*(f"  lost: {lost}\n" for lost in row["damaged"]), sep="", end="")
    print(*(stops or ["training can use this data"]), sep="\n")
