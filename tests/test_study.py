"""Studies: equal FLOPs, slices that go on, one-line errors, statistics by hand, and the page with all of it."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import yaml
from experiments import config

from indiclip.training.fault_tolerance.ranks import callbacks_of
from indiclip.training.fault_tolerance.step_sync import StepSync

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import study
from _study_flops import count_arm
from _study_grid import Run, arm_content
from _study_page import write_study
from _study_prepare import Prepared
from _study_read import read_grid
from _study_results import Results
from _study_runs import Place, common_step, curve
from _study_slice import Slice, Task
from _study_state import Study

ROOT = Path(__file__).parents[1]
WIDE = "--model.encoder.backbone.init_args.width=64"
CONTRASTIVE = {"class_path": "heads.contrastive.Contrastive"}
DETECTION = {
    "class_path": "heads.detection.Detection",
    "init_args": {"task": "contrastive", "num_classes": 17, "out_channels": 16, "num_convs": 1, "scales": [1.0]},
}


def mela(seed, **changes):
    arguments = {"num_scenes": 16, "size": 32, "layout": "single", "seed": seed, "languages": ["en", "hi"]}
    return {"class_path": "indiclip.generated.mela.Mela", "init_args": arguments | changes}


def grid(folder, name="tiny", **changes):
    """A grid of two arms and two seeds on a tiny experiment; `changes` are its keys, None takes one away."""
    average = {"class_path": "indiclip.training.ema.EMA", "init_args": {"decay": 0.999}}
    stop = {"class_path": "test_study.StopTheStudy", "init_args": {"folder": str(folder)}}
    tree = config(trainer__callbacks=[average, stop], model__warmup_steps=1)
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    boxes = {"head": DETECTION, "metrics": {"ap50": "higher"}, "steps": 2, "batch_size": 8, "max_tokens": 16}
    protocols = ["zero_shot", "knn", "linear_probe", "shots", "retrieval"]
    content = {
        "title": "A tiny study",
        "base": ["base.yaml"],
        "arms": {"plain": [], "wide": [WIDE]},
        "control": "plain",
        "budget": {"steps": 10},
        "seeds": [0, 1],
        "points": 2,
        "main": ["scenes/zero_shot@32"],
        "scores": {
            "scenes": {"dataset": mela(11), "gallery": mela(12), "protocols": protocols, "max_tokens": 16},
            "boxes": boxes | {"dataset": mela(13), "train": mela(14)},
        },
    } | changes
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return file


class StopTheStudy(L.Callback):
    """Sends SIGTERM to the study in the fourth step of the first full run, and waits until that has ended this run."""

    def __init__(self, folder):
        self.done = Path(folder) / "stopped"

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.max_steps != 10 or trainer.global_step != 3 or self.done.exists():
            return
        self.done.touch()
        os.kill(os.getppid(), signal.SIGTERM)
        (sync,) = callbacks_of(trainer, StepSync)
        end = time.monotonic() + 60
        while not sync.preemption.received and time.monotonic() < end:
            time.sleep(0.05)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study that was stopped in a run and went on: (grid, folder, the two exit statuses)."""
    folder = tmp_path_factory.mktemp("study")
    words = [str(grid(folder)), "--runs", str(folder / "runs")]
    statuses = [study.main(words), study.main(words)]
    return folder / "tiny.yaml", folder / "runs" / "tiny", statuses


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_what_is_done_is_not_repeated(done, capsys):
    file, folder, statuses = done
    assert statuses == [128 + signal.SIGTERM, 0]
    log = (folder / "plain" / "seed-0.log").read_text()
    assert "SIGTERM: saved" in log
    assert f"going on from {folder}/plain/seed-0/checkpoints/" in log
    assert "step 4, saved" in log
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert study.main([str(file), "--runs", str(folder.parent)]) == 0
    changed = {path.name for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns}
    assert changed == {"study.html", "study.md", "study.csv", ".lock"}
    assert "0 runs are left: about 0.00 CPU-hours" in capsys.readouterr().out


