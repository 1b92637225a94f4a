"""Tokenizers and text towers."""

import json
from pathlib import Path

import pytest
import torch
from helpers import ARCHITECTURE
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, processors

from indiclip.backbone import NaFlexViT
from indiclip.encoder import Encoder
from indiclip.pretrained.open_clip_source import OpenClipSource
from indiclip.pretrained.open_clip_tokenizers import open_clip_tokenizer
from indiclip.text import TextTower, describe
from indiclip.tokenizers import ByteTokenizer, FastTokenizer, SentencePieceTokenizer, SiglipTokenizer

ROOT = Path(__file__).parent.parent


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


@pytest.mark.parametrize("texts", [["a", "a" * 30], ["ab", "ba"]], ids=["packed", "padded"])
def test_states_are_no_tensor_of_the_last_layer(texts):
    """Shards gather a tower's weights before those of its layer as gradients reach it, whatever texts a rank has."""
    tower, given = TextTower(ByteTokenizer(), ARCHITECTURE), []
    tower.model.encoder.layer[-1].register_forward_hook(lambda _, __, output: given.append(output))
    rows = tower.tokenizer.encode(texts)
    states = tower(*tower.padded(rows), [len(row) for row in rows])
    order = []
    states.register_hook(lambda _: order.append("tower"))
    output = given[0] if isinstance(given[0], torch.Tensor) else given[0][0]
    output.register_hook(lambda _: order.append("layer"))
    states.sum().backward()
    assert order == ["tower", "layer"]


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


