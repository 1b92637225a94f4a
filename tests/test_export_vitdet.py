"""`--to vitdet` against detectron2 itself, and from a run to a detector of it."""

import json
import re
import shlex
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
def test_the_readmes_command_goes_from_a_run_to_a_detector(runs, tmp_path, monkeypatch):  # noqa: F811
    """In two steps, on boxes; again, there is nothing left to do, and the detector opens from its folder."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyConfig, instantiate

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
    model = instantiate(LazyConfig.load(str(run / "config.yaml")).model).eval()
    DetectionCheckpointer(model).load(str(run / "model_final.pth"))
    with torch.no_grad():
        (found,) = model([{"image": torch.zeros(3, 48, 64, dtype=torch.uint8)}])
    assert found["instances"].image_size == (48, 64)


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
    with pytest.raises(ValueError, match=r"optimizer.lrr=3: found no such KEY=VALUE .*; nearest is 'lr'"):
        finetune_detectron2.check_options(OmegaConf.create({"optimizer": {"lr": 1}}), ["optimizer.lrr=3"])


@needs_detectron2
def test_a_run_that_does_not_fit_is_one_line(runs, tmp_path, capsys):  # noqa: F811
    boxes_alone(tmp_path, 1)
    words = f"--model {runs['clip']} --train {tmp_path}/train.json --images {tmp_path}/photos"
    words += f" --val {tmp_path}/train.json"
    with pytest.raises(SystemExit):
        finetune_detectron2.main([*words.split(), "--runs", str(tmp_path / "runs")])
    assert "--to vitdet: backbone: detectron2's ViT has no place for embeds.cls_token" in capsys.readouterr().err
