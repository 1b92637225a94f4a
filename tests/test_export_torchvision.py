"""The way to torchvision: the same features, exact strides, detectors that train and predict, bad folders."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import ARCHITECTURE, tiny_encoder
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.export.exporter import export
from indiclip.export.parity import grids, measure
from indiclip.export.source import Source
from indiclip.export.target import find_target
from indiclip.export.torchvision_backbone import build_detector, load, unpadded
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer


def vit(**options):
    return NaFlexViT(width=32, depth=2, num_heads=2, **options)


BACKBONES = {
    "patch 8": lambda: vit(patch_size=8),
    "patch 14, class token": lambda: vit(patch_size=14, options={"class_token": True, "reg_tokens": 2}),
    "patch 16": lambda: vit(patch_size=16),
    "timm's name": lambda: NaFlexViT(name="vit_tiny_patch16_224", options={"depth": 2}),
    "convnext": lambda: TimmBackbone(
        "convnext_atto", (64, 64), options={"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    ),
    "swin": lambda: TimmBackbone(
        "swin_tiny_patch4_window7_224",
        (224, 224),
        options={"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]},
    ),
    "tokens": lambda: TimmBackbone("vit_tiny_patch16_224", (224, 224), options={"depth": 1}),
    "rope": lambda: NaFlexViT(name="vit_small_patch16_dinov3", options={"depth": 1, "embed_dim": 48, "num_heads": 3}),
    "wider convolution": lambda: TimmBackbone("efficientnet_lite0", (64, 64)),
    "resnet, third stage": lambda: TimmBackbone("resnet10t", (64, 96), feature_index=3),
}


def encoder_of(backbone, scale=0.2, pool="mean"):
    """All vectors random too; matrices as they start, else rounding would grow from layer to layer."""
    encoder = Encoder(backbone, TextTower(ByteTokenizer(), ARCHITECTURE), 32, (16,), pool)
    for parameter in encoder.backbone.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, scale)
    return encoder


def write(encoder, folder):
    return export(Source(encoder.eval(), "it", "its weights", None), "torchvision", folder)


@pytest.mark.parametrize("name", BACKBONES)
def test_features_equal_the_encoders(name, tmp_path):
    torch.manual_seed(0)
    encoder = encoder_of(BACKBONES[name](), pool="tower" if name == "wider convolution" else "mean")
    record = write(encoder, tmp_path / "out")
    assert record["largest_difference"] <= record["bound"] == pytest.approx(1e-6, rel=0.03)
    not_compared = {case for case, row in record["image"].items() if "cannot" in row}
    assert record["image"].keys() == grids(encoder).keys()
    assert not_compared == (set() if encoder.backbone.canvas_hw is None else {"larger"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_wrong_weight_is_seen(tmp_path):
    encoder = tiny_encoder()
    write(encoder, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["vit.norm.bias"][0] += 1e-3
    save_file(weights, tmp_path / "out" / "model.safetensors")
    target = find_target("torchvision")
    record = measure(target, encoder, target.reload(encoder, tmp_path / "out"))
    assert min(row["features"]["difference"] for row in record["image"].values()) > 1e-4
    assert not record["within_bound"]


@pytest.mark.parametrize("patch_size", [8, 14, 16])
def test_torchvision_reads_the_exact_strides(patch_size, tmp_path):
    """Anchors lie on the cells, and RoIs are read where they are: 14 is not 16."""
    write(encoder_of(vit(patch_size=patch_size)), tmp_path / "out")
    backbone = load(tmp_path / "out", out_channels=32)
    detector = build_detector(FasterRCNN, backbone, 3, min_size=100, max_size=150).eval()
    batch, _ = detector.transform([torch.rand(3, 100, 130), torch.rand(3, 120, 90)])
    with torch.no_grad():
        maps = backbone(batch.tensors)
    height, width = batch.tensors.shape[-2:]
    strides = [(height / each.shape[2], width / each.shape[3]) for each in maps.values()]
    assert strides == [(stride, stride) for stride in backbone.strides]
    assert [1 / scale for scale in detector.roi_heads.box_roi_pool.scales] == pytest.approx(backbone.strides[:-1])
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    # A map that holds each cell's own x is read back where the RoI is, up to half a cell at its ends.
    ramp = {
        name: (torch.arange(each.shape[3]) + 0.5).mul(stride).expand(1, 1, each.shape[2], -1).contiguous()
        for (name, each), stride in zip(maps.items(), backbone.strides, strict=True)
    }
    align = detector.roi_heads.box_roi_pool
    read = align(ramp, [torch.tensor([[30.0, 30.0, 72.0, 72.0]])], [(height, width)])[0, 0, 3]
    expected = 30 + (torch.arange(7) + 0.5) * 6
    finest = backbone.strides[0]
    assert (read - expected - finest / 2).abs().max() < 0.1  # RoIAlign without half-pixel correction, as torchvision's


def targets(kind):
    boxes = torch.tensor([[10.0, 12.0, 50.0, 60.0], [30.0, 5.0, 60.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    if kind is MaskRCNN:
        target["masks"] = torch.zeros(2, 72, 64, dtype=torch.uint8)
        target["masks"][0, 12:60, 10:50] = 1
        target["masks"][1, 5:40, 30:60] = 1
    if kind is KeypointRCNN:
        target["labels"] = torch.tensor([1, 1])
        target["keypoints"] = torch.rand(2, 5, 3) * 20 + 30
        target["keypoints"][..., 2] = 1
    return target


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN, KeypointRCNN, FCOS])
@pytest.mark.parametrize("name", ["patch 14, class token", "convnext"])
def test_detectors_train_a_step_and_predict(kind, name, tmp_path):
    torch.manual_seed(0)
    write(encoder_of(BACKBONES[name]()), tmp_path / "out")
    backbone = load(tmp_path / "out", out_channels=32, stages=name == "convnext")
    options = {} if kind is FCOS else {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 4}
    if kind is KeypointRCNN:
        options |= {"keypoint_head": KeypointRCNNHeads(32, (32,))}
        options["keypoint_predictor"] = KeypointRCNNPredictor(32, 5)
    if kind is not FCOS:
        options |= {"box_batch_size_per_image": 8, "box_detections_per_img": 4}
    side = 64 if name == "convnext" else 80
    detector = build_detector(kind, backbone, 3, min_size=side, max_size=side, **options).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-4)
    images = [torch.rand(3, 72, 64), torch.rand(3, 72, 64)]
    losses = detector(images, [targets(kind), targets(kind)])
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    of_tower = [p for p in backbone.tower.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(of_tower) > 5  # the encoder learns too
    optimizer.step()
    detector.eval()
    with torch.no_grad():
        found = detector(images)
    assert len(found) == 2
    assert {"boxes", "labels", "scores"} <= found[0].keys()
    expected = {MaskRCNN: "masks", KeypointRCNN: "keypoints"}.get(kind)
    assert expected is None or expected in found[0]


def test_padding_changes_nothing_of_an_image(tmp_path):
    """An image beside a larger one has the features that it has alone; without the mask they differ."""
    write(encoder_of(vit(patch_size=8)), tmp_path / "out")
    backbone = load(tmp_path / "out").eval()
    small, large = torch.randn(3, 40, 56), torch.randn(3, 96, 80)
    batch = torch.zeros(2, 3, 96, 80)
    batch[0, :, :40, :56], batch[1] = small, large
    with torch.no_grad():
        alone, _ = backbone.features(small[None])
        beside, mask = backbone.features(batch)
        unmasked = backbone.tower._tokens(
            batch[:1].reshape(1, 3, 12, 8, 10, 8).permute(0, 2, 4, 3, 5, 1).reshape(1, 120, 192),
            torch.cartesian_prod(torch.arange(12), torch.arange(10))[None],
            None,
        ).reshape(12, 10, -1)
    assert mask[0].sum() == 5 * 7
    torch.testing.assert_close(beside[0, :, :5, :7], alone[0], atol=1e-5, rtol=1e-5)
    assert beside[0, :, 5:].abs().max() == 0
    assert (unmasked[:5, :7].permute(2, 0, 1) - alone[0]).abs().max() > 1e-2


def test_padding_is_what_is_zero_to_the_end():
    pixels = torch.ones(1, 3, 32, 32)
    pixels[..., 8:16] = 0  # in the middle: of the image
    pixels[..., 20:, :] = 0  # the third row of cells is half an image
    mask = unpadded(pixels, 8)[0]
    assert mask.tolist() == [[True] * 4] * 3 + [[False] * 4]
    assert unpadded(torch.zeros(1, 3, 16, 16), 8).sum() == 1


def test_a_folder_opens_without_indiclip(tmp_path):
    encoder = encoder_of(vit(patch_size=8))
    write(encoder, tmp_path / "out")
    code = (
        "import sys; sys.path = [p for p in sys.path if 'indiclip' not in p]; sys.modules['indiclip'] = None\n"
        "from torchvision.models.detection import FCOS\n"
        "from torchvision_backbone import build_detector, load\n"
        "import torch\n"
        "backbone = load('.', out_channels=32).eval()\n"
        "torch.save(backbone.features(torch.ones(1, 3, 24, 32))[0].detach(), 'map.pt')\n"
        "build_detector(FCOS, backbone, 3, min_size=64)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", check=True, env={"PATH": "", "HOME": "/tmp"})
    theirs = torch.load(tmp_path / "out" / "map.pt", weights_only=True)
    with torch.no_grad():
        ours, _ = load(tmp_path / "out").eval().features(torch.ones(1, 3, 24, 32))
    torch.testing.assert_close(theirs, ours)


def test_images_larger_than_a_fixed_tower_are_refused_in_one_line(tmp_path):
    write(encoder_of(BACKBONES["swin"]()), tmp_path / "out")
    backbone = load(tmp_path / "out", out_channels=32)
    with pytest.raises(ValueError, match="found a batch of 256x256 pixels; expected at most 224x224"):
        backbone(torch.ones(1, 3, 256, 256))
    maps = backbone(torch.ones(1, 3, 64, 160))  # and smaller ones are padded inside
    assert maps["3"].shape[-2:] == (2, 5)


def test_convolutions_take_larger_images(tmp_path):
    write(encoder_of(BACKBONES["convnext"]()), tmp_path / "out")
    maps = load(tmp_path / "out", out_channels=32)(torch.ones(1, 3, 96, 160))
    assert maps["3"].shape[-2:] == (3, 5)


def test_bad_folders_are_one_line(tmp_path):
    encoder = tiny_encoder()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="full: is there already and holds something"):
        write(encoder, tmp_path / "full")
    write(encoder, tmp_path / "out")
    with pytest.raises(ValueError, match="scales: found .*expected powers of two"):
        load(tmp_path / "out", scales=[3.0])
    with pytest.raises(ValueError, match="stages: expected a tower with several stages"):
        load(tmp_path / "out", stages=True)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "norm1" not in name}, tmp_path / "out/model.safetensors"
    )
    with pytest.raises(ValueError, match="weights are not those of config.json's model"):
        load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"version": 2}))
    with pytest.raises(ValueError, match="found the format indiclip-torchvision 2; expected indiclip-torchvision 1"):
        load(tmp_path / "out")


def test_nothing_is_left_of_a_failed_export(tmp_path):
    encoder = tiny_encoder()
    with torch.no_grad():
        encoder.backbone.vit.norm.bias[0] = float("nan")
    with pytest.raises(ValueError, match="--to torchvision: differs by nan"):
        write(encoder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_targets_of_other_sizes_keep_their_place(tmp_path):
    """The detector's transform pads to the coarsest stride, and predictions come back in the images' pixels."""
    write(encoder_of(vit(patch_size=8)), tmp_path / "out")
    backbone = load(tmp_path / "out", out_channels=32, scales=[1.0])
    detector = build_detector(FCOS, backbone, 2, min_size=48, max_size=96)
    batch, _ = detector.transform([torch.rand(3, 48, 60)])
    assert isinstance(batch, ImageList)
    assert batch.tensors.shape[-2:] == (48, 64)
    assert batch.image_sizes == [(48, 60)]
