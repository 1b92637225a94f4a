"""Runs collected in one file."""

from functools import partial

import pytest
from bench_fakes import score, small_run
from processes import in_processes

from indiclip.commands.bench import leaderboard
from indiclip.evals import leaderboard_pages
from indiclip.evals.leaderboard import groups_of, row_of
from indiclip.evals.leaderboard_file import read
from indiclip.evals.result_files import save_result

DATA = {"food": "1f", "script": "2f", "gods": "3f"}


def run(model, value=0.6, date="2026-01-02", **about):
    result = small_run(model, **{"data": DATA, "date": date} | about)
    result.scores[0] = score("food", value, chance=0.2)
    return result


def add(file, results):
    return leaderboard_pages.add(file, [(result, file.parent / "run") for result in results]).groups


def models(group):
    return [row["model"] for row in group]


def test_best_first(tmp_path):
    (group,) = add(tmp_path / "l.jsonl", [run("b", 0.5), run("a", 0.9), run("c", 0.7)])
    assert models(group) == ["a", "c", "b"]
    assert group[0]["mean"]["en"] == pytest.approx((0.875 + 0.8) / 2)
    assert (group[0]["covered"], group[0]["of"]) == (2, 11)


def test_a_run_that_is_added_again_replaces_its_row(tmp_path):
    file = tmp_path / "l.jsonl"
    add(file, [run("a", 0.5), run("b", 0.55)])
    (group,) = add(file, [run("a", 0.9)])
    assert models(group) == ["a", "b"]
    assert group[0]["cards"]["food"] == {"en": 0.9, "hi": 0.4}


def test_a_later_run_of_a_model_is_another_run(tmp_path):
    (group,) = add(tmp_path / "l.jsonl", [run("a", 0.5), run("a", 0.9, date="2026-01-03")])
    assert len(group) == 2


def test_only_runs_on_the_same_images_stand_together(tmp_path):
    groups = add(tmp_path / "l.jsonl", [run("a"), run("b", 0.9, data=DATA | {"food": "other"}), run("c")])
    assert sorted(map(models, groups)) == [["a", "c"], ["b"]]


def test_images_of_a_skipped_card_make_no_difference():
    assert row_of(run("a"))["data"] == row_of(run("b", data=DATA | {"gods": "other"}))["data"]


def test_runs_that_do_not_say_which_images_are_compared_with_none(tmp_path):
    groups = add(tmp_path / "l.jsonl", [run("a", data={}), run("b", data={"food": "1f"}), run("c")])
    assert [models(group) for group in groups] == [["c"], ["a"], ["b"]]
    assert "images not known, so compared with none" in (tmp_path / "l.md").read_text(encoding="utf-8")


def test_a_generated_part_is_in_no_column():
    assert row_of(run("a"))["cards"]["script"] == {"en": 0.82}


def test_tables_escape_what_they_show(tmp_path):
    add(tmp_path / "l.jsonl", [run("<b>a|b")])
    assert "<b>a" not in (tmp_path / "l.html").read_text(encoding="utf-8")
    assert "&lt;b>a\\|b" in (tmp_path / "l.md").read_text(encoding="utf-8")


def test_tables_have_as_many_cells_as_names(tmp_path):
    add(tmp_path / "l.jsonl", [run("a"), run("b")])
    lines = [line for line in (tmp_path / "l.md").read_text(encoding="utf-8").split("\n") if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 4


def test_a_torn_line_costs_only_itself(tmp_path):
    file = tmp_path / "l.jsonl"
    add(file, [run("a")])
    with file.open("a") as opened:
        opened.write('{"run": "x", "mod')
    add(file, [run("b")])
    assert [row["model"] for row in read(file)[0]] == ["a", "b"]


def test_two_processes_that_add_at_once_lose_no_row(tmp_path):
    file = tmp_path / "l.jsonl"

    def work(name):
        for i in range(30):
            add(file, [run(f"{name}-{i}", i / 30)])

    done = in_processes([partial(work, name) for name in "xy"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(row["model"] for row in read(file)[0]) == sorted(f"{name}-{i}" for name in "xy" for i in range(30))
    page = (tmp_path / "l.html").read_text(encoding="utf-8")
    assert all(f"{name}-{i}<" in page for name in "xy" for i in range(30))


def test_groups_that_cover_more_come_first():
    small, large = row_of(run("a")), row_of(run("b"))
    small |= {"data": "1", "covered": 1}
    large |= {"data": "2", "covered": 2}
    assert [group[0]["covered"] for group in groups_of([small, large])] == [2, 1]


def test_command_adds_folders_and_prints_the_table(tmp_path, capsys):
    save_result(run("a"), tmp_path / "a")
    save_result(run("b", 0.9), tmp_path / "b")
    file = tmp_path / "l.jsonl"
    assert leaderboard([tmp_path / "a", tmp_path / "b"], file) == 0
    assert "| 1 | b | 2026-01-02 |" in capsys.readouterr().out
    before = (tmp_path / "l.html").read_bytes()
    (tmp_path / "l.html").unlink()
    assert leaderboard([], file) == 0
    assert (tmp_path / "l.html").read_bytes() == before


def test_command_refuses_a_name_whose_tables_would_replace_it(tmp_path):
    with pytest.raises(ValueError, match=r"expected a name that ends in \.jsonl"):
        leaderboard([], tmp_path / "l.html")


def test_command_names_a_folder_without_a_run(tmp_path):
    file = tmp_path / "l.jsonl"
    with pytest.raises(FileNotFoundError, match="nothing/metrics"):
        leaderboard([tmp_path / "nothing"], file)
    assert not file.exists()
