"""kNN and linear probes against brute force and scikit-learn."""

import numpy as np
import pytest

from indiclip.datasets.tables import stable_hash
from indiclip.evals.protocols import cosines
from indiclip.evals.protocols.probes import folds, knn, linear_probe


def _images(num=240, classes=6, length=16, seed=0):
    generator = np.random.default_rng(seed)
    label_N = generator.integers(0, classes, num)
    image_NE = generator.normal(size=(classes, length))[label_N] + 1.5 * generator.normal(size=(num, length))
    return image_NE.astype(np.float32), label_N


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("chunk", [300, 2_500_000])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_leaving_one_out_is_that_of_a_loop(monkeypatch, chunk, k):
    monkeypatch.setattr(cosines, "_CHUNK", chunk)
    image_NE, label_N = _images()
    answer = knn(image_NE, label_N, k=k)
    assert answer.image_M.tolist() == list(range(240))
    cosine_NN = _unit(image_NE) @ _unit(image_NE).T
    np.fill_diagonal(cosine_NN, -np.inf)
    for i in range(240):
        near = np.argsort(-cosine_NN[i])[: min(k, 239)]
        votes = np.bincount(label_N[near], np.exp(cosine_NN[i, near] / 0.07), minlength=6)
        assert answer.class_M[i] == votes.argmax()


def test_knn_with_a_gallery_is_scikit_learns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    image_NE, label_N = _images(seed=1)
    label_N[:20] = -1
    is_train_N = np.arange(240) % 2 == 0
    answer = knn(image_NE, label_N, is_train_N, k=7)
    gallery, asked = (label_N >= 0) & is_train_N, (label_N >= 0) & ~is_train_N
    oracle = neighbors.KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(image_NE[gallery], label_N[gallery])
    assert answer.image_M.tolist() == np.flatnonzero(asked).tolist()
    assert answer.class_M.tolist() == oracle.predict(image_NE[asked]).tolist()


def test_linear_probe_with_a_split_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    image_NE, label_N = _images(num=600, seed=2)
    label_N = np.where(label_N == 3, 17, label_N)  # classes need not be numbered without gaps
    is_train_N = np.arange(600) < 400
    answer = linear_probe(image_NE, label_N, is_train_N, inverse_penalty=10.0)
    x_NE = _unit(image_NE.astype(np.float64))
    oracle = linear_model.LogisticRegression(C=10.0, tol=1e-8, max_iter=10_000).fit(x_NE[:400], label_N[:400])
    assert (answer.class_M == oracle.predict(x_NE[400:])).mean() >= 0.995  # near ties may fall either way


def test_linear_probe_without_a_split_is_scikit_learns_on_the_same_folds():
    linear_model = pytest.importorskip("sklearn.linear_model")
    image_NE, label_N = _images(seed=3)
    keys = [f"image {i}" for i in range(240)]
    answer = linear_probe(image_NE, label_N, keys=keys)
    fold_N, x_NE = folds(label_N, keys).numpy(), _unit(image_NE.astype(np.float64))
    expected = np.zeros(240, dtype=int)
    for fold in range(5):
        train = fold_N != fold
        oracle = linear_model.LogisticRegression(C=31.6, tol=1e-8, max_iter=10_000).fit(x_NE[train], label_N[train])
        expected[~train] = oracle.predict(x_NE[~train])
    assert answer.image_M.tolist() == list(range(240))
    assert (answer.class_M == expected).mean() >= 0.99  # near ties may fall either way


def test_folds_are_stratified_even_and_follow_the_key():
    label_N = np.array([0] * 11 + [1] * 2 + [2] * 7)
    keys = [f"{c}/{i}.jpg" for i, c in enumerate(label_N)]
    fold_N = folds(label_N, keys).numpy()
    for c in range(3):
        sizes = np.bincount(fold_N[label_N == c], minlength=5)
        assert sizes.max() - sizes.min() <= 1
    assert np.bincount(fold_N).tolist() == [4] * 5
    first = np.argsort([stable_hash(key) for key in keys[:11]])
    assert fold_N[first].tolist() == [i % 5 for i in range(11)]
    order = np.random.default_rng(0).permutation(20)
    assert folds(label_N[order], [keys[i] for i in order]).tolist() == fold_N[order].tolist()


@pytest.mark.parametrize("probe", [knn, linear_probe])
def test_a_class_of_one_image_takes_no_part(probe):
    image_NE, label_N = _images(num=40, classes=3)
    one_more = np.concatenate([image_NE, image_NE[:1]]), np.append(label_N, 9)
    keys = {"keys": [str(i) for i in range(41)]} if probe is linear_probe else {}
    answer = probe(*one_more, **keys)
    assert answer.image_M.tolist() == list(range(40))
    assert answer.class_M.tolist() == probe(image_NE, label_N).class_M.tolist()


@pytest.mark.parametrize("probe", [knn, linear_probe])
@pytest.mark.parametrize("is_train_N", [None, np.arange(60) >= 20])
def test_broken_embeddings_are_never_right_and_disturb_nobody(probe, is_train_N):
    image_NE, label_N = _images(num=60, classes=3)
    image_NE[5], image_NE[40] = np.nan, np.inf
    answer = probe(image_NE, label_N, is_train_N)
    class_of = dict(zip(answer.image_M.tolist(), answer.class_M.tolist(), strict=True))
    assert class_of[5] == -1
    assert all(c >= 0 for i, c in class_of.items() if i not in (5, 40))
    good = np.delete(np.arange(60), [5, 40])
    if probe is knn:
        without = probe(image_NE[good], label_N[good], None if is_train_N is None else is_train_N[good])
        assert without.class_M.tolist() == [c for i, c in class_of.items() if i not in (5, 40)]


@pytest.mark.parametrize("probe", [knn, linear_probe])
@pytest.mark.parametrize(
    ("labels", "is_train_N", "asked"),
    [
        ([-1, -1, -1], None, []),
        ([0, 1, 2], None, []),
        ([0, 1, -1], [False, False, True], [0, 1]),
        ([0, 1, 0], [True, True, True], []),
    ],
)
def test_without_a_gallery_nothing_is_predicted(probe, labels, is_train_N, asked):
    answer = probe(np.eye(3), labels, is_train_N if is_train_N is None else np.array(is_train_N))
    assert answer.image_M.tolist() == asked
    assert answer.class_M.tolist() == [-1] * len(asked)


@pytest.mark.parametrize("probe", [knn, linear_probe])
def test_one_class_only_is_always_predicted(probe):
    assert probe(np.eye(4), [7, 7, 7, 7]).class_M.tolist() == [7] * 4