@pytest.fixture
def spiece(tmp_path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("लाल पतंग\nपीला गेंदा\na red kite\na yellow marigold\n" * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(tmp_path / "sp.model")


def test_sentencepiece_round_trip(spiece):
    tokenizer = SentencePieceTokenizer(spiece, context_length=16)
    rebuilt = SentencePieceTokenizer(**tokenizer.to_config())
    rows = tokenizer.encode(["लाल पतंग", "a red kite"])
    assert rebuilt.encode(["लाल पतंग", "a red kite"]) == rows
    assert rows[0][-1] == tokenizer._processor.eos_id()
    assert tokenizer._processor.decode(rows[1]) == "a red kite"


def words(vocabulary, frame=True):
    """The content of a tokenizer.json of whole words; `[CLS]` and `[SEP]` around every text, or nothing."""
    tokenizer = RustTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if frame:
        special = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return tokenizer.to_str()


FRAMED = words({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "red": 4, "kite": 5})
BARE = words({"[UNK]": 0, "red": 1, "kite": 2}, frame=False)


@pytest.mark.parametrize(
    ("kind", "least"), [("bytes", 3), ("framed", 3), ("bare", 1), ("sentencepiece", 3), ("siglip", 2)]
)
def test_no_text_is_longer_than_the_context_which_holds_a_token_at_least(spiece, kind, least):
    def make(context_length):
        if kind == "bytes":
            return ByteTokenizer(context_length)
        if kind in ("framed", "bare"):
            return FastTokenizer(serialized=FRAMED if kind == "framed" else BARE, context_length=context_length)
        return (SentencePieceTokenizer if kind == "sentencepiece" else SiglipTokenizer)(spiece, context_length)

    whole, empty = make(100).encode(["red kite " * 9, ""])
    for context_length in range(least, least + 3):
        row = make(context_length).encode(["red kite " * 9])[0]
        assert len(row) == context_length > len(empty)
        keep = context_length - len(empty)
        start = len(empty) - (len(empty) > 0)  # the frame's last token stands behind
        assert row[: start + keep] == whole[: start + keep]
        assert row[start + keep :] == whole[-1:] * (len(empty) > 0)
    for context_length in (least - 1, 0, -1):
        message = rf"^tokenizer\.context_length: found {context_length}; expected {least} or more$"
        with pytest.raises(ValueError, match=message):
            make(context_length)


@pytest.mark.parametrize("kind", ["bytes", "framed", "sentencepiece", "siglip"])
def test_half_of_a_surrogate_pair_is_refused_in_the_same_words_by_all(spiece, kind):
    tokenizer = {
        "bytes": ByteTokenizer,
        "framed": lambda: FastTokenizer(serialized=FRAMED),
        "sentencepiece": lambda: SentencePieceTokenizer(spiece),
        "siglip": lambda: SiglipTokenizer(spiece),
    }[kind]()
    message = r"^tokenizer: 'a\\ud83d' has half of a surrogate pair; expected Unicode text$"
    with pytest.raises(ValueError, match=message):
        tokenizer(["kite", "a\ud83d"])
    if kind != "bytes":
        with pytest.raises(ValueError, match=message):
            tokenizer.count_unknown(["kite", "a\ud83d"])
    assert tokenizer(["kite", "👩🏽‍🚀"])[0].shape[0] == 2


CAPTIONS = ["a red kite", "लाल पतंग", "एक ज्ञानी क्षत्रिय", "a  kite\tflies, high!", ""]


@pytest.mark.parametrize(
    "kind", ["bytes", "mela", "pictograms", "portable", "framed", "clip", "sentencepiece", "siglip"]
)
def test_what_is_encoded_comes_back_as_text(spiece, kind):
    """Without its frame. Of what a tokenizer changes first, what is left of it: encoding that gives the same ids."""
    if kind in ("mela", "pictograms", "portable"):
        tokenizer = FastTokenizer(str(ROOT / "conf" / "tokenizers" / f"{kind}.json"))
    elif kind in ("bytes", "framed"):
        tokenizer = ByteTokenizer() if kind == "bytes" else FastTokenizer(serialized=FRAMED)
    elif kind == "clip":
        pytest.importorskip("open_clip")
        tokenizer = open_clip_tokenizer(OpenClipSource("", {"text_cfg": {}}, {}, Path()), 77)
    else:
        tokenizer = (SentencePieceTokenizer if kind == "sentencepiece" else SiglipTokenizer)(spiece)
    texts = {"framed": ["red kite", "kite", ""], "sentencepiece": CAPTIONS[:2], "siglip": CAPTIONS[:2]}.get(
        kind, CAPTIONS
    )
    rows = tokenizer.encode(texts)
    decoded = tokenizer.decode(rows)
    if kind in ("bytes", "mela", "pictograms", "framed"):
        assert decoded == texts
    assert tokenizer.encode(decoded) == rows
    plain = [[id for id in row if id not in tokenizer.frame_ids] for row in rows]
    assert tokenizer.decode(plain) == decoded
    frames = {"bytes": {1, 2}, "mela": {1, 2}, "pictograms": {1, 2}, "portable": {1}, "framed": {2, 3}}
    expected = frames.get(kind, {*tokenizer.encode([""])[0]})
    assert tokenizer.frame_ids == expected
    assert all(len(row) - len(bare) == len(expected) for row, bare in zip(rows, plain, strict=True))


def test_a_cut_character_is_no_error():
    row = ByteTokenizer(context_length=6).encode(["पतंग"])[0]
    assert ByteTokenizer().decode([row]) == ["प\ufffd"]


def test_a_text_without_tokens_is_one_padding_token():
    """Alone and beside others alike: what a tower makes of the padding token, and finite."""
    tokenizer = FastTokenizer(serialized=BARE)
    ids_BT, valid_BT = tokenizer(["", ""])
    assert (ids_BT.dtype, ids_BT.tolist(), valid_BT.tolist()) == (torch.long, [[0], [0]], [[True], [True]])
    assert [part.tolist() for part in tokenizer(["", "red kite"])] == [[[0, 0], [1, 2]], [[True, False], [True, True]]]
    ids_BT, valid_BT = tokenizer([])
    assert (ids_BT.dtype, ids_BT.shape, valid_BT.shape) == (torch.long, (0, 0), (0, 0))


@pytest.mark.parametrize("text_pool", ["attention", "mean", "class", "eos", "last", "pooler"])
@pytest.mark.parametrize("pad", ["longest", "context"])
def test_a_text_without_tokens_has_an_embedding(text_pool, pad):
    torch.manual_seed(0)
    tower = TextTower(FastTokenizer(serialized=BARE, context_length=4), ARCHITECTURE, pad=pad)
    backbone = NaFlexViT(width=32, depth=1, num_heads=2, patch_size=8)
    encoder = Encoder(backbone, tower, 32, (16,), "mean", text_pool).eval()
    with torch.no_grad():
        alone, beside = encoder.embed_text([""]), encoder.embed_text(["red kite", "", "kite"])
        # The unknown word has id 0, with which this tokenizer fills, having no padding token.
        unknown = encoder.embed_text(["drum"])
    assert alone.isfinite().all()
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(1))
    torch.testing.assert_close(alone, unknown)
    if text_pool != "last":  # which reads the last position, padding or not
        torch.testing.assert_close(beside[1:2], alone, atol=1e-5, rtol=1e-5)


def test_a_vocabulary_that_skips_ids_has_room_for_the_largest():
    tokenizer = FastTokenizer(serialized=words({"a": 0, "b": 1, "[UNK]": 5}, frame=False))
    assert tokenizer.vocab_size == 6
    tower = TextTower(tokenizer, ARCHITECTURE)
    assert tower.model.config.vocab_size == 6
    assert tower(*tokenizer(["a drum"])).shape == (1, 2, 32)
    with pytest.raises(ValueError, match=r"tokenizer\.source: found an empty vocabulary"):
        FastTokenizer(serialized=RustTokenizer(models.BPE()).to_str())


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "tokenizers").glob("*.json")), ids=lambda file: file.stem)
def test_a_vocabulary_without_gaps_is_as_large_as_its_library_says(file):
    """Else embedding tables of saved checkpoints would no longer fit."""
    assert FastTokenizer(str(file)).vocab_size == RustTokenizer.from_file(str(file)).get_vocab_size()


def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    code = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": code}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    message = r"^text\.pretrained: transformers cannot load .*code that comes with it is not run\): The repository"
    with pytest.raises(ValueError, match=message) as found:
        TextTower(ByteTokenizer(), pretrained=str(tmp_path))
    assert "\n" not in str(found.value)
    assert asked == []
    assert not (tmp_path / "ran").exists()


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
