"""What attends within packed sequences gives what attention with a block-diagonal mask gives."""

import pytest
import torch
import torch.nn.functional as F
from processes import alone
from test_compile import step, steps_without_compiling, towers
from torch.nn.attention.flex_attention import create_block_mask

from indiclip import flex
from indiclip.grouped_attention import attend_as_operator
from indiclip.packing import Packing
from indiclip.sharding import compile_blocks

LENGTHS = [[5, 3, 9, 3, 1], [4, 4], [7], [64, 63, 62, 10]]
LONG = [300, 1, 128, 127, 5, 200]
BOTH = pytest.mark.parametrize("is_causal", [False, True])


def qkv(lengths, dtype=torch.float64, channels=8, device="cpu"):
    torch.manual_seed(0)
    shape = (1, 2, sum(lengths), channels)
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for _ in range(3)]


def block_diagonal(inputs, lengths, is_causal):
    parts = [torch.ones(n, n).tril() if is_causal else torch.ones(n, n) for n in lengths]
    mask = torch.block_diag(*parts).bool().to(inputs[0].device)
    return F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3)


def with_gradients(inputs, out):
    return [out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[-1], device=out.device)).sum(), inputs)]


def packed(x_1HTC):
    return x_1HTC[0].transpose(0, 1)


@pytest.mark.parametrize("lengths", LENGTHS)
@BOTH
def test_the_operator_of_compiled_blocks(lengths, is_causal):
    """In float64, gradients too."""
    inputs, packing = qkv(lengths), Packing(lengths, max(lengths), torch.device("cpu"))
    out_THC, _ = attend_as_operator(*map(packed, inputs), packing.starts_on_host, is_causal, 0.3)
    expected = with_gradients(inputs, block_diagonal(inputs, lengths, is_causal))
    torch.testing.assert_close(with_gradients(inputs, out_THC.transpose(0, 1)[None]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@alone("inductor")
def test_the_operator_is_what_it_tells_the_compiler(tmp_path, dtype):
    """By torch's own check: schema, shapes and types of what it gives, gradients."""
    inputs, packing = qkv([5, 3, 9], dtype), Packing([5, 3, 9], 9, torch.device("cpu"))
    torch.library.opcheck(attend_as_operator, (*map(packed, inputs), packing.starts_on_host, False, None))


@pytest.mark.parametrize("lengths", LENGTHS)
@BOTH
def test_rows_with_padding(lengths, is_causal):
    """What compiled blocks with dropout do, here without."""
    inputs, packing = qkv(lengths), Packing(lengths, max(lengths) + 2, torch.device("cpu"))
    out_THC = packing._padded(*map(packed, inputs), is_causal, scale=0.3)
    expected = with_gradients(inputs, block_diagonal(inputs, lengths, is_causal))
    torch.testing.assert_close(with_gradients(inputs, out_THC.transpose(0, 1)[None]), expected)


@pytest.mark.parametrize("lengths", [*LENGTHS, LONG, [128, 128], [1] * 130])
def test_the_blocks_that_flex_attention_visits_are_those_that_torch_finds(lengths):
    """Against its own function, which compares all tokens with all. Causal ones are among them."""
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tables = flex.block_tables(starts, torch.device("cpu"))
    for is_causal in (False, True):
        ours = tables.mask(is_causal)
        theirs = create_block_mask(ours.mask_mod, None, None, starts[-1], starts[-1], device="cpu")
        visited, expected = ours.to_dense(), theirs.to_dense()
        assert bool((visited >= expected).all()) if is_causal else torch.equal(visited, expected)
    assert torch.equal(visited, visited.transpose(-2, -1))  # so that queries and keys have one table


@pytest.mark.slow
@alone("inductor")
def test_flex_attention_without_gradients(tmp_path):
    """On a CPU torch has none; in float32, of many lengths, by one compiled function."""
    for lengths in (LONG, [64, 63, 62, 10], [40, 500]):
        tables = flex.block_tables(Packing(lengths, max(lengths), torch.device("cpu")).starts, torch.device("cpu"))
        inputs = [x.detach() for x in qkv(lengths, torch.float32, 32)]
        for is_causal in (False, True):
            found = flex.attend(*inputs, tables, is_causal, 0.3, False)
            torch.testing.assert_close(found, block_diagonal(inputs, lengths, is_causal), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@alone("eager")
def test_flex_attention_in_compiled_blocks(tmp_path):
    """The masks of another batch compile nothing again; on a CPU in its place, without gradients.

    Only batches of a single block, of 128 tokens, are another case.
    """

    def attend(packing, q, k, v, is_causal=False, dropout_p=0.0, scale=None):
        return flex.attend(q, k, v, packing.tables, is_causal, scale, False)

    def begin(packing, lengths, *others):
        before(packing, lengths, *others)
        packing.tables = flex.block_tables(packing.starts, torch.device("cpu"))

    eager, compiled = towers(), towers()
    compile_blocks(compiled)
    with torch.no_grad():
        expected = [step(eager, seed, 20) for seed in range(2)]
        before, Packing.__init__, Packing.attend = Packing.__init__, begin, attend
        found = [step(compiled, seed, 20) for seed in range(2)]
        steps_without_compiling(compiled, range(2, 40), (16, 30))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["images"], other["images"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one["texts"], other["texts"], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@BOTH
def test_flex_attention_on_a_gpu(is_causal, monkeypatch):
    """In float32 without TF32, gradients too."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    device = torch.device("cuda")
    inputs, packing = qkv(LONG, torch.float32, 32, device), Packing(LONG, max(LONG), device)
    assert packing.tables is not None
    found = with_gradients(inputs, packing.attend(*inputs, is_causal=is_causal, scale=0.3))
    expected = with_gradients(inputs, block_diagonal(inputs, LONG, is_causal))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@BOTH
def test_varlen_attention_is_no_further_from_float64_than_torchs(is_causal):
    """In bfloat16; the errors of both are of one size, so that twice torch's is allowed."""
    device = torch.device("cuda")
    exact = qkv(LONG, torch.float64, 32, device)
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in low]
    packing = Packing(LONG, max(LONG), device)
    expected = with_gradients(exact, block_diagonal(exact, LONG, is_causal))
    torchs = with_gradients(low, block_diagonal(low, LONG, is_causal))
    found = with_gradients(low, packing.attend(*low, is_causal=is_causal, scale=0.3))
    for ours, theirs, right in zip(found, torchs, expected, strict=True):
        assert (ours - right).norm() <= 2 * (theirs - right).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_compiled_towers_on_a_gpu(precision):
    """After two batches none compiles again, with varlen attention and with flex attention."""
    pair = towers().cuda()
    compile_blocks(pair)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        for seed in range(2):
            step(pair, seed, 20)
        steps_without_compiling(pair, range(2, 200), (16, 30))
