"""What a run's report opens with, and what it calls its numbers."""

import json

import numpy as np
import pytest
import yaml

from heads.contrastive import Contrastive
from heads.counting import Counting
from heads.densepose import DensePose
from heads.depth import Depth
from heads.detection import Detection
from indiclip.generated.mela import Mela
from indiclip.head import Line, Measure, Panel
from indiclip.training.record import _print_scores
from indiclip.training.report.headline import FIRST, Drawn, Earlier, duration, earlier_run, headlines, sentence
from indiclip.training.report.report import held_out, language_tables, write_report
from indiclip.training.report.run_names import named, reading_order

HEADS = {
    "contrastive": (
        "Image-text matching",
        {
            "zero_shot_64": Measure("zero-shot accuracy at length 64", "higher", trivial=0.1),
            "zero_shot_128": Measure("zero-shot accuracy at length 128", "higher", trivial=0.1),
            "zero_shot": Measure(
                "zero-shot accuracy at full length", "higher", "", 0.1, "guessing among 10 classes", main=True
            ),
            "r5": Measure("recall at 5", "higher", main=True),
        },
    ),
    "counting": (
        "Counting",
        {"mae": Measure("mean error", "lower", "things", main=True), "of_mean": Measure("of the mean", "", "things")},
    ),
}
METRICS = {"val/counting/mae": 1.25, "val/contrastive/r5": 0.5, "val/contrastive/zero_shot": 0.75, "train/loss": 3.0}
RECORD = {
    "step": 1,
    "seconds": 7500,
    "metrics": METRICS,
    "history": [],
    "quarantined": [],
    "data": {},
    "heads": HEADS,
    "model": "An encoder of 2.49 million parameters (NaFlexViT)",
    "learned": ["Image-text matching", "DensePose", "Counting"],
    "sources": {"Mela": [Drawn(2000, 60), Drawn(1000, 20)]},
}


def test_each_head_has_a_row_in_words_with_chance_direction_and_the_run_before():
    rows = headlines(METRICS, HEADS, Earlier("x", {"val/counting/mae": 1.5, "val/contrastive/r5": 0.25}))
    said = [(row.subject, row.words, row.value_words, row.trivial_words, row.better, row.before_words) for row in rows]
    chance = "0.1 (guessing among 10 classes)"
    assert said == [
        ("Image-text matching", "zero-shot accuracy at full length", "0.75", chance, "higher", ""),
        ("Counting", "mean error", "1.25 things", "", "lower", "1.5 things"),
    ]


def test_the_main_number_is_the_first_that_was_measured_and_an_unknown_heads_its_first():
    metrics = {"val/contrastive/r5": None, "val/other/b10": 2.0, "val/other/b9": 1.0, "val/other/b9/hi": 7.0}
    said = [(row.subject, row.words, row.value_words) for row in headlines(metrics, HEADS)]
    assert said == [("Image-text matching", "recall at 5", "not finite"), ("Other", "b9", "1")]


def test_the_sentence_says_what_was_trained_on_what_how_long_and_what_it_reached():
    assert sentence(RECORD, headlines(METRICS, HEADS)) == (
        "An encoder of 2.49 million parameters (NaFlexViT) learned image-text matching, DensePose and counting in 1 "
        "step (2 h 5 min) on 80 of 3,000 samples of Mela; on held-out data it reached zero-shot accuracy at full "
        "length (0.75) and mean error (1.25 things)."
    )
    assert sentence({"step": 1200, "seconds": 59.7}, []) == (
        "The model was trained in 1,200 steps (1 min); nothing was held out, so there are no scores."
    )


