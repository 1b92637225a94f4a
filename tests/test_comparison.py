"""Two runs side by side."""

import sys
from copy import deepcopy

import numpy as np
import pytest
from bench_fakes import answer, score, small_run

from indiclip.commands import bench
from indiclip.evals.comparison import compare, in_words
from indiclip.evals.protocols.metrics import parity_gap
from indiclip.evals.reports.comparison_page import write_comparison
from indiclip.evals.result_files import save_result
from indiclip.evals.results import IMAGES, PROCEDURAL

TRUTHS = ["dosa"] * 6 + ["roti"] * 2


def run(ranks, metric="acc1", model="m", **about):
    """A run of one card in English with these ranks of the truth, one for each of TRUTHS."""
    result = small_run(model, **about)
    result.cards, result.scores = result.cards[:1], [score("food", 0.5, metric=metric, num_classes=2)]
    result.cards[0].metric = metric
    result.predictions = [
        answer(f"{i}.jpg", truth, truth if rank == 0 else "idli", rank)
        for i, (truth, rank) in enumerate(zip(TRUTHS, ranks, strict=True))
    ]
    return result


def test_difference_is_over_the_shared_images_and_says_which_changed():
    (row,) = compare(run([1, 1, 1, 0, 0, 0, 0, 0]), run([0, 0, 0, 0, 0, 0, 1, 0]))
    assert row.gap.value == pytest.approx((3 - 1) / 8)
    assert row.shared == 8
    assert row.gained == (("0.jpg", "dosa"), ("1.jpg", "dosa"), ("2.jpg", "dosa"))
    assert row.lost == (("6.jpg", "roti"),)
    assert row.gap.low < row.gap.value < row.gap.high


def test_mean_per_class_weighs_classes_not_images():
    a, b = ([1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 0])
    (row,) = compare(run(a, "mean_per_class_recall"), run(b, "mean_per_class_recall"))
    assert row.gap.value == pytest.approx((3 / 6 - 1 / 2) / 2)


def test_a_hit_at_five_is_among_the_nearest_five():
    (row,) = compare(run([4, 5, 0, 0, 0, 0, 0, 0], "acc5"), run([5, 4, 4, 0, 0, 0, 0, 0], "acc5"))
    assert row.gap.value == 0
    assert [key for key, _ in row.gained] == ["1.jpg"]
    assert [key for key, _ in row.lost] == ["0.jpg"]


def test_a_run_differs_from_itself_by_nothing():
    (row,) = compare(run([0, 1, 0, 0, 3, 0, 0, 2]), run([0, 1, 0, 0, 3, 0, 0, 2]))
    assert row.gap.value == 0
    assert row.gap.low == pytest.approx(-row.gap.high)
    assert row.gap.low < 0  # of eight images one cannot be sure
    assert row.gained == row.lost == ()
    assert in_words([row]).endswith("| 0.000 (−0.081 to 0.081), on 8 images")


def test_of_images_that_one_run_lacks_or_has_other_bytes_of_only_the_common_ones_are_compared(tmp_path, capsys):
    a, b = run([1, 1, 1, 1, 0, 0, 0, 0]), run([0, 0, 0, 0, 0, 0, 1, 0])
    a.predictions = [row._replace(content=row.key) for row in a.predictions]
    b.predictions = [row._replace(content=row.key) for row in b.predictions[1:]]  # one could not be read
    b.predictions = [row._replace(content="other") if row.key == "1.jpg" else row for row in b.predictions]
    (row,) = compare(a, b)
    assert row.why_not == ""
    assert row.gap.value == pytest.approx((2 - 1) / 6)
    assert [key for key, _ in row.gained] == ["2.jpg", "3.jpg"]
    said = "on the common 6 images of A's 8 and B's 7, where A has 0.667 and B 0.833"
    assert in_words([row]).endswith(said)
    write_comparison(tmp_path / "c.html", a, b)
    assert said[3:] in (tmp_path / "c.html").read_text(encoding="utf-8").replace("&#39;", "'")


