"""From a folder, file or name to an external model: all local, nothing unpickled but tensors, nothing left random."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from indiclip.evals.models.external_models import ExternalModel, OpenClip, Options, Timm, Transformers
from indiclip.evals.models.processors import check_processor
from indiclip.names import check_choice, did_you_mean, reason_of
from indiclip.pretrained.build import offline
from indiclip.pretrained.hub import HUB
from indiclip.pretrained.model_names import check_sentence_transformers, read_config
from indiclip.pretrained.open_clip_source import (
    LOCAL,
    check_file,
    check_open_clip_folder,
    import_open_clip,
    published_pixels,
    published_tag,
    vision_cfg_of,
)
from indiclip.pretrained.transformers_files import weights_file
from indiclip.pretrained.transformers_models import MODEL_TYPES
from indiclip.quiet import quiet_transformers
from indiclip.tokenizer_sources import check_tokenizer


def load_open_clip(what: str, name: str, options: Options) -> ExternalModel:
    """An architecture with random weights or those of a file; a folder; or what is on the hub.

    Args:
        what: `ViT-B-32`, `ViT-B-32:FILE`, `ViT-B-32:hf-hub:TAG`, a folder, or `hf-hub:NAME`.
        name: As the user wrote it, for messages and tables.
        options: Where and how it computes.
    """
    open_clip = import_open_clip(name)
    source, weights = _source(what, name, "OpenCLIP", open_clip.list_models())
    title = name
    arguments: dict[str, Any] = {"require_pretrained": True}  # by itself it goes on with random weights
    if source.startswith(LOCAL):
        arguments["vision_cfg"] = vision_cfg_of(Path(what), check_open_clip_folder(Path(what)))
    elif tag := published_tag(source, weights, name):
        arguments["pretrained"] = tag
    elif not source.startswith(HUB):
        arguments = _open_clip_weights(source, weights, name)
        title = name if weights else _random(name)
    download = HUB in what
    with _loading(name, "OpenCLIP", download, [] if download else _hub_parts(source)):
        model, _, transform = open_clip.create_model_and_transforms(source, pretrained_text=False, **arguments)
        tokenizer = open_clip.get_tokenizer(source)
    return OpenClip(title, model, transform, tokenizer, options)


def _hub_parts(source: str) -> list[str]:
    """Names of what OpenCLIP has transformers fetch: the text tower's configuration, and the tokenizer unless local."""
    text = import_open_clip(source).get_model_config(source)["text_cfg"]
    fields = ("hf_model_name",) if source.startswith(LOCAL) else ("hf_tokenizer_name", "hf_model_name")
    return sorted({text[field] for field in fields if text.get(field)})


def _open_clip_weights(architecture: str, weights: str, name: str) -> dict[str, Any]:
    """Arguments of `create_model_and_transforms` for an architecture, with a file of weights or none."""
    pixels = published_pixels(architecture)
    arguments = {f"image_{field}": value for field, value in (pixels or {}).items()}
    if not weights:
        return arguments
    check_file(Path(weights), name)
    if pixels is None:
        warnings.warn(
            f"{name}: published weights of {architecture} differ in their preprocessing, and this takes CLIP's; "
            "a folder with open_clip_config.json says which is right",
            stacklevel=4,
        )
    return arguments | {"pretrained": str(Path(weights).resolve()), "require_pretrained": True}


def load_transformers(what: str, name: str, options: Options) -> ExternalModel:
    """A folder as transformers saves one, or `hf-hub:NAME`; for the arguments see `load_open_clip`."""
    import transformers

    download, source = what.startswith(HUB), what.removeprefix(HUB)
    if not download:
        _check_transformers_folder(Path(source), name)
    with _loading(name, "transformers", download), quiet_transformers():
        model, report = transformers.AutoModel.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        reader: Any = transformers.AutoProcessor
        processor = reader.from_pretrained(source, trust_remote_code=False)
    check_choice(f"{name}: model_type", model.config.model_type, MODEL_TYPES)
    absent = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if absent:
        raise ValueError(f"{name}: the weights lack {len(absent)} of the model's tensors, such as {absent[0]}")
    check_processor(name, model.config, processor)
    return Transformers(name, model, processor.image_processor, processor.tokenizer, options)


