"""Every shipped experiment is fitted for two steps through the command, and leaves what a run must leave."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from indiclip.training import run

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "conf").glob("*.yaml"))
NEEDS_DATA = {"cifar10": ["cifar10"], "real_small": ["coco", "counting", "emoji_multilingual"]}
SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--data.num_workers", "0"]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_trains_and_reports(experiment, tmp_path, monkeypatch, request):
    if folders := NEEDS_DATA.get(experiment.stem):
        data_root = request.getfixturevalue("data_root")  # skips, saying why, where there is no data
        missing = [name for name in folders if not (data_root / name).is_dir()]
        if missing:
            pytest.skip(f"no {', '.join(missing)} in {data_root}")
        monkeypatch.setenv("INDICLIP_DATA", str(data_root))
    assert run(["fit", "--config", str(experiment), "--runs", str(tmp_path), *SHORT]) == 0
    folder = tmp_path / experiment.stem
    config = yaml.safe_load(experiment.read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["step"] == 2
    for head in config["model"]["heads"]:
        name = head["class_path"].split(".")[1]
        assert any(key.startswith(f"val/{name}/") for key in metrics["metrics"]), f"{name} has no held-out metric"
        assert any(key.startswith(f"train/{name}/") for key in metrics["metrics"])
    report = (folder / "report.html").read_text()
    assert "data:image/png;base64," in report
    assert "http://" not in report
    assert "https://" not in report  # one page, nothing fetched
    assert (folder / "config.yaml").is_file()
    assert list(folder.glob("events.out.tfevents*"))
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_opens_with_what_it_does_and_its_command(experiment):
    opening = [line for line in experiment.read_text().splitlines() if line.startswith("#")]
    assert any(f"indiclip fit --config conf/{experiment.name}" in line for line in opening)
    assert any(line.startswith(("# Expect:", "# Score:")) for line in opening)


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
