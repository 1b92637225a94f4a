"""`indiclip shards pack`: files -> shards, checked on the way."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from indiclip.commands.findings import json_line
from indiclip.commands.parallel import results
from indiclip.commands.sources import Items, open_source
from indiclip.datasets.tables import stable_hash
from indiclip.images import EncodedImage, UnreadableSample
from indiclip.webdataset.box_shards import check_boxes
from indiclip.webdataset.shard_writer import ShardWriter
from indiclip.webdataset.shards import read_caption, read_captions, read_classes, read_entry
from indiclip.webdataset.tar_members import MAX_BYTES

_EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_NAME = re.compile(r"[\w-]+")


class Packed(NamedTuple):
    """A sample that is ready to be written, or why it is not."""

    place: int  # in the source
    members: dict[str, bytes]
    reason: str = ""


def run(options: argparse.Namespace) -> int:
    """Pack a source. Returns 1 where nothing could be packed."""
    if not _NAME.fullmatch(options.name):
        raise ValueError(f"--name: found {options.name!r}; expected letters, digits, '_' and '-'")
    folder = Path(options.out)
    class_file, left_out_file = folder / "classes.txt", folder / f"{options.name}-left-out.jsonl"
    classes = read_classes(str(class_file)) if class_file.exists() else None
    source = open_source(
        options.source, options.images, options.captions, options.image_column, options.caption_column, classes
    )
    if source.classes and classes not in (None, source.classes):
        raise ValueError(f"{class_file} names other classes than {options.source}: their numbers would not fit")
    for name in read_classes(source.classes):
        if name not in source.classes or len(name.splitlines()) > 1:
            raise ValueError(f"{options.source}: the class {name!r} is no line of text without spaces around it")
    keys = [source.keys[i] for i in range(len(source.keys))]
    order = sorted(range(len(keys)), key=lambda i: stable_hash(f"{options.seed}:{keys[i]}"))
    writer = ShardWriter(folder, options.name, options.samples, options.size)
    if source.classes and classes is None:
        class_file.write_text("\n".join(source.classes) + "\n", "utf-8")
    left_out: Counter[str] = Counter()
    try:
        with writer, left_out_file.open("w", encoding="utf-8") as lost:
            for packed in results(partial(_read, source), order, options.workers, "samples"):
                if packed.reason:
                    left_out[packed.reason] += 1
                    line = {"name": source.names[packed.place], "key": keys[packed.place], "reason": packed.reason}
                    lost.write(json_line(line))
                else:
                    writer.add(keys[packed.place], packed.members)
    except BaseException:
        _show(writer, left_out, len(keys), options.json, whole=False)
        raise
    finally:
        if not left_out:
            left_out_file.unlink(missing_ok=True)
    _show(writer, left_out, len(keys), options.json, whole=True)
    return 0 if writer.shards else 1


def _read(source: Items, index: int) -> Packed:
    """The members of a sample, after everything has been read that training will read."""
    try:
        item = source[index]
        if not item.image.is_file():
            raise ValueError(f"{item.image}: no such file")
        if item.image.stat().st_size > MAX_BYTES["jpg"]:
            raise ValueError(f"{item.image}: more than {MAX_BYTES['jpg']:,} bytes")
        data = item.image.read_bytes()
        image = EncodedImage(data, "")
        image.decode()
        _check(item.texts, image, source.classes)
    except UnreadableSample as error:
        return Packed(index, {}, error.reason)
    except (OSError, ValueError) as error:
        return Packed(index, {}, str(error))
    return Packed(index, {_EXTENSION[image.kind]: data, **item.texts})


def _check(texts: dict[str, bytes], image: EncodedImage, classes: list[str]) -> None:
    for extension, text in texts.items():
        if len(text) > MAX_BYTES[extension]:
            raise ValueError(f"{len(text):,} bytes of {extension}; expected at most {MAX_BYTES[extension]:,}")
    entry = read_entry(texts["json"]) if "json" in texts else {}
    caption = read_caption(texts, entry)
    captions = read_captions(entry, caption)
    if "annotations" in entry:
        check_boxes(entry, image, len(classes))
    elif caption is None and not captions and "cls" not in texts and entry.get("label", entry.get("cls")) is None:
        raise ValueError("neither a text (.txt, .json) nor a class's folder")


def _show(writer: ShardWriter, left_out: Counter[str], num_items: int, as_json: bool, whole: bool) -> None:
    size = sum(shard.stat().st_size for shard in writer.shards)
    summary = {
        "whole": whole,
        "samples": writer.num_samples,
        "left_out": left_out.total(),
        "bytes": size,
        "shards": list(map(str, writer.shards)),
    }
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
        return
    place = f"{writer.folder / writer.name}-*.tar"
    count = f"{writer.num_samples:,} of {num_items:,} samples in {len(writer.shards):,} shards, {size / 1e6:,.1f} MB"
    print(f"{place}: {count}" if whole else f"not finished; whole are, in {place}: {count}")
    if left_out:
        print(f"  left out: {left_out.total():,}, listed in {writer.folder / writer.name}-left-out.jsonl; the first:")
        print(f"  {next(iter(left_out))}")
