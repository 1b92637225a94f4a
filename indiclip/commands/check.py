"""`indiclip shards check`: everything is read as training would read it, and more is said about it.

The same functions as in training decide what is unreadable; what is odd but can be used is a warning.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from indiclip.commands.findings import Finding, Findings, json_line, show_lines
from indiclip.commands.parallel import results
from indiclip.commands.reading import Range, opened, ranges
from indiclip.datasets.inventory import Inventory
from indiclip.images import EncodedImage, UnreadableSample
from indiclip.webdataset import cache
from indiclip.webdataset.box_shards import check_boxes
from indiclip.webdataset.shards import Shards, find, read_captions, read_entry
from indiclip.webdataset.tar_index import BAD_LABEL, DUPLICATED
from indiclip.webdataset.tar_members import IMAGES, LINK, OUTSIDE, TEXTS, TOO_LARGE, key_and_extension, members

_KINDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # Unicode's Cc but tabs and line ends
_MAX_ASPECT = 20  # 1:20 or 20:1
_UNSAFE = {
    LINK: "a link or a special file",
    OUTSIDE: "its name leads out of the folder",
    TOO_LARGE: "too large for a part of a sample",
}
_NUM_CLASSES = 2**31  # the shards alone do not say how many there are

Result = TypeVar("Result")


def run(shards: list[str], max_characters: int, out: str | None, workers: int | None, as_json: bool) -> int:
    """Check shards and print what was found. Returns 1 where training could not use something."""
    urls = find(shards)
    opened.cache_clear()  # they may have changed since the last call
    with Path(out).open("w", encoding="utf-8") if out else nullcontext() as file:
        findings, counts, inventory = Findings(_KINDS["warnings"], file), [], Inventory()
        for count, of_shard, found in results(_shard, urls, workers, "shards"):
            counts.append(count)
            inventory += of_shard
            findings.add(found)
        findings.add(_same_names(urls, counts))
        tasks = ranges(zip(urls, counts, strict=True))
        hashes = []
        for found, of_range, num_captions in results(
            partial(_samples, max_characters=max_characters), tasks, workers, "samples"
        ):
            findings.add(found)
            hashes.append(of_range)
            inventory.present["captions"] += num_captions
            inventory.used["captions"] += num_captions
        findings.add(_repeats(tasks, hashes))
    inventory.verify()
    if as_json:
        summary = {"shards": len(urls), "samples": sum(counts), "clean": findings.clean, **findings.summary()}
        print(json_line({**summary, "inventory": inventory.summary()}), end="")
    else:
        print(f"{sum(counts):,} samples in {len(urls):,} shards: {'no problems' if findings.clean else 'problems'}")
        show_lines(inventory)
        findings.show()
    return 0 if findings.clean else 1


def _shard(url: str) -> tuple[int, Inventory, list[Finding]]:
    """The number of samples, and what is wrong with the tar and with members that are no part of a sample."""
    shown = cache.shown(url)
    damaged: list[tuple[str, str]] = []
    found: list[Finding] = []
    try:
        tar = cache.local_tar(url, cache.stat(url))
        for name, member in members(tar, damaged):
            found += _member(shown, name, key_and_extension(name, member)[1])
        shards = opened(url)
    except (ValueError, OSError) as error:
        found += [Finding("broken shard", shown, key, reason) for key, reason in damaged]
        return 0, Inventory(), [*found, Finding("broken shard", shown, "", str(error).removeprefix(f"{shown}: "))]
    for lost in shards.damaged:
        kind = "duplicate member" if DUPLICATED in lost.reason else "broken shard"
        found.append(Finding(kind, shown, lost.key, lost.reason))
    inventory = shards.contents()
    if unused := inventory.unused():
        found.append(Finding("nothing to learn", shown, "", unused))
    if count := inventory.present["samples"] - inventory.used["samples"]:
        found.append(Finding("text without an image", shown, "", f"keys without {', '.join(IMAGES)}: {count:,}"))
    return len(shards), inventory, found


def _member(shard: str, name: str, extension: str) -> Iterator[Finding]:
    if reason := _UNSAFE.get(extension):
        yield Finding("unsafe member", shard, name, f"{reason}; it is not read")
    elif extension.rpartition(".")[2] in _KINDS["programs"]:
        yield Finding("unsafe member", shard, name, "loading such a file can run code; it is not read")
    elif extension not in (*IMAGES, *TEXTS):
        yield Finding("left-out member", shard, name, f"is not read; expected {', '.join((*IMAGES, *TEXTS))}")


def _samples(piece: Range, max_characters: int) -> tuple[list[Finding], np.ndarray, int]:
    """What is wrong with them, the hashes of each, uint64 (N, 2), and how many captions they have."""
    samples = [_Sample(opened(piece.url), index, max_characters) for index in range(piece.first, piece.last)]
    found = [finding for sample in samples for finding in sample.found]
    hashes = np.array([sample.hashes for sample in samples], np.uint64)
    return found, hashes, sum(sample.num_captions for sample in samples)


class _Sample:
    """One sample, read part by part, so that everything that is wrong with it is said.

    Attributes:
        found: What is wrong with it.
        hashes: 64 bits of its image, and of image, caption and label; 0 where they cannot be read.
    """

    def __init__(self, shards: Shards, index: int, max_characters: int) -> None:
        self.found: list[Finding] = []
        self.hashes, self.num_captions = (0, 0), 0
        self._shard, self._key = shards.shard(index), shards.key(index)
        parts = self._try("unreadable bytes", shards.parts, index)
        if parts is None:
            return
        image = self._try("unreadable image", EncodedImage, parts["image"], self._key)
        if image is not None:
            self._try("unreadable image", image.decode)
            if max(image.size_hw) > _MAX_ASPECT * min(image.size_hw):
                self._say("extreme aspect", f"{image.size_hw[1]}x{image.size_hw[0]} pixels")
        entry = self._try("unreadable JSON", read_entry, parts)
        if entry is None:
            return
        captions = self._try("unreadable caption", read_captions, parts, entry) or {}
        self.num_captions = sum(map(len, captions.values()))
        for text in itertools.chain(*captions.values()):
            self._check_caption(text, max_characters)
        label = int(shards.labels[index])
        if label == BAD_LABEL:
            self._say("unreadable label", "the label is no whole number from 0")
        if "annotations" in entry and image is not None:
            self._try("unreadable boxes", check_boxes, entry, image, _NUM_CLASSES)
        sound = all(finding.kind in _KINDS["warnings"] for finding in self.found)
        if not captions and label == -1 and "annotations" not in entry and sound:
            self._say("nothing to learn", "neither text (.txt, .json) nor label (.cls) nor boxes beside the image")
        of_image = _hash(parts["image"])
        self.hashes = of_image, _hash(f"{of_image}:{label}:{captions}".encode(errors="replace"))

    def _check_caption(self, text: str, max_characters: int) -> None:
        if text.casefold() in _KINDS["placeholders"]:
            self._say("placeholder caption", f"the caption is {text!r}")
        if len(text) > max_characters:
            self._say("long caption", f"{len(text):,} characters; more than {max_characters:,}")
        if control := _CONTROL.search(text):
            self._say("control character in a caption", f"{control[0]!r} in {text[:40]!r}")

    def _try(self, kind: str, function: Callable[..., Result], *arguments: Any) -> Result | None:
        try:
            return function(*arguments)
        except UnreadableSample as error:
            self._say(kind, error.reason)
        except (OSError, ValueError) as error:
            self._say(kind, str(error))
        return None

    def _say(self, kind: str, reason: str) -> None:
        self.found.append(Finding(kind, self._shard, self._key, reason))


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _same_names(urls: list[str], counts: list[int]) -> Iterator[Finding]:
    """Keys that shards of one name share; keys begin with the shard's name."""
    named = Counter(map(cache.stem, urls))
    first_in: dict[str, str] = {}
    for url, count in zip(urls, counts, strict=True):
        if not count or named[cache.stem(url)] == 1:
            continue
        shards = opened(url)
        for key in map(shards.key, range(count)):
            first = first_in.setdefault(key, url)
            if first != url:
                yield Finding("duplicate key", cache.shown(url), key, f"is in {cache.shown(first)} too")


def _repeats(tasks: list[Range], hashes: list[np.ndarray]) -> Iterator[Finding]:
    """Samples whose image was there before, with another caption or with the same."""
    if not tasks:
        return
    starts = np.cumsum([0, *(piece.last - piece.first for piece in tasks)])
    first_image, first_sample = map(_first_places, np.concatenate(hashes).T)

    def where(place: int) -> tuple[str, str]:
        number = int(starts.searchsorted(place, side="right")) - 1
        piece = tasks[number]
        shards = opened(piece.url)
        return cache.shown(piece.url), shards.key(piece.first + place - int(starts[number]))

    for place in np.flatnonzero(first_image != np.arange(len(first_image))).tolist():
        same = first_sample[place] != place
        first_shard, first_key = where(int((first_sample if same else first_image)[place]))
        kind, what = ("repeated sample", "image and caption are") if same else ("identical image", "the image is")
        yield Finding(kind, *where(place), f"{what} that of {first_key} in {first_shard}")


def _first_places(hashes: np.ndarray) -> np.ndarray:
    """Of each hash, where it was first; unreadable samples (0) are each their own."""
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    return np.where(hashes == 0, np.arange(len(hashes)), first[number])
