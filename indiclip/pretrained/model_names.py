"""Which library a `--model` is of; see `indiclip.evals.models.embedder.load_embedder`."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import timm

from indiclip.datasets.tables import load_json
from indiclip.names import did_you_mean

LIBRARIES = ("open_clip", "transformers", "timm")
_NOT_READ_BACK = "{folder}: is an export to {to}, which is not read back; expected the run that it is of"


def expand_user(model: str) -> str:
    """With the home folder for `~`, which the shell does not see in a YAML or behind `timm:NAME:`."""
    return re.sub(r"(?:^|(?<=:))~[^:]*", lambda path: str(Path(path[0]).expanduser()), model)


def library_of(model: str) -> tuple[str, str]:
    """(library, what it is to load), by the form of the name and by what files there are.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: Unclear; names what would be clear.
    """
    model = expand_user(model)
    prefix, colon, rest = model.partition(":")
    if colon and prefix in LIBRARIES:
        if not rest:
            raise ValueError(f"{model}: which model of {prefix}?")
        return prefix, rest
    path = Path(model)
    if path.is_dir():
        return _library_of_folder(path), str(path.absolute())  # which is no architecture's name
    if path.suffix == ".ckpt" and (path.is_file() or not colon):
        return "indiclip", model
    if path.is_file():
        raise ValueError(
            f"{model}: weights alone name no architecture; expected a checkpoint of ours (.ckpt), or "
            f"open_clip:ARCHITECTURE:{model} or timm:ARCHITECTURE:{model}"
        )
    if prefix == "hf-hub":
        expected = ", ".join(f"{library}:{model}" for library in LIBRARIES)
        raise ValueError(f"{model}: which library is to download it? Expected one of {expected}")
    if colon and not path.parent.name:
        raise ValueError(
            f"{model}: no library {prefix!r}{did_you_mean(prefix, LIBRARIES)}; expected one of {', '.join(LIBRARIES)}"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not path.parent.is_dir():
        hub = f"if it is on the hub, transformers:hf-hub:{model} downloads it"
        raise FileNotFoundError(f"{model}: no such run, checkpoint or folder; {hub}")
    raise FileNotFoundError(f"{model}: no such run, checkpoint or folder{did_you_mean(model, _names_like(path))}")


def _names_like(path: Path) -> list[str]:
    """What somebody may have meant who wrote it: what lies beside it, and models by their name alone."""
    beside = list(map(str, path.parent.glob("*")))
    models = [f"timm:{name}" for name in timm.list_models()]
    if importlib.util.find_spec("open_clip"):
        import open_clip

        models += [f"open_clip:{name}" for name in open_clip.list_models()]
    return beside + models


def _library_of_folder(folder: Path) -> str:
    found = []
    check_sentence_transformers(folder, may_be_text=True)
    if (proof := folder / "parity.json").is_file() and read_config(proof).get("to") == "onnx":
        raise ValueError(_NOT_READ_BACK.format(folder=folder, to="onnx"))
    if (folder / "open_clip_config.json").is_file():
        found.append("open_clip")
    if (file := folder / "config.json").is_file():
        config = read_config(file)
        if "model_type" in config:
            found.append("transformers")
        elif "architecture" in config:
            found.append("timm")
        elif config.get("format") == "indiclip-vitdet":
            found.append("vitdet")
        elif config.get("format") == "indiclip-torchvision":
            raise ValueError(_NOT_READ_BACK.format(folder=folder, to="torchvision"))
        elif not found:
            raise ValueError(f"{file}: found neither transformers' `model_type` nor timm's `architecture`")
    if len(found) > 1:
        which = " or ".join(f"{library}:{folder}" for library in found)
        raise ValueError(f"{folder}: holds the files of {' and '.join(found)}; expected {which}")
    return found[0] if found else "indiclip"


def check_sentence_transformers(folder: Path, may_be_text: bool = False) -> None:
    """Raise ValueError for a folder of that library, or a part of one, that names the folder which is a model.

    Args:
        folder: Any.
        may_be_text: Let a text model alone pass, which lies in the folder itself.
    """
    for whole in (folder, folder.parent):
        modules = load_json(whole / "modules.json") if (whole / "modules.json").is_file() else None
        if not (isinstance(modules, list) and all(isinstance(one, dict) and "type" in one for one in modules)):
            continue
        paths = {str(one["type"]).rpartition(".")[2]: str(one.get("path", "")) for one in modules}
        if (model := paths.get("CLIPModel")) is None and not (may_be_text and whole == folder):
            if whole == folder or folder.name in paths.values():
                raise ValueError(f"{whole}: is a sentence-transformers model of text only ({', '.join(paths)})")
        elif model is not None and (whole / model).resolve() != folder.resolve():
            raise ValueError(f"{whole}: is a sentence-transformers folder; expected the model in it, {whole / model}")


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, and ValueError for anything else."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    config = load_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: found a {type(config).__name__}, expected an object")
    return config
