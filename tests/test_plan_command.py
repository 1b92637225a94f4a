"""`indiclip plan`: what it prints of a config, and one line for what cannot be planned."""

import json
import subprocess
import sys

import pytest
import yaml
from experiments import config

from indiclip.cli import main


def plan(folder, *words, **changes):
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config(**changes)))
    return main(["plan", "--config", str(folder / "experiment.yaml"), *words])


@pytest.mark.slow
def test_a_plan_as_json_and_as_tables(tmp_path, capsys):
    words = [
        "--gpu",
        "h100",
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        "--price",
        "2",
        "--trainer.precision",
        "bf16-mixed",
    ]
    assert plan(tmp_path, *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["fits"], found["strategy"], found["dtype"]) == (4, True, "ddp", "bf16")
    assert found["batches"]["contrastive"]["samples"] == 4
    assert found["batches"]["contrastive"]["per_gpu"] == 1
    parts = {"image tower", "text tower", "pools, projections", "contrastive", "contrastive loss"}
    assert found["flops_per_gpu"]["contrastive"].keys() == parts
    total = sum(sum(of.values()) for of in found["flops_per_gpu"]["contrastive"].values())
    assert found["flops_per_step"] == pytest.approx(4 * total)
    cost = found["cost"]
    assert cost["gpu_hours"] == pytest.approx(2 * found["step"]["step"] * 4 / 3600)  # of two steps
    assert cost["usd"] == pytest.approx(2 * cost["gpu_hours"])
    assert "2407.21783" in found["assumed"]["mfu"]["source"]
    assert plan(tmp_path, *words) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    for words in ("FLOPs of a step", "Memory of a GPU", "Communication", "Weak scaling", "fits: ", "GPU-hours"):
        assert words in shown
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_ends_with_1_and_says_what_would(tmp_path, capsys, monkeypatch):
    from indiclip.planning import hardware

    table = hardware.table()
    smaller = {**table, "reserved_gb": {"default": 79.9995, "source": "a test"}}
    monkeypatch.setattr(hardware, "table", lambda: smaller)
    assert plan(tmp_path, "--gpus-per-node", "1") == 1
    shown = capsys.readouterr().out
    assert "does not fit: 80.0 of 80 GB with ddp" in shown
    assert "model.micro_batches: 2" in shown or "no single change" in shown


