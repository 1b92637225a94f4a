"""What a run's report opens with: a sentence, and each head's main number beside chance and the run before."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from indiclip.training.report.run_names import HeadNames, named, reading_order, spoken

Metrics = Mapping[str, float | None]  # None is not finite
_NUMBERED = re.compile(r"(.+)-(\d+)")  # a run's folder, where there is one of the name before it
_UNITS = ((3600, "h"), (60, "min"), (1, "s"))


class Row(NamedTuple):
    """A head's main number.

    Attributes:
        subject: What the head is called.
        words: What the number is.
        value: None is not finite.
        trivial: What an answer gets that looks at no image; None where it is not known.
        answer: Which answer that is.
        better: `higher`, `lower` or empty.
        before: The earlier run's; None where there is none.
        unit: Empty for shares and ratios.
    """

    subject: str
    words: str
    value: float | None
    trivial: float | None
    answer: str
    better: str
    before: float | None
    unit: str

    @property
    def value_words(self) -> str:
        return f"{_digits(self.value)} {self.unit}".strip()

    @property
    def trivial_words(self) -> str:
        if self.trivial is None:
            return ""
        return f"{_digits(self.trivial)} ({self.answer})" if self.answer else _digits(self.trivial)

    @property
    def before_words(self) -> str:
        return "" if self.before is None else f"{_digits(self.before)} {self.unit}".strip()


def _digits(value: float | None) -> str:
    """Three of them, of which a summary has room for no more."""
    return "not finite" if value is None else f"{value:.3g}"


class Drawn(NamedTuple):
    """A training source.

    Attributes:
        size: Its samples.
        per_step: How many of them a step has; None where that is no one number, or an epoch is not all of them.
        every: Of so many steps one has them.
    """

    size: int
    per_step: int | None
    every: int = 1


class Earlier(NamedTuple):
    """The run of the same name before this one.

    Attributes:
        name: Its folder's; empty where there is none.
        metrics: Its numbers; empty where they are of other data.
        note: Why it is not compared; empty where it is, or where there is none.
    """

    name: str = ""
    metrics: Metrics = MappingProxyType({})
    note: str = ""


FIRST = Earlier()  # what a run without one before it has


def headlines(metrics: Metrics, heads: HeadNames, earlier: Earlier = FIRST) -> list[Row]:
    """A row per head and held-out source that was scored.

    Args:
        metrics: By their logged names.
        heads: As of `run_names`; heads that are not among them are called by their names.
        earlier: The run before.
    """
    rows = []
    for key, (subject, measures) in _with_scored(metrics, heads).items():
        name = _main(f"val/{key}/", metrics, heads)
        if name is None:
            continue
        measure = measures.get(name.removeprefix(f"val/{key}/"))
        said = named(name, heads)
        trivial, answer = (measure.trivial, measure.answer) if measure else (None, "")
        rows.append(
            Row(
                subject,
                said.words,
                metrics[name],
                trivial,
                answer,
                said.better,
                earlier.metrics.get(name),
                said.unit,
            )
        )
    return rows


def _with_scored(metrics: Metrics, heads: HeadNames) -> HeadNames:
    """The heads, and those that have numbers but are not among them."""
    found = dict(heads)
    for name in metrics:
        suite, *parts = name.split("/")
        if suite == "val" and len(parts) == 2 and parts[0] not in found:
            found[parts[0]] = spoken(parts[0]), {}
    return found


def _main(prefix: str, metrics: Metrics, heads: HeadNames) -> str | None:
    """The logged name of a head's main number; the first of all where none is declared or was measured."""
    own = [name for name in metrics if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    own.sort(key=lambda name: reading_order(name, heads))
    _, measures = heads.get(prefix.removeprefix("val/").removesuffix("/"), ("", {}))
    declared = [name for name in own if (of := measures.get(name.removeprefix(prefix))) and of.main]
    return next(iter(declared or own), None)


def earlier_run(folder: Path, data: Mapping[str, Any]) -> Earlier:
    """The run before this one that has scores, of the same name: of `quickstart-3` in the folder of all runs
    `quickstart-2`, or `quickstart`.

    Args:
        folder: Of this run.
        data: Of its `metrics.json`: what each source's files hold.
    """
    match = _NUMBERED.fullmatch(folder.absolute().name)
    runs = folder.absolute().parent
    if not match or not (runs / match[1]).is_dir():  # a name may end in a number, as vit-16
        return FIRST
    same_name = re.compile(rf"{re.escape(match[1])}(?:-(\d+))?")
    numbers = {int(found[1] or 1): other for other in runs.iterdir() if (found := same_name.fullmatch(other.name))}
    for number in sorted((n for n in numbers if n < int(match[2])), reverse=True):
        other = numbers[number]
        try:
            record = json.loads((other / "metrics.json").read_text("utf-8"))
            metrics, its_data = dict(record["metrics"]), dict(record["data"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it did not end, or is of something else
        if _held_out(its_data) != _held_out(data) or _datasets(other) != _datasets(folder):
            return Earlier(other.name, note=f"Not compared with {other.name}, whose held-out data are others.")
        numbers_only = {name: v for name, v in metrics.items() if v is None or isinstance(v, int | float)}
        return Earlier(other.name, numbers_only)
    return FIRST


def _held_out(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: held for key, held in data.items() if key.startswith("data.val")}


def _datasets(folder: Path) -> Any:
    """The held-out datasets of a run's config; None where there is none to read."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        return [(source["task"], source["dataset"]) for source in config["data"]["val"] or []]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def sentence(record: Mapping[str, Any], rows: list[Row]) -> str:
    """What was trained, on what, how long, and what it reached.

    Args:
        record: Of a run, see `write_report`.
        rows: As of `headlines`.
    """
    step, subjects = record["step"], record.get("learned") or [row.subject for row in rows]
    said = f"{record.get('model') or 'The model'} learned {_listed([_within(subject) for subject in subjects])}"
    said = said if subjects else f"{record.get('model') or 'The model'} was trained"
    said += f" in {step:,} step{'' if step == 1 else 's'}"
    if seconds := record.get("trained_seconds", record["seconds"]):
        said += f" ({duration(seconds)})"
    if sources := record.get("sources"):
        said += " on " + _listed([_samples(name, of, step) for name, of in sources.items()])
    if not rows:
        return f"{said}; nothing was held out, so there are no scores."
    times = Counter(row.words for row in rows)
    reached = [
        f"{_within(row.words if times[row.words] == 1 else f'{row.subject}: {row.words}')} ({row.value_words})"
        for row in rows
    ]
    return f"{said}; on held-out data it reached {_listed(reached)}."


def _samples(name: str, parts: Sequence[Drawn], steps: int) -> str:
    """How many of a dataset's samples the steps have drawn, or how often all of them."""
    size = sum(part.size for part in parts)
    if any(part.per_step is None for part in parts):
        return f"samples drawn from {size:,} of {name}"
    drawn = [-(-steps // part.every) * (part.per_step or 0) for part in parts]
    distinct = sum(min(number, part.size) for number, part in zip(drawn, parts, strict=True))
    if distinct < size:
        return f"{distinct:,} of {size:,} samples of {name}"
    epochs = f"{sum(drawn) / size:,.1f}"
    return f"{size:,} samples of {name}" + (f" ({epochs} epochs)" if epochs != "1.0" else "")


def _within(title: str) -> str:
    """A title within a sentence: `DensePose` and `AP at IoU 0.5` keep their capitals."""
    word = title.split(" ")[0]
    return title[:1].lower() + title[1:] if word[1:] == word[1:].lower() and len(word) > 1 else title


def _listed(words: list[str]) -> str:
    return ", ".join(words) if len(words) < 2 else f"{', '.join(words[:-1])} and {words[-1]}"


def duration(seconds: float) -> str:
    """`2 h 5 min` of 7500."""
    whole = max(round(seconds), 1) if seconds else 0
    parts = []
    for size, unit in _UNITS:
        count, whole = divmod(whole, size)
        if count:
            parts.append(f"{count:,} {unit}")
    return " ".join(parts[:2]) or "0 s"
