"""The files of a benchmark run: `metrics.json`, and `predictions.parquet` with the answers of every image."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from indiclip import json_lines
from indiclip.evals.results import CardResult, Prediction, Result, Score, finite
from indiclip.masking import mask
from indiclip.names import well_formed

_METRICS, _PREDICTIONS = "metrics.json", "predictions.parquet"


def save_result(result: Result, folder: Path) -> None:
    """Write `metrics.json` and `predictions.parquet`, each as a whole.

    Raises:
        ImportError: pyarrow is not installed.
        OSError: The disk is full, or the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_predictions(folder / _PREDICTIONS, result)
    content = {
        "model": result.model,
        "headline": result.headline(),
        "lengths": result.lengths,
        "views": result.views,
        "cards": [asdict(card) for card in result.cards],
        "scores": [{name: finite(value) for name, value in score._asdict().items()} for score in result.scores],
        "about": result.about,
    }
    text = well_formed(mask(json.dumps(content, indent=1, ensure_ascii=False))) + "\n"
    json_lines.write_whole(folder / _METRICS, text.encode())


def load_result(folder: Path, predictions: bool = True) -> Result:
    """A saved run.

    Raises:
        FileNotFoundError: No `metrics.json` there.
        ValueError: It is not one of our files.
    """
    file = folder / _METRICS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected the folder of a finished `indiclip bench`")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        result = Result(content["model"], content["lengths"], content["views"], about=content["about"])
        result.cards = [CardResult(**_defaults_of_earlier_runs(card) | card) for card in content["cards"]]
        result.scores = [Score(**row) for row in content["scores"]]
        result.scores = [row._replace(value=math.nan) if row.value is None else row for row in result.scores]
    except KeyError as error:
        raise ValueError(f"{file}: not the metrics of `indiclip bench`: the key {error} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not the metrics of `indiclip bench` ({type(error).__name__}: {error})") from error
    if predictions and (folder / _PREDICTIONS).is_file():
        result.predictions = _read_predictions(folder / _PREDICTIONS)
    return result


def _defaults_of_earlier_runs(card: dict[str, Any]) -> dict[str, Any]:
    """What a card of an earlier run does not say: then all had one of three main protocols."""
    if card["card"] == "ocr_indic":
        return {"protocol": "matching", "candidates": "texts"}
    if card["metric"].startswith(("image_", "text_")):
        return {"protocol": "retrieval", "candidates": "images"}
    return {}


def check_out(folder: Path) -> None:
    """Raise ValueError for a folder whose files are not a benchmark's, which its own would replace."""
    expected = "a new folder, or one of an earlier `indiclip bench`"
    check_is_no_training(folder, expected)
    try:
        load_result(folder, predictions=False)
    except FileNotFoundError:
        return
    except (ValueError, OSError) as error:
        raise ValueError(f"{_taken(folder, 'a metrics.json of another kind', expected)} ({error})") from error


def check_is_no_training(folder: Path, expected: str) -> None:
    """Raise ValueError for the folder of a training run, which others' files would be lost in."""
    for found in ("config.yaml", "checkpoints"):
        if (folder / found).exists():
            raise ValueError(_taken(folder, found, expected))


def _taken(folder: Path, found: str, expected: str) -> str:
    return f"--out {folder}: holds {found}, of a training run or another program; expected {expected}"


def load_pyarrow() -> Any:
    """The package that predictions are written with, or an ImportError that says what to do."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "predictions.parquet needs pyarrow, which is not installed: pip install 'indiclip[parquet]'"
        ) from error
    return pyarrow


def _write_predictions(file: Path, result: Result) -> None:
    pyarrow = load_pyarrow()
    text, flag = pyarrow.string(), pyarrow.bool_()
    kinds = {"rank": pyarrow.int32(), "hard_hit": flag, "flagged": flag}
    kinds |= {"top": pyarrow.list_(text), "cosines": pyarrow.list_(pyarrow.float32())}
    schema = pyarrow.schema([(name, kinds.get(name, text)) for name in Prediction._fields])
    tables = [schema.empty_table()]
    for predictions in result.answers.values():
        rows = [row._asdict() for row in predictions]
        try:
            tables.append(pyarrow.Table.from_pylist(rows, schema))
        except UnicodeEncodeError:  # a card's captions and a class's name may come from anywhere
            rows = json.loads(well_formed(json.dumps(rows, ensure_ascii=False)))
            tables.append(pyarrow.Table.from_pylist(rows, schema))
    with json_lines.open_whole(file) as opened:
        pyarrow.parquet.write_table(pyarrow.concat_tables(tables), opened, compression="zstd")


def _read_predictions(file: Path) -> list[Prediction]:
    table = load_pyarrow().parquet.read_table(file)
    there = [name for name in Prediction._fields if name in table.column_names]  # earlier runs have no `content`
    columns = [table[name].to_pylist() for name in there]
    return [Prediction(*row) for row in zip(*columns, strict=True)]
