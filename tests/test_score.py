"""A card's numbers against scikit-learn and loops over the same planted embeddings.

The oracles see raw float64 embeddings, prompts and labels; of ours they use nothing but the order of the folds.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from indiclip.evals.card_scorer import CardScorer, languages_left_out, texts_of
from indiclip.evals.cards.card import load_card
from indiclip.evals.images.items import Items
from indiclip.evals.protocols.probes import folds
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.results import IMAGES

LENGTHS = [6, 16]
VIEWS = ["native", "64-square"]
NUM = 90
HINDI = {0: "इडली", 1: "डोसा", 2: "वड़ा", 4: "पोहा", 5: "उपमा", 7: "खीर"}  # of 8 classes
PROMPTS = {"en": ["{c}", "a photo of {c}"], "hi": ["{c} की तस्वीर"]}
OPTIONS = Options(languages=["hi", "mr"], views=VIEWS, resamples=50)
CONFUSABLE = {0: [1, 3], 1: [0], 3: [0], 6: [7, 2]}
CLASSES = [
    {
        "id": f"class_{c}",
        "names": {"en": f"name {c}"} | ({"hi": HINDI[c]} if c in HINDI else {}) | ({"mr": f"नाव {c}"} if c < 4 else {}),
        "confusable_with": [f"class_{other}" for other in CONFUSABLE.get(c, [])],
        "facts": {"lat": 8.0 + 3 * c, "lon": 70.0 + 2 * c},
    }
    for c in range(8)
]  # fmt: skip


class Planted(NamedTuple):
    items: Items
    images: dict[str, torch.Tensor]
    texts: dict[str, torch.Tensor]
    flagged_N: np.ndarray

    def score(self, flagged=True, options=OPTIONS, **other):
        planted = self._replace(**other)
        items = replace(planted.items, is_flagged=planted.flagged_N if flagged else None)
        scorer = CardScorer(items, planted.images, planted.texts, LENGTHS, options).run()
        return scorer.scores, [row for rows in scorer.answers.values() for row in rows]


def unit(x, length=None):
    x = np.asarray(x, np.float64)[..., :length]
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def around(center, noise, generator, length=16):
    found = unit(np.asarray(center) + noise * generator.normal(size=(*np.shape(center)[:-1], length)))
    return torch.tensor(found, dtype=torch.float32)


@pytest.fixture(scope="module")
def make_card(tmp_path_factory):
    def make(**content):
        file = tmp_path_factory.mktemp("card") / "food.yaml"
        file.write_text(yaml.safe_dump({"task": "classification", **content}, allow_unicode=True), "utf-8")
        return load_card(str(file))

    return make


@pytest.fixture(scope="module")
def planted(make_card):
    """90 images of 8 classes: a third is the gallery, every sixth is flagged; Hindi's prompts are worse."""
    generator = np.random.default_rng(0)
    center_CE = generator.normal(size=(8, 16))
    label_N = np.arange(NUM) % 8
    generator.shuffle(label_N)
    is_train_N = np.arange(NUM) % 3 == 1
    card = make_card(classes=CLASSES, prompts=PROMPTS)
    groups = [("dish", "sweet", "drink")[i // 3 % 3 if i % 5 else 0] for i in range(NUM)]
    items = Items(card, [None] * NUM, [f"{i}.jpg" for i in range(NUM)], label_N, is_train=is_train_N, groups=groups)
    images = {view: around(center_CE[label_N], noise, generator) for view, noise in zip(VIEWS, (1.0, 1.6), strict=True)}
    texts = {}
    for language, noise in (("en", 0.7), ("hi", 1.2)):
        for c, name in card.names(language).items():
            for template in dict.fromkeys(["{c}", *PROMPTS[language]]):  # the bare name too: see `wording`
                texts[template.replace("{c}", name)] = around(center_CE[c], noise, generator)
    return Planted(items, images, texts, np.arange(NUM) % 6 == 0)


@pytest.fixture(scope="module")
def scored(planted):
    return planted.score()


def values(scores, protocol, language, length, view, subset=""):
    """Metric -> score."""
    return {
        row.metric: row
        for row in scores
        if row[3:5] == (protocol, language) and (row.length, row.view, row.subset) == (length, view, subset)
    }


def candidates(planted, language, length):
    """Classes with a name in a language, ascending, and the mean of each one's prompts."""
    names = planted.items.card.names(language)
    classes = sorted(names)
    rows = [
        np.mean([unit(planted.texts[t.replace("{c}", names[c])], length) for t in PROMPTS[language]], axis=0)
        for c in classes
    ]
    return np.array(classes), unit(rows)


def asked(planted, language):
    """Images that are scored in a language: tested ones, of classes that have a name there."""
    named = sorted(planted.items.card.names(language))
    return np.flatnonzero(~planted.items.is_train & np.isin(planted.items.labels, named))


SETTINGS = [(view, length) for view in VIEWS for length in LENGTHS]


@pytest.mark.parametrize(("view", "length"), SETTINGS)
@pytest.mark.parametrize("language", ["en", "hi"])
def test_zero_shot_is_scikit_learns_among_the_classes_that_have_a_name(planted, scored, language, view, length):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    image_M = asked(planted, language)
    class_D, class_DE = candidates(planted, language, length)
    cosine_MD = unit(planted.images[view][image_M], length) @ class_DE.T
    label_M, predicted_M = planted.items.labels[image_M], class_D[cosine_MD.argmax(1)]
    found = values(scored[0], "zero_shot", language, length, view)
    accuracy = sklearn_metrics.accuracy_score(label_M, predicted_M)
    expected = {
        "acc1": accuracy,
        "acc5": sklearn_metrics.top_k_accuracy_score(label_M, cosine_MD, k=5, labels=class_D),
        "mean_per_class_recall": sklearn_metrics.balanced_accuracy_score(label_M, predicted_M),
        "acc1_corrected": (accuracy - 1 / len(class_D)) / (1 - 1 / len(class_D)),
    }
    assert {name: found[name].value for name in expected} == pytest.approx(expected, abs=1e-9)
    assert 0.2 < accuracy < 0.95  # neither so easy nor so hard that a mistake would not show
    for name in expected:
        assert (found[name].num_items, found[name].num_classes) == (len(image_M), {"en": 8, "hi": 6}[language])
        assert found[name].low <= found[name].value <= found[name].high
    assert found["acc1"].chance == found["mean_per_class_recall"].chance == pytest.approx(1 / len(class_D))


@pytest.mark.parametrize(("view", "length"), SETTINGS)
def test_classes_find_their_images(planted, scored, view, length):
    for language in ("en", "hi"):
        image_M, (class_D, class_DE) = asked(planted, language), candidates(planted, language, length)
        cosine_DM = class_DE @ unit(planted.images[view][image_M], length).T
        own_DM = class_D[:, None] == planted.items.labels[image_M]
        found = values(scored[0], "zero_shot", language, length, view)
        for k in (1, 5):
            nearest_DK = np.argsort(-cosine_DM, axis=1)[:, :k]
            expected = np.take_along_axis(own_DM, nearest_DK, 1).any(1).mean()
            row = found[f"text_to_image_r{k}"]
            assert (row.value, row.num_items, row.num_classes) == (pytest.approx(expected), len(class_D), len(image_M))


@pytest.mark.parametrize(("view", "length"), SETTINGS)
def test_parity_is_what_english_hits_more_of_the_same_images_among_the_same_classes(planted, scored, view, length):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    image_M = asked(planted, "hi")
    label_M = planted.items.labels[image_M]
    predicted = {}
    for language in ("en", "hi"):
        class_D, class_DE = candidates(planted, language, length)
        kept = np.isin(class_D, list(HINDI))
        cosine_MD = unit(planted.images[view][image_M], length) @ class_DE[kept].T
        predicted[language] = class_D[kept][cosine_MD.argmax(1)]
    found = values(scored[0], "zero_shot", "hi", length, view)
    for name, metric in (
        ("parity_acc1", sklearn_metrics.accuracy_score),
        ("parity_mean_per_class_recall", sklearn_metrics.balanced_accuracy_score),
    ):
        gap = metric(label_M, predicted["en"]) - metric(label_M, predicted["hi"])
        assert found[name].value == pytest.approx(gap, abs=1e-9)
    assert not any("parity" in name for name in values(scored[0], "zero_shot", "en", length, view))


@pytest.mark.parametrize(("view", "length"), SETTINGS)
def test_hard_pairs_are_those_of_a_loop(planted, scored, view, length):
    for language in ("en", "hi"):
        class_D, class_DE = candidates(planted, language, length)
        text_of = dict(zip(class_D.tolist(), class_DE, strict=True))
        hits, chances = [], []
        for i in asked(planted, language):
            label = int(planted.items.labels[i])
            rivals = [other for other in CONFUSABLE.get(label, []) if other in text_of]
            if rivals:
                image = unit(planted.images[view][i], length)
                hits.append(all(image @ text_of[label] > image @ text_of[other] for other in rivals))
                chances.append(1 / (1 + len(rivals)))
        row = values(scored[0], "hard_pairs", language, length, view)["acc1"]
        assert (row.value, row.num_items) == (pytest.approx(np.mean(hits)), len(hits))
        assert row.chance == pytest.approx(np.mean(chances))


@pytest.mark.parametrize(("view", "length"), SETTINGS)
def test_places_are_as_far_as_scikit_learns_haversine_says(planted, scored, view, length):
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    image_M, (class_D, class_DE) = asked(planted, "hi"), candidates(planted, "hi", length)
    predicted_M = class_D[(unit(planted.images[view][image_M], length) @ class_DE.T).argmax(1)]
    where_C2 = np.radians([(one["facts"]["lat"], one["facts"]["lon"]) for one in CLASSES])
    km_CC = 6371.0088 * pairwise.haversine_distances(where_C2)
    km_M = km_CC[planted.items.labels[image_M], predicted_M]
    found = values(scored[0], "places", "hi", length, view)
    assert found["median_km"].value == pytest.approx(np.median(km_M))
    for limit in (1, 25, 200, 750, 2500):
        assert found[f"within_{limit}_km"].value == pytest.approx((km_M <= limit).mean())


@pytest.mark.parametrize(("view", "length"), SETTINGS)
def test_groups_and_what_was_not_seen_in_training(planted, scored, view, length):
    """Each subset's number is that of scoring these images alone."""
    tested_N = ~planted.items.is_train
    scored_names = ("acc1", "acc5", "mean_per_class_recall", "acc1_corrected")
    for language in ("en", "hi"):
        for subset in ("dish", "sweet", "drink", "clean"):
            kept_N = ~planted.flagged_N if subset == "clean" else np.array(planted.items.groups) == subset
            kept = np.flatnonzero(kept_N | ~tested_N)
            images = {name: image_NE[kept] for name, image_NE in planted.images.items()}
            alone = planted.score(False, items=planted.items.select(kept), images=images)[0]
            one = values(scored[0], "zero_shot", language, length, view, subset)
            whole = values(alone, "zero_shot", language, length, view)
            names = [name for name in whole if name in scored_names] if subset == "clean" else ["acc1"]
            assert list(one) == names
            assert all(one[name]._replace(subset="") == whole[name] for name in names)


def test_no_clean_numbers_where_nobody_looked(planted):
    assert not any(row.subset == "clean" for row in planted.score(flagged=False)[0])
    one_group = planted.items.select(range(NUM))
    one_group.groups = ["dish"] * NUM
    rows = planted.score(False, items=one_group)[0]
    assert not any(row.subset for row in rows if row.protocol != "wording")  # whose subsets are prompts


@pytest.mark.parametrize(("view", "length"), SETTINGS)
def test_probes_are_scikit_learns(planted, scored, view, length):
    neighbors = pytest.importorskip("sklearn.neighbors")
    linear_model = pytest.importorskip("sklearn.linear_model")
    x_NE, label_N, train_N = unit(planted.images[view], length), planted.items.labels, planted.items.is_train
    num_classes = len(set(label_N[train_N]))
    near = neighbors.KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / 0.07)
    )
    for name, oracle in (
        ("knn", near),
        ("linear_probe", linear_model.LogisticRegression(C=31.6, tol=1e-8, max_iter=10_000)),
    ):
        expected = oracle.fit(x_NE[train_N], label_N[train_N]).score(x_NE[~train_N], label_N[~train_N])
        found = values(scored[0], name, IMAGES, length, view)
        assert found["acc1"].value == pytest.approx(expected)
        assert (found["acc1"].num_items, found["acc1"].num_classes) == (60, num_classes)
        assert found["acc1"].chance == 1 / num_classes
        assert "acc5" not in found  # probes name one class only


