"""What `indiclip check` does: the sources of a config are built as for training, and their samples are read."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from indiclip.commands.findings import Finding, Findings, json_line, show_lines
from indiclip.commands.parallel import results
from indiclip.loading.plan import SampleRef
from indiclip.loading.steps import Steps
from indiclip.training.checks import check
from indiclip.training.cli import IndiCLI
from indiclip.training.config_errors import ConfigError, check_yaml, explain
from indiclip.training.run_folder import config_files

_ENDS = "ends the run"
_PIECE = 32  # samples that a process reads at a time
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[\d/]\S*")  # in reasons that are otherwise the same


class Piece(NamedTuple):
    """Some samples of a source."""

    source: int
    indices: list[int]


def run(options: Any, words: list[str]) -> int:
    """Build the sources and read them. Returns 1 where training would be stopped."""
    model, data = _built(words)
    sources = [(f"data.{part}[{i}]", s) for part in ("train", "val") for i, s in enumerate(getattr(data, part))]
    # A step reads as in validation: no augmentation, and no other sample in place of an unreadable one.
    readers = [Steps([source], data.seed, data.patch_size, data.canvas_hw, train=False) for _, source in sources]
    with Findings([], options.out) as findings:
        begins = not any(_read(readers, Piece(number, [0])) for number in range(len(sources)))
        if begins:  # a mistake is said before all is read
            check(model, data, training=True)
        chosen = [_evenly(len(source.dataset), None if options.all else options.samples) for _, source in sources]
        pieces = [
            Piece(number, indices[first : first + _PIECE].tolist())
            for number, indices in enumerate(chosen)
            for first in range(0, len(indices), _PIECE)
        ]
        unreadable = Counter[int]()
        for piece, found in zip(
            pieces, results(partial(_read, readers), pieces, options.workers, "samples"), strict=True
        ):
            unreadable[piece.source] += len(found)
            findings.add(one._replace(kind=f"{sources[piece.source][0]}: {one.kind}") for one in found)
    rows = [
        _row(key, source, len(indices), unreadable[number])
        for number, ((key, source), indices) in enumerate(zip(sources, chosen, strict=True))
    ]
    stops = [kind for kind in findings.counts if _ENDS in kind] + _stops(rows, data.quarantine_limits)
    if not begins and not stops:
        check(model, data, training=True)
    if options.json:
        print(json_line({"clean": not stops, "stops": stops, "sources": rows, **findings.summary()}), end="")
    else:
        _show(rows, stops, findings, [source.dataset.inventory for _, source in sources])
    return 1 if stops else 0


def _built(words: list[str]) -> tuple[Any, Any]:
    """The model and the data of a config, as `indiclip fit` builds them."""

    class Built(Exception):
        """Ends the command where training would begin."""

    class Builder(IndiCLI):
        def before_instantiate_classes(self) -> None:
            """Nothing: a check has no run folder."""

        def instantiate_trainer(self, **_: Any) -> Any:
            raise Built(self.model, self.datamodule)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    sys.argv[1:] = ["fit", *words]
    try:
        check_yaml(config_files(sys.argv))
        Builder()
    except ConfigError as error:
        raise ValueError(explain(str(error))) from error
    except Built as built:
        return built.args[0], built.args[1]
    raise ValueError("fit: nothing to check was built")


def _evenly(size: int, most: int | None) -> np.ndarray:
    """Numbers of samples, all of them or `most` from the first to the last."""
    return np.arange(size) if most is None or most >= size else np.linspace(0, size - 1, most).astype(np.int64)


def _read(readers: list[Any], piece: Piece) -> list[Finding]:
    """What is unreadable; the kind is the reason without what differs from sample to sample."""
    steps = readers[piece.source]
    (task,) = steps.sources
    dataset = steps.sources[task][0].dataset
    steps.unreadable()  # what its files lack as a whole is no sample
    found = []
    for index in piece.indices:
        try:
            steps.read(task, SampleRef(0, index, 0))
            found += [Finding(_kind(one.reason), one.shard, one.key, one.reason) for one in steps.unreadable()]
        except Exception as error:  # of the dataset or the transform: it would end the run
            reason = f"{type(error).__name__}: {error}"
            found.append(Finding(f"{_ENDS}: {_kind(reason)}", "", dataset.key(index), reason))
    return found


def _kind(reason: str) -> str:
    return " ".join(_VARYING.sub("...", reason).split())[:80]


def _row(key: str, source: Any, num_read: int, unreadable: int) -> dict[str, Any]:
    """What is known of a source.

    Raises:
        ValueError: Its dataset's sums do not fit.
    """
    dataset, inventory = source.dataset, source.dataset.inventory
    try:
        inventory.verify()
    except AssertionError as error:
        raise ValueError(f"{key}: {type(dataset).__name__} loses something without a reason: {error}") from error
    return {
        "source": key,
        "dataset": type(dataset).__name__,
        "task": source.task,
        "samples": len(dataset),
        "read": num_read,
        "unreadable": unreadable,
        "damaged": [f"{lost.shard}: {lost.key}: {lost.reason}" for lost in dataset.damaged],
        "inventory": inventory.summary(),
    }


def _stops(rows: list[dict[str, Any]], limits: dict[str, int]) -> list[str]:
    """Why training would be stopped: as `Quarantine` counts, from as many samples as were read."""
    stops = []
    for task, limit in limits.items():
        of_task = [row for row in rows if row["task"] == task]
        expected = sum(len(r["damaged"]) + r["unreadable"] * r["samples"] / max(r["read"], 1) for r in of_task)
        if expected > limit:
            found = f"{expected:,.0f} samples of task {task!r} are unreadable, {limit:,} are allowed"
            stops.append(f"data.quarantine: {'about ' * any(r['read'] < r['samples'] for r in of_task)}{found}")
    return stops


def _show(rows: list[dict[str, Any]], stops: list[str], findings: Findings, inventories: list[Any]) -> None:
    for row, inventory in zip(rows, inventories, strict=True):
        print(f"{row['source']}: {row['dataset']} for the task {row['task']}")
        show_lines(inventory)
        for lost in row["damaged"]:
            print(f"  lost: {lost}")
        print(f"  {row['read']:,} of {row['samples']:,} samples read, {row['unreadable'] or 'none'} unreadable")
    findings.show()
    print(*(stops or ["training can use this data"]), sep="\n")
