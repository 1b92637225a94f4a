"""The average of the weights: its numbers, what is scored and kept, and that training goes on exactly."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from experiments import config, fit
from helpers import tiny_encoder
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from processes import on_ranks
from test_module import SMALL, mela_data, trainer
from torch import nn

import indiclip
from heads.contrastive import Contrastive
from heads.detection import Detection
from indiclip.module import MultiTask
from indiclip.training import record as record_module
from indiclip.training.cli import run
from indiclip.training.ema import EMA
from indiclip.training.sharding import ShardedStrategy
from indiclip.training.trainer_setup import trainer_options

LATE = "heads.late.towers.ltrb.weight"
CALLBACK = {"class_path": "indiclip.training.ema.EMA", "init_args": {"decay": 0.5}}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).requires_grad_(False))


def moved(module, seed):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    module[1].running_mean.copy_(torch.randn(4))


def test_the_average_is_that_of_the_formula():
    """By hand, in float64: decays 1/10, 2/11, 3/12, then the bound of 0.25; frozen weights are not averaged."""
    module, ema = model(), EMA(decay=0.24)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    ema.update(module)
    expected = {name: module.state_dict()[name].double().clone() for name in names}
    for step, decay in enumerate([1 / 10, 2 / 11, 0.24, 0.24]):
        moved(module, step)
        ema.update(module)
        for name in names:
            expected[name] = decay * expected[name] + (1 - decay) * module.state_dict()[name].double()
    assert sorted(ema._averages) == sorted(names)
    for name in names:
        torch.testing.assert_close(ema._averages[name].double(), expected[name], atol=1e-6, rtol=1e-6)


def test_the_average_of_what_begins_late_counts_from_there():
    """By hand, in float64: what two updates left untouched is as it was, and then has the decays of a beginning."""
    module, ema = model(), EMA(decay=0.9999)
    ema._untouched = {"1.weight", "1.running_mean"}
    ema.update(module)
    expected = {name: module.state_dict()[name].double().clone() for name in ema._averages}
    for step in range(5):
        late = {name: module.state_dict()[name].clone() for name in ema._untouched}
        moved(module, step)
        for name, tensor in late.items():
            module.state_dict()[name].copy_(tensor)
        if step == 2:
            ema._untouched = set()
            moved(module, step)
        ema.update(module)
        for name, average in expected.items():
            number = max(step - 2, -1) if name in ("1.weight", "1.running_mean") else step
            decay = (1 + number) / (10 + number)
            expected[name] = decay * average + (1 - decay) * module.state_dict()[name].double()
    for name, average in ema._averages.items():
        torch.testing.assert_close(average.double(), expected[name], atol=1e-6, rtol=1e-6)


class Watch(Callback):
    """Notes one weight of a late head after each step, and ends the run after one of them."""

    def __init__(self, stop):
        self.stop, self.seen = stop, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(pl_module.get_parameter(LATE).detach().clone())
        trainer.should_stop = trainer.global_step >= self.stop


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_a_head_that_begins_late_leaves_nothing_of_its_random_start(tmp_path, every_n_steps):
    """By hand from the weights of a run; one that is stopped before, at and after the head's first step is the same."""

    def averages(*stops):
        for stop in stops:
            torch.manual_seed(0)
            module = MultiTask(
                tiny_encoder(), [Contrastive(), Detection(**SMALL, start=0.5, name="late")], warmup_steps=0
            )
            ema, watch = EMA(every_n_steps=every_n_steps), Watch(stop)
            run = trainer(tmp_path, max_steps=12, limit_val_batches=0, callbacks=[ema, watch])
            run.fit(module, mela_data(), ckpt_path=last if stop != stops[0] else None, weights_only=False)
            run.save_checkpoint(last)
        return {name: average.clone() for name, average in ema._averages.items()}, watch.seen

    last = tmp_path / "last.ckpt"
    whole, seen = averages(12)
    parts, _ = averages(4, 6, 7, 12)
    for name, average in whole.items():
        assert torch.equal(average, parts[name]), name
    assert torch.equal(seen[0], seen[5])
    assert not torch.equal(seen[5], seen[6])
    expected = seen[5].double()
    for number, after in enumerate(range(6 if every_n_steps == 1 else 8, 12, every_n_steps)):
        decay = (1 + number) / (10 + number)
        expected = decay * expected + (1 - decay) * seen[after].double()
    torch.testing.assert_close(whole[LATE].double(), expected, atol=1e-6, rtol=1e-6)


