"""The benchmark inside of `fit`: training does not notice it, and two ranks find what one finds, to the last digit."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from experiments import ENCODER, config, fit
from helpers import tiny_encoder
from PIL import Image
from processes import two_ranks

from indiclip.evals.bench import logged_names, run_bench
from indiclip.evals.find import find_bench
from indiclip.evals.models.embedder import EncoderEmbedder
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.result_files import load_result
from indiclip.evals.results import CardResult, Result, Score
from indiclip.training import india_bench as callback
from indiclip.training.cli import run
from indiclip.training.record import read_history

CLASSES = {"kite": "पतंग", "drum": "ढोल", "lamp": "दीया"}
TREE = {"title": "Things", "task": "classification", "prompts": {"en": ["a {c}"], "hi": ["एक {c}"]}}
ACC1, PARITY = "eval/own/things/hi/acc1", "eval/own/stories/hi/parity_image_to_text_r1"
TYPO = "eval/own/thigs/hi/acc1"


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """Two cards, 26 and 11 images: five batches of at most 8, of which two ranks get three and two."""
    folder = tmp_path_factory.mktemp("cards")
    classes = [{"id": id_, "names": {"en": id_, "hi": hindi}} for id_, hindi in CLASSES.items()]
    (folder / "things.yaml").write_text(yaml.safe_dump(TREE | {"classes": classes}, allow_unicode=True))
    (folder / "stories.yaml").write_text(yaml.safe_dump({"title": "Stories", "task": "retrieval"}))
    draw = np.random.default_rng(0)
    rows = ["file\ten\thi"]
    for number in range(37):
        of_things = number < 26
        place = f"things/{('train', 'test')[number % 2]}/{list(CLASSES)[number % 3]}" if of_things else "stories"
        file = folder / place / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        height, width = draw.integers(20, 60, 2)
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
        if not of_things:
            rows.append(f"{number}.png\tstory {number}\tकहानी {number}")
    (folder / "stories" / "captions.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def india_bench(folder, **options):
    options = {
        "images": str(folder),
        "cards": [str(folder / f"{name}.yaml") for name in ("things", "stories")],
    } | options
    return {
        "class_path": "indiclip.training.india_bench.IndiaBench",
        "init_args": {"batch_size": 8, "procedural": False} | options,
    }


def best(monitor, **options):
    options = {"monitor": monitor, "mode": "max"} | options
    return {"class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints", "init_args": options}


def experiment(*callbacks, **changes):
    """With batch norm and dropout, in epochs of three steps."""
    tree = config(trainer__callbacks=list(callbacks), data__steps_per_epoch=3, trainer__max_steps=4)
    encoder = json.loads(json.dumps(ENCODER)) | {"batch_norm": True}
    encoder["text"]["architecture"]["hidden_dropout_prob"] = 0.3
    tree["model"]["encoder"] = encoder
    for key, value in changes.items():
        tree[key.partition("__")[0]][key.partition("__")[2]] = value
    return tree


def scored_steps(folder, name=ACC1):
    return [row["step"] for row in read_history(folder) if name in row]


def validate(folder, run_folder, checkpoint, command="validate", *flags):
    """What one process scores of a checkpoint."""
    file = str(folder / "experiment.yaml")
    assert run([command, "--config", file, "--ckpt_path", str(checkpoint), *flags]) == 0
    return load_result(run_folder / "bench")


class Numbers(L.Callback):
    """What others would draw at the end of each batch."""

    drawn: list[tuple[float, ...]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.drawn.append((torch.rand(()).item(), float(np.random.rand()), random.random()))


def test_training_does_not_notice_it(tmp_path, cards):
    states, drawn = [], []
    numbers = {"class_path": "test_india_bench.Numbers"}
    for name, callbacks in (("with", [india_bench(cards, every_n_steps=1), numbers]), ("without", [numbers])):
        (tmp_path / name).mkdir()
        Numbers.drawn = []
        assert fit(tmp_path / name, experiment(*callbacks)) == 0
        file = tmp_path / name / "runs" / "experiment" / "checkpoints" / "last.ckpt"
        states.append(torch.load(file, weights_only=True))
        drawn.append(Numbers.drawn)
    assert scored_steps(tmp_path / "with" / "runs" / "experiment") == [1, 2, 3, 4]
    first, second = (state["state_dict"] for state in states)
    assert any("running_mean" in key for key in first)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    first, second = (state["optimizer_states"][0]["state"] for state in states)
    assert all(torch.equal(value, second[key][name]) for key, slots in first.items() for name, value in slots.items())
    assert drawn[0] == drawn[1]


def test_two_ranks_score_what_one_does_to_the_last_digit(tmp_path, cards):
    """In the fit, amid of it, where each rank has running statistics of its own; and from the checkpoint on both."""
    done, folder = two_ranks(tmp_path, experiment(india_bench(cards, every_n_steps=4)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 4: benchmark of the trained weights in") == 1
    two = load_result(folder / "bench")
    assert scored_steps(folder) == [4]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = validate(tmp_path, folder, folder / "checkpoints" / "last.ckpt", "validate", "--trainer.devices", "1")
    finally:
        torch.set_num_threads(threads)
    assert one.scores == two.scores
    assert one.predictions == two.predictions
    assert {(score.card, score.protocol) for score in one.scores} >= {("things", "knn"), ("stories", "retrieval")}
    assert len(one.logged()) > 30  # the romanised names are the cards' own, and these have none


@pytest.mark.parametrize(
    ("options", "changes", "steps"),
    [
        ({"every_n_steps": 2}, {"trainer__max_steps": 5, "model__micro_batches": 2}, [2, 4, 5]),
        ({"every_n_steps": 3}, {"trainer__max_steps": 6}, [3, 6]),  # with a validation at the same step
        ({"every_n_steps": 4}, {"trainer__max_steps": -1, "trainer__max_epochs": 3, "data__val": []}, [4, 8]),
        ({}, {"trainer__max_steps": 7}, [3, 6, 7]),
        ({"every_n_epochs": 2}, {"trainer__max_steps": 9}, [6, 9]),
        ({}, {"trainer__num_sanity_val_steps": 1, "trainer__max_steps": 3}, [3]),
    ],
)  # fmt: skip
def test_when_it_scores(tmp_path, cards, options, changes, steps):
    assert fit(tmp_path, experiment(india_bench(cards, probes=False, **options), **changes)) == 0
    folder = tmp_path / "runs" / "experiment"
    assert scored_steps(folder) == steps
    assert json.loads((folder / "bench" / "metrics.json").read_text())["about"]["step"] == steps[-1]
    assert ACC1 in json.loads((folder / "metrics.json").read_text())["metrics"]


def test_validate_and_test_score_a_checkpoint_once_whatever_the_schedule_and_precision(tmp_path, cards, capsys):
    """The fit autocasts to bfloat16; the benchmark does not. Scored are the averages, of the last step too."""
    ema = {"class_path": "indiclip.training.ema.EMA", "init_args": {"decay": 0.5}}
    tree = experiment(india_bench(cards, every_n_steps=2), ema, trainer__max_steps=2)
    assert fit(tmp_path, tree, "--trainer.precision", "bf16-mixed") == 0
    folder = tmp_path / "runs" / "experiment"
    fitted, history = load_result(folder / "bench"), read_history(folder)
    for command in ("validate", "test"):
        (folder / "bench" / "metrics.json").unlink()
        capsys.readouterr()
        found = validate(tmp_path, folder, folder / "checkpoints" / "last.ckpt", command)
        assert (found.scores, found.about["step"]) == (fitted.scores, 2)
        assert capsys.readouterr().out.count("step 2: benchmark of the averaged weights of 1 updates in") == 1
    assert read_history(folder) == history


def test_a_trial_leaves_nothing(tmp_path, cards, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit(tmp_path, experiment(india_bench(cards)), "--trainer.fast_dev_run", "true") == 0
    assert not list(tmp_path.rglob("bench"))


def fake_scores(monkeypatch, values):
    """What each run of the benchmark finds."""
    left = list(values)

    def fake(embedder, bench, options, *_):
        names = ("own", "things", "photographs", "zero_shot", "hi", "acc1", embedder.lengths[-1], "native")
        card = CardResult("own", "things", "Things", "photographs", "acc1", "scored")
        result = Result(embedder.name, embedder.lengths, ["native"], [card], [Score(*names, left.pop(0))])
        result.about = {"seconds": {"images": 0.0}}
        return result

    monkeypatch.setattr(callback, "run_bench", fake)


@pytest.mark.parametrize(
    ("schedule", "saves", "values", "step"),
    [
        ({"every_n_steps": 2}, {"every_n_train_steps": 2}, [0.25, 0.75, 0.5, 0.125], 4),
        ({}, {}, [0.25, 0.75, 0.5], 6),  # after the steps 3, 6 and 7
    ],
)
def test_the_best_checkpoint_has_the_best_score_and_its_weights(
    tmp_path, cards, monkeypatch, schedule, saves, values, step
):
    fake_scores(monkeypatch, values)
    weights = {}

    def keep(self, trainer, module):
        weights[trainer.global_step] = {name: value.clone() for name, value in module.state_dict().items()}

    monkeypatch.setattr(
        callback.IndiaBench,
        "_score",
        lambda self, *given, score=callback.IndiaBench._score: (keep(self, *given), score(self, *given)),
    )
    assert fit(tmp_path, experiment(india_bench(cards, **schedule), best(ACC1, **saves), trainer__max_steps=7)) == 0
    folder = tmp_path / "runs" / "experiment" / "checkpoints"
    saved = torch.load(folder / f"{step}.ckpt", weights_only=True)
    (state,) = [state for key, state in saved["callbacks"].items() if "Checkpoints" in key]
    assert (Path(state["best_model_path"]).name, float(state["best_model_score"])) == (f"{step}.ckpt", 0.75)
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in weights[step].items())
    assert {file.name for file in folder.glob("*.ckpt")} == {f"{step}.ckpt", "stopped.ckpt", "last.ckpt"}


MISMATCH = (
    "Checkpoints keeps the best by {} and saves with every_n_train_steps {}, but IndiaBench scores with every_n_steps "
    "{}, every_n_epochs {}: a checkpoint would get the score of other weights; set its every_n_train_steps to {}"
)


@pytest.mark.parametrize(
    ("options", "saves", "message"),
    [
        ({"every_n_steps": 2}, {"every_n_train_steps": 3}, MISMATCH.format(ACC1, 3, 2, 1, 2)),
        ({"every_n_steps": 2}, {}, MISMATCH.format(ACC1, "null", 2, 1, 2)),
        ({}, {"every_n_train_steps": 3}, MISMATCH.format(ACC1, 3, "null", 1, "null")),
        ({"every_n_epochs": 2}, {}, "null, and every_n_epochs of IndiaBench to 1"),
        ({}, {"monitor": TYPO}, f"Checkpoints.monitor: the benchmark logs no {TYPO}; nearest is '{ACC1}'"),
        ({}, {"mode": "min"}, f"Checkpoints.mode: min would keep the worst by {ACC1}; expected max"),
        ({}, {"monitor": PARITY}, "Checkpoints.mode: max would keep the worst by"),
        ({"every_n_steps": 2, "every_n_epochs": 3}, {}, "found every_n_steps 2 and every_n_epochs 3; expected one"),
        ({"every_n_steps": 0}, {}, "IndiaBench.every_n_steps: found 0; expected 1 or more"),
        ({"views": ["natve"]}, {}, "IndiaBench.views: experiment: has no view 'natve'; expected native, native-square"),
        ({"lengths": [99]}, {}, "lengths: found 99; expected a whole number from 1 to 32"),
        ({"images": "nowhere"}, {}, "nowhere: no such folder"),
    ],
)
def test_a_mistake_is_one_line_before_training(tmp_path, cards, capsys, options, saves, message):
    saves = best(**{"monitor": ACC1} | saves)
    assert fit(tmp_path, experiment(india_bench(cards, **options), saves)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("indiclip: ")]
    assert message in line
    assert not list(tmp_path.rglob("history.jsonl"))


def test_images_of_no_class_are_an_error_that_names_the_key_or_left_out(tmp_path, cards, capsys):
    shutil.copytree(cards, tmp_path / "photos")
    shutil.copytree(cards / "things" / "test" / "kite", tmp_path / "photos" / "things" / "test" / "kyte")
    asked = {"images": str(tmp_path / "photos"), "every_n_steps": 2, "probes": False}
    assert fit(tmp_path, experiment(india_bench(cards, **asked))) == 2
    said = capsys.readouterr().err
    assert "'kyte' is no class of the card things; nearest is 'kite'" in said
    assert "IndiaBench.skip_unknown: true leaves out the images of classes that the card does not have" in said
    assert fit(tmp_path, experiment(india_bench(cards, **asked, skip_unknown=True))) == 0
    assert "left out: 4 images of 1 classes that are not on the card things: kyte (4)" in capsys.readouterr().out


def test_the_names_that_will_be_logged_are_those_that_are(cards):
    """Each length, view, language and protocol, with the probes."""
    files = [str(cards / f"{name}.yaml") for name in ("things", "stories")]
    bench, options = find_bench(cards, files, procedural=False), Options(views=("native", "16"), resamples=9)
    embedder = EncoderEmbedder(tiny_encoder(), "x")
    found = run_bench(embedder, bench, options).logged()
    assert logged_names(embedder.lengths, bench, options) == list(found)
    assert "eval/own/things/images/knn_acc1_16@16" in found


def test_after_validations_where_there_are_none_is_said(tmp_path, cards, capsys):
    assert fit(tmp_path, experiment(india_bench(cards), data__val=[])) == 2
    assert "IndiaBench.every_n_steps: null runs after validations, and this run has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "ends", "steps"),
    [({"every_n_steps": 2}, (4, 6), [2, 4, 6]), ({"every_n_epochs": 2}, (3, 7), [3, 6, 7])],
)
def test_a_resumed_run_scores_no_step_twice_and_skips_none(tmp_path, cards, options, ends, steps):
    bench = india_bench(cards, probes=False, **options)
    flags = ["--ckpt_path", "last", "--name", "a"]
    for end in ends:
        tree = experiment(bench, trainer__max_steps=end)
        assert fit(tmp_path, tree | {"data": tree["data"] | {"steps_per_epoch": 6}}, *flags) == 0
    assert scored_steps(tmp_path / "runs" / "a") == steps


@pytest.mark.parametrize(
    ("options", "step", "steps"),
    [
        ({"every_n_steps": 2}, 2, [2, 4, 6]),
        pytest.param({}, 3, [3, 6], marks=pytest.mark.slow),
        pytest.param({"every_n_steps": 6}, 6, [6], marks=pytest.mark.slow),
    ],
)
def test_a_signal_amid_of_it_saves_at_once_and_the_next_run_scores(
    tmp_path, cards, monkeypatch, capfd, options, step, steps
):
    whole, folder = tmp_path / "whole", tmp_path / "runs" / "experiment"
    whole.mkdir()
    tree = experiment(india_bench(cards, probes=False, **options), trainer__max_steps=6)
    assert fit(whole, tree) == 0
    embed, calls = EncoderEmbedder.embed_images, []

    def interrupted(self, batch):
        calls.append(os.kill(os.getpid(), signal.SIGTERM))
        return embed(self, batch)

    monkeypatch.setattr(EncoderEmbedder, "embed_images", interrupted)
    assert fit(tmp_path, tree) == 143
    assert len(calls) == 1
    assert f"SIGTERM: saved {folder}/checkpoints/{step}.ckpt, step {step}" in capfd.readouterr().err
    assert scored_steps(folder) == []
    monkeypatch.undo()
    assert fit(tmp_path, tree, "--ckpt_path", "last") == 0
    assert scored_steps(folder) == steps
    expected = {row["step"]: row for row in read_history(whole / "runs" / "experiment") if ACC1 in row}
    for row in read_history(folder):
        if ACC1 in row:
            assert row | {"seconds": 0} == expected[row["step"]] | {"seconds": 0}


def test_a_save_that_fails_ends_all_ranks(tmp_path, cards):
    """A file lies where its folder should be, as good as a full disk; only the first rank writes."""
    (tmp_path / "runs" / "experiment").mkdir(parents=True)
    (tmp_path / "runs" / "experiment" / "bench").touch()
    tree = experiment(india_bench(cards, every_n_steps=1))
    done, folder = two_ranks(tmp_path, tree, "--ckpt_path", "last")
    assert done.statuses == [1, 0]  # see AgreedStop
    lines = [line for line in done.stderr.splitlines() if line.startswith("indiclip: ")]
    assert lines == [f"indiclip: the benchmark after step 1: rank 0: [Errno 17] File exists: '{folder}/bench'"]
    assert "Traceback" not in done.stderr
