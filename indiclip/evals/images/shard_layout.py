"""Items in shards of the WebDataset format, clip-benchmark's folders among them."""

import os
from pathlib import Path

import numpy as np
from torch.utils.data import ConcatDataset

from indiclip.datasets.tables import decode_text
from indiclip.evals.cards.card import Card
from indiclip.evals.images.items import Items, ShardImages
from indiclip.evals.images.labels import ClassList, draw_candidates, map_labels, read_class_list
from indiclip.evals.images.splits import choose, is_split, split_of
from indiclip.webdataset import cache
from indiclip.webdataset.shards import Shards
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


def read_shards(card: Card, folder: Path, splits: Splits) -> Items:
    """The items of shards.

    Args:
        card: What they are of.
        folder: With the class list.
        splits: As `find_shards` gives them.

    Raises:
        ValueError: Labels or texts that do not fit the card; names the shard and the sample.
    """
    listed = read_class_list(card, folder) if card.classes else None
    card = listed.card if listed else card
    notes = list(listed.notes) if listed else []
    named = [name for name in splits if name]
    chosen, split_notes = choose(named, str(folder)) if named else ({}, [])
    if "" in splits:  # shards that name no split, beside others that do or not
        chosen[""] = False
    parts = [_Part(card, split, splits[split], listed, train) for split, train in chosen.items()]
    notes += [*split_notes, *(f"lost: {loss}" for part in parts for loss in part.losses)]
    items = Items(
        card,
        ConcatDataset([part.images for part in parts]),
        [key for part in parts for key in part.keys],
        np.concatenate([part.labels for part in parts]),
        is_train=np.concatenate([part.is_train for part in parts]) if any(chosen.values()) else None,
        notes=notes,
    )
    texts = [text for part in parts for text in part.texts]
    if "captions" in card.required_fields:
        items.captions = {"en": [[line for line in text.splitlines() if line.strip()] for text in texts]}
    if "text" in card.required_fields:
        items.candidates, few = draw_candidates(card, texts, items.keys, items.labels)
        items.notes += few
    return items


class _Part:
    """The samples of one split."""

    def __init__(self, card: Card, split: str, urls: list[str], listed: ClassList | None, train: bool) -> None:
        shards = Shards(urls)
        self.images = ShardImages(shards)
        before = "" if all(name.startswith(split) for name in shards.names) else f"{split}/"  # clip-benchmark's 0.tar
        self.keys = [before + shards.key(place) for place in range(len(shards))]
        self.is_train = np.full(len(shards), train)
        self.losses = [f"{one.key}: {one.reason}" for one in shards.damaged]
        self.labels = _labels(card, shards, listed)
        self.texts = _texts(shards) if card.required_fields & {"captions", "text"} else []


def _labels(card: Card, shards: Shards, listed: ClassList | None) -> np.ndarray:
    found = shards.labels.astype(np.int64)
    labels = np.full(len(shards), -1, dtype=np.int64)
    if not card.classes:
        return labels
    numbered = found >= 0
    if numbered.any():
        labels[numbered] = map_labels(found[numbered], listed, shards.shard(int(numbered.argmax())))
    if not numbered.all():
        names = _members(shards, "cls")
        for place in np.flatnonzero(~numbered).tolist():
            where = f"{shards.shard(place)}: {shards.key(place)}"
            if shards.key(place) not in names:
                raise ValueError(f"{where}: no label (.cls)")
            labels[place] = card.check_place(names[shards.key(place)].strip(), where)
    return labels


def _texts(shards: Shards) -> list[str]:
    texts = _members(shards, "txt")
    for place in range(len(shards)):
        if not texts.get(shards.key(place), "").strip():
            raise ValueError(f"{shards.shard(place)}: {shards.key(place)}: no text (.txt) beside the image")
    return [texts[shards.key(place)] for place in range(len(shards))]


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


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, but for hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _tars(folder: Path) -> list[str]:
    return sorted(str(file) for file in folder.iterdir() if cache.SUFFIX.search(file.name) and file.name[0] != ".")


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
