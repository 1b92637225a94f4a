"""The protocols beside zero-shot, retrieval, matching and probes, against scikit-learn and loops in float64."""

import re
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
import yaml
from bench_fakes import PURE, Shades, shades_of
from layout_files import write

from indiclip.datasets.tables import stable_hash
from indiclip.evals.bench import run_bench
from indiclip.evals.card_scorer import CardScorer, texts_of
from indiclip.evals.cards.card import load_card
from indiclip.evals.comparison import compare
from indiclip.evals.find import find_bench
from indiclip.evals.images.items import Items
from indiclip.evals.protocols.multi_label import average_precision
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.reports.bench_report import write_bench_report
from indiclip.evals.reports.console import print_result
from indiclip.evals.reports.pictures import Pictures
from indiclip.evals.results import IMAGES

ROOM = "indiclip.evals.protocols"
LENGTHS = [4, 12]


@pytest.fixture
def make_card(tmp_path):
    def make(*protocols, **content):
        file = tmp_path / "things.yaml"
        named = [f"{ROOM}.{one}" if isinstance(one, str) else one for one in protocols]
        page = ({"protocols": named} if named else {}) | content
        file.write_text(yaml.safe_dump(page, allow_unicode=True), "utf-8")
        return load_card(str(file))

    return make


def unit(x, length=None):
    x = np.asarray(x, np.float64)[..., :length]
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def scores_of(items, images, texts=None, **options):
    """(metric, language, length, subset) -> its score."""
    texts = {text: torch.tensor(vector, dtype=torch.float32) for text, vector in (texts or {}).items()}
    images = {"native": torch.tensor(unit(images), dtype=torch.float32)}
    scorer = CardScorer(items, images, texts, LENGTHS, Options(resamples=50, **options)).run()
    found = {(row.metric, row.language, row.length, row.subset): row for row in scorer.scores}
    for (_, _, protocol, language), rows in scorer.answers.items():
        assert_answers_give(protocol, language, rows, found)
    return found


HITS = {"composed_retrieval": "r1", "bitext": "to_english_r1", "minimal_pairs": "group_score", "in_scene": "acc1"}


def assert_answers_give(protocol, language, rows, found):
    """What is kept of each question says the same as the number over all of them."""
    assert len({(row.key, row.question) for row in rows}) == len(rows)
    assert all((row.predicted == row.truth) == (row.rank == 0) for row in rows)
    assert all(row.predicted in row.top for row in rows if row.top)
    if protocol in HITS:
        rate = np.mean([row.rank == 0 for row in rows])
        assert rate == pytest.approx(found[HITS[protocol], language, LENGTHS[-1], ""].value)


def classes(count, **names):
    return [
        {"id": f"class_{c}", "names": {"en": f"name {c}"} | {code: of(c) for code, of in names.items()}}
        for c in range(count)
    ]


def items_of(card, count, labels=None, **other):
    labels = np.full(count, -1) if labels is None else np.asarray(labels)
    return Items(card, [None] * count, [f"{i}.jpg" for i in range(count)], labels, **other)


# Several classes on one image


@pytest.mark.parametrize("steps", [None, 3])  # cosines of three values tie
def test_average_precision_is_that_of_scikit_learn(steps):
    oracle = pytest.importorskip("sklearn.metrics").average_precision_score
    generator = np.random.default_rng(0)
    score_M, truth_M = generator.random(60), generator.random(60) < 0.3
    score_M = score_M if steps is None else np.floor(score_M * steps)
    weight_RM = generator.integers(0, 4, (5, 60))
    found_R = average_precision(score_M, truth_M, weight_RM)
    expected = [oracle(truth_M, score_M, sample_weight=weight_M) for weight_M in weight_RM]
    np.testing.assert_allclose(found_R, expected, atol=1e-12)


def test_average_precision_by_hand():
    # In the order of the scores: right, wrong, right: precisions 1/1 and 2/3 at the two that are right.
    found = average_precision(np.array([0.1, 0.9, 0.5]), np.array([True, True, False]), np.ones((1, 3)))
    assert found.tolist() == [pytest.approx((1 + 2 / 3) / 2)]