@pytest.mark.slow
def test_arms_have_equal_flops_within_a_step_and_are_scored_at_equal_steps(done):
    file, folder, _ = done
    of = Study(read_grid(file), folder)
    plain, wide = of.counted["plain"], of.counted["wide"]
    assert plain.steps == 10
    assert 0 <= plain.flops - wide.flops < wide.flops / wide.steps
    marks = {run.arm: run.marks for run in of.runs["seeds"]}
    assert marks == {"plain": (wide.steps, 10), "wide": (wide.steps,)}
    for arm, steps in marks.items():
        for seed in (0, 1):
            found = json.loads((folder / arm / f"seed-{seed}" / "scores.json").read_text())["steps"]
            assert [*found] == [*map(str, steps)]
    results = Results(of)
    compared = results.compared("scenes/zero_shot@32", "steps")["wide"]
    at_equal_steps = [
        results.values("wide", "scenes/zero_shot@32", wide.steps)[seed]
        - results.values("plain", "scenes/zero_shot@32", wide.steps)[seed]
        for seed in (0, 1)
    ]
    assert compared.own.value == pytest.approx(np.mean(at_equal_steps))


@pytest.mark.slow
def test_the_page_has_every_number_and_the_commands(done):
    file, folder, _ = done
    page, table = (folder / "study.html").read_text(), (folder / "study.md").read_text()
    scores = json.loads((folder / "wide" / "seed-1" / "scores.json").read_text())["steps"]
    (of_wide,) = scores.values()
    lengths, languages = (16, 32), ("en", "hi", "others", "gap_to_english")
    expected = {f"scenes/{name}@{length}" for name in ("zero_shot", "knn", "linear_probe") for length in lengths}
    expected |= {f"scenes/shots_{count}@{length}" for count in (1, 2, 4, 8, 16) for length in lengths}
    expected |= {f"scenes/recall5/{language}@{length}" for language in languages for length in lengths}
    assert of_wide.keys() == expected | {"boxes/ap50"}
    for name, value in of_wide.items():
        section = page[page.index(f"<summary>{name} (") :].partition("</details>")[0]
        assert f"{value:.3f} " in section.partition(">wide<")[2]
    before = json.loads((folder / "plain" / "before_training" / "scores.json").read_text())["steps"]["1"]
    assert f'<td>before_training</td><td class="number">{before["scenes/zero_shot@32"]:.3f}<' in page
    assert "indiclip fit --config" in page
    assert "--model.encoder.backbone.init_args.width=64 --seed_everything=0" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    at_equal_flops = table.partition("## At equal steps")[0].splitlines()
    (row,) = (line for line in at_equal_flops if line.startswith("| wide "))
    assert f"| before_training |  |  |  | {before['scenes/zero_shot@32']:.3f} |" in at_equal_flops
    assert "`before_training` is of seed 0\nalone. " in table
    assert "before_training of seed 0 alone" in page
    done_study = Study(read_grid(file), folder)
    plain, wide = (done_study.counted[arm] for arm in ("plain", "wide"))
    relative = (wide.flops / wide.steps) / (plain.flops / plain.steps)
    assert 2 < relative < 2.3
    of = Results(done_study).compared("scenes/zero_shot@32", "FLOPs")["wide"]
    numbers = f"{of.own.value:+.3f} ({of.pooled.low:+.3f} to {of.pooled.high:+.3f})"
    assert row == f"| wide | {relative:.2f} | {wide.steps} | – | {of.verdict} {numbers} |"
    with (folder / "study.csv").open() as opened:
        rows = {tuple(row[name] for name in ("arm", "seed", "step")): row for row in csv.DictReader(opened)}
    listed = rows["wide", "1", str(wide.steps)]
    assert {name: float(listed[name]) for name in of_wide} == pytest.approx(of_wide, rel=1e-4)
    (_, validated), *_ = curve(done_study.place(done_study.seeds()[0]), "val/contrastive/zero_shot")
    assert f"{validated:.5g}" in [row["val/contrastive/zero_shot"] for row in rows.values()]


