"""The report's page."""

import numpy as np
import pytest

from indiclip.evals.pages.plot import plot
from indiclip.evals.pages.report import held_out, write_report


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    record = {"step": 3, "seconds": 1.5, "metrics": {"val/a/b": None}, "quarantined": [], "data": {}}
    record["history"] = [{"step": 1, "train/a/loss": 2.0}, {"step": 2, "train/a/loss": None}]
    assert "not finite" in write_report(tmp_path, "x", record, {}).read_text(encoding="utf-8")


def test_report_is_one_page_that_escapes_what_it_shows(tmp_path):
    record = {"step": 3, "seconds": 1.5, "metrics": {"val/a/b": 0.25}, "history": [], "quarantined": [], "data": {}}
    picture = (np.zeros((8, 8, 3), np.uint8), "<script>alert(1)</script> पतंग")
    page = write_report(tmp_path, "a & b", record, {"contrastive": [picture]}).read_text(encoding="utf-8")
    assert "a &amp; b" in page
    assert "<script>" not in page
    assert "पतंग" in page
    assert "val/a/b" in page
    assert "0.25" in page


def test_curves_are_of_what_was_measured_more_than_once(tmp_path):
    history = [{"step": 1, "train/a/loss": 2.0}, {"step": 2, "train/a/loss": 1.0}, {"step": 2, "val/a/b": 0.25}]
    record = {
        "step": 2,
        "seconds": 1.5,
        "metrics": {"val/a/b": 0.25},
        "history": history,
        "quarantined": [],
        "data": {},
    }
    assert write_report(tmp_path, "x", record, {}).read_text(encoding="utf-8").count("<svg") == 1


def test_a_plot_by_hand():
    """An axis is a twentieth longer at each end than what it shows: of 392 by 230 pixels, one in 22."""
    drawn = plot("train/a", {"loss": [(0, 4.0), (10, 2.0)], "<b>": [(5, 3.0)]})
    left, right, top, bottom = 56 + 392 / 22, 448 - 392 / 22, 26 + 230 / 22, 256 - 230 / 22
    points = [pytest.approx(point, abs=0.06) for point in ((left, top), (right, bottom), (252, 141))]
    assert [point for line in drawn.lines for point in line.points] == points
    assert drawn.x_ticks == [(pytest.approx(left + i * (right - left) / 5, abs=0.06), f"{2 * i}") for i in range(6)]
    assert [words for _, words in drawn.y_ticks] == ["2", "2.4", "2.8", "3.2", "3.6", "4"]
    assert plot("t", {"t": [(1, 0.5), (2, 0.25)]}, from_zero=True).y_ticks[0] == (256, "0")
    assert plot("t", {"t": []}).lines[0].points == []


def test_a_long_curve_keeps_the_extremes_of_each_column_of_pixels():
    values = np.random.default_rng(0).normal(size=20_000)
    values[[777, 7777]] = 50.0, -50.0
    (line,) = plot("t", {"t": [*enumerate(values.tolist())]}).lines
    whole = plot("t", {"t": [(i, values[i]) for i in (0, 777, 7777, 19_999)]}).lines[0].points
    assert len(line.points) <= 2 * 392
    assert {*whole[1:3]} <= {*line.points}
    assert line.points == sorted(line.points, key=lambda point: point[0])


def test_languages_are_rows_of_a_table_and_curves_of_a_plot_of_their_own(tmp_path):
    metrics = {"val/a/r5/hi": 0.125, "val/a/r5/en": 0.25, "val/a/gap/hi": None, "val/a/r5": 0.5, "train/a/loss/hi": 3.0}
    assert held_out(metrics) == (
        {"val/a/r5": 0.5},
        {"a": {"hi": {"gap": None, "r5": 0.125}, "en": {"r5": 0.25}}},
    )
    many = {f"val/a/r5/{i}": i / 40 for i in range(30)}  # more than there are colours
    history = [{"step": i, "val/a/r5": 0.5, **many} for i in range(2)]
    record = {"step": 2, "seconds": 1.5, "metrics": metrics, "history": history, "quarantined": [], "data": {}}
    page = write_report(tmp_path, "x", record, {}).read_text(encoding="utf-8")
    row = '<tr><td>hi</td><td class="number">not finite</td><td class="number">0.125</td></tr>'
    assert '<tr><th>language</th><th class="number">gap</th><th class="number">r5</th></tr>' in page
    assert row in page
    assert page.count("<svg") == 2


def test_of_a_benchmark_a_page_shows_english_and_means():
    metrics = {
        f"eval/india/{name}": 0.5
        for name in ("food/en/acc1", "food/hi/acc1", "food/en/acc1_64", "food/en/parity_acc1", "mean/hi/corrected")
    }
    assert list(held_out(metrics)[0]) == ["eval/india/food/en/acc1", "eval/india/mean/hi/corrected"]


def test_a_benchmarks_cards_are_curves_of_one_plot(tmp_path):
    metrics = {f"eval/india/{card}/{code}/acc1": 0.5 for card in ("food", "gods") for code in ("en", "hi", "ta")}
    history = [{"step": step, **metrics} for step in (1, 2)]
    record = {"step": 2, "seconds": 1.5, "metrics": metrics, "history": history, "quarantined": [], "data": {}}
    assert write_report(tmp_path, "x", record, {}).read_text(encoding="utf-8").count("<svg") == 1
