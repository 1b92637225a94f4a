"""Results of the benchmark and their files."""

import json
import math
import sys

import pytest
from bench_fakes import answer, card, score, small_run

from indiclip.evals.result_files import load_result, save_result
from indiclip.evals.results import IMAGES, PROCEDURAL, Result, grouped


def test_a_saved_run_comes_back_as_it_was(tmp_path):
    result = small_run(data={"food": "1f"})
    other = answer("π.jpg", "रोटी", "dosa", hard_hit=False, flagged=True, content="1f")
    result.predictions = [*result.predictions, other]
    save_result(result, tmp_path)
    assert load_result(tmp_path) == result


def test_predictions_can_be_left_alone(tmp_path):
    save_result(small_run(), tmp_path)
    assert load_result(tmp_path, predictions=False).predictions == []


def test_headline_is_the_mean_of_the_photographs_corrected_for_chance():
    headline = small_run().headline()
    assert headline["mean"]["en"] == {"value": pytest.approx((0.5 + 0.8) / 2), "cards": 2}
    assert headline["mean"]["hi"] == {"value": pytest.approx(0.25), "cards": 1}


def test_a_skipped_card_lowers_the_cover_and_not_the_mean():
    result = small_run()
    assert (result.headline()["covered"], result.headline()["of"]) == (2, 11)
    result.cards = [one for one in result.cards if one.status == "scored"]
    assert result.headline()["mean"]["en"]["value"] == pytest.approx(0.65)
    assert not any("gods" in name for name in small_run().logged())


def test_generated_pictures_are_in_no_mean():
    result = small_run()
    before = result.headline()["mean"]
    result.scores = [row._replace(value=0.0) if row.part == PROCEDURAL else row for row in result.scores]
    assert result.headline()["mean"] == before


def test_the_worlds_cards_are_not_in_indias_mean():
    result = small_run()
    before = result.headline()
    result.cards.append(card("cifar10", suite="world"))
    result.scores.append(score("cifar10", 0.1, suite="world", chance=0.1))
    assert result.headline() == before
    assert result.headline("world")["mean"] == {"en": {"value": 0.0, "cards": 1}}


def test_names_that_are_logged():
    result = Result("m", [4, 8], ["native", "64-square"], [card("food")])
    rows = [
        {},
        {"length": 4},
        {"view": "64-square"},
        {"length": 4, "view": "64-square", "language": "hi"},
        {"protocol": "knn", "language": IMAGES},
        {"part": PROCEDURAL},
        {"part": PROCEDURAL, "subset": "tamil"},  # in the files only, as what follows
        {"length": 4, "metric": "acc5"},
    ]
    result.cards.append(card("food", part=PROCEDURAL))
    result.scores = [score("food", 0.5, **row) for row in rows]
    assert set(result.logged()) == {
        "eval/india/food/en/acc1",
        "eval/india/food/en/acc1_4",
        "eval/india/food/en/acc1@64-square",
        "eval/india/food/hi/acc1_4@64-square",
        "eval/india/food/images/knn_acc1",
        "eval/india/food_procedural/en/acc1",
        "eval/india/mean/en/corrected",
    }


def test_english_comes_first():
    result = small_run()
    result.scores = [score("food", 0.5, language) for language in ("bn", "en", "as")]
    result.scores += [score("food", 0.5, IMAGES, protocol="knn")]
    assert result.languages() == ["en", "as", "bn"]
    result.scores += [score("food", 0.5, IMAGES)]  # the card's main number
    assert result.languages() == ["en", "as", "bn", IMAGES]


def test_a_value_that_is_no_number_stays_out_of_the_mean_and_the_file_valid_json(tmp_path):
    result = small_run()
    result.scores.append(score("script", math.nan, "hi", chance=0.1, low=math.nan))
    assert result.headline()["mean"]["hi"] == {"value": pytest.approx(0.25), "cards": 1}
    save_result(result, tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)
    back = load_result(tmp_path).scores[-1]
    assert math.isnan(back.value)
    assert back.low is None


def test_without_pyarrow_one_learns_what_to_install_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'indiclip\[parquet\]'"):
        save_result(small_run(), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.json: no such file; expected the folder of a finished"):
        load_result(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": "m", "lengths": [], "views": [], "about": {}}'])
def test_a_file_of_another_program_is_named(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json: not the metrics of `indiclip bench`"):
        load_result(tmp_path)


def test_the_missing_key_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="not the metrics of `indiclip bench`: the key 'model' is missing"):
        load_result(tmp_path)


def test_predictions_keep_their_order_within_a_card():
    rows = [answer("b", "x", "x"), answer("a", "x", "x", language="hi"), answer("a", "x", "x")]
    groups = grouped(rows)
    assert [row.key for row in groups["food", "photographs", "zero_shot", "en"]] == ["b", "a"]
    assert len(groups) == 2


def test_a_card_on_which_guessing_is_always_right_is_in_no_mean():
    result = small_run()
    before = result.headline()["mean"]["en"]
    result.cards.append(card("words"))
    result.scores.append(score("words", 1.0, chance=1.0))
    assert result.headline()["mean"]["en"] == before
    assert result.headline()["covered"] == 3
