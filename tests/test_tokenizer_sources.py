"""Tokenizers of files, folders and the hub, and what is said of those that cannot be read."""

import json

import pytest

from indiclip.tokenizers import FastTokenizer, SentencePieceTokenizer, SiglipTokenizer

VOCABULARY = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nkite\n"


@pytest.mark.parametrize("files", [{"config.json": '{"model_type": "bert"}'}, {}])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, files):
    """Of which transformers would make a vocabulary of 5 words."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(FileNotFoundError, match=rf"^tokenizer.source: {tmp_path}: found no tokenizer; expected tok"):
        FastTokenizer(str(tmp_path))


def test_a_folder_of_other_files_is_what_transformers_makes_of_it(tmp_path):
    """As MuRIL's, which has a vocab.txt alone."""
    from transformers import AutoTokenizer

    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "vocab.txt").write_text(VOCABULARY)
    texts = ["kite", "a drum"]
    assert FastTokenizer(str(tmp_path)).encode(texts) == AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"]
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "spiece.model").write_text("x")
    with pytest.raises(FileNotFoundError, match="BertTokenizer finds none of tokenizer.json, vocab.txt"):
        FastTokenizer(str(tmp_path))  # transformers makes up a vocabulary here, too


CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
OF_CODE = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Slow", "code.Fast"]}}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes a repository `me/NAME` of files in the hub's local cache, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def repository(name, files):
        folder = tmp_path / "hub" / f"models--me--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        for file, content in files.items():
            (snapshot / file).write_text(content)
        return f"me/{name}"

    return repository


def test_a_tokenizer_of_the_hub(hub):
    name = hub("words", {"config.json": '{"model_type": "bert"}', "vocab.txt": VOCABULARY})
    assert FastTokenizer(name).encode(["kite", "drum"]) == [[2, 5, 3], [2, 1, 3]]


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (
            {"config.json": '{"model_type": "bert"}'},
            FileNotFoundError,
            "tokenizer.source: me/name of the hub: found no tokenizer; expected tokenizer.json, or vocab.json with",
        ),
        (
            {"config.json": '{"model_type": "vits"}', "vocab.json": '{"a": 0}', "merges.txt": ""},
            ValueError,
            "tokenizer.source: me/name of the hub has a VitsTokenizer; expected one that has a tokenizer.json",
        ),
        (
            {"config.json": json.dumps(CODE), "tokenizer_config.json": json.dumps(OF_CODE), "vocab.txt": "a\n"},
            ValueError,
            "tokenizer.source: transformers cannot read me/name of the hub (code that comes with it is not run): The",
        ),
    ],
)
def test_a_repository_without_a_tokenizer_that_we_read_is_refused(hub, monkeypatch, files, error, message):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with pytest.raises(error) as found:
        FastTokenizer(hub("name", files))
    assert str(found.value).startswith(message)
    assert "\n" not in str(found.value)
    assert asked == []


def test_a_name_that_is_nowhere(hub):
    for name in ("me/nothing", "/no/such/tokenizer.json"):
        with pytest.raises(FileNotFoundError, match=f"tokenizer.source: '{name}' is no file, no folder with a tok"):
            FastTokenizer(name)


@pytest.mark.parametrize("content", [b"", b"{red", b"{}", b"\xff\xfe", b"[]"])
def test_what_is_no_tokenizer_is_named(tmp_path, content):
    file = tmp_path / "x"
    file.write_bytes(content)
    for kind, what in ((FastTokenizer, "a tokenizer.json"), (SentencePieceTokenizer, "a SentencePiece model")):
        with pytest.raises(ValueError, match=rf"^tokenizer\.source: {file} is not {what}: .") as found:
            kind(str(file))
        assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"^tokenizer\.serialized: not the content of a tokenizer\.json: ."):
        FastTokenizer(serialized=content.decode(errors="replace"))
    message = r"^tokenizer\.serialized: not the bytes of a SentencePiece model in base64: ."
    for broken in ("eHh4", "eHh4e"):  # no model; no base64
        with pytest.raises(ValueError, match=message):
            SiglipTokenizer(serialized=broken)
