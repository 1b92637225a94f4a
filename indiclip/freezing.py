"""What of a model is not trained: words and module paths in a config, and what they mean for training."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from indiclip.names import did_you_mean

# A tower is its model and its pooling, as in LiT (Zhai et al., CVPR 2022, arXiv:2111.07991), where a locked image tower
# is a whole pretrained one. The projections, and the batch norm that their input may have, are ours and new.
PARTS = {
    "image": ("encoder.backbone", "encoder.image_pool.pool"),
    "text": ("encoder.text", "encoder.text_pool.pool", "encoder.text_pool.dense"),
    "projections": (
        *("encoder.image_projection", "encoder.image_pool.norm"),
        *("encoder.text_projection", "encoder.text_pool.norm"),
    ),
}
_TEMPERATURES = ("logit_scale", "logit_bias")


def frozen_paths(module: nn.Module, words: Iterable[str]) -> list[str]:
    """The paths of modules and parameters that `words` name.

    Args:
        module: What the paths begin at, a `MultiTask`.
        words: `image`, `text`, `projections`, `logit_scale` (of every head that has one, and its bias), or paths.

    Raises:
        ValueError: A word that is none of these.
    """
    parameters = [name for name, _ in module.named_parameters()]
    known = {*parameters, *(path for path, _ in module.named_modules() if path)}
    paths: list[str] = []
    for word in words:
        if word == "logit_scale":
            found = [name for name in parameters if name.rpartition(".")[2] in _TEMPERATURES]
        else:
            found = [path for path in PARTS.get(word, (word,)) if path in known]
        if not found:
            near = did_you_mean(word, [*PARTS, "logit_scale", *sorted(known)])
            raise ValueError(f"model.freeze: the model has no part or module {word!r}{near}")
        paths += found
    return list(dict.fromkeys(paths))


def freeze(module: nn.Module, paths: Iterable[str]) -> None:
    """No gradients for what lies at the paths."""
    parameters, modules = dict(module.named_parameters()), dict(module.named_modules())
    for path in paths:
        (parameters if path in parameters else modules)[path].requires_grad_(False)


def keep_frozen(module: nn.Module, paths: Iterable[str]) -> None:
    """Evaluation mode for the modules at the paths: no dropout, no dropped paths, no new statistics of batch norm.

    The same for a batch norm anywhere whose own weights are frozen, as in a tower with LoRA's adapters.
    """
    modules = dict(module.named_modules())  # looked up anew: conversions, as to SyncBatchNorm, make others
    for path in paths:
        if path in modules:
            modules[path].eval()
    for part in modules.values():
        weights = list(part.parameters(recurse=False)) if isinstance(part, _BatchNorm) else []
        if weights and not any(weight.requires_grad for weight in weights):
            part.eval()
