"""Every image model of timm, all tensors random, against what IndiCLIP makes of it.

`vit`: each name of the modules of plain ViTs, and each name with "vit" in it. `families`: the smallest of every other
module's other models. A model of more than `--cut-above` million parameters keeps two blocks (of a stage, if it has
stages); one that stays too large is compared by keys and shapes alone.

Compared in float64, in evaluation mode, at the model's own image size: the tokens (class and register tokens too) and
the pooled vector, from random uint8 pixels that go through our patches and normalisation. What counts as equal is a
largest difference of 1e-5 of the largest value: constants such as means and rotary frequencies are kept in float32
(6e-8), which some towers amplify; a real difference is above 1e-4.

Each name's row is written as it is done; started again, it goes on where it was, and tries again what had raised.

    python tools/survey_timm.py vit runs/timm_vit.jsonl
    python tools/survey_timm.py families runs/timm_families.jsonl
    python tools/survey_timm.py --table runs/timm_vit.jsonl
"""

import argparse
import json
import logging
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from indiclip.backbone import Backbone, join_prefix
from indiclip.pretrained.build import build
from indiclip.pretrained.timm_models import image_tower
from indiclip.timm_backbone import TimmBackbone

VIT_MODULES = [
    *("beit", "deit", "eva", "naflexvit", "vision_transformer", "vision_transformer_hybrid"),
    *("vision_transformer_relpos", "vision_transformer_sam"),
]
TOLERANCE = 1e-5
_MOST = 500  # millions of parameters: two such models in float64 take 8 GB
_CUTS: tuple[dict[str, Any], ...] = (
    {"depth": 2},
    {"depth": 2, "num_kv_heads": 8},  # where else each block has its number
    {"depths": (2, 2, 2, 2)},
    {"depths": (1, 1, 1, 1)},
    {"layers": (1, 1, 1, 1, 1)},  # the first four, where there are no more
    {"layers": (1, 1, 1, 1)},
)


class NoInitialisation(TorchFunctionMode):
    """Leaves out the random numbers of new models, which all get others."""

    _RANDOM = frozenset({Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, nn.init.trunc_normal_, nn.init.normal_})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in self._RANDOM and args else func(*args, **(kwargs or {}))


def randomise(model: nn.Module, seed: int) -> None:
    """Every tensor random, so that each counts: also biases, norms, scales and position tables."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or (tensor.ndim == 0):
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            value = noise.abs() * 0.2 + 0.8
        elif tensor.ndim < 2 or tensor.numel() == max(tensor.shape):
            value = noise * 0.2 + (0.0 if "bias" in name or name.endswith(("running_mean", "token")) else 1.0)
        else:
            value = noise * (0.5 if tensor.shape[0] == 1 else (tensor[0].numel()) ** -0.5)
        tensor.copy_(value)


def _size(model: nn.Module) -> float:
    """Millions of parameters."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def create(name: str, cut_above: float) -> tuple[Any, dict[str, Any]]:
    """timm's model with random tensors, and the options that cut it; on the meta device where it stays too large."""
    options: dict[str, Any] = {}
    with torch.device("meta"):
        try:
            whole = timm.create_model(name)
        except NotImplementedError:  # an encoder that never classifies
            options = {"num_classes": 0}
            whole = timm.create_model(name, **options)
    size, chosen = _size(whole), dict(options)
    for cut in _CUTS if size > cut_above else ():
        try:
            with torch.device("meta"):
                size = _size(timm.create_model(name, **options, **cut))
        except Exception:  # which arguments a model takes shows only in the attempt
            continue
        chosen |= cut
        break
    if size > _MOST:
        return whole.eval(), options
    options = chosen
    with NoInitialisation():
        model = timm.create_model(name, **options)
    randomise(model, zlib.crc32(name.encode()))
    return model.eval(), options


