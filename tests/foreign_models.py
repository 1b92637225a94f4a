"""Small models of other libraries, all tensors random, as folders on disk."""

import pytest
import sentencepiece
import torch
import transformers

TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="session")
def spiece(tmp_path_factory):
    """A SentencePiece model of a handful of words."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "text").write_text("a photo of a kite and a drum\nमसाला डोसा और चाय\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        character_coverage=1.0,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return str(folder / "spiece.model")


def byte_vocabulary():
    """What a CLIP tokenizer without merges needs: each byte, inside and at the end of a word."""
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def make_clip(folder, kind="clip"):
    vocabulary = byte_vocabulary()
    ids = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    text = TOWER | ids | {"vocab_size": len(vocabulary), "max_position_embeddings": 12}
    config = transformers.CONFIG_MAPPING[kind](
        text_config=text, vision_config=TOWER | {"image_size": 32, "patch_size": 8}, projection_dim=24
    )
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return save(folder, config, transformers.CLIPProcessor(images, tokenizer))


def make_siglip(folder, spiece):
    tokenizer = transformers.SiglipTokenizer(spiece, model_max_length=16, model_input_names=["input_ids"])
    text = TOWER | {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 16, "projection_size": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config=TOWER | {"image_size": 32, "patch_size": 8})
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    return save(folder, config, transformers.SiglipProcessor(images, tokenizer))


def letter_tokenizer(kind, **arguments):
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters, *(f"<0x{i:02X}>" for i in range(256))]
    as_released = {"model_input_names": ["input_ids"], "padding_side": "right"}
    return kind(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], **as_released, **arguments)


def make_siglip2(folder):
    tokenizer = letter_tokenizer(transformers.Siglip2Tokenizer)
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 16}
    config = transformers.Siglip2Config(text_config=text, vision_config=TOWER | {"num_patches": 16, "patch_size": 16})
    images = transformers.Siglip2ImageProcessor(patch_size=16)
    return save(folder, config, transformers.Siglip2Processor(images, tokenizer))


def save(folder, config, processor):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # CLIP's own beginning gives all images nearly one embedding
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, spiece):
    root = tmp_path_factory.mktemp("transformers")
    return {
        "clip": make_clip(root / "clip"),
        "metaclip_2": make_clip(root / "metaclip_2", "metaclip_2"),
        "siglip": make_siglip(root / "siglip", spiece),
        "siglip2": make_siglip2(root / "siglip2"),
    }
