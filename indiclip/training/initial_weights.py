"""Weights to begin with, and tokenizers of the hub, are not needed again: a checkpoint has all of them."""

import warnings
from pathlib import Path
from typing import Any

from jsonargparse import dict_to_namespace

from indiclip.old_names import translate_config
from indiclip.pretrained.weights import read_tensors


def leave_out_initial_weights(model: Any, checkpoint: Path) -> None:
    """Make the encoder's config, in place, one that builds the same architecture from nothing but itself.

    Args:
        model: The config's `model`.
        checkpoint: What the weights come from: a file, or a folder of shards.
    """
    encoder = model["encoder"]["init_args"]
    if encoder.get("init_from"):
        encoder["init_from"] = None
        for name, value in _saved_encoder(checkpoint).items():
            if encoder.get(name) is None:  # which came along with the weights
                encoder[name] = value
    backbone, text = (_arguments(encoder, part) for part in ("backbone", "text"))
    if backbone.get("pretrained"):
        backbone["pretrained"] = False  # the architecture goes by the model's name
    source = _arguments(text, "tokenizer").get("source")
    if text.get("pretrained") or (source and not Path(source).expanduser().exists()):  # a name on the hub
        saved = _saved_encoder(checkpoint)["text"]["init_args"]
        if text.get("pretrained"):
            text["pretrained"], text["architecture"] = None, saved["architecture"]
        text["tokenizer"] = dict_to_namespace(saved["tokenizer"])


def warn_of_random_towers(model: Any) -> None:
    """A warning for each tower that is frozen, or gets LoRA's adapters, and whose weights nothing gives.

    Args:
        model: The config's `model`, of a run that begins.
    """
    encoder = model["encoder"]["init_args"]
    given = {part for item in encoder.get("init_from") or [] for part in item.get("parts") or ("image", "text")}
    still = {"model.freeze": model.get("freeze"), "model.encoder.lora": (encoder.get("lora") or {}).get("towers")}
    for tower, name in {"image": "backbone", "text": "text"}.items():
        keys = [key for key, towers in still.items() if tower in (towers or [])]
        if keys and tower not in given and not _arguments(encoder, name).get("pretrained"):
            warnings.warn(
                f"{keys[0]}: the weights of the {tower} tower are random and not trained; model.encoder.init_from "
                "gives it others",
                stacklevel=2,
            )


def _arguments(encoder: Any, part: str) -> Any:
    return (encoder.get(part) or {}).get("init_args") or {}


def _saved_encoder(checkpoint: Path) -> dict[str, Any]:
    """The arguments of a checkpoint's encoder; the tokenizer's content is among them."""
    file = checkpoint / "meta.pt" if checkpoint.is_dir() else checkpoint
    saved = read_tensors(file, mmap=True)  # of a whole checkpoint little is needed
    if "encoder" not in saved:
        raise ValueError(f"--ckpt_path: {file} is no checkpoint of IndiCLIP; expected the entry 'encoder'")
    found: dict[str, Any] = translate_config(saved["encoder"])
    return found
