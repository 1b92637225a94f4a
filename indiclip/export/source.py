"""Which weights of a run are exported, and the encoder that is made of them."""

from pathlib import Path
from typing import NamedTuple

from indiclip.encoder import Encoder
from indiclip.export.fold import cut_length, fold_batch_norm
from indiclip.names import check_choice
from indiclip.pretrained.build import build
from indiclip.pretrained.init_from import fill
from indiclip.pretrained.model_names import library_of
from indiclip.pretrained.read import read_weights

CHOICES = ("ema", "last", "best")


class Source(NamedTuple):
    """A model that is to leave.

    Attributes:
        encoder: What is exported.
        origin: Its run, checkpoint, folder or name.
        chosen: Which of a run's weights they are, in words.
        run: The run's folder, if there is one.
    """

    encoder: Encoder
    origin: str
    chosen: str
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
    if library != "indiclip" and which not in (None, "last"):
        raise ValueError(f"--weights {which}: {run} is no run of ours and has one set of weights; expected last")
    weights = read_weights(run, which or "auto") if library == "indiclip" else read_weights(run)
    chosen = weights.notes[0] if library == "indiclip" else f"the weights of {run}"
    if not {"backbone", "text"} <= weights.config.keys():
        raise ValueError(f"{run}: has no text tower; it is a model of {library} already")
    weights = cut_length(fold_batch_norm(weights), length)
    encoder = Encoder(**build(weights.config, weights.origin, trust_code))
    fill(encoder, weights)
    encoder = encoder.merged()  # where it has LoRA's adapters
    encoder.initial_logits = weights.logits()
    encoder.eval().requires_grad_(False)
    return Source(encoder, run, chosen, _run_folder(weights.origin) if library == "indiclip" else None)


def _run_folder(checkpoint: str) -> Path | None:
    """The folder of the run that a checkpoint is of; None where it lies by itself."""
    folder = Path(checkpoint).resolve().parent.parent
    return folder if (folder / "config.yaml").is_file() else None