def test_a_step_on_this_processor(tmp_path, capsys):
    assert plan(tmp_path, "--gpu", "cpu", "--rate", "50", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gflops"] == 50
    products = (found["flops"] - found["attention_flops"]) / 50e9
    products += found["attention_flops"] / found["attention_gflops"] / 1e9
    pointwise = found["bytes"] / found["bandwidth_gbs"] / 1e9 + found["exponentials"] * found["exponential_ns"] * 1e-9
    assert found["seconds"] == pytest.approx(products + pointwise + found["operators"] * found["operator_us"] * 1e-6)


def test_the_sum_of_the_tpus(capsys):
    assert main(["plan", "--convert", "48", "tpuv4", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "6.67 days of NVIDIA H100 SXM5 80 GB at 1,979 TFLOPS (fp8, dense)" in shown
    assert "13.34 days of NVIDIA H100 SXM5 80 GB at 989 TFLOPS (bf16, dense)" in shown
    assert "pretrained" in shown
    assert main(["plan", "--convert", "1", "a100", "h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["converted"]["bf16"] == pytest.approx(312 / 989.4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h10"], "--gpu: found 'h10'; nearest is 'h100'; expected one of h100, h200, a100, l40s, cpu"),
        (["--nodes", "0"], "--nodes: found 0; expected 1 or more"),
        (["--mfu", "1.2"], "--mfu: found 1.2; expected above 0 to 1"),
        (["--price", "-1"], "--price: found -1.0; expected above 0"),
        (["--strategy", "fsd"], "--strategy: found 'fsd'; nearest is 'fsdp'; expected one of ddp, fsdp, hsdp"),
        (["--noodes", "3"], "--noodes: no such option; nearest is '--nodes'"),
        (["--trainer.precision", "64-true"], "trainer.precision: found '64-true'"),
        (
            ["--nodes", "3"],
            "batch_size 4 of task 'contrastive' is over all ranks and must be a multiple of the 24",
        ),
        (["--convert", "many", "tpuv4", "h100"], "--convert: found 'many'; expected a number of days"),
        (["--convert", "48", "tpu4", "h100"], "--convert: found 'tpu4'; nearest is 'tpuv4'"),
        (["--convert", "0", "tpuv4", "h100"], "--convert: found 0 days; expected more than 0"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, capsys):
    assert plan(tmp_path, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_config_without_a_batch_size_is_one_line(tmp_path, capsys):
    tree = config()
    del tree["data"]["train"][0]["batch_size"]
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(tree))
    assert main(["plan", "--config", str(tmp_path / "experiment.yaml")]) == 2
    error = capsys.readouterr().err
    assert "batch_size" in error
    assert error.count("\n") == 1
    assert main(["plan"]) == 2
    assert "--config: found none" in capsys.readouterr().err


def test_a_conversion_imports_nothing_heavy():
    code = (
        "import sys, atexit; from indiclip.cli import main; "
        "atexit.register(lambda: print([m for m in sys.modules if m in ('torch', 'lightning')])); "
        "main(['plan', '--convert', '48', 'tpuv4', 'h100'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_of_a_run_in_stages_the_last_is_counted(tmp_path, capsys):
    """Its images are the largest; the batch is the same."""
    words, found = ["--gpu", "h100", "--gpus-per-node", "2", "--json"], []
    for stages in ([], [{"until": 0.5, "max_tokens": 4}], [{"until": 3, "max_tokens": 4}]):
        assert plan(tmp_path, *words, data__train__0__stages=stages, trainer__max_steps=10) == 0
        found.append(json.loads(capsys.readouterr().out))
    batches = [plan["batches"]["contrastive"] for plan in found]
    assert [(batch["samples"], batch["image_tokens"]) for batch in batches] == [(4, 16)] * 3


def test_what_is_not_planned_is_said(tmp_path, capsys):
    words = ["--gpu", "h100", "--nodes", "1", "--gpus-per-node", "4"]
    faster = ["--model.float8", "rowwise", "--model.compile", "true", "--trainer.precision", "bf16-mixed"]
    for flags, expected in (([], 0), (faster, 2)):
        assert plan(tmp_path, *words, *flags) == 0
        assert capsys.readouterr().out.count("Left out, though it is faster with it: model.") == expected


@pytest.mark.slow
def test_phases_of_a_run_are_counted_one_by_one(tmp_path, capsys):
    """Of a source with a stage and a head that begins later: each phase is a run that has nothing else, by hand."""
    short = {"class_path": "indiclip.tokenizers.ByteTokenizer", "init_args": {"context_length": 8}}  # of all captions
    changes = {"model__encoder__text__tokenizer": short, "trainer__max_steps": 10}
    tree = config(**changes)
    tree["data"]["train"][0] |= {"stages": [{"until": 0.4, "max_tokens": 4}]}
    late = {"class_path": "heads.contrastive.Contrastive", "init_args": {"name": "late", "start": 0.7}}
    late["init_args"]["task"] = "contrastive"
    both = json.loads(json.dumps(tree))
    both["model"]["heads"].append(late)

    def planned(name, tree):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        assert (
            main(["plan", "--config", str(file), "--gpu", "h100", "--nodes", "1", "--gpus-per-node", "1", "--json"])
            == 0
        )
        return json.loads(capsys.readouterr().out)

    plan = planned("both", both)
    assert [(of["first_step"], of["steps"], of["heads"]) for of in plan["phases"]] == [
        (0, 4, ["contrastive"]),
        (4, 3, ["contrastive"]),
        (7, 3, ["contrastive", "late"]),
    ]
    small, large, alone = config(**changes), config(**changes), json.loads(json.dumps(both))
    small["data"]["train"][0]["max_tokens"] = 4
    del alone["data"]["train"][0]["stages"]
    alone["model"]["heads"][1]["init_args"]["start"] = 0
    expected = [planned(str(i), tree)["flops_per_step"] for i, tree in enumerate((small, large, alone))]
    assert [of["flops_per_step"] for of in plan["phases"]] == pytest.approx(expected)
    hours = [of["gpu_hours"] for of in plan["phases"]]
    assert plan["cost"]["gpu_hours"] == pytest.approx(sum(hours))
    words = ["--gpu", "h100", "--nodes", "1", "--gpus-per-node", "1"]
    assert main(["plan", "--config", str(tmp_path / "both.yaml"), *words]) == 0
    assert "Phases of the run" in capsys.readouterr().out
