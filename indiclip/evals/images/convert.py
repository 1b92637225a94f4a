"""The images of a card from one layout into another, so that other tools read the same data: bytes are never changed.

`folder` is `<split>/<class>/*.jpg` (with captions: `images/` and captions.csv). `clip-benchmark` is the folder that
clip-benchmark 1.6 reads as `wds/`: classnames.txt, zeroshot_classification_templates.txt and `<split>/0.tar`, or for
retrieval dataset_type.txt and captions in `.txt`, a line each.
"""

import csv
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, zip_longest
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from webdataset import ShardWriter

from indiclip.datasets.languages import caption_language, language_tag
from indiclip.datasets.tables import existing
from indiclip.evals.cards.card import Card, load_card
from indiclip.evals.images.items import Items
from indiclip.evals.images.layouts import read_items
from indiclip.images import EXTENSION_OF, EncodedImage, UnreadableSample
from indiclip.names import check_choice

_SHARD_SAMPLES, _SHARD_BYTES = 10_000, 10**9  # clip-benchmark's own


class Converted(NamedTuple):
    """What was written."""

    folder: Path
    images: Counter[str]  # of each split
    left_out: list[str]  # a line per image that cannot be read
    notes: list[str]


class _Readable(NamedTuple):
    place: int  # among the items
    split: str
    image: EncodedImage


_Write = Callable[[Items, Path, str, Iterable[_Readable]], None]  # items, an empty folder, the language, their images


def convert(
    source: str,
    card: str,
    out: str,
    layout: str = "clip-benchmark",
    split: str = "test",
    language: str = "en",
    skip_unknown: bool = False,
) -> Converted:
    """Write a card's images in another layout, whole or not at all.

    Args:
        source: A folder, a table or a file of captions in any layout that `indiclip.evals.images.layouts` reads.
        card: The id of a packaged card, or a file.
        out: The new folder.
        layout: `folder` or `clip-benchmark`.
        split: What the images that are scored are put under; those for training are under `train`.
        language: Of class names, prompts and captions, of which clip-benchmark's layout has one.
        skip_unknown: Leave out and count the images of other classes than the card's; they are an error else.

    Raises:
        FileExistsError: There is something in the folder.
        FileNotFoundError: No source, or no images in it.
        ValueError: The images do not fit the card, the layout has no such task, or classes have no name in the
            language.
    """
    language = language_tag(language) or language
    folder = Path(out).expanduser().absolute()
    layouts: dict[str, _Write] = {"folder": _write_folder, "clip-benchmark": _write_clip_benchmark}
    check_choice("--layout", layout, layouts)
    if not re.fullmatch(r"[\w-]+", split) or split == "train":
        raise ValueError(f"--split: found {split!r}; expected what the scored images are called, such as test")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and not empty; nothing was written")
    asked = load_card(card)
    if columns := sorted(asked.required_fields - {"class", "text", "captions"}):
        raise ValueError(f"--card {card}: it asks for the columns {', '.join(columns)}, which an import would lose")
    items = read_items(asked, existing(source), skip_unknown)
    done, left_out = Counter[str](), list[str]()

    def readable() -> Iterator[_Readable]:
        is_train_N = ~items.tested_N
        for place in is_train_N.argsort(stable=True).tolist():
            split_here = "train" if is_train_N[place] else split
            try:
                image = items.images[place]
                image.decode()  # other tools stop at an image that breaks off
            except UnreadableSample as error:
                left_out.append(f"{items.keys[place]}: {error.reason}")
                continue
            yield _Readable(place, split_here, image)
            done[split_here] += 1

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent) as part:
        whole = Path(part, folder.name)
        whole.mkdir()
        layouts[layout](items, whole, language, readable())
        if not done:
            raise ValueError(f"{source}: none of {len(items)} images can be read, first {left_out[0]}")
        if folder.exists():
            folder.rmdir()  # it is empty
        whole.rename(folder)
    return Converted(folder, done, left_out, items.notes)