def test_probes_without_a_gallery_leave_out_and_do_not_count_classes_of_one_image(planted):
    linear_model = pytest.importorskip("sklearn.linear_model")
    items = planted.items.select(range(NUM))
    items.is_train = None
    items.labels = np.where(items.labels == 7, 6, items.labels)
    items.labels[0] = 7  # alone in its class
    scores, _ = planted.score(items=items)
    x_NE = unit(planted.images["native"])
    hits, rest = [], np.arange(1, NUM)
    for i in rest:
        others = np.delete(np.arange(NUM), [0, i])
        near = others[np.argsort(-(x_NE[others] @ x_NE[i]))[:20]]
        votes = np.bincount(items.labels[near], np.exp(x_NE[near] @ x_NE[i] / 0.07), minlength=8)
        hits.append(votes.argmax() == items.labels[i])
    row = values(scores, "knn", IMAGES, 16, "native")["acc1"]
    assert (row.value, row.num_items, row.num_classes, row.chance) == (pytest.approx(np.mean(hits)), 89, 7, 1 / 7)
    x, labels = x_NE[rest], items.labels[rest]
    fold_N = folds(labels, [items.keys[i] for i in rest]).numpy()
    hits = np.concatenate(
        [
            linear_model.LogisticRegression(C=31.6, tol=1e-8, max_iter=10_000)
            .fit(x[fold_N != fold], labels[fold_N != fold])
            .predict(x[fold_N == fold])
            == labels[fold_N == fold]
            for fold in range(5)
        ]
    )
    row = values(scores, "linear_probe", IMAGES, 16, "native")["acc1"]
    assert (row.value, row.num_items) == (pytest.approx(hits.mean()), 89)


