"""Which files an OpenCLIP model is made of, and what its configuration says."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from indiclip.names import did_you_mean, nearest_beside
from indiclip.pretrained.hub import HUB, hub_folder
from indiclip.pretrained.model_names import read_config
from indiclip.tokenizer_sources import check_tokenizer

LOCAL = "local-dir:"  # before a folder, in the names that OpenCLIP and timm take
PIXELS = ("mean", "std", "interpolation", "resize_mode")
_CLIP = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
}
_FILES: tuple[str, ...] = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_FILES += ("model.safetensors", "pytorch_model.bin")
_HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


class OpenClipSource(NamedTuple):
    """An OpenCLIP model on disk.

    Args:
        origin: As the user wrote it.
        model: Its `model_cfg`.
        pixels: `mean`, `std` and `interpolation` of its images.
        file: Its weights.
        folder: With its tokenizer, where it is a folder.
        notes: What was assumed, in words.
    """

    origin: str
    model: dict[str, Any]
    pixels: dict[str, Any]
    file: Path
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def find_open_clip(what: str) -> OpenClipSource:
    """A folder, `hf-hub:OWNER/NAME`, `ARCHITECTURE:FILE` or `ARCHITECTURE:hf-hub:TAG`; see `OpenClipSource`.

    Raises:
        FileNotFoundError: No such file, or no network where one is asked for.
        ValueError: No such architecture, tag, or no weights.
    """
    if what.startswith(HUB):
        origin = f"open_clip:{what}"
        return _of_folder(hub_folder(what.removeprefix(HUB), origin, _HUB_FILES), origin)
    if Path(what).is_dir():
        return _of_folder(Path(what), what)
    origin = f"open_clip:{what}"
    library = import_open_clip(origin)
    name, _, weights = what.partition(":")
    if name not in library.list_models():
        raise ValueError(f"{origin}: OpenCLIP has no {name!r}{did_you_mean(name, library.list_models())}")
    model = library.get_model_config(name)
    if not weights:
        tags = library.list_pretrained_tags_by_model(name)
        tagged = f" or {origin}:{HUB}{tags[0]}" if tags else ""
        raise ValueError(f"{origin}: names no weights; expected {origin}:FILE{tagged}")
    tag = published_tag(name, weights, origin)
    if tag:
        return _published(name, tag, origin, model)
    check_file(Path(weights), origin)
    pixels = published_pixels(name)
    note = () if pixels else (f"mean and std of its pixels are CLIP's: no published {name} says one that all share",)
    return OpenClipSource(origin, model, _CLIP | (pixels or {}), Path(weights), None, note)


def import_open_clip(origin: str) -> Any:
    """The library. Raises ValueError where it is missing."""
    if not importlib.util.find_spec("open_clip"):
        raise ValueError(f"{origin}: needs OpenCLIP: pip install open_clip_torch")
    import open_clip

    return open_clip


def check_open_clip_folder(folder: Path) -> dict[str, Any]:
    """What `open_clip_config.json` says.

    Raises:
        FileNotFoundError: It, the weights or the tokenizer that it names are missing.
        ValueError: It is no configuration of a dual encoder.
    """
    file = folder / "open_clip_config.json"
    config = read_config(file)
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not all(isinstance(model.get(key), dict) for key in ("vision_cfg", "text_cfg")):
        raise ValueError(f"{file}: expected `model_cfg` with `vision_cfg` and `text_cfg`")
    if not any(file.suffix in (".safetensors", ".bin", ".pth") for file in folder.iterdir()):
        raise FileNotFoundError(f"{folder}: found no weights; expected open_clip_model.safetensors")
    if model["text_cfg"].get("hf_tokenizer_name"):
        check_tokenizer(folder)
    return config


def vision_cfg_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The folder's `vision_cfg`; timm's description of a tower without a name is taken from the folder itself.

    OpenCLIP finds such a description by an absolute path, which is wrong as soon as the folder was moved.
    """
    vision: dict[str, Any] = config["model_cfg"]["vision_cfg"]
    name = vision.get("timm_model_name") or ""
    if not name.startswith(LOCAL):
        return vision
    return vision | {"timm_model_name": f"{LOCAL}{folder.resolve() / Path(name.removeprefix(LOCAL)).name}"}


def check_file(file: Path, origin: str) -> None:
    """Raise FileNotFoundError, with the nearest name, where there is no such file of weights."""
    if not file.is_file():
        raise FileNotFoundError(f"{origin}: no such file of weights{nearest_beside(file)}")


def published_tag(architecture: str, weights: str, origin: str) -> str:
    """The tag behind `hf-hub:`, or nothing where `weights` is a file. Raises ValueError for one that is unknown."""
    library = import_open_clip(origin)
    tags = library.list_pretrained_tags_by_model(architecture)
    tag = weights.removeprefix(HUB)
    if weights.startswith(HUB) and tag not in tags:
        raise ValueError(f"{origin}: OpenCLIP has no weights {tag!r} of {architecture}{did_you_mean(tag, tags)}")
    if not weights.startswith(HUB) and weights in tags and not Path(weights).is_file():
        raise ValueError(f"{origin}: {weights} is on the hub; {origin.replace(weights, HUB + weights)} downloads it")
    return tag if weights.startswith(HUB) else ""


def published_pixels(architecture: str) -> dict[str, Any] | None:
    """What published weights of an architecture say of `PIXELS`; None where they differ, nothing where there are none.

    OpenCLIP keeps the preprocessing of its published weights with their tags, and for a file falls back to CLIP's.
    """
    library = import_open_clip(architecture)
    tags = library.list_pretrained_tags_by_model(architecture)
    configs = [library.get_pretrained_cfg(architecture, tag) for tag in tags]
    distinct = {tuple(config.get(field) for field in PIXELS) for config in configs}
    if len(distinct) > 1:
        return None
    return {field: value for found in distinct for field, value in zip(PIXELS, found, strict=True) if value is not None}


def _published(name: str, tag: str, origin: str, model: dict[str, Any]) -> OpenClipSource:
    library = import_open_clip(origin)
    config = library.get_pretrained_cfg(name, tag)
    if config.get("quick_gelu", False) != model.get("quick_gelu", False):
        other = f"{name}-quickgelu" if config.get("quick_gelu") else name.removesuffix("-quickgelu")
        raise ValueError(f"{origin}: {tag} has another activation than {name}; expected open_clip:{other}:{HUB}{tag}")
    try:
        file = Path(library.download_pretrained(config))
    except (OSError, RuntimeError, ValueError) as error:
        where = config.get("hf_hub") or config.get("url")
        raise FileNotFoundError(
            f"{origin}: cannot download it ({type(error).__name__}); where there is a network, fetch its weights from "
            f"{where}, bring that file here and name open_clip:{name}:FILE"
        ) from error
    return OpenClipSource(origin, model, _CLIP | _said(config), file)


def _of_folder(folder: Path, origin: str) -> OpenClipSource:
    config = check_open_clip_folder(folder)
    named = [folder / name for name in _FILES if (folder / name).is_file()]
    others = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))
    if not named and len(others) > 1:
        found = ", ".join(file.name for file in others)
        raise ValueError(f"{folder}: found {found}; expected one file of weights, or open_clip_model.safetensors")
    pixels = _CLIP | _said(config.get("preprocess_cfg") or {})
    return OpenClipSource(origin, config["model_cfg"], pixels, (named or others)[0], folder)


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    return {field: config[field] for field in PIXELS if config.get(field) is not None}
