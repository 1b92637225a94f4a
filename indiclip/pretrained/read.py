"""From a path or name to a pretrained model, whatever library it is of."""

from indiclip.pretrained.model_names import library_of
from indiclip.pretrained.runs import read_run
from indiclip.pretrained.timm_models import read_timm
from indiclip.pretrained.transformers_models import read_transformers
from indiclip.pretrained.weights import Weights, check_tensors

READERS = {"transformers": read_transformers, "timm": read_timm}


def read_weights(name: str, which: str = "auto") -> Weights:
    """The configuration and the tensors of a pretrained model, from local files.

    Args:
        name: `runs/quickstart`, `x.ckpt`: ours. A folder as transformers, timm or OpenCLIP save one. Their names and
            files: `timm:NAME`, `transformers:FOLDER`, `open_clip:NAME:FILE`.
        which: Of a run's weights, see `read_run`.

    Raises:
        FileNotFoundError: No such file or folder, or one that the model lacks.
        ValueError: Anything else that is no model, or one with values that are not finite.
    """
    library, what = library_of(name)
    if library == "indiclip":
        weights = read_run(what, which)
    elif which in ("auto", "last"):
        weights = READERS[library](what)
    else:
        raise ValueError(f"{name}: is no run of ours and has one set of weights; expected last, found {which!r}")
    weights.tensors = check_tensors(weights.tensors, weights.origin)
    return weights
