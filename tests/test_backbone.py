"""Backbones keep the contract: padding changes nothing, every timm family gives features at its stride."""

import pytest
import timm
import torch
from helpers import batch_images, noise

from indiclip.backbone import NaFlexViT
from indiclip.timm_backbone import TimmBackbone


def test_padding_does_not_change_an_image():
    torch.manual_seed(0)
    backbone = NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8).eval().double()
    small, large = noise(24, 32, 1), noise(64, 40, 2)
    with torch.no_grad():
        alone = backbone(batch_images([small], 8, 64))
        beside = backbone(batch_images([small, large], 8, 64))
    assert alone.valid_BN is None
    torch.testing.assert_close(beside.tokens_BND[0, :12], alone.tokens_BND[0], atol=1e-10, rtol=0)
    map_BDHW, mask_BHW = beside.map()
    assert mask_BHW[0].sum() == 12
    assert mask_BHW[1].sum() == 40
    torch.testing.assert_close(map_BDHW[0, :, 2, 3], alone.tokens_BND[0, 11], atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{"width": 32, "depth": 1, "num_heads": 2}, {"name": "vit_tiny_patch16_224"}])
def test_patches_of_another_size_are_named(options):
    """As in Python, where nothing links the data to the model."""
    kind = TimmBackbone if "name" in options else NaFlexViT
    backbone = kind(patch_size=8, **options)
    with pytest.raises(ValueError, match=r"data\.patch_size: found 16; expected 8, the backbone's"):
        backbone(batch_images([noise(64, 64)], 16, 16))


def test_a_narrow_vit_starts_with_xaviers_weights():
    """Variance 2 / (inputs + outputs); trunc_normal(0.02), timm's other start, is over twice as narrow here."""
    torch.manual_seed(0)
    vit = NaFlexViT(width=192, depth=1, num_heads=3).vit
    for layer in ("attn.qkv", "mlp.fc1"):  # timm also divides what is added to the residual by sqrt(2 * layer)
        weight = vit.get_parameter(f"blocks.0.{layer}.weight")
        assert weight.std().item() == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.02)


def test_naflex_equals_timms_vit_of_the_same_weights():
    """Oracle: timm's VisionTransformer (no class token, average pool) with the same weights, at its own size."""
    torch.manual_seed(0)
    name = "vit_medium_patch16_gap_240"
    naflex, plain = NaFlexViT(name=name).eval(), timm.create_model(name, num_classes=0).eval()
    theirs = plain.state_dict()
    with torch.no_grad():
        for key, value in naflex.vit.state_dict().items():
            source = theirs[key.replace("embeds.proj", "patch_embed.proj").replace("embeds.", "")]
            if key == "embeds.proj.weight":  # convolution kernel (D, C, p, p) -> linear over (p, p, C)
                source = source.permute(0, 2, 3, 1)
            value.copy_(source.reshape(value.shape))
        picture = noise(240, 240)
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(plain.pretrained_cfg[part])[:, None, None] for part in ("mean", "std"))
        expected = plain.forward_features((pixels - mean) / std)
        got = naflex(batch_images([picture], 16, 225)).tokens_BND
    torch.testing.assert_close(got, expected[:, plain.num_prefix_tokens :], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convnext_atto", None),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 4}),
        ("focalnet_tiny_srf", None),
        ("vit_tiny_r_s16_p8_224", {"img_size": 64}),
    ],
)
def test_other_families_give_features_at_their_stride(name, options):
    backbone = TimmBackbone(name, canvas_hw=(64, 64), patch_size=8, options=options).eval()
    images = batch_images([noise(64, 64, 0), noise(40, 64, 1)], 8, 64, (64, 64))
    with torch.no_grad():
        features = backbone(images)
    side = 64 // backbone.stride
    assert features.tokens_BND.shape == (2, side * side, backbone.width)
    assert features.grid_hw == (side, side)
    assert features.valid_BN is not None
    assert features.valid_BN[0].all()
    expected = sum(row * backbone.stride < 40 for row in range(side)) * side
    assert features.valid_BN[1].sum() == expected


def test_canvas_holds_the_normalised_pixels():
    backbone = TimmBackbone("convnext_atto", canvas_hw=(32, 32), patch_size=8)
    picture = noise(32, 32)
    canvas = backbone._canvas(batch_images([picture], 8, 16, (32, 32)))
    mean, std = backbone.net.pretrained_cfg["mean"], backbone.net.pretrained_cfg["std"]
    pixels = torch.from_numpy(picture).permute(2, 0, 1) / 255
    expected = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(canvas[0], expected, atol=1e-5, rtol=1e-5)


