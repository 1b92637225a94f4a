"""Studies: equal FLOPs, slices that go on, one-line errors, statistics by hand, and the page with all of it."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from experiments import config
from scipy.stats import ttest_rel

from indiclip.training.fault_tolerance.ranks import callbacks_of
from indiclip.training.fault_tolerance.step_sync import StepSync

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import study
from _study_flops import count_arm
from _study_grid import read_grid
from _study_page import Results
from _study_prepare import Prepared
from _study_protocols import PROTOCOLS, Embedded
from _study_runs import common_step
from _study_scores import check_scores
from _study_slice import Slice
from _study_statistics import Difference, holm, paired, pooled

ROOT = Path(__file__).parents[1]
CONTRASTIVE = {"class_path": "heads.contrastive.Contrastive"}
DETECTION = {
    "class_path": "heads.detection.Detection",
    "init_args": {"task": "contrastive", "num_classes": 17, "out_channels": 16, "num_convs": 1, "scales": [1.0]},
}


def mela(seed, **changes):
    arguments = {"num_scenes": 16, "size": 32, "layout": "single", "seed": seed, "languages": ["en", "hi"]}
    return {"class_path": "indiclip.generated.mela.Mela", "init_args": arguments | changes}


def grid(folder, **changes):
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
        "arms": {"plain": [], "wide": ["--model.encoder.backbone.init_args.width=64"]},
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
    file = folder / "tiny.yaml"
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
    assert changed == {"study.html", "study.md"}
    assert "0 runs are left: about 0.00 CPU-hours" in capsys.readouterr().out


def test_arms_have_equal_flops_within_a_step_and_are_scored_at_equal_steps(done):
    file, folder, _ = done
    of = study.Study(read_grid(file), folder)
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


def test_the_page_has_every_number_and_the_commands(done):
    _, folder, _ = done
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
    untrained = json.loads((folder / "plain" / "untrained" / "scores.json").read_text())["steps"]["1"]
    assert f'<td>untrained</td><td class="number">{untrained["scenes/zero_shot@32"]:.3f}<' in page
    assert "indiclip fit --config" in page
    assert "--model.encoder.backbone.init_args.width=64 --seed_everything=0" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert table.startswith("| arm | steps | scenes/zero_shot@32 |")


def test_other_configs_in_the_folder_of_a_study_are_refused(done, capsys):
    file, folder, _ = done
    base = file.with_name("base.yaml")
    kept = base.read_text()
    try:
        base.write_text(f"{kept}\nseed_everything: 7\n")
        assert study.main([str(file), "--runs", str(folder.parent)]) == 2
    finally:
        base.write_text(kept)
    assert "was trained by other configs" in capsys.readouterr().err


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


def test_wrong_grids_are_told_in_one_line(tmp_path, capsys):
    wrong = {
        "arms.ema[0]: no file methods/emma.yaml; nearest is 'methods/ema'": {"arms": {"ema": ["methods/emma.yaml"]}},
        "control: found 'plane'; nearest is 'plain'": {"control": "plane"},
        "seed: no such key; nearest is 'seeds'": {"seed": [1]},
        "budget.flops: found the text '1e14'": {"budget": {"flops": "1e14"}},
        "learning_rates[0]: found the text '1e-3'": {"learning_rates": ["1e-3"]},
        "arms.plain[0]: found the flag '--model.lr'": {"arms": {"plain": ["--model.lr"]}},
        "scores.x.gallery: found nothing; expected what knn": {
            "scores": {"x": {"dataset": mela(1), "protocols": ["knn"]}}
        },
        "scores.x.protocols: found 'kn'; nearest is 'knn'": {
            "scores": {"x": {"dataset": mela(1), "protocols": ["kn"]}}
        },
        "scores: found nothing": {"scores": None},
        "arms.plain: budget: 1e+03 FLOPs; one step takes": {"budget": {"flops": 1000}},
    }
    for said, changes in wrong.items():
        assert study.main([str(grid(tmp_path, **changes)), "--runs", str(tmp_path / "runs")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"study: {tmp_path}/tiny.yaml: {said}"), line


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "study").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_grid_can_be_read_and_says_its_command(file):
    of = read_grid(file)
    check_scores(of)
    assert len(of.arms) > 1
    assert f"python tools/study.py conf/study/{file.name}" in file.read_text().partition("\ntitle:")[0]


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
    with pytest.raises(ValueError, match="prepare.first: was made by another command"):
        [*Prepared(read_grid(grid(tmp_path, prepare=items)), root).todo()]


def test_runs_of_nearly_as_many_steps_are_compared_at_their_ends():
    assert common_step(1000, 985) == (1000, 985)
    assert common_step(1000, 970) == (970, 970)


def test_paired_intervals_are_those_of_the_books():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.303; scipy's paired test gives p."""
    found = paired({0: 2.0, 1: 4.0, 2: 6.0, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 3.0, 9: 0.0})
    assert (found.value, found.num) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert found.p == pytest.approx(ttest_rel([2, 4, 6], [1, 2, 3]).pvalue)
    assert math.isnan(paired({0: 1.0}, {0: 0.0}).p)