def test_mean_average_precision_is_that_of_scikit_learn_in_each_language(make_card):
    oracle = pytest.importorskip("sklearn.metrics").average_precision_score
    card = make_card("multi_label.MultiLabel", classes=classes(7, hi=lambda c: f"नाम {c}"), prompts={"en": ["{c}"]})
    generator = np.random.default_rng(1)
    truth_NC = generator.random((50, 7)) < 0.3
    truth_NC[:, 4] = False  # no image shows it: it counts in no mean
    center_CE = generator.normal(size=(7, 12))
    image_NE = truth_NC @ center_CE + 2.0 * generator.normal(size=(50, 12))
    texts = {f"{name} {c}": center_CE[c] + generator.normal(size=12) for c in range(7) for name in ("name", "नाम")}
    cells = [["; ".join(f"name {c}" for c in np.flatnonzero(row))] for row in truth_NC]
    found = scores_of(items_of(card, 50, columns={"classes": cells}), image_NE, texts)
    for language, name in (("en", "name"), ("hi", "नाम")):
        for length in LENGTHS:
            cosine_NC = unit(image_NE, length) @ unit([texts[f"{name} {c}"] for c in range(7)], length).T
            expected = np.mean([oracle(truth_NC[:, c], cosine_NC[:, c]) for c in range(7) if c != 4])
            row = found["mean_average_precision", language, length, ""]
            assert row.value == pytest.approx(expected, abs=1e-6)
            assert (row.num_items, row.num_classes) == (50, 6)
            assert row.chance == pytest.approx(truth_NC[:, [c for c in range(7) if c != 4]].mean())
    main, short = (found["mean_average_precision", "en", length, ""] for length in (12, 4))
    assert main.low < main.value < main.high
    assert short.low is None


def test_a_name_that_is_no_class_is_named(make_card):
    card = make_card("multi_label.MultiLabel", classes=classes(2))
    items = items_of(card, 2, columns={"classes": [["name 1; nam 0"], [""]]})
    with pytest.raises(
        ValueError, match=r"0\.jpg: classes: 'nam 0' is no class .*; nearest is 'name 0'; .* `;` between them"
    ):
        card.protocols[0].check(items)


@pytest.mark.parametrize(
    ("cells", "missing"),
    [
        (("name 0; name 1", "name 2", "name 1"), ""),
        (("name 0; name 1", "", "name 1"), "1 of 3 classes, which stay candidates: class_2"),
        (("", "", ""), "3 of 3 classes, which stay candidates: class_0, class_1, class_2"),
    ],
)
def test_classes_are_counted_by_the_truth_of_the_protocol(tmp_path, make_card, cells, missing):
    make_card("multi_label.MultiLabel", classes=classes(3))
    write(tmp_path / "things", {f"{i}.png": image for i, image in enumerate(shades_of("red", 3))})
    rows = "".join(f"{i}.png,{cell}\n" for i, cell in enumerate(cells))
    (tmp_path / "things" / "table.csv").write_text(f"file,classes\n{rows}")
    bench = find_bench(tmp_path, [str(tmp_path / "things.yaml")])
    (card,) = run_bench(Shades(), bench, Options(resamples=5)).cards
    assert card.num_classes == 3 - int(missing[:1] or 0)
    found = [note for note in card.notes if "no images of" in note]
    assert found == ([f"no images of {missing}"] if missing else [])
    if not any(cells):
        assert card.notes[0] == "no image to score shows a class of the card"


def test_resamples_of_few_images_that_show_no_class_are_left_out(make_card):
    card = make_card("multi_label.MultiLabel", classes=classes(2), prompts={"en": ["{c}"]})
    items = items_of(card, 3, columns={"classes": [["name 0"], [""], [""]]})
    with warnings.catch_warnings(action="error"):
        found = scores_of(items, np.eye(12)[:3], {"name 0": np.eye(12)[0], "name 1": np.eye(12)[1]})
    row = found["mean_average_precision", "en", 12, ""]
    assert (row.value, row.low, row.high) == (1, 1, 1)


# Probes on few images