def test_a_gallery_that_is_gone_is_no_score_of_zero(planted):
    kept = np.flatnonzero(~planted.items.is_train)
    images = {view: image_NE[kept] for view, image_NE in planted.images.items()}
    scores, _ = planted.score(False, items=planted.items.select(kept), images=images)
    assert not any(row.protocol in ("knn", "linear_probe") for row in scores)
    assert any(row.protocol == "zero_shot" for row in scores)


def test_the_gallery_is_in_no_number_but_those_of_probes(planted, scored):
    """Other embeddings and labels of the gallery change neither zero-shot numbers nor predictions."""
    train = planted.items.is_train
    items = planted.items.select(range(NUM))
    items.labels = np.where(train, (items.labels + 1) % 8, items.labels)
    images = {view: torch.where(torch.tensor(train)[:, None], -x, x) for view, x in planted.images.items()}
    scores, predictions = planted.score(items=items, images=images)
    assert [row for row in scores if row.language != IMAGES] == [row for row in scored[0] if row.language != IMAGES]
    assert predictions == scored[1]


def test_predictions_say_what_the_scores_say(planted, scored):
    scores, predictions = scored
    assert {(row.protocol, row.language) for row in predictions} == {("zero_shot", "en"), ("zero_shot", "hi")}
    for language in ("en", "hi"):
        rows = [row for row in predictions if row.language == language]
        found = values(scores, "zero_shot", language, 16, "native")
        assert [row.key for row in rows] == [planted.items.keys[i] for i in asked(planted, language)]
        assert np.mean([row.predicted == row.truth for row in rows]) == pytest.approx(found["acc1"].value)
        assert np.mean([row.rank < 5 for row in rows]) == pytest.approx(found["acc5"].value)
        hard = [row.hard_hit for row in rows if row.hard_hit is not None]
        assert np.mean(hard) == pytest.approx(values(scores, "hard_pairs", language, 16, "native")["acc1"].value)
        clean = [row.predicted == row.truth for row in rows if not row.flagged]
        assert np.mean(clean) == pytest.approx(
            values(scores, "zero_shot", language, 16, "native", "clean")["acc1"].value
        )
        for row in rows:
            i = planted.items.keys.index(row.key)
            assert row.truth == f"class_{planted.items.labels[i]}"
            class_D, class_DE = candidates(planted, language, 16)
            cosine_D = unit(planted.images["native"][i]) @ class_DE.T
            order = np.argsort(-cosine_D)[:5]
            assert row.top == [f"class_{c}" for c in class_D[order]]
            assert row.cosines == pytest.approx(cosine_D[order], abs=1e-6)
            assert row.flagged == planted.flagged_N[i]


