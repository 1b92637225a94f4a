"""Images with captions in the files that retrieval benchmarks come in. Names only; no image is opened.

- COCO's captions: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.
- Karpathy's splits (`dataset_coco.json`, `dataset_flickr30k.json`): `{"images": [{"filename", "split", "sentences":
  [{"raw"}]}]}`, and `filepath` before the name where there is one. The split `test`.
- Crossmodal-3600's `captions.jsonl`: a line per image, `{"image/key": ..., "hi": {"caption": [...]}, ...}`.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from indiclip.datasets.coco_file import join_captions, read_images
from indiclip.datasets.inventory import Inventory
from indiclip.datasets.languages import language_tag
from indiclip.datasets.tables import check_files, column, decode_text, is_text, load_json, parse_json
from indiclip.names import shorten

# Where the images lie, below the folder of the file.
_FOLDERS = ("images", "val2017", "val2014", "train2017", "flickr30k-images", "flickr30k_images", "")
_SPLIT = "test"


class Captioned(NamedTuple):
    """Images in the file's order."""

    folder: Path
    names: list[str]
    captions: dict[str, list[list[str]]]  # language -> of each image
    notes: list[str]


def find_caption_file(folder: Path) -> Path | None:
    """The file of captions in a folder; None where there is none.

    Raises:
        ValueError: Several that could be meant.
    """
    for pattern in ("captions.jsonl", "dataset*.json", "captions*.json"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{folder}: which file has the captions? Found {names}; expected one")
        if found:
            return found[0]
    return None


def read_caption_file(file: Path) -> Captioned:
    """The images and captions of a file; see the module.

    Raises:
        FileNotFoundError: Images are missing; says how many and names the first.
        ValueError: Another content, a duplicated image, or a name that leads out of the folder.
    """
    if file.suffix == ".jsonl":
        names, captions = _crossmodal(file)
    else:
        content = load_json(file, ("images",))
        if "annotations" in content:
            names, captions = _coco(content, file)
        else:
            names, captions = _karpathy(content["images"], file)
    filled = [place for place in range(len(names)) if any(texts[place] for texts in captions.values())]
    notes = [] if len(filled) == len(names) else [f"{file}: {len(names) - len(filled)} images without a caption"]
    names = [names[place] for place in filled]
    twice = next((name for name, count in Counter(map(str, names)).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{file}: the image {twice!r} is duplicated; expected all its captions with one of them")
    captions = {language: [texts[place] for place in filled] for language, texts in captions.items()}
    if not names:
        raise ValueError(f"{file}: no images with captions")
    folder = next((found for name in _FOLDERS if _holds(found := file.parent / name, names[0])), file.parent)
    check_files(folder, names, str(file))
    return Captioned(folder, names, captions, notes)


def _holds(folder: Path, name: Any) -> bool:
    return isinstance(name, str) and (folder / name).is_file()


def _coco(content: dict[str, Any], file: Path) -> tuple[list[str], dict[str, list[list[str]]]]:
    if not isinstance(content["annotations"], list):
        raise ValueError(f"{file}: annotations is {shorten(content['annotations'])}; expected a list")
    images, inventory = read_images(content["images"], file, file.parent), Inventory()
    texts = join_captions(content["annotations"], images, file, inventory)
    for _, reason, count, example in inventory.left_out():
        raise ValueError(f"{count:,} captions {reason}, first {example}; expected their images in the file")
    return images.names, {"en": [[_caption(text, str(file)) for text in of_image] for of_image in texts]}


def _karpathy(images: list[Any], file: Path) -> tuple[list[str], dict[str, list[list[str]]]]:
    column(images, "split", f"{file}: image")
    chosen = [image for image in images if image["split"] == _SPLIT]
    if not chosen:
        found = sorted({str(image["split"]) for image in images})
        raise ValueError(f"{file}: no images of the split {_SPLIT!r}; found {found}")
    names, sentences = (column(chosen, name, f"{file}: image") for name in ("filename", "sentences"))
    names = [
        f"{image['filepath']}/{name}" if image.get("filepath") else name
        for image, name in zip(chosen, names, strict=True)
    ]
    texts = [
        [_caption(text, f"{file}: {name}") for text in column(of_image, "raw", f"{file}: {name}: sentence")]
        for name, of_image in zip(names, sentences, strict=True)
    ]
    return names, {"en": texts}


def _crossmodal(file: Path) -> tuple[list[str], dict[str, list[list[str]]]]:
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
    tags = {name: language_tag(name) for name in sorted({name for entry in entries for name in entry})}
    captions: dict[str, list[list[str]]] = {tag: [[] for _ in entries] for tag in tags.values() if tag}
    for place, (key, entry) in enumerate(zip(keys, entries, strict=True)):
        for name, found in entry.items():
            if not tags[name]:
                continue
            if not isinstance(found, dict) or not isinstance(found.get("caption"), list):
                raise ValueError(f'{file}: {key}: {name}: found {shorten(found)}; expected {{"caption": [...]}}')
            captions[tags[name]][place] += [_caption(text, f"{file}: {key}: {name}") for text in found["caption"]]
    return [f"{key}.jpg" for key in keys], captions


def _caption(text: Any, where: str) -> str:
    if not is_text(text):
        raise ValueError(f"{where}: the caption is {shorten(text)}; expected text")
    return " ".join(str(text).split())
