"""`indiclip soup`: the average by hand, which weights go in, what is refused, and that the result is a run."""

import json
from pathlib import Path

import pytest
import torch
from experiments import config, fit

import indiclip
from indiclip.cli import main
from indiclip.commands.soup import Average, _greedy
from indiclip.pretrained.runs import read_checkpoint

EMA = {"class_path": "indiclip.training.ema.EMA", "init_args": {"decay": 0.5}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that begin alike and see other samples, with averages; and one of another width."""
    folder = tmp_path_factory.mktemp("soup")
    found = {}
    for name, seed in (("a", 1), ("b", 2), ("wide", 1)):
        tree = config(trainer__callbacks=[EMA], model__lr=0.01, model__warmup_steps=0)
        tree["model"]["encoder"]["batch_norm"] = True
        tree["data"]["train"][0]["dataset"]["init_args"]["seed"] = seed
        tree["data"]["val"][0]["dataset"]["init_args"]["seed"] = 3
        if name == "wide":
            tree["model"]["encoder"]["embed_dim"] = 48
        assert fit(folder, tree, "--name", name) == 0
        found[name] = str(folder / "runs" / name)
    return found


def weights(path, which="auto"):
    return read_checkpoint(path, which).checkpoint["state_dict"]


@pytest.mark.parametrize("which", ["auto", "last"])
def test_the_average_is_that_by_hand(runs, which, tmp_path):
    """Of the averages that EMA kept, or of the last weights; batch norm's statistics too."""
    out = str(tmp_path / "soup")
    assert main(["soup", runs["a"], runs["b"], "--out", out, "--weights", which]) == 0
    first, second, found = weights(runs["a"], which), weights(runs["b"], which), weights(out)
    assert found.keys() == first.keys()
    assert not torch.equal(
        first["encoder.image_pool.norm.running_mean"], second["encoder.image_pool.norm.running_mean"]
    )
    for name, tensor in found.items():
        assert tensor.dtype == first[name].dtype
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), (first[name].double() + second[name].double()) / 2)


def test_a_soup_of_one_is_that_one(runs, tmp_path):
    assert main(["soup", runs["a"], "--out", str(tmp_path / "soup")]) == 0
    first, found = weights(runs["a"]), weights(str(tmp_path / "soup"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in first.items())


def test_a_soup_is_a_run(runs, tmp_path, capsys, monkeypatch):
    """It loads, is scored by the command, and nobody goes on training from it by mistake."""
    monkeypatch.chdir(tmp_path)
    assert main(["soup", runs["a"], runs["b"], "--out", "soup"]) == 0
    images = torch.rand(2, 3, 32, 32)
    encoder = indiclip.load("soup")
    expected = indiclip.load(runs["a"])
    state, own = weights(runs["a"]), weights(runs["b"])
    expected.load_state_dict({name: (state[f"encoder.{name}"] + own[f"encoder.{name}"]) / 2
                              if tensor.is_floating_point() else tensor
                              for name, tensor in expected.state_dict().items()})  # fmt: skip
    torch.testing.assert_close(encoder.embed_image([*images]), expected.embed_image([*images]))
    assert main(["validate", "--config", "soup/config.yaml"]) == 0
    scores = json.loads((tmp_path / "soup" / "validate" / "metrics.json").read_text())
    assert scores["checkpoint"].endswith("soup.ckpt")
    assert "val/contrastive/zero_shot" in scores["metrics"]
    capsys.readouterr()
    assert main(["fit", "--config", "soup/config.yaml", "--ckpt_path", "soup", "--trainer.max_steps", "9"]) != 0
    assert "found weights only" in capsys.readouterr().err


@pytest.mark.parametrize("sign", [1, -1])
def test_greedy_takes_what_makes_the_score_no_worse(sign):
    """By hand, the score being the distance to 0: 1, then with -2 in it 0.5; 9 would make it worse."""
    ingredients = {name: {"w": torch.tensor([value])} for name, value in {"c": 9.0, "b": -2.0, "a": 1.0}.items()}
    rows = [{"name": name} for name in ingredients]
    taken, average = _greedy(ingredients, rows, lambda tensors: sign * -tensors["w"].abs().item(), sign)
    assert taken == ["a", "b"]
    assert average.tensors()["w"].item() == -0.5
    assert rows == [{"name": "c", "alone": sign * -9.0, "with": pytest.approx(sign * -8 / 3)},
                    {"name": "b", "alone": sign * -2.0, "with": sign * -0.5},
                    {"name": "a", "alone": sign * -1.0}]  # fmt: skip


def test_greedy_scores_what_validation_scores(runs, tmp_path, capsys):
    """On the held-out data of the first run, which both have: their scores by themselves are those of their records."""
    monitor = "val/contrastive/text_to_image_r5"
    words = ["soup", runs["a"], runs["b"], "--out", str(tmp_path / "soup"), "--greedy", "--monitor"]
    assert main([*words, "train/loss"]) == 2
    assert "no metric 'train/loss'" in capsys.readouterr().err
    assert main([*words, monitor]) == 0
    for row in json.loads((tmp_path / "soup" / "soup.json").read_text())["sources"]:
        metrics = json.loads((Path(row["name"]) / "metrics.json").read_text())["metrics"]
        assert row["alone"] == pytest.approx(metrics[monitor], abs=1e-6)


def test_what_cannot_be_averaged_is_one_line(runs, tmp_path, capsys):
    out = ["--out", str(tmp_path / "soup")]
    for words, message in {
        (runs["a"], runs["wide"]): "encoder.image_projection.weight: found shape (48, 32); expected shape (32, 32) as",
        (runs["a"], runs["a"]): "stands there more than once",
        (runs["a"], f"{runs['a']}/"): "expected each checkpoint once",
        (runs["a"], f"{runs['a']}/checkpoints/last.ckpt"): "expected each checkpoint once",
        (runs["a"], str(tmp_path / "none")): "no such run or checkpoint",
        (runs["a"], runs["b"], "--greedy"): "--greedy and --monitor METRIC go together",
    }.items():
        assert main(["soup", *words, *out]) != 0
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not (tmp_path / "soup").exists()
    adapted = torch.load(f"{runs['a']}/checkpoints/last.ckpt", weights_only=True)
    adapted["encoder"]["lora"] = {"r": 8}
    for name in ("first.ckpt", "second.ckpt"):
        torch.save(adapted, tmp_path / name)
    assert main(["soup", str(tmp_path / "first.ckpt"), str(tmp_path / "second.ckpt"), *out]) != 0
    assert "first.ckpt: has LoRA's adapters (model.encoder.lora)" in capsys.readouterr().err
    assert main(["soup", runs["a"], "--out", runs["b"]]) != 0
    assert "is there already and holds something" in capsys.readouterr().err


def test_sums_are_in_double_precision():
    """Of 1 and 2**-20 a thousand times, a sum in single precision would lose digits."""
    average = Average().add({"w": torch.ones(1), "n": torch.tensor(3)})
    for _ in range(999):
        average.add({"w": torch.full((1,), 1 + 2.0**-20), "n": torch.tensor(4)})
    assert average.tensors()["w"].item() == torch.tensor(1 + 0.999 * 2.0**-20, dtype=torch.float64).float().item()
    assert average.tensors()["n"].item() == 3
