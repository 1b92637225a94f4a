"""The images of a card from one layout into another, so that other tools read the same data: bytes are never changed.

`folder` is `<split>/<class>/*.jpg` (with captions: `images/` and captions.csv). `clip-benchmark` is the folder that
clip-benchmark 1.6 reads as `wds/`: classnames.txt, zeroshot_classification_templates.txt and `<split>/0.tar`, or for
retrieval dataset_type.txt and captions in `.txt`, a line each.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from indiclip.datasets.tables import existing
from indiclip.evals.cards.card import Card, load_card
from indiclip.evals.images.items import Items
from indiclip.evals.images.layouts import read_items
from indiclip.images import EXTENSION_OF, EncodedImage, UnreadableSample
from indiclip.names import check_choice, did_you_mean

_SHARD_SAMPLES, _SHARD_BYTES = 10_000, 10**9  # clip-benchmark's own


class Converted(NamedTuple):
    """What was written."""

    folder: Path
    images: Counter[str]  # of each split
    left_out: list[str]  # a line per image that cannot be read
    notes: list[str]


class _Writer(Protocol):
    def add(self, place: int, split: str, image: EncodedImage) -> None: ...

    def close(self) -> None: ...


def convert(
    source: str, card: str, out: str, layout: str = "clip-benchmark", split: str = "test", language: str = "en"
) -> Converted:
    """Write a card's images in another layout, whole or not at all.

    Args:
        source: A folder, a table or a file of captions in any layout that `indiclip.evals.images.layouts` reads.
        card: The id of a packaged card, or a file.
        out: The new folder.
        layout: `folder` or `clip-benchmark`.
        split: What the images that are scored are put under; those for training are under `train`.
        language: Of class names, prompts and captions, of which clip-benchmark's layout has one.

    Raises:
        FileExistsError: There is something in the folder.
        FileNotFoundError: No source, or no images in it.
        ValueError: The images do not fit the card, the layout has no such task, or classes have no name in the
            language.
    """
    folder, writers = Path(out).expanduser(), {"folder": _folder_writer, "clip-benchmark": _ClipBenchmark}
    check_choice("--layout", layout, writers)
    if not re.fullmatch(r"[\w-]+", split) or split == "train":
        raise ValueError(f"--split: found {split!r}; expected what the scored images are called, such as test")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and not empty; nothing was written")
    items = read_items(load_card(card), existing(source))
    done, left_out = Counter[str](), []
    with _whole_folder(folder) as part:
        writer = writers[layout](items, part, language)
        for place in range(len(items)):
            split_here = "train" if items.is_train is not None and items.is_train[place] else split
            try:
                image = items.images[place]
                image.decode()  # other tools stop at an image that breaks off
            except UnreadableSample as error:
                left_out.append(f"{items.keys[place]}: {error.reason}")
                continue
            writer.add(place, split_here, image)
            done[split_here] += 1
        if not done:
            raise ValueError(f"{source}: none of {len(items)} images can be read, first {left_out[0]}")
        writer.close()
    return Converted(folder, done, left_out, items.notes)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder that has another name until it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        part.chmod(0o755)
        yield part
        if folder.exists():
            folder.rmdir()  # it is empty
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _ClipBenchmark:
    """Shards of 10,000 samples, numbered from 0 in each split."""

    def __init__(self, items: Items, folder: Path, language: str) -> None:
        card = items.card
        if card.task == "matching":
            raise ValueError(f"clip-benchmark has no task like {card.task}; --layout folder can hold {card.id}")
        self.items, self.folder, self.language = items, folder, language
        self.captions = _captions(items, language) if card.task == "retrieval" else None
        if self.captions is not None:
            _write_lines(folder / "dataset_type.txt", ["retrieval"])
        else:
            _write_lines(folder / "classnames.txt", _class_names(card, language))
            _write_lines(folder / "zeroshot_classification_templates.txt", list(card.templates(language)))
        self.open: dict[str, tarfile.TarFile] = {}
        self.shards, self.samples, self.bytes = Counter[str](), Counter[str](), Counter[str]()
        self.total = Counter[str]()

    def add(self, place: int, split: str, image: EncodedImage) -> None:
        members = {EXTENSION_OF[image.kind]: image.data}
        if self.captions is None:
            members["cls"] = str(int(self.items.labels[place])).encode()
        else:
            members["txt"] = "\n".join(self.captions[place]).encode()
        size = sum(map(len, members.values()))
        if self.samples[split] and (self.samples[split] == _SHARD_SAMPLES or self.bytes[split] + size > _SHARD_BYTES):
            self._finish(split)
        if split not in self.open:
            (self.folder / split).mkdir(exist_ok=True)
            shard = self.folder / split / f"{self.shards[split]}.tar"
            self.open[split] = tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        for extension, content in members.items():
            info = tarfile.TarInfo(f"s{self.total[split]:07}.{extension}")  # owner and time are zero: the same bytes
            info.size, info.mode = len(content), 0o644
            self.open[split].addfile(info, io.BytesIO(content))
        self.samples[split] += 1
        self.bytes[split] += size
        self.total[split] += 1

    def _finish(self, split: str) -> None:
        self.open.pop(split).close()
        self.shards[split] += 1
        self.samples[split] = self.bytes[split] = 0

    def close(self) -> None:
        for split in list(self.open):
            self._finish(split)
        for split, count in self.shards.items():
            _write_lines(self.folder / split / "nshards.txt", [str(count)])


def _folder_writer(items: Items, folder: Path, language: str) -> _Writer:
    return _CaptionFolder(items, folder) if items.card.task == "retrieval" else _ClassFolders(items, folder)


class _ClassFolders:
    """`<split>/<class>/*.jpg`, and `.txt` beside it for what is written on an image."""

    def __init__(self, items: Items, folder: Path) -> None:
        self.items, self.folder, self.names = items, folder, _Names()

    def add(self, place: int, split: str, image: EncodedImage) -> None:
        folder = self.folder / split / self.items.card.classes[int(self.items.labels[place])].id
        folder.mkdir(parents=True, exist_ok=True)
        stem = self.names.free(self.items.keys[place], str(folder))
        (folder / f"{stem}.{EXTENSION_OF[image.kind]}").write_bytes(image.data)
        if self.items.candidates is not None:
            _write_lines(folder / f"{stem}.txt", self.items.candidates[place][:1])

    def close(self) -> None:
        pass


class _CaptionFolder:
    """`images/` and captions.csv: a row per caption, a column per language."""

    def __init__(self, items: Items, folder: Path) -> None:
        self.items, self.folder, self.names = items, folder / "images", _Names()
        self.folder.mkdir()
        self.captions = items.captions or {}
        self.rows: list[list[str]] = []

    def add(self, place: int, split: str, image: EncodedImage) -> None:
        name = f"{self.names.free(self.items.keys[place], '')}.{EXTENSION_OF[image.kind]}"
        (self.folder / name).write_bytes(image.data)
        columns = [texts[place] for texts in self.captions.values()]
        for number in range(max(map(len, columns), default=0)):
            self.rows.append([name, split, *(texts[number] if number < len(texts) else "" for texts in columns)])

    def close(self) -> None:
        is_split = self.items.is_train is not None
        with (self.folder.parent / "captions.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for row in [["file", "split", *self.captions], *self.rows]:
                writer.writerow(row if is_split else [row[0], *row[2:]])


class _Names:
    """File names without ending, from keys, each once in a folder."""

    def __init__(self) -> None:
        self._taken: set[tuple[str, str]] = set()

    def free(self, key: str, folder: str) -> str:
        """The last part of a key, with a number behind it where it is taken."""
        stem = re.sub(r"\.[^.]*$", "", key.rpartition("/")[2])
        stem = re.sub(r"[^\w-]+", "_", stem) or "image"
        name, number = stem, 1
        while (folder, name.casefold()) in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._taken.add((folder, name.casefold()))
        return name


def _class_names(card: Card, language: str) -> list[str]:
    names = card.names(language)
    missing = [one.id for place, one in enumerate(card.classes) if place not in names]
    if missing:
        known = ", ".join(code for code, count in card.languages.items() if count == len(card.classes))
        raise ValueError(
            f"--language: {len(missing)} classes of {card.id} have no name in {language!r}, first {missing[0]}; "
            f"all have one in {known}"
        )
    return list(names.values())


def _captions(items: Items, language: str) -> list[list[str]]:
    captions = items.captions or {}
    if language not in captions:
        hint = did_you_mean(language, captions)
        raise ValueError(f"--language: no captions in {language!r}{hint}; found {', '.join(captions)}")
    for key, texts in zip(items.keys, captions[language], strict=True):
        if not texts:
            raise ValueError(f"--language: {key} has no caption in {language!r}")
    return captions[language]


def _write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
