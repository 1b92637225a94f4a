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
        (lambda: naflex(drop_path_rate=2.0), "backbone.options.drop_path_rate: found 2.0; expected 0 to below 1"),
        (lambda: naflex(pos_embed_grid_size=[0, 6]), "backbone.options.pos_embed_grid_size: found 0; expected a whole"),
        (
            lambda: TimmBackbone("test_convnext", (32, 32), options={"pos_embed_grid_size": [6, 6]}),
            "expected an indiclip.backbone.NaFlexViT for pos_embed_grid_size",
        ),
        (lambda: NaFlexViT(name="test_vit", options={"in_chans": 1}), "cannot read patches"),
        (lambda: NaFlexViT(name="test_vit", options={"cls_token": True}), "test_vit cannot be made of .*'cls_token'"),
        (
            lambda: TimmBackbone("convnext_atto", (33, 32), 8),
            "must be multiples of patch_size 8",
        ),
        (lambda: TimmBackbone("convnext_atto", (32, 32), 0), "backbone.patch_size: found 0; expected 1 or more"),
        (lambda: TimmBackbone("convnext_atto", (0, 32), 8), "backbone.canvas_hw: found 0; expected 1 or more"),
        (lambda: NaFlexViT(size="tiny", patch_size=0), "backbone.patch_size: found 0; expected 1 or more"),
        (lambda: TimmBackbone("test_convnext", feature_index=5), "backbone.feature_index: found 5; expected -4 to 3"),
        (lambda: TimmBackbone("test_convnext", feature_index=-5), "backbone.feature_index: found -5; expected -4 to 3"),
    ],
)
def test_mistakes_name_the_key(make, message):
    with pytest.raises(ValueError, match=message):
        make()


KINDS = {
    "from scratch": naflex,
    "named": lambda **options: NaFlexViT(name="test_vit", options=options),
    "timm": lambda **options: TimmBackbone("test_vit", (160, 160), options=options),
    "timm at another size": lambda **options: TimmBackbone("test_vit", (64, 64), options=options),
}
IN_TIMMS_WORDS = {  # the middle of the line is timm's
    "num_heads": (5, "cannot be made of {'num_heads': 5}: .*divi"),
    "global_pool": ("nope", "cannot be made of {'global_pool': 'nope'}: Only avg"),
    "bogus": (1, "'bogus'"),
    "drop_path_rat": (0.1, "'drop_path_rat'.*; nearest is 'drop_path_rate'"),
}


REFUSED = [(kind, option) for kind in KINDS for option in IN_TIMMS_WORDS]
REFUSED.remove(("from scratch", "num_heads"))  # an argument of its own


@pytest.mark.parametrize(("kind", "option"), REFUSED)
def test_options_that_timm_refuses_are_named_in_a_line(kind, option):
    value, words = IN_TIMMS_WORDS[option]
    with pytest.raises(ValueError, match=rf"^model\.encoder\.backbone\.options: .*{words}") as raised:
        KINDS[kind](**{option: value})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", ["drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"])
def test_a_rate_at_which_nothing_is_left_is_refused(kind, rate):
    KINDS[kind](**{rate: 0.1})
    for value in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"backbone.options.{rate}: found {value}; expected 0 to below 1"):
            KINDS[kind](**{rate: value})


SMALL_SWIN = {"img_size": 64, "window_size": 4, "depths": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("name", "canvas_hw", "options", "message"),
    [
        (  # 6 x 6 tokens, where 104 / 16 = 6.5
            *("vit_tiny_patch16_224", (104, 104), {"depth": 1}),
            r"backbone\.canvas_hw: found \[104, 104\].* gives 36 tokens; expected multiples of its stride 16$",
        ),
        (
            "pit_ti_224",
            (224, 224),
            {},
            r"^model\.encoder\.backbone\.name: pit_ti_224 gives 1 tokens of .*; expected 49, by its",
        ),
        (
            "crossvit_tiny_240",
            (240, 240),
            {},
            "^model.encoder.backbone.name: crossvit_tiny_240 gives list; expected one map, or one",
        ),
        (
            "levit_128s",
            (104, 104),
            {},
            r"^model\.encoder\.backbone\.canvas_hw: levit_128s cannot read images of \[104, 104\]: ",
        ),
        (
            *("test_vit", (64, 64), {"norm_layer": "batchnorm2d"}),
            r"options, model\.encoder\.backbone\.canvas_hw: test_vit of {'norm_layer'.* cannot read images of ",
        ),
        (
            "nest_tiny",
            (64, 128),
            {},
            r"^model\.encoder\.backbone\.canvas_hw: nest_tiny cannot be made for .*\[64, 128\]: .* square",
        ),
        (
            "mixer_s32_224",
            (64, 64),
            {"img_size": 224},
            r"^model\.encoder\.backbone\.options, model\.encoder\.backbone\.canvas_hw: mixer_s32_224 of ",
        ),
        (
            "convnext_atto",
            (64, 64),
            {"bogus": 1},
            "^model.encoder.backbone.options: convnext_atto cannot be made of {'bogus': 1}",
        ),
    ],
)
def test_a_canvas_that_the_model_cannot_read_is_refused_when_it_is_made(name, canvas_hw, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        TimmBackbone(name, canvas_hw, 8, options=options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("test_resnet", {}, (4, 4)),  # rounded up, as padded convolutions do
        ("test_convnext", {}, (3, 3)),  # and down
        ("swin_tiny_patch4_window7_224", SMALL_SWIN | {"img_size": 104}, (4, 4)),  # which pads
        ("test_vit_relpos", {"img_size": 96}, (6, 6)),
    ],
)
def test_a_canvas_that_the_stride_does_not_divide_is_read_as_the_model_reads_it(name, options, expected):
    side = options.get("img_size", 104)
    backbone = TimmBackbone(name, (side, side), 8, options=options).eval()
    images = batch_images([noise(side, side, 0), noise(side - 8, side, 1)], 8, backbone.max_tokens, (side, side))
    with torch.no_grad():
        features = backbone(images)
    assert features.grid_hw == expected
    assert features.tokens_BND.shape[1] == features.coords_BN2.shape[1] == expected[0] * expected[1]


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "levit_128s"])
def test_trying_the_model_changes_nothing(name):
    """No random numbers, no statistics of batch norm, no tables of the evaluation mode."""
    torch.manual_seed(0)
    expected = timm.create_model(name, num_classes=0)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    backbone = TimmBackbone(name, expected.pretrained_cfg["input_size"][1:])
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(backbone.net.state_dict(), expected.state_dict(), atol=0, rtol=0)
    assert all(module.training for module in backbone.modules())
    assert not any(getattr(module, "attention_bias_cache", None) for module in backbone.modules())


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


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_statistics_are_kept_in_checkpoints(kind):
    """timm may give a name other weights, with other pixels, by default."""
    backbone = KINDS[kind]()
    config = backbone.to_config()
    assert (config["mean"], config["std"]) == (list(backbone.mean), list(backbone.std))
    before = type(backbone)(**config | {"mean": None, "std": None})  # a checkpoint of before
    assert (before.mean, before.std) == (backbone.mean, backbone.std)
    other = type(backbone)(**config | {"mean": [0.1, 0.2, 0.3]})
    assert type(backbone)(**other.to_config()).mean == (0.1, 0.2, 0.3)


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
