"""Backbones: `Images` in, `Features` out.

`NaFlexViT` takes any width and height (padding and a mask). Those of `indiclip.canvas_backbone` take one size alone:
`indiclip.timm_backbone` wraps the other families of timm so, `indiclip.transformers_backbone` some of transformers.

Shape letters: see `indiclip.types`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from indiclip.naflex_models import named_naflex, new_naflex
from indiclip.names import check_choice, check_whole
from indiclip.packing import Packing, packed_attention, worth_packing
from indiclip.position_table import tell_places, whole_grids
from indiclip.preprocessing import Interpolation, Preprocessing
from indiclip.timm_errors import check_keeps_patches, check_rates, reworded
from indiclip.types import Features, Images


class Backbone(nn.Module, ABC):
    """What the encoder needs of an image model.

    Attributes:
        width: Token width D.
        pooled_width: Width of what `pool` gives.
        stride: Image pixels between neighbouring tokens of `Features`.
        patch_size: Side of the patches that the data pipeline cuts, in pixels.
        max_tokens: The token budget per image: no source may ask for more patches.
        canvas_hw: The one image size this backbone takes; None where any size goes.
        reads_parts: Whether it knows the places of an image's patches where others were dropped.
        mean: Of the channels red, green and blue, in 0..1; pixels are normalised with it.
        std: As `mean`.
        interpolation: How its images are resized.
        compiled: Whether its blocks are, see `indiclip.sharding.compile_blocks`.
        blocks: Those behind each of which it can give features, see `NaFlexViT.forward`; empty of most backbones.
    """

    width: int
    pooled_width: int
    stride: int
    patch_size: int
    max_tokens: int
    canvas_hw: tuple[int, int] | None = None
    reads_parts: bool = False
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"
    compiled: bool = False
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
        check_choice("model.encoder.backbone.interpolation", found, get_args(Interpolation))
        self.interpolation = found
        self._args["interpolation"] = found  # a later version of timm may say another one

    def _set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Keep the pixel statistics in the layout of a patch (channel last, so the three numbers repeat)."""
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(
                f"model.encoder.backbone.mean, backbone.std: found {list(mean)} and {list(std)}; expected three numbers"
            )
        self.mean, self.std = tuple(mean), tuple(std)
        self._args |= {"mean": list(mean), "std": list(std)}  # a later version of timm may say others
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

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return ()

    def block_number(self, block: int | None) -> int:
        """From 0 on, of a block that may be counted from the end; None is the last."""
        return len(self.blocks) - 1 if block is None else block % len(self.blocks)

    def blocks_behind(self, blocks: Sequence[int | None]) -> Sequence[nn.Module]:
        """The last ones, behind all of some that are given as for `block_number`."""
        if not self.blocks:
            return ()
        return self.blocks[max(map(self.block_number, blocks), default=-1) + 1 :]

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


