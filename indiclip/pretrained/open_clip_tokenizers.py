"""OpenCLIP's tokenizers as ours: equal ids for equal texts."""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from indiclip.names import check_choice
from indiclip.pretrained.open_clip_source import OpenClipSource
from indiclip.tokenizers import FastTokenizer, SiglipTokenizer, Tokenizer

_START, _END = "<start_of_text>", "<end_of_text>"
_WORDS = rf"(?i:{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d)|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"
_NUM_MERGES = 49152 - 256 - 2  # of the lines of its vocabulary, as OpenCLIP reads it
_ARGUMENTS = ("clean", "strip_sep_token", "language")


def open_clip_tokenizer(source: OpenClipSource, context_length: int) -> Tokenizer:
    """The tokenizer that OpenCLIP's `get_tokenizer` gives for a model.

    Raises:
        FileNotFoundError: Its files are neither in the folder nor in the hub's local cache.
        ValueError: It does something that ours does not.
    """
    text = source.model["text_cfg"]
    arguments = dict(text.get("tokenizer_kwargs") or {})
    for key in arguments:
        check_choice(f"{source.origin}: text_cfg.tokenizer_kwargs", key, _ARGUMENTS)
    if text.get("tokenizer_mode"):
        raise ValueError(f"{source.origin}: text_cfg.tokenizer_mode {text['tokenizer_mode']!r}: expected none")
    if name := text.get("hf_tokenizer_name"):
        name = str(source.folder or name)  # of a folder always itself, as OpenCLIP does
        return _of_transformers(name, context_length, arguments, source.origin)
    if source.folder is None and "siglip" in source.origin.lower():
        raise FileNotFoundError(
            f"{source.origin}: its vocabulary is on the web; expected a folder with open_clip_config.json and tokenizer"
        )
    serialized = _simple_tokenizer(source.origin).to_str()
    clean = arguments.get("clean", "lower")
    return FastTokenizer(context_length=context_length, serialized=serialized, pad_token="!", clean=clean)


def is_own(tokenizer: Tokenizer) -> bool:
    """Whether it is the one that comes with OpenCLIP, whatever cleans its texts."""
    if not isinstance(tokenizer, FastTokenizer) or tokenizer.pad_token != "!" or not tokenizer.open_clip_cleaning:
        return False
    if importlib.util.find_spec("open_clip") is None:
        return False
    found, own = json.loads(tokenizer.to_config()["serialized"]), json.loads(_simple_tokenizer("").to_str())
    return bool(found | {"truncation": None} == own)


def _simple_tokenizer(origin: str) -> RustTokenizer:
    """OpenCLIP's own: CLIP's byte pairs, read from the package without importing it."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ValueError(f"{origin}: its vocabulary comes with OpenCLIP: pip install open_clip_torch")
    packed = Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : _NUM_MERGES + 1]
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), _START, _END]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = RustTokenizer(models.BPE(ids, merges, end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    pairs: Any = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pairs)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (_START, _END)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, ids[_START]), (_END, ids[_END])]
    )
    return tokenizer


def _byte_letters() -> list[str]:
    """The letter of each byte, in the order of GPT-2's vocabulary: printable bytes stand for themselves, first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _of_transformers(name: str, context_length: int, arguments: dict[str, Any], origin: str) -> Tokenizer:
    reader: Any = transformers.AutoTokenizer
    try:
        found = reader.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{origin}: its tokenizer is {name} of the hub, and not in the local cache; where there is a network, run "
            f"`hf download {name}` and bring that cache here"
        ) from error
    if language := arguments.get("language"):
        found.set_src_lang_special_tokens(language)
    if isinstance(found, transformers.SiglipTokenizer):
        return SiglipTokenizer(found.vocab_file, context_length)
    if not found.is_fast or found.padding_side != "right":
        kind = type(found).__name__
        raise ValueError(f"{origin}: found a {kind} that pads on the {found.padding_side}; expected a fast one, right")
    rust = RustTokenizer.from_str(found.backend_tokenizer.to_str())
    if arguments.get("strip_sep_token"):
        _end_with_zero(rust, found.sep_token, origin)
    clean = arguments.get("clean", "whitespace")
    return FastTokenizer(
        context_length=context_length, serialized=rust.to_str(), pad_token=found.pad_token, clean=clean
    )


def _end_with_zero(rust: RustTokenizer, sep_token: str, origin: str) -> None:
    """Put id 0 where the tokenizer would put its separator, as CLIPA reads texts."""
    zero = rust.id_to_token(0)
    sample = rust.encode("a")
    if sample.tokens[-1] != sep_token or len(sample.ids) < 3:
        raise ValueError(f"{origin}: text_cfg.tokenizer_kwargs.strip_sep_token: found no {sep_token} behind a text")
    start = sample.tokens[0]
    rust.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {zero}", special_tokens=[(start, sample.ids[0]), (zero, 0)]
    )