@pytest.mark.parametrize("value", [0.25, np.nan])
def test_a_model_that_says_the_same_of_everything_is_never_right(planted, value):
    images = {view: torch.full_like(image_NE, value) for view, image_NE in planted.images.items()}
    same = dict.fromkeys(planted.texts, torch.full((16,), 0.25))
    scores, predictions = planted.score(images=images, texts=same)
    for row in scores:
        if row.protocol in ("zero_shot", "hard_pairs") and row.metric in ("acc1", "text_to_image_r1"):
            assert row.value == 0
        if row.metric == "within_1_km":
            assert row.value == 0
    assert not any(row.predicted == row.truth for row in predictions)


def test_a_language_with_too_few_names_is_told_and_has_no_number(planted, scored):
    assert {row.language for row in scored[0]} == {"en", "hi", IMAGES}
    note = "not scored in mr: fewer than 5 classes have a name there"
    assert languages_left_out(planted.items, OPTIONS) == [note]
    assert languages_left_out(planted.items, Options(languages=["hi"])) == []


def test_a_language_whose_classes_have_no_images(planted):
    kept = np.flatnonzero(~np.isin(planted.items.labels, list(HINDI)))
    images = {view: image_NE[kept] for view, image_NE in planted.images.items()}
    scores, _ = planted.score(False, items=planted.items.select(kept), images=images)
    assert {row.language for row in scores} == {"en", IMAGES}