def test_averages_of_half_precision_weights_are_in_single():
    module, ema = model().to(torch.bfloat16), EMA(decay=0.9999)
    ema.update(module)
    ema.num_updates = 10**6
    module[0].weight.data += 1
    before = ema._averages["0.weight"].clone()
    ema.update(module)
    assert ema._averages["0.weight"].dtype == torch.float32
    assert (ema._averages["0.weight"] != before).all()  # bfloat16 would have lost a change of 1e-4


def run_config(steps=4):
    tree = config(model__lr_schedule={"class_path": "indiclip.optim.Constant"}, model__warmup_steps=1)
    tree["trainer"]["callbacks"] = [copy.deepcopy(CALLBACK)]
    tree["trainer"]["max_steps"] = steps
    return tree


def test_a_run_scores_and_keeps_the_averages_and_trains_as_without_them(tmp_path, capsys):
    with_ema, plain = run_config(), run_config()
    del plain["trainer"]["callbacks"]
    for name, tree in (("ema", with_ema), ("plain", plain)):
        assert fit(tmp_path, tree, "--name", name) == 0
    saved = {
        name: torch.load(tmp_path / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("ema", "plain")
    }
    for name, tensor in saved["plain"]["state_dict"].items():
        assert torch.equal(tensor, saved["ema"]["state_dict"][name]), name
    averages = saved["ema"]["averages"]["state_dict"]
    averaged, last = (indiclip.load(tmp_path / "runs" / "ema", weights=which) for which in ("auto", "last"))
    assert torch.equal(averaged.image_projection.weight, averages["encoder.image_projection.weight"])
    assert torch.equal(last.image_projection.weight, saved["ema"]["state_dict"]["encoder.image_projection.weight"])
    assert not torch.equal(averaged.image_projection.weight, last.image_projection.weight)
    assert averaged.initialised[0].endswith("step 4, averaged weights of 3 updates")
    scores = {name: json.loads((tmp_path / "runs" / name / "metrics.json").read_text())["metrics"] for name in saved}
    assert any(scores["ema"][name] != scores["plain"][name] for name in scores["plain"] if name.startswith("val/"))
    with pytest.raises(ValueError, match="has no averaged weights"):
        indiclip.load(tmp_path / "runs" / "plain", weights="ema")
    capsys.readouterr()
    folder = tmp_path / "runs" / "ema"
    assert run(["validate", "--config", str(folder / "config.yaml"), "--ckpt_path", str(folder)]) == 0
    assert "scored are the averaged weights, of 3 updates" in capsys.readouterr().out


def test_a_resumed_run_has_the_weights_and_averages_of_the_uninterrupted_one(tmp_path, monkeypatch):
    """With stochastic depth, whose draws are those of the uninterrupted run."""
    shown, pictures = [], record_module.held_out_pictures

    def noted(module, *arguments):
        shown.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        return pictures(module, *arguments)

    monkeypatch.setattr(record_module, "held_out_pictures", noted)
    depth = ["--model.encoder.backbone.init_args.depth", "2"]
    depth += ["--model.encoder.backbone.init_args.options", "{drop_path_rate: 0.5}"]
    assert fit(tmp_path, run_config(4), "--name", "whole", *depth) == 0
    for steps in (3, 4):
        assert fit(tmp_path, run_config(steps), "--name", "parts", "--ckpt_path", "last", *depth) == 0
    averages = torch.load(tmp_path / "runs" / "whole" / "checkpoints" / "last.ckpt")["averages"]["state_dict"]
    assert len(shown) == 3  # runs
    assert all(torch.equal(shown[0][name], average) for name, average in averages.items())
    record = json.loads((tmp_path / "runs" / "whole" / "metrics.json").read_text())
    assert record["weights"] == "the averaged weights of 3 updates"
    report = (tmp_path / "runs" / "whole" / "report.html").read_text()
    assert "Scored, and shown in the pictures, are the averaged weights of 3 updates." in report
    files = [tmp_path / "runs" / name / "checkpoints" / "last.ckpt" for name in ("whole", "parts")]
    one, other = (torch.load(file, weights_only=True) for file in files)
    assert one["averages"]["num_updates"] == other["averages"]["num_updates"]
    for part in ("state_dict", "averages"):
        left, right = (saved[part] if part == "state_dict" else saved[part]["state_dict"] for saved in (one, other))
        assert all(torch.equal(left[name], right[name]) for name in left)


class SaveFirst(Callback):
    """Saves at the end of each step, as a callback that stops a run does, before those behind it are told of it."""

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/first-{trainer.global_step}.ckpt")


def test_a_checkpoint_of_a_callback_before_it_has_the_averages_of_this_step(tmp_path):
    tree = run_config(steps=3)
    tree["trainer"]["callbacks"].insert(0, {"class_path": "test_ema.SaveFirst"})
    assert fit(tmp_path, tree) == 0
    (first,) = tmp_path.rglob("first-3.ckpt")
    last = tmp_path / "runs" / "experiment" / "checkpoints" / "last.ckpt"
    found, expected = (torch.load(file, weights_only=True)["averages"] for file in (first, last))
    assert found["num_updates"] == expected["num_updates"] == 2
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)


