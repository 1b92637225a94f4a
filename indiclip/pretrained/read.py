"""From a path or name to a pretrained model, whatever library it is of."""

from pathlib import Path

import timm

from indiclip.pretrained.bare_files import SUFFIXES, read_bare_file
from indiclip.pretrained.build import naming
from indiclip.pretrained.model_names import expand_user, library_of
from indiclip.pretrained.open_clip_models import read_open_clip
from indiclip.pretrained.runs import read_run
from indiclip.pretrained.timm_models import read_timm
from indiclip.pretrained.transformers_models import read_transformers
from indiclip.pretrained.vitdet import read_vitdet
from indiclip.pretrained.weights import Weights, check_tensors, precision_notes
from indiclip.quiet import quiet_transformers

READERS = {"transformers": read_transformers, "timm": read_timm, "open_clip": read_open_clip, "vitdet": read_vitdet}


def read_weights(name: str, which: str = "auto") -> Weights:
    """The configuration and the tensors of a pretrained model, from local files.

    Args:
        name: `runs/quickstart`, `x.ckpt`: ours. A folder as transformers, timm or OpenCLIP save one, or
            `indiclip export --to vitdet`. Names and files of the libraries: `timm:NAME` (or that name alone),
            `transformers:FOLDER`, `open_clip:NAME:FILE`. A `.safetensors`, `.pt`, `.pth` or `.bin` alone gives a
            `BareFile`, which names no architecture.
        which: Of a run's weights, see `read_run`.

    Raises:
        FileNotFoundError: No such file or folder, or one that the model lacks.
        ValueError: Anything else that is no model, or one with values that are not finite.
    """
    if not name:
        raise ValueError("found an empty name of weights; expected a run, a folder, a file or a model's name")
    name = expand_user(name)
    file = Path(name)
    is_bare = file.is_file() and file.suffix in SUFFIXES
    if timm.is_model(name) and not file.exists():
        name = f"timm:{name}"
    library, what = ("", name) if is_bare else library_of(name)
    if library != "indiclip" and which not in ("auto", "last"):
        raise ValueError(f"{name}: is no run of ours and has one set of weights; expected last, found {which!r}")
    weights: Weights
    # Libraries raise anything, and name no file; what transformers finds missing or unexpected is counted by us.
    with naming(what, f"{library or 'torch'} cannot read it"), quiet_transformers():
        if is_bare:
            weights = read_bare_file(file, name)
        else:
            weights = read_run(what, which) if library == "indiclip" else READERS[library](what)
    weights.notes += precision_notes(weights.tensors)
    weights.tensors = check_tensors(weights.tensors, weights.origin)
    return weights
