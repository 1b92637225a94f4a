"""Every shipped experiment is fitted for two steps through the command, and leaves what a run must leave."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from experiments import config
from PIL import Image
from processes import as_ranks, in_processes

from indiclip.cli import lightning, main
from indiclip.evals import procedural
from indiclip.generated.mela import Mela
from indiclip.pretrained.weights import read_tensors
from indiclip.training.cli import run

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import cluster_embeddings  # noqa: E402
import train_tokenizer  # noqa: E402

EXPERIMENTS = sorted((ROOT / "conf").glob("*.yaml"))
LONG = ("cifar10", "cifar10_mobileclip", "few_tokens_b16", "real_small", "shards")
IN_STAGES = ("india_b16", "india_l14", "mini_clip")  # test_recipes.py fits them
NEEDS_DATA = {
    "cifar10": ["cifar10"],
    "cifar10_mobileclip": ["cifar10"],
    "pictograms": ["emoji_multilingual"],
    "real_small": ["coco", "counting", "emoji_multilingual"],
    "shards": ["coco", "emoji_multilingual"],
}
SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--data.num_workers", "0"]
BACKBONE = "--model.encoder.backbone.init_args"
TEXT = "--model.encoder.text.architecture"
SMALL = {  # what is meant for a GPU
    "shards": [
        *(f"{BACKBONE}.width", "64", f"{BACKBONE}.depth", "1", f"{BACKBONE}.num_heads", "1"),
        *(f"{TEXT}.num_hidden_layers", "1", f"{TEXT}.hidden_size", "24", f"{TEXT}.intermediate_size", "24"),
        *("--trainer.precision", "32-true", "--trainer.accelerator", "cpu"),
    ],
    "few_tokens_b16": [
        *(f"{BACKBONE}.width", "64", f"{BACKBONE}.depth", "1", f"{BACKBONE}.num_heads", "1"),
        *(f"{TEXT}.num_hidden_layers", "1", f"{TEXT}.hidden_size", "24", f"{TEXT}.intermediate_size", "24"),
        *("--trainer.precision", "32-true", "--trainer.accelerator", "cpu"),
    ],
}


def generated(folder):
    """What conf/few_tokens_b16.yaml reads, of scenes of a fair, by the commands it names."""
    scenes = Mela(160, 64, "single", seed=3)
    (folder / "images").mkdir(parents=True)
    lines = ["file,caption"]
    for i in range(len(scenes)):
        sample = scenes[i]
        Image.fromarray(sample["image"]).save(folder / "images" / f"{i}.png")
        lines.append(f"{i}.png,{sample['captions']['en'][0]}")
    (folder / "captions.csv").write_text("\n".join(lines))
    for name in ("train", "val"):
        words = [str(folder / "captions.csv"), "--images", str(folder / "images")]
        assert main(["shards", "pack", *words, "--out", str(folder / "captions"), "--name", name]) == 0
    shards = str(folder / "captions" / "train-*.tar")
    words = ["--config", str(ROOT / "conf" / "few_tokens_b16.yaml"), "--vocab-size", "300"]
    train_tokenizer.main([*words, "--out", str(folder / "tokenizer.json")])
    assert main(["embed", shards, "--model", "timm:vit_tiny_patch16_224", "--out", str(folder / "embeddings")]) == 0
    words = [str(folder / "embeddings"), "--clusters", "8", "--merge", "0.999", "--out", str(folder / "clusters.npy")]
    assert cluster_embeddings.main(words) == 0
    return folder


def packed(data_root, folder):
    """The shards that conf/shards.yaml reads, by the commands it names."""
    pictograms, photos = data_root / "emoji_multilingual", data_root / "coco"
    for name in ("train", "val"):
        words = [str(pictograms / "names.tsv"), "--images", str(pictograms / "images"), "--caption_column", "hi"]
        assert main(["shards", "pack", *words, "--out", str(folder / "captions"), "--name", name]) == 0
        words = [str(photos / "instances.json"), "--images", str(photos / "images")]
        assert main(["shards", "pack", *words, "--out", str(folder / "boxes"), "--name", name]) == 0
    return folder


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(file, id=file.stem, marks=pytest.mark.slow if file.stem in LONG else ())
        for file in EXPERIMENTS
        if file.stem not in IN_STAGES
    ],
)
def test_every_experiment_trains_and_reports(experiment, tmp_path, monkeypatch, request):
    if folders := NEEDS_DATA.get(experiment.stem):
        data_root = request.getfixturevalue("data_root")  # skips, saying why, where there is no data
        missing = [name for name in folders if not (data_root / name).is_dir()]
        if missing:
            pytest.skip(f"no {', '.join(missing)} in {data_root}")
        monkeypatch.setenv("INDICLIP_DATA", str(data_root))
    if experiment.stem in ("shards", "few_tokens_b16"):
        monkeypatch.setenv("INDICLIP_DATA", str(tmp_path / "data"))
        packed(data_root, tmp_path / "data") if experiment.stem == "shards" else generated(tmp_path / "data")
    page = experiment.read_text()
    for key, size in (("batch_tokens", 4096), ("batch_multiple", 4), ("batch_size", 4)):
        page = re.sub(rf"{key}: \d+", f"{key}: {size}", page)
    (tmp_path / "data").mkdir(exist_ok=True)
    experiment = tmp_path / "data" / experiment.name
    experiment.write_text(page)
    flags = ["--runs", str(tmp_path), *SHORT, *SMALL.get(experiment.stem, [])]
    assert run(["fit", "--config", str(experiment), *flags]) == 0
    folder = tmp_path / experiment.stem
    config = yaml.safe_load(experiment.read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["step"] == 2
    for head in config["model"]["heads"]:
        name = head["class_path"].split(".")[1]
        assert any(key.startswith(f"val/{name}/") for key in metrics["metrics"]), f"{name} has no held-out metric"
        assert any(key.startswith(f"train/{name}/") for key in metrics["metrics"])
    report = (folder / "report.html").read_text()
    assert "data:image/webp;base64," in report
    assert "http://" not in report
    assert "https://" not in report  # one page, nothing fetched
    assert (folder / "config.yaml").is_file()
    assert list(folder.glob("events.out.tfevents*"))
    last = folder / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    if experiment.stem in ("quickstart", "depth"):  # the others' heads are among theirs
        flags = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(last)]
        flags += [f"--trainer.limit_{of}_batches=1" for of in ("val", "test", "predict")]
        for command in ("validate", "test", "predict"):
            assert run([command, *flags]) == 0
        assert list((folder / "predictions" / "images").glob("*/*.json"))
        assert all((folder / command / "report.html").is_file() for command in ("validate", "test"))
    assert [path.name for path in tmp_path.iterdir() if path.name != "data"] == [experiment.stem]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_opens_with_what_it_does_and_its_command(experiment):
    opening = [line for line in experiment.read_text().splitlines() if line.startswith("#")]
    assert any(f"indiclip fit --config conf/{experiment.name}" in line for line in opening)
    assert any(line.startswith(("# Expect:", "# Score:")) for line in opening)


def test_hard_scenes_take_the_place_of_the_held_out_ones(capsys):
    assert {file.stem for file in (ROOT / "conf" / "evals").glob("*.yaml")} == {"india", "mela_hard"}
    base, part = ROOT / "conf" / "mela.yaml", ROOT / "conf" / "evals" / "mela_hard.yaml"
    with pytest.raises(SystemExit, match="0"):
        run(["fit", "--config", str(base), "--config", str(part), "--print_config"])
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    settings = {split: [source["dataset"]["init_args"] for source in data[split]] for split in ("train", "val")}
    assert [one["difficulty"] for one in settings["train"]] == ["normal", "normal"]
    assert [one["difficulty"] for one in settings["val"]] == ["hard", "hard"]
    # The same fair otherwise, which training has not seen.
    own = [source["dataset"]["init_args"] for source in yaml.safe_load(base.read_text())["data"]["val"]]
    for hard, normal in zip(settings["val"], own, strict=True):
        assert {key: hard[key] for key in ("size", "layout", "languages", "seed")} == {
            key: normal[key] for key in ("size", "layout", "languages", "seed")
        }


@pytest.mark.parametrize("part", sorted((ROOT / "conf" / "heads").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_head_is_added_by_a_second_config(part, capsys):
    """The stacked head stands behind the first config's, with the part's own settings."""
    base = ROOT / "conf" / "cifar10.yaml"
    with pytest.raises(SystemExit, match="0"):
        run(["fit", "--config", str(base), "--config", str(part), "--print_config"])
    heads = yaml.safe_load(capsys.readouterr().out)["model"]["heads"]
    (added,) = yaml.safe_load(part.read_text())["model"]["heads+"]
    assert [head["class_path"] for head in heads] == ["heads.contrastive.Contrastive", added["class_path"]]
    assert added["init_args"].items() <= heads[1]["init_args"].items()


def test_a_benchmark_is_added_by_a_second_config(tmp_path, monkeypatch):
    """On what is generated, here a few images; the numbers are in the run's metrics."""
    part = ROOT / "conf" / "evals" / "india.yaml"
    assert f"--config conf/evals/{part.name}" in part.read_text()
    monkeypatch.delenv("INDICLIP_BENCH", raising=False)
    for name in ("WORDS", "SWATCHES"):
        monkeypatch.setattr(procedural, name, {"test": 2, "train": 2})
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(config()))
    assert run(["fit", "--config", str(base), "--config", str(part), "--runs", str(tmp_path), *SHORT]) == 0
    metrics = json.loads((tmp_path / "base" / "metrics.json").read_text())["metrics"]
    assert "eval/india/indian_colours_procedural/hi/acc1" in metrics
    assert json.loads((tmp_path / "base" / "bench" / "metrics.json").read_text())["about"]["step"] == 2


