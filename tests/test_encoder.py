"""The encoder from Python: anything in, embeddings that nest out."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import noise, tiny_encoder
from PIL import Image

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Pool


def test_every_kind_of_image_gives_the_same_embedding():
    encoder = tiny_encoder().eval()
    picture = noise(24, 40)
    as_tensor = torch.from_numpy(picture).permute(2, 0, 1)
    with torch.no_grad():
        expected = encoder.embed_image(picture)
        for same in (Image.fromarray(picture), as_tensor, as_tensor / 255, [picture]):
            torch.testing.assert_close(encoder.embed_image(same), expected, atol=1e-6, rtol=0)
        both = encoder.embed_image([noise(64, 64, 3), picture])
    torch.testing.assert_close(both[1:], expected, atol=1e-5, rtol=0)  # what lies beside it does not matter
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(1))


def test_short_embeddings_are_the_cut_and_normalised_full_ones():
    encoder = tiny_encoder().eval()
    assert encoder.lengths == [16, 32, 64]
    with torch.no_grad():
        full, short = encoder.embed_text(["पतंग", "kite"]), encoder.embed_text(["पतंग", "kite"], length=16)
    torch.testing.assert_close(short, torch.nn.functional.normalize(full[:, :16], dim=1))
    assert encoder.embed_text("kite", length=np.int64(16)).shape == (1, 16)
    image = noise(40, 40, 3)
    for wrong in (20, 0, 65, "64", 64.0, True):
        for embed in (partial(encoder.embed_text, "kite"), partial(encoder.embed_image, image)):
            with pytest.raises(ValueError, match=f"length: found {wrong!r}; expected one of the trained lengths 16, 3"):
                embed(length=wrong)
    for wrong in (0, -1, "64", 64.0, True):
        with pytest.raises(ValueError, match=f"max_tokens: found {wrong!r}; expected a whole number from 1"):
            encoder.embed_image(image, max_tokens=wrong)
        with pytest.raises(ValueError, match=f"backbone.max_tokens: found {wrong!r}; expected a whole number from 1"):
            NaFlexViT(size="tiny", max_tokens=wrong)
        with pytest.raises(ValueError, match=f"encoder.lengths: found {wrong!r}; expected a whole number from 1 to 64"):
            tiny_encoder(lengths=[wrong])
    with pytest.raises(ValueError, match=r"embed_text: found \['kite', 5\]; expected a string, or a list of them"):
        encoder.embed_text(["kite", 5])


def test_equal_texts_are_encoded_once():
    encoder = tiny_encoder().eval()
    rows = []
    encoder.text.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    with torch.no_grad():
        repeated = encoder.embed_text(["kite", "drum", "kite", "kite"])
    assert rows == [2]
    torch.testing.assert_close(repeated[[0, 0, 0]], repeated[[0, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(repeated[1:2], encoder.embed_text("drum"), atol=1e-6, rtol=0)


def test_large_images_are_scaled_into_the_budget():
    encoder = tiny_encoder().eval()
    seen = []
    encoder.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]["sizes_hw"]))
    with torch.no_grad():
        encoder.embed_image(noise(400, 800), max_tokens=64)
    ((height, width),) = seen[0]
    assert height * width // 64 <= 64
    assert width / height == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("wrong", [np.zeros((8, 8)), None, torch.zeros(3, 8, 8) + 7.0, np.zeros((8, 8, 3))])
def test_what_is_no_image_is_said(wrong):
    with pytest.raises(ValueError, match="image 0: found .*; expected a path, a PIL image"):
        tiny_encoder().embed_image(wrong)


def some_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of 5, 2 and 1 valid tokens of width 8; the padding holds numbers that must not matter."""
    valid_BN = torch.arange(5) < torch.tensor([[5], [2], [1]])
    return torch.where(valid_BN[..., None], torch.randn(3, 5, 8), 1e4), valid_BN


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_mean_pool_is_the_mean_of_the_valid_tokens(batch_norm):
    tokens_BND, valid_BN = some_tokens()
    expected = torch.stack(
        [tokens_ND[valid_N].mean(0) for tokens_ND, valid_N in zip(tokens_BND, valid_BN, strict=True)]
    )
    if batch_norm:
        expected = (expected - expected.mean(0)) / (expected.var(0, unbiased=False) + 1e-5).sqrt()
    pool = Pool(8, "mean", batch_norm)
    torch.testing.assert_close(pool.normalise(pool(tokens_BND, valid_BN)), expected)


@pytest.mark.parametrize("kind", ["mean", "attention"])
def test_padding_does_not_reach_the_pool(kind):
    pool, (tokens_BND, valid_BN) = Pool(8, kind), some_tokens()
    apart = torch.cat(
        [pool(tokens_ND[valid_N][None], None) for tokens_ND, valid_N in zip(tokens_BND, valid_BN, strict=True)]
    )
    torch.testing.assert_close(pool(tokens_BND, valid_BN), apart)


def test_a_single_vector_is_normalised_by_the_running_statistics():
    pool, one = Pool(8, "mean", batch_norm=True), torch.randn(1, 5, 8)
    for _ in range(50):
        pool.normalise(pool(torch.randn(64, 5, 8) * 3 + 2, None))
    alone = pool.normalise(pool(one, None))
    assert pool.norm.num_batches_tracked == 50  # one vector says nothing about the variance
    torch.testing.assert_close(alone, pool.eval().normalise(pool(one, None)))
    torch.testing.assert_close(alone[0], (one.mean(1) - 2)[0] / (9 / 5) ** 0.5, atol=0.2, rtol=0.2)


def test_an_unknown_pool_is_said():
    with pytest.raises(ValueError, match=r"encoder.pool: found 'max'; expected one of attention, mean"):
        Pool(8, "max")
