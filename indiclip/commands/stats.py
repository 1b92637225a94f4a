"""`indiclip shards stats`: what is in the shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from indiclip.commands.findings import json_line, show_lines
from indiclip.commands.parallel import results
from indiclip.commands.reading import Range, opened, ranges
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.scripts import language, scripts
from indiclip.images import EncodedImage, UnreadableSample
from indiclip.patches import fit_hw
from indiclip.webdataset import cache
from indiclip.webdataset.shards import expand, read_captions, read_classes, read_entry

_ASPECTS = {  # width / height: what is below the number
    "below 1:4": 1 / 4, "1:4 to 1:2": 1 / 2, "1:2 to 2:3": 2 / 3, "2:3 to 9:10": 0.9, "about 1:1": 1.1,
    "11:10 to 3:2": 3 / 2, "3:2 to 2:1": 2, "2:1 to 4:1": 4, "4:1 and more": float("inf"),
}  # fmt: skip


@dataclass
class Counts:
    """What is counted of some samples; counts of lengths keep what a median needs, and stay small."""

    samples: int = 0
    unreadable: int = 0
    image_bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    sizes_hw: Counter[tuple[int, int]] = field(default_factory=Counter)
    captions: int = 0
    captioned: int = 0
    characters: Counter[int] = field(default_factory=Counter)
    words: Counter[int] = field(default_factory=Counter)
    scripts: Counter[str] = field(default_factory=Counter)
    declared: Counter[str] = field(default_factory=Counter)
    by_script: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    boxes: Counter[int] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Add those of other samples."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)


def run(shards: list[str], patch_size: int, max_tokens: int, workers: int | None, as_json: bool) -> int:
    """Count what is in shards, and print it."""
    urls = expand(shards)
    opened.cache_clear()  # they may have changed since the last call
    sizes, inventory = [], Inventory()
    for count, of_shard in results(_contents, urls, workers, "shards"):
        sizes.append(count)
        inventory += of_shard
    tasks = [piece for url, count in zip(urls, sizes, strict=True) for piece in ranges(url, count)]
    total = Counts()
    for counts in results(_count, tasks, workers, "samples"):
        total.add(counts)
    summary = {"shards": len(urls), **summarise(total, patch_size, max_tokens, _class_names(urls[0]))}
    if as_json:
        print(json_line({**summary, "inventory": inventory.summary()}), end="")
    else:
        _show(summary, inventory)
    return 0


def _contents(url: str) -> tuple[int, Inventory]:
    return len(opened(url)), opened(url).contents()


def _count(piece: Range) -> Counts:
    shards, counts = opened(piece.url), Counts(samples=piece.last - piece.first)
    counts.sizes_hw.update(map(tuple, shards.sizes_hw[piece.first : piece.last].tolist()))
    counts.labels.update(int(label) for label in shards.labels[piece.first : piece.last] if label >= 0)
    for index in range(piece.first, piece.last):
        try:
            parts = shards.parts(index)
            image = EncodedImage(parts["image"], shards.key(index))
            entry = read_entry(parts["json"]) if "json" in parts else {}
            captions = read_captions(parts, entry)
        except (cache.NoCopy, UnreadableSample, OSError, ValueError):  # `check` says why
            counts.unreadable += 1
            continue
        counts.image_bytes += len(parts["image"])
        counts.formats[image.kind] += 1
        counts.captioned += bool(captions)
        for declared, texts in captions.items():
            for text in texts:
                _add_caption(counts, declared, text)
        annotations = entry.get("annotations")
        for annotation in annotations if isinstance(annotations, list) else []:
            number = annotation.get("class") if isinstance(annotation, dict) else None
            if isinstance(number, int):
                counts.boxes[number] += 1
    return counts


def _add_caption(counts: Counts, declared: str, text: str) -> None:
    found = scripts(text)
    counts.captions += 1
    counts.characters[len(text)] += 1
    counts.words[len(text.split())] += 1
    counts.scripts[" + ".join(found) or "no letters"] += 1
    if declared:
        counts.declared[declared] += 1
    else:
        counts.by_script[language(found)] += 1


def summarise(counts: Counts, patch_size: int, max_tokens: int, classes: list[str]) -> dict[str, Any]:
    """Counts as plain numbers by name."""
    return {
        "samples": counts.samples,
        "unreadable": counts.unreadable,
        "image_bytes": counts.image_bytes,
        "formats": dict(counts.formats.most_common()),
        **_sizes(counts.sizes_hw, patch_size, max_tokens),
        "captions": counts.captions,
        "captioned_samples": counts.captioned,
        "characters": _spread(counts.characters),
        "words": _spread(counts.words),
        "scripts": dict(counts.scripts.most_common()),
        "languages": {
            "declared": dict(counts.declared.most_common()),
            "by_script": dict(counts.by_script.most_common()),
        },
        "labels": _named(counts.labels, classes),
        "boxes": _named(counts.boxes, classes),
    }


def _sizes(sizes_hw: Counter[tuple[int, int]], patch_size: int, max_tokens: int) -> dict[str, Any]:
    """Width, height and tokens as their spread, and how many images have which aspect."""
    widths, heights, tokens, aspects = Counter[int](), Counter[int](), Counter[int](), Counter[str]()
    for (height, width), count in sizes_hw.items():
        if not height:  # its header cannot be read
            continue
        widths[width] += count
        heights[height] += count
        rows, columns = (side // patch_size for side in fit_hw(height, width, patch_size, max_tokens))
        tokens[rows * columns] += count
        aspects[next(name for name, limit in _ASPECTS.items() if width / height < limit)] += count
    spreads = {"width": _spread(widths), "height": _spread(heights), "tokens": _spread(tokens)}
    return {**spreads, "aspects": {name: aspects[name] for name in _ASPECTS if aspects[name]}}


def _spread(counts: Counter[int]) -> dict[str, float]:
    """Minimum, median, 99th percentile, maximum and mean; of values and how often each is there."""
    if not counts:
        return {}
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[value] for value in values.tolist()])
    median, high = (int(values[np.searchsorted(ends, share * ends[-1])]) for share in (0.5, 0.99))
    mean = sum(value * count for value, count in counts.items()) / int(ends[-1])
    return {"min": int(values[0]), "median": median, "p99": high, "max": int(values[-1]), "mean": round(mean, 2)}


def _class_names(url: str) -> list[str]:
    """The names in the `classes.txt` beside a local shard."""
    file = Path(url).parent / "classes.txt"
    return read_classes(str(file)) if not cache.is_remote(url) and file.is_file() else []


def _named(counts: Counter[int], classes: list[str]) -> dict[str, int]:
    return {classes[label] if label < len(classes) else str(label): count for label, count in counts.most_common()}


def _show(summary: dict[str, Any], inventory: Inventory) -> None:
    megabytes = summary["image_bytes"] / 1e6
    print(f"{summary['samples']:,} samples in {summary['shards']:,} shards, {megabytes:,.1f} MB of images")
    show_lines(inventory)
    if summary["unreadable"]:
        print(f"  {summary['unreadable']:,} cannot be read; `indiclip shards check` says why")
    for name in ("width", "height", "tokens", "characters", "words"):
        if spread := summary[name]:
            numbers = ", ".join(f"{what} {value:,}" for what, value in spread.items())
            print(f"{name:<12}{numbers}")
    print(f"{'captions':<12}{summary['captions']:,}; {summary['captioned_samples']:,} samples have one or more")
    languages = summary["languages"]
    for title, counts in (
        ("formats", summary["formats"]),
        ("width:height", summary["aspects"]),
        ("scripts", summary["scripts"]),
        ("languages, as declared by the samples", languages["declared"]),
        ("languages, as far as the script tells", languages["by_script"]),
        ("classes", summary["labels"]),
        ("boxes", summary["boxes"]),
    ):
        _show_counts(title, counts)


def _show_counts(title: str, counts: dict[str, int]) -> None:
    total = sum(counts.values())
    if total:
        print(f"{title} ({len(counts):,})")
    for name, count in counts.items():
        print(f"{count:>11,}  {count / total:>6.1%}  {name}")
