"""The recipes for GPUs and clusters, each fitted through all its stages on generated data in their layout."""

import io
import json
import re

import pytest
import yaml
from PIL import Image
from recipe_data import ROOT, india, train_tokenizer
from test_img2dataset import write
from test_methods import check_killed

from indiclip.generated.mela import Mela
from indiclip.module import MultiTask
from indiclip.training.cli import run
from indiclip.training.record import read_history

BACKBONE = "--model.encoder.backbone.init_args"
TEXT = "--model.encoder.text.architecture"
TINY = [
    *(f"{BACKBONE}.width", "32", f"{BACKBONE}.depth", "1", f"{BACKBONE}.num_heads", "1"),
    *(f"{TEXT}.num_hidden_layers", "1", f"{TEXT}.hidden_size", "24", f"{TEXT}.intermediate_size", "24"),
    *("--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--data.num_workers", "0"),
    *("--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1"),
]
EACH_STEP = "indiclip.training.fault_tolerance.checkpoints.Checkpoints"
BATCHES = {16384: 8, 4096: 4, 2048: 3, 1024: 4, 512: 4, 128: 4, 64: 3, 32: 2}  # in place of the page's
NUMBERS = {"depth": 1, "channels": 8, "num_convs": 1, "out_channels": 8, "num_prototypes": 16, "count": 2}
SMALLER = {
    "weight: 0.995": "weight: 0.5", "weight: 0.005": "weight: 0.5", "weight: 0.125": "weight: 0.5",
    "weight: 0.875": "weight: 0.5", "fraction: 0.005": "fraction: 0.1",
}  # fmt: skip


def shrunk(name, folder):
    """A page with small batches, heads and generated images; its stages, shares and sizes in tokens stay."""
    page = (ROOT / "conf" / f"{name}.yaml").read_text()
    page = re.sub(r"batch_size: (\d+)", lambda found: f"batch_size: {BATCHES[int(found[1])]}", page)
    for key, value in NUMBERS.items():
        page = re.sub(rf"\b{key}: \d+", f"{key}: {value}", page)
    for old, new in SMALLER.items():
        page = page.replace(old, new)
    page = re.sub(r"size: \[3\d\d, 3\d\d\]", "size: [96, 96]", page)  # of the generated scenes to count in
    file = folder / "page" / f"{name}.yaml"
    file.parent.mkdir()
    file.write_text(page)
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return india(tmp_path_factory.mktemp("india") / "data")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens", "last"), [("india_b16", (49, 196, 36), 4), ("india_l14", (64, 256, 49), 3)])
def test_every_stage_of_a_recipe_trains(name, tokens, last, data, tmp_path, monkeypatch):
    """Ten steps: six on few tokens, two at the full size and with body surfaces, two of self-distillation too; the
    shares are the page's own."""
    monkeypatch.setenv("INDICLIP_DATA", str(data))
    seen, training_step = [], MultiTask.training_step

    def spy(self, batches, step):
        sizes = {task: len(batch["keys"]) for task, batch in batches.items()}
        images = {"": batches["contrastive"]["images"], **batches["contrastive"].get("views", {})}
        seen.append((sizes, {name: one["patches_BNP"].shape[1] for name, one in images.items()}))
        return training_step(self, batches, step)

    monkeypatch.setattr(MultiTask, "training_step", spy)
    page = shrunk(name, tmp_path)
    flags = ["--runs", str(tmp_path), "--trainer.max_steps", "10", "--model.warmup_steps", "2"]
    assert run(["fit", "--config", str(page), *TINY, *flags]) == 0
    small, large, local = tokens
    first = ({"contrastive": 8, "detection": 2, "densepose": 2, "counting": 2}, {"": small})
    sizes = {"contrastive": 4, "detection": 4, "densepose": 2, "counting": 3}
    second = (sizes, {"": large})
    third = (sizes | {"contrastive": last}, {"": large, "global": large, "local": local})
    assert seen == [first] * 6 + [second] * 2 + [third] * 2
    history = [row for row in read_history(tmp_path / name) if "train/loss" in row]
    of_heads = [{key.split("/")[1] for key in row if key.startswith("train/")} - {"loss"} for row in history]
    always = {"contrastive", "captioning", "detection", "counting"}
    everything = always | {"densepose", "self_distillation"}
    assert of_heads == [always] * 6 + [always | {"densepose"}] * 2 + [everything] * 2
    assert all(row["train/captioning/refer"] > 0 for row in history)  # boxes as text, from the first step
    metrics = json.loads((tmp_path / name / "metrics.json").read_text())["metrics"]
    assert {key.split("/")[1] for key in metrics if key.startswith("val/")} == everything
    assert len({key for key in metrics if key.startswith("val/contrastive/image_to_text_r1/")}) == 13