@pytest.mark.parametrize("has_gallery", [True, False])
def test_few_shot_probes_are_scikit_learns_on_the_images_with_the_lowest_hashes(make_card, has_gallery):
    linear_model = pytest.importorskip("sklearn.linear_model")
    shots = {"class_path": f"{ROOM}.few_shot.FewShot", "init_args": {"shots": [1, 4], "draws": 2}}
    card = make_card(shots, classes=classes(4))
    generator = np.random.default_rng(2)
    label_N = np.arange(80) % 4
    image_NE = generator.normal(size=(4, 12))[label_N] + 1.5 * generator.normal(size=(80, 12))
    is_train_N = np.arange(80) % 3 > 0 if has_gallery else np.zeros(80, bool)
    items = items_of(card, 80, label_N, is_train=is_train_N if has_gallery else None)
    found = scores_of(items, image_NE)
    for length in LENGTHS:
        x_NE = unit(image_NE, length)
        for count, name in ((1, "acc1_1_shot"), (4, "acc1_4_shots")):
            hits, scored = [], set()
            for draw in range(2):
                pools = [
                    [i for i in range(80) if label_N[i] == c and (is_train_N[i] or not has_gallery)] for c in range(4)
                ]
                drawn = [sorted(pool, key=lambda i: stable_hash(f"{draw} {i}.jpg"))[:count] for pool in pools]
                learned = np.concatenate(drawn)
                asked = [i for i in range(80) if not is_train_N[i] and i not in learned]
                model = linear_model.LogisticRegression(C=31.6, tol=1e-8, max_iter=10_000).fit(
                    x_NE[learned], label_N[learned]
                )
                hits += (model.predict(x_NE[asked]) == label_N[asked]).tolist()
                scored |= {*asked}
            row = found[name, IMAGES, length, ""]
            assert row.value == pytest.approx(np.mean(hits), abs=1e-9)
            assert row.num_items == len(scored)
            assert row.low < row.value < row.high
            assert row.chance == 0.25
    assert not scores_of(items, image_NE, probes=False)


def test_few_shot_counts_the_images_that_a_draw_leaves_to_score(make_card):
    shots = {"class_path": f"{ROOM}.few_shot.FewShot", "init_args": {"shots": [1, 3], "draws": 1}}
    items = items_of(make_card(shots, classes=classes(4)), 13, np.arange(13) % 4)  # four of one class, else three
    found = scores_of(items, np.random.default_rng(0).normal(size=(13, 12)))
    for name, scored in (("acc1_1_shot", 13 - 4), ("acc1_3_shots", 1)):
        assert found[name, IMAGES, LENGTHS[0], ""].num_items == scored


def test_a_gallery_of_other_classes_than_the_images_that_are_scored_teaches_nothing(make_card):
    card = make_card("few_shot.FewShot", classes=classes(4))
    items = items_of(card, 12, np.arange(12) % 4, is_train=np.arange(12) % 4 < 2)
    assert not scores_of(items, np.random.default_rng(0).normal(size=(12, 12)))


# The same thing


def test_instances_are_found_as_a_loop_over_distances_says(make_card):
    card = make_card("instance_retrieval.InstanceRetrieval")
    generator = np.random.default_rng(3)
    instance_N = np.concatenate([[0] * 9, [1] * 3, [2] * 2, generator.integers(3, 9, 30), [9]])
    count = len(instance_N)
    is_train_N = np.arange(count) % 2 == 0
    is_train_N[-1] = False  # a query of which there is nothing in the index
    image_NE = generator.normal(size=(10, 12))[instance_N] + 1.3 * generator.normal(size=(count, 12))
    items = items_of(card, count, is_train=is_train_N, columns={"instance": [[f"thing {i}"] for i in instance_N]})
    found = scores_of(items, image_NE)

    def precision(length):
        x_NE, values = unit(unit(image_NE)[:, :length]), []
        for query in np.flatnonzero(~is_train_N):
            index = np.flatnonzero(is_train_N)
            most = min(int((instance_N[index] == instance_N[query]).sum()), 5)
            if most:
                near = index[np.argsort(np.linalg.norm(x_NE[index] - x_NE[query], axis=1))[:most]]
                values.append(np.mean(instance_N[near] == instance_N[query]))
        return np.mean(values), len(values)

    for length in LENGTHS:
        row = found["mp5", IMAGES, length, ""]
        assert (row.value, row.num_items) == (pytest.approx(precision(length)[0]), precision(length)[1])
        assert (row.value < 1) & (row.low < row.value < row.high)
    assert found["mp5_64", IMAGES, 12, ""].value == found["mp5", IMAGES, 12, ""].value  # of 12 numbers, 64 are all
    assert ("mp5_64", IMAGES, 4, "") not in found


