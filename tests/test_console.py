"""The table of a run, as it comes where the output is no terminal."""

from pathlib import Path

import pytest
from bench_fakes import card, score, small_run

from indiclip.evals.reports import console
from indiclip.evals.reports.console import print_result
from indiclip.evals.results import IMAGES


def test_the_table_has_the_main_numbers_and_says_what_is_skipped(capsys):
    result = small_run("my[bold]model")
    result.cards[0].notes = ["no images of 1 of 2 classes, which stay candidates: roti"]
    result.cards.append(card("gods2", status="skipped", notes=["no folder gods/"]))
    result.scores += [
        score("food", 0.77, IMAGES, protocol="knn"),
        score("food", 0.11, IMAGES, protocol="knn", length=4),
        score("food", 0.88, IMAGES, protocol="linear_probe"),
    ]
    print_result(result, Path("runs/[x]"))
    lines = capsys.readouterr().out.splitlines()
    row = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    assert "my[bold]model" in row
    assert row["food"] == ["top-1", "4", "0.200", "0.600", "±0.10", "0.400", "0.770", "of", "0", "0.880", "of", "0"]
    assert row["script"] == ["*", "top-1", "4", "0.100", "0.990"]  # the last of two rows: what is generated
    assert "skipped: gods, gods2: no folder gods/" in lines
    assert "food: no images of 1 of 2 classes, which stay candidates: roti" in lines
    assert "India: 2 of 11 categories have photographs; mean corrected for chance: en 0.650, hi 0.250" in lines
    assert "report runs/[x]/report.html" in lines


def run():
    result = small_run()
    result.cards.append(card("a_card_with_a_very_long_name"))
    for language in ("en", "hi", "ta"):
        result.scores.append(score("a_card_with_a_very_long_name", 0.123, language, low=0.1, high=0.2, chance=0.025))
    for protocol in ("knn", "linear_probe"):
        result.scores.append(score("food", 0.777, IMAGES, protocol=protocol, num_classes=40))
    return result


@pytest.mark.parametrize(("width", "more"), [(130, 0), (112, 1), (80, 2)])
def test_a_narrow_terminal_gets_fewer_languages_and_whole_numbers(monkeypatch, capsys, width, more):
    monkeypatch.setattr(console, "_PLAIN_WIDTH", width)
    console.print_result(run(), Path("runs/m"))
    out = capsys.readouterr().out
    assert "0.777 of 40" in out
    assert "0.123 ±0.05" in out
    assert "…" not in out
    assert ("more language" in out, f"in the report: {more} more language" in out) == (more > 0, more > 0)
    assert "1 more length" in out  # an embedding of four numbers


def test_a_number_that_is_none_and_a_distance_are_said_as_in_the_report(capsys):
    result = run()
    result.cards[0].metric = "median_km"
    result.scores[:2] = [
        score("food", 412.3, metric="median_km", low=400, high=420),
        score("food", float("nan"), "hi", "median_km"),
    ]
    print_result(result, Path("runs/m"))
    assert "412 km ±10 km" in (out := capsys.readouterr().out)
    assert "nan" not in out


def test_what_is_skipped_is_said_once_for_each_reason(capsys):
    console.print_result(run(), Path("runs/m"))
    out = capsys.readouterr().out
    assert "skipped: gods: no folder gods/" in out
    assert "India: 3 of 11 categories have photographs; mean corrected for chance: en " in out