@pytest.mark.slow
def test_a_recipe_that_is_killed_where_its_stages_end_goes_on_bit_by_bit(data, tmp_path, monkeypatch):
    """At both borders, and inside the last stage; whatever it trains is in the last one."""
    monkeypatch.setenv("INDICLIP_DATA", str(data))
    words = ["fit", "--config", str(shrunk("india_b16", tmp_path)), *TINY, "--trainer.limit_val_batches", "0"]
    words += ["--trainer.max_steps", "10", "--model.warmup_steps", "2", "--trainer.callbacks+", EACH_STEP]
    words += ["--trainer.callbacks.every_n_train_steps", "1", "--trainer.callbacks.filename", "each-{step}"]
    check_killed(words, tmp_path, last=10, steps=(6, 8, 9))


@pytest.mark.parametrize("name", ["india_b16", "india_l14"])
def test_batches_of_a_recipe_are_for_four_nodes(name):
    """Of eight GPUs: each batch divides by 32, in each stage."""
    page = (ROOT / "conf" / f"{name}.yaml").read_text()
    sizes = [int(size) for size in re.findall(r"batch_size: (\d+)", page)]
    assert len(sizes) > 8
    assert not [size for size in sizes if size % 32]


def pairs(folder):
    """What conf/mini_clip.yaml reads: two shards with what fails and what repeats; folders of CIFAR-10 and ImageNet."""
    scenes = Mela(60, 64, "single", seed=5)

    def jpeg(number):
        file = io.BytesIO()
        Image.fromarray(scenes[number]["image"]).save(file, "JPEG")
        return file.getvalue()

    rows = [("success", number, scenes[number]["captions"]["en"][0]) for number in range(len(scenes))]
    rows[5:5] = [("failed_to_download", "HTTP Error 404", "gone"), ("failed_to_resize", "cannot decode", "broken")]
    rows[20:20] = [("success", 3, "a kite again"), ("success", 4, "a drum again"), ("success", 5, "a lamp again")]
    (folder / "pairs").mkdir(parents=True)
    for shard in range(2):
        write(folder / "pairs", shard, rows[shard * 35 : (shard + 1) * 35], draw=jpeg)
    card = yaml.safe_load((ROOT / "indiclip" / "evals" / "world" / "cifar10.yaml").read_text())
    for number, one in enumerate(card["classes"]):
        of_class = folder / "bench" / "cifar10" / one["id"]
        of_class.mkdir(parents=True)
        Image.fromarray(scenes[number]["image"]).resize((32, 32)).save(of_class / "0.png")
    for number, synset in enumerate(("n01440764", "n02123045", "n03028079")):
        of_class = folder / "bench" / "imagenet1k" / "val" / synset
        of_class.mkdir(parents=True)
        Image.fromarray(scenes[number]["image"]).save(of_class / f"ILSVRC2012_val_0000000{number}.JPEG")


@pytest.mark.slow
def test_mini_clip_trains_on_what_img2dataset_wrote(tmp_path, monkeypatch):
    """Two steps: the commands of the page, rows that failed or repeat a picture counted, zero-shot logged."""
    monkeypatch.setenv("INDICLIP_DATA", str(tmp_path / "data"))
    pairs(tmp_path / "data")
    page = shrunk("mini_clip", tmp_path)
    words = ["--config", str(page), "--vocab-size", "300", "--out", str(tmp_path / "data" / "tokenizer.json")]
    train_tokenizer.main(words)
    flags = ["--runs", str(tmp_path), "--trainer.max_steps", "2"]
    assert run(["fit", "--config", str(page), *TINY, *flags, "--trainer.callbacks.num_workers", "0"]) == 0
    record = json.loads((tmp_path / "mini_clip" / "metrics.json").read_text())
    rows = record["data"]["data.train[0]"]["rows"]
    left_out = {reason: found["count"] for reason, found in rows["left_out"].items()}
    counted = {"failed to download": 1, "failed to resize": 1, "whose picture was there before": 3}
    assert counted.items() <= left_out.items()
    assert rows["present"] == 65
    assert {"eval/world/cifar10/en/acc1", "eval/world/imagenet1k/en/acc1"} <= record["metrics"].keys()
    assert "val/contrastive/image_to_text_r1" in record["metrics"]
