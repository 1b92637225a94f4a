"""The two sides that the tools compare compute one and the same, and their texts start alike."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from indiclip.tokenizers import FastTokenizer

TOOLS = Path(__file__).parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

from _clip_steps import CONTEXT, Ours, Shape, Theirs, drawn, load_open_clip, normalised, our_batch, our_names  # noqa: E402

pytest.importorskip("open_clip")
SHAPE = Shape(32, 2, 2, 8, 32, 24, 2, 2, 16)


def test_with_equal_weights_a_step_is_openclips():
    """Oracle: OpenCLIP's CLIP and ClipLoss. Loss and all gradients, in float64; captions of several lengths."""
    torch.manual_seed(0)
    tokenizer = FastTokenizer(str(TOOLS.parent / "conf" / "tokenizers" / "mela.json"), CONTEXT)
    theirs = Theirs(SHAPE, tokenizer, load_open_clip()).double()
    for parameter in theirs.parameters():  # no bias is zero, so that each matters
        if parameter.ndim == 1:
            nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    ours = Ours(SHAPE, tokenizer, like=theirs).double()
    ours.encoder.load_state_dict(our_names(theirs, dict(theirs.model.named_parameters())))  # in float64

    scenes = drawn(SHAPE.pixels, 6)
    samples = [scenes[i] for i in range(6)]
    captions = [sample["captions"]["en"][0] for sample in samples]
    loss = ours.loss(our_batch(scenes, SHAPE, tokenizer))
    expected = theirs.loss(normalised([sample["image"] for sample in samples]).double(), theirs.ids(captions))
    loss.backward()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)  # the pixels are normalised in float32
    gradients = our_names(theirs, {name: p.grad for name, p in theirs.model.named_parameters()}, gradients=True)
    gradients["backbone.vit.embeds.cls_token"] = theirs.model.visual.class_embedding.grad.reshape(1, 1, -1)
    for name, parameter in ours.encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    scale, their_scale = ours.head.criterion.logit_scale, theirs.model.logit_scale
    assert scale.grad.item() == pytest.approx(their_scale.grad.item(), abs=1e-6)


def test_a_clip_text_tower_starts_as_openclips():
    """Oracle: OpenCLIP's start, which is OpenAI's. Spreads of 9,216 numbers or more: 5% is 4.8 standard errors."""
    torch.manual_seed(0)
    shape = Shape(32, 2, 2, 8, 32, 96, 3, 3, 16)
    tokenizer = FastTokenizer(str(TOOLS.parent / "conf" / "tokenizers" / "mela.json"), CONTEXT)
    theirs, ours = Theirs(shape, tokenizer, load_open_clip()), Ours(shape, tokenizer)
    expected = our_names(theirs, dict(theirs.model.named_parameters()))
    matrices = {name: p for name, p in ours.encoder.named_parameters() if ".layers." in name and p.ndim == 2}
    assert len(matrices) == 3 * 6
    for name, matrix in matrices.items():
        assert matrix.std().item() == pytest.approx(expected[name].std().item(), rel=0.05), name
