"""A run's config as it is written into its folder: it holds wherever the folder is moved, and whoever reads it.

Files that the model needs (tokenizer, class names) are copied to `files/` of the folder and named by `${here:...}`.
Data and weights to begin with stay where they are and are named by whole paths. What the user wrote as a reference
(`${oc.env:NAME}`) stays one, and passwords and signatures of URLs are masked.
"""

import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from indiclip.masking import mask_written

FILES = "files"
_PATHS = {"urls", "images", "classes", "source", "pretrained", "weights"}  # also where it is a bare word: `photos`
_INITIAL = {"pretrained", "weights"}  # weights to begin with, which the checkpoints replace
_OF_RUN = {"save_dir", "dirpath"}  # in the run's folder wherever that is, see `place_outputs`
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
_WITH_DEFAULT = re.compile(r"\$\{oc\.env:\s*(\w+)\s*,\s*['\"]?([^${}]*?)['\"]?\s*\}((?:(?!\$\{).)*)")
_PLAIN = re.compile(r"[\w./+-]+", re.ASCII)  # needs no quotes in a reference


class PortableConfig:
    """A config for a run's folder.

    Args:
        tree: The config, references resolved.
        written: The same with references as the user wrote them; may lack keys.
        folder: The run's.

    Attributes:
        tree: The config to write.
    """

    def __init__(self, tree: Any, written: Any, folder: Path) -> None:
        self._files = folder.resolve() / FILES
        self._names: dict[str, Path] = {}  # in `files/` -> what is or will be copied there
        self.tree = self._portable(tree, written, ())

    def copy_files(self) -> None:
        """Copy what the model needs; what is there already stays.

        Raises:
            OSError: The disk is full, or the folder cannot be written to.
        """
        for name, source in self._names.items():
            target = self._files / name
            if not target.exists():
                self._files.mkdir(exist_ok=True)
                _copy(source, target)

    def _portable(self, value: Any, written: Any, key: tuple[str, ...]) -> Any:
        if isinstance(written, str) and "${" in written:
            return self._reference(value, written, key)
        if isinstance(value, dict):
            of = written if isinstance(written, dict) else {}
            if "class_path" in of and "class_path" not in value:  # jsonargparse's inner form of a dataclass
                of = of.get("init_args") or {}
            return {name: self._portable(item, of.get(name), (*key, name)) for name, item in value.items()}
        if isinstance(value, list):
            of_items = written if isinstance(written, list) and len(written) == len(value) else [None] * len(value)
            name = "class" if key[-1] == "classes" else key[-1]  # a list of their names, and no file
            return [self._portable(item, of, (*key, name)) for item, of in zip(value, of_items, strict=True)]
        if not isinstance(value, str):
            return value
        model, colon, file = value.rpartition(":")
        if key[-1] == "weights" and colon and file and _exists(file):
            return f"{model}:{_whole(file)}"  # timm:NAME:FILE
        if not _is_path(value, key):
            return mask_written(value, value)
        return self._copied(value) if _is_needed(value, key) else _whole(value)

    def _reference(self, value: Any, written: str, key: tuple[str, ...]) -> str:
        """What the user wrote, but for a file that is copied, and for a default that is relative to this folder."""
        if not isinstance(value, str):
            return written
        if not _is_path(value, key):
            return mask_written(written, value)
        if _is_needed(value, key):
            return self._copied(value)
        if found := _WITH_DEFAULT.fullmatch(written):
            name, default, rest = found.groups()
            root = _whole(os.environ.get(name, default))
            quoted = root if _PLAIN.fullmatch(root) else "'" + root.replace("\\", "\\\\").replace("'", "\\'") + "'"
            return f"${{oc.env:{name},{quoted}}}{rest}"
        return written

    def _copied(self, value: str) -> str:
        source = Path(_whole(value)).resolve()
        if source.is_relative_to(self._files):
            return f"${{here:{FILES}/{source.relative_to(self._files)}}}"
        for name in _candidates(source):
            taken = self._names.get(name, self._files / name)
            if taken == source or not taken.exists() or _same(taken, source):
                self._names.setdefault(name, source)
                return f"${{here:{FILES}/{name}}}"
        raise AssertionError("there is always another name")


def _is_path(value: str, key: tuple[str, ...]) -> bool:
    """Whether a value names something on the disk: a file, a folder, or a pattern of files in a folder."""
    is_json = value.startswith(("{", "["))  # or a pattern, which only an option for paths begins with a bracket
    looks_like_one = key[-1] in _PATHS or (not is_json and (os.sep in value or bool(Path(value).suffix)))
    if "://" in value or key[-1] in _OF_RUN or not looks_like_one:
        return False
    start, *pattern = re.split(r"[*?\[{]", value, maxsplit=1)
    return _exists(value) or bool(pattern and os.path.isdir(_whole(os.path.dirname(start))))  # noqa: PTH112, PTH120 (see `_exists`)


def _is_needed(value: str, key: tuple[str, ...]) -> bool:
    """Whether the run's model or the names of its classes are made of it."""
    of_model = key[0] == "model" and key[-1] not in _INITIAL and Path(value).suffix not in _WEIGHTS
    return _exists(value) and (of_model or key[-1] == "classes")


def _exists(path: str) -> bool:
    return os.path.exists(_whole(path))  # noqa: PTH110 (any text: also one too long for a path, which pathlib refuses)


def _whole(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 (keeps what a pattern has)


def _candidates(source: Path) -> Iterator[str]:
    stem, suffix = (re.sub(r"[^\w.-]", "_", part) for part in (source.stem, source.suffix))
    yield f"{stem}{suffix}"
    for number in range(2, 10_000):
        yield f"{stem}-{number}{suffix}"


def _parts(source: Path) -> list[Path]:
    """The files of a folder that are copied, relative to it: no weights, which checkpoints have."""
    files = (file for file in source.iterdir() if file.is_file() and file.suffix not in _WEIGHTS)
    return sorted(file.relative_to(source) for file in files)


def _same(one: Path, other: Path) -> bool:
    if one.is_dir() != other.is_dir():
        return False
    if one.is_file():
        return filecmp.cmp(one, other, shallow=False)
    parts = _parts(one)
    return parts == _parts(other) and all(filecmp.cmp(one / part, other / part, shallow=False) for part in parts)


def _copy(source: Path, target: Path) -> None:
    """As a whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as part:
        new = Path(part) / target.name
        if source.is_file():
            shutil.copyfile(source, new)
        else:
            new.mkdir()
            for file in _parts(source):
                shutil.copyfile(source / file, new / file)
        new.replace(target)