@pytest.mark.slow
def test_an_arm_of_which_a_seed_diverged_is_not_judged_by_the_others(done, tmp_path):
    """The page says which run, and the table says so in place of a verdict."""
    file, folder, _ = done
    root = shutil.copytree(folder, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.ckpt"))
    state = root / "wide" / "seed-1.json"
    reason = "step 13: the loss of contrastive was not finite in 11 steps in a row"
    state.write_text(json.dumps({"digest": json.loads(state.read_text())["digest"], "diverged": reason}))
    (root / "wide" / "seed-1" / "scores.json").unlink()
    of = Study(read_grid(file), root)
    compared = Results(of).compared("scenes/zero_shot@32", "FLOPs")["wide"]
    assert (compared.verdict, compared.own.num, compared.own_verdict) == ("diverged", 1, "not judged")
    write_study(of, Prepared(of.grid, root), [])
    assert "| diverged with seed 1 " in (root / "study.md").read_text()
    page = (root / "study.html").read_text()
    assert f"<b>Diverged:</b> wide, seed-1: {reason}" in page
    assert "1 of 2 seeds" in page


@pytest.mark.slow
def test_the_best_rate_is_chosen_for_each_arm_and_never_one_that_diverged(done, tmp_path):
    """Of trials that are written down, as training would: some that ended in NaN or stopped, and some that did not. The
    next runs have the chosen rates, and fewer seeds where the grid says so."""
    file, folder, _ = done
    rates = [1e-3, 2e-3, 4e-3, 8e-3]
    screening = {"share": 0.5, "warmup": 0.2, "points": 1}
    changes = {"learning_rates": rates, "screening": screening, "seeds_of": {"wide": [1]}}
    of = read_grid(grid(file.parent, "rates", **changes))
    shutil.copy(folder / "counted.json", tmp_path)
    tried = Study(of, tmp_path)
    (flags,) = (run.flags() for run in tried.runs["rates"] if (run.arm, run.lr) == ("plain", 2e-3))
    assert flags[1:] == [
        *("--trainer.max_steps=5", "--model.lr=0.002", "--model.warmup_steps=1"),
        *("--data.steps_per_epoch=5", "--data.num_workers=0"),
    ]
    values = {"plain": [None, 0.1, 0.3, 0.2], "wide": [0.1, None, "diverged", 0.05]}
    assert tried.rate("plain") is None
    for run in tried.runs["rates"]:
        place, value = tried.place(run), values[run.arm][rates.index(run.lr)]
        place.begin(of)
        place.folder.mkdir()
        (place.folder / "metrics.json").write_text(json.dumps({"metrics": {of.select.metric: value}}))
        place.file("log").write_text("indiclip: step 13: the loss was not finite in 11 steps in a row")
        assert place.end(0 if value != "diverged" else 1) == ""
    assert (tried.rate("plain"), tried.rate("wide")) == (4e-3, 1e-3)
    assert [(run.arm, run.seed, run.lr) for run in tried.seeds()] == [
        ("plain", 0, 4e-3),
        ("plain", 1, 4e-3),
        ("wide", 1, 1e-3),
    ]
    place.folder.joinpath("metrics.json").write_text(json.dumps({"metrics": {"val/contrastive/zero_shot_16": 0.1}}))
    with pytest.raises(ValueError, match=r"select.metric: found 'val/contrastive/zero_shot'; nearest is"):
        tried.rate("wide")


@pytest.mark.slow
def test_names_that_no_run_gives_are_told_before_rates_are_tried(done, capsys):
    """Validation of the timed runs and the scores of the weights before training say which there are."""
    file, folder, _ = done
    for key, said in {
        "select": "select.metric: found 'val/contrastive/zeroshot'; nearest is 'val/contrastive/zero_shot'",
        "main": "main[0]: found 'scenes/zero_shot@64'; nearest is 'scenes/zero_shot@",
    }.items():
        changes = {"select": {"metric": "val/contrastive/zeroshot"}, "main": ["scenes/zero_shot@64"]}
        of = grid(file.parent, "names", **{key: changes[key]}, learning_rates=None)
        shutil.copytree(folder, folder.with_name("names"), ignore=shutil.ignore_patterns("seed-*"), dirs_exist_ok=True)
        assert study.main([str(of), "--runs", str(folder.parent)]) == 2
        assert f"{of}: {said}" in capsys.readouterr().err
    assert not [*folder.with_name("names").glob("*/seed-*")]


@pytest.mark.slow
def test_a_metric_that_validation_has_not_is_told_before_the_next_arm_is_timed(done, capsys):
    file, folder, _ = done
    of = grid(file.parent, "early", select={"metric": "val/contrastive/zeroshot"}, learning_rates=None)
    early = folder.with_name("early")
    shutil.copytree(folder, early, ignore=shutil.ignore_patterns("seed-*"))
    shutil.rmtree(early / "wide")
    assert study.main([str(of), "--runs", str(folder.parent)]) == 2
    assert "select.metric: found 'val/contrastive/zeroshot'" in capsys.readouterr().err
    assert not (early / "wide").exists()


@pytest.mark.slow
def test_scores_that_fail_are_told_before_anything_is_trained(done, capfd):
    file, folder, _ = done
    spec = yaml.safe_load(file.read_text())["scores"]["boxes"] | {"metrics": {"ap5": "higher"}}
    of = grid(file.parent, "scores", scores={"boxes": spec}, main=["boxes/ap5"])
    shutil.copytree(folder, folder.with_name("scores"), ignore=shutil.ignore_patterns("seed-*"))
    assert study.main([str(of), "--runs", str(folder.parent)]) == 1
    assert "ended with 1: ValueError: scores.boxes.metrics: found 'ap5'; nearest is 'ap75'" in capfd.readouterr().err
    assert not [*folder.with_name("scores").glob("*/seed-*")]


@pytest.mark.slow
def test_other_configs_in_the_folder_of_a_study_are_refused(done, capsys):
    """What they say counts, not their comments: a page may be given its verdict."""
    file, folder, _ = done
    base = file.with_name("base.yaml")
    kept = base.read_text()
    try:
        for text, status in {f"# Verdict: better.\n{kept}": 0, f"{kept}\nseed_everything: 7\n": 2}.items():
            base.write_text(text)
            assert study.main([str(file), "--runs", str(folder.parent)]) == status
    finally:
        base.write_text(kept)
    assert "was trained by other configs" in capsys.readouterr().err


@pytest.mark.slow
def test_an_arm_that_comes_later_and_is_compared_where_no_weights_were_kept_says_so(done, capsys):
    file, folder, _ = done
    wider = WIDE.replace("64", "96")
    of = grid(file.parent, "later", arms={"plain": [], "wide": [WIDE], "wider": [wider]})
    shutil.copytree(folder, folder.with_name("later"))
    assert study.main([str(of), "--runs", str(folder.parent)]) == 2
    steps = Study(read_grid(of), folder.with_name("later")).counted["wider"].steps
    expected = f"plain/seed-0: kept no weights of step {steps}, at which it is compared with an arm that came later"
    assert expected in capsys.readouterr().err


def test_the_end_of_a_run_is_told_by_what_its_last_process_said(tmp_path):
    """And not by a line of an earlier slice."""
    place = Place(tmp_path, Run("plain", "seed-0", 0, None, 10, 2))
    place.folder.parent.mkdir()
    place.file("log").write_text("indiclip: SIGTERM: saved x\n")
    place.file("json").write_text(json.dumps({"log_bytes": place.file("log").stat().st_size}))
    with place.file("log").open("a") as log:
        log.write("Traceback\nKeyError: 'x'\n")
    assert place.end(1) == f"{place.folder}: ended with 1: KeyError: 'x'"


def test_a_number_of_steps_is_no_beginning_for_arms_of_different_lengths(tmp_path):
    tree = config()
    tree["model"]["heads"][0]["init_args"] = {"start": 4}
    (tmp_path / "late.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"start: 4 is beyond .* a share of them below 1, which suits arms"):
        count_arm(["--config", str(tmp_path / "late.yaml")], None, 1e12)


def test_a_head_that_begins_late_is_counted_from_there_on(tmp_path):
    short = {"class_path": "indiclip.tokenizers.ByteTokenizer", "init_args": {"context_length": 8}}  # of all captions
    base = config(model__encoder__text__tokenizer=short)
    files = {}
    for name, heads in {
        "one": [CONTRASTIVE],
        "both": [CONTRASTIVE, DETECTION],
        "late": [CONTRASTIVE, {**DETECTION, "init_args": DETECTION["init_args"] | {"start": 0.8}}],
    }.items():
        base["model"]["heads"] = heads
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(base))
    one, both = (count_arm(["--config", str(files[name])], 10, None).flops for name in ("one", "both"))
    late = count_arm(["--config", str(files["late"])], None, 0.8 * one + 0.2 * both + 1)
    assert (late.steps, late.flops) == (10, pytest.approx(0.8 * one + 0.2 * both))
    assert late.stages == ((0, pytest.approx(one / 10)), (8, pytest.approx(both / 10)))
    assert late.flops_until(9) == pytest.approx(0.8 * one + 0.1 * both)
    assert late.flops_until(4.5) == pytest.approx(0.45 * one)


def scores(**changes):
    return {"scores": {"x": {"dataset": mela(1), "protocols": ["zero_shot"]} | changes}}


def probe(**changes):
    return {
        "scores": {
            "x": {"dataset": mela(1), "train": mela(2), "head": DETECTION, "metrics": {"ap50": "higher"}} | changes
        }
    }


WRONG = {  # what is said -> keys of the grid
    "arms.ema[0]: no file methods/emma.yaml; nearest is 'methods/ema'": {"arms": {"ema": ["methods/emma.yaml"]}},
    "arms: found ['plain']; expected keys with values": {"arms": ["plain"]},
    "arms.plain: found nothing; expected a list": {"arms": {"plain": None}},
    "arms: found 1; expected text as the key": {"arms": {1: []}},
    "arms.plain[0]: found the flag '--model.lr'": {"arms": {"plain": ["--model.lr"]}},
    "arms.plain[0]: found '--trainer.max_steps=9'; expected no --trainer.max_steps": {
        "arms": {"plain": ["--trainer.max_steps=9"]}
    },
    "base[1]: found '--model.lr=1e-3'; expected no --model.lr": {
        "base": ["base.yaml", "--model.lr=1e-3"],
        "learning_rates": [1e-3],
    },
    "arms.prepared: expected letters": {"arms": {"prepared": []}},
    "control: found 'plane'; nearest is 'plain'": {"control": "plane"},
    "seed: no such key; nearest is 'seeds'": {"seed": [1]},
    "title: found {'a': 1}; expected text": {"title": {"a": 1}},
    "budget: found 4; expected keys with values": {"budget": 4},
    "budget: expected one of": {"budget": {"steps": 4, "flops": 1e9}},
    "budget.steps: found 2.5; expected a whole number": {"budget": {"steps": 2.5}},
    "budget.steps: found True; expected a whole number": {"budget": {"steps": True}},
    "budget.flops: found the text '1e14'; expected a number such as 1.5e+14": {"budget": {"flops": "1e14"}},
    "learning_rates[0]: found the text '1e-3'": {"learning_rates": ["1e-3"]},
    "learning_rates: found 0.001; expected a list": {"learning_rates": 1e-3},
    "learning_rates: found 0.001 2 times; expected each once": {"learning_rates": [1e-3, 1e-3]},
    "learning_rates[0]: found nan; expected above 0": {"learning_rates": [float("nan")]},
    "seeds: found 3; expected a list": {"seeds": 3},
    "seeds_of.plain: found [2]; expected some of seeds, [0, 1]": {"seeds_of": {"plain": [2]}},
    "seeds_of.plain: found 0 2 times; expected each once": {"seeds_of": {"plain": [0, 0]}},
    "screening.warm: no such key; nearest is 'warmup'": {"screening": {"warm": 0.2}},
    "screening.seed: found the text 'x'; expected a whole number": {"screening": {"seed": "x"}},
    "select: found the text 'val/x'; expected keys with values": {"select": "val/x"},
    "select.metrik: no such key; nearest is 'metric'": {"select": {"metrik": "x"}},
    "select.better: found 'more'; expected one of higher, lower": {"select": {"better": "more"}},
    "points: found the text 'ten'; expected a whole number": {"points": "ten"},
    "points: found 0; expected a whole number from 1": {"points": 0},
    "points: found 100; expected at most the 10 steps of a run of plain": {"points": 100},
    "prepare.x.command: found nothing": {"prepare": {"x": {"scored": True}}},
    "prepare.x.scored: found the text 'yes'; expected true or false": {
        "prepare": {"x": {"command": "true", "scored": "yes"}}
    },
    "main: found the text 'scenes/zero_shot@32'; expected a list": {"main": "scenes/zero_shot@32"},
    "main[0]: found 'scenes/zeroshot@32'; nearest is 'scenes/zero_shot@LENGTH'": {"main": ["scenes/zeroshot@32"]},
    "scores: found nothing": {"scores": None},
    "scores.x: found 1; expected keys with values": {"scores": {"x": 1}},
    "scores.x.gallery: found nothing; expected what knn": scores(protocols=["knn"]),
    "scores.x.protocols[0]: found 'kn'; nearest is 'knn'": scores(protocols=["kn"]),
    "scores.x.dataset: module 'indiclip.generated.mela' has no attribute 'Mella'; nearest is 'Mela'": scores(
        dataset={"class_path": "indiclip.generated.mela.Mella"}
    ),
    "scores.x.dataset.num_scene: indiclip.generated.mela.Mela has no such option": scores(dataset=mela(1, num_scene=3)),
    "scores.x.dataset: kinds": scores(dataset=mela(1, kinds=["diyya"])),
    "scores.x.max_tokens: found 0; expected a whole number from 1": scores(max_tokens=0),
    "scores.x.batch_size: found nothing; expected a whole number": scores(batch_size=None),
    "scores.x.templates: found []": scores(templates=[]),
    "scores.x.templates[0]: found 'a photo'; expected {}": scores(templates=["a photo"]),
    "scores.x.steps: found 0": probe(steps=0),
    "scores.x.train: found nothing": probe(train=None),
    "scores.x.metrics.ap50: found 'more'": probe(metrics={"ap50": "more"}),
    "scores.x.head.num_class: heads.detection.Detection has no such option; nearest is 'num_classes'": probe(
        head={"class_path": "heads.detection.Detection", "init_args": {"num_class": 3}}
    ),
    "arms.plain: budget: 1e+03 FLOPs; one step takes": {"budget": {"flops": 1000}},
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_grids_are_told_in_one_line(said, tmp_path, capsys):
    changes = WRONG[said]
    if changes and "scores" in changes:
        changes = {"main": []} | changes
    assert study.main([str(grid(tmp_path, **changes)), "--runs", str(tmp_path / "runs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"study: {tmp_path}/tiny.yaml: {said}"), line


def test_a_study_that_another_process_works_on_is_refused(tmp_path, capsys):
    """A second study beside it is not."""
    of, other = grid(tmp_path), grid(tmp_path, "other", control="wide", arms={"wide": ["--model.none=1"]})
    (folder := tmp_path / "runs" / "tiny").mkdir(parents=True)
    code = "import sys; from indiclip.training import run_folder as r; r.lock(r.Path(sys.argv[1])); print(); input()"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        assert study.main([str(of), "--runs", str(tmp_path / "runs")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"study: {folder}: another process (pid {process.pid} on ")
        assert study.main([str(other), "--runs", str(tmp_path / "runs")]) == 2
        assert "arms.wide: " in capsys.readouterr().err
        process.communicate("\n")


@pytest.mark.parametrize(
    "words", [["--jobs", "0"], ["--jobs", "1.5"], ["--minutes", "-1"], ["--minutes", "nan"], ["--runs", __file__]]
)
def test_wrong_options_are_told_where_they_are_read(words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        study.main([str(tmp_path / "no.yaml"), *words])
    assert f"argument {words[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "study").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_grid_can_be_read_and_says_its_command(file):
    of = read_grid(file)
    assert len(of.arms) > 1
    assert f"python tools/study.py conf/study/{file.name}" in file.read_text().partition("\ntitle:")[0]


def test_every_page_of_a_method_is_an_arm_of_a_grid():
    """Of the page itself, of its name where the arm has other data than the page's trial, or by what an arm leaves out;
    `augreg_none` changes nothing, and is the control."""
    measured = {"augreg_none"}
    for of in map(read_grid, (ROOT / "conf" / "study").glob("*.yaml")):
        measured |= {*of.arms, *of.reversed.values()}
        measured |= {Path(word).stem for words in of.arms.values() for word in words if "/methods/" in word}
    assert {page.stem for page in (ROOT / "conf" / "methods").glob("*.yaml")} <= measured


def test_what_is_prepared_is_made_once_and_by_one_command(tmp_path):
    code = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(int(sys.argv[2]))"
    commands = {
        "first": f'{sys.executable} -c "{code}" {{folder}}/made 0',
        "second": f'{sys.executable} -c "{code}" {tmp_path}/x 3',
    }
    items = {name: {"command": command} for name, command in commands.items()}
    of, root = read_grid(grid(tmp_path, prepare=items)), tmp_path / "runs" / "tiny"
    for _ in range(2):
        part = Slice(1, 5.0)
        part.work(Prepared(of, root).todo)
        assert [*part.failed.values()] == [f"prepare.second: ended with 3, see {root}/prepared/second.log"]
    assert (root / "prepared" / "made").read_text() == "x"
    items["first"]["command"] += " 1"
    with pytest.raises(ValueError, match="prepare.first: was made by another command or other configs"):
        [*Prepared(read_grid(grid(tmp_path, prepare=items)), root).todo()]


def test_what_is_prepared_belongs_to_what_the_arms_compute_that_need_it(tmp_path):
    """Its commands and what the configs say that they name."""
    (tmp_path / "teacher.yaml").write_text("seed_everything: 1\n")
    items = {"teacher": {"command": f"indiclip fit --config {tmp_path}/teacher.yaml --runs {{folder}}"}}
    arms = {"plain": [], "taught": ["--model.heads.teacher.weights={folder}/teacher"]}

    def contents():
        of = read_grid(grid(tmp_path, arms=arms, prepare=items))
        return [arm_content(of, arm, tmp_path / "prepared") for arm in arms]

    before = contents()
    (tmp_path / "teacher.yaml").write_text("# as it was\nseed_everything: 1\n")
    assert contents() == before
    (tmp_path / "teacher.yaml").write_text("seed_everything: 2\n")
    assert [old == new for old, new in zip(before, contents(), strict=True)] == [True, False]
    items["teacher"]["command"] += " --name other"
    assert [old == new for old, new in zip(before, contents(), strict=True)] == [True, False]


def test_a_slice_ends_at_its_time():
    """What runs is told to end."""

    def run():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(60)

    work = [Task(("arm", name, "train"), 1.0, run, lambda status: "") for name in ("one", "two")]
    part, began = Slice(1, 0.02), time.monotonic()
    part.work(lambda: work)
    assert time.monotonic() - began < 30
    assert part.status(left=2) == 3


def test_what_is_left_is_listed_only_where_a_process_may_start():
    """And not whenever the slice looks at the time, each second."""
    listed = []

    def todo():
        listed.append(len(listed))
        if listed == [0]:
            yield Task(("arm", "run", "train"), 1.0, partial(time.sleep, 2.2), lambda status: "")

    Slice(1, 5.0).work(todo)
    assert listed == [0, 1]


@pytest.mark.slow
def test_a_plan_before_anything_is_prepared_is_of_the_other_arms(done, capsys):
    """The arm that needs a teacher's run cannot be counted yet."""
    file, folder, _ = done
    taught = ["--model.heads.teacher.weights={folder}/teacher"]
    items = {"teacher": {"command": "false", "cpu_seconds": 3600}}
    of = grid(file.parent, "taught", arms={"plain": [], "wide": [WIDE], "taught": taught}, prepare=items)
    shutil.copytree(folder, folder.with_name("taught"), ignore=shutil.ignore_patterns("*.ckpt", "seed-*"))
    assert study.main([str(of), "--runs", str(folder.parent), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "to prepare: teacher, about 1.00 CPU-hours" in out
    assert "counted and timed once that is prepared: taught" in out
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["plain", "wide", "4"]
    assert study.main([str(of), "--runs", str(folder.parent)]) == 1  # as `false` has no success
    out = capsys.readouterr().out
    assert out.index("wide ") < out.index("about 3600 CPU-seconds")


@pytest.mark.slow
def test_a_full_disk_is_told_in_one_line(done, monkeypatch, capsys):
    file, folder, _ = done

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "study.html")

    monkeypatch.setattr(study, "write_study", full)
    assert study.main([str(file), "--runs", str(folder.parent)]) == 1
    assert capsys.readouterr().err == (
        "study: [Errno 28] No space left on device: 'study.html'; the same command goes on\n"
    )


def test_runs_of_nearly_as_many_steps_are_compared_at_their_ends():
    assert common_step(1000, 985) == (1000, 985)
    assert common_step(1000, 970) == (970, 970)
