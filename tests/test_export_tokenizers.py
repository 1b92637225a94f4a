"""Tokenizers leave with the ids of ours: the other library's own tokenizer gives them, or the export says why not."""

import html
import random
from pathlib import Path

import ftfy
import open_clip
import pytest
import transformers
from export_runs import clip, filled, portable, siglip_text
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

import indiclip
from indiclip.config_files import SHIPPED
from indiclip.export.exporter import Refused, export
from indiclip.export.source import Source
from indiclip.export.target import find_target, target_names
from indiclip.pretrained.open_clip_source import OpenClipSource
from indiclip.pretrained.open_clip_tokenizers import open_clip_tokenizer
from indiclip.tokenizers import FastTokenizer

PORTABLE = str(SHIPPED / "tokenizers" / "portable.json")
CLEANINGS = ["whitespace", "lower", "canonicalize"]
TEXTS = ["Two brass lamps, and a drum!", "a!!! b !c_d", "kite &amp;amp; a", "  two  spaces\t\n", "", "long words " * 80]
TEXTS += [
    "लड\u095cका",
    "cafe\u0301",
    "“a Photo”, of: schÃ¶n ＦＵＬＬ",
    "क\u094d\u200dष न\u200cम 🪁",
    "e&#x301; &#2396;",
]
TEXTS += ["\u00a0a\u2003b\u3000"]


def messy_texts(seed, count=300):
    """Letters of India's scripts and of English, marks, spaces of all kinds, punctuation, pieces of HTML."""
    rng = random.Random(seed)
    ranges = [(0x20, 0x7E), (0x900, 0xD7F), (0xA0, 0x24F), (0x300, 0x36F), (0x2000, 0x200D), (0x1F300, 0x1F6FF)]
    pieces = [chr(code) for first, last in ranges for code in range(first, last + 1)]
    pieces += ["&amp;", "&lt;", "&nbsp;", " ", "  ", "\t", "\n", "kite", "a drum", "लड", "ड़"] * 20
    return TEXTS + ["".join(rng.choices(pieces, k=rng.randint(0, 20))) for _ in range(count)]


def ids(tokenizer, texts):
    return tokenizer.pad(tokenizer.encode(texts), tokenizer.context_length)[0].tolist()


def source(encoder):
    return Source(filled(encoder), "it", "its weights", None)


def open_clips_own(clean):
    return open_clip_tokenizer(
        OpenClipSource("x", {"text_cfg": {"tokenizer_kwargs": {"clean": clean}}}, {}, Path("x")), 64
    )


@pytest.mark.parametrize("clean", CLEANINGS)
@pytest.mark.parametrize("kind", ["own", "file"])
def test_open_clip_cleans_texts_as_the_run_did(tmp_path, kind, clean):
    """With its own byte pairs, whose padding is an exclamation mark, and with any other tokenizer."""
    tokenizer = open_clips_own(clean) if kind == "own" else FastTokenizer(PORTABLE, 64, clean=clean)
    record = export(source(clip(tokenizer)), "open_clip", tmp_path / "out")
    assert record["losses"] == []
    assert all(row["embedding"]["difference"] <= record["bound"] for row in record["text"].values())
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    texts = messy_texts(1)
    assert theirs(texts).tolist() == ids(tokenizer, texts)
    back = indiclip.load(tmp_path / "out").text.tokenizer
    assert back.encode(texts) == tokenizer.encode(texts)


@pytest.mark.parametrize("clean", [None, "nothing"])
def test_texts_that_open_clip_alone_cleans_are_said_to_differ(tmp_path, clean):
    record = export(source(clip(FastTokenizer(PORTABLE, 64, clean=clean))), "open_clip", tmp_path / "out")
    assert [case for case, row in record["text"].items() if "cannot" in row] == [
        "not in NFC",
        "HTML entities and spaces",
    ]
    assert any("OpenCLIP repairs a text's encoding" in note for note in record["notes"])


