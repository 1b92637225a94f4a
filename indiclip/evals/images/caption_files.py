"""Images with captions in the files that retrieval benchmarks come in. Names only; no image is opened.

- COCO's captions: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`; objects may be among
  the annotations, and images may carry a list `captions` themselves, as in training.
- Karpathy's splits (`dataset_coco.json`, `dataset_flickr30k.json`): `{"images": [{"filename", "split", "sentences":
  [{"raw"}]}]}`, and `filepath` before the name where there is one. The split `test`.
- Crossmodal-3600's `captions.jsonl`: a line per image, `{"image/key": ..., "hi": {"caption": [...]}, ...}`. Keys with
  such a value are languages, whatever other words they are (`id` is Indonesian there).
"""

from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from indiclip.datasets.coco_file import check_all, join_captions, read_captions, read_images
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.languages import caption_language, language_tag
from indiclip.datasets.tables import check_files, column, decode_text, is_text, load_json, name_in, parse_json
from indiclip.images import is_image_name
from indiclip.names import shorten

# Where the images lie, below the folder of the file.
_FOLDERS = ("images", "val2017", "val2014", "train2017", "flickr30k-images", "flickr30k_images", "")
_SPLIT = "test"
_SURE = ("captions.jsonl", "dataset*.json", "captions*.json")  # files that are called so have captions
_ANY = ("instances*.json", "*.json")  # COCO's others may have some
_OBJECT = {"bbox", "category_id", "segmentation", "keypoints"}  # keys of annotations that are no captions


class Captioned(NamedTuple):
    """Images in the file's order."""

    folder: Path
    names: list[str]
    captions: dict[str, list[list[str]]]  # language -> of each image
    notes: list[str]


def find_caption_file(folder: Path, any_json: bool = False) -> Path | None:
    """The file of captions in a folder, or in `annotations` in it; None where there is none.

    Args:
        folder: The folder.
        any_json: Take a file whose name does not say that it has captions.

    Raises:
        ValueError: Several that could be meant.
    """
    for place in (folder, folder / "annotations"):
        files = sorted(file for file in place.glob("*") if file.name[0] != "." and file.is_file())
        for pattern in _ANY if any_json else _SURE:
            found = [file for file in files if fnmatchcase(file.name.lower(), pattern)]
            if len(found) > 1:
                names = ", ".join(file.name for file in found)
                raise ValueError(f"{place}: which file has the captions? Found {names}; expected one")
            if found:
                return found[0]
    return None


def read_caption_file(file: Path) -> Captioned:
    """The images and captions of a file; see the module.

    Raises:
        FileNotFoundError: Images are missing; says how many and names the first.
        ValueError: Another content, a duplicated image, or a name that leads out of the folder.
    """
    inventory = Inventory()
    if file.suffix.lower() == ".jsonl":
        names, captions = _crossmodal(file, inventory)
    else:
        content = load_json(file, ("images",))
        if "annotations" in content or any(isinstance(one, dict) and "captions" in one for one in content["images"]):
            names, captions = _coco(content, file, inventory)
        else:
            names, captions = _karpathy(content["images"], file)
    notes = [f"{file}: {line}" for line in inventory.lines() if "left out" in line]
    filled = [place for place in range(len(names)) if any(texts[place] for texts in captions.values())]
    if without := len(names) - len(filled):
        notes.append(f"{file}: {without} images without a caption")
    names = [names[place] for place in filled]
    twice = next((name for name, count in Counter(map(str, names)).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{file}: the image {twice!r} is duplicated; expected all its captions with one of them")
    captions = {language: [texts[place] for place in filled] for language, texts in captions.items()}
    if not names:
        raise ValueError(f"{file}: no images with captions")
    bases = (file.parent, *[file.parent.parent] * (file.parent.name == "annotations"))
    folders = (base / name for base in bases for name in _FOLDERS)
    folder = next((found for found in folders if _holds(found, names[0])), file.parent)
    check_files(folder, names, str(file))
    return Captioned(folder, names, captions, notes)


def _holds(folder: Path, name: Any) -> bool:
    return isinstance(name, str) and (folder / name).is_file()


def _coco(content: dict[str, Any], file: Path, inventory: Inventory) -> tuple[list[str], dict[str, list[list[str]]]]:
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
    of_images = [[*own, *(text for text in more if text not in own)] for own, more in zip(carried, joined, strict=True)]
    return images.names, {"en": [[_caption(text, str(file)) for text in of_image] for of_image in of_images]}


def _is_object(entry: Any) -> bool:
    return isinstance(entry, dict) and "caption" not in entry and not _OBJECT.isdisjoint(entry)


def _karpathy(images: list[Any], file: Path) -> tuple[list[str], dict[str, list[list[str]]]]:
    column(images, "split", f"{file}: image")
    chosen = [image for image in images if image["split"] == _SPLIT]
    if not chosen:
        found = sorted({str(image["split"]) for image in images})
        raise ValueError(f"{file}: no images of the split {_SPLIT!r}; found {found}")
    wheres = [f"{file}: image {number}" for number, image in enumerate(images, 1) if image["split"] == _SPLIT]
    names, sentences = (column(chosen, name, f"{file}: image") for name in ("filename", "sentences"))
    check_all(names, is_text, wheres, "filename", "text")
    check_all(sentences, lambda found: isinstance(found, list), wheres, "sentences", "a list")
    names = [
        name_in(file.parent, f"{image['filepath']}/{name}" if image.get("filepath") else name)
        for image, name in zip(chosen, names, strict=True)
    ]
    texts = [
        [_caption(text, f"{file}: {name}") for text in column(of_image, "raw", f"{file}: {name}: sentence")]
        for name, of_image in zip(names, sentences, strict=True)
    ]
    return names, {"en": texts}


def _crossmodal(file: Path, inventory: Inventory) -> tuple[list[str], dict[str, list[list[str]]]]:
    entries = []
    # Not splitlines: a caption may hold the line ends of Unicode as they are.
    for number, line in enumerate(decode_text(file.read_bytes(), str(file)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entries.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"{file}: line {number}: {error}") from error
    keys = column(entries, "image/key", f"{file}: line")
    check_all(keys, is_text, [f"{file}: image {number}" for number in range(1, len(keys) + 1)], "image/key", "text")
    captions, others = dict[str, list[list[str]]](), dict[str, None]()
    for place, (key, entry) in enumerate(zip(keys, entries, strict=True)):
        for name, found in entry.items():
            texts = found.get("caption") if isinstance(found, dict) else None
            if not isinstance(texts, list) and caption_language(name):
                raise ValueError(f'{file}: {key}: {name}: found {shorten(found)}; expected {{"caption": [...]}}')
            if not isinstance(texts, list) or not (language := language_tag(name)):
                others[name] = None
                continue
            of_language = captions.setdefault(language, [[] for _ in entries])
            of_language[place] += [_caption(text, f"{file}: {key}: {name}") for text in texts]
    unused = [name for name in others if not name.startswith("image/")]  # those are of the format
    inventory.present["keys"], inventory.used["keys"] = len(captions) + len(unused), len(captions)
    inventory.leave_out("keys", "not used", ", ".join(unused), len(unused))
    return [name_in(file.parent, key if is_image_name(key) else f"{key}.jpg") for key in keys], captions


def _caption(text: Any, where: str) -> str:
    if not is_text(text):
        raise ValueError(f"{where}: the caption is {shorten(text)}; expected text")
    return " ".join(str(text).split())
