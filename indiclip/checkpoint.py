"""From a model on disk to an encoder, without Lightning, a network or pickled code."""

from pathlib import Path

import torch

from indiclip.encoder import Encoder
from indiclip.pretrained.build import build
from indiclip.pretrained.init_from import fill
from indiclip.pretrained.model_names import library_of
from indiclip.pretrained.read import read_weights


def load(path: str | Path, device: str | torch.device = "cpu", trust_code: bool = False) -> Encoder:
    """A pretrained encoder, in evaluation mode and without gradients.

    Args:
        path: A run's folder (`runs/quickstart`; its last checkpoint), a checkpoint file, or a dual encoder of another
            library, see `indiclip.pretrained.read.read_weights`.
        device: Where to put it.
        trust_code: A checkpoint names the classes it is made of. Others than IndiCLIP's backbones, text towers and
            tokenizers are imported and called only if this is True, and only then may it name weights or files to
            fetch.

    Raises:
        FileNotFoundError: No such model.
        ValueError: A file that is no checkpoint of IndiCLIP, one that names foreign classes, or an image model
            without a text tower.
    """
    weights = read_weights(str(path))
    if not weights.config:
        library_of(str(path))  # raises: weights alone name no architecture
    arguments = build(weights.config, weights.origin, trust_code)
    if not {"backbone", "text"} <= arguments.keys():
        raise ValueError(f"{path}: is no dual encoder; model.encoder.init_from trains with what it has")
    encoder = Encoder(**arguments)
    fill(encoder, weights)
    encoder.initial_logits = weights.logits()
    return encoder.to(device).eval().requires_grad_(False)
