"""Tokenizers: strings -> token ids.

Shape letters: T tokens of the longest text in the batch (never a constant); B texts.
"""

import base64
import json
import string
import unicodedata
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from indiclip.names import did_you_mean
from indiclip.text_cleaning import OPEN_CLIP, Cleaning, check_cleaning, clean_text, normalizers_of

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Tokenizer(ABC):
    """Strings to ids.

    Attributes:
        vocab_size: Number of ids.
        pad_id: The id that fills short texts.
        context_length: Longer texts are cut to this many tokens, the end token kept.
    """

    vocab_size: int
    pad_id: int
    context_length: int

    @abstractmethod
    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, at most `context_length` of them."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this tokenizer without a network or its original file."""

    def count_unknown(self, texts: list[str]) -> int:
        """How many unknown tokens stand in these texts, and letters that are dropped without one."""
        return 0

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids padded to the longest text.

        Returns:
            `(ids_BT, valid_BT)`: int64 and bool. An empty list gives shapes (0, 0).
        """
        return self.pad(self.encode(texts))

    def pad(self, rows: list[list[int]], least: int = 0) -> tuple[Tensor, Tensor]:
        """As `__call__`, of what `encode` gives; padded to at least so many tokens."""
        longest = max(map(len, rows), default=0)
        longest = max(longest, least) if rows else 0
        ids_BT = torch.tensor([row + [self.pad_id] * (longest - len(row)) for row in rows]).reshape(len(rows), longest)
        lengths_B1 = torch.tensor([len(row) for row in rows]).reshape(-1, 1)
        return ids_BT, torch.arange(longest) < lengths_B1


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after Unicode NFC; needs no file and knows every script.

    An Indian-language character is three bytes, so texts are long: right for trials and short captions.
    """

    pad_id, start_id, end_id, num_special = 0, 1, 2, 3
    vocab_size = 256 + num_special

    def __init__(self, context_length: int = 256) -> None:
        self.context_length = context_length

    def encode(self, texts: list[str]) -> list[list[int]]:
        keep = self.context_length - 2
        rows = [unicodedata.normalize("NFC", text).encode()[:keep] for text in texts]
        return [[self.start_id, *(byte + self.num_special for byte in row), self.end_id] for row in rows]

    def to_config(self) -> dict[str, Any]:
        return {"context_length": self.context_length}