def test_a_model_that_says_the_same_of_everything_finds_no_instance(make_card):
    card = make_card("instance_retrieval.InstanceRetrieval")
    cells = [[f"thing {i % 3}"] for i in range(20)]
    for image in (np.ones((20, 12)), np.full((20, 12), np.nan)):
        items = items_of(card, 20, is_train=np.arange(20) < 14, columns={"instance": cells})
        assert scores_of(items, image)["mp5", IMAGES, 12, ""].value == 0


def test_the_first_64_numbers_are_taken_of_longer_embeddings(make_card):
    card = make_card("instance_retrieval.InstanceRetrieval")
    generator = np.random.default_rng(4)
    image_NE = generator.normal(size=(20, 100))
    image_NE[:, :64] = np.repeat(generator.normal(size=(10, 64)), 2, axis=0)  # pairs that are alike there alone
    image_NE[:, 64:] *= 9
    items = items_of(
        card, 20, is_train=np.arange(20) % 2 == 0, columns={"instance": [[f"{i // 2}"] for i in range(20)]}
    )
    scorer = CardScorer(
        items, {"native": torch.tensor(unit(image_NE), dtype=torch.float32)}, {}, [100], Options()
    ).run()
    values = {row.metric: row.value for row in scorer.scores}
    assert values["mp5_64"] == 1
    assert values["mp5"] < 1


def test_folders_of_classes_are_things_to_find_again_too(tmp_path, make_card):
    make_card("zero_shot.ZeroShot", "instance_retrieval.InstanceRetrieval", classes=classes(2))
    for split in ("train", "test"):
        write(tmp_path / "things" / split / "class_1", {f"{split}.png": next(shades_of("red", 1))})
    (items,) = find_bench(tmp_path, [str(tmp_path / "things.yaml")]).items
    assert items.columns == {"instance": [["class_1"]] * 2}
    assert items.labels.tolist() == [1, 1]


def test_a_main_number_that_no_text_is_in_stands_in_the_tables(tmp_path, make_card, capsys):
    make_card("instance_retrieval.InstanceRetrieval")
    for split in ("train", "test"):
        write(tmp_path / "things" / split / "cup", {f"{split}.png": next(shades_of("red", 1))})
    result = run_bench(Shades(), find_bench(tmp_path, [str(tmp_path / "things.yaml")]), Options())
    assert result.languages() == [IMAGES]
    (row,) = compare(result, result)
    assert (row.language, row.a.value) == (IMAGES, 1)
    assert row.why_not == "no answers are kept for mP@5 of 64 numbers"
    print_result(result, tmp_path)
    said = capsys.readouterr().out
    assert "images only" in said
    assert re.search(r"things +mP@5 of 64 numbers .* 1\.000", said)
    assert "<td" in write_bench_report(tmp_path, result, lambda *_: None).read_text("utf-8")


# A picture and a text


