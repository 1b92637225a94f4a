"""`indiclip leaderboard`: its pages, rows of strangers, own cards, and what stands in one table."""

import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from bench_fakes import card, score
from processes import in_processes
from test_leaderboard import DATA, run

from indiclip.cli import main
from indiclip.evals.leaderboard import groups_of, row_of
from indiclip.evals.leaderboard_file import read
from indiclip.evals.result_files import save_result
from indiclip.evals.results import IMAGES

ASKED = {name: {"en": "1", "hi": "2"} for name in DATA}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(name, value=0.6, report=False, change=None, **about):
    result = run(name, value, **about)
    result.scores[0] = score("food", value, low=value - 0.1, high=value + 0.1, chance=0.2)
    result.scores.append(score("food", 0.15, "hi", "parity_acc1", low=0.05, high=0.25))
    if change is not None:
        change(result)
    save_result(result, folder := Path("bench", name))
    if report:
        (folder / "report.html").write_text("a report")
    return str(folder)


def own(result):
    result.cards = [card("mine", suite="own", title="My photographs")]
    result.scores = [score("mine", 0.7, suite="own", low=0.6, high=0.8, chance=0.5)]
    result.about["data"] = {"mine": "9f"}


def site(*runs, out="board"):
    return main(["leaderboard", *runs, "--out", out])


def page(name="index.html", out="board"):
    return (Path(out) / name).read_text("utf-8")


def test_a_page_with_intervals_and_gaps_and_one_for_each_run(folder, capsys):
    assert site(save("a", report=True), save("b", 0.9)) == 0
    assert "| 1 | b | 2026-01-02 |" in capsys.readouterr().out
    index = page()
    pages = re.findall(r'<a href="(runs/[0-9a-f]{12}\.html)">([ab])</a>', index)
    assert [name for _, name in pages] == ["b", "a"]
    of = {name: page(file) for file, name in pages}
    # food 0.6 of 0.5 to 0.7, chance 0.2; English is 0.15 better than Hindi on the same images.
    assert "chance 0.200" in index
    for words in ("0.500 to 0.700", "chance 0.200", "−0.150 vs English", "(−0.250 to −0.050)"):
        assert words in of["a"]
    assert '<a href="../../bench/a/report.html">' in of["a"]
    assert (folder / "board/runs/../../bench/a/report.html").is_file()
    assert "report.html" not in of["b"]
    shutil.rmtree("bench/a")
    assert site() == 0
    assert "report.html" not in page(next(file for file, name in pages if name == "a"))


def test_a_report_elsewhere_is_not_linked(folder):
    assert site(save("a", report=True), out="deep/down/board") == 0
    assert json.loads(page("leaderboard.jsonl", "deep/down/board"))["report"] == ""


def test_means_have_intervals_made_of_those_of_their_cards():
    result = run("a")
    result.scores[0] = score("food", 0.6, low=0.5, high=0.8, chance=0.2)  # corrected: 0.5, of 0.375 to 0.75
    result.scores[3] = score("script", 0.82, low=0.73, high=0.91, chance=0.1)  # 0.8, of 0.7 to 0.9
    row = row_of(result)
    low, high = 0.65 - (0.125**2 + 0.1**2) ** 0.5 / 2, 0.65 + (0.25**2 + 0.1**2) ** 0.5 / 2
    assert row["mean_interval"]["en"] == pytest.approx((0.65, low, high)[1:])
    result.scores[3] = score("script", 0.82, chance=0.1)
    assert row_of(result)["mean_interval"]["en"] == (None, None)


def test_own_cards_have_a_table_of_their_own(folder):
    assert site(save("a"), save("b", change=own)) == 0
    assert re.findall("<h2>(.*?) ·", page()) == ["Covers 2 of 11 categories", "Own cards: 1 of 1"]
    assert "apart" not in page()
    assert main(["bench", "leaderboard", "bench/b", "--file", "own.jsonl"]) == 0
    (head,) = [line for line in page("own.md", ".").splitlines() if "My photographs" in line]
    assert head == "|  | model | date | length, view | run | My photographs in English |"  # no mean


def test_a_run_without_photographs_is_said(folder, capsys):
    def procedural(result):
        result.cards, result.scores = result.cards[3:], result.scores[4:]

    assert site(save("generated", change=procedural)) == 0
    assert capsys.readouterr().err == "indiclip: generated: no number on photographs, so it is in no table\n"
    assert "No run has scored photographs yet." in page()
    assert "<table" not in page()


def test_a_card_that_takes_no_text_has_its_number(folder, capsys):
    def few_shot(result):
        result.cards = [card("mine", suite="own", metric="acc1_1_shot", protocol="few_shot")]
        result.scores = [score("mine", 0.75, IMAGES, "acc1_1_shot", suite="own", protocol="few_shot", chance=0.5)]

    def probes(result):
        result.cards, result.scores = result.cards[:1], [score("food", 0.5, IMAGES, protocol="knn")]

    assert site(save("a", change=few_shot), save("b", change=probes)) == 0
    assert capsys.readouterr().err == ""
    assert "images only, chance 0.500" in page()
    assert "| Mine images only |" in page("leaderboard.md")
    assert re.search(r"\| 1 \| a \|.*\| 0.750 \|$", page("leaderboard.md"), re.M)


