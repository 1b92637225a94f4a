"""What lies in a folder of transformers: tensors in one file or many, and a tokenizer."""

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import normalizers
from torch import Tensor

from indiclip.pretrained.weights import read_tensors
from indiclip.tokenizer_sources import check_tokenizer
from indiclip.tokenizers import FastTokenizer, SiglipTokenizer, Tokenizer

_PICKLES = (".bin", ".pt", ".h5", ".msgpack")


def read_transformers_tensors(folder: Path) -> dict[str, Tensor]:
    """Of `model.safetensors`, or of the files that `model.safetensors.index.json` lists.

    Raises:
        FileNotFoundError: None of the two, or a listed file is missing.
        ValueError: A file is damaged, or holds other tensors than are listed.
    """
    index = weights_file(folder)
    if index.suffix == ".safetensors":
        return read_tensors(index)
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: expected an object with `weight_map`") from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: names {name!r}; expected a file of this folder")
        tensors |= read_tensors(folder / name)
    if absent := sorted(files.keys() - tensors.keys()):
        raise ValueError(f"{index}: lists {absent[0]}, which is not in {files[absent[0]]}")
    return tensors


def weights_file(folder: Path) -> Path:
    """`model.safetensors`, or the `model.safetensors.index.json` of several files.

    Raises:
        FileNotFoundError: None of the two; names the pickles that are there instead.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not whole.is_file() and not index.is_file():
        pickled = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES)
        raise FileNotFoundError(f"{folder}: found {', '.join(pickled) or 'no weights'}; expected {whole.name}")
    return whole if whole.is_file() else index


def read_tokenizer(folder: Path, context_length: int, any_side: bool = False) -> Tokenizer:
    """The tokenizer of a folder, cut to a number of tokens.

    Args:
        folder: With its files.
        context_length: Most tokens.
        any_side: Whether it may pad on the left, which ours does not: of models that do not count the padding.
    """
    check_tokenizer(folder)
    found: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if found.padding_side != "right" and not any_side:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: padding_side: found {found.padding_side!r}, expected 'right'"
        )
    if isinstance(found, transformers.SiglipTokenizer):
        return SiglipTokenizer(found.vocab_file, context_length)
    if not found.is_fast:
        raise ValueError(f"{folder}: found a {type(found).__name__}; expected one that has a tokenizer.json")
    rust = RustTokenizer.from_str(found.backend_tokenizer.to_str())
    if type(found).__name__.startswith("Gemma") and not any_side:
        # SigLIP 2 was trained on lower-case text. Its folders of one size name Gemma's tokenizer, which keeps capitals.
        rust.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), *([rust.normalizer] if rust.normalizer else [])]
        )
    return FastTokenizer(
        context_length=context_length, serialized=rust.to_str(), pad_token=found.pad_token, clean="nothing"
    )
