"""tools/train_tokenizer.py on text files."""

import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Siglip2Tokenizer

from indiclip.datasets.corpora import Text
from indiclip.datasets.split import Split
from indiclip.generated.mela import Mela
from indiclip.tokenizers import FastTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import train_tokenizer

WORDS = {
    "en": ["red", "kite", "marigold", "don't", "stop"],
    "hi": ["लाल", "पतंग", "गेंदा", "क्षत्रिय", "हिन्दी"],
    "ml": ["മലയാളം", "പട്ടം", "ന്\u200d", "ക്ഷേത്രം", "ചുവപ്പ്"],
}


def table(file, rows=200, seed=0):
    """A parallel table of random sentences; languages' sentences of a row share its key, the English one."""
    rng = random.Random(seed)
    lines = ["\t".join(WORDS)]
    lines += ["\t".join(" ".join(rng.choices(words, k=8)) for words in WORDS.values()) for _ in range(rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def trained(out, *files, **options):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    train_tokenizer.main(["--text", *map(str, files), "--out", str(out), *words])
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizer")
    return trained(base / "deep" / "small", table(base / "a.tsv"), vocab_size=400)


def random_text(rng):
    """Letters of India's scripts, signs, joiners, emoji, and anything else that Unicode has."""
    ranges = [(0x20, 0x7E), (0x900, 0xD7F), (0x600, 0x6FF), (0x200C, 0x200D), (0x1F300, 0x1FAFF), (0x300, 0x36F)]
    ranges += [(0, 0xD7FF), (0xE000, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 30)))


def test_every_text_comes_back_in_nfc_and_transformers_gives_the_same_ids(folder):
    ours = FastTokenizer(str(folder), context_length=10_000)
    theirs = [
        AutoTokenizer.from_pretrained(folder),
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")),
    ]
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(500)] + ["", " ", "  a  b\n", "क\u094d\u200dष", "👩🏽‍🚀👨‍👩‍👧"]
    rows = ours.encode(texts)
    for text, row in zip(texts, rows, strict=True):
        assert ours._tokenizer.decode(row) == unicodedata.normalize("NFC", text)
    # Theirs normalises by the Unicode of its library, which is older than Python's: texts in NFC are the same to both.
    normal = [unicodedata.normalize("NFC", text) for text in texts]
    for tokenizer in theirs:
        assert tokenizer(normal)["input_ids"] == rows
    assert theirs[0].pad_token_id == ours.pad_id
    assert ours.count_unknown(texts) == 0


def test_half_of_a_surrogate_pair_is_refused(folder):
    with pytest.raises(ValueError, match=r"tokenizer: 'a\\ud83d' has half of a surrogate pair; expected Unicode text"):
        FastTokenizer(str(folder)).encode(["kite", "a\ud83d"])


def test_words_are_split_at_spaces_and_punctuation_only():
    split = pre_tokenizers.Split(Regex(train_tokenizer.PIECES), "isolated")
    text = "हिन्दी की क\u094d\u200dष, അവന\u0d4d\u200d! don't (অ’ভাৰ) 3.5  …"
    pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
    expected = ["हिन्दी", " की", " क\u094d\u200dष", ",", " അവന\u0d4d\u200d", "!", " don't", " (", "অ’ভাৰ", ")"]
    assert pieces == [*expected, " 3", ".", "5", "  ", "…"]


def test_balanced_counts():
    """Most has 100: 100, then 100 * (25 / 100) ** 0.5 = 50 = each twice, then 100 * (1 / 100) ** 0.5 = 10."""
    texts = {"en": [f"e{i}" for i in range(100)], "hi": [f"h{i}" for i in range(25)], "sat": ["s"]}
    assert list(train_tokenizer.balanced(texts, 0.5)) == [*texts["en"], *texts["hi"], *texts["hi"], *["s"] * 10]
    assert list(train_tokenizer.balanced(texts, 1)) == [*texts["en"], *texts["hi"], "s"]
    assert len(list(train_tokenizer.balanced(texts, 0))) == 300
    assert list(train_tokenizer.balanced({}, 0.5)) == []


