"""Text and image towers of transformers alone: their vectors are those of the library's own classes."""

import shutil

import lightning as L
import pytest
import torch
import transformers
from foreign_models import TOWER, letter_tokenizer
from helpers import batch_images, noise
from safetensors.torch import load_file, save_file

import indiclip
from heads.contrastive import Contrastive
from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.generated.mela import Mela
from indiclip.loading.data_module import MultiTaskData
from indiclip.loading.source import Source
from indiclip.module import MultiTask
from indiclip.pretrained.build import build
from indiclip.pretrained.init_from import InitFrom
from indiclip.pretrained.read import read_weights

TEXTS = ["a photo of a kite", "a kite", "x" * 400, "~{}"]
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
M2M = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
M2M |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
SHORT = TOWER | {"max_position_embeddings": 16, "projection_size": 24, "projection_dim": 24}

# Family -> transformers' class of the folder, its model type and sizes, and how texts are pooled.
FAMILIES = {
    "mbert": ("BertForPreTraining", "bert", TOWER, "pooler"),
    "muril": ("BertForMaskedLM", "bert", TOWER, "mean"),
    "labse": ("BertModel", "bert", TOWER, "pooler"),
    "xlm-r": ("XLMRobertaForMaskedLM", "xlm-roberta", TOWER | {"max_position_embeddings": 60}, "mean"),
    "distilbert": ("DistilBertModel", "distilbert", {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}, "mean"),
    "clip": ("CLIPTextModel", "clip_text_model", SHORT, "eos"),
    "clip_projection": ("CLIPTextModelWithProjection", "clip_text_model", SHORT, "eos"),
    "siglip": ("SiglipTextModel", "siglip_text_model", SHORT, "last"),
    "siglip2": ("Siglip2TextModel", "siglip2_text_model", SHORT, "last"),
    "t5_encoder": ("T5EncoderModel", "t5", T5, "mean"),
    "t5": ("T5ForConditionalGeneration", "t5", T5, "mean"),
    "mt5": ("MT5EncoderModel", "mt5", T5, "mean"),
    "umt5": ("UMT5EncoderModel", "umt5", T5, "mean"),
    "nllb": ("M2M100ForConditionalGeneration", "m2m_100", M2M, "mean"),
    "gemma": ("GemmaForCausalLM", "gemma", TOWER | {"head_dim": 8, "num_key_value_heads": 1}, "eos"),
}


