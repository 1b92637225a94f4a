"""Heads and sources are compared before training, and prediction needs less; through the command."""

import importlib
import json

import pytest
import torch
from experiments import config, fit
from helpers import tiny_encoder
from PIL import Image
from torchvision.transforms import v2

from heads.captioning import Captioning
from heads.contrastive import Contrastive
from heads.counting import Counting
from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.module import MultiTask
from indiclip.tasks.patch_codebook import Codebook
from indiclip.training.checks import check
from indiclip.training.cli import run
from indiclip.types import FIELDS

COUNTING = {"class_path": "heads.counting.Counting", "init_args": {"channels": 8}}
DETECTION = {"class_path": "heads.detection.Detection"}
DETECTION |= {"init_args": {"num_classes": 3, "out_channels": 8, "num_convs": 1, "scales": [1.0]}}


def source(folder, task, kind, file, content, **options):
    """A source of images of 32 pixels and one annotation file."""
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), "orange").save(folder / f"{name}.png")
    (folder / file).write_text(json.dumps(content))
    arguments = {"images": str(folder), "annotations": str(folder / file)} | options
    return {"task": task, "dataset": {"class_path": kind, "init_args": arguments}, "batch_size": 2, "max_tokens": 16}


def test_what_is_held_out_for_counting_may_be_of_other_classes(tmp_path):
    """As in FSC-147's own splits: a text names the class."""
    tree, kind = config(), "indiclip.datasets.points.CountingPoints"
    tree["model"]["heads"] = [COUNTING]
    for part, name in (("train", "kite"), ("val", "diya")):
        entries = [{"file_name": f"{f}.png", "class_name": name, "count": 1, "points": [[3, 4]]} for f in "ab"]
        tree["data"][part] = [source(tmp_path, "counting", kind, f"{part}.json", entries)]
    assert fit(tmp_path, tree) == 0
    assert "val/counting/mae" in json.loads((tmp_path / "runs/experiment/metrics.json").read_text())["metrics"]


