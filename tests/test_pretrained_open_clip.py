"""OpenCLIP's models come in: every family's embeddings are those of open_clip's own classes."""

import gzip
import io
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from foreign_models import TOWER, letter_tokenizer
from helpers import batch_images, noise
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.models import _registry

import indiclip
from indiclip.patches import unpatchify
from indiclip.pretrained import open_clip_tokenizers
from indiclip.pretrained.open_clip_source import OpenClipSource
from indiclip.pretrained.open_clip_tokenizers import open_clip_tokenizer
from indiclip.pretrained.read import read_weights

open_clip = pytest.importorskip("open_clip")
NUM_MERGES = 1000
TEXTS = ["a photo of a kite", "मसाला डोसा", "“a Photo”, of: a_kite &amp; 🪁!", "", "x" * 400]
IMAGE = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 2}
READS_PADDING = TEXT | {"no_causal_mask": True}
SIGLIP_TEXT = READS_PADDING | {"proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
SIGLIP_TEXT |= {"act_kwargs": {"approximate": "tanh"}, "tokenizer_kwargs": {"clean": "canonicalize"}}
HF_TEXT = {"context_length": 12, "hf_model_name": "{text}", "hf_tokenizer_name": "{text}"}

# OpenCLIP knows timm's models by name alone, so those of the names are cut while these tests run.
CUT = {
    "vit_base_patch16_siglip_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "fastvit_mci0": {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)},
    "vit_base_mci_224": {"depth": 1},
    "vit_large_patch14_clip_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "convnext_base": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "eva02_base_patch16_clip_224": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "vit_pe_core_tiny_patch16_384": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "vit_medium_patch16_gap_256": {"embed_dim": 32, "depth": 2, "num_heads": 2},
}


def of_timm(name, pool, proj, image_size=224, **more):
    names = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj}
    return names | {"image_size": image_size} | more


FAMILIES = {
    "vit": {"vision_cfg": IMAGE, "text_cfg": TEXT},
    "metaclip": {"quick_gelu": True, "vision_cfg": IMAGE, "text_cfg": TEXT},
    "custom_text": {"custom_text": True, "vision_cfg": IMAGE | {"ls_init_value": 0.1}, "text_cfg": TEXT},
    "clipa": {
        "vision_cfg": IMAGE | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": READS_PADDING | {"pool_type": "last", "ls_init_value": 0.1},
    },
    "average": {
        "vision_cfg": IMAGE | {"pool_type": "avg", "mlp_ratio": 2.3},
        "text_cfg": TEXT | {"pool_type": "first"},
    },
    "resnet": {
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": [3, 4, 6, 3], "width": 8, "patch_size": None},
        "text_cfg": TEXT | {"proj_type": "none", "width": 24},
    },
    "siglip": {
        "custom_text": True,
        "embed_dim": 32,
        "init_logit_bias": -10,
        "vision_cfg": of_timm("vit_base_patch16_siglip_224", "map", "none"),
        "text_cfg": SIGLIP_TEXT,
    },
    "mobileclip_s": {"custom_text": True, "vision_cfg": of_timm("fastvit_mci0", "avg", None, 64), "text_cfg": TEXT},
    "mobileclip_b": {"custom_text": True, "vision_cfg": of_timm("vit_base_mci_224", "token", None), "text_cfg": TEXT},
    "mobileclip2": {
        "custom_text": True,
        "vision_cfg": of_timm("vit_large_patch14_clip_224", "token", None),
        "text_cfg": READS_PADDING,
    },
    "convnext": {"vision_cfg": of_timm("convnext_base", "", "linear", 64), "text_cfg": TEXT},
    "convnext_mlp": {"vision_cfg": of_timm("convnext_base", "", "mlp", 96), "text_cfg": TEXT},
    "eva": {"vision_cfg": of_timm("eva02_base_patch16_clip_224", "token", None), "text_cfg": TEXT},
    "pe_core": {"vision_cfg": of_timm("vit_pe_core_tiny_patch16_384", "map", None, 384), "text_cfg": TEXT},
    "gap": {"vision_cfg": of_timm("vit_medium_patch16_gap_256", "", "linear", 256), "text_cfg": TEXT},
    "nllb": {"vision_cfg": IMAGE, "text_cfg": HF_TEXT | {"hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"}},
    "xlm_roberta": {"vision_cfg": IMAGE, "text_cfg": HF_TEXT | {"hf_pooler_type": "mean_pooler"}},
    "roberta": {"vision_cfg": IMAGE, "text_cfg": HF_TEXT | {"hf_proj_type": "linear"}},
    "bert": {"vision_cfg": IMAGE, "text_cfg": HF_TEXT | {"hf_proj_type": "mlp", "hf_pooler_type": "cls_pooler"}},
    "mt5": {"vision_cfg": IMAGE, "text_cfg": HF_TEXT | {"hf_proj_type": "linear"}},
}
OF_TRANSFORMERS = {
    "nllb": {"model_type": "m2m_100", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32},
    "xlm_roberta": TOWER | {"model_type": "xlm-roberta", "max_position_embeddings": 20},
    "roberta": TOWER | {"model_type": "roberta", "max_position_embeddings": 20},
    "bert": TOWER | {"model_type": "bert"},
    "mt5": {"model_type": "mt5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
}


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """Also of OpenCLIP's byte pairs the first alone, which both sides read in no time."""
    for name, arguments in CUT.items():
        entry = partial(_registry._model_entrypoints[name], **arguments)
        monkeypatch.setitem(_registry._model_entrypoints, name, entry)
    monkeypatch.setattr(open_clip_tokenizers, "_NUM_MERGES", NUM_MERGES)
    lines = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).split(b"\n")[: NUM_MERGES + 1]
    packed = SimpleNamespace(open=lambda _: io.BytesIO(b"\n".join(lines)))
    monkeypatch.setattr(open_clip.tokenizer, "gzip", packed)