def test_of_several_questions_about_an_image_the_images_are_drawn():
    a, b = run([0] * 8), run([0] * 8)
    hits = {"a": [1, 1, 1, 1, 0, 0, 0, 0], "b": [1, 1, 1, 1, 1, 1, 0, 0]}  # all four of an image are right or wrong
    for one, name in ((a, "a"), (b, "b")):
        one.predictions = [
            answer(f"{i}.jpg", f"w{q}", "x" if not hit else f"w{q}", content=f"{i}", question=f"w{q}")
            for i, hit in enumerate(hits[name])
            for q in range(4)
        ]
    (row,) = compare(a, b)
    assert (row.shared, row.items, row.gap.value) == (32, "questions", 0.25)
    assert in_words([row]).endswith("on 32 questions")
    alone = parity_gap(np.array(hits["b"], bool), np.array(hits["a"], bool))
    assert row.gap.high - row.gap.low >= alone.high - alone.low  # 32 questions say no more than eight images
    b.predictions = [row._replace(question=f"{row.question}?") for row in b.predictions]
    assert compare(a, b)[0].why_not == "different questions, 8 of them under the same names"


def test_images_of_other_names_and_the_same_bytes_are_compared_copies_too():
    a, b = run([1, 1, 1, 0, 0, 0, 0, 0]), run([0, 0, 0, 0, 0, 0, 1, 0])
    a.predictions = [row._replace(content=f"{i // 2}") for i, row in enumerate(a.predictions)]  # pairs of copies
    b.predictions = [row._replace(content=f"{i // 2}", key=f"x/{row.key}") for i, row in enumerate(b.predictions)]
    (row,) = compare(a, b)
    assert (row.shared, row.why_not) == (8, "")
    assert row.gap.value == pytest.approx(0.25)
    for one in (a, b):
        one.cards[0].candidates = "texts"  # which texts are asked for follows from the name
    assert compare(a, b)[0].why_not == "different images"


def test_images_of_other_bytes_are_not_compared():
    a, b = run([0] * 8), run([1] * 8)
    a.predictions = [row._replace(content="1f") for row in a.predictions]
    b.predictions = [row._replace(content="2e") for row in b.predictions]
    (row,) = compare(a, b)
    assert row.why_not == "different images, 8 of them under the same names"


def test_the_order_of_images_makes_no_difference():
    a, b = run([1, 1, 1, 0, 0, 0, 0, 0]), run([0, 0, 0, 0, 0, 0, 1, 0])
    b.predictions = b.predictions[::-1]
    assert compare(a, b)[0].gap.value == pytest.approx(0.25)


def other_images(b):
    b.predictions = [row._replace(key=f"other {row.key}") for row in b.predictions]


def of_another_version(b):
    b.predictions = [row._replace(content=row.key) for row in b.predictions]


def other_truth(b):
    b.predictions = [row._replace(truth="roti") if row.key == "0.jpg" else row for row in b.predictions]


def other_candidates(b):
    b.predictions = b.predictions[1:]
    b.cards[0].candidates = "images"  # as a card's newest run says


def other_prompts(b):
    b.about["asked"] = {"food": {"en": "other"}}


def other_classes(b):
    b.scores[0] = b.scores[0]._replace(num_classes=3)


def other_data(b):
    b.about["data"] = {"food": "other"}


def other_metric(b):
    b.cards[0].metric = "acc5"
    b.scores[0] = b.scores[0]._replace(metric="acc5")


def no_predictions(b):
    b.predictions = []


@pytest.mark.parametrize(
    ("change", "why_not"),
    [
        (other_images, "different images"),
        (of_another_version, "A is of an earlier version, which kept nothing of its images' bytes; score it again"),
        (other_candidates, "different images, which are each other's candidates: 7 of 8 are shared"),
        (other_prompts, "different classes, names or prompts"),
        (other_truth, "different classes: 1 of 8 images have another truth"),
        (other_classes, "different classes: 2 and 3"),
        (other_data, "different images, or labels, under the same names"),
        (other_metric, "different metrics: top-1 and top-5"),
        (no_predictions, "no answers of the protocol zero shot in B"),
    ],
)
def test_what_is_not_the_same_is_not_compared(tmp_path, change, why_not):
    about = {"data": {"food": "1f"}, "asked": {"food": {"en": "3d"}}}
    a, b = run([0] * 8, **deepcopy(about)), run([1] * 8, **deepcopy(about))
    change(b)
    (row,) = compare(a, b)
    assert row.why_not == why_not
    assert row.gap is None
    write_comparison(tmp_path / "c.html", a, b)
    assert f"not compared: {why_not}" in (tmp_path / "c.html").read_text(encoding="utf-8").replace("&#39;", "'")


@pytest.mark.parametrize("metric", ["median_km", "text_to_image_r5"])
def test_a_metric_without_hits_of_images_is_not_compared(metric):
    (row,) = compare(run([0] * 8, metric), run([1] * 8, metric))
    assert row.why_not.startswith("no answers are kept for ")


