"""`indiclip shards stats`: what is in the shards."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from indiclip.commands.findings import json_line, show_lines
from indiclip.commands.parallel import results
from indiclip.commands.reading import Range, opened, ranges
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.scripts import language, scripts
from indiclip.images import EncodedImage, UnreadableSample
from indiclip.preprocessing import Preprocessing
from indiclip.webdataset import cache
from indiclip.webdataset.shards import expand, read_captions, read_classes, read_entry

_ASPECTS = {  # width / height: what is below the number
    "below 1:4": 1 / 4, "1:4 to 1:2": 1 / 2, "1:2 to 2:3": 2 / 3, "2:3 to 9:10": 0.9, "about 1:1": 1.1,
    "11:10 to 3:2": 3 / 2, "3:2 to 2:1": 2, "2:1 to 4:1": 4, "4:1 and more": float("inf"),
}  # fmt: skip


Counts = defaultdict[str, Counter[Any]]  # what is counted -> value -> how often: all that a median needs


def run(shards: list[str], patch_size: int, max_tokens: int, workers: int | None, as_json: bool) -> int:
    """Count what is in shards, and print it."""
    urls = expand(shards)
    opened.cache_clear()  # they may have changed since the last call
    sizes, inventory, total = [], Inventory(), Counts(Counter)
    for count, of_shard in results(_contents, urls, workers, "shards"):
        sizes.append(count)
        inventory += of_shard
    for counts in results(_count, ranges(zip(urls, sizes, strict=True)), workers, "samples"):
        for name, of_range in counts.items():
            total[name].update(of_range)
    class_file = Path(urls[0]).parent / "classes.txt"
    classes = read_classes(str(class_file)) if not cache.is_remote(urls[0]) and class_file.is_file() else []
    summary = {"shards": len(urls), **_summarise(total, patch_size, max_tokens, classes)}
    if as_json:
        print(json_line({**summary, "inventory": inventory.summary()}), end="")
    else:
        _show(summary, inventory)
    return 0


def _contents(url: str) -> tuple[int, Inventory]:
    return len(opened(url)), opened(url).contents()


def _count(piece: Range) -> Counts:
    shards, counts = opened(piece.url), Counts(Counter)
    for index in range(piece.first, piece.last):
        counts["sizes_hw"][tuple(shards.sizes_hw[index].tolist())] += 1
        if (label := int(shards.labels[index])) >= 0:
            counts["labels"][label] += 1
        try:
            parts = shards.parts(index)
            image = EncodedImage(parts["image"], shards.key(index))
            entry = read_entry(parts)
            captions = read_captions(parts, entry)
        except (cache.NoCopy, UnreadableSample, OSError, ValueError):  # `check` says why
            counts["totals"]["unreadable"] += 1
            continue
        counts["totals"].update(image_bytes=len(parts["image"]), captioned_samples=bool(captions))
        counts["formats"][image.kind] += 1
        for declared, texts in captions.items():
            for text in texts:
                _add_caption(counts, declared, text)
        annotations = entry.get("annotations")
        for annotation in annotations if isinstance(annotations, list) else []:
            number = annotation.get("class") if isinstance(annotation, dict) else None
            if isinstance(number, int):
                counts["boxes"][number] += 1
    return counts


def _add_caption(counts: Counts, declared: str, text: str) -> None:
    found = scripts(text)
    counts["characters"][len(text)] += 1
    counts["words"][len(text.split())] += 1
    counts["scripts"][" + ".join(found) or "no letters"] += 1
    if declared:
        counts["declared"][declared] += 1
    else:
        counts["by_script"][language(found)] += 1


def _summarise(counts: Counts, patch_size: int, max_tokens: int, classes: list[str]) -> dict[str, Any]:
    """Counts as plain numbers by name."""
    totals = counts["totals"]
    return {
        "samples": counts["sizes_hw"].total(),
        "unreadable": totals["unreadable"],
        "image_bytes": totals["image_bytes"],
        "formats": dict(counts["formats"].most_common()),
        **_sizes(counts["sizes_hw"], patch_size, max_tokens),
        "captions": counts["characters"].total(),
        "captioned_samples": totals["captioned_samples"],
        "characters": _spread(counts["characters"]),
        "words": _spread(counts["words"]),
        "scripts": dict(counts["scripts"].most_common()),
        "languages": {name: dict(counts[name].most_common()) for name in ("declared", "by_script")},
        "labels": _named(counts["labels"], classes),
        "boxes": _named(counts["boxes"], classes),
    }


def _sizes(sizes_hw: Counter[tuple[int, int]], patch_size: int, max_tokens: int) -> dict[str, Any]:
    """Width, height and tokens as their spread, and how many images have which aspect."""
    found, preprocessing = Counts(Counter), Preprocessing(patch_size)
    for (height, width), count in sizes_hw.items():
        if not height:  # its header cannot be read
            continue
        rows, columns = (side // patch_size for side in preprocessing.fit_hw(height, width, max_tokens))
        for name, value in (("width", width), ("height", height), ("tokens", rows * columns)):
            found[name][value] += count
        found["aspects"][next(name for name, limit in _ASPECTS.items() if width / height < limit)] += count
    spreads = {name: _spread(found[name]) for name in ("width", "height", "tokens")}
    return {**spreads, "aspects": {name: found["aspects"][name] for name in _ASPECTS if found["aspects"][name]}}


def _spread(counts: Counter[int]) -> dict[str, float]:
    """Minimum, median, 99th percentile, maximum and mean; of values and how often each is there."""
    if not counts:
        return {}
    values, weights = np.array(sorted(counts.items())).T
    spread = np.quantile(values, (0, 0.5, 0.99, 1), weights=weights, method="inverted_cdf").tolist()
    mean = round(float(np.average(values, weights=weights)), 2)
    return {**dict(zip(("min", "median", "p99", "max"), spread, strict=True)), "mean": mean}


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
        total = sum(counts.values())
        print(f"{title} ({len(counts):,})\n" * bool(counts), end="")
        for name, count in counts.items():
            print(f"{count:>11,}  {count / total:>6.1%}  {name}")
