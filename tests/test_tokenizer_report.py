"""`indiclip tokenizer report`: counts by hand, bounds, mistakes."""

import builtins
import json
import re
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, processors

from indiclip.cli import main
from indiclip.commands.tokenizer_report import ClipTokenizer, load, measure
from indiclip.datasets.corpora import Text

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import train_tokenizer


def report(capsys, *words):
    """Exit status, what was printed, and what was said on stderr."""
    status = main(["tokenizer", "report", *map(str, words)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def words_file(tmp_path):
    """A vocabulary of three words; `[CLS]` and `[SEP]` around every text."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "red": 4, "kite": 5, "पतंग": 6}
    tokenizer = RustTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.tsv"
    file.write_text("en\thi\nred kite!\tलाल पतंग\nred red red\tपतंग\n", encoding="utf-8")
    return file


def test_counts_by_hand(capsys, words_file, texts):
    """English: `red kite !` and `red red red` are 6 tokens in 5 words; five with start and end are one too many."""
    status, out, _ = report(capsys, words_file, "bytes", "--text", texts, "--context_length", 4, "--json")
    assert status == 0
    found = json.loads(out)["tokenizers"]
    by_words, by_bytes = found[str(words_file)], found["bytes"]
    assert by_words["languages"]["en"] == {
        **{"texts": 2, "words": 5, "tokens": 6, "truncated": 2, "unknown": 1},
        **{"tokens_per_word": 1.2, "truncated_share": 1.0},
    }
    assert by_words["languages"]["hi"] == {
        **{"texts": 2, "words": 3, "tokens": 3, "truncated": 0, "unknown": 1},
        **{"tokens_per_word": 1.0, "truncated_share": 0.0},
    }
    assert by_words["ratio"] == 1.2
    assert by_bytes["languages"]["en"]["tokens"] == len("red kite!" + "red red red")
    assert by_bytes["languages"]["hi"]["tokens"] == len("लाल पतंग" + "पतंग") * 3 - 2
    assert (by_bytes["vocab_size"], by_bytes["context_length"]) == (259, 4)


def test_a_text_of_the_context_length_is_whole(words_file):
    for length, truncated in ((4, 0), (3, 1)):
        counts = measure(load(str(words_file), length), {"en": ["red kite"]})["en"]
        assert (counts.tokens, counts.truncated) == (2, truncated)


def test_letters_that_a_tokenizer_drops_are_unknown(tmp_path):
    """A BPE without bytes and without an unknown token says nothing of what it does not know."""
    tokenizer = RustTokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    counts = measure(load(str(tmp_path), 64), {"hi": ["ab aक b", "तग"]})["hi"]
    assert (counts.tokens, counts.unknown) == (3, 3)


def test_sentencepiece_counts_its_unknown(tmp_path):
    import sentencepiece

    (tmp_path / "text.txt").write_text("a red kite\na yellow marigold\n" * 20, encoding="utf-8")
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sp"), **options
    )
    counts = measure(load(str(tmp_path / "sp.model"), 64), {"en": ["a kite"], "hi": ["a पतंग"]})
    assert [counts["en"].unknown, counts["hi"].unknown] == [0, 1]


def test_clip_counts_as_openclip_does():
    open_clip = pytest.importorskip("open_clip")
    texts = ["A diagram", "एक पतंग", "a photo of a dog's kite " * 20]
    ours, theirs = ClipTokenizer(77).encode(texts), open_clip.tokenize(texts)
    for row, expected in zip(ours, theirs.tolist(), strict=True):
        assert row == expected[: len(row)]
        assert not any(expected[len(row) :])
    assert ClipTokenizer().encode(["a diagram"]) == [[49406, 320, 22697, 49407]]  # of the CLIP paper's repository
    assert ClipTokenizer().decode([[49406, 320, 22697, 49407]]) == ["a diagram"]


def test_clip_without_openclip_says_what_to_install(monkeypatch, capsys, texts):
    really = builtins.__import__

    def without(name, *rest):
        if name == "open_clip":
            raise ImportError(name)
        return really(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    status, _, err = report(capsys, "clip", "--text", texts)
    assert (status, err) == (
        2,
        "indiclip tokenizer report: clip: its tokenizer comes with OpenCLIP: pip install open_clip_torch\n",
    )


@pytest.mark.parametrize(
    ("bounds", "line"),
    [
        (["--max_tokens_per_word", "1.2"], None),
        (["--max_tokens_per_word", "1.1"], "en: 1.2 tokens per word; at most 1.1 expected"),
        (["--max_tokens_per_word", "en=1.2", "1.1"], None),
        (["--max_tokens_per_word", "hi=0.9"], "hi: 1 tokens per word; at most 0.9 expected"),
        (["--max_ratio", "1.2"], None),
        (["--max_ratio", "1.1"], "en: 1.2 times the tokens per word of hi; at most 1.1 expected"),
        (["--max_truncated", "0.5"], "en: 1 of the texts cut; at most 0.5 expected"),
        (["--max_unknown", "1"], None),
        (["--max_unknown", "0"], "hi: 1 unknown; at most 0 expected"),
    ],
)
def test_a_broken_bound_ends_with_1(capsys, words_file, texts, bounds, line):
    """The bytes beside it break every bound, which counts for nothing."""
    status, out, _ = report(capsys, words_file, "bytes", "--text", texts, "--context_length", 4, *bounds)
    assert status == (line is not None)
    assert (f"{words_file}: {line}" in out.splitlines()) == (line is not None)
    assert "expected" not in out or line is not None


def test_held_out_only(capsys, tmp_path):
    keys = [f"row {i}" for i in range(200)]
    (tmp_path / "a.tsv").write_text("en\n" + "\n".join(keys) + "\n")
    _, out, _ = report(capsys, "bytes", "--text", tmp_path / "a.tsv", "--held_out_only", "--json")
    expected = sum(Text("en", key, key).is_held_out(0.1) for key in keys)
    assert json.loads(out)["tokenizers"]["bytes"]["languages"]["en"]["texts"] == expected > 0


def test_a_config_has_its_own_tokenizer_and_context_length(capsys, texts, tmp_path):
    bytes_of_200 = "{class_path: indiclip.tokenizers.ByteTokenizer, init_args: {context_length: 200}}"
    (tmp_path / "x.yaml").write_text(f"model: {{encoder: {{text: {{tokenizer: {bytes_of_200}}}}}}}")
    _, out, _ = report(capsys, tmp_path / "x.yaml", "--text", texts)
    assert "x.yaml (259 ids)" in out
    assert "cut at 200" in out
    (tmp_path / "y.yaml").write_text("model: {}")
    status, _, err = report(capsys, tmp_path / "y.yaml", "--text", texts)
    assert (status, "y.yaml: no key model.encoder.text.tokenizer" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["byte", "--text", "{texts}"], "byte: no such file or folder.*expected a file, a folder.*nearest is 'bytes'"),
        (["{texts}", "--text", "{texts}"], r"tokenizer\.source: .*texts\.tsv is not a tokenizer\.json: expected"),
        (["{folder}", "--text", "{texts}"], r"tokenizer\.source: .*empty: found no tokenizer; expected tokenizer"),
        (
            ["bytes", "--text", "{texts}", "--context_length", "2"],
            r"tokenizer\.context_length: found 2; expected 3 or more",
        ),
        (["bytes", "--text", "gone.tsv"], "gone.tsv: no such file or folder"),
        (["bytes", "--text", "{texts}", "--max_tokens_per_word", "hii=1"], "no language 'hii'; nearest is 'hi'"),
        (["bytes", "--text", "{texts}", "--max_tokens_per_word", "hi"], "found 'hi'; expected a number, or such as hi"),
        (["bytes", "--text", "{texts}", "--max_truncated", "2"], "found '2'; expected a share from 0 to 1"),
        (
            ["bytes", "--text", "{texts}", "--held_out_only", "--holdout", "0"],
            "--text: no held-out text in .*texts.tsv",
        ),
        (["bytes", "--text", "{texts}", "--jsn"], "--jsn: no such option; nearest is '--json'"),
    ],
)
def test_mistakes_end_with_2_and_a_line(capsys, texts, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    status, _, err = report(capsys, *(word.format(texts=texts, folder=tmp_path / "empty") for word in words))
    assert status == 2
    assert err.startswith("indiclip tokenizer report: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err


@pytest.mark.slow
def test_indian_words_cost_little_on_held_out_rows(tmp_path, capsys, data_root):
    """The numbers of BENCHMARKS.md, of a tokenizer that never saw these rows in any language."""
    files = sorted(map(str, (data_root / "text").iterdir()))
    train_tokenizer.main(["--text", *files, "--vocab-size", "64000", "--out", str(tmp_path / "india")])
    capsys.readouterr()
    bounds = ["--max_tokens_per_word", "2.2", "hi=1.5", "en=1.5", "--max_ratio", "1.7", "--max_truncated", "0.01"]
    status, out, _ = report(
        capsys, tmp_path / "india", "--text", *files, "--held_out_only", *bounds, "--max_unknown", 0
    )
    assert status == 0, out
