"""Zero-shot classification against naive loops, scikit-learn, torchmetrics and clip-benchmark's own functions.

Cosines in hand-made cases come from the 3-4-5 triangle.
"""

import numpy as np
import pytest
import torch

from indiclip.evals.protocols import cosines, metrics
from indiclip.evals.protocols.cosines import truncate_normalize
from indiclip.evals.protocols.zero_shot import class_embeddings, rank_classes

IMAGE = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=np.float32)
CLASS = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=np.float32)
# Cosines: image 0: (1, 0.6, 0), image 1: (0, 0.8, 1), image 2: (0.6, 1, 0.8)


def _random(images=300, classes=12, length=32, seed=0):
    generator = np.random.default_rng(seed)
    class_CE = generator.normal(size=(classes, length)).astype(np.float32)
    label_N = generator.integers(0, classes, images)
    return class_CE[label_N] + 1.8 * generator.normal(size=(images, length)).astype(np.float32), class_CE, label_N


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _ranks(image_NE, class_DE, *arguments, **options):
    class_DE = truncate_normalize(class_DE)
    return rank_classes(truncate_normalize(image_NE, class_DE.shape[1]), class_DE, *arguments, **options)


def test_ranks_and_nearest_classes_by_hand():
    ranking = _ranks(2 * IMAGE, 5 * CLASS, [0, 1, 0], nearest=2)
    assert ranking.image_M.tolist() == [0, 1, 2]
    assert ranking.rank_M.tolist() == [0, 1, 2]
    assert ranking.nearest_MK.tolist() == [[0, 1], [2, 1], [1, 2]]
    np.testing.assert_allclose(ranking.cosine_MK, [[1, 0.6], [1, 0.8], [1, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("length", [8, 32])
def test_ranks_are_those_of_a_loop_over_all_pairs(length):
    image_NE, class_CE, label_N = _random()
    class_C = class_embeddings(class_CE, np.arange(12), 12, length)
    ranking = _ranks(image_NE, class_C, label_N)
    for i, (image, label) in enumerate(zip(image_NE, label_N, strict=True)):
        cosines = [_unit(image[:length]) @ _unit(text[:length]) for text in class_CE]
        assert ranking.rank_M[i] == sum(cosine > cosines[label] for cosine in cosines)
        assert ranking.nearest_MK[i].tolist() == np.argsort(cosines)[::-1][:5].tolist()


def test_only_named_classes_are_candidates_and_only_their_images_are_scored():
    image_NE, class_CE, label_N = _random(classes=6)
    label_N[:5] = -1
    named = np.array([4, 1, 3])  # in any order
    ranking = _ranks(image_NE, class_CE[named], label_N, classes=named)
    assert ranking.image_M.tolist() == [i for i, label in enumerate(label_N) if label in (1, 3, 4)]
    cosine_MD = _unit(image_NE[ranking.image_M]) @ _unit(class_CE[named]).T
    assert ranking.nearest_MK[:, 0].tolist() == named[cosine_MD.argmax(1)].tolist()
    assert ((ranking.rank_M == 0) == (ranking.nearest_MK[:, 0] == label_N[ranking.image_M])).all()
    assert ranking.nearest_MK.shape[1] == 3


@pytest.mark.parametrize("image", [np.ones((4, 2)), np.zeros((4, 2)), np.full((4, 2), np.nan)])
def test_a_model_that_says_the_same_of_everything_hits_nothing(image):
    classes = np.tile([0.6, 0.8], (3, 1))
    assert _ranks(image, classes, [0, 1, 2, 0]).rank_M.tolist() == [2, 2, 2, 2]
    ranking = _ranks(image, classes, [0, 1, 2, 0], confusable=[[1], [2], [0]])
    assert not ranking.hard_hit_M.any()
    assert ranking.class_rank_D.tolist() == [2, 3, 3]  # the images of other classes


def test_a_broken_class_beats_the_right_one_and_is_listed_last():
    ranking = _ranks(IMAGE, np.array([[1.0, 0.0], [np.nan, np.nan]]), [0, 0, 0])
    assert ranking.rank_M.tolist() == [1, 1, 1]
    assert ranking.nearest_MK.tolist() == [[0, 1]] * 3
    assert np.isnan(ranking.cosine_MK[:, 1]).all()


def test_no_images_to_score():
    ranking = _ranks(IMAGE, CLASS, [-1, -1, -1], nearest=2)
    shapes = [(0,), (0,), (0, 2), (0, 2), (0,), (0,), (3,), (0, 0)]
    assert [part.shape for part in ranking] == shapes
    assert ranking.class_rank_D.tolist() == [-1, -1, -1]


def test_each_prompt_has_the_same_say_whatever_its_norm_and_the_number_of_prompts():
    prompts = np.array([[10.0, 0.0], [0.0, 0.1], [3.0, 4.0]])
    np.testing.assert_allclose(class_embeddings(prompts, [1, 1, 0], 2), [[0.6, 0.8], [0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_a_class_without_a_prompt_is_an_error():
    with pytest.raises(ValueError, match="2 of 4 classes have no prompt, first number 1"):
        class_embeddings(np.ones((3, 2)), [0, 2, 0], 4)


def test_classes_that_do_not_fit_their_embeddings_are_an_error():
    with pytest.raises(ValueError, match="expected one each"):
        _ranks(IMAGE, CLASS, [0, 1, 2], classes=[0, 1, 1])


def test_hard_pairs_by_hand():
    # Image 0 against classes 0, 2: hit. Image 1 (of class 1) against 2: miss. Image 2 (of class 1) against 2: hit.
    ranking = _ranks(IMAGE, CLASS, [0, 1, 1], confusable=[[2, 1], [2], []])
    assert ranking.rivals_M.tolist() == [2, 1, 1]
    assert ranking.hard_hit_M.tolist() == [True, False, True]


def test_a_confusable_class_that_has_no_name_does_not_count():
    ranking = _ranks(IMAGE, CLASS[[0, 1]], [0, 1, 1], [0, 1], confusable=[[2, 1], [2, 1], []])
    assert ranking.rivals_M.tolist() == [1, 0, 0]  # class 1 is left with itself


def test_hard_pairs_are_those_of_a_loop():
    image_NE, class_CE, label_N = _random(seed=1)
    confusable = [sorted({(c * 5 + 1) % 12, (c + 3) % 12} - {c}) if c % 3 else [] for c in range(12)]
    ranking = _ranks(image_NE, class_CE, label_N, confusable=confusable)
    for i, rivals, hit in zip(ranking.image_M, ranking.rivals_M, ranking.hard_hit_M, strict=True):
        cosine_C = _unit(image_NE[i]) @ _unit(class_CE).T
        assert rivals == len(confusable[label_N[i]])
        assert hit == all(cosine_C[label_N[i]] > cosine_C[other] for other in confusable[label_N[i]])


def test_ranks_among_fewer_classes_are_those_of_asking_these_alone():
    image_NE, class_CE, label_N = _random(seed=5)
    subsets = [np.array([0, 2, 3, 7]), np.arange(12), np.array([11, 4])]
    ranking = _ranks(image_NE, class_CE, label_N, subsets=subsets)
    for subset, rank_M in zip(subsets, ranking.subset_rank_UM, strict=True):
        alone = _ranks(image_NE, class_CE[subset], label_N, subset)
        assert rank_M[np.isin(label_N, subset)].tolist() == alone.rank_M.tolist()


@pytest.mark.parametrize("chunk", [1, 200, 2_500_000])
def test_class_names_find_the_nearest_of_their_images(monkeypatch, chunk):
    monkeypatch.setattr(cosines, "_CHUNK", chunk)
    generator = np.random.default_rng(1)
    image_NE, class_CE, label_N = generator.normal(size=(60, 8)), generator.normal(size=(7, 8)), np.arange(60) % 6
    label_N[:10] = -1
    texts = [6, 5, 2, 0]  # class 6 has no image, and images of classes 1, 3 and 4 are no candidates
    rank_D = _ranks(image_NE, class_CE[texts], label_N, classes=texts).class_rank_D
    assert rank_D[0] == -1
    cosine_NC = _unit(image_NE) @ _unit(class_CE).T
    for c, rank in zip(texts[1:], rank_D[1:], strict=True):
        others = np.isin(label_N, texts) & (label_N != c)
        assert rank == sum(cosine_NC[others, c] > max(cosine_NC[label_N == c, c]))


def test_accuracies_are_those_of_scikit_learn_and_torchmetrics():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    from torchmetrics.classification import MulticlassAccuracy

    image_NE, class_CE, label_N = _random(seed=2)
    rank_N = _ranks(image_NE, class_CE, label_N).rank_M
    cosine_NC = _unit(image_NE) @ _unit(class_CE).T
    for k in (1, 5):
        share = np.mean(rank_N < k)
        assert share == pytest.approx(sklearn_metrics.top_k_accuracy_score(label_N, cosine_NC, k=k), abs=1e-9)
        oracle = MulticlassAccuracy(12, top_k=k, average="micro")
        assert share == pytest.approx(oracle(torch.tensor(cosine_NC), torch.tensor(label_N)).item(), abs=1e-6)
    recall = metrics.mean_per_class_recall(rank_N < 1, label_N).value
    assert recall == pytest.approx(sklearn_metrics.balanced_accuracy_score(label_N, cosine_NC.argmax(1)), abs=1e-9)


def test_the_numbers_are_those_of_clip_benchmark(monkeypatch):
    oracle = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # NumPy 2.4 makes no float of an array of one number any more, which 1.6.2 asks of it.
    monkeypatch.setattr(oracle, "float", lambda x: float(np.squeeze(x)), raising=False)
    image_NE, class_CE, label_N = _random(seed=3)
    templates = ["{c} 0", "{c} 1", "{c} 2"]
    noise = np.random.default_rng(4).normal(size=(12, 3, 32)).astype(np.float32)
    prompt_CTE = torch.tensor(class_CE[:, None] + noise)

    class Model:
        encode_image = staticmethod(lambda batch: batch)
        encode_text = staticmethod(lambda tokens: prompt_CTE[tokens[:, 0], tokens[:, 1]])

    def tokenizer(texts):
        return torch.tensor([[int(word) for word in text.split()] for text in texts])

    dataset = torch.utils.data.TensorDataset(torch.tensor(image_NE), torch.tensor(label_N))
    dataset.classes = [str(c) for c in range(12)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=64)
    theirs = oracle.evaluate(Model, loader, tokenizer, dataset.classes, templates, "cpu", amp=False)

    class_CE = class_embeddings(prompt_CTE.flatten(0, 1), np.repeat(np.arange(12), 3), 12)
    rank_N = _ranks(image_NE, class_CE, label_N).rank_M
    assert np.mean(rank_N < 1) == pytest.approx(theirs["acc1"], abs=1e-6)
    assert np.mean(rank_N < 5) == pytest.approx(theirs["acc5"], abs=1e-6)
    recall = metrics.mean_per_class_recall(rank_N < 1, label_N).value
    assert recall == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