def learner():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def learn(module, ema, steps=3):
    """Average while it learns, with an evaluation before the last update. Returns what the averages answer."""
    optimizer, inputs = torch.optim.SGD(module.parameters(), 0.5), torch.linspace(-1, 1, 6).reshape(2, 3)
    for _ in range(steps):
        module(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            module(inputs)  # after which FSDP keeps the outermost module's weights whole
        ema.update(module)
    with torch.no_grad():
        module(inputs)
        ema._swap_in(module)
        return module(inputs)


def test_averages_of_a_sharded_model_are_shards_and_those_of_one_process(tmp_path):
    """FSDP2 on two gloo ranks: averaged, swapped in and out, saved whole and loaded again."""

    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        mesh = init_device_mesh("cpu", (2,))
        module, ema = learner(), EMA(decay=0.5)
        for part in (module[0], module):
            fully_shard(part, mesh=mesh)
        answers = learn(module, ema)
        placements = {name: tensor.placements for name, tensor in module.state_dict().items()}
        checkpoint = {"state_dict": module.state_dict()}
        ema.on_save_checkpoint(SimpleNamespace(training=False), module, checkpoint)
        assert all(isinstance(tensor, DTensor) for tensor in checkpoint["state_dict"].values())
        ema._swap_out(module)
        trained = {name: tensor.full_tensor() for name, tensor in module.state_dict().items()}
        for name, tensor in checkpoint["state_dict"].items():  # made while the averages were in the model
            assert torch.equal(tensor.full_tensor(), trained[name])
        assert placements == {name: tensor.placements for name, tensor in module.state_dict().items()}
        again = EMA(decay=0.5)
        again.on_load_checkpoint(None, module, checkpoint)
        again._take_loaded(module)
        assert all(torch.equal(average, ema._averages[name]) for name, average in again._averages.items())
        shape = tuple(ema._averages["0.weight"].shape)
        averages = checkpoint["averages"]["state_dict"]
        whole = {name: tensor.full_tensor().tolist() for name, tensor in averages.items()}
        return shape, answers.tolist(), whole, {name: tensor.tolist() for name, tensor in trained.items()}

    module, alone = learner(), EMA(decay=0.5)
    expected = learn(module, alone)
    alone._swap_out(module)
    for shape, answers, whole, trained in on_ranks(2, work, tmp_path):
        assert shape == (2, 3)
        torch.testing.assert_close(torch.tensor(answers), expected)
        for found, own in ((whole, alone._averages), (trained, module.state_dict())):
            assert found.keys() == own.keys()
            for name, value in found.items():
                torch.testing.assert_close(torch.tensor(value), own[name])


def test_averages_that_a_strategy_does_not_allow_are_refused():
    options = {"callbacks": [EMAWeightAveraging()], "strategy": ShardedStrategy()}
    with pytest.raises(ValueError, match="EMAWeightAveraging copies whole models, .* indiclip.training.ema.EMA$"):
        trainer_options(options, Path("run"), "fit", True)
    with pytest.raises(ValueError, match="FSDPStrategy flattens the weights, .* expected ddp or .*ShardedStrategy"):
        EMA().setup(SimpleNamespace(strategy=FSDPStrategy()), None, "fit")
    with pytest.raises(ValueError, match="trainer.callbacks: found EMA more than once"):
        EMA().setup(SimpleNamespace(strategy=None, callbacks=[EMA(), EMA()]), None, "fit")


@pytest.mark.parametrize(("options", "first"), [({"start_step": 5}, 5), ({"start_step": 3, "every_n_steps": 5}, 5)])
def test_averages_that_would_never_begin_are_one_line(options, first, tmp_path, capsys):
    tree = run_config(steps=4)
    tree["trainer"]["callbacks"][0]["init_args"] |= options
    assert fit(tmp_path, tree) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("indiclip:")]
    assert f"trainer.callbacks.EMA.start_step: {options['start_step']}, with every_n_steps" in line
    assert f"has the averages begin after step {first} of 4" in line
    assert not (tmp_path / "runs" / "experiment").exists()
