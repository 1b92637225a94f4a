"""`--to vitdet` against detectron2 itself, and from a run to a detector of it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from export_runs import filled, portable, runs, siglip_text, vit  # noqa: F401
from helpers import ARCHITECTURE, batch_images, noise
from omegaconf import OmegaConf
from test_torchvision_detector import coco

import indiclip
from indiclip.encoder import Encoder
from indiclip.export.exporter import Refused, export
from indiclip.export.source import Source, open_source
from indiclip.export.target import find_target
from indiclip.json_lines import read
from indiclip.pretrained.init_from import InitFrom
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import finetune_detectron2  # noqa: E402

needs_detectron2 = pytest.mark.skipif(
    find_spec("detectron2") is None, reason="detectron2 is not installed; README says how it is built"
)
LOSSLESS = ("portable", "quickstart")


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("vitdet")

    @cache
    def folder(run):
        export(open_source(runs[run], "auto", None), "vitdet", root / run)
        return root / run

    return folder


def proved(encoder, out, allow_loss=False):
    return export(Source(filled(encoder), "a run", "the weights", None), "vitdet", out, allow_loss)


def config_of(folder, name):
    from detectron2.config import LazyConfig

    return LazyConfig.load(str(folder / f"{name}.py"))


@needs_detectron2
@pytest.mark.parametrize("run", LOSSLESS)
def test_detectron2_gives_the_encoders_features(exported, run):
    record = json.loads((exported(run) / "parity.json").read_text())
    assert set(record["image"]) == {"own grid", "smaller", "larger", "not square", "mixed sizes, padded"}
    assert record["within_bound"]
    assert record["largest_difference"] <= record["bound"] == 1e-5
    assert record["padding"]["difference"] > 0.01  # images alone: what padding does to them is said
    assert any("lacks the final norm" in note for note in record["notes"])
    assert "library_name: detectron2" in (exported(run) / "README.md").read_text()


@needs_detectron2
def test_the_cards_lines_load_the_folder(exported, monkeypatch):
    monkeypatch.chdir(exported("portable").parent)
    card, found = Path("portable/README.md").read_text(), {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], found)
    tensors = torch.load("portable/model.pth", weights_only=True)["model"]
    own = found["model"].state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in tensors.items())


@needs_detectron2
@pytest.mark.parametrize(
    "options",
    [
        {"init_values": 0.1, "mlp_ratio": 2.7, "act_layer": "gelu_tanh", "qkv_bias": False, "norm_eps": 1e-5}
        | {"pos_embed_align_corners": True},
        {"act_layer": "quick_gelu", "pos_embed": "none", "proj_bias": False},
    ],
)
def test_other_vits_travel_too(tmp_path, options):
    assert proved(portable(**options), tmp_path / "out")["within_bound"]


@needs_detectron2
def test_patches_of_14_pixels_become_16_where_a_loss_is_allowed(tmp_path):
    encoder = Encoder(vit(14), siglip_text(), 32, [16])
    with pytest.raises(Refused, match="found 14; detectron2's strides are powers of two"):
        proved(encoder, tmp_path / "out")
    record = proved(encoder, tmp_path / "out", allow_loss=True)
    assert not record["within_bound"]
    assert record["image"]["own grid"]["features"]["cosine"] > 0.99  # of noise, which resampling blurs most
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vit"]["patch_size"] == 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_token": True}, "no place for embeds.cls_token"),
        ({"reg_tokens": 2}, "no place for embeds.reg_token"),
        ({"pre_norm": True}, "no place for norm_pre.weight"),
        ({"qk_norm": True}, "no place for blocks.0.attn.q_norm.weight"),
        ({"pos_embed": "factorized"}, "no place for embeds.pos_embed_y"),
        ({"rope_type": "axial"}, "no rotary positions"),
        ({"pos_embed_grid_size": [4, 6]}, "found [4, 6]; detectron2's is square"),
        ({"act_layer": "relu"}, "act_layer: found ReLU"),
        ({"act_layer": "relu", "pos_embed_ar_preserving": True}, "act_layer: found ReLU"),
        ({"swiglu_mlp": True, "act_layer": "silu"}, "no place for blocks.0.attn.q_bias"),
        ({"norm_layer": "rmsnorm"}, "norm: found RmsNorm"),
        ({"pos_embed_ar_preserving": True}, "detectron2 stretches positions"),
    ],
)
def test_what_detectron2_does_not_have_is_named(options, words):
    assert words in "; ".join(loss.reason for loss in find_target("vitdet").check(portable(**options)))


def test_a_run_with_a_class_token_is_refused_with_who_can_take_it(runs, tmp_path):  # noqa: F811
    with pytest.raises(Refused, match=r"embeds\.cls_token.*torchvision can take it"):
        export(open_source(runs["clip"], "auto", None), "vitdet", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_detectron2_it_says_so_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("indiclip.export.to_vitdet.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="--to vitdet: needs detectron2, which is built from its source"):
        proved(portable(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@needs_detectron2
@pytest.mark.parametrize("run", LOSSLESS)
def test_out_and_in_again_is_bit_equal(runs, exported, run):  # noqa: F811
    ours = indiclip.load(runs[run])
    width, text = ours.backbone.width, TextTower(ByteTokenizer(), ARCHITECTURE)
    theirs = Encoder(
        text=text, embed_dim=width, lengths=[width], init_from=[InitFrom(str(exported(run)), allow=["image_pool*"])]
    )
    own = {name: tensor for name, tensor in ours.backbone.state_dict().items() if "attn_pool" not in name}
    back = theirs.backbone.state_dict()
    assert own.keys() == back.keys()
    assert all(torch.equal(own[name], back[name]) for name in own)
    images = batch_images([noise(64, 48, 1), noise(32, 32, 2)], ours.backbone.patch_size, 64)
    with torch.no_grad():
        assert torch.equal(ours.features(images).tokens_BND, theirs.eval().features(images).tokens_BND)
    with pytest.raises(ValueError, match="is no dual encoder"):
        indiclip.load(exported(run))


@needs_detectron2
@pytest.mark.parametrize("run", LOSSLESS)
@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_mask_rcnn"])
def test_configurations_build_detectors_around_the_backbone(exported, run, name):
    """Maps of strides 4 to 64 whatever the patch size, a rate for each block, and all weights in their places."""
    from detectron2.config import instantiate

    config = config_of(exported(run), name)
    backbone = instantiate(config.model.backbone)
    with torch.device("meta"):  # nothing of them is read
        heads = instantiate(config.model.roi_heads)
    assert type(heads).__name__ == ("StandardROIHeads" if name == "mask_rcnn" else "CascadeROIHeads")
    assert heads.box_in_features == heads.mask_in_features == ["p2", "p3", "p4", "p5"]
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 64, 128))
    assert [tuple(each.shape[-2:]) for each in maps.values()] == [(64 // s, 128 // s) for s in (4, 8, 16, 32, 64)]
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 8, 16, 32, 64]
    tensors = torch.load(config.train.init_checkpoint, weights_only=True)["model"]
    own = {f"backbone.net.{name}": tensor.shape for name, tensor in backbone.net.state_dict().items()}
    assert own == {name: tensor.shape for name, tensor in tensors.items()}
    config.optimizer.params.model = torch.nn.ModuleDict({"backbone": backbone, "roi_heads": heads})
    groups = instantiate(config.optimizer).param_groups
    assert {round(group["lr"] / config.optimizer.lr, 3) for group in groups} == {0.512, 0.64, 0.8, 1.0}  # two blocks
    assert config.dataloader.train.mapper.image_format == config.model.input_format == "RGB"


@needs_detectron2
def test_denseposes_boxes_are_found_as_vitdets(exported):
    """The same pooler and layers; detectron2's defaults, which the settings stand on, are those of another head."""
    from detectron2.config import get_cfg, instantiate
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads import build_roi_heads

    heads = config_of(exported("portable"), "mask_rcnn").model.roi_heads
    import indiclip_vitdet

    settings = {name: value for name, value in indiclip_vitdet._DENSEPOSE.items() if "DENSEPOSE" not in name}
    cfg = get_cfg()
    cfg.merge_from_list([word for setting in settings.items() for word in setting])
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    shapes = {name: ShapeSpec(channels=256, stride=stride) for name, stride in indiclip_vitdet._STRIDES.items()}
    with torch.device("meta"):
        ours, vitdets = build_roi_heads(cfg, shapes), instantiate(heads)
    assert str(ours.box_pooler) == str(vitdets.box_pooler)
    assert str(ours.box_head) == str(vitdets.box_head)


