"""Text towers and tokenizers: strings -> token ids -> one vector per token.

Shape letters: T tokens of the longest text in the batch (never a constant), D width; B texts.
"""

import base64
import json
import string
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from indiclip.names import check_choice, did_you_mean
from indiclip.text_cleaning import Cleaning, check_cleaning, clean_text

# Of transformers configurations, beside the keys that their types declare.
_SHARED_KEYS = {"model_type", "is_encoder_decoder", "tie_word_embeddings", "dense_act_fn", "is_gated_act", "dtype"}
_SHARED_KEYS |= {"scale_decoder_outputs", "architectures", "transformers_version", "_sliding_window_pattern"}
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
        clean: What OpenCLIP does to a text first, see `indiclip.text_cleaning.clean_text`; None is NFC alone.
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
        self._tokenizer, self._clean = tokenizer, clean
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
            letters = enumerate(self._prepared(text))
            dropped = sum(not letter.isspace() for place, letter in letters if place not in read)
            count += encoding.ids.count(unknown_id) + dropped
        return count

    def _prepared(self, text: str) -> str:
        return clean_text(text, self._clean) if self._clean else unicodedata.normalize("NFC", text)

    def _encodings(self, texts: list[str]) -> list[Any]:
        whole = [self._prepared(text) for text in texts]
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
            "clean": self._clean,
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


class TextTower(nn.Module):
    """Any transformers text model.

    Args:
        tokenizer: Its vocabulary size is the model's, where the model is made from scratch.
        architecture: A transformers configuration as a dict, `model_type` and its fields, from scratch: e.g.
            `{model_type: bert, hidden_size: 192, num_hidden_layers: 4, num_attention_heads: 3,
            intermediate_size: 768}`.
        pretrained: A folder or hub name with a configuration and weights, instead of `architecture`. A model that
            has a text tower of its own (CLIP, SigLIP) gives that.
        pad: `longest` fills short texts up to the longest of the batch and reads no padding; `context` fills all to the
            tokenizer's context length and reads padding as any other token, as SigLIP does.

    Attributes:
        width: Width D of the vectors.
    """

    model: Any  # transformers models share no type that has a config

    def __init__(
        self,
        tokenizer: Tokenizer,
        architecture: dict[str, Any] | None = None,
        pretrained: str | None = None,
        pad: Literal["longest", "context"] = "longest",
    ) -> None:
        super().__init__()
        if (architecture is None) == (pretrained is None):
            raise ValueError("text: give exactly one of `architecture` (from scratch) and `pretrained`")
        check_choice("text.pad", pad, ("longest", "context"))
        self.tokenizer, self.pad = tokenizer, pad
        if pretrained is not None:
            self.model = _text_part(_pretrained_model(pretrained))
        else:
            self.model = _text_part(_new_model(dict(architecture or {}), tokenizer))
        config = self.model.config
        if config.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"text.tokenizer: has {tokenizer.vocab_size} ids but the model's vocabulary only {config.vocab_size}"
            )
        self.width = int(config.hidden_size)
        self._read_a_long_text()

    def forward(self, ids_BT: Tensor, valid_BT: Tensor, padded: bool | None = None) -> Tensor:
        """Token vectors (B, T, D).

        Args:
            ids_BT: Of the tokens.
            valid_BT: False on padding.
            padded: Whether any is, where the host knows. Else transformers asks the device, and waits for it.
        """
        if self.pad == "context":
            padded = False
        with _mask_unread() if padded and not torch.compiler.is_compiling() else nullcontext():
            out = self.model(input_ids=ids_BT, attention_mask=None if padded is False else valid_BT.long())
        return cast(Tensor, out.last_hidden_state)

    def padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """`(ids_BT, valid_BT)` of what the tokenizer's `encode` gives."""
        return self.tokenizer.pad(rows, self.tokenizer.context_length if self.pad == "context" else 0)

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this tower without a network, weights aside."""
        architecture = architecture_of(self.model.config)
        return {"architecture": architecture, "tokenizer": describe(self.tokenizer), "pad": self.pad}

    @torch.no_grad()
    def _read_a_long_text(self) -> None:
        """Raise ValueError unless a text of `context_length` tokens goes through."""
        if next(self.parameters()).is_meta:
            return
        length = self.tokenizer.context_length
        ids_1T = torch.full((1, length), (self.tokenizer.pad_id + 1) % self.tokenizer.vocab_size)
        self.eval()
        try:
            self(ids_1T, torch.ones_like(ids_1T, dtype=torch.bool))
        except (IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"text: {self.model.config.model_type} cannot read texts of the tokenizer's context_length {length} "
                f"({error}); is text.architecture.max_position_embeddings too small?"
            ) from error
        self.train()


@contextmanager
def _mask_unread() -> Iterator[None]:
    """Let transformers apply the mask without reading it before, as it does where it traces.

    A private part of it, the only one that is touched. Tried with transformers 5.23.0; a text tower in a version
    without it fails here at once, with an AttributeError.
    """
    masking_utils: Any = import_module("transformers.masking_utils")
    is_tracing = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: True
    try:
        yield
    finally:
        masking_utils.is_tracing = is_tracing


def describe(part: Any) -> dict[str, Any]:
    """`{class_path, init_args}` of an object that has a `to_config()`, in the words a YAML uses."""
    return {"class_path": f"{type(part).__module__}.{type(part).__qualname__}", "init_args": part.to_config()}


def architecture_of(config: Any) -> dict[str, Any]:
    """What `TextTower.architecture` says of a transformers configuration.

    Released folders have many keys more, of older versions and of text generation.
    """
    found = {name: getattr(config, name, None) for name in ("model_type", "vocab_size", "pad_token_id")}
    known = architecture_keys(config.model_type)
    return {name: value for name, value in (found | config.to_diff_dict()).items() if name in known}


def architecture_keys(model_type: str) -> set[str]:
    """The keys that a transformers configuration declares itself, and plain ones that several types share."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    own = signature(CONFIG_MAPPING[model_type]).parameters.keys() - signature(PreTrainedConfig).parameters.keys()
    return own | _SHARED_KEYS