def test_composed_queries_find_their_targets_as_a_loop_says(make_card):
    weighted = {"class_path": f"{ROOM}.composed_retrieval.ComposedRetrieval", "init_args": {"text_weight": 0.7}}
    card = make_card(weighted)
    generator = np.random.default_rng(5)
    image_NE, text_QE = generator.normal(size=(60, 12)), generator.normal(size=(20, 12))
    targets = generator.integers(20, 60, 20)
    image_NE[targets] = image_NE[:20] + text_QE + 0.8 * generator.normal(size=(20, 12))
    captions = {"en": [[f"query {i}"] if i < 20 else [] for i in range(60)]}
    cells = [[f"{targets[i]}.jpg"] if i < 20 else [""] for i in range(60)]
    items = items_of(card, 60, captions=captions, columns={"target": cells})
    card.protocols[0].check(items)
    found = scores_of(items, image_NE, {f"query {i}": text_QE[i] for i in range(20)})
    for length in LENGTHS:
        pictures, texts = unit(image_NE, length), unit(text_QE, length)
        for way, weight in (("", 0.7), ("image_only_", 0.0), ("text_only_", 1.0)):
            ranks = []
            for i in range(20):
                cosine_N = pictures @ unit((1 - weight) * pictures[i] + weight * texts[i])
                cosine_N[i] = -2
                ranks.append(int((cosine_N > cosine_N[targets[i]]).sum()))
            for k in (1, 5, 10, 50):
                row = found[f"{way}r{k}", "en", length, ""]
                assert (row.value, row.num_items, row.num_classes) == (
                    pytest.approx(np.mean(np.array(ranks) < k)),
                    20,
                    59,
                )
                assert row.chance == pytest.approx(k / 59)
    assert found["r1", "en", 12, ""].value > found["text_only_r1", "en", 12, ""].value


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([["1.jpg"], ["9.jpg"]], r"1\.jpg: target: '9\.jpg' is no image of the table"),
        ([["1.jpg", "0.jpg"], ["0.jpg"]], r"0\.jpg: 1 texts in en and 2 targets"),
        ([["1.jpg"], ["0.jpg"]], r"1\.jpg: 2 texts in hi and 1 targets"),
    ],
)
def test_targets_that_cannot_be_meant(make_card, cells, message):
    card = make_card("composed_retrieval.ComposedRetrieval")
    items = items_of(card, 2, captions={"en": [["a"], ["b"]], "hi": [["a"], ["b", "c"]]}, columns={"target": cells})
    with pytest.raises(ValueError, match=message):
        card.protocols[0].check(items)


def test_a_target_that_cannot_be_read_is_asked_for_no_more(make_card):
    card = make_card("composed_retrieval.ComposedRetrieval")
    cells = [["2.jpg"], ["3.jpg"], [""], [""]]
    items = items_of(card, 4, captions={"en": [["a"], ["b"], [], []]}, columns={"target": cells})
    found = scores_of(items.select([0, 1, 3]), np.eye(12)[:3], {"a": np.eye(12)[0], "b": np.eye(12)[2]})
    assert {row.num_items for row in found.values()} == {1}


# Text to text


def test_translations_find_each_other_as_a_loop_says(make_card):
    card = make_card("bitext.Bitext")
    generator = np.random.default_rng(6)
    center_NE = generator.normal(size=(30, 12))
    noise = {"en": 0.5, "hi": 1.0}
    texts = {f"{code} {i}": center_NE[i] + noise[code] * generator.normal(size=12) for i in range(30) for code in noise}
    english = [[f"en {i % 28}"] for i in range(30)]  # two rows have others' English, of which either Hindi is right
    hindi = [[f"hi {i}"] if i != 5 else [] for i in range(30)]
    items = items_of(card, 30, captions={"en": english, "hi": hindi, "ta": [[] for _ in range(30)]})
    assert set(texts_of(items, Options())) == {text for row in english + hindi for text in row}
    found = scores_of(items, np.ones((30, 12)), texts)
    pairs = {(row_hi[0], row_en[0]) for row_hi, row_en in zip(hindi, english, strict=True) if row_hi}
    ones, others = sorted({one for one, _ in pairs}), sorted({other for _, other in pairs})
    for length in LENGTHS:
        cosine = unit([texts[t] for t in ones], length) @ unit([texts[t] for t in others], length).T
        right = np.array([[(one, other) in pairs for other in others] for one in ones])
        to, fro = (
            right[np.arange(len(ones)), cosine.argmax(1)].mean(),
            right[cosine.argmax(0), np.arange(len(others))].mean(),
        )
        row = found["to_english_r1", "hi", length, ""]
        assert (row.value, row.num_items, row.num_classes) == (pytest.approx(to), len(ones), len(others))
        assert found["from_english_r1", "hi", length, ""].value == pytest.approx(fro)
        assert found["similarity", "hi", length, ""].value == pytest.approx(cosine[right].mean(), abs=1e-6)
        gap = cosine[right].mean() - cosine[~right].mean()
        assert found["similarity_gap", "hi", length, ""].value == pytest.approx(gap, abs=1e-6)
    assert {language for _, language, _, _ in found} == {"hi"}


