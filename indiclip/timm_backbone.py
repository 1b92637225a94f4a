"""Any image model of timm as a backbone.

Shape letters: see `indiclip.types`; C channels of a feature map.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

import timm
import torch
from timm.layers.norm import LayerNorm2d, RmsNorm
from timm.models import is_model_in_modules
from torch import Tensor, nn

from indiclip.backbone import CanvasBackbone, check_keeps_patches, check_timm_name, join_prefix, split_prefix
from indiclip.preprocessing import Interpolation
from indiclip.types import Features


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
        check_keeps_patches(self.net)
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
            prefix_BKD, tokens_BND = split_prefix(raw, getattr(self.net, "num_prefix_tokens", 0))
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
