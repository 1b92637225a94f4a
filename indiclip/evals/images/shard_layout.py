"""Items in shards of the WebDataset format, clip-benchmark's folders among them."""

import os
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from torch.utils.data import ConcatDataset

from indiclip.datasets.folders import subfolders
from indiclip.datasets.languages import declared_language
from indiclip.datasets.tables import decode_text, text_lines
from indiclip.evals.cards.card import Card
from indiclip.evals.images.items import Items, ShardImages, by_language
from indiclip.evals.images.labels import CLASS_LISTS, ClassList, ClassNames, read_class_list
from indiclip.evals.images.splits import choose, is_split, split_of
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


def read_shards(card: Card, folder: Path, splits: Splits, skip_unknown: bool = False) -> Items:
    """The items of shards.

    Args:
        card: What they are of.
        folder: With the class list.
        splits: As `find_shards` gives them.
        skip_unknown: Leave out and count the images of other classes than the card's.

    Raises:
        ValueError: Labels or texts that do not fit the card; names the shard and the sample.
    """
    fields = card.required_fields
    listed = read_class_list(card, folder, skip_unknown) if "class" in fields else None
    card = listed.card if listed else card
    chosen, notes = choose(filter(None, splits), str(folder))
    if "" in splits:  # shards that name no split, beside others that do or not
        chosen[""] = False
    notes = [*(listed.notes if listed else []), *_not_read(card, folder, splits), *notes]
    classes, images, keys, is_train = ClassNames(card, skip_unknown), list[ShardImages](), list[str](), list[bool]()
    labels, texts, captions = list[np.ndarray](), list[list[str]](), list[dict[str, list[str]]]()
    for split, train in chosen.items():
        shards = Shards(splits[split])
        images.append(ShardImages(shards))
        before = "" if all(split_of(name) == split for name in shards.names) else f"{split}/"  # clip-benchmark's 0.tar
        keys += [before + shards.key(place) for place in range(len(shards))]
        is_train += [train] * len(shards)
        labels.append(_labels(classes, shards, listed) if "class" in fields else np.full(len(shards), -1))
        if "text" in fields:
            text_of = _members(shards, "txt")
            texts += [[text_of.get(shards.key(place), "")] for place in range(len(shards))]
        captions += _captions(shards) if "captions" in fields else []
        notes += [f"lost: {one.key}: {one.reason}" for one in shards.damaged]

    items = Items(card, ConcatDataset(images), keys, np.concatenate(labels), is_train=np.array(is_train))
    items.notes = [*notes, *classes.notes(str(folder))]
    if "text" in fields:
        items.columns["text"] = texts
    if "captions" in fields:
        items.captions = by_language(captions)
    return items.select(np.flatnonzero(items.labels >= 0).tolist()) if "class" in fields else items


def _labels(classes: ClassNames, shards: Shards, listed: ClassList | None) -> np.ndarray:
    """The class of each sample, int64: its number counts the lines of the list, or its `.cls` is a name."""
    labels = np.full(len(shards), -1, dtype=np.int64)
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
            classes.leave_out(listed.names[number], count)
    names = {} if numbered.all() else _members(shards, "cls")
    for place in np.flatnonzero(~numbered).tolist():
        key = shards.key(place)
        if key not in names:
            raise ValueError(f"{shards.shard(place)}: {key}: no label (.cls)")
        labels[place] = classes.place(names[key].strip(), f"{shards.shard(place)}: {key}")
    return labels


def _captions(shards: Shards) -> list[dict[str, list[str]]]:
    """Of each sample, as training takes them, but for a `.txt` of several lines: a caption in each."""
    texts, entries = _members(shards, "txt"), _members(shards, "json")
    of_samples = []
    for place in range(len(shards)):
        key = shards.key(place)
        where = f"{shards.shard(place)}: {key}"
        lines = [line.strip() for line in text_lines(texts.get(key, "")) if line.strip()]
        try:
            entry = read_entry({"json": entries[key].encode()} if key in entries else {})
            captions = read_captions({}, entry | {"text": None} if lines else entry)
            own = declared_language(entry.get("language") or entry.get("lang"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        known = set() if own else set(chain.from_iterable(captions.values()))
        if lines := [line for line in lines if line not in known]:
            captions[own] = list(dict.fromkeys([*lines, *captions.get(own, [])]))
        if not captions:
            raise ValueError(f"{where}: no text (.txt, .json) beside the image")
        if unknown := captions.pop("", []):
            captions["en"] = list(dict.fromkeys([*unknown, *captions.get("en", [])]))
        of_samples.append(captions)
    return of_samples


def _members(shards: Shards, extension: str) -> dict[str, str]:
    """A sample's key -> the text of its member with this extension. One pass over the headers; no image is read."""
    found: dict[str, str] = {}
    for url, name in zip(shards.urls, shards.names, strict=True):
        tar = cache.local_tar(url, cache.stat(url))
        with tar.open("rb") as file:
            for member_name, member in members(tar, []):
                key, kind = key_and_extension(member_name, member)
                if kind == extension and f"{name}/{key}" not in found:
                    data = os.pread(file.fileno(), member.size, member.offset_data)
                    found[f"{name}/{key}"] = decode_text(data, f"{url}: {member_name}")
    return found


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