def test_texts_without_images_have_a_page_that_shows_their_mistakes(tmp_path, make_card):
    make_card("bitext.Bitext")
    (tmp_path / "things").mkdir()
    rows = "".join(f"word {i}\tशब्द {i}\n" for i in range(6))
    rows = rows.replace("\n", "\tdevtest\n")  # texts have no splits, whatever a column is called
    (tmp_path / "things" / "texts.tsv").write_text(f"en\thi\tsplit\n{rows}", "utf-8")
    bench = find_bench(tmp_path, [str(tmp_path / "things.yaml")])
    result = run_bench(Shades(), bench, Options())
    assert {row.truth: (row.question, row.content) for row in result.predictions} == {
        f"word {i}": (f"शब्द {i}", f"शब्द {i}") for i in range(6)
    }
    page = write_bench_report(tmp_path, result, Pictures(bench.items)).read_text("utf-8")
    assert "Errors in texts, Hindi" in page
    assert "शब्द 3" in page
    assert "no picture" not in page


# Wording


def test_every_prompt_alone_is_zero_shot_with_that_prompt(make_card):
    prompts = {"en": ["a {c}", "the {c}"], "hi": ["{c} है"]}
    card = make_card(
        "zero_shot.ZeroShot", "wording.Wording", classes=classes(6, hi=lambda c: f"नाम {c}"), prompts=prompts
    )
    generator = np.random.default_rng(7)
    label_N = np.arange(60) % 6
    center_CE = generator.normal(size=(6, 12))
    items = items_of(card, 60, label_N)
    texts = {}
    for c, one in enumerate(card.classes):
        for template in ("{c}", "a {c}", "the {c}", "{c} है"):
            for name in one.names.values():
                texts[template.replace("{c}", name)] = center_CE[c] + 0.8 * generator.normal(size=12)
    assert set(texts_of(items, Options())) < set(texts)
    image_NE = center_CE[label_N] + 1.2 * generator.normal(size=(60, 12))
    found = scores_of(items, image_NE, texts)
    for language, templates in (("en", ["{c}", "a {c}", "the {c}"]), ("hi", ["{c}", "{c} है"])):
        rates = {}
        for template in templates:
            text_CE = unit([texts[template.replace("{c}", one.names[language])] for one in card.classes])
            rates[template] = ((unit(image_NE) @ text_CE.T).argmax(1) == label_N).mean()
            subset = "bare name" if template == "{c}" else template
            assert found["acc1", language, 12, subset].value == pytest.approx(rates[template])
        assert found["bare_name", language, 12, ""].value == pytest.approx(rates["{c}"])
        assert found["spread", language, 12, ""].value == pytest.approx(max(rates.values()) - min(rates.values()))
        assert len(set(rates.values())) > (language == "en")


# Somebody's own


