"""Image files in folders, for packing and scoring: what is read, and what is left out and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from indiclip.datasets.inventory import Inventory
from indiclip.images import is_image_name

_TEXTS = ("txt", "json")  # beside an image, of the same name


class Files(NamedTuple):
    """The files below a folder.

    Attributes:
        images: Paths relative to the folder, in alphabetical order.
        inventory: `files`: the images and the texts beside them are used.
    """

    images: list[str]
    inventory: Inventory


def list_images(folder: Path) -> Files:
    """The images in a folder and in all folders below it. Links to folders are followed; hidden files are counted."""
    names, inventory = sorted(_walk(folder, "", set())), Inventory()
    images = [name for name in names if is_image_name(name) and not _is_hidden(name)]
    stems = {str(PurePosixPath(name).with_suffix("")) for name in images}
    inventory.present["files"] = len(names)
    for name in names:
        path = PurePosixPath(name)
        extension = path.suffix[1:].lower()
        if _is_hidden(name):
            inventory.leave_out("files", "hidden", name)
        elif is_image_name(name) or (extension in _TEXTS and str(path.with_suffix("")) in stems):
            inventory.used["files"] += 1
        elif extension in _TEXTS:
            inventory.leave_out("files", "text without an image of its name", name)
        else:
            inventory.leave_out("files", f".{extension}, which is not read" if extension else "no extension", name)
    return Files(images, inventory)


def _walk(folder: Path, below: str, seen: set[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in seen:  # a link to a folder above it
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    yield from _walk(Path(entry.path), f"{below}{entry.name}/", seen)
            else:
                yield below + entry.name


def _is_hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith(".")