@pytest.mark.parametrize(
    ("steps", "sources", "words"),
    [
        (20, [Drawn(200_000, 80)], "1,600 of 200,000 samples of Mela"),
        (20, [Drawn(1600, 80)], "1,600 samples of Mela"),
        (50, [Drawn(1600, 80)], "1,600 samples of Mela (2.5 epochs)"),
        (50, [Drawn(1600, 80), Drawn(10_000, 20)], "2,600 of 11,600 samples of Mela"),  # one of them again and again
        (50, [Drawn(1600, None)], "samples drawn from 1,600 of Mela"),
    ],
)
def test_the_sentence_says_how_many_samples_were_seen(steps, sources, words):
    record = {"step": steps, "seconds": 1, "sources": {"Mela": sources}}
    assert f" in {steps} steps (1 s) on {words}; nothing" in sentence(record, [])


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (0.2, "1 s"), (61, "1 min 1 s"), (3600, "1 h"), (3725.4, "1 h 2 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_lengths_stand_in_the_order_of_their_numbers_the_full_one_last():
    names = ["val/x/zero_shot", "val/x/zero_shot_64", "val/x/zero_shot_256", "val/x/zero_shot_128"]
    ordered = sorted(names, key=lambda name: reading_order(name, {}))
    assert [name.removeprefix("val/x/zero_shot") for name in ordered] == ["_64", "_128", "_256", ""]
    declared = [f"val/contrastive/{name}" for name in HEADS["contrastive"][1]]
    assert sorted({*declared}, key=lambda name: reading_order(name, HEADS)) == declared


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("val/counting/mae", "Counting: mean error"),
        ("val/contrastive/r5/hi", "Image-text matching: recall at 5, Hindi"),
        ("train/contrastive/loss/ur", "Image-text matching: loss, Urdu"),
        ("train/loss", "train/loss"),
        ("throughput/waiting_for_data", "share of the time in which it waits for data"),
        ("eval/india/street_food/ta/acc1", "India benchmark: street food, top-1, Tamil"),
        ("lr-AdamW/pg1", "lr-AdamW/pg1"),
    ],
)
def test_numbers_are_called_by_words(name, words):
    assert named(name, HEADS).full == words


def heads():
    """Of every kind, as a run binds them."""
    from helpers import tiny_encoder

    encoder = tiny_encoder()
    kinds = [Contrastive(), Detection(num_classes=17, out_channels=32), DensePose(), Counting(), Depth()]
    for head in kinds:
        head.bind(encoder)
    return {head.name: head for head in kinds}


def test_every_head_names_one_main_number_with_direction_and_chance():
    mela = Mela(4, 32, "single")
    found = {}
    for name, head in heads().items():
        first = next(measure for measure in head.measures(mela).values() if measure.main)
        found[name] = (head.title, first.better, first.trivial)
    assert found == {
        "contrastive": ("Image-text matching", "higher", 1 / len(mela.classes)),
        "detection": ("Detection", "higher", 0.0),
        "densepose": ("DensePose", "higher", 1 / 24),
        "counting": ("Counting", "lower", 1.0),
        "depth": ("Depth", "higher", 0.0),
    }
    assert Detection(num_classes=2, name="street_signs").title == "Street signs"


