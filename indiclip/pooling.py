"""From the vectors of a tower's tokens to one vector in the common space.

Shape letters: see `indiclip.types`.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from indiclip.distributed import mean_over_ranks, rank_and_world
from indiclip.names import check_choice

ImagePool = Literal["attention", "mean", "tower"]
TextPool = Literal["attention", "mean", "class", "eos", "last", "pooler"]


@dataclass(frozen=True)
class Projection:
    """What brings a pooled vector of width D into the common space of length E.

    Args:
        kind: `linear` is a matrix; `mlp` two of them with a GELU between; `none` leaves the vector as it is.
        bias: Whether the last matrix has one.
        hidden: Width between the two of an `mlp`.
        hidden_bias: Whether the first of the two has a bias.
    """

    kind: Literal["linear", "mlp", "none"] = "linear"
    bias: bool = False
    hidden: int | None = None
    hidden_bias: bool = False

    def module(self, width: int, embed_dim: int) -> nn.Module:
        """A new one. Raises ValueError where its options do not go together."""
        check_choice("encoder.projection.kind", self.kind, ("linear", "mlp", "none"))
        if self.kind == "none":
            if width != embed_dim:
                raise ValueError(
                    f"encoder.embed_dim: found {embed_dim}; without a projection expected {width}, the tower's"
                )
            return nn.Identity()
        if self.kind == "linear":
            return nn.Linear(width, embed_dim, self.bias)
        if self.hidden is None:
            raise ValueError("encoder.projection.hidden: an mlp needs its width")
        first = nn.Linear(width, self.hidden, self.hidden_bias)
        return nn.Sequential(first, nn.GELU(), nn.Linear(self.hidden, embed_dim, self.bias))


class Pool(nn.Module):
    """Valid tokens -> one vector.

    Args:
        width: Of the tokens.
        kind: `attention` lets one learned query attend to them (timm's attention pooling); `mean` is their mean. For
            images, `tower` is the backbone's own (class token, attention pool, ...). For texts, `class` is the first
            token, `eos` the last of the text, `last` the last position of texts that are all padded to one length, and
            `pooler` the first token through a dense layer and tanh (BERT, LaBSE).
        batch_norm: Normalise each channel over the batch. New towers give nearly the same vector for everything
            (cosines above 0.9), and short training from scratch spends most of its steps on leaving that; batch norm
            takes what is common away. The statistics are those of all ranks.
    """

    def __init__(self, width: int, kind: str = "attention", batch_norm: bool = False) -> None:
        super().__init__()
        check_choice("encoder.pool", kind, dict.fromkeys(get_args(ImagePool) + get_args(TextPool)))
        self.kind = kind
        num_heads = max(1, width // 64)
        num_heads = num_heads if width % num_heads == 0 else 1
        self.pool = AttentionPoolLatent(width, num_heads=num_heads) if kind == "attention" else None
        self.dense = nn.Linear(width, width) if kind == "pooler" else None
        self.norm = nn.BatchNorm1d(width, affine=False) if batch_norm else None

    def forward(self, tokens_BND: Tensor, valid_BN: Tensor | None) -> Tensor:
        """(B, D) before batch norm."""
        if self.pool is not None:
            mask = None if valid_BN is None else valid_BN[:, None, None, :]
            return cast(Tensor, self.pool(tokens_BND, attn_mask=mask))
        if self.kind == "class":
            return tokens_BND[:, 0]
        if self.dense is not None:
            return torch.tanh(self.dense(tokens_BND[:, 0]))
        if self.kind == "last" or (self.kind == "eos" and valid_BN is None):
            return tokens_BND[:, -1]
        if self.kind == "eos":
            assert valid_BN is not None
            return tokens_BND[torch.arange(tokens_BND.shape[0], device=tokens_BND.device), valid_BN.sum(1) - 1]
        if valid_BN is None:
            return tokens_BND.mean(1)
        share_BN = valid_BN / valid_BN.sum(1, keepdim=True)
        return torch.einsum("bnd,bn->bd", tokens_BND, share_BN.to(tokens_BND.dtype))

    def normalise(self, pooled_BD: Tensor, batch_statistics: bool = True) -> Tensor:
        """Batch norm, where there is one."""
        if self.norm is None:
            return pooled_BD
        number = len(pooled_BD) * rank_and_world()[1]
        if self.training and batch_statistics and number > 1:  # one vector has no variance
            return _normalise_over_ranks(self.norm, pooled_BD, number)
        # Copies: a later batch of the same step may change the statistics before the backward pass reads them.
        mean_D, var_D = cast(Tensor, self.norm.running_mean).clone(), cast(Tensor, self.norm.running_var).clone()
        return F.batch_norm(pooled_BD, mean_D, var_D, eps=self.norm.eps)


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The buffers of batch norm, which a forward pass in training changes."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


def _normalise_over_ranks(norm: Any, x_BD: Tensor, number: int) -> Tensor:
    """What `norm` would make of the rows of all ranks, in float32 or above; torch's SyncBatchNorm is for GPUs alone."""
    x_BD = x_BD.to(torch.promote_types(x_BD.dtype, torch.float32))
    mean_D = mean_over_ranks(x_BD.mean(0))
    centred_BD = x_BD - mean_D
    var_D = mean_over_ranks(centred_BD.square().mean(0))
    with torch.no_grad():
        norm.num_batches_tracked += 1
        # None is a cumulative mean, which StochasticWeightAveraging asks for.
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean_D.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_((var_D * number / (number - 1)).to(norm.running_var.dtype), momentum)
    normalised_BD: Tensor = centred_BD * (var_D + norm.eps).rsqrt()
    return normalised_BD
