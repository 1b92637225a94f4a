"""Text and image towers of transformers alone: their vectors are those of the library's own classes."""

import pytest
import torch
import transformers
from foreign_models import TOWER, letter_tokenizer

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.pretrained.init_from import InitFrom

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
    letter_tokenizer(transformers.PreTrainedTokenizerFast) if False else tokenizer.save_pretrained(folder)
    return model, tokenizer


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
