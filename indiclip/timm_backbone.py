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

from indiclip.backbone import join_prefix, split_prefix
from indiclip.canvas_backbone import CanvasBackbone
from indiclip.names import check_range
from indiclip.preprocessing import Interpolation
from indiclip.timm_errors import check_keeps_patches, check_rates, check_timm_name, making, reworded
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
        }
        options = dict(options or {})
        check_rates(options)
        self.net = at_canvas(name, (canvas_hw[0], canvas_hw[1]), pretrained, options)
        if not is_model_in_modules(name, ["fastvit"]):  # whose backward pass crashes in this layout on the CPU
            self.net.to(memory_format=torch.channels_last)  # the layout of the fast convolutions, on CPU and GPU
        self._check_kind()
        check_keeps_patches(self.net)
        stages = self.net.feature_info
        check_range({"model.encoder.backbone.feature_index": feature_index}, -len(stages), len(stages) - 1)
        self.stage_index = range(len(stages))[feature_index]
        self.is_last_stage = self.stage_index == len(stages) - 1
        self.stride = int(stages[self.stage_index]["reduction"])
        self._is_pooled = True
        if not self.is_last_stage:
            self.remove_pool()
        raw = self._first_features(options)
        self._is_map = raw.ndim == 4  # else a sequence of tokens
        self.width = raw.shape[-1]
        self.pooled_width = int(self.net.head_hidden_size) if self.is_last_stage else self.width
        self._grid_hw = (raw.shape[1], raw.shape[2]) if self._is_map else self._grid_of(raw)
        config = self.net.pretrained_cfg
        self._set_interpolation(interpolation, config)
        self._set_normalisation(mean or config["mean"], std or config["std"])

    def read_pixels(self, pixels: Tensor) -> Features:
        """Features of normalised pixels (B, 3, height, width) that fill the canvas."""
        raw = self._read(pixels)
        if self._is_map:
            return self._whole_grid(raw.flatten(1, 2), (raw.shape[1], raw.shape[2]))
        prefix_BKD, tokens_BND = split_prefix(raw, self._num_prefix)
        return self._whole_grid(tokens_BND, self._grid_hw, prefix_BKD)

    def _read(self, pixels: Tensor) -> Any:
        """What the model gives of pixels, before its pooling: tokens (B, K + N, D), or a map (B, H, W, D)."""
        if not self.is_last_stage:
            kept = [self.stage_index]
            (map_BDHW,) = self.net.forward_intermediates(pixels, indices=kept, intermediates_only=True)
            return map_BDHW.permute(0, 2, 3, 1)
        raw = self.net.forward_features(pixels)
        if isinstance(raw, Tensor) and raw.ndim == 4 and self.is_channels_first:
            raw = raw.permute(0, 2, 3, 1)
        return raw if self._is_pooled else self._normalised(raw)

    def _first_features(self, options: dict[str, Any]) -> Tensor:
        """Those of an empty canvas.

        Raises:
            ValueError: The model cannot read the canvas, or gives neither a map nor tokens.
        """
        name, canvas = self._args["name"], self._args["canvas_hw"]
        problem = f"model.encoder.backbone.canvas_hw: {name} cannot read images of {canvas}"
        if options:
            keys = "model.encoder.backbone.options, model.encoder.backbone.canvas_hw"
            problem = f"{keys}: {name} of {options} cannot read images of {canvas}"
        self.eval()  # batch norm in training wants more than one value
        with torch.no_grad(), reworded(problem):
            raw = self._read(next(self.net.parameters()).new_zeros(1, 3, *self.canvas_hw))
        self.train()
        if not isinstance(raw, Tensor) or raw.ndim not in (3, 4):
            found = type(raw).__name__ if not isinstance(raw, Tensor) else f"a tensor of {raw.ndim} dimensions"
            raise ValueError(
                f"model.encoder.backbone.name: {name} gives {found}; expected one map, or one row of tokens"
            )
        return raw

    def _grid_of(self, tokens_BKD: Tensor) -> tuple[int, int]:
        """Rows and columns of the tokens, which do not show in them.

        Raises:
            ValueError: There are fewer or more, as where timm cuts off pixels at the right and below.
        """
        name, canvas, stride = self._args["name"], self._args["canvas_hw"], self.stride
        H, W = (ceil(side / stride) for side in self.canvas_hw)
        found, expected = tokens_BKD.shape[1] - self._num_prefix, H * W
        if found == expected:
            return H, W
        if any(side % stride for side in self.canvas_hw):
            raise ValueError(
                f"model.encoder.backbone.canvas_hw: found {canvas}, of which {name} gives {found} tokens; expected "
                f"multiples of its stride {stride}"
            )
        raise ValueError(
            f"model.encoder.backbone.name: {name} gives {found} tokens of {canvas}; expected {expected}, by its "
            f"stride {stride}"
        )

    @property
    def _num_prefix(self) -> int:
        return int(getattr(self.net, "num_prefix_tokens", 0))

    def _normalised(self, raw: Tensor) -> Tensor:
        """With the norms that the model has behind its pooling, for an encoder that pools by itself."""
        for norm in (getattr(self.net, "fc_norm", None), getattr(getattr(self.net, "head", None), "norm", None)):
            if isinstance(norm, LayerNorm2d):
                raw = norm(raw.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            elif isinstance(norm, nn.LayerNorm | RmsNorm):
                raw = norm(raw)
        return raw

    def check_pool(self) -> None:
        """Raise ValueError where the model has no pooling of its own."""
        H, W = self._grid_hw
        raw = torch.zeros(1, self._num_prefix + H * W, self.width, device=self.mean_P.device)
        prefix_BKD, tokens_BND = split_prefix(raw, self._num_prefix)
        self.pool(self._whole_grid(tokens_BND, (H, W), prefix_BKD))

    def _check_kind(self) -> None:
        for part in ("feature_info", "forward_features", "forward_head", "num_features", "head_hidden_size"):
            if not hasattr(self.net, part):
                kind = type(self.net).__name__
                raise ValueError(
                    f"model.encoder.backbone.name: {self._args['name']} is a {kind} without {part}; expected an "
                    "image model with it"
                )

    @property
    def is_channels_first(self) -> bool:
        return getattr(self.net, "output_fmt", "NCHW") == "NCHW"

    def pool(self, features: Features) -> Tensor:
        if not self.is_last_stage:
            raise ValueError(
                "encoder.pool: a backbone with feature_index has no pooling of its own; expected mean or attention"
            )
        raw = join_prefix(features)
        if self._is_map:
            raw = raw.reshape(raw.shape[0], *features.grid_hw, -1)
            raw = raw.permute(0, 3, 1, 2) if self.is_channels_first else raw
        try:
            pooled_BD: Tensor = self.net.forward_head(raw, pre_logits=True)
        except (NotImplementedError, TypeError) as error:  # MobileNetV5's takes no pre_logits, to say that it is none
            raise ValueError(f"encoder.pool: {self._args['name']} has no pooling of its own ({error})") from error
        return pooled_BD

    def remove_pool(self) -> None:
        if not self._is_pooled:
            return
        head, fc_norm = getattr(self.net, "head", None), getattr(self.net, "fc_norm", None)
        head_norm = getattr(head, "norm", None)  # now: ConvNeXt's head drops it together with the classifier
        # HRNet's head joins its branches.
        is_joined = self.is_last_stage and is_model_in_modules(self._args["name"], ["hrnet"])
        if hasattr(self.net, "prune_intermediate_layers") and not is_joined:  # stages behind it would get no gradient
            self.net.prune_intermediate_layers([self.stage_index], prune_head=True)
        else:
            self.net.reset_classifier(0, "")
        if hasattr(head, "global_pool") or hasattr(head, "norm"):  # SelecSLS calls its last convolutions a head
            kept = nn.Module()  # of the head only its norm, by the same name
            kept.add_module("norm", None if hasattr(head, "fc1") else head_norm)  # InceptionNeXt's is behind an MLP
            self.net.head = kept
        if self.is_last_stage and fc_norm is not None:
            self.net.fc_norm = fc_norm
        elif not self.is_last_stage and head is not None:
            self.net.head = nn.Identity()
        self._is_pooled = False


def at_canvas(name: str, canvas_hw: tuple[int, int], pretrained: bool, options: dict[str, Any]) -> Any:
    """A timm model without classifier, for images of the canvas's size.

    Raises:
        ValueError: It cannot be made of the options, or not for that size.
    """
    config = timm.get_pretrained_cfg(name)
    own_hw = config.input_size[1:] if config else canvas_hw
    create = partial(timm.create_model, name, pretrained=pretrained, num_classes=0)
    refusal = None
    if "img_size" not in options and canvas_hw != own_hw:
        try:
            with reworded(f"model.encoder.backbone.canvas_hw: {name} cannot be made for images of {list(canvas_hw)}"):
                return create(img_size=canvas_hw, **options)
        except ValueError as error:
            refusal = error
    with making(name, options):  # which are at fault where it raises here too
        net = create(**options)
    if refusal is not None and not isinstance(refusal.__cause__, TypeError):  # it has the argument
        raise refusal
    return net
