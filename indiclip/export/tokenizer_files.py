"""Our tokenizers as those of transformers, which also write their files."""

import base64
import json
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from indiclip.export.target import Loss
from indiclip.text import TextTower
from indiclip.tokenizers import ByteTokenizer, FastTokenizer, SentencePieceTokenizer, SiglipTokenizer, Tokenizer

# Names of the byte tokenizer's special tokens, which no text has.
_BYTE_SPECIAL = ("<|byte_pad|>", "<|byte_start|>", "<|byte_end|>")
_VOCABULARY = ("vocab", "merges", "ignore_merges")  # in which tokenizers of one kind differ


def tokenizer_losses(tokenizer: Tokenizer) -> list[Loss]:
    """Why a tokenizer cannot be written, or what its file cannot say."""
    if isinstance(tokenizer, ByteTokenizer | SiglipTokenizer):
        return []
    if isinstance(tokenizer, FastTokenizer):
        if tokenizer.open_clip_cleaning is None:
            return []
        return [
            Loss(
                f"text.tokenizer.clean: found {tokenizer.clean!r}; a tokenizer's file has no place for what ftfy mends "
                "(broken encodings, curly quotes) and for HTML entities",
                True,
            )
        ]
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [
            Loss(
                "text.tokenizer: found a plain SentencePiece model, which no tokenizer of transformers reads as it is; "
                "expected a tokenizer.json (FastTokenizer) or SiglipTokenizer"
            )
        ]
    return [Loss(f"text.tokenizer: found {type(tokenizer).__name__}; expected FastTokenizer, which has a file")]


def pad_losses(tokenizer: Tokenizer) -> list[Loss]:
    """Where transformers would take the padding token out of texts, too."""
    if not isinstance(tokenizer, FastTokenizer):
        return []
    rust = _rust(tokenizer)
    pad_token = _pad_token(tokenizer, rust)
    if pad_token in {token.content for token in rust.get_added_tokens_decoder().values()}:
        return []
    return [
        Loss(
            f"text.tokenizer.pad_token: found {pad_token!r}, which texts may hold; to transformers it is padding, "
            "wherever it stands",
            True,
        )
    ]


def rust_tokenizer(tokenizer: Tokenizer, cleans: bool = False) -> tuple[RustTokenizer, str]:
    """A tokenizer that gives the ids of ours, and its padding token.

    Args:
        tokenizer: A `ByteTokenizer` or `FastTokenizer`.
        cleans: Whether the library that reads it cleans texts as `tokenizer.clean` says.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return _of_bytes(tokenizer), _BYTE_SPECIAL[tokenizer.pad_id]
    assert isinstance(tokenizer, FastTokenizer)
    rust = _rust(tokenizer)
    if not cleans and (first := tokenizer.normalizers()):
        own = [rust.normalizer] if rust.normalizer else []
        rust.normalizer = normalizers.Sequence([*first, *own])  # type: ignore[assignment]
    return rust, _pad_token(tokenizer, rust)


def transformers_tokenizer(text: TextTower, folder: Any, cleans: bool = False) -> Any:
    """As `rust_tokenizer`, or SigLIP's, of transformers.

    Args:
        text: The tower; its context length is where texts are cut.
        folder: Where a SentencePiece file is put.
        cleans: As there.
    """
    import transformers

    tokenizer = text.tokenizer
    common: dict[str, Any] = {
        "model_max_length": tokenizer.context_length,
        "model_input_names": ["input_ids"] if text.pad == "context" else ["input_ids", "attention_mask"],
    }
    if isinstance(tokenizer, SiglipTokenizer):
        file = folder / "spiece.model"
        file.write_bytes(base64.b64decode(tokenizer.to_config()["serialized"]))
        return transformers.SiglipTokenizer(str(file), **common)
    rust, pad_token = rust_tokenizer(tokenizer, cleans)
    made: Any = transformers.PreTrainedTokenizerFast
    return made(tokenizer_object=rust, pad_token=pad_token, padding_side="right", truncation_side="right", **common)


def gemma_losses(tokenizer: Tokenizer) -> list[Loss]:
    """Why transformers would read a tokenizer otherwise in a folder of SigLIP 2, whose class it makes of any."""
    reason = "transformers opens that of a SigLIP 2 folder as Gemma's, which tools/train_tokenizer.py --siglip2 makes"
    if not isinstance(tokenizer, FastTokenizer):
        return [Loss(f"text.tokenizer: found {type(tokenizer).__name__}; {reason}")]
    import transformers

    made: Any = transformers.Siglip2Tokenizer
    own = json.loads(tokenizer.to_config()["serialized"])
    theirs = json.loads(made().backend_tokenizer.to_str())
    kind = own["model"]["type"]
    if kind != theirs["model"]["type"]:
        return [Loss(f"text.tokenizer: found one of {kind}; {reason}")]
    same = all(own[part] == theirs[part] for part in ("normalizer", "pre_tokenizer"))
    same &= own["model"]["vocab"].get("<pad>") == tokenizer.pad_id
    options = [{key: value for key, value in one["model"].items() if key not in _VOCABULARY} for one in (own, theirs)]
    if not same or options[0] != options[1]:
        return [Loss(f"text.tokenizer: found {type(tokenizer).__name__}; {reason}")]
    if tokenizer.clean == "nothing":
        return []
    found = "null, which puts texts in NFC" if tokenizer.clean is None else repr(tokenizer.clean)
    expected = "transformers' SigLIP 2 reads texts as they are (clean: nothing)"
    return [Loss(f"text.tokenizer.clean: found {found}; {expected}", True)]


def gemma_tokenizer(text: TextTower) -> Any:
    """As `transformers_tokenizer`, of the class that transformers makes of it in a folder of SigLIP 2."""
    import transformers

    assert isinstance(text.tokenizer, FastTokenizer)
    own = json.loads(text.tokenizer.to_config()["serialized"])["model"]
    made: Any = transformers.Siglip2Tokenizer
    found = made(
        vocab=dict(own["vocab"]),
        merges=[tuple(pair) for pair in own["merges"]],
        padding_side="right",
        model_max_length=text.tokenizer.context_length,
        model_input_names=["input_ids"],
    )
    found.backend_tokenizer.post_processor = _rust(text.tokenizer).post_processor
    return found


def _rust(tokenizer: FastTokenizer) -> RustTokenizer:
    rust = RustTokenizer.from_str(tokenizer.to_config()["serialized"])
    rust.no_truncation()
    return rust


def _pad_token(tokenizer: FastTokenizer, rust: RustTokenizer) -> str:
    return str(tokenizer.pad_token or rust.id_to_token(tokenizer.pad_id))


def _of_bytes(tokenizer: ByteTokenizer) -> RustTokenizer:
    """Byte by byte, with the ids of `ByteTokenizer`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # ByteLevel writes each byte as a letter: printable ones of Latin-1 as themselves, the others from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letter_of = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    assert sorted(letter_of.values()) == letters
    vocabulary = {name: number for number, name in enumerate(_BYTE_SPECIAL)}
    vocabulary |= {letter_of[byte]: byte + tokenizer.num_special for byte in range(256)}
    rust = RustTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    rust.normalizer = normalizers.NFC()  # type: ignore[assignment]
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    rust.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    _, start, end = _BYTE_SPECIAL
    rust.add_special_tokens([AddedToken(name, special=True) for name in _BYTE_SPECIAL])
    rust.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{start} $A {end}", special_tokens=[(start, tokenizer.start_id), (end, tokenizer.end_id)]
    )
    return rust