@pytest.mark.parametrize("clean", [None, "nothing", *CLEANINGS])
@pytest.mark.parametrize("file", [PORTABLE, str(SHIPPED / "tokenizers" / "mela.json")])
def test_a_siglip_folder_carries_all_but_what_ftfy_mends(tmp_path, file, clean):
    tokenizer = FastTokenizer(file, 64, clean=clean)
    encoder = portable()
    encoder.text = siglip_text(tokenizer)
    if clean in CLEANINGS:
        with pytest.raises(Refused, match=rf"tokenizer.clean: found '{clean}'; .* HTML entities .*\(--allow-loss\)"):
            export(source(encoder), "siglip", tmp_path / "out")
    record = export(source(encoder), "siglip", tmp_path / "out", allow_loss=True)
    assert len(record["losses"]) == (clean in CLEANINGS)
    assert record["within_bound"] == (clean not in CLEANINGS)
    assert record["text"]["usual"]["embedding"]["difference"] <= record["bound"]
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    texts = messy_texts(2)
    if clean in CLEANINGS:
        texts = [text for text in texts if ftfy.fix_text(text, normalization=None) == text == html.unescape(text)]
        assert len(texts) > 20
    found = theirs(texts, padding="max_length", truncation=True)["input_ids"]
    assert found == ids(tokenizer, texts)


@pytest.mark.slow
def test_an_onnx_folder_pads_with_a_token_that_texts_hold(tmp_path):
    pytest.importorskip("onnxscript")
    tokenizer = open_clips_own("lower")
    record = export(source(clip(tokenizer)), "onnx", tmp_path / "out", allow_loss=True)
    assert "HTML entities" in record["losses"][0]
    assert record["text"]["usual"]["embedding"]["difference"] <= record["bound"]
    theirs = RustTokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    texts = ["Two brass lamps, and a drum!", "a!!! b !c", "", "x" * 400]
    assert [one.ids for one in theirs.encode_batch(texts)] == tokenizer(texts)[0].tolist()


def test_padding_that_texts_hold_is_a_loss_where_transformers_reads(tmp_path):
    encoder = portable()
    encoder.text = siglip_text(FastTokenizer(PORTABLE, 64, pad_token="a", clean="nothing"))
    with pytest.raises(Refused, match="text.tokenizer.pad_token: found 'a', which texts may hold"):
        export(source(encoder), "siglip", tmp_path / "out")


@pytest.mark.parametrize("clean", ["nothing", None, "lower"])
def test_siglip_2_reads_texts_as_they_are(tmp_path, clean):
    tokenizer = FastTokenizer(PORTABLE, 64, clean=clean)
    encoder = portable()
    encoder.text = siglip_text(tokenizer)
    if clean != "nothing":
        with pytest.raises(Refused, match=r"tokenizer.clean: found .*; transformers' SigLIP 2 reads texts as they are"):
            export(source(encoder), "siglip2", tmp_path / "out")
    record = export(source(encoder), "siglip2", tmp_path / "out", allow_loss=True)
    assert len(record["losses"]) == (clean != "nothing")
    assert record["within_bound"] == (clean == "nothing")
    if clean != "lower":
        assert record["text"]["usual"]["embedding"]["difference"] <= record["bound"]
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    texts = messy_texts(3)
    found = theirs(texts, padding="max_length", truncation=True)["input_ids"]
    assert (found == ids(tokenizer, texts)) == (clean == "nothing")


def unigram():
    return RustTokenizer(models.Unigram([("<pad>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("▁kite", -2.0)], unk_id=1))


def word_piece():
    return RustTokenizer(models.WordPiece({"[PAD]": 0, "[UNK]": 1, "kite": 2, "##s": 3}, unk_token="[UNK]"))


def word_level():
    return RustTokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "kite": 2}, unk_token="<unk>"))


def prefixed_bpe():
    """Its merges are no pairs of a plain BPE's vocabulary."""
    vocabulary = {"<pad>": 0, "a": 1, "##b": 2, "ab": 3}
    return RustTokenizer(models.BPE(vocabulary, [("a", "##b")], continuing_subword_prefix="##"))


@pytest.mark.parametrize("made", [unigram, word_piece, word_level, prefixed_bpe])
def test_every_target_answers_for_every_kind_of_tokenizer(tmp_path, made):
    rust = made()
    rust.normalizer = normalizers.Lowercase()
    rust.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    rust.add_special_tokens([rust.id_to_token(0)])
    tokenizer = FastTokenizer(context_length=64, serialized=rust.to_str())
    encoder = portable()
    encoder.text = siglip_text(tokenizer)
    for target in target_names():
        reasons = [loss.reason for loss in find_target(target).check(encoder)]
        assert any("as Gemma's" in reason for reason in reasons) == (target == "siglip2"), reasons
    with pytest.raises(Refused, match=r"opens that of a SigLIP 2 folder as Gemma's.*; .*siglip.* can take it"):
        export(source(encoder), "siglip2", tmp_path / "out")
    encoder.text.pad = "longest"
    with pytest.raises(Refused, match="text.pad: found 'longest'.*can take it"):
        export(source(encoder), "siglip", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
