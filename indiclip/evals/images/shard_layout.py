"""Items in shards of the WebDataset format, clip-benchmark's folders among them."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from torch.utils.data import ConcatDataset

from indiclip.datasets.folders import subfolders
from indiclip.datasets.tables import decode_text, text_lines
from indiclip.evals.cards.card import Card
from indiclip.evals.images.items import Items, ShardImages, by_language
from indiclip.evals.images.reading import CLASS_LISTS, ClassList, Reading
from indiclip.evals.images.splits import is_split, split_of
from indiclip.webdataset import cache
from indiclip.webdataset.shards import Shards, read_captions, read_entry
from indiclip.webdataset.tar_members import key_and_extension, members

Splits = dict[str, list[str]]  # name of a split, or nothing -> its shards


def find_shards(folder: Path) -> Splits:
    """The shards in a folder or in its folders `train`, `val`, `test`; empty where there are none.

    Raises:
        FileNotFoundError: clip-benchmark's nshards.txt counts a shard that is not there.
        ValueError: An nshards.txt without a number.
    """
    found: Splits = {}
    for shard in _tars(folder):
        found.setdefault(split_of(Path(shard).name), []).append(shard)
    if found:
        return found
    for split in filter(is_split, subfolders(folder)):
        if shards := _counted(folder / split) or _tars(folder / split):
            found[split] = shards
    return found


def read_shards(reading: Reading, folder: Path, splits: Splits) -> Items:
    """The items of the shards that `find_shards` found, with the class list in their folder.

    Raises:
        ValueError: Labels or texts that do not fit the card; names the shard and the sample.
    """
    listed = reading.class_list(folder) if "class" in reading.card.required_fields else None
    card, fields = reading.card, reading.card.required_fields
    reading.notes += _not_read(card, folder, splits)
    chosen = reading.splits(filter(None, splits), str(folder))
    if "" in splits:  # shards that name no split, beside others that do or not
        chosen[""] = False
    opened = {split: Shards(splits[split]) for split in chosen}
    reading.notes += [f"lost: {one.key}: {one.reason}" for shards in opened.values() for one in shards.damaged]
    items = Items(
        card,
        ConcatDataset([ShardImages(shards) for shards in opened.values()]),
        [key for split, shards in opened.items() for key in _keys(split, shards)],
        np.concatenate([_labels(reading, shards, listed) for shards in opened.values()]),
        is_train=np.repeat(list(chosen.values()), [len(shards) for shards in opened.values()]),
    )
    if "text" in fields:
        beside = chain.from_iterable(_members(shards, "txt") for shards in opened.values())
        items.columns["text"] = [[decode_text(parts.get("txt", b""), where)] for where, parts in beside]
    if "captions" in fields:
        items.captions = by_language(list(chain.from_iterable(map(_captions, opened.values()))))
    return items.select(np.flatnonzero(items.labels >= 0).tolist()) if "class" in fields else items


def _keys(split: str, shards: Shards) -> list[str]:
    """The samples' keys; clip-benchmark has a 0.tar in every split."""
    before = "" if all(split_of(name) == split for name in shards.names) else f"{split}/"
    return [before + shards.key(place) for place in range(len(shards))]


def _labels(reading: Reading, shards: Shards, listed: ClassList | None) -> np.ndarray:
    """The class of each sample, int64: its number counts the lines of the list, or its `.cls` is a name. -1: none."""
    labels = np.full(len(shards), -1, dtype=np.int64)
    if "class" not in reading.card.required_fields:
        return labels
    numbered = shards.labels >= 0
    if numbered.any():
        numbers, where = shards.labels[numbered], shards.shard(int(numbered.argmax()))
        if listed is None:
            raise ValueError(
                f"{where}: labels are numbers and there is no {' or '.join(CLASS_LISTS)} beside the shards; "
                "expected one, with a class per line in the order of the numbers"
            )
        if numbers.max() >= len(listed.places):
            raise ValueError(f"{where}: the label {numbers.max()}; {listed.file} has {len(listed.places)} lines")
        labels[numbered] = listed.places[numbers]
        for number, count in Counter(numbers[labels[numbered] < 0].tolist()).items():
            reading.label(listed.names[number], where, count)
    if numbered.all():
        return labels
    for place, (where, parts) in enumerate(_members(shards, "cls")):
        if not numbered[place]:
            if "cls" not in parts:
                raise ValueError(f"{where}: no label (.cls)")
            labels[place] = reading.label(decode_text(parts["cls"], where).strip(), where)
    return labels


def _captions(shards: Shards) -> Iterator[dict[str, list[str]]]:
    """Of each sample, as training takes them, but for a `.txt` of several lines: a caption in each."""
    for where, parts in _members(shards, "txt", "json"):
        found: dict[str, dict[str, None]] = {}  # language -> its different captions
        try:
            entry = read_entry(parts)
            lines = text_lines(decode_text(parts.get("txt", b""), "the .txt"))
            texts = [line.strip() for line in lines if line.strip()]
            for beside in [{"txt": text.encode()} for text in texts] or [{}]:
                for language, captions in read_captions(beside, entry).items():
                    found.setdefault(language or "en", {}).update(dict.fromkeys(captions))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not found:
            raise ValueError(f"{where}: no text (.txt, .json) beside the image")
        # The lines come first.
        yield {language: sorted(captions, key=lambda text: text not in texts) for language, captions in found.items()}


def _members(shards: Shards, *extensions: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Of each sample its shard and key, and its members with these extensions. One pass over the headers; no image is
    read.
    """
    found: dict[str, dict[str, bytes]] = defaultdict(dict)
    for url, name in zip(shards.urls, shards.names, strict=True):
        tar = cache.local_tar(url, cache.stat(url))
        with tar.open("rb") as file:
            for member_name, member in members(tar, []):
                key, kind = key_and_extension(member_name, member)
                if kind in extensions:
                    data = os.pread(file.fileno(), member.size, member.offset_data)
                    found[f"{name}/{key}"].setdefault(kind, data)  # the first counts, as in training
    for place in range(len(shards)):
        key = shards.key(place)
        yield f"{shards.shard(place)}: {key}", found[key]


def _not_read(card: Card, folder: Path, splits: Splits) -> list[str]:
    """What lies beside the shards and is none of them."""
    lines, read = [], set[str]()
    for split, shards in splits.items():
        if split and Path(shards[0]).parent == folder / split:
            read.add(split)
            if more := len(_tars(folder / split)) - len(shards):
                lines.append(f"{folder / split}: left out: {more} shards that nshards.txt does not count")
    beside = [name for name in subfolders(folder) if name not in read]
    if beside := [name for name in beside if is_split(name) or card.place(name) is not None]:
        lines.append(f"{folder}: left out: the folders {', '.join(beside)} beside the shards")
    return lines


def _tars(folder: Path) -> list[str]:
    found = (file for file in folder.iterdir() if cache.SUFFIX.search(file.name) and file.name[0] != ".")
    return sorted(str(file) for file in found if not file.is_dir())


def _counted(folder: Path) -> list[str]:
    """clip-benchmark's shards of a split."""
    file = folder / "nshards.txt"
    if not file.is_file():
        return []
    text = decode_text(file.read_bytes(), str(file)).strip()
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{file}: found {text!r}; expected the number of shards")
    shards = [folder / f"{number}.tar" for number in range(int(text))]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: no such file; {file} counts {len(shards)} shards")
    return [str(shard) for shard in shards]
