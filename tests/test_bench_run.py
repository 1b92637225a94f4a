"""`indiclip bench --model`: its words and what is left behind."""

import shutil
import warnings

import numpy as np
import pytest
from PIL import Image
from processes import holding
from test_bench_photographs import MeanColour, photographs

from indiclip.cli import main
from indiclip.evals import mela_questions
from indiclip.evals.models import embedder
from indiclip.evals.result_files import load_result
from indiclip.training import run_folder


@pytest.fixture
def images(tmp_path, monkeypatch):
    def load(*args, **options):
        warnings.warn("weights are random", stacklevel=2)
        return MeanColour()

    monkeypatch.setattr(embedder, "load_embedder", load)
    monkeypatch.chdir(tmp_path)
    return photographs(tmp_path / "photos")


def bench(*more):
    return main(["bench", "--model", "m", "--images", "photos", "--cards", "edibles", "--resamples", "9", *more])


def test_help_behind_model(capsys):
    assert main(["bench", "--model", "--help"]) == 0
    assert "--no_procedural" in capsys.readouterr().out


def test_help_fits_80_columns(capsys):
    for words in (["--help"], ["--model", "--help"]):
        main(["bench", *words])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 84


def test_a_run_says_its_metric_and_warnings_in_a_line_each(images, capsys):
    assert bench("--languages", "hi") == 0
    out, err = capsys.readouterr()
    row = next(line for line in out.splitlines() if line.startswith("  edibles")).split()
    assert row[:4] == ["edibles", "recall", "9", "0.025"]
    assert "1 of 11 categories" in out
    assert err == "indiclip bench: weights are random\n"
    assert {file.name for file in (images.parent / "runs/bench/m").iterdir()} == {
        *("metrics.json", "predictions.parquet", "report.html", ".lock")
    }


def test_a_language_by_its_name(images, capsys):
    assert bench("--languages", "tamil") == 2
    assert "indiclip bench: --languages: found 'tamil'; nearest is 'ta'" in capsys.readouterr().err


def test_training_data_that_are_not_there_are_named_by_the_option(images, capsys):
    assert bench("--training", "nope.tar") == 2
    assert "indiclip bench: --training: nope.tar" in capsys.readouterr().err


def test_a_folder_where_the_comparison_is_to_be_written(images, capsys):
    assert bench("--out", "own") == 0
    assert main(["bench", "compare", "own", "own", "--out", "own"]) == 2
    assert "--out own: is a folder; expected a file" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_in_the_way(images, capsys, out):
    (images.parent / "file").write_text("mine")
    assert bench("--out", out) == 2
    assert f"--out {out}: a file is in the way; expected a folder" in capsys.readouterr().err
    assert (images.parent / "file").read_text() == "mine"


def test_two_runs_do_not_write_to_one_folder(images, capsys):
    (images.parent / "out").mkdir()
    with holding(images.parent / "out", images.parent / "other") as other:
        assert bench("--out", "out") == 2
    assert f"out: another process (pid {other} on " in capsys.readouterr().err
    assert bench("--out", "out") == 0
    assert run_folder._locks == []


def test_nothing_readable_is_a_mistake(images, capsys):
    for file in images.rglob("*.png"):
        file.write_text("no picture")
    assert bench("--out", "out") == 2
    assert (
        "nothing could be scored: none of the images to score can be read; not counted, unreadable: idli/160.png"
        in capsys.readouterr().err
    )
    assert not (images.parent / "out" / "metrics.json").exists()


def test_images_seen_in_training_are_said(images, capsys):
    assert main(["shards", "pack", "photos/edibles", "--out", "shards", "--name", "train"]) == 0
    capsys.readouterr()
    assert bench("--training", "shards/*.tar") == 0
    found = "edibles: 9 of 9 are in the training data (the same bytes 9; the same looks 0; with too little structure"
    assert found in capsys.readouterr().out  # of one colour each
    for file in images.rglob("*.png"):
        pixels = np.random.default_rng(len(file.parent.name)).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).resize((200, 200)).save(file)
    assert main(["shards", "pack", "photos/edibles", "--out", "shards2", "--name", "train"]) == 0
    assert bench("--training", "shards2/*.tar") == 0
    said = (
        "9 of 9 are in the training data (the same bytes 9; the same looks 9; not looked for: a caption); no other is"
    )
    assert said in capsys.readouterr().out


def test_a_second_run_of_a_model_does_not_replace_the_first(images):
    assert bench() == bench("--languages", "hi") == 0
    runs = images.parent / "runs/bench"
    assert sorted(folder.name for folder in runs.iterdir()) == ["m", "m-2"]
    assert bench("--out", str(runs / "m"), "--languages", "hi") == 0  # unless it is asked to
    assert len(list(runs.iterdir())) == 2


def test_a_suite_is_scored_by_its_name(images, monkeypatch):
    monkeypatch.setattr(mela_questions, "PER_KIND", 5)
    shutil.rmtree(images / "edibles")
    photographs(images, ("masala_dosa", "benne_dosa", "uttapam"))
    photographs(images, ("age_0_2", "age_70"), "face_attributes")
    files = sorted(file.relative_to(images / "face_attributes") for file in images.glob("face_attributes/*/*.png"))
    rows = [f"{file},{file.parent},{'ab'[place % 2]}" for place, file in enumerate(files)]
    (images / "face_attributes" / "faces.csv").write_text("\n".join(["file,class,group", *rows]))
    options = ("--images", "photos", "--cards", "culture", "--resamples", "9", "--languages", "hi", "kn", "ur")
    assert main(["bench", "--model", "m", *options]) == 0
    result = load_result(images.parent / "runs/bench/m")
    found = {(s.card, s.protocol, s.language, s.subset) for s in result.scores}
    assert {language for card, _, language, _ in found if card == "mela_questions"} == {"en", "hi", "kn", "ur"}
    pairs = {s.language: s.num_items for s in result.scores if s.metric == "group_score" and s.length == 3}
    assert pairs == {"en": 6, "hi": 6, "kn": 6, "ur": 6}
    assert ("face_attributes", "group_gaps", "hi", "group=a") in found
    status = {(card.card, card.part): card.status for card in result.cards}
    assert status["mela_questions", "procedural"] == status["edibles_pairs", "photographs"] == "scored"
    assert status["clothes_pairs", "photographs"] == "skipped"
    notes = next(card.notes for card in result.cards if card.card == "edibles_pairs")
    assert not [note for note in notes if "not scored in kn" in note]
    page = (images.parent / "runs/bench/m/report.html").read_text("utf-8")
    assert "Culture of India, photographs: 2 of" in page


def test_a_card_that_is_none_and_the_nearest(images, capsys):
    assert main(["bench", "--model", "m", "--images", "photos", "--cards", "cultur"]) == 2
    assert "no card 'cultur'; nearest is 'culture'" in capsys.readouterr().err
