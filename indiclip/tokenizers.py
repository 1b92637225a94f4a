"""Tokenizers: strings -> token ids.

Shape letters: T tokens of the longest text in the batch (never a constant); B texts.
"""

import base64
import json
import string
import unicodedata
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor

from indiclip.names import check_range, did_you_mean
from indiclip.text_cleaning import OPEN_CLIP, Cleaning, check_cleaning, clean_text, normalizers_of
from indiclip.tokenizer_sources import fast_tokenizer, sentencepiece_model

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Tokenizer(ABC):
    """Strings to ids.

    Attributes:
        vocab_size: The largest id + 1; ids may be left out.
        pad_id: The id that fills short texts.
        context_length: Longer texts are cut to this many tokens, the end token kept.
    """

    vocab_size: int
    pad_id: int
    context_length: int

    @abstractmethod
    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, at most `context_length` of them.

        Raises:
            ValueError: A text has half of a surrogate pair.
        """

    @abstractmethod
    def decode(self, rows: list[list[int]]) -> list[str]:
        """The text of each row of ids, without what frames it; what is no Unicode becomes U+FFFD.

        Of what `encode` gives, it is the text itself, apart from what the tokenizer does to a text first, and from
        words that it does not know.
        """

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this tokenizer without a network or its original file."""

    @property
    def frame_ids(self) -> frozenset[int]:
        """The ids that begin and end a text, whatever it says."""
        return frozenset(self.encode([""])[0])

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
        """As `__call__`, of what `encode` gives; padded to at least so many tokens.

        A text without a token becomes one valid padding token, so that a tower has something to read.
        """
        rows = [row or [self.pad_id] for row in rows]
        longest = max(map(len, rows), default=0)
        longest = max(longest, least) if rows else 0
        padded = [row + [self.pad_id] * (longest - len(row)) for row in rows]
        ids_BT = torch.tensor(padded, dtype=torch.long).reshape(len(rows), longest)
        lengths_B1 = torch.tensor([len(row) for row in rows]).reshape(-1, 1)
        return ids_BT, torch.arange(longest) < lengths_B1

    @staticmethod
    def check_unicode(texts: list[str]) -> None:
        """Raise ValueError for half of a surrogate pair, which is no Unicode text and which no library encodes."""
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"tokenizer: {error.object!r} has half of a surrogate pair; expected Unicode text"
            ) from error


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after Unicode NFC; needs no file and knows every script.

    An Indian-language character is three bytes, so texts are long: right for trials and short captions.
    """

    pad_id, start_id, end_id, num_special = 0, 1, 2, 3
    vocab_size = 256 + num_special

    def __init__(self, context_length: int = 256) -> None:
        check_range({"tokenizer.context_length": context_length}, 3)
        self.context_length = context_length

    def encode(self, texts: list[str]) -> list[list[int]]:
        self.check_unicode(texts)
        keep = self.context_length - 2
        rows = [unicodedata.normalize("NFC", text).encode()[:keep] for text in texts]
        return [[self.start_id, *(byte + self.num_special for byte in row), self.end_id] for row in rows]

    def decode(self, rows: list[list[int]]) -> list[str]:
        first = self.num_special
        return [bytes(id - first for id in row if id >= first).decode(errors="replace") for row in rows]

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
        if clean is not None:
            check_cleaning(clean)

        tokenizer = fast_tokenizer(source, serialized)
        check_range({"tokenizer.context_length": context_length}, tokenizer.num_special_tokens_to_add(False) + 1)
        tokenizer.no_padding()
        tokenizer.enable_truncation(context_length)
        self._tokenizer, self.clean = tokenizer, clean
        self.context_length = context_length
        self.vocab_size = _vocab_size(tokenizer)
        if pad_token is not None and tokenizer.token_to_id(pad_token) is None:
            near = did_you_mean(pad_token, tokenizer.get_vocab())
            raise ValueError(f"tokenizer.pad_token: the vocabulary has no {pad_token!r}{near}")
        self.pad_token = pad_token
        names = [pad_token] if pad_token else ["<pad>", "[PAD]", "<|endoftext|>", "</s>"]
        ids = [tokenizer.token_to_id(name) for name in names]
        self.pad_id = next((id for id in ids if id is not None), 0)

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encodings(texts)]

    def decode(self, rows: list[list[int]]) -> list[str]:
        frame = self.frame_ids  # not every file calls these special
        plain = [[id for id in row if id not in frame] for row in rows]
        if not (word_end := getattr(self._tokenizer.model, "end_of_word_suffix", None)):
            return [text.strip() for text in self._tokenizer.decode_batch(plain, skip_special_tokens=True)]
        from tokenizers.decoders import ByteLevel

        # As CLIP's, whose bytes are letters, and whose files do not say what a word's end is to become.
        letters = ["".join(filter(None, map(self._tokenizer.id_to_token, row))) for row in plain]
        return [ByteLevel().decode([text]).replace(word_end, " ").strip() for text in letters]

    @property
    def frame_ids(self) -> frozenset[int]:
        # An empty text may have a token of its own, such as the space that some put before every text.
        encoding = self._tokenizer.encode("")
        return frozenset(id for id, frames in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if frames)

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
        except TypeError:  # cleaning mends half of a surrogate pair, so that not every one is too many
            self.check_unicode(whole)
            raise

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
        self._processor = sentencepiece_model(source, serialized)
        prefix, suffix = self._frame()
        check_range({"tokenizer.context_length": context_length}, len(prefix) + len(suffix) + 1)
        self.context_length = context_length
        self.vocab_size = self._processor.vocab_size()
        self.pad_id = max(self._processor.pad_id(), 0)

    def encode(self, texts: list[str]) -> list[list[int]]:
        self.check_unicode(texts)
        prefix, suffix = self._frame()
        keep = self.context_length - len(prefix) - len(suffix)
        rows = self._processor.encode([unicodedata.normalize("NFC", text) for text in texts])
        return [[*prefix, *row[:keep], *suffix] for row in rows]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return [text.strip() for text in self._processor.decode(rows)]

    def _frame(self) -> tuple[list[int], list[int]]:
        """The ids before and behind every text."""
        start, end = self._processor.bos_id(), self._processor.eos_id()
        return [start] * (start >= 0), [end] * (end >= 0)

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
        self.check_unicode(texts)
        # SentencePiece drops a space at the beginning, so texts are read behind another token.
        skip = len(self._processor.encode(self._prefix))
        plain = [" ".join(text.lower().translate(_NO_PUNCTUATION).split()) for text in texts]
        rows = self._processor.encode([f"{self._prefix}\N{LOWER ONE EIGHTH BLOCK}{text}" for text in plain])
        return [[*row[skip:][: self.context_length - 1], self.pad_id] for row in rows]

    def _frame(self) -> tuple[list[int], list[int]]:
        return [], [self._processor.eos_id()]


def _vocab_size(tokenizer: Any) -> int:
    """The tokenizers library counts entries, and ids may be larger than that."""
    ids = tokenizer.get_vocab().values()
    if not ids:
        raise ValueError("tokenizer.source: found an empty vocabulary")
    return int(max(ids)) + 1