def test_a_model_without_text_stands_with_its_probes_beside_the_others(folder):
    def with_probes(result):
        of_food = {"protocol": "knn", "chance": 0.2}
        result.scores += [score("food", 0.7, IMAGES, low=0.6, high=0.8, **of_food)]

    def without_text(result):
        with_probes(result)
        result.scores, result.about["asked"] = result.scores[-1:], {}

    data = {"data": {"food": "1f", "script": "2e", "gods": "3d"}}
    assert site(save("a", change=with_probes, **data), save("b", change=without_text, **data)) == 0
    lines = [line for line in page("leaderboard.md").splitlines() if line.startswith("|")]
    assert "kNN mean" in lines[0]
    rows = {line.split("|")[2].strip(): line for line in lines if "2026" in line}
    assert len(rows) == 2  # in one table
    assert "0.625" in rows["a"]  # (0.7 - 0.2) / 0.8
    assert "0.625" in rows["b"]


def test_only_runs_asked_alike_stand_together():
    other = {name: {"en": "other", "hi": "2"} for name in DATA}
    rows = [row_of(run(name, asked=asked)) for name, asked in {"a": ASKED, "b": other, "c": ASKED, "d": {}}.items()]
    groups = groups_of(rows)  # `d` does not say how it asked, as runs of before do not
    assert [[row["model"] for row in group] for group in groups] == [["a", "c", "d"], ["b"]]


