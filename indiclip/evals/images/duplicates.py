"""Lines about images and captions that occur more than once. An image that lies in two classes counts as missed in one
of them; the label of one that is also in the gallery is known; captions of several images are taken for each other's.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from indiclip.evals.images.items import FileImages, Items

_MIDDLE = 1024  # bytes from a file's middle, which differ where files do; heads of JPEGs are often alike


def duplicates(items: Items) -> list[str]:
    """Lines that count the image files of which there are copies.

    Nothing is said of images in shards and in tables themselves, all of which would have to be read for it.
    """
    if not (isinstance(items.images, FileImages) and items.num_images):
        return []
    groups = _same_bytes([items.images.path(place) for place in range(len(items))])
    tested, label = items.tested_N.tolist(), items.labels.tolist()
    other_class, in_gallery, repeated = [], [], []
    for group in groups:
        scored = [place for place in group if tested[place]]
        by_class: dict[int, list[int]] = defaultdict(list)
        for place in group:
            by_class[label[place]].append(place)
        if len(by_class) > 1:
            other_class.append([places[0] for places in by_class.values()])
        elif scored and len(scored) < len(group):
            in_gallery.append(group)
        of_classes = [[place for place in places if tested[place]] for places in by_class.values()]
        repeated += [places for places in of_classes if len(places) > 1]
    found = {"in two classes": other_class, "in the gallery and scored": in_gallery, "scored more than once": repeated}
    return [_line(items, what, of_kind) for what, of_kind in found.items() if of_kind]


def shared_captions(items: Items) -> list[str]:
    """A line that counts the captions that several scored images have, by language, where these are retrieved."""
    of_retrieval = [one for one in items.card.protocols if one.candidates == "images"]
    if not (items.num_images and any(one.required_fields == {"captions"} for one in of_retrieval)):
        return []
    tested, counts, first = items.tested_N.tolist(), dict[str, int](), ""
    for language, of_images in (items.captions or {}).items():
        images = Counter(text for texts, scored in zip(of_images, tested, strict=True) if scored for text in set(texts))
        shared = [text for text, count in images.items() if count > 1]
        if shared:
            counts[language] = len(shared)
            first = first or min(shared)
    if not counts:
        return []
    found = ", ".join(f"{language} {count:,}" for language, count in counts.items())
    return [f"captions that several images have, of which one counts as right: {found}; first {first!r}"]


def _line(items: Items, what: str, groups: list[list[int]]) -> str:
    first, second, *_ = groups[0]
    names = f"{items.keys[first]} and {items.keys[second]}"
    count = "1 image is" if len(groups) == 1 else f"{len(groups):,} images are"
    return f"{count} {what} (files with the same bytes), first {names}"


def _same_bytes(files: list[Path]) -> list[list[int]]:
    """Places of files with the same content, for each that several have. Few are read: those of one size first."""
    groups = [list(range(len(files)))]
    tests: list[Callable[[Path], object]] = [_size, _middle, _digest]
    for of_file in tests:
        groups = [same for group in groups for same in _split(files, group, of_file)]
    return groups


def _split(files: list[Path], group: list[int], of_file: Callable[[Path], object]) -> list[list[int]]:
    """Those of a group that have something in common; not those that are empty or cannot be read."""
    same: dict[object, list[int]] = defaultdict(list)
    for place in group:
        with suppress(OSError):  # said when it is scored
            if value := of_file(files[place]):
                same[value].append(place)
    return [places for places in same.values() if len(places) > 1]


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0  # none is read of a pipe


def _middle(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(file.stat().st_size // 2)
        return opened.read(_MIDDLE)


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()
