"""Tasks with a batch in every k-th step: samples, gradients, ranks, resume, the planner, what is refused."""

import numpy as np
import pytest
import torch
import yaml
from experiments import ROOT, config, fit, put
from test_plan import Numbers
from test_sharding import fitted, largest_difference, sharded, weights

from indiclip.cli import main
from indiclip.loading.source import Source
from indiclip.loading.stages import Stage
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing
from indiclip.task_weights import GradNorm
from indiclip.training.record import read_history

SCENES = {
    "task": "scenes",
    "dataset": {
        "class_path": "indiclip.generated.mela.Mela",
        "init_args": {"num_scenes": 8, "size": 32, "people": 1.0, "seed": 1},
    },
    "batch_size": 4,
    "max_tokens": 16,
}
DETECTION = {
    "class_path": "heads.detection.Detection",
    "init_args": {"task": "scenes", "num_classes": 17, "out_channels": 16, "num_convs": 1, "scales": [1.0]},
}


def steps_of(every, rank=0, world=1, run_steps=12, **options):
    options = {"batch_size": 4, "window": 2} | options
    shards = Numbers("t", 40)
    shards.starts = np.arange(0, 41, 10)
    sources = [Source("t", shards, every=every, **options), Source("other", Numbers("other", 8), 2)]
    return Steps(sources, 5, Preprocessing(8), True, rank, world, run_steps)


def keys(steps, numbers):
    return [steps[step]["t"]["keys"] for step in numbers]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("budget", [{}, {"batch_size": None, "batch_tokens": 16, "batch_multiple": 2, "max_tokens": 4}])
def test_batches_are_those_of_every_step_one_after_the_other(world, budget):
    """Through two epochs and a half; each with its augmentation, and what is prefetched."""
    for rank in range(world):
        each, third = (steps_of(every, rank, world, **budget) for every in (1, 3))
        assert keys(third, range(0, 75, 3)) == keys(each, range(25))
        drawn, expected = third[6]["t"]["targets"]["random_seed"], each[2]["t"]["targets"]["random_seed"]
        assert drawn == expected
        assert third._fetched == each._fetched
        assert [sorted(third[step]) for step in range(4)] == [["other", "t"], ["other"], ["other"], ["other", "t"]]
        assert [third[step].idle_tasks for step in range(3)] == [set(), {"t"}, {"t"}]
    assert len(third) == 3 * len(each)


def test_stages_end_at_steps_of_the_run():
    """Until step 5, that is for the batches of steps 0 and 3: of 8 samples; then of 4, and no sample of both."""
    steps = steps_of(3, stages=[Stage(5, batch_size=8)], run_steps=20)
    assert [len(batch) for batch in keys(steps, range(0, 20, 3))] == [8, 8, 4, 4, 4, 4, 4]
    of_batches = steps_of(1, stages=[Stage(2, batch_size=8)], run_steps=20)
    assert keys(steps, range(0, 20, 3)) == keys(of_batches, range(7))
    ends_between = steps_of(3, stages=[Stage(4, batch_size=8), Stage(5, batch_size=16)], run_steps=20)
    assert keys(ends_between, range(0, 20, 3)) == keys(of_batches, range(7))


def tree_of(every, steps=7, dense=False, **changes):
    """Contrastive and detection, of which one has a batch in every k-th step: the dense one, or the other."""
    tree = config(trainer__max_steps=steps, model__warmup_steps=0, model__lr=0.01, **changes)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tree["model"]["encoder"]["text"]["architecture"] |= dropout
    tree["model"]["heads"].append(DETECTION)
    sources = [tree["data"]["train"][0], SCENES]
    sources[int(dense)] = sources[int(dense)] | {"every": every}
    tree["data"] = {"train": sources, "val": [], "steps_per_epoch": steps}
    checkpoints = "indiclip.training.fault_tolerance.checkpoints.Checkpoints"
    tree["trainer"]["callbacks"] = [
        {"class_path": checkpoints, "init_args": {"every_n_train_steps": 1, "save_top_k": -1}}
    ]
    return tree


def checkpoint(folder, step, name="experiment"):
    return torch.load(folder / "runs" / name / "checkpoints" / f"{step}.ckpt", weights_only=True)


