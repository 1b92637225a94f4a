"""Images with captions in the files that retrieval benchmarks come in. Names only; no image is opened.

- COCO's captions: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`; objects may be among
  the annotations, and images may carry a list `captions` themselves, as in training.
- Karpathy's splits (`dataset_coco.json`, `dataset_flickr30k.json`): `{"images": [{"filename", "split", "sentences":
  [{"raw"}]}]}`, and `filepath` before the name where there is one. The split `test`.
- Crossmodal-3600's `captions.jsonl`: a line per image, `{"image/key": ..., "hi": {"caption": [...]}, ...}`. Keys with
  such a value are languages, whatever other words they are (`id` is Indonesian there).
"""

from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from indiclip.datasets.coco_file import check_all, join_captions, read_captions, read_images
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.languages import caption_language, language_tag
from indiclip.datasets.tables import column, decode_text, is_text, load_json, name_in, parse_json
from indiclip.images import is_image_name
from indiclip.names import shorten

_SPLIT = "test"
_SURE = ("captions.jsonl", "dataset*.json", "captions*.json")  # files that are called so have captions
_ANY = ("instances*.json", "*.json")  # COCO's others may have some
_OBJECT = {"bbox", "category_id", "segmentation", "keypoints"}  # keys of annotations that are no captions

Captions = dict[str, list[str]]  # of an image, by language


class Captioned(NamedTuple):
    """Images in the file's order."""

    names: list[str]
    captions: list[Captions]  # of each image; none is empty
    notes: list[str]


def find_caption_file(folder: Path, any_json: bool = False) -> Path | None:
    """The file of captions in a folder, or in `annotations` in it; None where there is none.

    Args:
        folder: The folder.
        any_json: Where no file's name says that it has captions, take another.

    Raises:
        ValueError: Several that could be meant.
    """
    patterns = (*_SURE, *_ANY) if any_json else _SURE
    listed = [sorted(place.glob("[!.]*")) for place in (folder, folder / "annotations")]
    for pattern, files in product(patterns, listed):
        found = [file for file in files if fnmatchcase(file.name.lower(), pattern) and file.is_file()]
        if len(found) > 1:
            names = ", ".join(str(file.relative_to(folder)) for file in found)
            raise ValueError(f"{folder}: which file has the captions? Found {names}; expected one")
        if found:
            return found[0]
    return None


def read_caption_file(file: Path) -> Captioned:
    """The images and captions of a file; see the module. Whether the images are there is not looked at.

    Raises:
        ValueError: Another content, or a duplicated image.
    """
    inventory = Inventory()
    if file.suffix.lower() == ".jsonl":
        found = list(_crossmodal(file, inventory))
    else:
        content = load_json(file, ("images",))
        has_captions = any(isinstance(one, dict) and "captions" in one for one in content["images"])
        is_coco = has_captions or "annotations" in content
        found = list(_coco(content, file, inventory) if is_coco else _karpathy(content["images"], file))
    notes = inventory.left_out_lines(str(file))
    captioned = [(name, captions) for name, captions in found if any(captions.values())]
    if not captioned:
        raise ValueError(f"{file}: no images with captions")
    if without := len(found) - len(captioned):
        notes.append(f"{file}: {without} images without a caption")
    names, captions = map(list, zip(*captioned, strict=True))
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{file}: the image {name!r} is duplicated; expected all its captions with one of them")
    return Captioned(names, captions, notes)


def _coco(content: dict[str, Any], file: Path, inventory: Inventory) -> Iterator[tuple[str, Captions]]:
    entries = content.get("annotations", [])
    if not isinstance(entries, list):
        raise ValueError(f"{file}: annotations is {shorten(entries)}; expected a list")
    captions = [entry for entry in entries if not _is_object(entry)]
    inventory.present["annotations"], inventory.used["annotations"] = len(entries), len(captions)
    inventory.leave_out("annotations", "objects", str(file.name), len(entries) - len(captions))
    images, counts = read_images(content["images"], file, file.parent), Inventory()
    carried, joined = read_captions(images, None, counts), join_captions(captions, images, file, counts)
    for _, reason, count, example in counts.left_out():
        raise ValueError(f"{count:,} captions {reason}, first {example}; expected their images in the file")
    for name, own, more in zip(images.names, carried, joined, strict=True):
        yield name, {"en": own + [text for text in more if text not in own]}


def _is_object(entry: Any) -> bool:
    return isinstance(entry, dict) and "caption" not in entry and not _OBJECT.isdisjoint(entry)


def _karpathy(images: list[Any], file: Path) -> Iterator[tuple[str, Captions]]:
    splits = column(images, "split", f"{file}: image")
    if _SPLIT not in splits:
        found = sorted(set(map(str, splits)))
        raise ValueError(f"{file}: no images of the split {_SPLIT!r}; found {found}")
    for number, image in enumerate(images, 1):
        if image["split"] != _SPLIT:
            continue
        where = f"{file}: image {number}"
        name, sentences = image.get("filename"), image.get("sentences")
        check_all([name], is_text, [where], "filename", "text")
        check_all([sentences], lambda found: isinstance(found, list), [where], "sentences", "a list")
        path = f"{image['filepath']}/{name}" if image.get("filepath") else name
        texts = column(sentences, "raw", f"{where}: sentence")
        check_all(texts, is_text, [where] * len(texts), "the caption", "text")
        yield name_in(file.parent, path), {"en": texts}


def _crossmodal(file: Path, inventory: Inventory) -> Iterator[tuple[str, Captions]]:
    used, unused = dict[str, None](), dict[str, None]()
    # Not splitlines: a caption may hold the line ends of Unicode as they are.
    for number, line in enumerate(decode_text(file.read_bytes(), str(file)).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        key: Any = entry.get("image/key") if isinstance(entry, dict) else None
        check_all([key], is_text, [where], "image/key", "text")
        captions: Captions = {}
        for name, found in entry.items():
            texts = found.get("caption") if isinstance(found, dict) else None
            if not isinstance(texts, list) and caption_language(name):
                raise ValueError(f'{where}: {name}: found {shorten(found)}; expected {{"caption": [...]}}')
            if isinstance(texts, list) and (language := language_tag(name)):
                check_all(texts, is_text, [f"{where}: {name}"] * len(texts), "the caption", "text")
                captions.setdefault(language, []).extend(texts)
                used[name] = None
            elif not name.startswith("image/"):  # which are of the format
                unused[name] = None
        yield name_in(file.parent, key if is_image_name(key) else f"{key}.jpg"), captions
    inventory.present["keys"], inventory.used["keys"] = len(used) + len(unused), len(used)
    inventory.leave_out("keys", "not used", ", ".join(unused), len(unused))
