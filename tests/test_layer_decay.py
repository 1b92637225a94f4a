"""Which layer each parameter of a tower belongs to, against timm's own table and lists by hand."""

import pytest
import timm
import torch
from helpers import ARCHITECTURE
from timm.optim import param_groups_layer_decay

from heads.contrastive import Contrastive
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.module import MultiTask
from indiclip.parameter_groups import parameter_groups
from indiclip.text import TextTower
from indiclip.timm_backbone import TimmBackbone
from indiclip.tokenizers import ByteTokenizer


def scales_of(module, layer_decay=0.5, **options):
    groups = parameter_groups(module, layer_decay=layer_decay, **options)
    return {name: group["lr_scale"] for group in groups for name in group["param_names"]}


def test_layer_decay_by_hand():
    """Two blocks: 0.5 at the upper one, 0.25 at the lower one, 0.125 at the stem; what lies above keeps the rate."""
    torch.manual_seed(0)
    backbone = NaFlexViT(width=32, depth=2, num_heads=2, patch_size=8)
    text = TextTower(ByteTokenizer(), ARCHITECTURE | {"num_hidden_layers": 2})
    module = MultiTask(Encoder(backbone, text, 32, (16,)), [Contrastive()])
    scales = scales_of(module, lr_scale={"encoder.text": 0.1})
    assert scales.keys() == dict(module.named_parameters()).keys()
    vit, bert = "encoder.backbone.vit", "encoder.text.model.encoder.layer"
    assert scales[f"{vit}.embeds.proj.weight"] == 0.125
    assert scales[f"{vit}.blocks.0.attn.qkv.weight"] == 0.25
    assert scales[f"{vit}.blocks.1.attn.qkv.weight"] == 0.5
    for above in (f"{vit}.norm.weight", "encoder.image_pool.pool.latent", "encoder.image_projection.weight"):
        assert scales[above] == 1
    assert scales[f"{bert}.0.attention.self.query.weight"] == pytest.approx(0.025)
    assert scales[f"{bert}.1.attention.self.query.weight"] == pytest.approx(0.05)
    assert scales["encoder.text.model.embeddings.word_embeddings.weight"] == pytest.approx(0.0125)


# timm model -> options, and what of it lies behind the blocks.
VITS = {
    "vit_base_patch16_224": ({"reg_tokens": 2}, {"norm"}),
    "vit_base_patch16_clip_224": ({}, {"norm"}),  # a norm before the blocks, too
    "vit_base_patch16_siglip_224": ({}, {"norm", "attn_pool"}),
    "vit_base_patch16_siglip_gap_224": ({}, {"norm"}),
    "vit_base_patch16_dinov3": ({}, {"norm"}),  # rope
    "eva02_tiny_patch14_224": ({}, {"fc_norm"}),
}
OTHERS = {
    "swin_tiny_patch4_window7_224": ({"depths": [1, 2, 1, 1]}, {"norm"}),
    "convnext_atto": ({"depths": [1, 2, 1, 1]}, {"head"}),
    "focalnet_tiny_srf": ({}, {"norm"}),
    "beit_base_patch16_224": ({"depth": 2}, {"fc_norm"}),
    "resnet18": ({}, set()),
    "vit_base_r50_s16_224": ({"depth": 2}, {"norm"}),  # whose stem is a ResNet
    "vit_relpos_small_patch16_224": ({"depth": 2}, {"fc_norm"}),
}
NAFLEX_NAMES = {"cls_token": "embeds.cls_token", "reg_token": "embeds.reg_token", "pos_embed": "embeds.pos_embed"}


def timm_scales(name, options):
    """Those of timm for its own model, and that model's parameters by NaFlexVit's names."""
    model = timm.create_model(name, num_classes=0, **options)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}


def test_a_factor_of_what_is_frozen_is_said():
    """And none of what has a trained parameter."""
    module = torch.nn.ModuleDict(
        {"frozen": torch.nn.Linear(2, 2).requires_grad_(False), "trained": torch.nn.Linear(2, 2)}
    )
    module["trained"].bias.requires_grad = False
    with pytest.warns(UserWarning, match="lr_scale") as found:
        parameter_groups(module, {"frozen": 0.1, "trained": 0.1})
    assert [str(one.message) for one in found] == ["model.lr_scale: has no effect on frozen, which is frozen"]