def random_tensors(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_text_folder(folder, family, **save):
    name, kind, sizes, _ = FAMILIES[family]
    tokenizer = letter_tokenizer(transformers.GemmaTokenizer, add_eos_token=True)
    if family == "gemma":
        tokenizer.padding_side = "left"
    ids = {"vocab_size": len(tokenizer) + 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = transformers.CONFIG_MAPPING[kind](**sizes | ids)
    model = random_tensors(getattr(transformers, name)(config))
    model.save_pretrained(folder, **save)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def with_image_tower(folder, **arguments):
    """An encoder whose text comes from a folder."""
    backbone = NaFlexViT(width=16, depth=1, num_heads=2, patch_size=8)
    return Encoder(backbone, init_from=[InitFrom(str(folder))], **arguments).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_token_vectors_and_pooled_texts_are_those_of_transformers(tmp_path, family):
    model, _ = make_text_folder(tmp_path / "model", family)
    pool = FAMILIES[family][3]
    encoder = Encoder(
        NaFlexViT("tiny", depth=1), init_from=[InitFrom(str(tmp_path / "model"))], batch_norm=False
    ).eval()
    assert encoder.text_pool.kind == pool
    ids, valid = encoder.tokenize(TEXTS)
    tower = getattr(model, "bert", getattr(model, "roberta", getattr(model, "text_model", model)))
    tower = tower.get_encoder() if model.config.is_encoder_decoder else tower
    tower = getattr(tower, "model", tower) if family == "gemma" else tower
    out = tower(input_ids=ids, attention_mask=None if "siglip" in family else valid.long())
    theirs = out.last_hidden_state
    ours = encoder.text(ids, valid)
    torch.testing.assert_close(ours[valid], theirs[valid], atol=1e-5, rtol=0)
    pooled = encoder.text_pool(ours, valid)
    if pool == "mean":
        expected = torch.stack([row[mask].mean(0) for row, mask in zip(theirs, valid, strict=True)])
    elif pool == "eos":
        expected = theirs[range(len(TEXTS)), valid.sum(1) - 1]
    else:
        expected = theirs[:, -1] if pool == "last" else out.pooler_output
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=0)
    if pool == "last":
        torch.testing.assert_close(encoder.text_projection(pooled), out.pooler_output, atol=1e-5, rtol=0)
    if family == "clip_projection":
        expected = model(input_ids=ids, attention_mask=valid.long()).text_embeds
        torch.testing.assert_close(encoder.text_projection(pooled), expected, atol=1e-5, rtol=0)


def test_a_model_in_several_files(tmp_path):
    make_text_folder(tmp_path / "one", "t5")
    make_text_folder(tmp_path / "many", "t5", max_shard_size="5KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = with_image_tower(tmp_path / "one"), with_image_tower(tmp_path / "many")
    for name, tensor in one.text.state_dict().items():
        assert torch.equal(tensor, many.text.state_dict()[name])


def test_names_that_bert_had_in_2018(tmp_path):
    make_text_folder(tmp_path / "new", "mbert")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed | {"bert.embeddings.position_ids": torch.arange(8)}, tmp_path / "old" / "model.safetensors")
    new, old = (with_image_tower(tmp_path / name) for name in ("new", "old"))
    ids, valid = new.tokenize(TEXTS)
    torch.testing.assert_close(old.text(ids, valid), new.text(ids, valid))
    weights = read_weights(str(tmp_path / "old"))
    assert weights.unused == []
    assert {"cls.predictions.bias", "bert.embeddings.position_ids"} <= set(weights.ignored)


SQUARE = TOWER | {"image_size": 32, "patch_size": 8}
DINO = SQUARE | {"mlp_ratio": 2}
IMAGES = {
    "clip": ("CLIPVisionModel", "clip_vision_model", SQUARE),
    "clip_projection": (
        "CLIPVisionModelWithProjection",
        "clip_vision_model",
        TOWER | {"image_size": 32, "patch_size": 8},
    ),
    "siglip": ("SiglipVisionModel", "siglip_vision_model", SQUARE),
    "siglip2": ("Siglip2VisionModel", "siglip2_vision_model", TOWER | {"num_patches": 16, "patch_size": 8}),
    "dinov2": ("Dinov2Model", "dinov2", DINO),
    "dinov2_registers": ("Dinov2WithRegistersModel", "dinov2_with_registers", DINO | {"num_register_tokens": 2}),
    "dinov3": ("DINOv3ViTModel", "dinov3_vit", SQUARE | {"num_register_tokens": 2}),
    "vit": ("ViTModel", "vit", SQUARE),
}


@pytest.mark.parametrize("family", IMAGES)
@torch.no_grad()
def test_image_towers_alone(tmp_path, family):
    name, kind, sizes = IMAGES[family]
    model = random_tensors(getattr(transformers, name)(transformers.CONFIG_MAPPING[kind](**sizes)))
    model.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    weights = read_weights(str(tmp_path))
    backbone = build(weights.config, "x")["backbone"].eval()
    backbone.load_state_dict(
        {n.removeprefix("backbone."): t for n, t in weights.tensors.items() if n.startswith("backbone.")}
    )
    images = batch_images([noise(32, 32, 1), noise(32, 32, 2)], 8, 16)
    cells = backbone.normalise(images)
    seen = {"pixel_values": cells.reshape(2, 4, 4, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 32, 32)}
    if family == "siglip2":
        mask = images["valid_BN"].long()
        seen = {"pixel_values": cells, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4], [4, 4]])}
    out = model(**seen)
    features = backbone(images)
    tokens = out.last_hidden_state
    theirs = tokens[:, -16:]
    if family.startswith("clip"):
        tower = getattr(model, "vision_model", model)
        theirs = tower.post_layernorm(theirs)
    torch.testing.assert_close(features.tokens_BND, theirs, atol=1e-5, rtol=0)
    pooled = backbone.pool(features)
    if family == "clip_projection":
        torch.testing.assert_close(
            pooled @ weights.tensors["image_projection.weight"].T, out.image_embeds, atol=1e-5, rtol=0
        )
    else:
        expected = tokens[:, 0] if family == "vit" else out.pooler_output
        torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["clip", "siglip", "t5", "labse"])
def test_a_run_with_it_trains_and_loads_again(tmp_path, family):
    make_text_folder(tmp_path / "model", family)
    backbone = NaFlexViT(width=16, depth=1, num_heads=2, patch_size=8)
    encoder = Encoder(backbone, init_from=[InitFrom(str(tmp_path / "model"))], embed_dim=24, lengths=[24])
    before = {name: tensor.clone() for name, tensor in encoder.text.state_dict().items()}
    source = Source("contrastive", Mela(12, 32, "single"), batch_size=4, max_tokens=16)
    module = MultiTask(encoder, [Contrastive()])
    data = MultiTaskData([source], steps_per_epoch=2, num_workers=0, patch_size=8)
    run = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert not any(torch.equal(before[name], tensor) for name, tensor in encoder.text.named_parameters())
    loaded = indiclip.load(tmp_path / "run.ckpt")
    with torch.no_grad():
        torch.testing.assert_close(loaded.embed_text(TEXTS), module.eval().encoder.embed_text(TEXTS), atol=0, rtol=0)