def test_every_text_is_asked_for_and_no_other(planted):
    assert set(texts_of(planted.items, OPTIONS)) == set(planted.texts)
    assert set(texts_of(planted.items, Options(languages=["en"]))) == {text for text in planted.texts if "name" in text}


def test_a_model_without_texts_is_probed_only(planted, scored):
    scores, predictions = planted.score(texts={})
    assert scores == [row for row in scored[0] if row.language == IMAGES]
    assert predictions == []


# Matching


@pytest.fixture(scope="module")
def matched(make_card):
    """40 images with 2 to 6 texts each; what is written on the last five is a gallery's."""
    generator = np.random.default_rng(1)
    classes = [{"id": f"class_{c}", "names": {"en": f"name {c}"}} for c in range(2)]
    card = make_card(task="matching", num_candidates=6, classes=classes, prompts={"en": ['a sign: "{c}".']})
    words = [f"word {i}" for i in range(30)]
    vector_of = {word: generator.normal(size=16) for word in words}
    texts = {f'a sign: "{word}".': around(vector, 0.3, generator) for word, vector in vector_of.items()}
    texts |= {f'a sign: "name {c}".': around(np.zeros(16), 1, generator) for c in range(2)}
    drawn = [generator.choice(words, 2 + i % 5, replace=False).tolist() for i in range(40)]
    center_NE = np.stack([vector_of[of_image[0]] for of_image in drawn])
    items = Items(
        card, [None] * 40, [f"{i}.jpg" for i in range(40)], np.arange(40) % 2, candidates=drawn,
        is_train=np.arange(40) >= 35, groups=[f"class_{i % 2}" for i in range(40)],
    )  # fmt: skip
    images = {view: around(center_NE, noise, generator) for view, noise in zip(VIEWS, (2.0, 3.0), strict=True)}
    return Planted(items, images, texts, np.arange(40) < 10)