@pytest.mark.parametrize("name", [*VITS, *OTHERS])
def test_image_towers_have_timms_layers_and_what_lies_behind_them_keeps_the_rate(name):
    options, behind = (VITS | OTHERS)[name]
    with torch.device("meta"):
        if name in VITS:
            options = options | {"depth": 2}
            tower, prefix = NaFlexViT(name=name, options=options), "vit."
        else:
            hw = timm.get_pretrained_cfg(name).input_size[1:]
            tower, prefix = TimmBackbone(name, hw, options=options), "net."
        theirs = timm_scales(name, options)
    if name in VITS:
        moved = {old: NAFLEX_NAMES.get(old, old.replace("patch_embed.", "embeds.")) for old in theirs}
        theirs = {moved[old]: scale for old, scale in theirs.items()}
    for _ in range(2):
        ours = {path.removeprefix(prefix): scale for path, scale in scales_of(tower).items()}
        assert {path.partition(".")[0] for path, scale in ours.items() if scale == 1} == behind
        body = {path: scale for path, scale in ours.items() if scale < 1}
        assert max(body.values()) == 0.5
        assert len({scale / theirs[path] for path, scale in body.items()}) == 1
        before = body
        tower.remove_pool()  # changes no rate of what stays
        if name in VITS:
            behind = {"norm"}
    assert body == before


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
MBART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2}
LONG = SMALL | {"max_position_embeddings": 300}
EMBEDDINGS = {"embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.LayerNorm"}
# transformers' model -> its configuration, what is below the blocks, the blocks, what is above them.
TEXTS = {
    "bert": (SMALL, EMBEDDINGS | {"embeddings.token_type_embeddings"}, "encoder.layer", set()),
    "xlm-roberta": (LONG, EMBEDDINGS | {"embeddings.token_type_embeddings"}, "encoder.layer", set()),
    "clip_text_model": (
        *(LONG, {"embeddings.token_embedding", "embeddings.position_embedding"}),
        *("encoder.layers", {"final_layer_norm"}),
    ),
    "siglip_text_model": (
        *(LONG, {"embeddings.token_embedding", "embeddings.position_embedding"}),
        *("encoder.layers", {"final_layer_norm"}),
    ),
    "t5": (T5, {"embed_tokens"}, "block", {"final_layer_norm"}),
    "gemma2": (SMALL | {"num_key_value_heads": 1, "head_dim": 8}, {"embed_tokens"}, "layers", {"norm"}),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, {"wte", "wpe"}, "h", {"ln_f"}),
    # Its norm of embeddings is registered behind the blocks.
    "mbart": (MBART, {"embed_tokens", "embed_positions", "layernorm_embedding"}, "layers", {"layer_norm"}),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_towers_have_embeddings_blocks_and_what_lies_behind_them(kind):
    architecture, below, blocks, above = TEXTS[kind]
    with torch.device("meta"):
        tower = TextTower(ByteTokenizer(), {"model_type": kind} | architecture)
    found = {}
    for path, scale in scales_of(tower).items():
        module = path.removeprefix("model.").rpartition(".")[0]
        inside = next((f"{blocks}.{i}" for i in range(2) if module.startswith(f"{blocks}.{i}.")), module)
        found.setdefault(scale, set()).add(inside)
    expected = {0.125: below, 0.25: {f"{blocks}.0"}, 0.5: {f"{blocks}.1"}, 1: above}
    assert found == {scale: modules for scale, modules in expected.items() if modules}


def test_a_tower_whose_blocks_nobody_knows_is_refused():
    with torch.device("meta"):
        tower = TimmBackbone("poolformer_s12")
    parameter_groups(tower)
    with pytest.raises(ValueError, match="timm does not say which layers MetaFormer has; expected 1, and model.lr_sca"):
        parameter_groups(tower, layer_decay=0.5)
    tower.requires_grad_(False)
    assert parameter_groups(tower, layer_decay=0.5) == []