def _check_transformers_folder(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no such folder; transformers:{HUB}{folder} downloads it")
    check_sentence_transformers(folder)
    config = read_config(folder / "config.json")
    check_choice(f"{folder / 'config.json'}: model_type", config.get("model_type"), MODEL_TYPES)
    weights_file(folder)
    if not any((folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
        raise FileNotFoundError(f"{folder}: found no image processor; expected preprocessor_config.json")
    check_tokenizer(folder)


def load_timm(what: str, name: str, options: Options) -> ExternalModel:
    """`NAME`, `NAME:FILE`, a folder, or `hf-hub:NAME`; for the arguments see `load_open_clip`."""
    architecture = what.partition(":")[0]  # with a tag or not
    source, weights = _source(what, name, "timm", [architecture] if timm.is_model(architecture) else timm.list_models())
    if weights:
        check_file(Path(weights), name)
    elif source == architecture:
        name = _random(name)
    with _loading(name, "timm", download=what.startswith(HUB)):
        arguments = _timm_weights(architecture, weights) if weights else {"pretrained": source != architecture}
        model: Any = timm.create_model(source, **arguments)
    model.pretrained_cfg.pop("state_dict", None)  # a second copy
    model.reset_classifier(0)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)  # type: ignore[no-untyped-call]
    return Timm(name, model, transform, None, options)


def _timm_weights(architecture: str, file: str) -> dict[str, Any]:
    """Arguments for a model with the file's own classifier, if any: only then does timm insist on every tensor."""
    tensors = timm.models.load_state_dict(file, weights_only=True)
    config = timm.get_pretrained_cfg(architecture)
    classifier = config.classifier if config else None
    first = classifier if isinstance(classifier, str) else (classifier or [""])[0]
    num_classes = len(tensors.get(f"{first}.weight", ()))
    overlay = {"state_dict": tensors, "num_classes": num_classes, "label_offset": 0}
    return {"pretrained": True, "num_classes": num_classes, "pretrained_cfg_overlay": overlay}


def _random(name: str) -> str:
    """Warn of weights that nobody named. Returns what to call the model, so that no table hides it."""
    warnings.warn(f"{name}: no weights were named; they are random", stacklevel=4)
    return f"{name} (random weights)"


def _source(what: str, name: str, library: str, architectures: Sequence[str]) -> tuple[str, str]:
    """By what name OpenCLIP and timm load it (`hf-hub:NAME`, `local-dir:FOLDER`, an architecture), and its weights."""
    if what.startswith(HUB):
        return what, ""
    if Path(what).is_dir():
        if what in architectures:
            prefix = name.removesuffix(what)
            raise ValueError(f"{name}: is a folder here and an architecture; expected {prefix}./{what} or {name}:")
        return f"{LOCAL}{what}", ""
    architecture, _, weights = what.partition(":")
    if architecture not in architectures:
        raise ValueError(f"{name}: {library} has no {architecture!r}{did_you_mean(architecture, architectures)}")
    return architecture, weights


@contextmanager
def _loading(name: str, library: str, download: bool = False, hub_parts: Sequence[str] = ()) -> Iterator[None]:
    """Say in one line what a library cannot load, keep it from the network, and from logging what we check.

    OpenCLIP lets transformers ask the user whether to run code that comes with a model; without the seconds to answer
    in, transformers refuses.
    """
    from transformers import dynamic_module_utils

    disabled, seconds = logging.root.manager.disable, dynamic_module_utils.TIME_OUT_REMOTE_CODE
    logging.disable(logging.WARNING)
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        with offline(not download):
            yield
    except Exception as error:  # they raise anything: RuntimeError, OSError, UnpicklingError, KeyError
        reason = f"{type(error).__name__}: {reason_of(error)}"
        if hub_parts and isinstance(error, OSError):
            reason = f"it needs {' and '.join(hub_parts)} of the hub, not in the local cache; only hf-hub: downloads"
        raise ValueError(f"{name}: {library} cannot load it ({reason})") from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds
        logging.disable(disabled)


LOADERS = {"open_clip": load_open_clip, "transformers": load_transformers, "timm": load_timm}