def test_a_language_asked_otherwise_is_marked(folder):
    hindi = {name: {"en": "1", "hi": "other"} for name in DATA}
    assert site(save("a", asked=ASKED), save("b", asked=hindi)) == 0
    assert len(re.findall("<h2>", page())) == 1
    assert "Hindi<small>mean, asked by different names or prompts" in page()
    assert "English<small>mean<" in page()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"run": "x", "mod', "Unterminated string"),
        ("[1, 2]", "found [1, 2]; expected an object"),
        ('{"loss": 1.5}', "has no 'run', so it is of no benchmark run"),
        ({"mean": 5}, "mean: found 5; expected a number for each language"),
        ({"mean": {"en": "high"}}, "mean: found {'en': 'high'}; expected a number for each language"),
        ({"mean": {"en": float("nan")}}, "mean: found {'en': nan}; expected a number for each language"),
        ({"cards": {"food": 0.5}}, "cards: found {'food': 0.5}; expected a number for each card and language"),
        ({"lengths": []}, "lengths: found []; expected whole numbers"),
        ({"run": "../../x"}, "run: found '../../x'; expected letters and digits"),
        ({"covered": "two"}, "covered: found 'two'; expected a whole number"),
        ({"gaps": {"food": {"hi": [1, 2]}}}, "gaps: found {'food': {'hi': [1, 2]}}; expected three numbers for"),
        ("[" * 100_000, "recursion"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_row_is_named_and_kept(folder, capsys, line, said):
    stranger = line if isinstance(line, str) else json.dumps(row_of(run("x")) | line)
    (folder / "board").mkdir()
    (folder / "board/leaderboard.jsonl").write_text(stranger)
    assert site(save("a")) == 0
    (error,) = capsys.readouterr().err.splitlines()
    assert error.lower().startswith("indiclip: board/leaderboard.jsonl: line 1 is skipped: ")
    assert said.lower() in error.lower()
    assert stranger in (folder / "board/leaderboard.jsonl").read_text()
    rows, skipped = read(folder / "board/leaderboard.jsonl")
    assert ([row["model"] for row in rows], len(skipped)) == (["a"], 1)


def test_rows_of_before_stay(folder):
    """They have neither a suite nor intervals."""
    before = ("run", "model", "date", "covered", "of", "mean", "cards", "lengths", "views", "data")
    (folder / "board").mkdir()
    row = {key: value for key, value in row_of(run("old")).items() if key in before}
    (folder / "board/leaderboard.jsonl").write_text(json.dumps(row) + "\n")
    assert site(save("a", 0.9)) == 0
    assert re.findall(r'html">(\w+)</a>', page()) == ["a", "old"]


def test_a_run_that_is_added_again_replaces_its_rows(folder):
    assert site(save("a"), save("b", change=own)) == site(save("a"), save("b", change=own)) == 0
    assert len(read(folder / "board/leaderboard.jsonl")[0]) == 2


def test_a_file_in_the_way(folder, capsys):
    (folder / "board").write_text("mine")
    assert site() == 2
    assert "--out board: a file is in the way; expected a folder" in capsys.readouterr().err


def test_two_processes_that_add_at_once_lose_no_row(folder):
    def work(name):
        for i in range(5):
            assert site(save(f"{name}{i}")) == 0

    done = in_processes([partial(work, name) for name in "xy"], folder)
    assert done.returncode == 0, done.stderr
    assert sorted(row["model"] for row in read(folder / "board/leaderboard.jsonl")[0]) == sorted(
        f"{name}{i}" for name in "xy" for i in range(5)
    )
    assert len(list((folder / "board/runs").iterdir())) == 10


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_columns_are_sorted_by_their_buttons_and_stand_in_order_without_a_script(folder):
    def hindi(value):
        return lambda result: result.scores.__setitem__(1, score("food", value, "hi", chance=0.2))

    assert site(save("a", 0.9, change=hindi(0.3)), save("b", 0.8, change=hindi(0.5)), save("c", 0.7)) == 0
    written = page()
    assert re.findall(r'html">(\w)</a>', written) == ["a", "b", "c"]
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/chrome"]
    click = "document.querySelectorAll('.board th button')[2].click();"
    for times, order in ((1, "bca"), (2, "acb")):
        clicked = written.replace("</body>", f"<script>{click * times}</script></body>")
        (folder / "board/clicked.html").write_text(clicked)
        words = [*browser, "--dump-dom", f"file://{folder}/board/clicked.html"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert re.findall(r'html">(\w)</a>', done.stdout) == list(order)
        assert re.findall(r'aria-sort="(\w+ending)"', done.stdout) == [("descending", "ascending")[times - 1]]


def test_help_says_how(capsys):
    assert main(["leaderboard", "--help"]) == 0
    assert "indiclip leaderboard runs/bench/*" in capsys.readouterr().out


def test_a_model_without_a_number_has_no_mean_over_fewer_cards():
    result = run("a")
    result.scores[0] = score("food", float("nan"), chance=0.2)
    row = row_of(result)
    assert row["mean"]["en"] is None
    assert row["cards"]["food"]["en"] is None
    assert row["mean"]["hi"] == pytest.approx(0.25)


def test_a_gap_that_is_no_number_leaves_no_mean_of_the_others_gaps():
    result = run("a")
    result.scores += [score("script", 0.4, "hi")]
    gaps = {"food": 0.25, "script": 0.15}
    result.scores += [score(name, gap, "hi", "parity_acc1", low=gap, high=gap) for name, gap in gaps.items()]
    assert row_of(result)["mean_gap"]["hi"] == pytest.approx((-0.2, -0.2, -0.2))
    result.scores[-1] = result.scores[-1]._replace(value=float("nan"))
    assert row_of(result)["mean_gap"]["hi"] == (None, None, None)


def test_another_precision_is_said(folder):
    assert site(save("a", options={"precision": "bf16"}), save("b")) == 0
    assert [words.strip() for words in re.findall("<small>length (.*?)</small>", page())] == [
        "8, native, bf16",
        "8, native",
    ]
    assert "| 8, native, bf16 |" in page("leaderboard.md")


@pytest.mark.parametrize("name", ["config.yaml", "checkpoints"])
def test_no_leaderboard_is_written_into_a_training_run(folder, name, capsys):
    (folder / "run" / name).mkdir(parents=True)
    assert site(save("a"), out="run") == 2
    assert f"--out run: holds {name}, of a training run or another program; expected a new" in capsys.readouterr().err
    assert [file.name for file in (folder / "run").iterdir()] == [name]


def test_tables_of_own_cards_say_why_they_are_apart(folder):
    def mine(result, images="9f", asked="1", name="mine"):
        own(result)
        result.cards[0].card, result.scores[0] = name, result.scores[0]._replace(card=name)
        result.about |= {"data": {name: images}, "asked": {name: {"en": asked}}}

    others = [{}, {"images": "8e"}, {"asked": "2"}, {"name": "other"}]
    runs = [save(f"r{place}", change=partial(mine, **other)) for place, other in enumerate(others)]
    assert site(*runs) == 0
    why = [
        "",
        " · apart: other images or labels",
        " · apart: other names or prompts in English",
        " · apart: other cards",
    ]
    assert sorted(re.findall("<h2>Own cards: 1 of 1 · images [0-9a-f]+(.*?)</h2>", page())) == sorted(why)


def test_runs_of_one_model_are_told_apart_by_folder_and_time(folder, capsys):
    date = "2026-01-02T03:04:05+00:00"
    save("a", date=date)
    Path("bench/a").rename("bench/first")
    assert site("bench/first") == 0
    assert "| a | 2026-01-02 03:04:05 UTC | 8, native | first |" in capsys.readouterr().out
    assert "<small>first · 2026-01-02 03:04:05 UTC</small>" in page()
    assert "+00:00" not in page()


def test_both_commands_take_the_same_options(folder, capsys):
    save("a")
    assert main(["bench", "leaderboard", "bench/a", "--out", "one"]) == 0
    assert main(["leaderboard", "bench/a", "--file", "two.jsonl"]) == 0
    assert Path("one/index.html").is_file()
    assert Path("two.html").is_file()
    for words in (["bench", "leaderboard"], ["leaderboard"]):
        assert main([*words, "--out", "one", "--file", "two.jsonl"]) == 2
        assert "--file two.jsonl, --out one: expected one of them" in capsys.readouterr().err
