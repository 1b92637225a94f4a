"""Configs and checkpoints of commit 67a1ab8 go on working under today's names."""

import importlib
import importlib.util
import json
import re
import warnings

import pytest
import torch
import yaml
from experiments import config, fit

import indiclip
from indiclip import old_names
from indiclip.training.cli import run

# Dotted names of that commit that YAMLs, checkpoints and messages could hold.
OLD = {
    "indiclip.backbone.FixedSize": "indiclip.timm_backbone.TimmBackbone",
    "indiclip.callbacks.TaskGradients": "indiclip.training.callbacks.TaskGradients",
    "indiclip.data.captions.CaptionTable": "indiclip.datasets.captions.CaptionTable",
    "indiclip.data.coco.CocoDetection": "indiclip.datasets.coco.CocoDetection",
    "indiclip.data.points.CountingPoints": "indiclip.datasets.points.CountingPoints",
    "indiclip.data.split.Split": "indiclip.datasets.split.Split",
    "indiclip.data.mela.Mela": "indiclip.generated.mela.Mela",
    "indiclip.data.module.MultiTaskData": "indiclip.loading.data_module.MultiTaskData",
    "indiclip.data.shards.Shards": "indiclip.webdataset.shards.Shards",
    "indiclip.data.box_shards.BoxShards": "indiclip.webdataset.box_shards.BoxShards",
    "indiclip.evals.callback.IndiaBench": "indiclip.training.india_bench.IndiaBench",
    "indiclip.record.RunRecord": "indiclip.training.record.RunRecord",
    "indiclip.survival.checkpoints.Checkpoints": "indiclip.training.fault_tolerance.checkpoints.Checkpoints",
    "indiclip.survival.owed_validation.OwedValidation": (
        "indiclip.training.fault_tolerance.resume_validation.ResumeValidation"
    ),
    "indiclip.survival.vote.StepVote": "indiclip.training.fault_tolerance.step_sync.StepSync",
}


NAFLEX = {"size": None, "width": None, "depth": None, "num_heads": None, "patch_size": 16, "pretrained": False}
NAFLEX |= {"max_tokens": 64, "options": None}
TIMM = {"name": "test_vit", "canvas_hw": [64, 64], "patch_size": 16, "pretrained": False, "feature_index": -1}
TIMM |= {"options": None}


@pytest.mark.parametrize("old", OLD)
def test_old_class_paths_lead_to_classes(old):
    assert old_names.translated(old) == OLD[old]
    module, _, name = OLD[old].rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize("path", old_names._MOVED.values())
def test_moved_classes_are_there(path):
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name).__module__ == module


