"""Checkpoints that are a folder: a run's whose weights are shared out over its ranks.

The entries are those of a checkpoint that is one file. Tensors that are shared out lie in the files of
torch.distributed.checkpoint, by their paths among the entries; `meta.pt` has all else. `SHA256SUMS` is what
`sha256sum --check` reads.
"""

import pickle
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

META, SUMS = "meta.pt", "SHA256SUMS"
_PATHS = "shards"  # entry of `meta.pt`: name of a stored tensor -> its keys, one inside the other
# What torch.distributed.checkpoint pickles into `.metadata`: sizes and places, of these types.
_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    )
}
_ALLOWED |= {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")}
_ALLOWED |= {("torch", "Size"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("builtins", "set")}


def is_sharded(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / META).is_file()


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What goes to `meta.pt`, and the tensors that are shared out by name."""
    from torch.distributed.tensor import DTensor

    shards: dict[str, Tensor] = {}
    paths: dict[str, list[str | int]] = {}

    def without(value: Any, path: list[str | int]) -> Any:
        if isinstance(value, DTensor):
            name = "/".join(map(str, path))
            shards[name], paths[name] = value, path
            return None
        if isinstance(value, dict):
            return {key: without(item, [*path, key]) for key, item in value.items()}
        if isinstance(value, list):
            return [without(item, [*path, number]) for number, item in enumerate(value)]
        return value

    return {**without(checkpoint, []), _PATHS: paths}, shards


def read_sharded(
    folder: Path, place: Callable[..., Tensor] | None = None, leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """All entries of a checkpoint.

    Args:
        folder: Of `is_sharded`.
        place: Makes what a tensor is read into, of its size and `dtype`; a DTensor for a part of it, and then all
            ranks read together. None reads whole tensors, and needs no other rank.
        leave_out: Entries that are not read.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: It is damaged, or holds what could run code.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception to Python
    from torch.distributed.checkpoint.state_dict_loader import load

    from indiclip.pretrained.weights import read_tensors

    checkpoint = read_tensors(folder / META)
    paths = checkpoint.pop(_PATHS, None)
    if not isinstance(paths, dict):
        raise ValueError(f"{folder / META}: not of a checkpoint of IndiCLIP; expected the entry {_PATHS!r}")
    for entry in leave_out:
        checkpoint.pop(entry, None)
    reader = _reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    wanted = {name: path for name, path in paths.items() if path[0] not in leave_out}
    if missing := sorted(wanted.keys() - stored.keys()):
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, such as {missing[0]}")
    tensors = {name: (place or torch.empty)(stored[name].size, dtype=stored[name].properties.dtype) for name in wanted}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no other rank
            load(tensors, storage_reader=reader, no_dist=place is None)
    except (CheckpointException, Exception) as error:  # of any rank, and of any type
        raise ValueError(f"{folder}: cannot be read: {_first_line(error)}") from error
    for name, path in wanted.items():
        inner: Any = checkpoint
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = tensors[name]
    return checkpoint


def _first_line(error: BaseException) -> str:
    """The reason that the first rank which failed gives."""
    failures = getattr(error, "failures", {})
    first = next(iter(failures.values()))[0] if failures else error
    return f"{type(first).__name__}: {' '.join(str(first).split())[:200]}"


def _reader(folder: Path) -> Any:
    """torch's reader, but it unpickles nothing that could run code, and reads in this folder alone."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            file = folder / ".metadata"
            with file.open("rb") as opened:
                try:
                    found = _Unpickler(opened).load()
                except OSError:
                    raise
                except Exception as error:
                    raise ValueError(f"{file}: not a readable checkpoint ({error})") from error
            if not isinstance(found, Metadata):
                raise ValueError(f"{file}: found a {type(found).__name__}; expected what torch writes there")
            for name, kind in found.state_dict_metadata.items():
                if not isinstance(kind, TensorStorageMetadata):  # torch would unpickle it
                    raise ValueError(f"{file}: {name} is no tensor, and reading that can run code")
            for place in (found.storage_data or {}).values():
                if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
                    raise ValueError(f"{file}: {place.relative_path} lies outside of the folder")
            return found

    return Reader(folder)


class _Unpickler(pickle.Unpickler):
    """Makes sizes and places, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _ALLOWED and not is_dtype:
            raise ValueError(f"it holds {module}.{name}, and reading that can run code")
        return super().find_class(module, name)