@pytest.fixture
def runs(tmp_path):
    """Makes the folder of a run."""

    def make(name, metrics=None, size=8, seed=1):
        folder = tmp_path / name
        folder.mkdir()
        dataset = {"class_path": "indiclip.generated.mela.Mela", "init_args": {"seed": seed}}
        config = {"data": {"val": [{"task": "a", "dataset": dataset, "batch_size": 4}]}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        data = {"data.train[0]": {"samples": {"used": size}}, "data.val[0]": {"samples": {"used": size}}}
        if metrics is not None:
            (folder / "metrics.json").write_text(json.dumps({"metrics": metrics, "data": data}))
        return folder, data

    return make


def test_the_run_before_is_the_last_of_the_same_name_that_ended(runs):
    runs("demo", {"val/a/b": 0.1})
    runs("demo-2", {"val/a/b": 0.2, "val/a/none": None})
    runs("demo-3")  # killed
    runs("demonstration-3", {"val/a/b": 0.9})
    runs("demo-11", {"val/a/b": 0.11})
    folder, data = runs("demo-10")
    assert earlier_run(folder, data) == Earlier("demo-2", {"val/a/b": 0.2, "val/a/none": None})
    (folder.parent / "demo-2" / "metrics.json").write_text("{torn")
    assert earlier_run(folder, data).name == "demo"


def test_a_first_run_and_a_name_that_ends_in_a_number_have_none_before(runs):
    runs("vit-14", {"val/a/b": 0.2})
    folder, data = runs("vit-16")
    assert earlier_run(folder, data) == FIRST
    assert earlier_run(folder.parent / "vit-14", data) == FIRST


@pytest.mark.parametrize("other", [{"size": 9}, {"seed": 2}])
def test_a_run_on_other_held_out_data_is_named_and_not_compared(runs, other):
    runs("demo", {"val/a/b": 0.1}, **other)
    folder, data = runs("demo-2")
    earlier = earlier_run(folder, data)
    assert (earlier.name, dict(earlier.metrics)) == ("demo", {})
    assert "Not compared with demo," in earlier.note


def test_the_page_and_the_terminal_say_the_same_in_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    record = RECORD | {"earlier": Earlier("demo", {"val/counting/mae": 1.5})}
    record["metrics"] = METRICS | {"val/contrastive/r5/hi": 0.5, "val/contrastive/r5/en": 0.25}
    page = write_report(tmp_path, "demo-2", record, {}).read_text()
    _print_scores(record)
    shown = capsys.readouterr().out
    opening, _, engineering = page.partition("For engineers")
    for words in ("mean error", "1.25 things", "1.5 things", "0.1 (guessing among 10 classes)", "Hindi", "lower"):
        assert words in opening
        assert words in shown
    assert "demo reached" in opening
    for raw in ("val/", "train/", "zero_shot"):
        assert raw not in opening
        assert raw not in shown
    assert "<code>val/contrastive/zero_shot</code>" in engineering
    by_language = language_tables(held_out(record["metrics"])[1], HEADS)
    assert [row[0] for row in by_language[0].rows] == ["English", "Hindi"]


HOSTILE = "<img src=x onerror=alert(1)>'\"--><!--fonts--></style><script>alert(2)</script>"


def test_words_of_others_cannot_become_a_part_of_the_page(tmp_path):
    measures = {"m": Measure(HOSTILE, "higher", HOSTILE, 0.5, HOSTILE, main=True)}
    record = RECORD | {"metrics": {"val/a/m": 1.0, f"val/a/{HOSTILE}": 1.0}, "heads": {"a": (HOSTILE, measures)}}
    history = [{"step": step, "val/a/m": 0.5} for step in range(2)]
    record |= {"history": history, "earlier": Earlier(HOSTILE, {"val/a/m": 2.0}, HOSTILE)}
    pixels = np.zeros((8, 8, 3), np.uint8)
    picture = [Panel(pixels, HOSTILE, [(1, 2, HOSTILE)])], [Line(HOSTILE, 'hi" onload="alert(3)')]
    page = write_report(tmp_path, HOSTILE, record, {"a": [picture]}).read_text()
    assert "<img src=x" not in page
    assert "<script" not in page
    assert ' onload="' not in page
    assert page.count("</style>") == page.count("<style>")
    assert "&lt;!--fonts--&gt;" in page


def test_labels_are_words_over_the_image_within_it(tmp_path):
    panels = [Panel(np.zeros((50, 100, 3), np.uint8), "model", [(25, 20, "kite 0.90"), (400, -3, "off")])]
    page = write_report(tmp_path, "x", RECORD, {"counting": [(panels, "one\ntwo")]}).read_text()
    assert 'style="--x:25.0%;--y:40.0%">kite 0.90</span>' in page
    assert 'style="--x:100.0%;--y:0.0%">off</span>' in page
    assert "<div><bdi>one</bdi></div><div><bdi>two</bdi></div>" in page


def test_nothing_is_loaded_and_what_scrolls_can_be_reached_by_keyboard(tmp_path):
    record = RECORD | {"metrics": METRICS | {"val/contrastive/r5/hi": 0.5}}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("a: 1\n")
    page = write_report(folder, "x", record, {}).read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert page.count('class="scroll"') == page.count('class="scroll" tabindex="0"') > 3
    assert '<pre tabindex="0">a: 1' in page


def test_a_caption_names_its_language_and_runs_in_its_own_direction(tmp_path):
    lines = [Line("پتنگ", "ur", "✓"), Line("zzz", "qq"), Line("plain")]
    page = write_report(tmp_path, "x", RECORD, {"a": [(np.zeros((8, 8, 3), np.uint8), lines)]}).read_text()
    assert '<div><span>✓</span> <bdi lang="ur">پتنگ</bdi> <small>Urdu</small></div>' in page
    assert '<div><bdi lang="qq">zzz</bdi> <small>qq</small></div><div><bdi>plain</bdi></div>' in page


@pytest.mark.slow
def test_a_page_of_many_pictures_stays_below_three_megabytes(tmp_path):
    """Of noise, which cannot be compressed: first coarser, then fewer of each head."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    picture = [Panel(noise, "model"), Panel(noise, "truth")], "noise"
    page = write_report(tmp_path, "x", RECORD, {"contrastive": [picture] * 3, "counting": [picture] * 12}).read_text()
    assert len(page) < 3_000_000
    first, second = page.split(": held-out images</h2>")[1:]
    assert 1 <= first.count("<figure>") < 3
    assert 2 <= second.count("<figure>") < 12