def survey(name: str, cut_above: float, gradients: bool) -> dict[str, Any]:
    """The row of a name."""
    began = time.perf_counter()
    model, options = create(name, cut_above)
    row: dict[str, Any] = {"name": name, "options": options}
    try:
        weights = image_tower(f"timm:{name}", name, dict(model.state_dict()), options, {})
        is_meta = next(model.parameters()).is_meta
        with NoInitialisation(), torch.device("meta" if is_meta else "cpu"):
            backbone = build({"backbone": weights.config["backbone"]}, name)["backbone"]
        tensors = {key.removeprefix("backbone."): tensor for key, tensor in weights.tensors.items()}
        own = backbone.state_dict()
        missing, unused = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or unused or weights.unused:
            raise ValueError(f"{name}: initial {missing[:4]}, unused {[*unused, *weights.unused][:4]}")
        if is_meta:
            shapes = all(tensors[key].shape == tensor.shape for key, tensor in own.items())
            found = {"class": type(backbone).__name__, "tokens": 0.0, "pooled": 0.0}
            return row | found | {"result": "equal in keys and shapes" if shapes else "silent"}
        backbone.load_state_dict(tensors)
    except (ValueError, FileNotFoundError) as error:
        return row | {"result": "refused", "line": str(error)}
    row |= {"class": type(backbone).__name__, "notes": weights.notes}
    config: Any = timm.get_pretrained_cfg(name)  # the model's may be another name's
    row |= compare(backbone.eval(), model, config.input_size[1:])
    if gradients:
        row |= without_gradient(backbone.float())
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def compare(backbone: Backbone, model: Any, size_hw: tuple[int, int]) -> dict[str, Any]:
    """Tokens and pooled vector of both for one picture, in float64."""
    backbone, model = backbone.double(), model.double()
    config, (height, width) = model.pretrained_cfg, size_hw
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mean, std = ((torch.tensor(config[key]) * 255).double()[:, None, None] for key in ("mean", "std"))
    pixels = (torch.from_numpy(picture).permute(2, 0, 1)[None] - mean) / std
    p = backbone.patch_size
    picture = picture[: height // p * p, : width // p * p]  # timm's patch embedding leaves out what is beyond
    with torch.no_grad():
        theirs = model.forward_features(pixels.double())
        pooled = model.forward_head(theirs, pre_logits=True)
        features = backbone(backbone.preprocessing.batch([picture], height * width // p**2))
        own = backbone.pool(features)
    if isinstance(theirs, dict):
        theirs = theirs["patches"]
    tokens = join_prefix(features)
    if theirs.ndim == 4:
        is_first = isinstance(backbone, TimmBackbone) and backbone.is_channels_first
        theirs = (theirs.permute(0, 2, 3, 1) if is_first else theirs).flatten(1, 2)
    found = {"tokens": difference(tokens, theirs), "pooled": difference(own, pooled)}
    is_equal = max(found.values()) <= TOLERANCE
    return {"result": "equal" if is_equal else "silent"} | found


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest, as a share of the largest value; infinite for other shapes or values that are not finite."""
    if found.shape != expected.shape or not expected.isfinite().all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def without_gradient(backbone: Backbone) -> dict[str, Any]:
    """Parameters that a backward pass does not reach, where the tower pools and where the tokens' mean does."""
    found = {}
    backbone.train()  # LeViT keeps tables of its evaluation mode, with their graph
    height, width = backbone.canvas_hw or (4 * backbone.patch_size,) * 2
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    images = backbone.preprocessing.batch([picture] * 2, backbone.max_tokens)
    for pool in ("tower", "mean"):
        if pool == "mean":
            backbone.remove_pool()
        backbone.zero_grad()
        features = backbone(images)
        (backbone.pool(features) if pool == "tower" else features.tokens_BND).sum().backward()
        found[f"unused_{pool}"] = [key for key, value in backbone.named_parameters() if value.grad is None]
    return found


def names_of(kind: str) -> Iterator[str]:
    """The names to look at, see the file's docstring."""
    plain = sorted(name for module in VIT_MODULES for name in timm.list_models(module=module))
    if kind == "vit":
        yield from [*plain, *sorted(set(timm.list_models("*vit*")) - set(plain))]
        return
    for module in sorted(set(timm.list_modules()) - set(VIT_MODULES)):
        sizes = {}
        for name in timm.list_models(module=module):
            if "vit" not in name:
                with torch.device("meta"):
                    sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        if sizes:
            yield min(sizes, key=lambda name: (sizes[name], name))


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of counts by class, and a line for whatever is not equal."""
    counts = Counter((row.get("class", "-"), row["result"]) for row in rows)
    lines = ["| read as | result | names |", "| --- | --- | ---: |"]
    lines += [f"| {kind} | {result} | {count} |" for (kind, result), count in sorted(counts.items())]
    worst = max((max(row["tokens"], row["pooled"]) for row in rows if row["result"] == "equal"), default=0.0)
    cut = sum(bool(row.get("options")) for row in rows)
    lines += ["", f"{len(rows)} names, {cut} of them cut in depth; largest difference of an equal one {worst:.1e}."]
    reasons = defaultdict(list)
    for row in rows:
        if not row["result"].startswith("equal"):
            reasons[row["result"], row.get("line", "").replace(row["name"], "NAME")].append(row["name"])
        for pool in ("tower", "mean"):
            if unused := row.get(f"unused_{pool}"):
                reasons[f"no gradient with pool: {pool}", ", ".join(unused[:3])].append(row["name"])
    lines += [f"- {result}: {', '.join(names)}: {line}" for (result, line), names in reasons.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["vit", "families"], nargs="?")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--cut-above", type=float, default=300, help="millions of parameters")
    parser.add_argument("--names", nargs="*", help="only these")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    lines = arguments.rows.read_text().splitlines() if arguments.rows.is_file() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}  # of a name that was tried again the last
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    names = arguments.names or ([] if arguments.table else names_of(arguments.kind))
    for name in names:
        if rows.get(name, {"result": "raised"})["result"] != "raised":
            continue
        try:
            row = survey(name, arguments.cut_above, gradients=arguments.kind == "families")
        except Exception as error:  # whatever it is, it is what the survey looks for
            row = {"name": name, "result": "raised", "line": f"{type(error).__name__}: {error}".split("\n")[0]}
        print(row, flush=True)
        arguments.rows.parent.mkdir(parents=True, exist_ok=True)
        with arguments.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows[name] = row
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
