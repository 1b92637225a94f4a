"""Image models of timm: names, files, and folders as `timm.models.push_to_hf_hub` and `save_for_hf` write them."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import timm.models
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import adapt_input_conv
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from indiclip.backbone import Backbone, NaFlexViT
from indiclip.pretrained.build import check_options
from indiclip.pretrained.model_names import read_config
from indiclip.pretrained.weights import Weights, read_tensors, state_dict
from indiclip.text import describe
from indiclip.timm_backbone import TimmBackbone, at_canvas
from indiclip.timm_errors import check_timm_name

_FILES = ("model.safetensors", "pytorch_model.bin")
_PIXELS = ("mean", "std", "interpolation")
_NOT_OURS = ("num_classes", "in_chans", "use_naflex")  # options that are ours to choose
_EMBEDDINGS = ("patch_embed.", "pos_embed", "cls_token", "reg_token")


def read_timm(what: str) -> Weights:
    """`NAME`, `NAME:FILE` or a folder; see `indiclip.pretrained.read.read_weights`.

    Raises:
        FileNotFoundError: No such file; without a network, a name whose weights were not downloaded before.
    """
    folder = Path(what)
    options: dict[str, Any] = {}
    overlay: dict[str, Any] = {}
    if folder.is_dir():
        config = read_config(folder / "config.json")
        name = str(config.get("architecture"))
        check_timm_name(name, f"{folder / 'config.json'}: architecture")
        options, overlay = config.get("model_args") or {}, dict(config.get("pretrained_cfg") or config)
        file = next((folder / name for name in _FILES if (folder / name).is_file()), folder / _FILES[0])
    else:
        name, _, path = what.partition(":")
        check_timm_name(name, f"timm:{what}")
        file = Path(path) if path else _downloaded(name)
    return image_tower(f"timm:{what}", name, _read(file), options, overlay)


def image_tower(
    origin: str, name: str, tensors: dict[str, Tensor], options: dict[str, Any], overlay: dict[str, Any]
) -> Weights:
    """A timm model's weights as a backbone that pools by itself: a NaFlexViT, else a TimmBackbone.

    Args:
        origin: For messages.
        name: The architecture.
        tensors: By timm's names.
        options: Arguments of the architecture.
        overlay: What differs from its `pretrained_cfg`: `mean`, `std`, ...
    """
    is_naflex = bool(options.get("use_naflex"))
    options = {key: value for key, value in options.items() if key not in _NOT_OURS}
    check_options(options, origin)
    pixels = {key: overlay[key] for key in _PIXELS if key in overlay}
    for key in ("mean", "std"):
        if len(pixels.get(key) or ()) == 1:  # of a model of grey images
            pixels[key] = [*pixels[key]] * 3
    with torch.device("meta"):
        naflex = _naflex(name, options, pixels)
        if is_naflex and naflex is not None:
            classifying = _with_classifier(name, options | {"use_naflex": True})
            converted, ignored, notes = _by_own_names(naflex.vit, tensors, classifying)
            return _tower(origin, naflex, "backbone.vit.", converted, ignored, notes)
        canvas = _canvas(name, options, overlay)
        net = at_canvas(name, canvas["canvas_hw"], False, options)
        classifying = _with_classifier(name, options)
    converted, ignored, notes = _by_own_names(net, tensors, classifying)
    if naflex is not None:
        moved = _naflex_names(net, converted)
        own, table = naflex.vit.embeds.pos_embed, moved.get("embeds.pos_embed")
        if own is not None and table is not None and table.shape != own.shape:
            with torch.device("meta"):
                naflex = NaFlexViT(name=name, options=options | {"pos_embed_grid_size": [*table.shape[1:3]]}, **pixels)
        if moved.keys() == naflex.vit.state_dict().keys():
            if any(side % naflex.patch_size for side in canvas["canvas_hw"]):
                notes.append(f"images are resized to whole patches of {naflex.patch_size} pixels, which timm cuts off")
            return _tower(origin, naflex, "backbone.vit.", moved, ignored, notes)
    with torch.device("meta"):
        fixed = TimmBackbone(name, **canvas, options=options, **pixels)
        fixed.eval().check_pool()  # batch norm in training wants more than one value
    return _tower(origin, fixed, "backbone.net.", converted, ignored, notes)


def _tower(
    origin: str, backbone: Backbone, prefix: str, tensors: dict[str, Tensor], ignored: list[str], notes: list[str]
) -> Weights:
    kept = {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
    return Weights(origin, {"backbone": describe(backbone), "pool": "tower"}, kept, ignored=ignored, notes=notes)


def _canvas(name: str, options: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Size of a model's images, and of the patches in which they travel: the largest of up to 16 pixels that fits."""
    config = timm.get_pretrained_cfg(name)
    size = options.get("img_size") or overlay.get("input_size") or (config.input_size if config else (3, 224, 224))
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    patch_size = next(side for side in range(16, 0, -1) if height % side == 0 and width % side == 0)
    return {"canvas_hw": (height, width), "patch_size": patch_size}