class NaFlexViT(Backbone):
    """timm's NaFlexVit: any width and height within a token budget, aspect kept.

    Args:
        size: One of `indiclip.naflex_models.SIZES`, from scratch. Or None, with `name` or with `width`, `depth` and
            `num_heads`.
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
        check_whole({"model.encoder.backbone.max_tokens": max_tokens})
        self._args: dict[str, Any] = {"options": dict(options or {})}
        options = dict(options or {})
        check_rates(options)
        for side in options.get("pos_embed_grid_size") or ():
            check_whole({"model.encoder.backbone.options.pos_embed_grid_size": side})
        if (eps := options.pop("norm_eps", None)) is not None:
            options["norm_layer"] = partial(LayerNorm, eps=eps)
        given = {"size": size, "width": width, "depth": depth, "num_heads": num_heads}
        if name is not None:
            for key, value in given.items():
                if value is not None:
                    raise ValueError(f"model.encoder.backbone.{key}: {name} has its own; leave it out beside `name`")
            self.vit = named_naflex(name, pretrained, options)
        else:
            if pretrained:
                raise ValueError(
                    "model.encoder.backbone.pretrained: needs `name`, a timm model; a size alone is from scratch"
                )
            self.vit = new_naflex(size, width, depth, num_heads, patch_size, options)
        self._args |= given | {"name": name, "patch_size": patch_size, "max_tokens": max_tokens}
        self.patch_size = self.stride = int(self.vit.embeds.patch_size[0])
        self._check_options()
        self.width = self.pooled_width = int(self.vit.embed_dim)
        self.max_tokens = max_tokens
        config: dict[str, Any] = cast(Any, getattr(self.vit, "pretrained_cfg", None)) or {}
        self._set_interpolation(interpolation, config)
        grey = (0.5, 0.5, 0.5)
        self._set_normalisation(mean or config.get("mean", grey), std or config.get("std", grey))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*cast(nn.ModuleList, self.vit.blocks)]

    def forward(self, images: Images, blocks: Sequence[int] = ()) -> Features:
        """As of every backbone.

        Args:
            blocks: Numbers of blocks, ascending. The pass ends with the last of them, and `after` has the features
                behind each, through the model's last norm; none of them are the whole model.
        """
        p = self.patch_size
        grids = [(height // p, width // p) for height, width in images["sizes_hw"]]
        lengths = images["num_patches"]
        full = min(lengths) == images["patches_BNP"].shape[1]
        valid_BN = None if full else images["valid_BN"]  # attention without a mask is the faster kernel
        pixels_BNP = self.normalise(images)
        parts = any(rows * columns > length for (rows, columns), length in zip(grids, lengths, strict=True))
        if parts and not self.reads_parts:
            raise ValueError("backbone: found images with dropped patches; expected whole ones, see reads_parts")
        numbers, num_prefix = blocks or [len(self.blocks) - 1], self.vit.num_prefix_tokens
        parts_of: list[tuple[Tensor | None, Tensor, Tensor | None]]
        with whole_grids(grids, pixels_BNP.device) if parts else nullcontext():
            if worth_packing(lengths, self.compiled) and self._may_pack():
                packed, packing = self._packed(pixels_BNP, images["coords_BN2"], lengths, numbers)
                parts_of = [packing.split(x_1TD, num_prefix) for x_1TD in packed]
            else:
                padded = self._padded(pixels_BNP, images["coords_BN2"], valid_BN, numbers)
                parts_of = [(prefix_BKD, tokens_BND, None) for prefix_BKD, tokens_BND in padded]
        grid_hw = (max(rows for rows, _ in grids), max(columns for _, columns in grids))
        found = [
            Features(tokens, images["coords_BN2"], valid_BN, grid_hw, self.stride, prefix_BKD, rows_T)
            for prefix_BKD, tokens, rows_T in parts_of
        ]
        return replace(found[-1], after=dict(zip(blocks, found, strict=False)))

    def _padded(
        self, pixels_BNP: Tensor, coords_BN2: Tensor, valid_BN: Tensor | None, numbers: Sequence[int]
    ) -> list[tuple[Tensor | None, Tensor]]:
        """The prefix and the tokens behind each of the blocks with these numbers."""
        vit, num_prefix = self.vit, self.vit.num_prefix_tokens
        if [*numbers] == [len(self.blocks) - 1]:
            out = cast(Any, vit.forward_features(pixels_BNP, coords_BN2, valid_BN))
            return [split_prefix(out["patches"], num_prefix)]
        options = {"output_fmt": "NLC", "norm": True, "stop_early": True, "intermediates_only": True}
        inputs = {"patches": pixels_BNP, "patch_coord": coords_BN2, "patch_valid": valid_BN}
        found = cast(Any, vit.forward_intermediates)(inputs, [*numbers], return_prefix_tokens=True, **options)
        return [(of[1], of[0]) if num_prefix else (None, of) for of in found]

    def _may_pack(self) -> bool:
        """Whether the blocks may run on all images' tokens as one sequence, where each attends within its image."""
        drops = self.training and self._drops_rows
        # A block that timm runs again in the backward pass is run alone.
        return self._packs and not drops and not self.vit.grad_checkpointing and not torch.compiler.is_compiling()

    def _packed(
        self, pixels_BNP: Tensor, coords_BN2: Tensor, lengths: list[int], numbers: Sequence[int]
    ) -> tuple[list[Tensor], Packing]:
        """As `forward_features`, without padding between the images: (1, T, D) behind each of these blocks.

        Calls a private method of timm; tried with timm 1.0.31. `_check_options` finds where it gives another result.
        """
        x_BND = self.vit._forward_embeds(pixels_BNP, coords_BN2, None, None)["patches"]
        prefix = self.vit.num_prefix_tokens
        packing = Packing([prefix + length for length in lengths], x_BND.shape[1], x_BND.device)
        x_1TD = packing.pack(x_BND)
        found: list[Tensor] = []
        with packed_attention(packing):
            for number, block in enumerate(self.blocks[: numbers[-1] + 1]):
                x_1TD = block(x_1TD)
                if number in numbers:
                    found.append(self.vit.norm(x_1TD))
        return found, packing

    def pool(self, features: Features) -> Tensor:
        if not self.vit.global_pool:
            raise ValueError(
                "encoder.pool: the backbone has no pooling of its own; backbone.options.global_pool names one"
            )
        return self.vit.forward_head(join_prefix(features), pre_logits=True, patch_valid=features.valid_BN)

    def _check_options(self) -> None:
        """Raise ValueError unless the model keeps all patches and, in evaluation, reads them as they come here."""
        check_keeps_patches(self.vit)
        if not self.vit.embeds.channels_last:
            raise ValueError(
                "model.encoder.backbone.options.patchify_channels_last: found False; expected True, as patches are cut"
            )
        self._packs = self.vit.rope is None  # which turns by rows of a batch
        self.reads_parts = tell_places(self.vit.embeds) and self.vit.rope is None  # which wants whole grids
        self._drops_rows = any(isinstance(part, DropPath) for part in self.vit.modules())
        if next(self.parameters()).is_meta:
            return
        self.eval()
        pixels_22P = torch.linspace(-1, 1, 12 * self.patch_size**2).reshape(2, 2, -1)
        coords_222, valid_22 = (
            torch.tensor([[[0, 0], [0, 1]]]).repeat(2, 1, 1),
            torch.tensor([[True, True], [True, False]]),
        )
        with torch.no_grad(), reworded("model.encoder.backbone.options: timm's NaFlexVit cannot read patches"):
            padded = cast(Any, self.vit.forward_features(pixels_22P, coords_222, valid_22))["patches"]
            if self._packs:  # an attention that is not torch's own does not know where an image ends
                valid_2N = F.pad(valid_22, (self.vit.num_prefix_tokens, 0), value=True)
                (x_1TD,), packing = self._packed(pixels_22P, coords_222, [2, 1], [len(self.blocks) - 1])
                apart = (packing.unpack(x_1TD) - padded)[valid_2N]
                self._packs = bool(apart.abs().max() < 1e-3)
        self.train()

    def remove_pool(self) -> None:
        vit = self.vit
        if isinstance(vit.norm, nn.Identity):
            vit.norm = vit.fc_norm
        vit.fc_norm = nn.Identity()
        vit.reset_classifier(0, "")


def split_prefix(tokens: Tensor, num_prefix: int) -> tuple[Tensor | None, Tensor]:
    """Class and register tokens, and those of the patches."""
    return (tokens[:, :num_prefix] if num_prefix else None), tokens[:, num_prefix:]


def join_prefix(features: Features) -> Tensor:
    if features.prefix_BKD is None:
        return features.tokens_BND
    return torch.cat([features.prefix_BKD, features.tokens_BND], 1)
