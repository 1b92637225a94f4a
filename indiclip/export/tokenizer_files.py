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


def tokenizer_losses(tokenizer: Tokenizer) -> list[Loss]:
    """Why a tokenizer cannot be written."""
    if isinstance(tokenizer, ByteTokenizer | FastTokenizer | SiglipTokenizer):
        return []
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [
            Loss(
                "text.tokenizer: found a plain SentencePiece model, which no tokenizer of transformers reads as it is; "
                "expected a tokenizer.json (FastTokenizer) or SiglipTokenizer"
            )
        ]
    return [Loss(f"text.tokenizer: found {type(tokenizer).__name__}; expected FastTokenizer, which has a file")]


def transformers_tokenizer(text: TextTower, folder: Any) -> Any:
    """A tokenizer that gives the ids of ours.

    Args:
        text: The tower; its context length is where texts are cut.
        folder: Where a SentencePiece file is put.
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
    if isinstance(tokenizer, ByteTokenizer):
        rust, pad_token = _of_bytes(tokenizer), _BYTE_SPECIAL[tokenizer.pad_id]
    else:
        assert isinstance(tokenizer, FastTokenizer)
        rust = RustTokenizer.from_str(tokenizer.to_config()["serialized"])
        rust.no_truncation()
        # We normalise before the tokenizer sees a text.
        first: list[Any] = [normalizers.NFC()]
        rust.normalizer = normalizers.Sequence(first + ([rust.normalizer] if rust.normalizer else []))  # type: ignore[assignment]
        pad_token = str(tokenizer.pad_token or rust.id_to_token(tokenizer.pad_id))
    made: Any = transformers.PreTrainedTokenizerFast
    return made(tokenizer_object=rust, pad_token=pad_token, padding_side="right", truncation_side="right", **common)


def gemma_losses(tokenizer: Tokenizer) -> list[Loss]:
    """Why transformers would read a tokenizer otherwise in a folder of SigLIP 2, whose class it makes of any."""
    reason = Loss(
        f"text.tokenizer: found {type(tokenizer).__name__}; transformers opens that of a SigLIP 2 folder as Gemma's, "
        "which tools/train_tokenizer.py --siglip2 makes"
    )
    if not isinstance(tokenizer, FastTokenizer):
        return [reason]
    own, theirs = (
        json.loads(tokenizer.to_config()["serialized"]),
        json.loads(_gemma(tokenizer).backend_tokenizer.to_str()),
    )
    same = all(own[part] == theirs[part] for part in ("normalizer", "pre_tokenizer"))
    models = ({key: value for key, value in one["model"].items() if key != "ignore_merges"} for one in (own, theirs))
    return [] if same and next(models) == next(models) else [reason]


def gemma_tokenizer(text: TextTower) -> Any:
    """As `transformers_tokenizer`, of the class that transformers makes of it in a folder of SigLIP 2."""
    assert isinstance(text.tokenizer, FastTokenizer)
    found = _gemma(text.tokenizer, model_max_length=text.tokenizer.context_length, model_input_names=["input_ids"])
    own = RustTokenizer.from_str(text.tokenizer.to_config()["serialized"])
    found.backend_tokenizer.post_processor = own.post_processor
    return found


def _gemma(tokenizer: FastTokenizer, **options: Any) -> Any:
    import transformers

    made: Any = transformers.Siglip2Tokenizer
    model = json.loads(tokenizer.to_config()["serialized"])["model"]
    merges = [tuple(pair) for pair in model.get("merges", [])]
    return made(vocab=dict(model["vocab"]), merges=merges, padding_side="right", **options)


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
