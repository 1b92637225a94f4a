"""Config files: the shipped ones by name, and paths in them that hold wherever the file lies.

In a config, `${here:PATH}` is relative to the folder of the file it stands in, and `${shipped:PATH}` to that of the
shipped configs.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from indiclip.names import did_you_mean, nearest_beside
from indiclip.old_names import translate_config

_PACKAGE = Path(__file__).parent
# In a wheel they lie in the package, in a checkout beside it.
SHIPPED = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
_ANCHOR = re.compile(r"\$\{(here|shipped):([^${}]*)\}")
_SUFFIXES = (".yaml", ".yml")


def find_config(name: str) -> Path:
    """A config file by its path, else a shipped one: `quickstart`, `evals/india`, also `conf/quickstart.yaml`.

    Raises:
        FileNotFoundError: Neither; names the nearest.
    """
    file = Path(name)
    if file.is_file():
        return file
    shipped = {str(path.relative_to(SHIPPED).with_suffix("")): path for path in sorted(SHIPPED.rglob("*.yaml"))}
    plain = str(file.with_suffix("") if file.suffix in _SUFFIXES else file).removeprefix("conf/")
    if plain in shipped:
        return shipped[plain]
    near = nearest_beside(file, "*.y*ml") or did_you_mean(plain, shipped)
    raise FileNotFoundError(f"--config: no file {name}{near}; shipped are {', '.join(_listed(plain, shipped))}")


def _listed(plain: str, shipped: Iterable[str]) -> list[str]:
    """The shipped names of the folder that a name asks for, with its folders; of all where it has no such folder."""
    folder = f"{Path(plain).parent}/"
    if not any(name.startswith(folder) for name in shipped):
        folder = ""
    parts = [name.removeprefix(folder).partition("/") for name in shipped if name.startswith(folder)]
    return list(dict.fromkeys(f"{folder}{first}{slash}" for first, slash, _ in parts))


def find_configs(words: list[str]) -> list[str]:
    """The words of a command, with the file that each `--config` stands for."""
    found: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before in ("--config", "-c"):
            found.append(str(find_config(word)))
        elif word.startswith("--config="):
            found.append(f"--config={find_config(word.removeprefix('--config='))}")
        else:
            found.append(word)
    return found


def read_config(file: Path) -> Any:
    """A config file's content, with today's names and with paths in place of `${here:...}` and `${shipped:...}`."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return anchored(translate_config(content), file.resolve().parent)


def anchored(value: Any, folder: Path) -> Any:
    """A config, or a part of one, with paths in place of `${here:...}` and `${shipped:...}`.

    Args:
        value: As read from a file.
        folder: Of the file.
    """
    folders = {"here": folder, "shipped": SHIPPED}
    return map_strings(value, lambda text: _ANCHOR.sub(lambda found: str(folders[found[1]] / found[2]), text))


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A tree of mappings and lists with every string in it changed."""
    if isinstance(value, dict):
        return {key: map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def strings_of(value: Any) -> Iterator[str]:
    """Every string in a tree of mappings and lists."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_of(item)
    elif isinstance(value, str):
        yield value