def test_held_out_rows_change_nothing(tmp_path):
    """The same tokenizer to the byte where every held-out row's other languages say something else, or are gone."""
    whole = table(tmp_path / "whole.tsv")
    header, *rows = whole.read_text("utf-8").splitlines()
    is_held_out = [Text("en", row.split("\t")[0], row.split("\t")[0]).is_held_out(0.1) for row in rows]
    assert 0 < sum(is_held_out) < len(rows)
    others = [row.split("\t")[0] + "\tzzz qqq\tqqq" if out else row for row, out in zip(rows, is_held_out, strict=True)]
    gone = [row for row, out in zip(rows, is_held_out, strict=True) if not out]
    files = [whole]
    for name, lines in (("others", others), ("gone", gone)):
        files.append(tmp_path / f"{name}.tsv")
        files[-1].write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    made = [trained(file.with_suffix(".json"), file, vocab_size=320).read_bytes() for file in files]
    assert made[0] == made[1] == made[2]
    assert trained(tmp_path / "all.json", files[1], vocab_size=320, holdout=0).read_bytes() != made[1]


def test_captions_of_a_part_of_a_dataset_that_tells_them_by_its_samples_only(tmp_path):
    """Through a config: all languages of the scenes that are not held out, and no others."""
    mela = {
        "class_path": "indiclip.generated.mela.Mela",
        "init_args": {"num_scenes": 8, "size": 48, "languages": ["en", "hi"]},
    }
    part = {"class_path": "indiclip.datasets.split.Split", "init_args": {"part": "train", "dataset": mela}}
    config = tmp_path / "x.yaml"
    config.write_text(json.dumps({"data": {"train": [{"task": "a", "dataset": part, "batch_size": 1}]}}))
    scenes = Split(Mela(8, 48, languages=["en", "hi"]), "train")
    expected = [text for i in range(len(scenes)) for texts in scenes[i]["captions"].values() for text in texts]
    assert list(train_tokenizer.captions_of(config, 100)) == expected
    assert 2 <= len(expected) < 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocab-size", "300"], "give --config, --text, or both"),
        (["--text", "gone.tsv"], "--text: gone.tsv: no such file or folder"),
        (["--text", "{table}", "--holdout", "1"], "a.tsv (--holdout 1.0)"),
        (["--text", "gone.tsv", "--holdout", "2"], "--holdout: found 2.0, expected 0 to 1"),
    ],
)
def test_mistakes_in_the_words(words, message, capsys, tmp_path):
    words = [word.format(table=table(tmp_path / "a.tsv")) for word in words]
    with pytest.raises(SystemExit) as stopped:
        train_tokenizer.main([*words, "--out", str(tmp_path / "x.json")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_one_of_siglip_2s_kind_is_read_the_same_by_its_class_in_transformers(tmp_path):
    file = tmp_path / "tokenizer.json"
    train_tokenizer.main(
        ["--text", str(table(tmp_path / "a.tsv")), "--siglip2", "--vocab-size", "500", "--out", str(file)]
    )
    ours = FastTokenizer(str(file), context_length=64)
    state = json.loads(file.read_text())
    assert [token["content"] for token in state["added_tokens"]] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert not any("\u2581" in token[1:] for token in state["model"]["vocab"])  # no token goes on into another word
    theirs = Siglip2Tokenizer.from_pretrained(tmp_path, padding_side="right")
    texts = ["Red KITE, don't", "हिन्दी पतंग", "日本 <0x41> qz", "", "  two  spaces "]
    assert ours.encode(texts) == theirs(texts)["input_ids"]
    assert [row[-1] for row in ours.encode(texts)] == [1] * len(texts)
    assert theirs.decode(ours.encode(["Red 日本"])[0], skip_special_tokens=True) == "red 日本"
