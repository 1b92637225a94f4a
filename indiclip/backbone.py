"""Backbones: `Images` in, `Features` out.

`NaFlexViT` takes any width and height (padding and a mask). `TimmBackbone` wraps every other timm family at one canvas
size, `indiclip.transformers_backbone` some of transformers.

Shape letters: see `indiclip.types`; C channels of a feature map.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any, cast, get_args

import timm
import torch
from timm.layers.norm import LayerNorm, LayerNorm2d, RmsNorm
from timm.models import is_model_in_modules
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from indiclip.names import check_choice, did_you_mean
from indiclip.preprocessing import Interpolation, Preprocessing
from indiclip.types import Features, Images, on_device
from indiclip.vit_options import check_option_names, check_vit_options

# (width, depth, heads) of the sizes in the ViT, DeiT and "Getting ViT in Shape" (SoViT) papers.
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "so400m": (1152, 27, 16),
    "huge": (1280, 32, 16),
}


class Backbone(nn.Module, ABC):
    """What the encoder needs of an image model.

    Attributes:
        width: Token width D.
        pooled_width: Width of what `pool` gives.
        stride: Image pixels between neighbouring tokens of `Features`.
        patch_size: Side of the patches that the data pipeline cuts, in pixels.
        max_tokens: The token budget per image: no source may ask for more patches.
        canvas_hw: The one image size this backbone takes; None where any size goes.
        mean: Of the channels red, green and blue, in 0..1; pixels are normalised with it.
        std: As `mean`.
        interpolation: How its images are resized.
    """

    width: int
    pooled_width: int
    stride: int
    patch_size: int
    max_tokens: int
    canvas_hw: tuple[int, int] | None = None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"
    mean_P: Tensor
    std_P: Tensor
    _args: dict[str, Any]  # of the constructor

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the patches that this backbone takes."""
        return Preprocessing(self.patch_size, self.canvas_hw, self.interpolation)

    def _set_interpolation(self, chosen: Interpolation | None, config: Mapping[str, Any]) -> None:
        """Keep the chosen one, or else that of timm's config of a named model."""
        found = chosen or config.get("interpolation", "bilinear")
        check_choice("backbone.interpolation", found, get_args(Interpolation))
        self.interpolation = found
        self._args["interpolation"] = found  # a later version of timm may say another one

    def _set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Keep the pixel statistics in the layout of a patch (channel last, so the three numbers repeat)."""
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"backbone.mean, backbone.std: found {list(mean)} and {list(std)}; expected three numbers")
        self.mean, self.std = tuple(mean), tuple(std)
        pixels = self.patch_size**2
        self.register_buffer("mean_P", torch.tensor(list(mean)).repeat(pixels) * 255, persistent=False)
        self.register_buffer("std_P", torch.tensor(list(std)).repeat(pixels) * 255, persistent=False)

    def normalise(self, images: Images) -> Tensor:
        """uint8 patches -> zero mean and unit variance, (B, N, P).

        Raises:
            ValueError: Patches of another size than the backbone's.
        """
        patches_BNP = images["patches_BNP"]
        if patches_BNP.shape[-1] != len(self.mean_P):
            found = round((patches_BNP.shape[-1] / 3) ** 0.5)
            raise ValueError(f"data.patch_size: found {found}; expected {self.patch_size}, the backbone's")
        return (patches_BNP.to(self.mean_P.dtype) - self.mean_P) / self.std_P

    @abstractmethod
    def forward(self, images: Images) -> Features: ...

    @abstractmethod
    def pool(self, features: Features) -> Tensor:
        """One vector per image (B, pooled_width), by the model's own pooling and what it has behind that.

        Raises:
            ValueError: The model has none.
        """

    @abstractmethod
    def remove_pool(self) -> None:
        """Drop what only `pool` uses, for an encoder that pools by itself. A norm behind the pooling goes before it."""

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this backbone without a network, weights aside."""
        return self._args | {"pretrained": False}