@needs_detectron2
@pytest.mark.skipif(
    find_spec("densepose") is None or find_spec("av") is None,
    reason="detectron2's projects/DensePose is not on the path, or lacks av, opencv-python or scipy",
)
def test_densepose_is_built_with_the_weights(exported):
    from detectron2.config import instantiate

    model = instantiate(config_of(exported("portable"), "densepose_rcnn").model)
    assert type(model.roi_heads).__name__ == "DensePoseROIHeads"


@needs_detectron2
def test_densepose_waits_for_its_project_alone(exported):
    """Without it there is no way to build it, but nothing before it fails."""
    if find_spec("densepose"):
        pytest.skip("detectron2's projects/DensePose is on the path, and its own test runs")
    with pytest.raises(ModuleNotFoundError, match="densepose"):
        config_of(exported("portable"), "densepose_rcnn")


SHORT = "--image_size 64 --batch_size 2 --every 1 --max_steps 2 dataloader.train.num_workers=0"
SHORT += " dataloader.test.num_workers=0 model.roi_heads.batch_size_per_image=4"
SHORT += " model.proposal_generator.post_nms_topk=[8,4] model.roi_heads.box_head.conv_dims=[16]"


@needs_detectron2
def test_the_readmes_command_goes_from_a_run_to_a_detector(runs, tmp_path, capsys, monkeypatch):  # noqa: F811
    """In two steps, on boxes; again, there is nothing left to do, and a process of detectron2 alone opens it."""
    boxes_alone(tmp_path, 4)
    command = re.search(r"python tools/finetune_detectron2.py ((?:.*\\\n)*.*)", (ROOT / "README.md").read_text())[1]
    words = shlex.split(command.replace("\\\n", " "))
    words[words.index("--model") + 1] = runs["quickstart"]
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "vitdet"
    for _ in range(2):
        assert finetune_detectron2.main([*words, *SHORT.split()]) == 0
        scored = [row for row in read(run / "history.jsonl") if "val/mask_rcnn/ap" in row]
        assert [row["step"] for row in scored] == [1, 2]
    assert "mask_rcnn" in (run / "report.html").read_text()
    assert (
        json.loads((run / "metrics.json").read_text())["metrics"]["val/mask_rcnn/ap"] == scored[-1]["val/mask_rcnn/ap"]
    )
    said = capsys.readouterr().out
    assert "boxes alone, no masks: not every object of train.json and held_out.json has one" in said
    last = said.splitlines()[-1]
    assert last == f"runs/vitdet/config.yaml builds it with PYTHONPATH={Path('runs/vitdet/vitdet')}"
    environment = os.environ | {"PYTHONPATH": last.rpartition("=")[2]}
    subprocess.run([sys.executable, "-W", "ignore", "-c", OPENS], check=True, env=environment)


