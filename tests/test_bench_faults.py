"""`indiclip bench`: what it refuses before it scores, what it keeps where a page fails, and words of strangers."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from bench_fakes import small_run
from test_bench_photographs import MeanColour, photographs

from indiclip.cli import main
from indiclip.commands import bench_run
from indiclip.evals.models import embedder
from indiclip.evals.result_files import save_result
from indiclip.names import plain

HOSTILE = "\x1b[31mred\x1b[0m\nline\u202eback\x9b2J\x1b]0;title\x07"
ACTED_ON = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(embedder, "load_embedder", lambda *args, **options: MeanColour())
    monkeypatch.chdir(tmp_path)
    return photographs(tmp_path / "photos")


def bench(*more, cards=("edibles",)):
    words = ["bench", "--model", "m", "--images", "photos", "--resamples", "9", "--out", "out", "--cards", *cards]
    return main([*words, *more])


def refused(capsys, *more, **options):
    """The one line in which it is refused, before a model is loaded."""
    assert bench(*more, **options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line.removeprefix("indiclip bench: ")


def write_card(name, **content):
    classes = [{"id": one, "names": {"en": one}} for one in ("idli", "jalebi", "samosa")]
    content = {"title": "Mine", "task": "classification", "folder": "edibles", "classes": classes} | content
    Path(name).write_text(yaml.safe_dump(content), "utf-8")
    return name


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ({"config.yaml": "a: 1"}, "config.yaml"),
        ({"checkpoints/last.ckpt": ""}, "checkpoints"),
        ({"metrics.json": '{"val/loss": 1.5}'}, "a metrics.json of another kind"),
        ({"metrics.json": '{"model": "m", "ca'}, "a metrics.json of another kind"),
    ],
)
def test_a_folder_of_something_else_is_not_written_to(photos, capsys, monkeypatch, folder, found):
    for name, content in folder.items():
        Path("out", name).parent.mkdir(parents=True, exist_ok=True)
        Path("out", name).write_text(content)
    monkeypatch.setattr(bench_run, "run_bench", None)
    assert refused(capsys).startswith(f"--out out: holds {found}, of a training run or another program; expected a new")
    assert {str(file.relative_to("out")) for file in Path("out").rglob("*") if file.is_file()} == folder.keys()


def test_an_earlier_benchmark_is_replaced(photos):
    assert bench() == bench("--no_probes") == 0
    assert "knn" not in {score["protocol"] for score in json.loads(Path("out/metrics.json").read_text())["scores"]}


def test_a_page_that_fails_leaves_the_scores_and_says_where(photos, capsys, monkeypatch):
    def fail(*args):
        assert {file.name for file in Path("out").iterdir()} >= {"metrics.json", "predictions.parquet"}
        raise KeyError("a hole in a template")

    monkeypatch.setattr(bench_run, "write_bench_report", fail)
    assert bench() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out/report.html could not be written (KeyError: 'a hole in a template'); the scores are in out/me" in line
    assert main(["bench", "leaderboard", "out"]) == 0


def test_names_that_are_no_utf_8_cost_no_score(photos, capsys):
    for number, file in enumerate(sorted(photos.rglob("*.png"))):
        file.rename(file.with_name(os.fsdecode(b"caf\xe9%d.png" % number)))
    card = write_card("mine.yaml")
    Path(card).write_text(Path(card).read_text().replace("title: Mine", r'title: "half \ud83d pair"'))
    assert bench(cards=[card]) == 0
    content = Path("out/metrics.json").read_bytes().decode()
    assert json.loads(content)["cards"][0]["title"] == "half \ufffd pair"
    assert r"\ud83d" not in content
    page = Path("out/report.html").read_bytes().decode()
    assert "half \ufffd pair" in page
    assert r"caf\xe9" in page
    assert main(["bench", "compare", "out", "out"]) == 0
    assert "half \ufffd pair" in capsys.readouterr().out


def test_terminal_codes_of_a_card_are_printed_nowhere(photos, capsys):
    names = {one: {"en": f"{one}{HOSTILE}", "hi": f"{one} हिं\u200dदी"} for one in ("idli", "jalebi", "samosa")}
    classes = [{"id": one, "names": of} for one, of in names.items()]
    card = write_card("mine.yaml", title=f"Mine{HOSTILE}", notes=HOSTILE, source=HOSTILE, classes=classes)
    stranger = photos / "edibles" / f"idli{HOSTILE}"
    stranger.mkdir()
    (stranger / "1.png").write_text("no picture")
    (photos / "edibles" / "idli" / "a\x1b[31m\u202e.png").write_text("no picture")
    assert bench(cards=[card]) == 2  # a folder of no class
    shutil.rmtree(stranger)
    assert bench(cards=[card]) == 0
    words = (["bench", "cards", card], ["bench", "compare", "out", "out"], ["bench", "leaderboard", "out"])
    assert [main(list(one)) for one in words] == [0, 0, 0]
    broken = write_card("broken.yaml", title=5, classes=classes[:1] * 2, notes=HOSTILE)
    assert bench(cards=[broken]) == 2
    out, err = capsys.readouterr()
    files = [Path("out/report.html"), Path("compare.html"), Path("leaderboard.md"), Path("leaderboard.html")]
    for text in (out, err, *(file.read_text() for file in files)):
        assert not ACTED_ON.search(text)
    assert "हिं\u200dदी" in out  # joiners stay


def test_words_are_plain():
    assert plain(f"a{HOSTILE}b") == "ared lineback b".replace(" b", "b")
    assert plain("क्\u200dष\u200c é 𝄞 \udcff") == "क्\u200dष\u200c é 𝄞 \ufffd"


def test_words_that_cannot_be_meant_are_a_line(photos, capsys):
    Path("folder.yaml").mkdir()
    Path("images").write_text("no folder")
    card, same = write_card("mine.yaml"), str(Path("mine.yaml").resolve())
    Path("latin.yaml").write_bytes(b"title: caf\xe9")
    assert refused(capsys, cards=["folder.yaml"]) == "folder.yaml: is a folder; expected the YAML file of a card"
    assert refused(capsys, cards=["latin.yaml"]).startswith("latin.yaml: line 1: found the byte 0xe9; expected UTF-8")
    assert refused(capsys, "--images", "images").startswith("images: is a file; expected a folder with the images of")
    assert "--lengths: found '0'; expected a whole number from 1" in refused(capsys, "--lengths", "0")
    assert bench(cards=[card, same, card]) == 0
    assert len(json.loads(Path("out/metrics.json").read_text())["cards"]) == 1


def protocols_of(folder="out"):
    return {
        (score["card"], score["protocol"]) for score in json.loads(Path(folder, "metrics.json").read_text())["scores"]
    }


def test_protocols_are_added_to_the_cards_that_know_what_they_need(photos, capsys):
    few_shot = "indiclip.evals.protocols.few_shot.FewShot"
    assert bench("--protocols", few_shot, "wording", "zero_shot", "--no_procedural") == 0
    assert {("edibles", "few_shot"), ("edibles", "wording"), ("edibles", "zero_shot")} <= protocols_of()
    (card,) = json.loads(Path("out/metrics.json").read_text())["cards"]
    assert card["protocol"] == "zero_shot"  # the main one stays
    before = protocols_of()
    assert bench("--no_procedural") == 0
    assert before - protocols_of() == {("edibles", "few_shot")}  # it had the others


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("few_shots", "--protocols: found 'few_shots'; nearest is 'few_shot'; expected one of bitext, "),
        ("indiclip.evals.protocols.few_shot.FewShots", "--protocols: indiclip.evals.protocols.few_shot has no 'Few"),
        ("indiclip.evals.nothing.Here", "--protocols: indiclip.evals.nothing.Here: No module named"),
        ("pathlib.Path", "--protocols: PosixPath is no Protocol; expected a class of indiclip.evals.protocols"),
        ("group_gaps", "--protocols: found 'group_gaps'; expected one of bitext, "),  # which needs arguments
        ("multi_label", "--protocols: multi_label needs classes of each image, which none of the cards has"),
    ],
)  # fmt: skip
def test_other_protocols_are_a_line(photos, capsys, name, said):
    assert refused(capsys, "--protocols", name).startswith(said)


def test_a_strangers_metrics_are_printed_plainly(tmp_path, capsys):
    result = small_run(f"m{HOSTILE}", data={"food": "1", "script": "2"})
    result.cards[0].title = HOSTILE
    save_result(result, tmp_path / "a")
    for words in (["compare", str(tmp_path / "a"), str(tmp_path / "a"), "--out", str(tmp_path / "c.html")],):
        assert main(["bench", *words]) == 0
    assert main(["bench", "leaderboard", str(tmp_path / "a"), "--file", str(tmp_path / "l.jsonl")]) == 0
    assert not ACTED_ON.search("".join(capsys.readouterr()))