def naflex(**options):
    return NaFlexViT(width=32, depth=1, num_heads=2, options=options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NaFlexViT(size="tniy"), "backbone.size: found 'tniy'.*nearest is 'tiny'"),
        (lambda: NaFlexViT(width=64), "give `size`, `name`, or all of"),
        (lambda: NaFlexViT(width=64, depth=1, num_heads=3), "backbone.num_heads: 3 does not divide the width 64"),
        (lambda: NaFlexViT(name="vit_tiny_patch16_225"), "no model 'vit_tiny_patch16_225'; nearest is"),
        (lambda: NaFlexViT(name="convnext_atto"), "no plain ViT; use indiclip.timm_backbone.TimmBackbone"),
        (lambda: NaFlexViT(size="tiny", pretrained=True), "backbone.pretrained: needs `name`"),
        (lambda: naflex(cls_token=True), "NaFlexVit has no 'cls_token'; nearest is 'class_token'"),
        (lambda: naflex(num_classes=3), "NaFlexVit has no 'num_classes'"),
        (lambda: naflex(pos_embed="rope"), "NaFlexVit cannot be made of {'pos_embed': 'rope'}: AssertionError"),
        (lambda: naflex(embed_proj_type="conv"), "cannot read patches: Convolutional input must be 4D"),
        (lambda: naflex(pos_embed_interp_mode="cubic"), "cannot read patches: .*got: 'cubic'"),
        (lambda: naflex(norm_layer="batchnorm2d"), "cannot read patches: expected 4D input"),
        (lambda: naflex(patchify_channels_last=False), "patchify_channels_last: found False; expected True"),
        (lambda: naflex(patch_drop_rate=0.5), "backbone.options.patch_drop_rate: expected 0"),
        (lambda: TimmBackbone("test_vit", options={"patch_drop_rate": 0.5}), "options.patch_drop_rate: expected 0"),
        (lambda: naflex(drop_path_rate=2.0), "backbone.options.drop_path_rate: found 2.0; expected 0 to 1"),
        (lambda: NaFlexViT(name="test_vit", options={"in_chans": 1}), "cannot read patches"),
        (lambda: NaFlexViT(name="test_vit", options={"cls_token": True}), "test_vit cannot be made of .*'cls_token'"),
        (lambda: TimmBackbone("convnext_atto", (33, 32), 8), "must be multiples of backbone.patch_size 8"),
    ],
)
def test_mistakes_name_the_key(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda **options: NaFlexViT(width=32, depth=1, num_heads=2, **options), "bilinear"),
        (lambda **options: NaFlexViT(name="test_vit", **options), "bicubic"),
        (lambda **options: TimmBackbone("test_efficientnet", (64, 64), **options), "bicubic"),
        (lambda **options: TimmBackbone("test_resnet", (64, 64), **options), "bilinear"),
    ],
)
def test_interpolation_is_the_named_models_own_and_is_kept_in_checkpoints(make, expected):
    backbone = make()
    assert backbone.preprocessing.interpolation == expected
    assert backbone.to_config()["interpolation"] == expected
    other = make(interpolation="bilinear" if expected == "bicubic" else "bicubic")
    again = type(other)(**other.to_config())
    assert again.preprocessing == other.preprocessing != backbone.preprocessing
    with pytest.raises(ValueError, match=r"backbone\.interpolation: found 'cubic'; nearest is 'bicubic'"):
        make(interpolation="cubic")


def test_convnexts_norm_behind_the_pooling_goes_before_it():
    backbone = TimmBackbone("test_convnext", (64, 64)).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.net.head.norm(backbone.net.forward_features(pixels)).flatten(2).transpose(1, 2)
        backbone.remove_pool()
        torch.testing.assert_close(backbone.read_pixels(pixels).tokens_BND, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8, options={"drop_path_rate": 0.5}),
        lambda: TimmBackbone("test_convnext", (32, 32), patch_size=8, options={"drop_path_rate": 0.5}),
    ],
)
def test_stochastic_depth_is_an_option_that_counts_in_training_alone(make):
    torch.manual_seed(0)
    backbone = make()
    for parameter in backbone.parameters():  # ConvNeXt's branches begin at 1e-6
        torch.nn.init.normal_(parameter, std=0.2)
    images = batch_images([noise(32, 32, seed) for seed in range(8)], 8, 16, backbone.canvas_hw)
    for training in (True, False):
        backbone.train(training)
        first, second = (backbone(images).tokens_BND for _ in range(2))
        assert torch.equal(first, second) != training
