"""The report's page."""

import re

import numpy as np

from indiclip.training.report.report import held_out, write_report


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
    assert write_report(tmp_path, "x", record, {}).read_text(encoding="utf-8").count("<img") == 1


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
    row = '<tr><td>Hindi</td><td class="number">not finite</td><td class="number">0.125</td></tr>'
    assert '<tr><th>language</th><th class="number">gap</th><th class="number">r5</th></tr>' in page
    assert row in page
    assert page.count("<img") == 2


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
    assert write_report(tmp_path, "x", record, {}).read_text(encoding="utf-8").count("<img") == 1


def test_labels_on_a_picture_cover_none_before_them_and_are_all_said_in_words(tmp_path):
    """Of four at one point the first stands above it, the second below, and the others in the alt text alone."""
    record = {"step": 3, "seconds": 1.5, "metrics": {}, "history": [], "quarantined": [], "data": {}}
    labels = [(50, 50, "kite"), (51, 50, "diya"), (49, 50, "matka"), (50, 51, "dhol"), (50, 90, "far")]
    pictures = [([(np.zeros((100, 100, 3), np.uint8), "model", labels)], [])]
    page = write_report(tmp_path, "x", record, {"detection": pictures}).read_text(encoding="utf-8")
    assert re.findall(r'<span class="(above|below)"[^>]*>(\w+)<', page) == [
        ("above", "kite"),
        ("below", "diya"),
        ("above", "far"),
    ]
    assert 'alt="model: kite; diya; matka; dhol; far"' in page


def test_a_label_at_the_upper_edge_stands_below_it(tmp_path):
    record = {"step": 3, "seconds": 1.5, "metrics": {}, "history": [], "quarantined": [], "data": {}}
    pictures = [([(np.zeros((100, 100, 3), np.uint8), "", [(50, 0, "kite")])], [])]
    page = write_report(tmp_path, "x", record, {"detection": pictures}).read_text(encoding="utf-8")
    assert '<span class="below" style="--x:50.0%;--y:0.0%">kite<' in page


def test_where_any_picture_has_two_panels_there_is_room_for_both(tmp_path):
    record = {"step": 3, "seconds": 1.5, "metrics": {}, "history": [], "quarantined": [], "data": {}}
    image = np.zeros((8, 8, 3), np.uint8)
    one, two = ([(image, "model", [])], []), ([(image, "model", []), (image, "truth", [])], [])
    page = write_report(tmp_path, "x", record, {"densepose": [one, two], "counting": [one]}).read_text("utf-8")
    assert re.findall(r'<div class="(pictures[^"]*)"', page) == ["pictures", "pictures single"]