CLUSTERS = sorted((ROOT / "conf" / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("part", CLUSTERS, ids=lambda path: path.stem)
def test_a_cluster_is_added_by_a_second_config(part, tmp_path):
    """Here of two processes on the CPU; the elastic one finds their number by itself."""
    assert f"--config conf/cluster/{part.name}" in part.read_text()
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(config()))
    here = ["--trainer.accelerator", "cpu"]
    if part.stem != "elastic":
        here += ["--trainer.devices", "2", "--trainer.num_nodes", "1"]
    words = ["fit", "--config", str(base), "--config", str(part), "--runs", str(tmp_path), *SHORT, *here]
    done = as_ranks(lambda: run(words), tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_tensors(tmp_path / "base" / "checkpoints" / "last.ckpt")["global_step"] == 2


@pytest.mark.slow
def test_a_cluster_is_planned_by_the_same_words(tmp_path):
    """In another process: one that has counted on a GPU's tensors cannot fork those that train."""
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(config(data__train__0__batch_size=16)))
    strategies = ("hsdp", "fsdp")
    words = [["plan", "--config", str(base), "--config", f"cluster/nodes_{strategy}"] for strategy in strategies]
    done = in_processes([lambda: max(map(main, words))], tmp_path)
    assert done.returncode == 0, done.stderr
    for strategy in strategies:
        assert f"2 x 8 NVIDIA H100 SXM5 80 GB, {strategy}, bf16-mixed: 989 TFLOPS" in done.stdout
        assert f"GB with {strategy}\n" in done.stdout


@pytest.mark.parametrize(
    ("name", "nodes", "devices", "strategy"),
    [("one_gpu", 1, 1, "auto"), ("node_8", 1, 8, "ddp"), ("nodes_ddp", 2, 8, "ddp"), ("elastic", 3, 4, "ddp")],
)
def test_a_cluster_is_added_to_lightning_fit(name, nodes, devices, strategy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")  # of torchrun, which only the elastic one reads
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(config()))
    words = ["--config", str(base), "--config", f"cluster/{name}", "--print_config"]
    monkeypatch.setattr(sys, "argv", ["lightning", "fit", *words])
    with pytest.raises(SystemExit, match="0"):
        lightning()
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert (int(trainer["num_nodes"]), int(trainer["devices"])) == (nodes, devices)
    assert (trainer["accelerator"], trainer["strategy"], trainer["precision"]) == ("gpu", strategy, "bf16-mixed")


def test_the_batch_script_is_for_slurm(tmp_path):
    """Options where sbatch reads them, before the first command; the words of the run behind those of the cluster.

    `python tools/try_slurm.py` runs it on a real SLURM.
    """
    script = ROOT / "tools" / "slurm" / "train.sbatch"
    lines = script.read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert max(options) < min(commands)
    for name, content in {"srun": 'printf "%s\\n" "$@"\nenv', "scontrol": "printf 'gpu7\\ngpu9\\n'"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"JOB_ID": "41234", "JOB_NODELIST": "gpu[7,9]", "NNODES": "2", "NTASKS": "16", "CPUS_PER_TASK": "12"}
    environment = {f"SLURM_{name}": value for name, value in variables.items()}
    environment |= {"PATH": f"{tmp_path}:{os.defpath}", "SLURM_TMPDIR": "/scratch/41234"}
    words = ["bash", str(script), "--config", "a b.yaml", "--name", "x"]
    shown = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    begin = shown.index("indiclip")
    ours = ["--trainer.num_nodes", "2", "--trainer.devices", "8", "--ckpt_path", "last"]
    assert shown[begin : begin + 12] == ["indiclip", "fit", "--config", "a b.yaml", "--name", "x", *ours]
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=12", "MASTER_ADDR=gpu7", "MASTER_PORT=11234"} <= set(shown)
    (cache,) = [line for line in shown if line.startswith("INDICLIP_CACHE=")]
    assert cache.startswith("INDICLIP_CACHE=/scratch/41234/indiclip-")
