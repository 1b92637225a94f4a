"""Which weights of a run are exported, and the encoder that is made of them."""

from pathlib import Path
from typing import NamedTuple

from indiclip.checkpoint import encoder_of
from indiclip.encoder import Encoder
from indiclip.export.fold import cut_length, fold_batch_norm
from indiclip.pretrained.build import NOT_BUILT, naming
from indiclip.pretrained.model_names import library_of
from indiclip.pretrained.read import read_weights
from indiclip.pretrained.runs import checkpoint_file


class Source(NamedTuple):
    """A model that is to leave.

    Attributes:
        encoder: What is exported.
        origin: Its run, checkpoint, folder or name.
        chosen: Which of a run's weights they are, in words.
        run: The run's folder, if there is one.
        length: To which its embeddings were cut; None where they are as they were trained.
        step, averaged: See `indiclip.pretrained.weights.Weights`.
    """

    encoder: Encoder
    origin: str
    chosen: str
    run: Path | None
    length: int | None = None
    step: int | None = None
    averaged: bool | None = None


def open_source(run: str, which: str, length: int | None, trust_code: bool = False) -> Source:
    """Read what is to be exported.

    Args:
        run: Whatever `indiclip.load` reads.
        which: Of a run's weights, see `indiclip.pretrained.runs.read_run`.
        length: Of the embeddings, one that was trained; None is the full one.
        trust_code: See `indiclip.checkpoint.load`.

    Raises:
        FileNotFoundError, ValueError: See `indiclip.checkpoint.load`; or the run has no such weights.
    """
    library, what = library_of(run)
    weights = read_weights(run, which)
    chosen: str = f"the weights of {run}"
    folder: Path | None = None
    if library == "indiclip":
        chosen = weights.notes[0]
        file = checkpoint_file(Path(what)).resolve()
        folder = next((one for one in file.parents[:2] if (one / "config.yaml").is_file()), None)
    if not {"backbone", "text"} <= weights.config.keys():
        raise ValueError(f"{run}: has no text tower; it is a model of {library} already")
    length = None if length == weights.config["embed_dim"] else length
    with naming(weights.origin, NOT_BUILT):
        weights = cut_length(fold_batch_norm(weights), length)
    encoder = encoder_of(weights, trust_code)
    chosen += ", with LoRA's adapters added" if encoder.lora else ""
    return Source(encoder.merged(), run, chosen, folder, length, weights.step, weights.averaged)
