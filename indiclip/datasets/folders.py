"""Image files in folders, for packing and scoring: what is read, and what is left out and why."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from indiclip.datasets.inventory import Inventory
from indiclip.images import is_image_name, storable

_TEXTS = ("txt", "json")  # beside an image, of the same name
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "lost+found")  # folders that macOS, Synology and ext4 make


class Files(NamedTuple):
    """The files below a folder.

    Attributes:
        images: Paths relative to the folder, in alphabetical order.
        texts: Path of an image without its extension -> `txt`, `json` -> the path of this text beside it.
        inventory: `files`: the images and the texts beside them are used.
    """

    images: list[str]
    texts: dict[str, dict[str, str]]
    inventory: Inventory


def list_images(folder: Path, below: str = "") -> Files:
    """The images in a folder (or in the one of this name in it, such as `train/kite`) and in all folders below it.

    Links to folders are followed, but not those to a folder that they lie in. Hidden files are counted, hidden folders
    are not looked into.
    """
    names, inventory = sorted(_walk(folder / below, f"{below}/" if below else "")), Inventory()
    images = [name for name in names if is_image_name(name) and not _is_hidden(name)]
    texts: dict[str, dict[str, str]] = {stem(name): {} for name in images}
    inventory.present["files"] = len(names)
    for name in names:
        extension, reason = PurePosixPath(name).suffix[1:].lower(), ""
        if _is_hidden(name):
            reason = "hidden"
        elif extension in _TEXTS:
            beside = texts.get(stem(name))
            if beside is None:
                reason = "text without an image of its name"
            elif beside.setdefault(extension, name) != name:
                reason = "text beside another of its name"
        elif not is_image_name(name):
            reason = f".{extension}, which is not read" if extension else "no extension"
        inventory.used["files"] += not reason
        if reason:
            inventory.leave_out("files", reason, storable(name))
    return Files(images, texts, inventory)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, but for hidden ones and those that systems make."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _is_no_data(entry.name))


def stem(name: str) -> str:
    """A path without its extension."""
    return re.sub(r"\.[^./]*$", "", name)


def _walk(root: Path, below: str) -> Iterator[str]:
    above = (*root.absolute().parents, *root.resolve().parents)
    folders, seen = [(str(root), below)], {_identity(folder) for folder in above}
    for folder, below in folders:
        if (identity := _identity(folder)) in seen:  # a link to a folder above it, or to one that was read
            continue
        seen.add(identity)
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    yield below + entry.name
                elif not _is_no_data(entry.name):
                    folders.append((entry.path, f"{below}{entry.name}/"))  # the loop comes to it


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116 (takes both)
    return status.st_dev, status.st_ino


def _is_no_data(folder: str) -> bool:
    return folder.startswith(".") or folder in _OF_SYSTEMS


def _is_hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith(".")