def test_every_module_of_the_table_is_there():
    assert [name for name in old_names.MODULES.values() if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("name", ["indiclip.backbone.NaFlexViT", "torch.optim.AdamW", "a photo of indiclip.data", ""])
def test_other_strings_stay(name):
    assert old_names.translated(name) == name


def as_of_67a1ab8(tree):
    """A config of today in the names of then, where they are other ones."""
    text = json.dumps(tree)
    for old, new in OLD.items():
        text = text.replace(f'"{new}"', f'"{old}"')
    return json.loads(text)


def old_checkpoint(new):
    """What that commit would have saved of the same run: other names, and an optimizer without them."""
    old = torch.load(new, weights_only=True)
    old["state_dict"] = {
        name.replace(".film.", ".modulate.").replace(".towers.ltrb.", ".towers.sides."): weight
        for name, weight in old["state_dict"].items()
    }
    old["encoder"] = as_of_67a1ab8(old["encoder"])
    del old["encoder"]["backbone"]["init_args"]["interpolation"]
    old["callbacks"]["OwedValidation"] = {"owed": old["callbacks"].pop("ResumeValidation")["due"]}
    for group in old["optimizer_states"][0]["param_groups"]:
        for name in ("param_names", "lr_scale", "use_fallback"):
            group.pop(name, None)
    return old


def test_an_old_run_goes_on_exactly_and_its_encoder_is_the_same(tmp_path):
    """The dictionary imitates one that the old code wrote; runs of the old code itself went on as exactly."""
    heads = [
        {"class_path": "heads.contrastive.Contrastive"},
        {
            "class_path": "heads.detection.Detection",
            "init_args": {"num_classes": 17, "out_channels": 16, "num_convs": 1, "scales": [1.0]},
        },
        {"class_path": "heads.counting.Counting", "init_args": {"channels": 8, "ask_boxes": True}},
    ]
    for head in heads[1:]:
        head["init_args"]["task"] = "contrastive"
    backbone = {"name": "convnext_atto", "canvas_hw": [64, 64], "patch_size": 8, "interpolation": "bilinear"}
    backbone["options"] = {"depths": [1, 1, 1, 1], "dims": [16, 16, 24, 32]}
    tree = config(
        model__heads=heads,
        model__encoder__backbone={"class_path": "indiclip.timm_backbone.TimmBackbone", "init_args": backbone},
    )
    for part in ("train", "val"):
        tree["data"][part][0]["dataset"]["init_args"] |= {"layout": "mixed"}
        tree["data"][part][0]["group_by_length"] = True
    saves = {
        "class_path": "indiclip.training.fault_tolerance.checkpoints.Checkpoints",
        "init_args": {"every_n_train_steps": 1, "save_top_k": -1},
    }
    tree["trainer"] |= {"max_steps": 3, "callbacks": [saves]}
    assert fit(tmp_path, tree) == 0
    folder = tmp_path / "runs" / "experiment"
    expected = torch.load(folder / "checkpoints" / "3.ckpt", weights_only=True)["state_dict"]
    picture = torch.arange(3 * 40 * 48, dtype=torch.float).reshape(3, 40, 48).remainder(256).byte()
    embedding = indiclip.load(folder / "checkpoints" / "1.ckpt").embed_image(picture)

    old = tmp_path / "old" / "checkpoints"
    old.mkdir(parents=True)
    torch.save(old_checkpoint(folder / "checkpoints" / "1.ckpt"), old / "1.ckpt")
    then = as_of_67a1ab8(yaml.safe_load((folder / "config.yaml").read_text()))
    for name in ("optimizer", "lr_schedule", "layer_decay"):  # keys that it did not have
        del then["model"][name]
    for part in ("train", "val"):
        del then["data"][part][0]["group_by_length"]
    del then["model"]["encoder"]["init_args"]["backbone"]["init_args"]["interpolation"]
    then["model"]["betas"] = [0.9, 0.98]
    (old.parent / "config.yaml").write_text(yaml.safe_dump(then))
    assert "indiclip.backbone.FixedSize" in (old.parent / "config.yaml").read_text()
    torch.testing.assert_close(indiclip.load(old / "1.ckpt").embed_image(picture), embedding, atol=0, rtol=0)
    assert run(["fit", "--config", str(old.parent / "config.yaml"), "--ckpt_path", str(old / "1.ckpt")]) == 0
    found = torch.load(old / "3.ckpt", weights_only=True)["state_dict"]
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_old_betas_become_the_optimizers():
    model = old_names.translate_config({"model": {"lr": 1.0, "betas": [0.9, 0.95]}})["model"]
    assert model["optimizer"]["init_args"]["betas"] == [0.9, 0.95]
    assert "betas" not in model
    assert old_names.translate_config({"model": {"betas": [0.9, 0.98]}}) == {"model": {}}


@pytest.mark.parametrize(
    ("kind", "arguments", "old"),
    [
        ("backbone.NaFlexViT", dict(name="test_vit", **NAFLEX), True),
        ("backbone.NaFlexViT", dict(name="test_vit", **NAFLEX, interpolation=None), False),  # of today
        ("backbone.NaFlexViT", {"name": "test_vit", "patch_size": 16}, False),  # a user's: the model's own
        ("backbone.NaFlexViT", dict(name=None, **NAFLEX), False),  # from scratch, it is bilinear anyway
        ("timm_backbone.TimmBackbone", TIMM, True),
        ("timm_backbone.TimmBackbone", {"name": "test_vit"}, False),
    ],
)
def test_a_named_backbone_of_an_old_run_stays_bilinear(kind, arguments, old):
    backbone = {"class_path": f"indiclip.{kind}", "init_args": arguments}
    for tree in ({"model": {"encoder": {"init_args": {"backbone": backbone}}}}, {"backbone": backbone}):
        found = old_names.translate_config(tree)
        made = found["backbone"] if "backbone" in found else found["model"]["encoder"]["init_args"]["backbone"]
        assert made["init_args"] == arguments | ({"interpolation": "bilinear"} if old else {})
        assert old_names.translate_config(found) == found
        assert (found == tree) is not old
    checkpoint = {"encoder": {"backbone": backbone}}
    old_names.translate_checkpoint(checkpoint)
    assert (checkpoint["encoder"]["backbone"]["init_args"].get("interpolation") == "bilinear") is old


def source(class_path, **options):
    return {"task": "detection", "dataset": {"class_path": class_path}, "batch_size": 2, **options}


@pytest.mark.parametrize(
    ("tree", "grouped"),
    [
        ({"data": {"train": [source("indiclip.data.coco.CocoDetection")]}}, True),
        ({"model": {"betas": [0.9, 0.98]}, "data": {"train": [source("my.Dataset")]}}, True),
        ({"model": {"x": {"class_path": "indiclip.backbone.FixedSize"}}, "data": {"train": [source("my.Own")]}}, True),
        ([source("indiclip.data.coco.CocoDetection")], True),  # `--data.train`
        ({"data": {"train": [source("indiclip.data.coco.CocoDetection", group_by_length=False)]}}, False),
        ({"data": {"train": [source("indiclip.datasets.coco.CocoDetection")]}}, None),
        ({"x": "indiclip.backbone.TimmBackbone", "data": {"train": [source("my.Own")]}}, None),  # moved later
    ],
)
def test_sources_of_an_old_config_make_batches_of_similar_length(tree, grouped):
    """As all did at that commit, so that a run which goes on sees the samples that it would have seen."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sources = old_names.translate_config(tree)
        again = old_names.translate_config(sources)
    assert again == sources
    (found,) = sources if isinstance(sources, list) else sources["data"]["train"]
    assert found.get("group_by_length") is grouped
    assert [str(warning.message).count("group_by_length: true") for warning in said] == [1] * bool(grouped)


def test_what_is_no_weight_any_more_is_dropped():
    """A step counter of DensePose, and the checksum of a teacher beside the student."""
    kept = "heads.distillation.teacher.encoder.logit_scale"
    names = ["heads.densepose.step", "heads.distillation.teacher.crc32", kept]
    checkpoint = {"state_dict": dict.fromkeys(names, torch.full((1,), 7)), "train_samples": {}}
    old_names.translate_checkpoint(checkpoint)
    assert list(checkpoint["state_dict"]) == [kept]
    assert checkpoint["train_samples"] == {"heads.distillation": {"crc32_of_teacher": 7}}  # still compared


def test_a_teacher_of_masked_images_has_its_backbone_under_a_name():
    names = {f"heads.vectors.images.{of}": torch.zeros(1) for of in ("teacher.vit.norm.weight", "hidden_patch_P")}
    checkpoint = {"state_dict": names}
    for _ in range(2):  # today's stay
        old_names.translate_checkpoint(checkpoint)
        found = [name.removeprefix("heads.vectors.images.") for name in checkpoint["state_dict"]]
        assert found == ["teacher.backbone.vit.norm.weight", "hidden_patch_P"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("indiclip.data.mela.Mella", "module 'indiclip.generated.mela' has no attribute 'Mella'; nearest is 'Mela'"),
        ("indiclip.data.mella.Mela", "No module named 'indiclip.data'.*; nearest is 'indiclip.generated.mela"),
    ],
)
def test_an_unknown_old_path_is_refused_with_the_nearest_of_today(path, message, tmp_path, capsys):
    tree = config()
    tree["data"]["train"][0]["dataset"]["class_path"] = path
    assert fit(tmp_path, tree) == 2
    assert re.search(message, capsys.readouterr().err)
