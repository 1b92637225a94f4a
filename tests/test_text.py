"""Tokenizers and text towers."""

from pathlib import Path

import pytest
import torch
from helpers import ARCHITECTURE
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers

from indiclip.text import TextTower, describe
from indiclip.tokenizers import ByteTokenizer, FastTokenizer, SentencePieceTokenizer


def test_bytes_are_utf8_between_start_and_end():
    assert ByteTokenizer().encode(["aé"]) == [[1, ord("a") + 3, 0xC3 + 3, 0xA9 + 3, 2]]
    # NFC: e + combining acute is the same text as é.
    assert ByteTokenizer().encode(["ae\u0301"]) == ByteTokenizer().encode(["aé"])


def test_batch_is_padded_to_its_longest_and_long_texts_keep_their_end():
    ids_BT, valid_BT = ByteTokenizer(context_length=6)(["a", "abcdefgh"])
    assert ids_BT.shape == (2, 6)
    assert ids_BT[1, -1] == ByteTokenizer.end_id
    assert valid_BT.sum(1).tolist() == [3, 6]
    assert ByteTokenizer()(["पतंग"])[0].shape == (1, 2 + 12)


def test_padding_does_not_change_a_text():
    torch.manual_seed(0)
    tower = TextTower(ByteTokenizer(), ARCHITECTURE).eval()
    with torch.no_grad():
        alone = tower(*tower.tokenizer(["kite"]))
        beside = tower(*tower.tokenizer(["kite", "a much longer caption"]))
    torch.testing.assert_close(beside[0, :6], alone[0], atol=1e-5, rtol=1e-5)


@pytest.fixture
def tokenizer_file(tmp_path):
    vocabulary = {"<pad>": 0, "<unk>": 1, "a": 2, "red": 3, "kite": 4}
    tokenizer = RustTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_fast_tokenizer_from_file_folder_and_checkpoint(tokenizer_file):
    from_folder = FastTokenizer(str(tokenizer_file), context_length=3)
    from_file = FastTokenizer(str(tokenizer_file / "tokenizer.json"), context_length=3)
    rebuilt = FastTokenizer(**from_folder.to_config())
    for tokenizer in (from_folder, from_file, rebuilt):
        assert tokenizer.encode(["a red kite flies", "kite"]) == [[2, 3, 4], [4]]
        assert (tokenizer.vocab_size, tokenizer.pad_id) == (5, 0)


def test_sentencepiece_round_trip(tmp_path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("लाल पतंग\nपीला गेंदा\na red kite\na yellow marigold\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(str(tmp_path / "sp.model"), context_length=16)
    rebuilt = SentencePieceTokenizer(**tokenizer.to_config())
    rows = tokenizer.encode(["लाल पतंग", "a red kite"])
    assert rebuilt.encode(["लाल पतंग", "a red kite"]) == rows
    assert rows[0][-1] == tokenizer._processor.eos_id()
    assert tokenizer._processor.decode(rows[1]) == "a red kite"


def test_any_transformers_architecture_and_a_local_pretrained_folder(tmp_path):
    torch.manual_seed(0)
    clip = {"model_type": "clip_text_model", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip |= {"intermediate_size": 64, "max_position_embeddings": 64}
    tower = TextTower(ByteTokenizer(64), clip)
    tower.model.save_pretrained(tmp_path)
    again = TextTower(ByteTokenizer(64), pretrained=str(tmp_path))
    for name, weight in tower.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], weight)
    rebuilt = TextTower(ByteTokenizer(64), **{k: v for k, v in again.to_config().items() if k != "tokenizer"})
    assert rebuilt.model.state_dict().keys() == tower.model.state_dict().keys()
    assert describe(tower)["class_path"] == "indiclip.text.TextTower"


def test_the_encoder_of_an_encoder_decoder():
    t5 = {"model_type": "t5", "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16}
    tower = TextTower(ByteTokenizer(), t5)
    ids_BT, valid_BT = tower.tokenizer(["a kite", "पतंग"])
    assert tower(ids_BT, valid_BT).shape == (*ids_BT.shape, 32)
    assert not any("decoder" in name for name, _ in tower.named_parameters())


def test_a_pad_token_is_checked_and_carried():
    file = Path(__file__).parent.parent / "conf" / "tokenizers" / "mela.json"
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token: the vocabulary has no '<pda>'; nearest is '<pad>'"):
        FastTokenizer(str(file), pad_token="<pda>")
    tokenizer = FastTokenizer(str(file), pad_token="</s>")
    assert FastTokenizer(**tokenizer.to_config()).pad_id == tokenizer.pad_id != FastTokenizer(str(file)).pad_id


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of `architecture`"),
        ({"architecture": ARCHITECTURE | {"model_type": "brt"}}, ValueError, "no 'brt'; nearest is 'bert'"),
        ({"architecture": ARCHITECTURE | {"max_position_embeddings": 8}}, ValueError, "8 is less than"),
        ({"architecture": ARCHITECTURE | {"vocab_size": 100}}, ValueError, "has 259 ids"),
        # RoBERTa's positions start after the padding id.
        (
            {"architecture": ARCHITECTURE | {"model_type": "roberta", "max_position_embeddings": 256}},
            ValueError,
            "roberta cannot read texts of the tokenizer's context_length 256",
        ),
        ({"pretrained": "/no/such/folder"}, FileNotFoundError, "text.pretrained: '/no/such/folder'"),
    ],
)
def test_mistakes_name_the_key(arguments, error, message):
    with pytest.raises(error, match=message):
        TextTower(ByteTokenizer(), **arguments)