def test_words_are_matched_as_a_loop_does(matched):
    scores, predictions = matched.score()
    for view, length in SETTINGS:
        hits, chances = np.zeros(35, bool), np.zeros(35)
        for i, words in enumerate(matched.items.candidates[:35]):
            text_TE = unit(np.stack([matched.texts[f'a sign: "{word}".'] for word in words]), length)
            hits[i] = (text_TE @ unit(matched.images[view][i], length)).argmax() == 0
            chances[i] = 1 / len(words)
        assert 0.2 < hits.mean() < 0.99
        places = np.arange(35)
        subsets = {"": places >= 0, "class_0": places % 2 == 0, "class_1": places % 2 == 1, "clean": places >= 10}
        for subset, kept in subsets.items():
            found = values(scores, "matching", "en", length, view, subset)
            row = found["acc1"]
            assert (row.value, row.num_items) == (pytest.approx(hits[kept].mean()), kept.sum())
            assert row.chance == pytest.approx(chances[kept].mean())  # of fewer candidates it is higher
            assert "mean_per_class_recall" not in found
        chance = chances.mean()
        corrected = values(scores, "matching", "en", length, view)["acc1_corrected"].value
        assert corrected == pytest.approx((hits.mean() - chance) / (1 - chance))
        if (view, length) == ("native", 16):
            rows = [row for row in predictions if row.protocol == "matching"]
            assert [row.predicted == row.truth for row in rows] == hits.tolist()
            assert [row.rank == 0 for row in rows] == hits.tolist()
            assert [row.truth for row in rows] == [words[0] for words in matched.items.candidates[:35]]
            assert [row.key for row in rows] == matched.items.keys[:35]
            assert all(row.top[0] == row.predicted for row in rows)  # no ties here
    assert {row.protocol for row in scores} == {"matching", "classes", "knn", "linear_probe"}


def test_a_reader_that_sees_nothing_matches_nothing(matched):
    same = dict.fromkeys(matched.texts, torch.full((16,), 0.25))
    scores, predictions = matched.score(texts=same)
    assert values(scores, "matching", "en", 16, "native")["acc1"].value == 0
    assert not any(row.predicted == row.truth for row in predictions)


def test_a_single_candidate_is_right_and_chance_says_so(matched):
    items = matched.items.select(range(40))
    items.candidates = [words[:1] for words in items.candidates]
    found = values(matched.score(False, items=items)[0], "matching", "en", 16, "native")
    assert (found["acc1"].value, found["acc1"].chance) == (1, 1)
    assert np.isnan(found["acc1_corrected"].value)


def test_texts_of_the_gallery_are_not_asked_for(matched):
    asked_for = set(texts_of(matched.items, OPTIONS))
    words = {f'a sign: "{word}".' for of_image in matched.items.candidates[:35] for word in of_image}
    assert asked_for == words | {'a sign: "name 0".', 'a sign: "name 1".'}


