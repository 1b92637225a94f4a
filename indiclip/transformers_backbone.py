"""Image models with stages as transformers has them: folders of Swin, ConvNeXt, FocalNet and ResNet.

DiNAT is not among them: transformers 5.23.0 gives natten height and width where it expects heads.

Shape letters: see `indiclip.types`; C channels of a feature map.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import transformers
from torch import Tensor

from indiclip.canvas_backbone import CanvasBackbone
from indiclip.names import check_choice
from indiclip.preprocessing import Interpolation
from indiclip.text import architecture_of
from indiclip.types import Features

KINDS = ("swin", "swinv2", "focalnet", "convnext", "convnextv2", "resnet")


class TransformersBackbone(CanvasBackbone):
    """An image model of transformers at one canvas size. Its pooling is the mean, behind which ConvNeXt has a norm.

    Args:
        architecture: A transformers configuration as a dict, `model_type` (one of `KINDS`) and its fields.
            `model.layer_decay` counts stages, not blocks.
        canvas_hw: Height and width in pixels of the images it gets; sources must give images no larger.
        patch_size: Side of the patches in which images travel here; must divide the canvas. It does not change the
            model.
        mean: Of the pixels' channels in 0..1.
        std: As `mean`.
        interpolation: How images are resized.

    Raises:
        ValueError: Another kind of model.
    """

    net: Any  # transformers models share no type that has what is used here

    def __init__(
        self,
        architecture: dict[str, Any],
        canvas_hw: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        interpolation: Interpolation = "bicubic",
    ) -> None:
        super().__init__()
        self._set_canvas(canvas_hw, patch_size)
        self._args = {"canvas_hw": list(canvas_hw), "patch_size": patch_size, "mean": list(mean), "std": list(std)}
        kind = str(architecture.get("model_type"))
        check_choice("model.encoder.backbone.architecture.model_type", kind, KINDS)
        fields = {name: value for name, value in architecture.items() if name != "model_type"}
        config: Any = transformers.CONFIG_MAPPING[kind](**fields)
        self.net = transformers.AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
        last = len(config.depths) - 1
        self.stride = getattr(config, "patch_size", 4) * 2**last  # ResNet's stem has 4
        self.width = int(config.embed_dim * 2**last if hasattr(config, "embed_dim") else config.hidden_sizes[last])
        self.pooled_width = self.width
        self._has_norm_behind = kind.startswith("convnext")
        self._is_pooled = True
        self._set_interpolation(interpolation, {})
        self._set_normalisation(mean, std)

    def read_pixels(self, pixels: Tensor) -> Features:
        raw: Tensor = self.net(pixels).last_hidden_state
        grid_hw = (ceil(self.canvas_hw[0] / self.stride), ceil(self.canvas_hw[1] / self.stride))
        if raw.ndim == 4:
            raw = raw.flatten(2).transpose(1, 2)
        if self._has_norm_behind and not self._is_pooled:
            raw = self.net.layernorm(raw)
        return self._whole_grid(raw, grid_hw)

    def pool(self, features: Features) -> Tensor:
        pooled_BD = features.tokens_BND.mean(1)
        return self.net.layernorm(pooled_BD) if self._has_norm_behind else pooled_BD

    def remove_pool(self) -> None:
        self._is_pooled = False

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this backbone without a network, weights aside."""
        return self._args | {"architecture": architecture_of(self.net.config)}