def test_a_head_learns_in_its_steps_alone_and_a_resumed_run_too(tmp_path):
    tree = tree_of(3, dense=True)
    assert fit(tmp_path, tree) == 0
    states = [checkpoint(tmp_path, step)["state_dict"] for step in range(1, 8)]
    for name, value in states[0].items():
        moved = [step for step in range(1, 7) if not torch.equal(states[step][name], states[step - 1][name])]
        if name.startswith("heads.detection") and value.is_floating_point() and value.numel() > 1:
            assert moved in ([3, 6], []), name  # beside step 0; neither by weight decay nor by old momentum
        elif name.startswith("encoder.backbone.vit.blocks"):
            assert moved == [1, 2, 3, 4, 5, 6], name
    assert any(
        not torch.equal(states[2][name], states[3][name]) for name in states[0] if name.startswith("heads.detection")
    )
    rows = [row for row in read_history(tmp_path / "runs" / "experiment") if "train/loss" in row]
    losses = [row["train/detection/box"] for row in rows]
    assert len({*losses}) == 3  # between its batches the last one's is said
    assert losses == [losses[i // 3 * 3] for i in range(7)]
    at = tmp_path / "runs" / "experiment" / "checkpoints" / "2.ckpt"  # the next step has no batch either
    assert fit(tmp_path, tree, "--name", "resumed", "--ckpt_path", str(at)) == 0
    resumed = checkpoint(tmp_path, 7, "resumed")["state_dict"]
    assert all(torch.equal(value, resumed[name]) for name, value in states[-1].items())


@pytest.mark.parametrize(
    ("weighed", "micro_batches", "strategy"),
    [("Uncertainty", 2, "ddp"), ("PCGrad", 1, "ddp"), pytest.param("Fixed", 2, sharded(1, 2), marks=pytest.mark.slow)],
    ids=["parts", "projected", "sharded"],
)
def test_two_ranks_are_one(tmp_path, weighed, micro_batches, strategy):
    """Contrastive rests in two of three steps, and with it the text tower and what weighs it."""
    found = []
    for world in (1, 2):
        tree = tree_of(3, steps=5, model__micro_batches=micro_batches if world == 2 else 1)
        tree["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}
        tree["model"] |= {"lr": None, "task_weights": {"class_path": f"indiclip.task_weights.{weighed}"}}
        tree["trainer"]["callbacks"].append({"class_path": "trouble.Double"})
        tree["trainer"]["strategy"] = strategy if world == 2 else "ddp"
        done, folder = fitted(tmp_path / str(world), tree, world)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(weights(folder))
    assert largest_difference(*found) < 1e-6


def planned(folder, tree, capsys):
    from _study_flops import count_arm

    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree))
    words = ["--config", str(file), "--gpu", "h100", "--nodes", "1", "--gpus-per-node", "1", "--json"]
    assert main(["plan", *words]) == 0
    return yaml.safe_load(capsys.readouterr().out), count_arm(["--config", str(file)], 7, None)


@pytest.mark.slow
def test_a_step_is_planned_at_its_mean_and_a_run_at_the_sum_of_its_steps(tmp_path, capsys, monkeypatch):
    """Of 7 steps 3 have the dense task: 0, 3 and 6. Memory is that of a step with all tasks."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    (each, run_each), (third, run_third) = (planned(tmp_path, tree_of(k, dense=True), capsys) for k in (1, 3))
    dense = sum(sum(of.values()) for of in each["flops_per_gpu"]["scenes"].values())
    assert third["flops_per_step"] == pytest.approx(each["flops_per_step"] - dense * 2 / 3)
    assert third["memory"] == each["memory"]
    assert third["batches"]["scenes"] == each["batches"]["scenes"] | {"every": 3}
    assert run_each.flops - run_third.flops == pytest.approx(4 * dense)
    assert run_third.stages == ((0, pytest.approx(run_third.flops / 7)),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train__1__every": 0}, "data: every of task 'scenes': found 0; expected 1 or more"),
        ({"data__train__0__every": 2}, "data.train: task 'contrastive' has every 2, and no head that begins"),
        (
            {"model__heads__0__init_args": {"start": 0.5}},
            "data.train: task 'scenes' has every 3, and no head that",
        ),
        (
            {"data__val": [SCENES | {"every": 3}]},
            "data.val[0].every: held-out data are read whole; expected it",
        ),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path, capsys, changes, message):
    tree = tree_of(3, dense=True)
    for key, value in changes.items():
        put(tree, key, value)
    assert fit(tmp_path, tree) == 2
    assert message in capsys.readouterr().err


def test_a_task_that_trains_once_is_told(tmp_path):
    with pytest.warns(
        UserWarning, match=r"data.train\[0\].every: found 4 of 2 steps in all: the task 'contrastive' has a batch"
    ):
        assert fit(tmp_path, tree_of(4, steps=2)) == 0


@pytest.mark.parametrize(("start", "status"), [(0.8, 0), (0.9, 2)])
def test_a_head_that_begins_behind_the_last_batch_of_its_task_is_refused(start, status, tmp_path, capsys):
    """Batches of scenes come in steps 0, 4 and 8 of 10."""
    tree = tree_of(4, steps=10, dense=True)
    tree["model"]["heads"][1] = DETECTION | {"init_args": DETECTION["init_args"] | {"start": start}}
    assert fit(tmp_path, tree) == status
    found = "data.train[1].every: found 4 of 10 steps in all: heads.detection begins in step 9, and no batch comes from"
    assert (found in capsys.readouterr().err) == bool(status)


def test_sources_of_a_task_agree():
    sources = [Source("t", Numbers("a", 8), 2, every=every) for every in (1, 2)]
    with pytest.raises(ValueError, match="data: the sources of task 't' differ in every, such as 1 and 2; they share"):
        Steps(sources, 0, Preprocessing(8), True)


def test_gradnorms_weights_keep_their_sum_in_a_step_without_some_heads():
    """One alone keeps its weight; of two with weights 0.5 and 0.9 the sum stays 1.4."""
    strategy = GradNorm(alpha=0.0, lr=0.1)
    alone = strategy.updated(torch.tensor([0.4]), torch.tensor([3.0]), torch.tensor([0.7]))
    assert alone.item() == pytest.approx(0.4)
    both = strategy.updated(torch.tensor([0.5, 0.9]), torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    # By slopes of -1 / 0.5 / 2 and 3 / 0.9 / 2 they move to 0.6 and 0.9 * 22 / 27, whose sum is 1.4 / 1.05.
    assert both.tolist() == pytest.approx([0.6 * 1.05, 0.9 * 22 / 27 * 1.05], rel=1e-4)
