"""Towers on packed tokens give what they give on padded ones, where a mask keeps the images and texts apart."""

import random

import pytest
import torch
import torch.nn.functional as F
from helpers import batch_images, noise
from test_gradients import TEXTS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from indiclip import packing
from indiclip.backbone import NaFlexViT
from indiclip.grouped_attention import groups_of, padding
from indiclip.packing import Packing, packed_attention
from indiclip.sharding import checkpoint_activations
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer

SIZES = [(16, 16), (64, 48), (8, 80), (64, 48), (40, 24), (8, 8)]
OPTIONS = {
    "plain": {},
    "class and registers": {"class_token": True, "reg_tokens": 2},
    "norms and scales": {"qk_norm": True, "init_values": 0.1},
    "rope": {"rope_type": "axial", "pos_embed": "none"},
    "rope, prefix": {"rope_type": "axial", "pos_embed": "none", "class_token": True},
}
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [[5, 3, 9, 3, 1], [4, 4], [7], [64, 63, 62, 10]])
def test_attention_is_that_of_a_block_diagonal_mask(lengths, is_causal):
    """In float64; gradients too."""
    torch.manual_seed(0)
    packing = Packing(lengths, max(lengths), torch.device("cpu"))
    ours = [torch.randn(1, 2, sum(lengths), 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    parts = [torch.ones(n, n).tril() if is_causal else torch.ones(n, n) for n in lengths]
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=torch.block_diag(*parts).bool(), scale=0.3)
    with packed_attention(packing):
        found = F.scaled_dot_product_attention(*ours, is_causal=is_causal, scale=0.3)
    weights = torch.randn_like(expected)
    for out in (found, expected):
        (out * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_packing_and_back_is_the_identity_on_what_is_no_padding():
    lengths = [random.Random(i).randint(1, 20) for i in range(9)]
    packing = Packing(lengths, 22, torch.device("cpu"))
    x, valid = torch.randn(9, 22, 4), torch.arange(22) < torch.tensor(lengths)[:, None]
    assert packing.pack(x).shape == (1, sum(lengths), 4)
    torch.testing.assert_close(packing.unpack(packing.pack(x)), x * valid[..., None])


def test_little_of_the_attention_is_padding_whatever_the_sizes():
    """Sizes that nobody sorted: 1 to 256 tokens."""
    for seed in range(5):
        lengths = [random.Random(seed * 1000 + i).randint(1, 256) for i in range(128)]
        packing = Packing(lengths, 256, torch.device("cpu"))
        groups, _ = groups_of(packing.starts, torch.device("cpu"))
        rows = sum(places.numel() for places, _ in groups)
        assert padding(lengths) > 0.3
        assert 1 - sum(lengths) / rows < 0.1
        assert len(groups) < 40
        assert len(packing.rows_T) == sum(lengths)  # all else sees no padding at all


@pytest.mark.parametrize("name", OPTIONS)
def test_images_packed_and_padded_are_alike(name, monkeypatch):
    torch.manual_seed(0)
    tower = NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8, options=OPTIONS[name])
    assert tower._packs == ("rope" not in name)
    images = batch_images([noise(*size, seed) for seed, size in enumerate(SIZES)], 8, 64)
    found = {}
    for padding_from in (0.0, 1.0):
        monkeypatch.setattr(packing, "WORTH_IT", padding_from)
        tower.zero_grad()
        features = tower(images)
        map_BDHW, mask_BHW = features.map()
        (map_BDHW * mask_BHW[:, None] * torch.linspace(-1, 1, map_BDHW.shape[-1])).sum().backward()
        assert (features.rows_T is None) == (padding_from > 0 or not tower._packs)
        shown = map_BDHW, features.tokens_BND[images["valid_BN"]], features.prefix_BKD
        found[padding_from] = shown, {name: p.grad for name, p in tower.named_parameters()}
    (packed, gradients), (padded, expected) = found.values()
    torch.testing.assert_close(packed, padded, **EXACT)
    for key, gradient in expected.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-4, msg=f"{key}: {{}}".format)


def test_blocks_that_are_run_again_are_run_packed():
    """With activation checkpointing gradients are those without, of images and texts."""
    torch.manual_seed(0)
    towers = (
        NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8),
        TextTower(
            ByteTokenizer(),
            {"model_type": "bert"} | TEXTS["bert"] | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0},
        ),
    )
    images = batch_images([noise(*size, seed) for seed, size in enumerate(SIZES)], 8, 64)
    rows = towers[1].tokenizer.encode(["kite", "a peacock blue umbrella"])
    found = []
    for again in (False, True):
        if again:
            checkpoint_activations(towers)
        for tower in towers:
            tower.zero_grad()
        towers[0](images).tokens_BND.square().mean().backward()
        towers[1](*towers[1].padded(rows), [*map(len, rows)]).square().mean().backward()
        found.append([p.grad for tower in towers for p in tower.parameters()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_what_is_dropped_by_rows_and_run_again_is_not_packed():
    images = batch_images([noise(*size) for size in SIZES], 8, 64)
    tower = NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8, options={"drop_path_rate": 0.5})
    assert not tower._may_pack()
    assert tower.eval()._may_pack()
    tower = NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8)
    tower.vit.set_grad_checkpointing()
    assert not tower._may_pack()
    tower(images)


class Plain(nn.Module):
    """Attention by hand, in which every token sees every other."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, **_):
        return x + (x @ x.transpose(1, 2)).softmax(-1) @ x


def test_an_attention_that_is_not_torchs_is_not_packed():
    tower = NaFlexViT(width=32, depth=1, num_heads=2, patch_size=8)
    tower.vit.blocks[0].attn = Plain(tower.vit.blocks[0].attn)
    tower._check_options()
    assert not tower._packs


@pytest.mark.parametrize("family", TEXTS)
def test_texts_packed_and_padded_are_alike(family):
    torch.manual_seed(0)
    tower = TextTower(ByteTokenizer(), {"model_type": family} | TEXTS[family])
    tower.eval()  # no dropout
    # Positions of these are relative, or counted from the ids: no argument.
    assert tower._may_pack() == (family not in ("t5", "mt5", "m2m_100"))
    rows = tower.tokenizer.encode(["kite", "a peacock blue umbrella", "\u092a\u0924\u0902\u0917", "", "kite"])
    ids, valid = tower.padded(rows)
    found = {}
    for lengths in ([len(row) for row in rows], None):
        tower.zero_grad()
        states = tower(ids, valid, lengths)[valid]
        (states * torch.linspace(-1, 1, states.shape[-1])).sum().backward()
        found[lengths is None] = states, {name: p.grad for name, p in tower.named_parameters()}
    torch.testing.assert_close(found[False][0], found[True][0], **EXACT)
    for name, expected in found[True][1].items():
        torch.testing.assert_close(found[False][1][name], expected, rtol=1e-4, atol=1e-4, msg=f"{name}: {{}}".format)


def test_a_batch_may_be_scored_and_counted_before_it_is_trained_on():
    """What is made in inference mode or of fake tensors is not kept for a step with the same lengths."""
    tower = NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8)
    images = batch_images([noise(*size, seed) for seed, size in enumerate(SIZES)], 8, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        packing = Packing(images["num_patches"], 64, torch.device("cpu"))
        q_1HTC = torch.randn(1, 2, sum(images["num_patches"]), 8)
        packing.attend(q_1HTC, q_1HTC, q_1HTC)
    with torch.inference_mode():
        expected = tower(images).tokens_BND.clone()
    found = tower(images).tokens_BND
    found.sum().backward()
    torch.testing.assert_close(found, expected, **EXACT)
