"""From a model on disk to an encoder, without Lightning, a network or pickled code."""

from pathlib import Path

import torch

from indiclip.encoder import Encoder
from indiclip.pretrained.build import NOT_BUILT, build, naming
from indiclip.pretrained.init_from import fill
from indiclip.pretrained.model_names import library_of
from indiclip.pretrained.read import read_weights
from indiclip.pretrained.weights import Weights


def load(
    path: str | Path, device: str | torch.device = "cpu", trust_code: bool = False, weights: str = "auto"
) -> Encoder:
    """A pretrained encoder, in evaluation mode and without gradients.

    Args:
        path: A run's folder (`runs/quickstart`; its last checkpoint), a checkpoint file, or a dual encoder of another
            library, see `indiclip.pretrained.read.read_weights`.
        device: Where to put it.
        trust_code: A checkpoint names the classes it is made of. Others than IndiCLIP's backbones, text towers and
            tokenizers are imported and called only if this is True, and only then may it name weights or files to
            fetch.
        weights: Of a run: `ema`, the averages that `indiclip.training.ema.EMA` kept; `last`, the trained weights;
            `auto`, the averages where there are any; `best`, of the checkpoint with the best score.

    Returns:
        Its `initialised` says in words what was read.

    Raises:
        FileNotFoundError: No such model.
        ValueError: A file that is no checkpoint of IndiCLIP, one that names foreign classes, or an image model
            without a text tower.
    """
    found = read_weights(str(path), weights)
    if not found.config:
        library_of(str(path))  # raises: weights alone name no architecture
    if not {"backbone", "text"} <= found.config.keys():
        raise ValueError(f"{path}: is no dual encoder; model.encoder.init_from trains with what it has")
    return encoder_of(found, trust_code).to(device)


def encoder_of(weights: Weights, trust_code: bool = False) -> Encoder:
    """The encoder that a dual encoder's weights are for, filled with them; see `load`."""
    arguments = build(weights.config, weights.origin, trust_code)
    with naming(weights.origin, NOT_BUILT):
        encoder = Encoder(**arguments)
    fill(encoder, weights)
    encoder.initial_logits, encoder.initialised = weights.logits(), weights.notes
    return encoder.eval().requires_grad_(False)
