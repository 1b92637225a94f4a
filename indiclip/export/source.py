"""Which weights of a run are exported, and the encoder that is made of them."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from indiclip.encoder import Encoder
from indiclip.export.fold import cut_length, fold_batch_norm
from indiclip.names import check_choice
from indiclip.pretrained.build import build
from indiclip.pretrained.init_from import fill
from indiclip.pretrained.model_names import library_of
from indiclip.pretrained.read import read_weights
from indiclip.pretrained.runs import checkpoint_file
from indiclip.pretrained.weights import Weights, read_tensors

CHOICES = ("ema", "last", "best")


class Source(NamedTuple):
    """A model that is to leave.

    Attributes:
        encoder: What is exported.
        origin: Its run, checkpoint, folder or name.
        chosen: Which of a run's weights they are, in words.
        step: After which they were saved; None where they are none of a run.
        run: The run's folder, if there is one.
    """

    encoder: Encoder
    origin: str
    chosen: str
    step: int | None
    run: Path | None


def open_source(run: str, which: str | None, length: int | None, trust_code: bool = False) -> Source:
    """Read what is to be exported.

    Args:
        run: Whatever `indiclip.load` reads.
        which: One of `CHOICES`; None is the averaged weights where the run has them, else the last.
        length: Of the embeddings, one that was trained; None is the full one.
        trust_code: See `indiclip.checkpoint.load`.

    Raises:
        FileNotFoundError, ValueError: See `indiclip.checkpoint.load`; or the run has no such weights.
    """
    check_choice("--weights", which or "last", CHOICES)
    library, _ = library_of(run)
    if library == "indiclip":
        weights, chosen, step, folder = _of_run(Path(run), which)
    elif which not in (None, "last"):
        raise ValueError(f"--weights {which}: {run} is no run of ours and has one set of weights; expected last")
    else:
        weights, chosen, step, folder = read_weights(run), f"the weights of {run}", None, None
    if not {"backbone", "text"} <= weights.config.keys():
        raise ValueError(f"{run}: has no text tower; it is a model of {library} already")
    weights = cut_length(fold_batch_norm(weights), length)
    encoder = Encoder(**build(weights.config, weights.origin, trust_code))
    fill(encoder, weights)
    encoder.initial_logits = weights.logits()
    encoder.eval().requires_grad_(False)
    return Source(encoder, run, chosen, step, folder)


def _of_run(path: Path, which: str | None) -> tuple[Weights, str, int, Path | None]:
    file = checkpoint_file(path)
    checkpoint = read_tensors(file)
    if which == "best":
        file = _best(file, checkpoint)
        checkpoint = read_tensors(file)
    weights = read_weights(str(file))
    step = int(checkpoint.get("global_step") or 0)
    chosen = f"{file}, step {step}"
    averages = averaged_tensors(checkpoint)
    if which == "ema" and averages is None:
        raise ValueError(f"--weights ema: {file} has no averaged weights; expected last or best")
    if which in (None, "ema") and averages is not None:
        weights.tensors |= averages
        chosen += ", averaged weights"
    folder = file.resolve().parent.parent
    return weights, chosen, step, folder if (folder / "config.yaml").is_file() else None


def averaged_tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor] | None:
    """The averaged weights of an encoder by its names; None where the run kept none."""
    return None


def _best(last: Path, checkpoint: dict[str, Any]) -> Path:
    """The checkpoint of the best score, as the run's checkpoint callback recorded it."""
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and state.get("best_model_path") and state.get("monitor"):
            best = last.parent / Path(state["best_model_path"]).name  # the folder may have been moved
            if not best.is_file():
                raise FileNotFoundError(f"--weights best: {best}, the best by {state['monitor']}, is gone")
            return best
    raise ValueError(f"--weights best: the run of {last} kept no best checkpoint (no `monitor`); expected last")