def test_images_without_any_truth_can_be_predicted(tmp_path, capsys):
    """By the heads that need none; to be scored they are refused."""
    tree, content = config(), {"images": [], "annotations": [], "categories": []}
    content["images"] = [{"id": i, "file_name": f"{f}.png", "height": 32, "width": 32} for i, f in enumerate("ab")]
    for part in ("train", "val"):
        tree["data"][part].append(json.loads(json.dumps(tree["data"][part][0])) | {"task": "detection"})
    tree["model"]["heads"].append(json.loads(json.dumps(DETECTION).replace("3", "17")))
    assert fit(tmp_path, tree) == 0
    kind, folder = "indiclip.datasets.coco.CocoDetection", tmp_path / "runs" / "experiment"
    bare = [source(tmp_path, task, kind, "bare.json", content) for task in ("contrastive", "detection")]
    file = tmp_path / "bare.yaml"
    file.write_text(json.dumps(tree | {"data": tree["data"] | {"val": bare}}))
    flags = ["--config", str(file), "--runs", str(tmp_path / "runs")]
    flags += ["--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    assert run(["validate", *flags]) == 2
    assert "contrastive needs caption, which the samples of CocoDetection do not have" in capsys.readouterr().err
    assert run(["predict", *flags]) == 0
    for name, expected in (("contrastive", {"nearest", "embedding"}), ("detection", {"detections"})):
        files = sorted((tmp_path / "runs").rglob(f"predictions/images/{name}/*.json"))
        assert [json.loads(file.read_text())["heads"][name].keys() for file in files] == [expected] * 2


@pytest.mark.parametrize("regions", [False, True])
def test_training_samples_have_boxes_and_the_like_where_a_head_of_their_task_reads_them(regions):
    """The image is the same without; held-out samples stay whole, for who draws them."""
    flip, rotate = v2.RandomHorizontalFlip(), v2.RandomRotation(30)
    train, val = (
        [Source(task, Mela(8, 32, people=1.0, depth=True, seed=seed), 2, max_tokens=16, augment=[flip, rotate])
         for task in tasks]
        for seed, tasks in ((0, ["contrastive", "scenes"]), (1, ["contrastive"]))
    )  # fmt: skip
    data = MultiTaskData(train, val, patch_size=8, steps_per_epoch=2)
    heads = [Contrastive(), Captioning(task="contrastive", regions=regions), Counting(task="scenes", channels=8)]
    whole = data.steps(data.train, train=True)[1]
    check(MultiTask(tiny_encoder(), heads), data, "fit")
    found = data.steps(data.train, train=True)[1]
    objects = {name for name in FIELDS if name.startswith(("boxes", "classes", "crowd", "points", "depth", "dp_"))}
    assert objects <= whole["contrastive"]["targets"].keys()
    left_out = set() if regions else objects
    assert whole["contrastive"]["targets"].keys() - found["contrastive"]["targets"].keys() == left_out
    assert torch.equal(whole["contrastive"]["images"]["patches_BNP"], found["contrastive"]["images"]["patches_BNP"])
    assert objects <= found["scenes"]["targets"].keys()
    assert objects <= data.steps(data.val, train=False)[0]["contrastive"]["targets"].keys()


class Unboxed(Mela):
    """As photos with a label, such as CIFAR-10's."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {name: value for name, value in sample.items() if name in ("key", "image", "captions", "label")}


def test_boxes_to_learn_from_are_in_one_training_source_at_least():
    model = MultiTask(tiny_encoder(), [Contrastive(), Captioning(task="contrastive", regions=True)])
    sources = [Source("contrastive", dataset(8, 32, "single"), 2, max_tokens=16) for dataset in (Unboxed, Mela)]
    check(model, MultiTaskData(sources, sources[:1], patch_size=8), "fit")
    words = (
        r"heads\.captioning\.regions: needs boxes, but the first samples of data\.train\[0\] have none; expected false"
    )
    with pytest.raises(ValueError, match=words):
        check(model, MultiTaskData(sources[:1], sources[1:], patch_size=8), "fit")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("fine", ""),
        ("none", "TypeError: unsupported operand type(s) for |: 'dict' and 'NoneType'"),
        ("error", "KeyError: 'captoin' (while reading contrastive sample own-0) (INDICLIP_TRACEBACK=1 shows where)"),
        ("tensor", "image of sample 'own-0': found torch.float32 torch.Size([3, 32, 32]); expected an EncodedImage or"),
        ("text", "caption of sample 'own-0': found 5; expected str"),
        ("texts", "captions of sample 'own-0': found {'en': 'grey'}; expected lists of texts by language"),
        ("list", "captions of sample 'own-0': found ['grey']; expected lists of texts by language"),
    ],
)
def test_a_dataset_of_ones_own_needs_no_key_in_its_samples_and_is_named_where_it_fails(kind, message, tmp_path, capsys):
    tree = config(data__train__0__dataset={"class_path": "trouble_reading.Own", "init_args": {"kind": kind}})
    assert fit(tmp_path, tree) == (2 if message else 0)
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == bool(message)
    assert all(f"data.train[0]: {message}" in line for line in errors), errors


@pytest.mark.parametrize("name", ["", "first"])
def test_two_held_out_sources_of_a_task_have_scores_of_their_own(tmp_path, name):
    """In metrics.json, in the report, and for a checkpoint's monitor."""
    tree = config()
    monitor = f"val/contrastive/{name or 0}/zero_shot"
    best = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    best["init_args"] = {"monitor": monitor, "mode": "max", "filename": "best"}
    tree["trainer"]["callbacks"] = [best]
    tree["data"]["val"].append(json.loads(json.dumps(tree["data"]["val"][0])))
    tree["data"]["val"][1]["dataset"]["init_args"] |= {"seed": 5, "languages": ["en", "hi"]}
    tree["data"]["val"][1] |= {"batch_size": 3, "max_tokens": 9}  # they share nothing but the task
    tree["data"]["val"][0]["name"] = name
    assert fit(tmp_path, tree) == 0
    metrics = json.loads((tmp_path / "runs/experiment/metrics.json").read_text())["metrics"]
    assert {monitor, "val/contrastive/1/zero_shot", "val/contrastive/1/image_to_text_r1/hi"} <= metrics.keys()
    assert "val/contrastive/zero_shot" not in metrics
    report = (tmp_path / "runs/experiment/report.html").read_text()
    assert f"Image-text matching on {name or 'source 0'}" in report
    assert "Image-text matching on source 1 by language" in report
    assert (tmp_path / "runs/experiment/checkpoints/best.ckpt").is_file()


MASKED, DISTILLED = "masked_modelling.MaskedModelling", "self_distillation.SelfDistillation"


@pytest.mark.parametrize(
    ("head", "arguments", "idle"),
    [
        (
            MASKED,
            {"losses": {"mim": 1.0}, "text_ratio": 0.3, "depth": 1, "width": 64},
            ["width", "depth", "text_ratio"],
        ),
        (MASKED, {"losses": {"mlm": 1.0}, "image_ratio": 0.3, "targets": "teacher"}, ["image_ratio", "targets"]),
        (MASKED, {"losses": {"mim": 1.0}, "targets": "teacher", "codebook": {"size": 64}}, ["codebook"]),
        (MASKED, {"losses": {"mim": 1.0}, "teacher_decay": 0.9}, ["teacher_decay"]),
        (MASKED, {"text_ratio": 0.3, "image_ratio": 0.3, "depth": 1, "codebook": {"size": 64}}, []),
        (MASKED, {"losses": {"mim": 1.0}, "text_ratio": 0.15, "depth": 2}, []),
        (DISTILLED, {"ibot_weight": 0.0, "mask_ratio": [0.5, 0.5], "mask_kind": "random"}, ["mask_kind", "mask_ratio"]),
        (DISTILLED, {"mask_share": 0.0, "visible_weight": 1.0, "mask_kind": "random"}, ["mask_kind"]),
        (DISTILLED, {"mask_ratio": [0.5, 0.5]}, []),
        ("captioning.Captioning", {"num_bins": 100}, ["num_bins"]),
        ("captioning.Captioning", {"num_bins": 100, "regions": True}, []),
    ],
)
def test_options_without_effect_are_named(head, arguments, idle):
    """A default is none that was given: a run's own config has them all."""
    module, _, name = f"heads.{head}".rpartition(".")
    arguments = {key: Codebook(**value) if key == "codebook" else value for key, value in arguments.items()}
    assert list(getattr(importlib.import_module(module), name)(**arguments).idle_options) == idle


def test_a_run_says_which_option_has_no_effect(tmp_path, capsys):
    tree = config()
    tree["model"]["heads"].append({"class_path": f"heads.{MASKED}", "init_args": {"task": "contrastive"}})
    tree["model"]["heads"][-1]["init_args"] |= {"losses": {"mim": 1.0}, "text_ratio": 0.3, "width": 64}
    with pytest.warns(UserWarning, match="^heads.masked_modelling: no effect of width, text_ratio with losses mim$"):
        assert fit(tmp_path, tree, "--trainer.fast_dev_run", "true") == 0