OPENS = """
import sys, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
model = instantiate(LazyConfig.load("runs/vitdet/config.yaml").model).eval()
DetectionCheckpointer(model).load("runs/vitdet/model_final.pth")
(found,) = model([{"image": torch.zeros(3, 48, 64, dtype=torch.uint8)}])
assert found["instances"].image_size == (48, 64)
assert not any(name.split(".")[0] == "indiclip" for name in sys.modules)
"""


@needs_detectron2
def test_a_run_is_stopped_anywhere_and_goes_on(exported, tmp_path, capsys, monkeypatch):
    """By Ctrl-C in the first evaluation, and in the second step while its checkpoint is written; then a full disk."""
    import _vitdet_training

    boxes_alone(tmp_path, 2)
    words = f"--model {exported('portable')} --train {tmp_path}/train.json --images {tmp_path}/photos"
    words = [*f"{words} --val {tmp_path}/held_out.json --runs {tmp_path}".split(), *SHORT.split(), "--max_steps", "3"]
    run, save = tmp_path / "vitdet", torch.save

    def interrupts(*_):
        raise KeyboardInterrupt

    def interrupted(data, file):
        save(data, file)
        os.kill(os.getpid(), signal.SIGINT)

    def full(data, file):
        file.write(b"some")
        raise RuntimeError("[enforce fail at inline_container.cc]")

    for place, name, replacement, status, line in (
        (_vitdet_training, "scores", interrupts, 130, "stopped at step 1; the same line goes on from {}1.pth, step 1"),
        (torch, "save", interrupted, 130, "stopped at step 2; the same line goes on from {}2.pth, step 2"),
        (torch, "save", full, 2, "{}3.pth: cannot be written; is the disk full?"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, replacement)
            assert main_status(words) == status
        expected = line.format(f"{run}/model_000000").replace("1.pth", "0.pth")
        expected = expected.replace("2.pth", "1.pth").replace("3.pth", "2.pth")  # detectron2 counts from 0
        assert capsys.readouterr().err.strip().splitlines()[-1].endswith(expected)
        assert not [*run.glob(".*.part")]
    assert main_status(words) == 0
    scored = [row["step"] for row in read(run / "history.jsonl") if "val/mask_rcnn/ap" in row]
    assert scored == [1, 2, 3]

    (run / finetune_detectron2.BEGUN).unlink()  # as of a run that is older than it: its weights' shapes are compared
    assert main_status([*words, "model.roi_heads.box_head.conv_dims=[8]"]) == 2
    assert "model_final.pth: is of another detector: " in capsys.readouterr().err


def main_status(words):
    try:
        return finetune_detectron2.main(words)
    except SystemExit as stop:
        return stop.code


def boxes_alone(folder, count):
    """COCO files without masks: to crop these, detectron2 needs shapely."""
    coco(folder, count)
    for name in ("train.json", "held_out.json"):
        content = json.loads((folder / name).read_text())
        for row in content["annotations"]:
            del row["segmentation"]
        (folder / name).write_text(json.dumps(content))


@needs_detectron2
def test_bad_data_and_options_are_one_line_before_anything(tmp_path, capsys):
    boxes_alone(tmp_path, 1)
    content = json.loads((tmp_path / "train.json").read_text())
    content["categories"][0]["name"] = "kite"
    (tmp_path / "other.json").write_text(json.dumps(content))
    (tmp_path / "list.json").write_text("[1]")
    words = f"--model random --images {tmp_path}/photos --runs {tmp_path}/runs"
    for train, val, said in (
        ("x.json", "train.json", "x.json: no such file or folder"),
        ("list.json", "train.json", "list.json: no list 'images'"),
        ("train.json", "other.json", "--val has 1, class 0 is 'thing' and 'kite'"),
        (f"train.json --val_images {tmp_path}", "train.json", "0.png"),
    ):
        with pytest.raises(SystemExit, match="2"):
            finetune_detectron2.main(f"{words} --train {tmp_path}/{train} --val {tmp_path}/{val}".split())
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not (tmp_path / "runs").exists()


@needs_detectron2
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("optimizer.lrr=3", r"optimizer.lrr=3: found no such KEY=VALUE .*; nearest is 'lr'"),
        ("=3", "=3: found no such KEY=VALUE"),
        ("=", "=: found no such KEY=VALUE"),
        ("optimizer.lr", "optimizer.lr: found no such KEY=VALUE"),
        ("~optimizer.lr=3", "~optimizer.lr=3: found no such KEY=VALUE"),
        ("+=3", r"\+=3: "),
        ("optimizer.lr=[1", r"optimizer.lr=\[1: "),
    ],
)
def test_a_wrong_setting_is_one_line(option, said):
    with pytest.raises(ValueError, match=said):
        finetune_detectron2.with_options(OmegaConf.create({"optimizer": {"lr": 1}}), [option])


