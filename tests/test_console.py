"""The table of a run, as it comes where the output is no terminal."""

from pathlib import Path

from bench_fakes import card, score, small_run

from indiclip.evals.pages.console import print_result
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