def test_a_protocol_and_a_generator_of_ones_own_need_no_other_file(tmp_path, monkeypatch):
    """The colour that an image's embedding is brightest in; the images are drawn by a function beside it."""
    (tmp_path / "my_colours.py").write_text(
        textwrap.dedent(
            """
            import numpy as np
            from indiclip.evals.images.items import Items
            from indiclip.evals.protocols.metrics import hit_rate
            from indiclip.evals.protocols.protocol import Protocol

            class Brightest(Protocol):
                name = "brightest"
                metrics = ("acc1",)
                embeds_text = False

                def __init__(self, classes):
                    self.classes = classes

                def run(self, scorer):
                    if scorer.setting.length == scorer.lengths[-1]:
                        place = scorer.image_NE[scorer.tested].argmax(1).tolist()
                        answers = [scorer.card.ids.index(self.classes[i]) for i in place]
                        hits = np.array(answers) == scorer.label_N[scorer.tested]
                        yield from scorer.rows(self.name, "en", {"acc1": hit_rate(hits)}, len(hits), 3, 1 / 3)

            class Swatches:
                def __len__(self):
                    return 6
                def __getitem__(self, i):
                    return np.full((4, 4, 3), [255 * (i % 3 == c or i == 5) for c in range(3)], np.uint8)

            def drawn(card, seed):
                keys = [f"{seed}-{i}" for i in range(6)]
                return Items(card, Swatches(), keys, np.arange(6) % 3, procedural=True)
            """
        ),
        "utf-8",
    )
    names = ["red", "green", "blue"]
    page = {
        "protocols": [{"class_path": "my_colours.Brightest", "init_args": {"classes": names}}],
        "generator": "my_colours.drawn",
        "classes": [{"id": name, "names": {"en": name}} for name in names],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(page), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_colours", raising=False)
    result = run_bench(Shades(), find_bench(None, [str(tmp_path / "mine.yaml")], seed=3), Options())
    (row,) = result.scores
    assert (row.protocol, row.value, row.part) == ("brightest", pytest.approx(5 / 6), "procedural")
    assert result.logged() == {"eval/own/mine_procedural/en/brightest_acc1": pytest.approx(5 / 6)}


def test_a_card_names_protocols_of_ours_shortly(make_card):
    arguments = {"class_path": "group_gaps", "init_args": {"by": ["age"]}}
    content = {"protocols": ["zero_shot", "few_shot", arguments], "classes": classes(2)}
    card = make_card(**content)
    assert [protocol.name for protocol in card.protocols] == ["zero_shot", "few_shot", "group_gaps"]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (
            {"protocols": ["indiclip.evals.protocols.few_shot.FewShots"]},
            "few_shot has no 'FewShots'; nearest is 'FewShot'",
        ),
        (
            {"protocols": ["few_shots"]},
            "protocols: found 'few_shots'; nearest is 'few_shot'; expected one of bitext",
        ),
        ({"protocols": ["no_such.module.Class"]}, "No module named 'no_such'"),
        ({"protocols": ["pathlib.Path"]}, "protocols: PosixPath is no Protocol"),
        ({"protocols": []}, r"protocols: found \[\]; expected a list of names or class paths"),
        (
            {"protocols": [{"class_path": f"{ROOM}.few_shot.FewShot", "init_args": {"shot": [1]}}]},
            "unexpected keyword argument 'shot'",
        ),
        (
            {"protocols": [{"class_path": f"{ROOM}.few_shot.FewShot", "init_args": {"shots": [0]}}]},
            r"shots=\[0\], draws=3: expected 1 or more of each",
        ),
        ({"task": "classification", "generator": "math.no"}, "generator: math has no 'no'"),
        (
            {"protocols": [f"{ROOM}.zero_shot.ZeroShot", f"{ROOM}.zero_shot.ZeroShot"]},
            "protocols: the name 'zero shot' is that of 2",
        ),
    ],
)
def test_a_slip_in_a_path_is_one_line(make_card, page, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_card(**{"classes": classes(2), **page})
    assert "things.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_gallery_is_encoded_only_where_a_protocol_looks_at_it(tmp_path):
    names = list(PURE)[:3]
    page = {"task": "classification", "classes": [{"id": name, "names": {"en": name}} for name in names]}
    (tmp_path / "shades.yaml").write_text(yaml.safe_dump(page), "utf-8")
    files = {
        f"{split}/{name}/{i}.png": data
        for split, count in (("train", 9), ("test", 4))
        for name in names
        for i, data in enumerate(shades_of(name, count))
    }
    write(tmp_path / "shades", files)
    bench = find_bench(tmp_path, [str(tmp_path / "shades.yaml")])
    seen, zero_shot, data = {}, {}, {}
    for probes in (True, False):
        embedder = Shades()
        result = run_bench(embedder, bench, Options(probes=probes))
        seen[probes], data[probes] = embedder.seen, result.about["data"]
        zero_shot[probes] = [row for row in result.scores if row.language == "en"]
    assert seen == {True: 39, False: 12}
    assert zero_shot[True] == zero_shot[False]
    assert data[True] == data[False]