def test_a_language_of_one_run_only_is_named():
    a, b = run([0] * 8), run([0] * 8)
    b.scores.append(score("food", 0.5, "hi"))
    assert [(row.language, row.why_not) for row in compare(a, b)] == [("en", ""), ("hi", "only in B")]


def test_page_escapes_and_lists_what_changed(tmp_path):
    a, b = run([1] + [0] * 7, model="<b>one"), run([0] * 8, model="two")
    for one in (a, b):
        one.predictions = [row._replace(key=row.key.replace("0.jpg", "<u>.jpg")) for row in one.predictions]
    write_comparison(tmp_path / "sub" / "c.html", a, b)
    page = (tmp_path / "sub" / "c.html").read_text(encoding="utf-8")
    assert "&lt;u&gt;.jpg" in page
    assert "<b>one" not in page
    assert "+0.125" in page


def test_command_writes_the_page(tmp_path, capsys):
    runs = run([1] + [0] * 7), run([0] * 8)
    for folder, one in zip("ab", runs, strict=True):
        one.views.append("64-square")
        save_result(one, tmp_path / folder)
    out = tmp_path / "c.html"
    assert bench.compare(tmp_path / "a" / "metrics.json", tmp_path / "b", out) == 0
    assert "<h1>a: m and b: m</h1>" in out.read_text("utf-8")
    said = capsys.readouterr().out
    assert "Food, English, top-1: 0.500 | 0.500 | +0.125" in said
    assert "compared: A at the view native, B at native; both also have 64-square, see their reports" in said


def test_command_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    save_result(run([0] * 8), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install"):
        bench.compare(tmp_path / "a", tmp_path / "a", tmp_path / "c.html")


def test_other_photographs_do_not_stand_against_comparing_what_is_generated():
    a, b = run([0] * 8), run([1] * 8)
    for one, digest in ((a, "1f"), (b, "2e")):
        one.cards[0].part = PROCEDURAL
        one.scores = [row._replace(part=PROCEDURAL) for row in one.scores]
        one.predictions = [row._replace(part=PROCEDURAL) for row in one.predictions]
        one.about["data"] = {"food": digest, "food_procedural": "same"}
    assert {row.why_not for row in compare(a, b)} == {""}
    b.about["data"]["food_procedural"] = "other"
    assert {row.why_not for row in compare(a, b)} == {"different images, or labels, under the same names"}


@pytest.mark.parametrize(("hits", "coloured"), [(40, "better"), (0, "worse"), (21, "")])
def test_only_what_the_paired_interval_shows_is_coloured(tmp_path, hits, coloured):
    """Of 40 images 20 are right in A; one more says nothing."""
    a, b = small_run("a"), small_run("b")
    for result, right in ((a, 20), (b, hits)):
        result.predictions = [
            answer(f"{i}.jpg", "dosa" if i % 2 else "roti", ("dosa" if i % 2 else "roti") if i < right else "idli")
            for i in range(40)
        ]
    write_comparison(tmp_path / "c.html", a, b)
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    body = page[page.index("<body>") :].replace('<i class="key better">', "").replace('<i class="key worse">', "")
    assert ("fill b better" in body, "fill b worse" in body) == (coloured == "better", coloured == "worse")
    assert ('class="hit"' in body, 'class="miss"' in body) == (coloured == "better", coloured == "worse")


def test_page_calls_classes_by_their_names(tmp_path):
    a, b = run([1, 0, 0, 0, 0, 0, 0, 0]), run([0, 0, 0, 0, 0, 0, 0, 0])
    for result in (a, b):
        result.cards[0].names = {"dosa": {"en": "masala dosa", "hi": "डोसा"}}
    write_comparison(tmp_path / "c.html", a, b)
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert '<tr><td>0.jpg</td><td>masala dosa <bdi lang="hi">डोसा</bdi></td></tr>' in page
    assert "Newcombe" in page


def test_a_card_that_only_probes_have_scored_is_named(tmp_path):
    a, b = run([0] * 8), run([0] * 8)
    a.scores = [score("food", 0.5, IMAGES, protocol="knn")]
    b.cards, b.scores = [], []
    assert [row.why_not for row in compare(a, a)] == ["only probes in both"]
    assert [row.why_not for row in compare(b, a)] == ["only in B, by probes"]
    write_comparison(tmp_path / "c.html", a, b)
    assert "only in A, by probes" in (tmp_path / "c.html").read_text(encoding="utf-8")
