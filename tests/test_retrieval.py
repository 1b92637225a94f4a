"""Retrieval against hand-made matrices, naive loops, torchmetrics and clip-benchmark's own function."""

import itertools

import numpy as np
import pytest
import torch

from indiclip.evals.protocols import cosines
from indiclip.evals.protocols.retrieval import caption_ranks, chance_recall

IMAGE = np.array([[1.0, 0.0], [0.0, 1.0]])
TEXT = np.array([[0.6, 0.8], [1.0, 0.0], [0.8, 0.6]])
# Cosines: image 0: (0.6, 1, 0.8), image 1: (0.8, 0, 0.6)


def _random(images=40, length=16, seed=0):
    """1 to 4 captions for each image, not in the order of the images."""
    generator = np.random.default_rng(seed)
    image_NE = generator.normal(size=(images, length)).astype(np.float32)
    image_T = generator.permutation(np.repeat(np.arange(images), generator.integers(1, 5, images)))
    text_TE = image_NE[image_T] + 2 * generator.normal(size=(len(image_T), length)).astype(np.float32)
    return image_NE, text_TE, image_T


def _cosines(a, b):
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


def test_ranks_by_hand():
    # Image 0 owns texts 0 and 2: its better one (0.8) loses to text 1. Image 1 owns text 1, which is its worst.
    ranks = caption_ranks(3 * IMAGE, 2 * TEXT, [0, 1, 0])
    assert ranks.rank_N.tolist() == [1, 2]
    assert ranks.rank_T.tolist() == [1, 1, 0]


@pytest.mark.parametrize("length", [6, None])
@pytest.mark.parametrize("chunk", [1, 200, 2_500_000])
def test_ranks_are_those_of_a_loop_over_all_pairs_whatever_is_in_memory(monkeypatch, length, chunk):
    monkeypatch.setattr(cosines, "_CHUNK", chunk)
    image_NE, text_TE, image_T = _random()
    ranks = caption_ranks(image_NE, text_TE, image_T, length)
    cosine_NT = _cosines(image_NE[:, :length], text_TE[:, :length])
    for i, rank in enumerate(ranks.rank_N):
        best = max(cosine_NT[i, image_T == i])
        assert rank == sum(cosine_NT[i, image_T != i] > best)
    for t, rank in enumerate(ranks.rank_T):
        assert rank == sum(cosine_NT[:, t] > cosine_NT[image_T[t], t])


@pytest.mark.parametrize("same", [np.ones((3, 4)), np.zeros((3, 4)), np.full((3, 4), np.nan)])
def test_a_model_that_says_the_same_of_everything_finds_nothing(same):
    ranks = caption_ranks(same, np.ones((6, 4)), [0, 0, 1, 1, 2, 2])
    assert ranks.rank_N.tolist() == [4, 4, 4]
    assert ranks.rank_T.tolist() == [2] * 6


def test_a_caption_that_two_images_share_is_found_for_neither():
    ranks = caption_ranks(IMAGE, np.array([[1.0, 0.0], [1.0, 0.0]]), [0, 1])
    assert ranks.rank_N.tolist() == [1, 1]
    assert ranks.rank_T.tolist() == [0, 1]


def test_an_image_without_a_caption_is_an_error():
    with pytest.raises(ValueError, match="1 of 2 images have no caption, first number 1"):
        caption_ranks(IMAGE, TEXT, [0, 0, 0])


def test_recall_with_one_caption_is_that_of_torchmetrics():
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

    image_NE, text_TE, image_T = _random(seed=2)
    ranks = caption_ranks(image_NE, text_TE, image_T)
    cosine_NT = torch.tensor(_cosines(image_NE, text_TE))
    right_NT = torch.tensor(image_T) == torch.arange(len(image_NE))[:, None]
    query_NT = torch.arange(len(image_NE))[:, None].expand_as(cosine_NT)
    hit_rate = RetrievalHitRate(top_k=5)(cosine_NT.flatten(), right_NT.flatten(), query_NT.flatten())
    assert (ranks.rank_N < 5).mean() == pytest.approx(hit_rate.item(), abs=1e-6)
    query_TN = torch.arange(len(text_TE))[:, None].expand(-1, len(image_NE))
    recall = RetrievalRecall(top_k=5)(cosine_NT.T.flatten(), right_NT.T.flatten(), query_TN.flatten())
    assert (ranks.rank_T < 5).mean() == pytest.approx(recall.item(), abs=1e-6)


def test_recall_is_that_of_clip_benchmark():
    oracle = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    image_NE, text_TE, image_T = _random(images=50, seed=3)
    order = np.argsort(image_T, kind="stable")  # there, captions come with their image
    text_TE, image_T = text_TE[order], image_T[order]

    class Model:
        encode_image = staticmethod(lambda batch: batch)
        encode_text = staticmethod(lambda tokens: torch.tensor(text_TE)[tokens])

    parts = [range(start, min(start + 16, 50)) for start in range(0, 50, 16)]
    loader = [
        (torch.tensor(image_NE[list(part)]), [[str(t) for t in np.flatnonzero(image_T == i)] for i in part])
        for part in parts
    ]
    tokenizer = lambda texts: torch.tensor([int(text) for text in texts])  # noqa: E731
    theirs = oracle.evaluate(Model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    ranks = caption_ranks(image_NE, text_TE, image_T)
    for k in (1, 5, 10):
        assert (ranks.rank_N < k).mean() == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
        assert (ranks.rank_T < k).mean() == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)


@pytest.mark.parametrize(("right", "of", "k"), [([1], 7, 1), ([1, 3], 6, 2), ([2], 4, 5), ([5], 5, 1)])
def test_chance_is_that_of_every_order_of_the_candidates(right, of, k):
    orders = list(itertools.permutations(range(of)))
    hits = [np.mean([min(order[:n]) < k for n in right]) for order in orders]  # the first n candidates are right
    assert chance_recall(np.array(right), of, k) == pytest.approx(np.mean(hits))
