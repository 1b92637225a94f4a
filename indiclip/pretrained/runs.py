"""Our own runs and checkpoints."""

from pathlib import Path
from typing import Any

from torch import Tensor

from indiclip.names import nearest_beside
from indiclip.old_names import translate_checkpoint
from indiclip.pretrained.weights import Weights, read_tensors

_ENCODER = "encoder."
_LOGITS = ("logit_scale", "logit_bias")


def read_run(path: str) -> Weights:
    """A run's folder (its last checkpoint) or a checkpoint file.

    Raises:
        FileNotFoundError: No checkpoint there.
        ValueError: A file that is not a checkpoint of IndiCLIP.
    """
    file = checkpoint_file(Path(path))
    checkpoint = read_tensors(file)
    if "encoder" not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(f"{file}: not a checkpoint of IndiCLIP; expected the entries 'encoder' and 'state_dict'")
    translate_checkpoint(checkpoint)
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    tensors = {name.removeprefix(_ENCODER): weight for name, weight in weights.items() if name.startswith(_ENCODER)}
    heads = [name for name in weights if not name.startswith(_ENCODER)]
    return Weights(str(file), checkpoint["encoder"], tensors | _logits(weights), ignored=heads)


def checkpoint_file(path: Path) -> Path:
    """The checkpoint that a path of a run or a file stands for."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run or checkpoint{nearest_beside(path)}")
    last = path / "checkpoints" / "last.ckpt"
    found = [last] if last.is_file() else sorted(path.glob("**/*.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{path}: holds no checkpoint (*.ckpt)")
    return found[-1]


def _logits(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Temperature and bias of the run's contrastive loss; none where it has several such heads or none."""
    found = {}
    for name in _LOGITS:
        values = [weight for key, weight in weights.items() if key.startswith("heads.") and key.endswith(f".{name}")]
        if len(values) == 1:
            found[name] = values[0]
    return found
