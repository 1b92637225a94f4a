"""From a file, a folder or a name on the hub to a tokenizer of another library; their errors name the YAML key."""

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from indiclip.names import reason_of

TOKENIZER_FILES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
    ("spm.model",),
)
_SETTINGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def check_tokenizer(folder: Path, name: str | None = None) -> None:
    """Raise FileNotFoundError where there is none: transformers would make up one of a few words.

    Args:
        folder: With the files.
        name: What the message calls it.
    """
    if not _has_tokenizer(folder):
        expected = ", or ".join(" with ".join(names) for names in TOKENIZER_FILES)
        raise FileNotFoundError(f"{name or folder}: found no tokenizer; expected {expected}")


def fast_tokenizer(source: str | None, serialized: str | None = None) -> Any:
    """A tokenizer of `tokenizers`.

    Args:
        source: A `tokenizer.json`, a folder with one or with other files of a tokenizer, or a name on the hub.
        serialized: The content of a `tokenizer.json`, instead.

    Raises:
        FileNotFoundError: A folder without such files, or a name that the hub does not have or has without them.
        ValueError: The file is damaged, or the hub's tokenizer is of a class that has no such file.
    """
    from tokenizers import Tokenizer as RustTokenizer

    if serialized is not None:
        with _named("tokenizer.serialized: not the content of a tokenizer.json"):
            return RustTokenizer.from_str(serialized)
    if source is None:
        raise ValueError("tokenizer.source: give a tokenizer.json, its folder, or a hub name")
    path = Path(source)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        return _converted(path, source)
    if not path.exists():
        return _converted(_from_hub(source), f"{source} of the hub")
    path = path / "tokenizer.json" if path.is_dir() else path
    with _named(f"tokenizer.source: {path} is not a tokenizer.json"):
        return RustTokenizer.from_file(str(path))


def sentencepiece_model(source: str | None, serialized: str | None = None) -> Any:
    """A `SentencePieceProcessor`.

    Args:
        source: The model file.
        serialized: Its bytes in base64, instead.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged.
    """
    if serialized is not None:
        with _named("tokenizer.serialized: not the bytes of a SentencePiece model in base64"):
            return _processor(base64.b64decode(serialized))
    if source is None or not Path(source).is_file():
        raise FileNotFoundError(f"tokenizer.source: no SentencePiece model at {source!r}")
    with _named(f"tokenizer.source: {source} is not a SentencePiece model"):
        return _processor(Path(source).read_bytes())


def _processor(proto: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto)  # its constructor takes no bytes for no model, and says nothing
    return processor


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Raise ValueError that says what cannot be read: the libraries raise `Exception` and RuntimeError without it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {reason_of(error)}") from error


def _has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=[*chain(*TOKENIZER_FILES), *_SETTINGS]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"tokenizer.source: {name!r} is no file, no folder with a tokenizer, and not found on the hub"
        ) from error


def _converted(folder: Path, name: str) -> Any:
    """What transformers makes of a folder's files, such as MuRIL's vocab.txt."""
    from transformers import AutoTokenizer

    check_tokenizer(folder, f"tokenizer.source: {name}")
    with _named(f"tokenizer.source: transformers cannot read {name} (code that comes with it is not run)"):
        found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    read = sorted(set(type(found).vocab_files_names.values()))
    if not any((folder / file).is_file() for file in read):
        raise FileNotFoundError(f"tokenizer.source: {name}: {type(found).__name__} finds none of {', '.join(read)}")
    if not found.is_fast:
        kind = type(found).__name__
        raise ValueError(f"tokenizer.source: {name} has a {kind}; expected one that has a tokenizer.json")
    return found.backend_tokenizer
