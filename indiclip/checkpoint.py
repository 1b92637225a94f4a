"""From a run or checkpoint on disk to the encoder it trained, without Lightning, a network or pickled code."""

import importlib
import re
from pathlib import Path
from typing import Any

import torch

from indiclip.backbone import Backbone
from indiclip.encoder import Encoder
from indiclip.names import nearest_beside
from indiclip.old_names import translate_checkpoint
from indiclip.text import TextTower, Tokenizer

_OF_PARTS = ("indiclip.backbone", "indiclip.text")


def load(path: str | Path, device: str | torch.device = "cpu", trust_code: bool = False) -> Encoder:
    """The encoder of a run, in evaluation mode and without gradients.

    Args:
        path: A run's folder (`runs/quickstart`; its last checkpoint) or a checkpoint file.
        device: Where to put it.
        trust_code: The checkpoint names the classes it is made of. Others than IndiCLIP's backbones, text towers and
            tokenizers are imported and called only if this is True, and only then may it name weights or files to
            fetch.

    Raises:
        FileNotFoundError: No checkpoint there.
        ValueError: A file that is not a checkpoint of IndiCLIP, or one that names foreign classes.
    """
    file = _checkpoint_file(Path(path))
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise unreadable(file, error) from error
    if not isinstance(checkpoint, dict) or "encoder" not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(f"{file}: not a checkpoint of IndiCLIP; expected the entries 'encoder' and 'state_dict'")
    translate_checkpoint(checkpoint)
    encoder = Encoder(**{name: _build(value, trust_code, file) for name, value in checkpoint["encoder"].items()})
    prefix = "encoder."
    weights = {name.removeprefix(prefix): w for name, w in checkpoint["state_dict"].items() if name.startswith(prefix)}
    encoder.load_state_dict(weights)
    return encoder.to(device).eval().requires_grad_(False)


def unreadable(file: str | Path, error: Exception) -> Exception:
    """What to raise where `torch.load` fails, which may advise to run the code that a file holds."""
    if isinstance(error, OSError):
        return error
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    reason = f"it holds {foreign[1]}, and reading that can run code" if foreign else "another kind of file, or damaged"
    return ValueError(f"{file}: not a readable checkpoint ({reason})")


def _checkpoint_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run or checkpoint{nearest_beside(path)}")
    last = path / "checkpoints" / "last.ckpt"
    found = [last] if last.is_file() else sorted(path.glob("**/*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{path}: holds no checkpoint (*.ckpt)")
    return found[-1]


def _build(value: Any, trust_code: bool, file: Path) -> Any:
    """`{class_path, init_args}` -> object, innermost first; anything else as it is."""
    if not (isinstance(value, dict) and set(value) == {"class_path", "init_args"}):
        return value
    module, _, name = value["class_path"].rpartition(".")
    arguments = value["init_args"]
    if not trust_code:
        made = getattr(importlib.import_module(module), name, None) if module in _OF_PARTS else None
        if not (isinstance(made, type) and issubclass(made, (Backbone, TextTower, Tokenizer))):
            raise ValueError(f"{file}: names {value['class_path']}; pass trust_code=True to import and call it")
        for key in ("pretrained", "source"):
            if arguments.get(key):
                raise ValueError(f"{file}: asks for {key} {arguments[key]!r}; pass trust_code=True to fetch it")
    arguments = {key: _build(item, trust_code, file) for key, item in arguments.items()}
    return getattr(importlib.import_module(module), name)(**arguments)
