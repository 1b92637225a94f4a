"""A run as a table for the terminal."""

from pathlib import Path

import pytest
from bench_fakes import card, score, small_run

from indiclip.evals import console
from indiclip.evals.results import IMAGES


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
    assert ("in the report: " in out, f"in the report: {more} more language" in out) == (more > 0, more > 0)


def test_what_is_skipped_is_said_once_for_each_reason(capsys):
    console.print_result(run(), Path("runs/m"))
    out = capsys.readouterr().out
    assert "skipped: gods: no folder gods/" in out
    assert "India: 3 of 11 categories have photographs; mean corrected for chance: en " in out
