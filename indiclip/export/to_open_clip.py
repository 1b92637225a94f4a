"""To OpenCLIP: a tower of CLIP's shape becomes its own ViT, any other a tower of timm; the text tower its own.

OpenCLIP builds timm's towers by name. Where timm has no name for the run's, `timm/config.json` in the folder describes
it, and OpenCLIP finds that by its absolute path.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.export import open_clip_towers, target, to_timm
from indiclip.export.fold import linear_projection
from indiclip.export.parity import UNUSUAL_TEXTS, own_grid
from indiclip.export.target import Loss, Reloaded, stretching_note
from indiclip.export.tokenizer_files import pad_losses, tokenizer_losses, transformers_tokenizer
from indiclip.patches import unpatchify
from indiclip.pretrained.open_clip_source import LOCAL, vision_cfg_of
from indiclip.pretrained.open_clip_tokenizers import is_own
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import FastTokenizer, Tokenizer
from indiclip.types import Images

_CLEANS = "OpenCLIP repairs a text's encoding, puts it in NFC and joins its white space before it is read (ftfy)"
_CONFIG, _WEIGHTS, _TIMM = "open_clip_config.json", "open_clip_model.safetensors", "timm"


_LOAD = """\
import open_clip
model, _, transform = open_clip.create_model_and_transforms("local-dir:{out}")
"""
# Where timm has no name for the tower: its description is then found wherever the folder lies.
_LOAD_ANYWHERE = """\
import json, open_clip
vision = json.load(open("{out}/open_clip_config.json"))["model_cfg"]["vision_cfg"]
vision["timm_model_name"] = "local-dir:{out}/timm"
model, _, transform = open_clip.create_model_and_transforms("local-dir:{out}", vision_cfg=vision)
"""
_USE = """\
tokenizer = open_clip.get_tokenizer("local-dir:{out}")
image = model.eval().encode_image(transform(picture).unsqueeze(0), normalize=True)  # of a PIL image
print(image @ model.encode_text(tokenizer(["a kite", "a drum"]), normalize=True).T)"""


class Target(target.Target):
    """See the module."""

    library_name = "open_clip"
    bound = 1e-5
    libraries = ("open_clip_torch", "timm", "transformers")
    usage = _LOAD + _USE

    def check(self, encoder: Encoder) -> list[Loss]:
        losses = [] if open_clip_towers.is_clip_vision(encoder) else _timm_losses(encoder)
        return losses + open_clip_towers.text_losses(encoder) + _tokenizer_losses(encoder.text.tokenizer)

    def write(self, encoder: Encoder, folder: Path, place: Path) -> None:
        text_cfg, words = open_clip_towers.text_tower(encoder)
        if open_clip_towers.is_clip_vision(encoder):
            vision_cfg, image = open_clip_towers.vision_tower(encoder)
        else:
            vision_cfg, image = _timm_tower(encoder, folder, place)
        H, W = own_grid(encoder)
        size = [H * encoder.backbone.patch_size, W * encoder.backbone.patch_size]
        vision_cfg["image_size"] = size[0] if size[0] == size[1] else size
        text_cfg |= _write_tokenizer(encoder.text, folder, place)
        mean, std = list(encoder.backbone.mean), list(encoder.backbone.std)
        model_cfg: dict[str, Any] = {"embed_dim": encoder.embed_dim, "custom_text": True}
        model_cfg |= {"quick_gelu": text_cfg.pop("quick_gelu"), "vision_cfg": vision_cfg, "text_cfg": text_cfg}
        tensors = {f"visual.{name}": tensor for name, tensor in image.items()}
        tensors |= {f"text.{name}": tensor for name, tensor in words.items()}
        tensors["logit_scale"] = torch.tensor(encoder.initial_logits.get("logit_scale", 0.0))
        if "logit_bias" in encoder.initial_logits:
            model_cfg["init_logit_bias"] = 0.0
            tensors["logit_bias"] = torch.tensor(encoder.initial_logits["logit_bias"])
        preprocess = {
            "mean": mean,
            "std": std,
            "interpolation": encoder.backbone.interpolation,
            "resize_mode": "squash",
        }
        config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
        folder.joinpath(_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(whole, folder / _WEIGHTS, {"format": "pt"})
        if (folder / _TIMM).is_dir():
            self.usage = _LOAD_ANYWHERE + _USE

    def reload(self, encoder: Encoder, folder: Path) -> Reloaded:
        try:
            import open_clip
        except ImportError as error:
            raise ValueError("--to open_clip: OpenCLIP has to prove it: pip install open_clip_torch") from error
        name = f"local-dir:{folder}"
        config = json.loads(folder.joinpath(_CONFIG).read_text())
        cleaning = {} if _clean(encoder.text.tokenizer) else dict.fromkeys(UNUSUAL_TEXTS, _CLEANS)
        notes = [*set(cleaning.values())]
        if (folder / _TIMM).is_dir():
            notes.append(
                f"timm has no name for the image tower, and {_CONFIG} says where the folder is: after moving it, load "
                "it by the card's lines, or write its new path there (vision_cfg.timm_model_name)"
            )
        theirs, _, transform = open_clip.create_model_and_transforms(
            name, require_pretrained=True, vision_cfg=vision_cfg_of(folder, config)
        )
        theirs.eval()
        tokenizer = open_clip.get_tokenizer(name)
        H, W = own_grid(encoder)
        own_hw = (H * encoder.backbone.patch_size, W * encoder.backbone.patch_size)

        def image(images: Images) -> dict[str, Tensor]:
            if images["sizes_hw"][0] == own_hw:
                pictures = [Image.fromarray(unpatchify(images, i)) for i in range(len(images["sizes_hw"]))]
                pixels = torch.stack([transform(picture) for picture in pictures])
            else:
                pixels = to_timm.as_pixels(encoder.backbone.normalise(images), images)
            return {"embedding": F.normalize(theirs.encode_image(pixels), dim=-1)}

        def text(texts: list[str]) -> Tensor:
            return F.normalize(theirs.encode_text(tokenizer(texts)), dim=-1)

        cannot = {"mixed sizes, padded": "a batch of OpenCLIP has one size"} | cleaning
        if open_clip_towers.is_clip_vision(encoder):
            cannot |= dict.fromkeys(("smaller", "larger", "not square"), "OpenCLIP's own ViT takes one size")
        return Reloaded(image, text, cannot, notes=[*notes, stretching_note(*own_hw)])


def _clean(tokenizer: Tokenizer) -> str | None:
    """How OpenCLIP is to clean texts; None where the run's are not cleaned as OpenCLIP does it."""
    return tokenizer.open_clip_cleaning if isinstance(tokenizer, FastTokenizer) else None