def test_nothing_to_score_is_no_number(matched):
    items = matched.items.select(range(35, 40))
    assert matched.score(False, items=items, images={view: x[35:] for view, x in matched.images.items()}) == ([], [])


# Retrieval


@pytest.fixture(scope="module")
def captioned(make_card):
    """30 images; English has 0 to 2 captions of each, Hindi 0 or 1, Tamil one of an image without English."""
    generator = np.random.default_rng(2)
    center_NE = generator.normal(size=(30, 16))
    counts = {"en": [i % 3 for i in range(30)], "hi": [int(i % 4 > 0) for i in range(30)], "ta": [1] + [0] * 29}
    captions = {
        code: [[f"{code} {i} {j}" for j in range(count)] for i, count in enumerate(of)] for code, of in counts.items()
    }
    texts = {
        text: around(center_NE[i], {"en": 0.9, "hi": 1.4, "ta": 1}[code], generator)
        for code, of_code in captions.items()
        for i, of_image in enumerate(of_code)
        for text in of_image
    }
    labels = np.full(30, -1)
    items = Items(make_card(task="retrieval"), [None] * 30, [f"{i}.jpg" for i in range(30)], labels, captions=captions)
    images = {view: around(center_NE, noise, generator) for view, noise in zip(VIEWS, (0.6, 1.2), strict=True)}
    return Planted(items, images, texts, np.arange(30) % 7 == 1)


def recalls(planted, code, image_M, view, length):
    """Of images and of captions: whether the right one is among the k nearest, {k: (hit_M, hit_T)}."""
    texts = [(i, text) for i in image_M for text in planted.items.captions[code][i]]
    text_TE = unit(np.stack([planted.texts[text] for _, text in texts]), length)
    cosine_MT = unit(planted.images[view][image_M], length) @ text_TE.T
    own_MT = np.asarray(image_M)[:, None] == np.array([i for i, _ in texts])
    found = {}
    for k in (1, 5, 10):
        of_images = np.take_along_axis(own_MT, np.argsort(-cosine_MT, 1)[:, :k], 1).any(1)
        of_texts = np.take_along_axis(own_MT, np.argsort(-cosine_MT, 0)[:k], 0).any(0)
        found[k] = (of_images, of_texts)
    return found


@pytest.mark.parametrize(("view", "length"), SETTINGS)
def test_captions_and_images_find_each_other(captioned, view, length):
    scores, _ = captioned.score(options=Options(resamples=20))
    for code, of_code in captioned.items.captions.items():
        image_M = [i for i, texts in enumerate(of_code) if texts]
        found, clean = (values(scores, "retrieval", code, length, view, subset) for subset in ("", "clean"))
        for k, (hit_M, hit_T) in recalls(captioned, code, image_M, view, length).items():
            row, text_row = found[f"image_to_text_r{k}"], found[f"text_to_image_r{k}"]
            assert (row.value, row.num_items, row.num_classes) == (pytest.approx(hit_M.mean()), len(hit_M), len(hit_T))
            expected = (pytest.approx(hit_T.mean()), len(hit_T), len(hit_M))
            assert (text_row.value, text_row.num_items, text_row.num_classes) == expected
        unseen_M = [i for i in image_M if not captioned.flagged_N[i]]  # neither asked nor candidates
        for k, (hit_M, hit_T) in recalls(captioned, code, unseen_M, view, length).items():
            assert clean[f"image_to_text_r{k}"].value == pytest.approx(hit_M.mean())
            assert clean[f"text_to_image_r{k}"].value == pytest.approx(hit_T.mean())


