"""The multimodal encoder and its heads against transformers' FLAVA with the same weights."""

import torch
from torch import nn
from transformers import FlavaConfig, FlavaMultimodalConfig
from transformers.models.flava.modeling_flava import FlavaITMHead, FlavaMaskedPredictionHead, FlavaMultimodalModel

from indiclip.tasks.mismatched_pairs import Matching
from indiclip.tasks.multimodal_encoder import MultimodalEncoder, PredictionHead, Tokens

W = 16
SMALL = {"hidden_size": W, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * W}


def test_it_is_flavas_encoder_and_padding_changes_nothing():
    torch.manual_seed(0)
    ours = MultimodalEncoder(12, 10, W, depth=2, num_heads=2)
    theirs = FlavaMultimodalModel(FlavaMultimodalConfig(**SMALL, layer_norm_eps=1e-5), add_pooling_layer=False).eval()
    nn.init.normal_(ours.class_token)
    weights = {"cls_token": ours.class_token, "layernorm.weight": ours.norm.weight, "layernorm.bias": ours.norm.bias}
    for number, layer in enumerate(ours.layers):
        place = f"encoder.layer.{number}"
        attention = layer.self_attn
        for part in ("weight", "bias"):
            rows = getattr(attention, f"in_proj_{part}").chunk(3)
            for name, value in zip(("query", "key", "value"), rows, strict=True):
                weights[f"{place}.attention.attention.{name}.{part}"] = value
            weights[f"{place}.attention.output.dense.{part}"] = getattr(attention.out_proj, part)
            weights[f"{place}.intermediate.dense.{part}"] = getattr(layer.linear1, part)
            weights[f"{place}.output.dense.{part}"] = getattr(layer.linear2, part)
            weights[f"{place}.layernorm_before.{part}"] = getattr(layer.norm1, part)
            weights[f"{place}.layernorm_after.{part}"] = getattr(layer.norm2, part)
    theirs.load_state_dict(weights)
    image = Tokens(torch.randn(3, 4, 12), torch.arange(4) < torch.tensor([[4], [2], [1]]))
    text = Tokens(torch.randn(3, 5, 10), torch.arange(5) < torch.tensor([[2], [5], [1]]))
    both = ours.projected(image, text)
    found = ours(*both)
    mask = torch.cat([torch.ones(3, 1, dtype=torch.bool), image.valid_BN, text.valid_BN], 1)
    with torch.no_grad():
        inputs = torch.cat([of.tokens_BNW for of in both], 1)
        expected = theirs(inputs, attention_mask=mask.long()).last_hidden_state.split([1, 4, 5], 1)
    torch.testing.assert_close(found[0], expected[0][:, 0], atol=1e-5, rtol=1e-4)
    for tokens, other, of in zip(found[1:], expected[1:], (image, text), strict=True):
        torch.testing.assert_close(tokens[of.valid_BN], other[of.valid_BN], atol=1e-5, rtol=1e-4)
    alone = ours(*(Tokens(of.tokens_BNW[:1, :n], of.valid_BN[:1, :n]) for of, n in zip(both, (4, 2), strict=True)))
    torch.testing.assert_close(alone[0], found[0][:1], atol=1e-5, rtol=1e-4)


def test_heads_are_flavas():
    torch.manual_seed(0)
    x_BLW = torch.randn(3, 4, W)
    ours = PredictionHead(W, 7)
    theirs = FlavaMaskedPredictionHead(FlavaMultimodalConfig(**SMALL, vocab_size=7, layer_norm_eps=1e-5))
    names = {"0": "transform.dense", "2": "transform.LayerNorm", "3": "decoder"}
    state = {f"{names[key[0]]}{key[1:]}": value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(state | {"bias": torch.zeros(7)})
    torch.testing.assert_close(ours(x_BLW), theirs(x_BLW))

    ours = Matching(W)
    theirs = FlavaITMHead(FlavaConfig(hidden_size=W))
    names = {"0": "pooler.dense", "2": "seq_relationship"}
    theirs.load_state_dict({f"{names[key[0]]}{key[1:]}": value for key, value in ours.state_dict().items()})
    torch.testing.assert_close(ours(x_BLW[:, 0]), theirs(x_BLW))


def test_cross_entropy_of_a_prediction_head_is_that_of_its_logits():
    """Oracle: torch's on all logits in float64, with the gradients of all weights."""
    torch.manual_seed(0)
    head = PredictionHead(W, 7).double()
    tokens_KD, targets_K = torch.randn(5, W, dtype=torch.float64, requires_grad=True), torch.randint(7, (5,))
    trained = [tokens_KD, *head.parameters()]
    expected = nn.functional.cross_entropy(head(tokens_KD), targets_K, reduction="sum")
    found = head.cross_entropy(tokens_KD, targets_K)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained))