def _tokenizer_losses(tokenizer: Tokenizer) -> list[Loss]:
    if is_own(tokenizer):
        return []
    return pad_losses(tokenizer) + ([] if _clean(tokenizer) else tokenizer_losses(tokenizer))


def _write_tokenizer(text: TextTower, folder: Path, place: Path) -> dict[str, Any]:
    """Its files, where it is not OpenCLIP's own. Returns what `text_cfg` says of it."""
    clean = _clean(text.tokenizer)
    cfg: dict[str, Any] = {"tokenizer_kwargs": {"clean": clean}} if clean else {}
    if is_own(text.tokenizer):
        return cfg
    transformers_tokenizer(text, folder, cleans=clean is not None).save_pretrained(folder)
    return cfg | {"hf_tokenizer_name": place.name}  # any name: OpenCLIP reads the tokenizer of the folder


def _timm_losses(encoder: Encoder) -> list[Loss]:
    losses = to_timm.Target().check(encoder)
    if not to_timm.pools_by_itself(encoder):
        found = encoder.image_pool.kind
        losses.append(Loss(f"pool: found {found!r}; OpenCLIP pools as timm does (pool: tower, or mean of a NaFlexViT)"))
    if _projection(encoder) is None:
        losses.append(Loss(f"image_projection: OpenCLIP has a matrix, or an mlp of hidden {2 * encoder.embed_dim}"))
    return losses


def _projection(encoder: Encoder) -> tuple[str, dict[str, Tensor]] | None:
    """What OpenCLIP calls it, and its tensors; None where it has none of its kind."""
    module: Any = encoder.image_projection
    if isinstance(module, nn.Identity):
        return "none", {}
    if (linear := linear_projection(module, encoder.backbone.pooled_width)) is not None:
        weight_ED, bias_E = linear
        return "linear", {"head.proj.weight": weight_ED} | ({} if bias_E is None else {"head.proj.bias": bias_E})
    first, _, last = module
    if first.out_features != 2 * encoder.embed_dim:
        return None
    found = {"head.mlp.fc1.weight": first.weight, "head.mlp.fc2.weight": last.weight}
    found["head.mlp.fc1.bias"] = torch.zeros(first.out_features) if first.bias is None else first.bias
    return "mlp", found | ({} if last.bias is None else {"head.mlp.fc2.bias": last.bias})


def _timm_tower(encoder: Encoder, folder: Path, place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    projection = _projection(encoder)
    assert projection is not None
    kind, head = projection
    described = to_timm.describe(encoder, classifier=False)
    name = described.name
    if isinstance(encoder.backbone, NaFlexViT) or described.args:
        (folder / _TIMM).mkdir()
        to_timm.write_config(described, encoder, folder / _TIMM)
        name = f"{LOCAL}{place.absolute() / _TIMM}"
    pool = ""
    if kind == "none":  # OpenCLIP names the pooling then, else it leaves the tower's
        pool = described.args.get("global_pool") or _own_pool(encoder)
    vision_cfg = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool, "timm_proj": kind}
    vision_cfg["timm_proj_bias"] = any(name.endswith(("proj.bias", "fc2.bias")) for name in head)
    return vision_cfg, {f"trunk.{name}": tensor for name, tensor in described.tensors.items()} | head


def _own_pool(encoder: Encoder) -> str:
    net: Any = encoder.backbone.net if isinstance(encoder.backbone, TimmBackbone) else encoder.backbone
    return str(getattr(net, "global_pool", None) or net.head.global_pool.pool_type)