class FastTokenizer(Tokenizer):
    """Any `tokenizers` tokenizer: a `tokenizer.json`, a folder that holds one, or a name on the hub.

    Args:
        source: File, folder or hub name. None when `serialized` is given.
        context_length: Longest text in tokens.
        serialized: The content of a `tokenizer.json` (what a checkpoint carries).
        pad_token: Its id fills short texts; where it is None, the first of the usual names that the vocabulary has.
        clean: What is done to a text first, see `indiclip.text_cleaning.clean_text`; None is NFC alone.
    """

    def __init__(
        self,
        source: str | None = None,
        context_length: int = 64,
        serialized: str | None = None,
        pad_token: str | None = None,
        clean: Cleaning | None = None,
    ) -> None:
        from tokenizers import Tokenizer as RustTokenizer

        if clean is not None:
            check_cleaning(clean)

        if serialized is not None:
            tokenizer = RustTokenizer.from_str(serialized)
        elif source is None:
            raise ValueError("tokenizer.source: give a tokenizer.json, its folder, or a hub name")
        else:
            path = Path(source) / "tokenizer.json" if Path(source).is_dir() else Path(source)
            tokenizer = RustTokenizer.from_file(str(path)) if path.is_file() else _hub_tokenizer(source)
        tokenizer.no_padding()
        tokenizer.enable_truncation(context_length)
        self._tokenizer, self.clean = tokenizer, clean
        self.context_length = context_length
        self.vocab_size = tokenizer.get_vocab_size()
        if pad_token is not None and tokenizer.token_to_id(pad_token) is None:
            near = did_you_mean(pad_token, tokenizer.get_vocab())
            raise ValueError(f"tokenizer.pad_token: the vocabulary has no {pad_token!r}{near}")
        self.pad_token = pad_token
        names = [pad_token] if pad_token else ["<pad>", "[PAD]", "<|endoftext|>", "</s>"]
        ids = [tokenizer.token_to_id(name) for name in names]
        self.pad_id = next((id for id in ids if id is not None), 0)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encodings(texts)]

    def count_unknown(self, texts: list[str]) -> int:
        model = json.loads(self._tokenizer.to_str())["model"]
        name = model.get("unk_token")
        unknown_id = self._tokenizer.token_to_id(name) if name else model.get("unk_id")
        count = 0
        for text, encoding in zip(texts, self._encodings(texts), strict=True):
            # A BPE without an unknown token leaves out what it does not know; such a letter is in no token's span.
            read = {place for start, end in encoding.offsets for place in range(start, end)}
            letters = enumerate(clean_text(text, self.clean))
            dropped = sum(not letter.isspace() for place, letter in letters if place not in read)
            count += encoding.ids.count(unknown_id) + dropped
        return count

    @property
    def open_clip_cleaning(self) -> Cleaning | None:
        """What OpenCLIP calls what is done to a text first; None where OpenCLIP does no such thing."""
        return self.clean if self.clean in OPEN_CLIP else None

    def normalizers(self) -> list[Any]:
        """What is done to a text first, for `tokenizers`; of OpenCLIP's cleaning not all, see `normalizers_of`."""
        return normalizers_of(self.clean)

    def _encodings(self, texts: list[str]) -> list[Any]:
        whole = [clean_text(text, self.clean) for text in texts]
        try:
            return cast(list[Any], self._tokenizer.encode_batch(whole))
        except TypeError as error:  # half of a surrogate pair is no Unicode text
            broken = next(text for text in texts if any("\ud800" <= letter <= "\udfff" for letter in text))
            raise ValueError(f"tokenizer: {broken!r} has half of a surrogate pair; expected Unicode text") from error

    def to_config(self) -> dict[str, Any]:
        return {
            "context_length": self.context_length,
            "serialized": self._tokenizer.to_str(),
            "pad_token": self.pad_token,
            "clean": self.clean,
        }


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file.

    Args:
        source: The `.model` file. None when `serialized` is given.
        context_length: Longest text in tokens, start and end included where the model has them.
        serialized: The file's bytes in base64 (what a checkpoint carries).
    """

    def __init__(self, source: str | None = None, context_length: int = 64, serialized: str | None = None) -> None:
        from sentencepiece import SentencePieceProcessor

        if serialized is not None:
            proto = base64.b64decode(serialized)
        elif source is None or not Path(source).is_file():
            raise FileNotFoundError(f"tokenizer.source: no SentencePiece model at {source!r}")
        else:
            proto = Path(source).read_bytes()
        self._processor = SentencePieceProcessor(model_proto=proto)
        self.context_length = context_length
        self.vocab_size = self._processor.vocab_size()
        self.pad_id = max(self._processor.pad_id(), 0)

    def encode(self, texts: list[str]) -> list[list[int]]:
        start, end = self._processor.bos_id(), self._processor.eos_id()
        prefix, suffix = [start] * (start >= 0), [end] * (end >= 0)
        keep = self.context_length - len(prefix) - len(suffix)
        rows = self._processor.encode([unicodedata.normalize("NFC", text) for text in texts])
        return [[*prefix, *row[:keep], *suffix] for row in rows]

    def count_unknown(self, texts: list[str]) -> int:
        rows = self.encode(texts)
        return sum(row.count(self._processor.unk_id()) for row in rows)

    def to_config(self) -> dict[str, Any]:
        proto = base64.b64encode(self._processor.serialized_model_proto()).decode()
        return {"context_length": self.context_length, "serialized": proto}


class SiglipTokenizer(SentencePieceTokenizer):
    """A SentencePiece model read as SigLIP reads it: lower case, no ASCII punctuation, `</s>` ends and fills texts."""

    def __init__(self, source: str | None = None, context_length: int = 64, serialized: str | None = None) -> None:
        super().__init__(source, context_length, serialized)
        self.pad_id = self._processor.eos_id()
        self._prefix = self._processor.id_to_piece(self._processor.unk_id())

    def encode(self, texts: list[str]) -> list[list[int]]:
        # SentencePiece drops a space at the beginning, so texts are read behind another token.
        skip = len(self._processor.encode(self._prefix))
        plain = [" ".join(text.lower().translate(_NO_PUNCTUATION).split()) for text in texts]
        rows = self._processor.encode([f"{self._prefix}\N{LOWER ONE EIGHTH BLOCK}{text}" for text in plain])
        return [[*row[skip:][: self.context_length - 1], self.pad_id] for row in rows]


def _hub_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
    except OSError as error:
        raise FileNotFoundError(
            f"tokenizer.source: {name!r} is no file, no folder with a tokenizer.json, and not found on the hub"
        ) from error
    return tokenizer.backend_tokenizer