def text_folder(folder, architecture):
    """A text model's configuration and tokenizer, as on the hub."""
    tokenizer = letter_tokenizer(transformers.GemmaTokenizer, add_eos_token=True)
    ids = {"vocab_size": len(tokenizer) + 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = dict(architecture)
    transformers.CONFIG_MAPPING[config.pop("model_type")](**config | ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_folder(folder, kind):
    """A folder as OpenCLIP saves one, with all tensors random. Returns it, its model and its tokenizer."""
    folder.mkdir()
    config = {"embed_dim": 24} | json.loads(json.dumps(FAMILIES[kind]))
    if kind in OF_TRANSFORMERS:
        text = text_folder(folder / "text", OF_TRANSFORMERS[kind])
        config = json.loads(json.dumps(config).replace("{text}", str(text)))
        for file in text.glob("tokenizer*"):
            shutil.copy(file, folder)
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False, load_weights=False).eval()
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5) if "var" in name else torch.nn.init.normal_(tensor, std=0.2)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder, model, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def compare(encoder, model, tokenizer, texts=TEXTS):
    """Both sides, on an image of the model's size."""
    size = model.visual.image_size
    size_hw = (size, size) if isinstance(size, int) else size
    images = batch_images([noise(*size_hw, seed) for seed in (1, 2)], encoder.backbone.patch_size, 10**6)
    pixels = torch.stack([torch.from_numpy(unpatchify(images, i)).permute(2, 0, 1) for i in range(2)]) / 255
    mean, std = (torch.tensor(getattr(model.visual, f"image_{what}"))[:, None, None] for what in ("mean", "std"))
    theirs = model.encode_image((pixels - mean) / std, normalize=True)
    torch.testing.assert_close(encoder.embed_image(images), theirs, atol=1e-5, rtol=0)
    theirs = model.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(encoder.embed_text(texts), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_embeddings_are_those_of_open_clip(tmp_path, kind):
    folder, model, tokenizer = make_folder(tmp_path / "model", kind)
    encoder = indiclip.load(folder)
    compare(encoder, model, tokenizer)
    assert encoder.text.tokenizer.context_length == 12
    assert encoder.backbone.mean == pytest.approx([0.1, 0.2, 0.3])
    assert encoder.backbone.interpolation == "bilinear"
    if kind == "mobileclip_s":
        assert encoder.backbone.canvas_hw == (64, 64)


def test_a_file_for_one_of_its_architectures(tmp_path, monkeypatch):
    """A file that open_clip saved gives all of its tensors; one that lacks or has another is an error."""
    folder, model, tokenizer = make_folder(tmp_path / "model", "vit")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "ViT-Of-A-File.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    open_clip.add_model_config(tmp_path / "ViT-Of-A-File.json")
    tensors = load_file(folder / "open_clip_model.safetensors")
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{name}": t for name, t in tensors.items()}}, tmp_path / "epoch_1.pt"
    )
    name = f"open_clip:ViT-Of-A-File:{tmp_path}/epoch_1.pt"
    weights = read_weights(name)
    assert (weights.unused, weights.ignored) == ([], [])
    assert "mean and std of its pixels are CLIP's" in weights.notes[0]
    encoder = indiclip.load(name)
    with torch.no_grad():
        theirs = model.encode_text(tokenizer(TEXTS), normalize=True)
        torch.testing.assert_close(encoder.embed_text(TEXTS), theirs, atol=1e-5, rtol=0)
    assert encoder.initial_logits == {"logit_scale": float(tensors["logit_scale"])}
    for wrong, words in {
        "open_clip:ViT-Of-A-Fil:x": "OpenCLIP has no 'ViT-Of-A-Fil'; nearest is 'ViT-Of-A-File'",
        "open_clip:ViT-Of-A-File": "names no weights; expected open_clip:ViT-Of-A-File:FILE",
        f"open_clip:ViT-Of-A-File:{tmp_path}/epoch_2.pt": "no such file of weights; nearest is 'epoch_1.pt'",
        "open_clip:ViT-B-32:hf-hub:openia": "OpenCLIP has no weights 'openia' of ViT-B-32; nearest is 'openai'",
        "open_clip:ViT-B-32:hf-hub:openai": "expected open_clip:ViT-B-32-quickgelu:hf-hub:openai",
        "open_clip:ViT-B-32:openai": "openai is on the hub",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            read_weights(wrong)


def test_published_weights_without_a_network_say_what_to_bring(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"fetch its weights from .*, bring that file here and name open_clip:"):
        read_weights("open_clip:ViT-B-16-SigLIP:hf-hub:webli")


def test_its_own_tokenizer_gives_equal_ids(monkeypatch):
    texts = [
        *TEXTS, "தமிழ் বাংলা ಕನ್ನಡ", "don't I'LL ½ ²\n 1234", "<end_of_text> hi <START_OF_TEXT>", "schÃ¶n ＦＵＬＬ İ",
        "a\u200db\u200c c", "🪁🇮🇳👨‍👩‍👧", "\ud83d half", "long words " * 200,
    ]  # fmt: skip
    monkeypatch.undo()  # all byte pairs
    theirs = open_clip.SimpleTokenizer()
    for clean in ("lower", "whitespace", "canonicalize"):
        theirs.clean_fn = open_clip.tokenizer.get_clean_fn(clean)
        text_cfg = {"tokenizer_kwargs": {"clean": clean}}
        ours = open_clip_tokenizer(OpenClipSource("x", {"text_cfg": text_cfg}, {}, Path("x")), 77)
        assert ours.pad(ours.encode(texts), 77)[0].tolist() == theirs(texts).tolist()


@pytest.mark.parametrize("arguments", [{}, {"clean": "canonicalize"}, {"strip_sep_token": True}])
def test_tokenizers_of_transformers_give_equal_ids(tmp_path, arguments):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "kite", "##s", ",", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=12, **arguments)
    text_cfg = {"hf_tokenizer_name": "x", "tokenizer_kwargs": arguments}
    source = OpenClipSource("x", {"text_cfg": text_cfg}, {}, tmp_path / "x", tmp_path)
    ours = open_clip_tokenizer(source, 12)
    assert ours.pad(ours.encode(TEXTS), 12)[0].tolist() == theirs(TEXTS).tolist()