def _write_clip_benchmark(items: Items, folder: Path, language: str, images: Iterable[_Readable]) -> None:
    """Shards of 10,000 samples, numbered from 0 in each split."""
    card = items.card
    if "text" in card.required_fields:
        raise ValueError(f"clip-benchmark has no task like {card.task}; --layout folder can hold {card.id}")
    if "captions" in card.required_fields:
        kind, texts = "txt", ["\n".join(of_image) for of_image in _captions(items, language)]
        _write_lines(folder / "dataset_type.txt", ["retrieval"])
    else:
        kind, texts = "cls", [str(label) for label in items.labels.tolist()]
        _write_lines(folder / "classnames.txt", _class_names(card, language))
        _write_lines(folder / "zeroshot_classification_templates.txt", list(card.templates(language)))
    for split, of_split in groupby(images, key=attrgetter("split")):
        (folder / split).mkdir()
        limits = {"maxcount": _SHARD_SAMPLES, "maxsize": _SHARD_BYTES, "verbose": 0}
        pattern = f"{folder / split}/".replace("%", "%%") + "%d.tar"
        with ShardWriter(pattern, **limits, mode=0o644, mtime=0) as writer:
            for number, (place, _, image) in enumerate(of_split):
                members = {EXTENSION_OF[image.kind]: image.data, kind: texts[place].encode()}
                writer.write({"__key__": f"s{number:07}"} | members)
            shards = writer.shard
        _write_lines(folder / split / "nshards.txt", [str(shards)])


def _write_folder(items: Items, folder: Path, language: str, images: Iterable[_Readable]) -> None:
    """`<split>/<class>/*.jpg`, and `.txt` beside it for what is written on an image; of retrieval the captions."""
    if "captions" in items.card.required_fields:
        return _write_captions(items, folder, images)
    taken: dict[Path, set[str]] = defaultdict(set)
    for place, split, image in images:
        below = folder / split / items.card.classes[int(items.labels[place])].id
        below.mkdir(parents=True, exist_ok=True)
        stem = _free_stem(items.keys[place], taken[below])
        (below / f"{stem}.{EXTENSION_OF[image.kind]}").write_bytes(image.data)
        if items.candidates is not None:
            _write_lines(below / f"{stem}.txt", items.candidates[place][:1])


def _write_captions(items: Items, folder: Path, images: Iterable[_Readable]) -> None:
    """`images/` and captions.csv: a row per caption, a column per language.

    Where columns are not called by a language, as `id` is not taken for Indonesian, `language` says it of `caption`.
    """
    captions, taken = items.captions, set[str]()
    languages = [language for language in captions if caption_language(language) == language]
    others = [language for language in captions if language not in languages]
    columns = ["file", *["split"] * (items.is_train is not None), *languages, *["caption", "language"] * bool(others)]
    (folder / "images").mkdir()
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for place, split, image in images:
            name = f"{_free_stem(items.keys[place], taken)}.{EXTENSION_OF[image.kind]}"
            (folder / "images" / name).write_bytes(image.data)
            row = {"file": name, "split": split}
            for texts in zip_longest(*(captions[language][place] for language in languages), fillvalue=""):
                table.writerow(row | dict(zip(languages, texts, strict=True)))
            for language in others:
                table.writerows(row | {"caption": text, "language": language} for text in captions[language][place])


def _free_stem(key: str, taken: set[str]) -> str:
    """A file name without its ending, from the last part of a key: each once in a folder, whatever its case."""
    stem = re.sub(r"\.[^.]*$", "", key.rpartition("/")[2])
    name = stem = re.sub(r"[^\w-]+", "_", stem) or "image"
    number = 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name.casefold())
    return name


def _class_names(card: Card, language: str) -> list[str]:
    names = card.names(language)
    if missing := [one.id for one in card.classes if language not in one.names]:
        known = ", ".join(code for code, count in card.languages.items() if count == len(card.classes))
        raise ValueError(
            f"--language: {len(missing)} classes of {card.id} have no name in {language!r}, first {missing[0]}; "
            f"all have one in {known}"
        )
    return list(names.values())


def _captions(items: Items, language: str) -> list[list[str]]:
    check_choice("--language", language, items.captions)
    for key, texts in zip(items.keys, items.captions[language], strict=True):
        if not texts:
            raise ValueError(f"--language: {key} has no caption in {language!r}")
    return items.captions[language]


def _write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
