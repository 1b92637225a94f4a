"""Lines about images and captions that occur more than once. An image that lies in two classes counts as missed in one
of them; the label of one that is also in the gallery is known; captions of several images are taken for each other's.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import compress
from pathlib import Path

from indiclip.evals.images.items import FileImages, Items
from indiclip.images import read_file

_MIDDLE = 1024  # bytes from a file's middle, which differ where files do; heads of JPEGs are often alike


def duplicates(items: Items) -> list[str]:
    """Lines that count the image files of which there are copies.

    Nothing is said of images in shards and in tables themselves, all of which would have to be read for it.
    """
    if not (isinstance(items.images, FileImages) and items.num_images):
        return []
    tested, label = items.tested_N.tolist(), items.labels.tolist()
    other_class, in_gallery, repeated = list[list[int]](), list[list[int]](), list[list[int]]()
    for group in _same_bytes([items.images.path(place) for place in range(len(items))]):
        in_class: dict[int, list[int]] = defaultdict(list)
        for place in group:
            in_class[label[place]].append(place)
        scored = [[place for place in places if tested[place]] for places in in_class.values()]
        if len(in_class) > 1:
            other_class.append([places[0] for places in in_class.values()])
        elif 0 < len(scored[0]) < len(group):
            in_gallery.append(group)
        repeated += [places for places in scored if len(places) > 1]

    lines = []
    found = {"in two classes": other_class, "in the gallery and scored": in_gallery, "scored more than once": repeated}
    for what, groups in found.items():
        if groups:
            first, second, *_ = (items.keys[place] for place in groups[0])
            count = "1 image is" if len(groups) == 1 else f"{len(groups):,} images are"
            lines.append(f"{count} {what} (files with the same bytes), first {first} and {second}")
    return lines


def shared_captions(items: Items) -> list[str]:
    """A line that counts the captions that several scored images have, by language, where these are retrieved."""
    of_retrieval = [one for one in items.card.protocols if one.candidates == "images"]
    if not (items.num_images and any(one.required_fields == {"captions"} for one in of_retrieval)):
        return []
    shared: dict[str, list[str]] = {}
    for language, of_images in items.captions.items():
        counts = Counter(text for texts in compress(of_images, items.tested_N) for text in set(texts))
        if several := sorted(text for text, count in counts.items() if count > 1):
            shared[language] = several
    if not shared:
        return []
    found = ", ".join(f"{language} {len(texts):,}" for language, texts in shared.items())
    first = next(iter(shared.values()))[0]
    return [f"captions that several images have, of which one counts as right: {found}; first {first!r}"]


def _same_bytes(files: list[Path]) -> list[list[int]]:
    """Places of files with the same content, for each that several have, but not of empty or unreadable ones.

    Few are read as a whole: those of one size and with the same bytes in the middle.
    """
    groups = [list(range(len(files)))]
    tests: list[Callable[[Path], object]] = [_size, _middle, _digest]
    for of_file in tests:
        found = []
        for group in groups:
            same: dict[object, list[int]] = defaultdict(list)
            for place in group:
                with suppress(OSError):  # said when it is scored
                    same[of_file(files[place])].append(place)
            found += [places for value, places in same.items() if value and len(places) > 1]
        groups = found
    return groups


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0  # none is read of a pipe


def _middle(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(file.stat().st_size // 2)
        return opened.read(_MIDDLE)


def _digest(file: Path) -> bytes:
    return hashlib.sha256(read_file(file)).digest()
