"""Winoground's scores on confusable classes against loops in float64, and their chance by enumeration."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from test_protocols import LENGTHS, items_of, make_card, scores_of, unit

from indiclip.evals.card_scorer import CardScorer
from indiclip.evals.protocols.metrics import clustered_rate, wilson
from indiclip.evals.protocols.minimal_pairs import CAPTIONS, CHANCES, draw_pairs, winoground
from indiclip.evals.protocols.protocol import Options

__all__ = ["make_card"]
THIRTEEN = ("en", "hi", "bn", "ta", "te", "mr", "gu", "kn", "ml", "pa", "or", "as", "ur")


def scores_by_hand(s):
    """As arXiv 2204.03162 defines them; `s[c][i]` is of a caption and an image."""
    text = s[0][0] > s[1][0] and s[1][1] > s[0][1]
    image = s[0][0] > s[0][1] and s[1][1] > s[1][0]
    alone = [s[0][0] > s[1][0], s[1][1] > s[0][1]]
    return {"text_score": text, "image_score": image, "group_score": text and image, "pair_accuracy": np.mean(alone)}


def test_chance_by_enumeration():
    found = [scores_by_hand([order[:2], order[2:]]) for order in permutations(range(4))]
    for metric, chance in CHANCES.items():
        assert np.mean([one[metric] for one in found]) == pytest.approx(chance), metric


def test_scores_of_every_order_of_four_cosines_are_the_papers():
    # Vectors of which the cosines are given: images are unit axes, captions what they have along these.
    for order in permutations((0.1, 0.2, 0.3, 0.4)):
        s = np.reshape(order, (2, 2))
        captions = torch.tensor(np.c_[s, np.sqrt(1 - np.square(s).sum(1))])[None].float()
        found = winoground(torch.eye(3)[None, :2], captions)
        assert {metric: value.item() for metric, value in found.items()} == scores_by_hand(s)


def test_ties_and_nan_are_wrong():
    same = torch.nn.functional.normalize(torch.ones(1, 2, 5), dim=-1)
    for images in (same, same * float("nan")):
        assert {value.item() for value in winoground(images, same).values()} == {0}


def classes_of(alike, names=()):
    return [
        {
            "id": f"class_{c}",
            "names": {"en": f"name {c}"} | {code: f"{code} {c}" for code, known in names if c in known},
            "confusable_with": [f"class_{other}" for pair in alike for other in pair if c in pair and other != c],
        }
        for c in range(5)
    ]


def test_scores_are_those_of_a_loop_in_every_language(make_card):
    alike = [(0, 1), (1, 3)]
    entry = {"class_path": "indiclip.evals.protocols.minimal_pairs.MinimalPairs", "init_args": {"most": 4}}
    classes = classes_of(alike, [("bn", {0, 1}), ("or", {2})])
    card = make_card(entry, classes=classes, prompts={"en": ["a {c}", "the {c}"]})
    generator = np.random.default_rng(0)
    label_N = np.repeat(np.arange(5), [9, 3, 6, 7, 5])
    items = items_of(card, 30, label_N)
    center_CE = generator.normal(size=(5, 12))
    image_NE = center_CE[label_N] + 1.5 * generator.normal(size=(30, 12))
    asked = {"en": ("a name {}", "the name {}"), "bn": ("ছবি: bn {}",)}
    texts = {
        template.format(c): center_CE[c] + 0.5 * generator.normal(size=12)
        for templates in asked.values()
        for template in templates
        for c in range(5)
    }
    told = {template.format(c) for template in asked["en"] for c in range(5)}
    assert set(card.protocols[0].texts(items, Options())) == told | {"ছবি: bn 0", "ছবি: bn 1", "ଛବି: or 2"}
    found = scores_of(items, image_NE, texts)
    unit_NE = torch.tensor(unit(image_NE), dtype=torch.float32)
    vectors = {text: torch.tensor(vector, dtype=torch.float32) for text, vector in texts.items()}
    answers = CardScorer(items, {"native": unit_NE}, vectors, LENGTHS, Options()).run().answers
    assert {where[3]: len(rows) for where, rows in answers.items()} == {"en": 6 * 2, "bn": 3}  # of every prompt
    confusable = [[1], [0, 3], [], [1], []]
    pairs = draw_pairs(items, confusable, 4)
    assert pairs.class_P2.tolist() == label_N[pairs.image_P2].tolist() == [[0, 1]] * 3 + [[1, 3]] * 3
    for length in LENGTHS:
        x_NE = unit(image_NE, length)
        for code, kept in (("en", range(6)), ("bn", range(3))):
            hits = {metric: [] for metric in CHANCES}
            for pair in kept:
                for template in asked[code]:
                    captions = unit([texts[template.format(c)] for c in pairs.class_P2[pair]], length)
                    s = captions @ x_NE[pairs.image_P2[pair]].T
                    for metric, value in scores_by_hand(s).items():
                        hits[metric].append(value)
            for metric, values in hits.items():
                row = found[metric, code, length, ""]
                assert row.value == pytest.approx(np.mean(values)), (metric, code)
                assert (row.num_items, row.chance) == (len(kept), CHANCES[metric])
    assert {language for _, language, *_ in found} == {"en", "bn"}  # one class alone has a name in Odia


def test_a_name_that_one_writer_has_is_in_no_caption(make_card):
    card = make_card("minimal_pairs.MinimalPairs", classes=classes_of([(0, 1)], [("bn", {0, 1})]))
    unsure = replace(card.classes[0], votes={"bn": 1})
    card = replace(card, classes=(unsure, *card.classes[1:]))
    asked = [set(card.protocols[0].texts(items_of(card, 1), Options(["bn"], all_names=every))) for every in (0, 1)]
    assert asked[1] - asked[0] == {"ছবি: bn 0"}


def test_pairs_are_the_same_for_the_same_keys_in_any_order(make_card):
    card = make_card("minimal_pairs.MinimalPairs", classes=classes_of([(0, 1)]))
    items = items_of(card, 20, np.arange(20) % 2)
    order = np.random.default_rng(1).permutation(20).tolist()
    confusable = [[1], [0], [], [], []]
    drawn, again = (draw_pairs(one, confusable, 3) for one in (items, items.select(order)))
    assert [[items.keys[i] for i in pair] for pair in drawn.image_P2] == [
        [items.keys[order[i]] for i in pair] for pair in again.image_P2
    ]
    assert len(set(drawn.image_P2.ravel().tolist())) == 6


def test_pairs_are_of_images_that_are_scored(make_card):
    card = make_card("minimal_pairs.MinimalPairs", classes=classes_of([(0, 1)]))
    is_train = np.arange(20) >= 4
    items = items_of(card, 20, np.arange(20) % 2, is_train=is_train)
    assert draw_pairs(items, [[1], [0], [], [], []], 50).image_P2.max() < 4


def test_a_card_without_confusable_classes_has_no_pairs(make_card):
    card = make_card("minimal_pairs.MinimalPairs", classes=classes_of([]))
    items = items_of(card, 20, np.arange(20) % 2)
    assert draw_pairs(items, [[]] * 5, 3).image_P2.shape == (0, 2)
    with pytest.raises(ValueError, match=r"things\.yaml: no class has confusable_with"):
        card.protocols[0].check(items)


def test_with_one_prompt_and_one_confusable_class_pair_accuracy_is_that_of_hard_pairs(make_card):
    protocols = ("minimal_pairs.MinimalPairs", "hard_pairs.HardPairs")
    card = make_card(*protocols, classes=classes_of([(0, 1), (2, 3)]), prompts={"en": ["a {c}"]})
    generator = np.random.default_rng(3)
    label_N = np.arange(40) % 4
    center_CE = generator.normal(size=(5, 12))
    image_NE = center_CE[label_N] + 3 * generator.normal(size=(40, 12))
    texts = {f"a name {c}": center_CE[c] for c in range(5)}
    found = scores_of(items_of(card, 40, label_N), image_NE, texts)
    assert found["pair_accuracy", "en", 12, ""].value == pytest.approx(found["acc1", "en", 12, ""].value)
    assert 0.5 < found["acc1", "en", 12, ""].value < 1


def test_thirteen_languages_have_a_caption():
    assert tuple(CAPTIONS) == THIRTEEN
    assert all(caption.endswith(": {c}") for caption in CAPTIONS.values())


@pytest.mark.parametrize("num_clusters", [5, 12, 60])
def test_an_interval_over_clusters_covers_as_often_as_it_says(num_clusters):
    generator = np.random.default_rng(0)
    cluster_T, covered = np.arange(num_clusters).repeat(20), 0
    for _ in range(1000):
        rate_C = generator.beta(2, 2, num_clusters)
        _, low, high = clustered_rate(generator.random(len(cluster_T)) < rate_C[cluster_T], cluster_T)
        covered += low <= 0.5 <= high
    assert 0.93 < covered / 1000 < 0.98


def test_clusters_that_are_right_or_wrong_as_a_whole_count_as_one_draw_each():
    # The variance of the mean of four is 1 / 4 / 3; Student's quantile of three degrees of freedom is 3.182.
    values, clusters = np.repeat([1.0, 0.0, 1.0, 0.0], 25), np.repeat(np.arange(4), 25)
    assert clustered_rate(values, clusters) == pytest.approx(wilson(0.5, 3 * (1.96 / 3.182) ** 2), abs=0.01)
    assert clustered_rate(np.ones(50), np.zeros(50, int)) == wilson(1.0, 1)
