"""Items in folders: `<class>/**/*.jpg`, or `<split>/<class>/**/*.jpg`, and `.txt` beside an image for what is on it."""

from pathlib import Path

import numpy as np

from indiclip.datasets.folders import list_images, stem, subfolders
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.tables import decode_text
from indiclip.evals.cards.card import Card
from indiclip.evals.images.items import FileImages, Items
from indiclip.evals.images.reading import Reading
from indiclip.evals.images.splits import is_split
from indiclip.images import is_image_name, storable


def read_folders(reading: Reading, source: Path) -> Items:
    """The items of class folders, or where the card asks for no class of folders of things, which are `instance`.

    Raises:
        ValueError: A folder that is no class; names the nearest.
    """
    if reading.card.class_source:
        reading.class_list(source)
    card, inventory, fields = reading.card, Inventory(), reading.card.required_fields
    splits = _read_splits(reading, source, inventory)
    names, labels, is_train = list[str](), list[int](), list[bool]()
    things, texts, nested = list[str](), list[str](), list[str]()
    for split, train in splits.items():
        _count_strays(source, split, inventory)
        for folder in subfolders(source / split):
            below = f"{split}/{folder}".removeprefix("/")
            found, beside, of_folder = list_images(source, below)
            label = _label(reading, source / below, len(found)) if "class" in fields else -1
            if label < 0 and "class" in fields:
                continue
            inventory += of_folder
            names += found
            labels += [label] * len(found)
            is_train += [train] * len(found)
            things += [folder] * len(found)
            texts += [beside[stem(name)].get("txt", "") for name in found]
            nested += [name for name in found if _means_other(card, name[len(below) + 1 :].split("/")[:-1], label)]

    reading.notes += inventory.left_out_lines(str(source))
    if nested:
        where = "in folders of a class that are called by another class or a split, which counts for nothing"
        reading.notes.append(f"{source}: {len(nested):,} images lie {where}, first {nested[0]}")
    items = Items(card, FileImages(source, names), names, np.array(labels, np.int64))
    items.is_train = np.array(is_train, bool)
    if "instance" in fields:
        items.columns["instance"] = [[thing] for thing in things]
    if "text" in fields:
        items.columns["text"] = [[_text(source / file) if file else ""] for file in texts]
    return items


def _text(file: Path) -> str:
    return decode_text(file.read_bytes(), str(file))


def _read_splits(reading: Reading, source: Path, inventory: Inventory) -> dict[str, bool]:
    """The folders of splits, as `Reading.splits` gives them; "" alone where there are none."""
    folders = subfolders(source)
    splits = list(filter(is_split, folders))
    are_classes = splits != folders and all(reading.card.place(name) is not None for name in splits)
    if not splits or are_classes:
        return {"": False}
    _count_strays(source, "", inventory)
    for folder in folders:
        if folder in splits or not (found := list_images(source, folder).images):
            continue
        if not reading.skip_unknown:
            where = f"{storable(source / folder)}: the folder lies beside {', '.join(splits)}, of splits"
            raise ValueError(f"{where}; expected folders of splits alone or classes alone")
        inventory.present["files"] += len(found)
        inventory.leave_out("files", "beside the folders of splits", storable(found[0]), len(found))
    return reading.splits(splits, str(source))


def _count_strays(source: Path, below: str, inventory: Inventory) -> None:
    """Images that lie in no class's folder."""
    images = (file for file in (source / below).iterdir() if is_image_name(file.name) and file.name[0] != ".")
    strays = sorted(file.name for file in images if file.is_file())
    if strays:
        inventory.present["files"] += len(strays)
        inventory.leave_out("files", "in no folder of a class", storable(Path(below, strays[0])), len(strays))


def _label(reading: Reading, folder: Path, num_images: int) -> int:
    """The class of a folder; -1 where it is left out, as is one that has neither a class nor images."""
    if not num_images and reading.card.place(folder.name) is None:
        return -1
    try:
        return reading.label(folder.name, storable(folder), num_images)
    except ValueError as error:
        inner = next((name for name in subfolders(folder) if reading.card.place(name) is not None), "")
        found = f"; found the folder of a class in it, {inner!r}" if inner else ""
        beside = [name for name in subfolders(folder.parent) if reading.card.place(name) is None]
        unknown = [name for name in beside if list_images(folder.parent, name).images]
        count = f"; {len(unknown):,} folders of {folder.parent} are no classes" if len(unknown) > 1 else ""
        raise ValueError(storable(f"{error}{found}{count}")) from error


def _means_other(card: Card, folders: list[str], label: int) -> bool:
    """Whether a folder in a class's is called by another class or by a split."""
    return any(is_split(folder) or card.place(folder) not in (None, label) for folder in folders)