def parsed(words):
    return finetune_detectron2.parse(words.split())[1]


GIVEN = "--model m --train t.json --images photos --val v.json"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"{GIVEN} --detector fcos", "--detector: invalid choice: 'fcos'"),
        (f"{GIVEN} a.b=1 --every 0 c=2", "--every: found '0'; expected a whole number from 1"),
        (f"{GIVEN} --max_steps 0", "--max_steps: found '0'"),
        (f"{GIVEN} --image_size -3", "--image_size: found '-3'"),
        ("--model m", "the following arguments are required: --train"),
    ],
)
def test_wrong_words_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_run_belongs_to_what_it_was_begun_with(tmp_path, monkeypatch):
    """Whoever says the same by other paths, or only trains longer, goes on; another model or data needs a name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    begun = finetune_detectron2.begun_with(parsed(f"{GIVEN} model.roi_heads.num_classes=4 optimizer.lr=1"))
    finetune_detectron2.check_begun(tmp_path, begun)  # there is none yet
    (tmp_path / finetune_detectron2.BEGUN).write_text(json.dumps(begun))
    same = f"--model m --train {tmp_path}/t.json --images photos/../photos --val v.json --val_images photos"
    same += " --max_steps 9 --every 3 --batch_size 2 model.roi_heads.num_classes=4 optimizer.lr=2"
    finetune_detectron2.check_begun(tmp_path, finetune_detectron2.begun_with(parsed(same)))
    for other, said in (
        ("--model n", "--model m, not n"),
        ("--detector cascade_mask_rcnn", "--detector mask_rcnn, not cascade_mask_rcnn"),
        ("--train u.json", f"--train {tmp_path}/t.json, not {tmp_path}/u.json"),
        ("--image_size 64", "no --image_size, not 64"),
        ("--val_images .", f"--val_images {tmp_path}/photos, not {tmp_path}"),
    ):
        words = finetune_detectron2.begun_with(parsed(f"{GIVEN} {other} model.roi_heads.num_classes=4"))
        with pytest.raises(ValueError, match=f"{re.escape(said)}; --name NAME begins another"):
            finetune_detectron2.check_begun(tmp_path, words)
    with pytest.raises(ValueError, match="begun with model.roi_heads.num_classes 4, not None"):
        finetune_detectron2.check_begun(tmp_path, finetune_detectron2.begun_with(parsed(GIVEN)))


def test_a_run_of_fit_is_not_written_over(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="is a run of `indiclip fit`; --name NAME begins another"):
        finetune_detectron2.check_begun(tmp_path, {})


@needs_detectron2
def test_masks_need_both_files(exported, tmp_path, capsys):
    """A held-out file of boxes alone ends no run, and one without objects is refused. Masks may be run lengths."""
    from detectron2.config import instantiate

    coco(tmp_path, 1)
    content = json.loads((tmp_path / "train.json").read_text())
    for row in content["annotations"][:1]:
        del row["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    (tmp_path / "none.json").write_text(json.dumps(content | {"annotations": []}))
    words = f"--model m --images {tmp_path}/photos --train {tmp_path}/train.json --val {tmp_path}"
    both = finetune_detectron2.config_for(parsed(f"{words}/held_out.json"), exported("portable"))
    assert both.model.roi_heads.mask_head is not None
    assert "boxes alone" not in capsys.readouterr().out
    one = finetune_detectron2.config_for(parsed(f"{words}/boxes.json"), exported("portable"))
    assert one.model.roi_heads.mask_head is None
    assert f"boxes alone, no masks: not every object of {tmp_path}/boxes.json has one" in capsys.readouterr().out
    for row in content["annotations"]:
        row["segmentation"] = {"size": [48, 48], "counts": [96, 96, 2112]}
    (tmp_path / "rle.json").write_text(json.dumps(content))
    rle = finetune_detectron2.config_for(
        parsed(f"{words}/held_out.json --train {tmp_path}/rle.json"), exported("portable")
    )
    rle.dataloader.train.update({"num_workers": 0, "total_batch_size": 1})
    (image,) = next(iter(instantiate(rle.dataloader.train)))
    assert type(image["instances"].gt_masks).__name__ == "BitMasks"
    with pytest.raises(ValueError, match=r"--val: .*none.json has no objects"):
        finetune_detectron2.check_data(parsed(f"{words}/none.json"))


@needs_detectron2
def test_a_run_that_does_not_fit_is_one_line(runs, tmp_path, capsys):  # noqa: F811
    boxes_alone(tmp_path, 1)
    words = f"--model {runs['clip']} --train {tmp_path}/train.json --images {tmp_path}/photos"
    words += f" --val {tmp_path}/train.json"
    with pytest.raises(SystemExit):
        finetune_detectron2.main([*words.split(), "--runs", str(tmp_path / "runs")])
    assert "--to vitdet: backbone: detectron2's ViT has no place for embeds.cls_token" in capsys.readouterr().err
