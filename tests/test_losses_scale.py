"""What the contrastive losses cost at many pairs and many ranks: operators, memory, and the precision of bfloat16."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from indiclip.losses import SigmoidLoss, SoftmaxLoss

pytest.importorskip("open_clip")
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import bench_losses

BOTH = pytest.mark.parametrize("loss_class", [SoftmaxLoss, SigmoidLoss])


@BOTH
def test_operators_of_a_step_do_not_grow_with_the_ranks(loss_class):
    counts = [bench_losses.launches(loss_class, world) for world in (8, 64, 512)]
    # Two blocks of texts at 8 ranks, eight from 32 on; the ring of 512 ranks had 106,000 operators.
    assert counts[1] == counts[2] < 5 * counts[0]
    assert counts[2] < {SoftmaxLoss: 800, SigmoidLoss: 400}[loss_class]


@BOTH
@pytest.mark.parametrize(("num_pairs", "most_mib"), [(2048, 27.8 / 2), (8192, 304.0 / 8)])
def test_peak_memory_beside_that_of_open_clips_chunked_sigmoid(loss_class, num_pairs, most_mib):
    """Theirs at E = 256 in chunks of 256, the smallest of 256 to 2,048: measured with `tools/bench_losses.py`."""
    loss = loss_class()
    embeddings = [torch.randn(num_pairs, 256).requires_grad_() for _ in range(2)]
    keys = [torch.randint(1000, (num_pairs,)) for _ in range(2)]
    loss(*embeddings, *keys).backward()  # allocates the gradients of the leaves
    assert bench_losses.peak_mib(lambda: loss(*embeddings, *keys)) <= most_mib


class _Floats(TorchDispatchMode):
    """Notes the precision of every floating-point result with rows and columns of logits."""

    def __init__(self, num_pairs):
        super().__init__()
        self.num_pairs, self.found = num_pairs, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        logits = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.shape == (self.num_pairs,) * 2]
        self.found |= {x.dtype for x in logits if x.is_floating_point()}
        return result


@BOTH
def test_logits_are_float32_under_bfloat16(loss_class):
    loss = loss_class()
    embeddings = [torch.randn(24, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16), _Floats(24) as floats:
        value = loss(*embeddings, torch.arange(24) // 2)
        value.backward()
    assert floats.found == {torch.float32}
    assert value.dtype == loss.pair_losses_B.dtype == torch.float32
