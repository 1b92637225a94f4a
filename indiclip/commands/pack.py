"""`indiclip shards pack`: files -> shards, checked on the way."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from indiclip.commands.findings import json_line, show_lines
from indiclip.commands.parallel import results
from indiclip.commands.sources import Items, open_source
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.table_reader import OnBadRow
from indiclip.datasets.tables import stable_hash
from indiclip.images import EXTENSION_OF, EncodedImage, UnreadableSample
from indiclip.webdataset.box_shards import check_boxes
from indiclip.webdataset.shard_writer import ShardWriter
from indiclip.webdataset.shards import read_captions, read_classes, read_entry
from indiclip.webdataset.tar_members import MAX_BYTES

_NAME = re.compile(r"[\w-]+")


class Packed(NamedTuple):
    """A sample that is ready to be written, or why it is not."""

    place: int  # in the source
    members: dict[str, bytes]
    kind: str = ""  # of what is wrong, to be counted by
    reason: str = ""


def run(
    source: str,
    out: str,
    name: str,
    samples: int,
    size: int,
    seed: int,
    images: str | None,
    captions: str | None,
    image_column: str,
    caption_column: str,
    on_bad_row: OnBadRow,
    workers: int | None,
    as_json: bool,
) -> int:
    """Pack a source. Returns 1 where nothing could be packed."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"--name: found {name!r}; expected letters, digits, '_' and '-'")
    inventory, folder = Inventory(), Path(out)
    with ShardWriter(folder, name, samples, size) as writer:
        class_file = folder / "classes.txt"
        classes = read_classes(str(class_file)) if class_file.exists() else None
        items = open_source(source, images, captions, image_column, caption_column, classes, on_bad_row)
        _check_classes(items, classes, class_file, source)
        if items.classes and classes is None:
            writer.lock(class_file.name)
            if class_file.exists():
                raise ValueError(f"{class_file}: another process has just written it; start this one again")
        keys = [items.keys[i] for i in range(len(items.keys))]
        order = sorted(range(len(keys)), key=lambda i: stable_hash(f"{seed}:{keys[i]}"))
        left_out_file = writer.part / f"{name}-left-out.jsonl"
        with left_out_file.open("w", encoding="utf-8") as left_out:
            for packed in results(partial(_read, items), order, workers, "samples"):
                if packed.kind:
                    shown, key = items.names[packed.place], keys[packed.place]
                    inventory.present["samples"] += 1
                    inventory.leave_out("samples", packed.kind, f"{shown}: {packed.reason}")
                    left_out.write(json_line({"name": shown, "key": key, "reason": packed.reason}))
                else:
                    writer.add(keys[packed.place], packed.members)
        if not inventory.present["samples"]:
            left_out_file.unlink()
        writer.finish()
        if writer.shards and items.classes and classes is None:
            (writer.part / class_file.name).write_text("\n".join(items.classes) + "\n", "utf-8")
        inventory += items.inventory
        inventory += writer.inventory
        assert inventory.present["samples"] == len(keys), f"{len(keys)} samples became {inventory.summary()}"
    _show(writer, inventory, as_json)
    return 0 if writer.shards else 1


def _check_classes(source: Items, classes: list[str] | None, class_file: Path, name: str) -> None:
    if source.classes and classes not in (None, source.classes):
        raise ValueError(f"{class_file} names other classes than {name}: their numbers would not fit")
    for found in read_classes(source.classes):
        if found not in source.classes or len(found.splitlines()) > 1:
            raise ValueError(f"{name}: the class {found!r} is no line of text without spaces around it")


def _read(source: Items, index: int) -> Packed:
    """The members of a sample, after everything has been read that training will read."""
    kind = "without an image file"
    try:
        item = source[index]
        data = item.image
        if isinstance(data, Path):
            if not data.is_file():
                raise ValueError(f"{data}: no such file")
            kind = "with an unreadable image"
            if data.stat().st_size > MAX_BYTES["jpg"]:
                raise ValueError(f"{data}: more than {MAX_BYTES['jpg']:,} bytes")
            data = data.read_bytes()
        kind = "with an unreadable image"
        image = EncodedImage(data, "")
        image.decode()
        kind = "with unusable texts, classes or boxes"
        _check(item.texts, image, source.classes)
    except UnreadableSample as error:
        return Packed(index, {}, kind, error.reason)
    except (OSError, ValueError) as error:
        return Packed(index, {}, kind, str(error))
    return Packed(index, {EXTENSION_OF[image.kind]: data, **item.texts})


def _check(texts: dict[str, bytes], image: EncodedImage, classes: list[str]) -> None:
    for extension, text in texts.items():
        if len(text) > MAX_BYTES[extension]:
            raise ValueError(f"{len(text):,} bytes of {extension}; expected at most {MAX_BYTES[extension]:,}")
    entry = read_entry(texts)
    captions = read_captions(texts, entry)
    if "annotations" in entry:
        check_boxes(entry, image, len(classes))
    elif not captions and "cls" not in texts and entry.get("label", entry.get("cls")) is None:
        raise ValueError("neither a text (.txt, .json) nor a class's folder")


def _show(writer: ShardWriter, inventory: Inventory, as_json: bool) -> None:
    size = sum(shard.stat().st_size for shard in writer.shards)
    place, samples = writer.folder / writer.name, inventory.used["samples"]
    left_out = inventory.present["samples"] - samples
    if as_json:
        summary = {"bytes": size, "shards": list(map(str, writer.shards)), "inventory": inventory.summary()}
        print(json_line({"samples": samples, "left_out": left_out, **summary}), end="")
        return
    print(f"{place}-*.tar: {len(writer.shards):,} shards, {size / 1e6:,.1f} MB")
    show_lines(inventory)
    if left_out:
        print(f"  all {left_out:,} samples that are left out: {place}-left-out.jsonl")