def _naflex(name: str, options: dict[str, Any], pixels: dict[str, Any]) -> NaFlexViT | None:
    """None where the architecture is no plain ViT."""
    try:
        return NaFlexViT(name=name, options=options, **pixels)
    except ValueError:
        return None


def _with_classifier(name: str, options: dict[str, Any]) -> set[str]:
    """Names of the architecture's tensors with its classifier; none where it is never one."""
    try:
        return set(timm.create_model(name, num_classes=1, **options).state_dict())
    except NotImplementedError:
        return set()


def _by_own_names(
    net: Any, tensors: dict[str, Tensor], classifying: Iterable[str]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors as this model has them, which were left out, and what was converted, in words.

    Args:
        net: Without classifier.
        tensors: By timm's names, in whatever shapes.
        classifying: Names of tensors of the model with its classifier.
    """
    found = dict(tensors)
    if (convert := getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)) is not None:
        found = dict(convert(found, net))
    notes = []
    own = net.state_dict()
    stems = [f"{name}.weight" for name in _several(net.pretrained_cfg.get("first_conv"))]
    for name in stems:
        kernel, target = found.get(name), own.get(name)
        if kernel is not None and target is not None and kernel.ndim == 4 and kernel.shape[1] != target.shape[1]:
            found[name] = adapt_input_conv(target.shape[1], kernel, base_chans=kernel.shape[1])
            notes.append(f"{name} converted from {kernel.shape[1]} to {target.shape[1]} channels")
    for name, tensor in tensors.items():
        if name in found and name not in stems and tensor.numel() != found[name].numel():
            notes.append(f"{name} resampled from {tuple(tensor.shape)} to {tuple(found[name].shape)}")
    ignored = [name for name in found if name in classifying and name not in own]
    return {name: tensor for name, tensor in found.items() if name not in ignored}, ignored, notes


def _several(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _naflex_names(plain: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a plain ViT by the names of timm's NaFlexVit, whose position table has no place for prefix tokens."""
    if isinstance(plain, NaFlexVit):
        return tensors
    moved = {}
    for name, tensor in tensors.items():
        if name == "pos_embed":
            H, W = plain.patch_embed.grid_size
            num_prefix = tensor.shape[1] - H * W
            prefix_1KD, tensor = tensor[:, :num_prefix], tensor[:, num_prefix:].reshape(1, H, W, -1)
            for token in ("cls_token", "reg_token"):
                if token in tensors and num_prefix:
                    count = tensors[token].shape[1]
                    moved[f"embeds.{token}"] = tensors[token] + prefix_1KD[:, :count]
                    prefix_1KD = prefix_1KD[:, count:]
                    num_prefix -= count
        if name == "patch_embed.proj.weight":
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)
        if name.startswith(_EMBEDDINGS):
            moved.setdefault(f"embeds.{name.removeprefix('patch_embed.')}", tensor)
        else:
            moved[name] = tensor
    return moved


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, also of a checkpoint of timm's training script, whose averaged weights come first."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # the script's options; it runs no code
        found = read_tensors(file)
    tensors = state_dict(found)
    if not tensors:
        raise ValueError(f"{file}: holds no tensors; found the entries {', '.join(map(str, list(found)[:5]))}")
    return tensors


def _downloaded(name: str) -> Path:
    """The file of a name's pretrained weights, from the hub or its local cache."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise ValueError(f"timm:{name}: {name} has no weights on the hub; expected timm:{name}:FILE")
    files = [config.hf_hub_filename] if config.hf_hub_filename else list(_FILES)
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(config.hf_hub_id, file))
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"timm:{name}: the hub cannot be reached, and its cache has no {config.hf_hub_id}; download {file} of "
                f"https://huggingface.co/{config.hf_hub_id} elsewhere, bring it here and write timm:{name}:{file}"
            ) from error
        except EntryNotFoundError:
            continue
        except OSError as error:
            said = str(error).strip().splitlines()[0]
            raise FileNotFoundError(f"timm:{name}: {config.hf_hub_id} cannot be downloaded ({said})") from error
    raise FileNotFoundError(f"timm:{name}: {config.hf_hub_id} has none of {', '.join(files)}")
