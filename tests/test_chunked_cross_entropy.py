"""Cross entropy in chunks: torch's own on whole logits, finite differences, and what is held at once."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from indiclip.chunked_cross_entropy import chunked_cross_entropy, chunks_as_on

TOKENS, WIDTH, IDS = 37, 8, 50


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    hidden_TD, table_VD = torch.randn(TOKENS, WIDTH, dtype=dtype), torch.randn(IDS, WIDTH, dtype=dtype)
    return hidden_TD.requires_grad_(), table_VD.requires_grad_(), torch.randint(IDS, (TOKENS,)), torch.rand(TOKENS)


@pytest.mark.parametrize("elements", [1, 4 * IDS + 7, TOKENS * IDS, None])
@pytest.mark.parametrize("has_bias", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(elements, has_bias):
    """Oracle: `F.cross_entropy` on all logits, in float64; chunks of one row, of four, and all at once."""
    hidden_TD, table_VD, targets_T, weights_T = inputs()
    bias_V = torch.randn(IDS, dtype=torch.float64, requires_grad=True) if has_bias else None
    trained = [x for x in (hidden_TD, table_VD, bias_V) if x is not None]
    expected_T = F.cross_entropy(F.linear(hidden_TD, table_VD, bias_V), targets_T, reduction="none")
    expected = torch.autograd.grad(3 * (expected_T * weights_T).sum(), trained)
    total, losses_T = chunked_cross_entropy(hidden_TD, table_VD, targets_T, weights_T, bias_V, elements)
    found = torch.autograd.grad(3 * total, trained)
    torch.testing.assert_close(losses_T, expected_T.detach())
    torch.testing.assert_close(total.detach(), (expected_T * weights_T).sum().detach())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
@pytest.mark.parametrize("elements", [4 * IDS + 7, None])
def test_targets_may_be_distributions(tokens, elements):
    """Of which each chunk asks for its own; oracle: `F.cross_entropy` of probabilities, in float64."""
    hidden_TD, table_VD, _, weights_T = inputs()
    hidden_TD, weights_T = hidden_TD.detach()[:tokens].requires_grad_(), weights_T[:tokens]
    targets_TV = torch.randn(tokens, IDS, dtype=torch.float64).softmax(1)
    expected_T = F.cross_entropy(hidden_TD @ table_VD.T, targets_TV, reduction="none")
    expected = torch.autograd.grad((expected_T * weights_T).sum(), (hidden_TD, table_VD))
    total, losses_T = chunked_cross_entropy(hidden_TD, table_VD, targets_TV.__getitem__, weights_T, elements=elements)
    torch.testing.assert_close(losses_T, expected_T.detach(), check_dtype=tokens > 0)
    torch.testing.assert_close(torch.autograd.grad(total, (hidden_TD, table_VD)), expected)


def test_gradients_are_the_differences_of_the_loss():
    hidden_TD, table_VD, targets_T, weights_T = inputs()

    def loss(hidden_TD, table_VD):
        return chunked_cross_entropy(hidden_TD, table_VD, targets_T, weights_T, elements=5 * IDS)[0]

    torch.autograd.gradcheck(loss, (hidden_TD, table_VD))


def test_it_is_torchs_chunked_operator():
    """Which torch has from 2.15 on."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no linear_cross_entropy")
    hidden_TD, table_VD, targets_T, _ = inputs(torch.float32)
    options = torch.nn.LinearCrossEntropyOptions()
    expected = F.linear_cross_entropy(hidden_TD, table_VD, targets_T, reduction="sum", options=options)
    total, _ = chunked_cross_entropy(hidden_TD, table_VD, targets_T, torch.ones(TOKENS))
    torch.testing.assert_close(total, expected)


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has which an operator makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_iter(out) if isinstance(x, torch.Tensor))])
        return out


def test_no_tensor_is_larger_than_a_chunk_and_the_inputs():
    """Forward and backward: 37 x 50 logits would be the largest, and are where torch computes them."""
    rows = 4
    for chunked, largest in ((True, IDS * WIDTH), (False, TOKENS * IDS)):
        hidden_TD, table_VD, targets_T, weights_T = inputs()
        with Largest() as found:
            if chunked:
                total, _ = chunked_cross_entropy(hidden_TD, table_VD, targets_T, weights_T, elements=rows * IDS)
            else:
                total = F.cross_entropy(hidden_TD @ table_VD.T, targets_T, reduction="sum")
            total.backward()
        assert found.numbers == largest
    assert rows * IDS < IDS * WIDTH < TOKENS * IDS


def test_what_stands_for_a_gpu_has_its_chunks():
    """As in a plan, which counts operators on the CPU: 20 rows of 50,000 logits at a time there, all on a GPU."""
    hidden_TD, table_VD = torch.zeros(400, 1), torch.zeros(50_000, 1)
    targets_T, weights_T = torch.zeros(400, dtype=torch.long), torch.zeros(400)
    with Largest() as on_cpu, chunks_as_on("cpu"):
        chunked_cross_entropy(hidden_TD, table_VD, targets_T, weights_T)
    with Largest() as on_gpu, chunks_as_on("cuda"):
        chunked_cross_entropy(hidden_TD, table_VD, targets_T, weights_T)
    assert (on_cpu.numbers, on_gpu.numbers) == (20 * 50_000, 400 * 50_000)


def test_in_half_precision_the_loss_is_summed_in_float32():
    """The product is rounded as autocast rounds any; the rest is that of float32."""
    hidden_TD, table_VD, targets_T, weights_T = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, losses_T = chunked_cross_entropy(hidden_TD, table_VD, targets_T, weights_T, elements=4 * IDS)
        logits_TV = F.linear(hidden_TD, table_VD)
    assert logits_TV.dtype == torch.bfloat16
    assert total.dtype == losses_T.dtype == torch.float32
    torch.testing.assert_close(losses_T, F.cross_entropy(logits_TV.float(), targets_T, reduction="none").detach())
    total.backward()
    expected_T = F.cross_entropy(hidden_TD.detach() @ table_VD.detach().T, targets_T, reduction="none")
    assert (losses_T - expected_T).abs().max() < 0.05  # eight bits of logits up to 8
    assert table_VD.grad.dtype == torch.float32


def test_float16_keeps_the_gradients_of_improbable_ids():
    """Which are below its smallest number before they are scaled; oracle: float64."""
    hidden_TD, table_VD, targets_T, weights_T = inputs()
    table_VD = (table_VD.detach().repeat(100, 1) / 4).requires_grad_()
    weights_T = weights_T / 1000
    expected_T = F.cross_entropy(hidden_TD @ table_VD.T, targets_T, reduction="none")
    expected = torch.autograd.grad((expected_T * weights_T).sum(), (hidden_TD, table_VD))
    inputs_32 = [x.detach().float().requires_grad_() for x in (hidden_TD, table_VD)]
    with torch.autocast("cpu", torch.float16):
        total, _ = chunked_cross_entropy(*inputs_32, targets_T, weights_T.float(), elements=4 * IDS)
    found = torch.autograd.grad(2**16 * total, inputs_32)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() / 2**16 - theirs).norm() < 1e-3 * theirs.norm()  # ten bits of logits up to 4
