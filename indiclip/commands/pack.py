"""`indiclip shards pack`: files -> shards, checked on the way."""

import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from indiclip.commands.findings import json_line, show_lines
from indiclip.commands.parallel import results
from indiclip.commands.sources import Items, image_bytes, open_source
from indiclip.datasets.coco_file import check_unique
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.table_reader import OnBadRow
from indiclip.datasets.tables import is_text, stable_hash, text_lines
from indiclip.images import EXTENSION_OF, EncodedImage, UnreadableSample
from indiclip.webdataset.box_shards import check_boxes
from indiclip.webdataset.shard_writer import ShardWriter
from indiclip.webdataset.shards import read_captions, read_classes, read_entry
from indiclip.webdataset.tar_index import BAD_LABEL, label_of
from indiclip.webdataset.tar_members import MAX_BYTES

_NAME = re.compile(r"[\w-]+")
_NO_FILE = "without an image file"


class Packed(NamedTuple):
    """A sample that is ready to be written, or why it is not."""

    place: int  # in the source
    members: dict[str, bytes]
    held: dict[str, int]  # captions and boxes
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
        inventory += items.inventory
        keys = [items.keys[i] for i in range(len(items.keys))]
        order = sorted(range(len(keys)), key=lambda i: stable_hash(f"{seed}:{keys[i]}"))
        left_out_file = writer.part / f"{name}-left-out.jsonl"
        with left_out_file.open("w", encoding="utf-8") as left_out:
            for packed in results(partial(read_sample, items), order, workers, "samples"):
                key = keys[packed.place]
                if packed.kind:
                    _leave_out(packed, items, inventory)
                    row = {"name": items.names[packed.place], "key": key, "reason": packed.reason}
                    left_out.write(json_line(row))
                else:
                    writer.add(key, packed.members)
                    packed.held.pop("boxes", 0)  # their shard counts them
                    inventory.present.update(packed.held)
                    inventory.used.update(packed.held)
        writer.finish()
        if not inventory.present["samples"] or not writer.shards:
            left_out_file.unlink()
        if writer.shards and items.classes and classes is None:
            (writer.part / class_file.name).write_text("\n".join(items.classes) + "\n", "utf-8")
        inventory += writer.inventory
        inventory.verify()
        if writer.shards:
            inventory.check_used(source)
        assert inventory.present["samples"] == len(keys), f"{len(keys)} samples became {inventory.summary()}"
    _show(writer, inventory, as_json)
    if not writer.shards and not images and any(kind == _NO_FILE for _, kind, *_ in inventory.left_out()):
        print(f"  expected the images in {items.folder}; --images says where else they are")
    return 0 if writer.shards else 1


def _leave_out(packed: Packed, items: Items, inventory: Inventory) -> None:
    """Count a sample that is not written, and what it holds and is made of."""
    shown = items.names[packed.place]
    inventory.present["samples"] += 1
    inventory.leave_out("samples", packed.kind, f"{shown}: {packed.reason}")
    inventory.present.update(packed.held)
    inventory.used.subtract(made_of := items.leave_out(packed.place))
    for unit, count in (packed.held | made_of).items():
        inventory.leave_out(unit, "of samples that are left out", shown, count)


def _check_classes(source: Items, classes: list[str] | None, class_file: Path, name: str) -> None:
    if source.classes and classes not in (None, source.classes):
        raise ValueError(f"{class_file} names other classes than {name}: their numbers would not fit")
    check_unique(source.classes, f"{name}: class")
    for found in source.classes:
        if text_lines(found) != [found.strip()] or not is_text(found):
            raise ValueError(f"{name}: the class {found!r} is no line of text without spaces around it")


def read_sample(source: Items, index: int) -> Packed:
    """The members of a sample, after everything has been read that training will read."""
    held, kind = dict[str, int](), "with unusable texts, classes or boxes"
    try:
        item = source[index]
        held, kind = _held(item.texts), _NO_FILE
        data = image_bytes(source.folder, item)
        kind = "with an unreadable image"
        image = EncodedImage(data, "")
        image.decode()
        kind = "with unusable texts, classes or boxes"
        _check({"jpg": data, **item.texts}, image, source.classes)
    except UnreadableSample as error:
        return Packed(index, {}, held, kind, error.reason)
    except (OSError, ValueError) as error:
        return Packed(index, {}, held, kind, str(error))
    return Packed(index, {EXTENSION_OF[image.kind]: data, **item.texts}, held)


def _held(texts: dict[str, bytes]) -> dict[str, int]:
    """How many captions and boxes a sample has; of captions that are no text 0."""
    entry, captions = dict[str, Any](), dict[str, list[str]]()
    with suppress(ValueError):
        entry = read_entry(texts)
        captions = read_captions(texts, entry)
    boxes = entry.get("annotations")
    held = {"captions": sum(map(len, captions.values())), "boxes": len(boxes) if isinstance(boxes, list) else 0}
    return {unit: count for unit, count in held.items() if count}


def _check(parts: dict[str, bytes], image: EncodedImage, classes: list[str]) -> None:
    for extension, data in parts.items():
        if len(data) > MAX_BYTES[extension]:
            raise ValueError(f"{len(data):,} bytes of {extension}; expected at most {MAX_BYTES[extension]:,}")
    entry = read_entry(parts)
    captions = read_captions(parts, entry)
    if "annotations" in entry:
        check_boxes(entry, image, len(classes))
    label = 0 if "cls" in parts else label_of(entry)
    if label == BAD_LABEL:
        raise ValueError("the label of the .json is no whole number from 0")
    if not captions and label < 0 and "annotations" not in entry:
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
    if len(writer.shards) == samples > 1:
        print("  each shard holds one sample; --samples and --size say how much it may hold")
    if left_out and writer.shards:
        print(f"  every sample that is left out: {place}-left-out.jsonl")
