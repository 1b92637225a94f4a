"""Our own runs and checkpoints."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from indiclip.names import check_choice, nearest_beside
from indiclip.old_names import translate_checkpoint
from indiclip.pretrained.build import NEWER
from indiclip.pretrained.sharded import is_sharded
from indiclip.pretrained.weights import PART_OF, Weights, read_tensors

AVERAGES = "averages"  # entry of a checkpoint: `state_dict` and `num_updates` of `indiclip.training.ema.EMA`
CHOICES = ("auto", "ema", "last", "best")
_ENCODER = "encoder."
_LOGITS = ("logit_scale", "logit_bias")
_SCALE = re.compile(r"heads\..*\.logit_scale")


def read_run(path: str, which: str = "auto") -> Weights:
    """A run's folder or a checkpoint file. The first of its notes says which of its weights were read.

    Args:
        path: Of a folder, its last checkpoint.
        which: `ema` are the averaged weights, `last` the trained ones, `auto` the averaged ones where there are any;
            `best` are those of the checkpoint with the best score, averaged where there are any.

    Raises:
        FileNotFoundError: No checkpoint there.
        ValueError: A file that is not a checkpoint of IndiCLIP, or it has no such weights.
    """
    chosen = read_checkpoint(path, which)
    checkpoint, weights = chosen.checkpoint, chosen.checkpoint["state_dict"]
    tensors = {name.removeprefix(_ENCODER): weight for name, weight in weights.items() if name.startswith(_ENCODER)}
    logits = _logits(checkpoint)
    heads = [name for name in weights if not name.startswith(_ENCODER) and name.rpartition(".")[2] not in logits]
    return Weights(
        str(chosen.file),
        checkpoint["encoder"],
        tensors | logits,
        ignored=heads,
        notes=[chosen.said],
        step=checkpoint.get("global_step") or 0,
        averaged=chosen.averaged,
    )


class Chosen(NamedTuple):
    """A checkpoint of ours.

    Attributes:
        file: Where it lies; may be a folder.
        checkpoint: Its entries, with the weights that were asked for in `state_dict`.
        said: File, step and which weights, in words.
        averaged: Whether they are the averages that the run kept; None where it kept none.
    """

    file: Path
    checkpoint: dict[str, Any]
    said: str
    averaged: bool | None


def read_checkpoint(path: str, which: str = "auto") -> Chosen:
    """A checkpoint of a run, heads and all; see `read_run`."""
    check_choice("weights", which, CHOICES)
    file = checkpoint_file(Path(path))
    checkpoint = read_tensors(file)
    if not all(isinstance(checkpoint.get(entry), dict) for entry in ("encoder", "state_dict")):
        raise ValueError(f"{file}: not a checkpoint of IndiCLIP; expected the entries 'encoder' and 'state_dict'")
    if which == "best":
        file = _best(file, checkpoint)
        checkpoint = read_tensors(file)
    translate_checkpoint(checkpoint)
    for name in checkpoint["encoder"]:
        if name not in (*PART_OF, "lora"):
            raise ValueError(f"{file}: its encoder has {name!r}, which ours has not; {NEWER}")
    said = f"{file}, step {checkpoint.get('global_step') or 0}"
    averaged = which != "last" if AVERAGES in checkpoint else None
    if averaged:
        checkpoint["state_dict"] |= checkpoint[AVERAGES]["state_dict"]
        said += f", averaged weights of {checkpoint[AVERAGES]['num_updates']:,} updates"
    elif averaged is not None:
        said += ", not averaged"
    elif which == "ema":
        raise ValueError(
            f"{file}: has no averaged weights (indiclip.training.ema.EMA keeps some); expected last or best"
        )
    return Chosen(file, checkpoint, said, averaged)


def _best(last: Path, checkpoint: dict[str, Any]) -> Path:
    """The checkpoint with the best score, as the run's checkpoint callback has recorded it."""
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and state.get("best_model_path") and state.get("monitor"):
            best = last.parent / Path(state["best_model_path"]).name  # the folder may have been moved
            if not best.exists():
                raise FileNotFoundError(f"{best}: is gone; it was the best by {state['monitor']}")
            return best
    raise ValueError(f"{last}: its run kept no best checkpoint (no `monitor`); expected last")


def checkpoint_file(path: Path) -> Path:
    """The checkpoint that a path of a run or a file stands for."""
    if path.is_file() or is_sharded(path):
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run or checkpoint{nearest_beside(path)}")
    last = path / "checkpoints" / "last.ckpt"
    mine = [*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")]
    found = [last] if last.exists() else sorted(mine, key=lambda file: file.stat().st_mtime)
    if not found:
        below = sorted({str(folder.parent) for folder in path.glob("*/checkpoints") if any(folder.glob("*.ckpt"))})
        runs = f"; runs in it are {', '.join(below[:5])}{', ...' if len(below) > 5 else ''}" if below else ""
        raise FileNotFoundError(f"{path}: holds no checkpoint (*.ckpt){runs}")
    return found[-1]


def _logits(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Temperature and bias of the loss that the entry `logits` names.

    An older run is read as one whose contrastive loss had a weight; that of a distance to a teacher is another's.
    """
    weights = checkpoint["state_dict"]
    if (loss := checkpoint.get("logits")) is None:
        losses = [key.removesuffix(f".{_LOGITS[0]}") for key in weights if _SCALE.fullmatch(key)]
        losses = [path for path in losses if not path.endswith(".distance")] or losses
        loss = losses[0] if len(losses) == 1 else ""
    return {name: weights[f"{loss}.{name}"] for name in _LOGITS if f"{loss}.{name}" in weights}