@pytest.mark.parametrize(("view", "length"), SETTINGS)
def test_parity_of_captions_is_over_images_with_captions_in_both(captioned, view, length):
    scores, _ = captioned.score(options=Options(resamples=20))
    both = [i for i in range(30) if captioned.items.captions["en"][i] and captioned.items.captions["hi"][i]]
    english, hindi = (recalls(captioned, code, both, view, length) for code in ("en", "hi"))
    found = values(scores, "retrieval", "hi", length, view)
    for k in (1, 5, 10):
        row = found[f"parity_image_to_text_r{k}"]
        assert (row.value, row.num_items) == (pytest.approx(english[k][0].mean() - hindi[k][0].mean()), len(both))
    # The image with a caption in Tamil has none in English: nothing to compare.
    assert not any("parity" in name for name in values(scores, "retrieval", "ta", length, view))


@pytest.mark.parametrize("chunk", [7, 2_500_000])
def test_answers_in_captions_say_what_the_scores_say(captioned, monkeypatch, chunk):
    monkeypatch.setattr("indiclip.evals.protocols.cosines._CHUNK", chunk)
    scores, predictions = captioned.score(options=Options(resamples=20))
    for code in ("en", "hi"):
        rows = [row for row in predictions if row.language == code]
        found = values(scores, "retrieval", code, 16, "native")
        for k in (1, 5, 10):
            assert np.mean([row.rank < k for row in rows]) == pytest.approx(found[f"image_to_text_r{k}"].value)
        assert [row.predicted == row.truth for row in rows] == [row.rank == 0 for row in rows]
        image_M = [i for i, texts in enumerate(captioned.items.captions[code]) if texts]
        assert [row.key for row in rows] == [f"{i}.jpg" for i in image_M]
        texts = [text for i in image_M for text in captioned.items.captions[code][i]]
        text_TE = unit(np.stack([captioned.texts[text] for text in texts]))
        for i, row in zip(image_M, rows, strict=True):
            order = np.argsort(-(text_TE @ unit(captioned.images["native"][i])))
            assert row.top == [texts[t] for t in order[:5]]
            own = captioned.items.captions[code][i]
            wrong = next(texts[t] for t in order if texts[t] not in own)
            assert row.predicted == (own[0] if row.rank == 0 else wrong)


def test_captions_that_are_all_the_same_to_a_model_are_found_for_no_image(captioned):
    same = dict.fromkeys(captioned.texts, torch.full((16,), 0.25))
    scores, predictions = captioned.score(texts=same, options=Options(["hi"], resamples=20))
    assert {row.language for row in scores} == {"en", "hi"}
    assert all(row.value == 0 for row in scores if row.metric == "image_to_text_r1")
    assert not any(row.predicted == row.truth for row in predictions)


@pytest.mark.parametrize("chunk", [1, 2_500_000])
def test_of_equal_captions_the_one_that_is_wrong_is_the_answer(make_card, monkeypatch, chunk):
    """By hand: images 0 and 1 and their captions are one vector, so are 2 and 3, and 4 and 5."""
    monkeypatch.setattr("indiclip.evals.protocols.cosines._CHUNK", chunk)
    vector_NE = torch.eye(16)[[0, 0, 1, 1, 2, 2]]
    names = [f"caption {i}" for i in range(6)]
    captions = {"en": [[name] for name in names]}
    items = Items(make_card(task="retrieval"), [None] * 6, names, np.full(6, -1), captions=captions)
    texts = dict(zip(names, vector_NE, strict=True))
    _, predictions = Planted(items, {"native": vector_NE}, texts, np.zeros(6, bool)).score()
    assert [row.rank for row in predictions] == [1] * 6
    assert [row.predicted for row in predictions] == [names[i] for i in (1, 0, 3, 2, 5, 4)]


def test_languages_that_were_asked_for_and_have_no_captions_are_told(captioned):
    found = languages_left_out(captioned.items, Options(languages=["hi", "bn"]))
    assert found == ["not scored in bn: no captions"]
    assert languages_left_out(captioned.items, Options()) == []