class CanvasBackbone(Backbone):
    """A backbone that reads whole images of one size; a smaller one lies in the canvas's upper left corner."""

    canvas_hw: tuple[int, int]

    def _set_canvas(self, canvas_hw: Sequence[int], patch_size: int) -> None:
        """Keep the size of the canvas and of the patches in which images travel here."""
        if any(side % patch_size for side in canvas_hw):
            raise ValueError(
                f"backbone.canvas_hw: {list(canvas_hw)} must be multiples of backbone.patch_size {patch_size}"
            )
        self.canvas_hw = (int(canvas_hw[0]), int(canvas_hw[1]))
        self.patch_size = patch_size
        self.max_tokens = canvas_hw[0] * canvas_hw[1] // patch_size**2

    def _whole_grid(self, tokens_BND: Tensor, grid_hw: tuple[int, int], prefix_BKD: Tensor | None = None) -> Features:
        """Features of the tokens of all of the canvas, row by row."""
        rows_H, columns_W = (torch.arange(size, device=tokens_BND.device) for size in grid_hw)
        coords_BN2 = torch.cartesian_prod(rows_H, columns_W).expand(tokens_BND.shape[0], -1, -1)
        return Features(tokens_BND, coords_BN2, None, grid_hw, self.stride, prefix_BKD)

    @abstractmethod
    def read_pixels(self, pixels: Tensor) -> Features:
        """Features of normalised pixels (B, 3, height, width) that fill the canvas."""

    def _canvas(self, images: Images) -> Tensor:
        """Patches -> (B, 3, height, width), zeros (the mean colour) outside the images."""
        p = self.patch_size
        grid_hw = (self.canvas_hw[0] // p, self.canvas_hw[1] // p)
        cells = Features(self.normalise(images), images["coords_BN2"], images["valid_BN"], grid_hw, p)
        map_BPHW, _ = cells.map()
        B, _, H, W = map_BPHW.shape
        return map_BPHW.reshape(B, p, p, 3, H, W).permute(0, 3, 4, 1, 5, 2).reshape(B, 3, H * p, W * p)

    def forward(self, images: Images) -> Features:
        features = self.read_pixels(self._canvas(images))
        if any(size != self.canvas_hw for size in images["sizes_hw"]):
            sizes_B2 = on_device(images["sizes_hw"], features.coords_BN2.device)
            features.valid_BN = (features.coords_BN2 * self.stride < sizes_B2[:, None]).all(-1)
        return features


class NaFlexViT(Backbone):
    """timm's NaFlexVit: any width and height within a token budget, aspect kept.

    Args:
        size: One of SIZES, from scratch. Or None, with `name` or with `width`, `depth` and `num_heads`.
        name: A timm ViT, e.g. `vit_base_patch16_clip_224.openai`: its architecture, and its weights if `pretrained`.
        width: Token width, overrides the size's.
        depth: Number of blocks, overrides the size's.
        num_heads: Attention heads, overrides the size's.
        patch_size: Side of a patch in pixels (from scratch only; a named model has its own).
        pretrained: Load the named model's weights (from the hub or its local cache).
        max_tokens: Token budget per image.
        options: More arguments of timm's NaFlexVit, e.g. `{reg_tokens: 4, qk_norm: true, drop_path_rate: 0.1}`; and
            `norm_eps`, of all its norms.
        mean: Of the pixels' channels in 0..1; None is the named model's, else 0.5.
        std: As `mean`.
        interpolation: How images are resized; None is the named model's own, or bilinear.
    """

    def __init__(
        self,
        size: str | None = None,
        name: str | None = None,
        width: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        patch_size: int = 16,
        pretrained: bool = False,
        max_tokens: int = 1024,
        options: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: Interpolation | None = None,
    ) -> None:
        super().__init__()
        self._args: dict[str, Any] = {"options": dict(options or {}), "mean": mean, "std": std}
        options = dict(options or {})
        check_vit_options(options)
        if (eps := options.pop("norm_eps", None)) is not None:
            options["norm_layer"] = partial(LayerNorm, eps=eps)
        given = {"size": size, "width": width, "depth": depth, "num_heads": num_heads}
        if name is not None:
            for key, value in given.items():
                if value is not None:
                    raise ValueError(f"backbone.{key}: {name} has its own; leave it out beside `name`")
            self.vit = _named_naflex(name, pretrained, options)
        else:
            if pretrained:
                raise ValueError("backbone.pretrained: needs `name`, a timm model; a size alone is from scratch")
            self.vit = _new_naflex(size, width, depth, num_heads, patch_size, options)
        self._args |= given | {"name": name, "patch_size": patch_size, "max_tokens": max_tokens}
        self.patch_size = self.stride = int(self.vit.embeds.patch_size[0])
        self.width = self.pooled_width = int(self.vit.embed_dim)
        self.max_tokens = max_tokens
        config: dict[str, Any] = cast(Any, getattr(self.vit, "pretrained_cfg", None)) or {}
        self._set_interpolation(interpolation, config)
        grey = (0.5, 0.5, 0.5)
        self._set_normalisation(mean or config.get("mean", grey), std or config.get("std", grey))

    def forward(self, images: Images) -> Features:
        p = self.patch_size
        grids = [(height // p, width // p) for height, width in images["sizes_hw"]]
        N = images["patches_BNP"].shape[1]
        full = all(rows * columns == N for rows, columns in grids)
        valid_BN = None if full else images["valid_BN"]  # attention without a mask is the faster kernel
        pixels_BNP = self.normalise(images)
        out = cast(Any, self.vit.forward_features(pixels_BNP, images["coords_BN2"], valid_BN))
        prefix_BKD, tokens_BND = _split_prefix(out["patches"], self.vit.num_prefix_tokens)
        grid_hw = (max(rows for rows, _ in grids), max(columns for _, columns in grids))
        return Features(tokens_BND, images["coords_BN2"], valid_BN, grid_hw, self.stride, prefix_BKD)

    def pool(self, features: Features) -> Tensor:
        if not self.vit.global_pool:
            raise ValueError(
                "encoder.pool: the backbone has no pooling of its own; backbone.options.global_pool names one"
            )
        return self.vit.forward_head(join_prefix(features), pre_logits=True, patch_valid=features.valid_BN)

    def remove_pool(self) -> None:
        vit = self.vit
        if isinstance(vit.norm, nn.Identity):
            vit.norm = vit.fc_norm
        vit.fc_norm = nn.Identity()
        vit.reset_classifier(0, "")


class TimmBackbone(CanvasBackbone):
    """Any timm image model (ConvNeXt, Swin, FocalNet, hybrids with a convolutional stem) at one canvas size.

    Args:
        name: timm model name.
        canvas_hw: Height and width in pixels of the images it gets; sources must give images no larger.
        patch_size: Side of the patches in which images travel here; must divide the canvas. It does not change the
            model.
        pretrained: Load the named model's weights (from the hub or its local cache).
        feature_index: Which of the model's stages gives the features, -1 the last.
        options: More arguments of `timm.create_model`, e.g. `{depths: [2, 2, 6], dims: [48, 96, 192]}`, or
            `{drop_path_rate: 0.1}` for stochastic depth. `img_size` is the canvas where the model takes one.
        mean: Of the pixels' channels in 0..1; None is the named model's.
        std: As `mean`.
        interpolation: How images are resized; None is the model's own.
    """

    net: Any  # timm models share no type that has what is used here

    def __init__(
        self,
        name: str,
        canvas_hw: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        pretrained: bool = False,
        feature_index: int = -1,
        options: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: Interpolation | None = None,
    ) -> None:
        super().__init__()
        self._set_canvas(canvas_hw, patch_size)
        check_timm_name(name)
        self._args = {
            "name": name,
            "canvas_hw": list(canvas_hw),
            "patch_size": patch_size,
            "feature_index": feature_index,
            "options": options,
            "mean": mean,
            "std": std,
        }
        self.net = _at_canvas(name, (canvas_hw[0], canvas_hw[1]), pretrained, dict(options or {}))
        if not is_model_in_modules(name, ["fastvit"]):  # whose backward pass crashes in this layout on the CPU
            self.net.to(memory_format=torch.channels_last)  # the layout of the fast convolutions, on CPU and GPU
        self._check_kind()
        stages = self.net.feature_info
        self._index = feature_index % len(stages)
        self._is_last = self._index == len(stages) - 1
        self.width, self.stride = int(stages[self._index]["num_chs"]), int(stages[self._index]["reduction"])
        self.pooled_width = self.width
        self._is_map = True  # else a sequence of tokens
        self._is_pooled = True
        if self._is_last:  # what comes behind the last stage (a norm, a wider convolution) is of its features
            self.width, self.pooled_width = int(self.net.num_features), int(self.net.head_hidden_size)
        else:
            self.remove_pool()
        config = self.net.pretrained_cfg
        self._set_interpolation(interpolation, config)
        self._set_normalisation(mean or config["mean"], std or config["std"])

    def read_pixels(self, pixels: Tensor) -> Features:
        """Features of normalised pixels (B, 3, height, width) that fill the canvas."""
        raw = self._last_stage(pixels) if self._is_last else self._earlier_stage(pixels)
        prefix_BKD = None
        self._is_map = raw.ndim == 4
        if self._is_map:
            H, W = raw.shape[1:3]
            tokens_BND = raw.flatten(1, 2)
        else:
            prefix_BKD, tokens_BND = _split_prefix(raw, getattr(self.net, "num_prefix_tokens", 0))
            H, W = (ceil(side / self.stride) for side in self.canvas_hw)
        return self._whole_grid(tokens_BND, (H, W), prefix_BKD)

    def _last_stage(self, pixels: Tensor) -> Tensor:
        """All of the model before its pooling: tokens (B, K + N, D), or a map (B, H, W, D)."""
        raw: Tensor = self.net.forward_features(pixels)
        if not isinstance(raw, Tensor) or raw.ndim not in (3, 4):
            found = type(raw).__name__ if not isinstance(raw, Tensor) else f"a tensor of {raw.ndim} dimensions"
            raise ValueError(
                f"backbone.name: {self._args['name']} gives {found}; expected one map, or one row of tokens"
            )
        raw = raw.permute(0, 2, 3, 1) if raw.ndim == 4 and self.is_channels_first else raw
        return raw if self._is_pooled else self._normalised(raw)

    def _normalised(self, raw: Tensor) -> Tensor:
        """With the norms that the model has behind its pooling, for an encoder that pools by itself."""
        for norm in (getattr(self.net, "fc_norm", None), getattr(getattr(self.net, "head", None), "norm", None)):
            if isinstance(norm, LayerNorm2d):
                raw = norm(raw.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            elif isinstance(norm, nn.LayerNorm | RmsNorm):
                raw = norm(raw)
        return raw

    def check_features(self) -> None:
        """Raise ValueError where the model's features are no map or tokens of its stride and width, or it has no pool.

        Runs the whole model: cheap on the meta device.
        """
        height, width = self.canvas_hw
        raw = self._last_stage(torch.zeros(1, 3, height, width, device=self.mean_P.device))
        num_tokens = ceil(height / self.stride) * ceil(width / self.stride) + getattr(self.net, "num_prefix_tokens", 0)
        if raw.shape[-1] != self.width or (raw.ndim == 3 and raw.shape[1] != num_tokens):
            raise ValueError(
                f"backbone.name: {self._args['name']} gives features of shape {list(raw.shape[1:])}; expected "
                f"{[num_tokens, self.width]} by its stride {self.stride} and width {self.width}"
            )
        try:
            self.net.forward_head(raw.permute(0, 3, 1, 2) if raw.ndim == 4 and self.is_channels_first else raw)
        except NotImplementedError as error:
            raise ValueError(f"backbone.name: {self._args['name']} has no pooling of its own ({error})") from error

    def _check_kind(self) -> None:
        for part in ("feature_info", "forward_features", "forward_head", "num_features", "head_hidden_size"):
            if not hasattr(self.net, part):
                kind = type(self.net).__name__
                raise ValueError(
                    f"backbone.name: {self._args['name']} is a {kind} without {part}; expected an image model with it"
                )

    def _earlier_stage(self, pixels: Tensor) -> Tensor:
        (map_BDHW,) = self.net.forward_intermediates(pixels, indices=[self._index], intermediates_only=True)
        map_BHWD: Tensor = map_BDHW.permute(0, 2, 3, 1)
        return map_BHWD

    @property
    def is_channels_first(self) -> bool:
        return getattr(self.net, "output_fmt", "NCHW") == "NCHW"

    def pool(self, features: Features) -> Tensor:
        if not self._is_last:
            raise ValueError(
                "encoder.pool: a backbone with feature_index has no pooling of its own; expected mean or attention"
            )
        raw = join_prefix(features)
        if self._is_map:
            raw = raw.reshape(raw.shape[0], *features.grid_hw, -1)
            raw = raw.permute(0, 3, 1, 2) if self.is_channels_first else raw
        pooled_BD: Tensor = self.net.forward_head(raw, pre_logits=True)
        return pooled_BD

    def remove_pool(self) -> None:
        if not self._is_pooled:
            return
        head, fc_norm = getattr(self.net, "head", None), getattr(self.net, "fc_norm", None)
        head_norm = getattr(head, "norm", None)  # now: ConvNeXt's head drops it together with the classifier
        if hasattr(self.net, "prune_intermediate_layers"):  # stages behind it would get no gradient
            self.net.prune_intermediate_layers([self._index], prune_head=True)
        else:
            self.net.reset_classifier(0, "")
        if isinstance(head, nn.Module) and not isinstance(head, nn.Linear | nn.Identity):
            kept = nn.Module()  # of the head only its norm, by the same name
            kept.add_module("norm", head_norm)
            self.net.head = kept
        if self._is_last and fc_norm is not None:
            self.net.fc_norm = fc_norm
        elif not self._is_last and head is not None:
            self.net.head = nn.Identity()
        self._is_pooled = False


def _split_prefix(tokens: Tensor, num_prefix: int) -> tuple[Tensor | None, Tensor]:
    """Class and register tokens, and those of the patches."""
    return (tokens[:, :num_prefix] if num_prefix else None), tokens[:, num_prefix:]


def join_prefix(features: Features) -> Tensor:
    if features.prefix_BKD is None:
        return features.tokens_BND
    return torch.cat([features.prefix_BKD, features.tokens_BND], 1)


def check_timm_name(name: str, where: str = "backbone.name") -> None:
    """Raise ValueError with the nearest name unless timm knows the model, and the tag of its weights, if there is one.

    Args:
        name: `ARCHITECTURE` or `ARCHITECTURE.TAG`.
        where: What names it, for the message.
    """
    if not timm.is_model(name):
        raise ValueError(f"{where}: timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_models(f"{name.partition('.')[0]}*", pretrained=True)
        raise ValueError(f"{where}: timm has no weights {name!r}{did_you_mean(name, known)}") from error


def _new_naflex(
    size: str | None,
    width: int | None,
    depth: int | None,
    num_heads: int | None,
    patch_size: int,
    options: dict[str, Any],
) -> NaFlexVit:
    """From scratch; adds to `options` what is ours."""
    if size is not None:
        check_choice("backbone.size", size, SIZES)
    of_size = SIZES[size] if size else (None, None, None)
    width, depth, num_heads = width or of_size[0], depth or of_size[1], num_heads or of_size[2]
    if not (width and depth and num_heads):
        raise ValueError("backbone: give `size`, `name`, or all of `width`, `depth` and `num_heads`")
    if width % num_heads:
        raise ValueError(f"backbone.num_heads: {num_heads} does not divide the width {width}")
    # Grid sampling reads the position table at each token without waiting for the GPU. timm's plain start (normal,
    # 0.02) is made for wide models and learns several times slower in narrow ones than Xavier's, which big_vision uses.
    ours = {"pos_embed_use_grid_sample": True, "weight_init": "jax", "global_pool": "", "fc_norm": False}
    options |= ours | options
    check_option_names(options)
    sizes = {"patch_size": patch_size, "embed_dim": width, "depth": depth, "num_heads": num_heads, "num_classes": 0}
    try:
        return NaFlexVit(**cast(Any, sizes | options))
    except (AssertionError, KeyError, TypeError, ValueError) as error:  # timm asserts what a user may write
        raise ValueError(f"backbone.options: timm's NaFlexVit cannot be built with them: {error!r}") from error


def _named_naflex(name: str, pretrained: bool, options: dict[str, Any]) -> NaFlexVit:
    """A timm ViT by name as a NaFlexVit (timm converts the weights), without its classifier."""
    check_timm_name(name)
    if not is_model_in_modules(name, ["naflexvit"]):
        options = {"use_naflex": True} | options
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except TypeError as error:
        raise ValueError(f"backbone.name: {name!r} is no plain ViT; use indiclip.backbone.TimmBackbone") from error
    if not isinstance(model, NaFlexVit):
        raise ValueError(f"backbone.name: {name!r} is a {type(model).__name__}; use indiclip.backbone.TimmBackbone")
    if model.attn_pool is not None and is_model_in_modules(name, ["eva"]):
        model.pool_include_prefix = True  # Perception Encoder's pool attends to the class token, which timm leaves out
    return model


def _at_canvas(name: str, canvas_hw: tuple[int, int], pretrained: bool, options: dict[str, Any]) -> Any:
    """A timm model without classifier, for images of the canvas's size.

    Raises:
        ValueError: Its images have another size, which it cannot change.
    """
    config = timm.get_pretrained_cfg(name)
    own_hw = config.input_size[1:] if config else canvas_hw
    create = partial(timm.create_model, name, pretrained=pretrained, num_classes=0)
    try:
        if "img_size" not in options and canvas_hw != own_hw:
            try:
                return create(img_size=canvas_hw, **options)
            except TypeError as error:
                if config and config.fixed_input_size:
                    takes = f"{name} takes only {list(own_hw)}"
                    raise ValueError(f"backbone.canvas_hw: found {list(canvas_hw)}; {takes}") from error
        return create(**options)
    except NotImplementedError as error:
        raise ValueError(f"backbone.name: {name} is no image model to pool from ({error})") from error