def test_the_pooled_spread_is_that_of_a_model_of_arms_and_seeds():
    """Least squares with a column for each arm and seed; and with two arms it is the paired t-test itself."""
    arms = {"control": {0: 1.0, 1: 4.0, 2: 2.0}, "a": {0: 2.0, 1: 4.5, 2: 4.0}, "b": {0: 0.0, 1: 5.0, 2: 1.5}}
    own = {arm: paired(arms[arm], arms["control"]) for arm in ("a", "b")}
    y = np.array([value for of in arms.values() for value in of.values()])
    columns = np.hstack([np.kron(np.eye(3), np.ones((3, 1))), np.kron(np.ones((3, 1)), np.eye(3))])
    residual = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    half = 2.776 * math.sqrt(residual @ residual / 4 * 2 / 3)  # t(0.975, 4)
    found = pooled(arms, own)["a"]
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-3)
    two = {name: arms[name] for name in ("control", "a")}
    assert pooled(two, {"a": own["a"]})["a"].p == pytest.approx(own["a"].p)


def test_holm_and_the_verdicts():
    assert holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    worse = Difference(-0.2, -0.3, -0.1, 0.02, 3)
    assert worse.verdict(0.04, "higher") == "worse"
    assert worse.verdict(0.04, "lower") == "better"
    assert worse.verdict(0.06, "higher") == "perhaps worse"
    assert Difference(0.1, -0.1, 0.3, 0.4, 3).verdict(0.01, "higher") == "no difference seen"


def test_protocols_on_embeddings_whose_answers_are_known():
    """Images and texts on the axes: one image of four is nearest to the other class's name; equal captions are one."""
    axes = {"kite": [1.0, 0.0], "drum": [0.0, 1.0]}

    class Encoder:
        def embed_text(self, texts):
            return torch.tensor([axes[text] for text in texts])

    image_NE = torch.tensor([[1.0, 0.1], [0.2, 1.0], [1.0, 0.3], [0.9, 0.1]])
    captions = [{"en": ["kite"]}, {"en": ["drum"]}, {"en": ["kite"]}, {"en": ["drum"]}]
    data = Embedded(
        image_NE, np.array([0, 1, 0, 1]), np.zeros(4, bool), list("abcd"), captions, ["kite", "drum"], ["{}"], Encoder()
    )
    value, hit_N = PROTOCOLS["zero_shot"](data, 2)["zero_shot"]
    assert (value, hit_N.tolist()) == (0.75, [True, True, True, False])
    assert PROTOCOLS["retrieval"](data, 2)["recall5/en"][0] == 1.0  # two candidates, four images