def _new_model(architecture: dict[str, Any], tokenizer: Tokenizer) -> Any:
    import transformers
    from transformers import CONFIG_MAPPING, AutoModel

    model_type = architecture.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(str(model_type), CONFIG_MAPPING.keys())
        raise ValueError(f"text.architecture.model_type: transformers has no {model_type!r}{near}")
    architecture.setdefault("vocab_size", tokenizer.vocab_size)
    architecture.setdefault("pad_token_id", tokenizer.pad_id)
    config = CONFIG_MAPPING[model_type](**architecture)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and 0 < longest < tokenizer.context_length:  # XLNet's -1 is no bound
        raise ValueError(
            f"text.architecture.max_position_embeddings: {longest} is less than the tokenizer's context_length "
            f"{tokenizer.context_length}"
        )
    # AutoModel knows whole models only. A text tower's class is called as its configuration: SiglipTextModel.
    own = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    return own(config) if own else AutoModel.from_config(config)  # type: ignore[no-untyped-call]


def _pretrained_model(name: str) -> Any:
    from transformers import AutoModel

    try:
        return AutoModel.from_pretrained(name, use_safetensors=True)
    except OSError as error:
        raise FileNotFoundError(
            f"text.pretrained: {name!r} is no folder with a transformers model in safetensors, and not found on the hub"
        ) from error


def _text_part(model: Any) -> Any:
    """The text tower of a two-tower model, the encoder of two; another as it is, without a pooler nobody reads."""
    model = getattr(model, "text_model", model)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    # Parameters that would never get a gradient: BERT's pooler, SigLIP's projection.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    if isinstance(getattr(model, "head", None), nn.Linear):
        model.head = nn.Identity()
    return model
