"""The model card of an exported folder, `README.md`.

Its words are ours. What is not known is said to be unknown.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from indiclip.datasets.tables import load_json
from indiclip.export.source import Source
from indiclip.export.target import Target
from indiclip.masking import mask
from indiclip.names import reason_of

_UNKNOWN_LICENCE = "Not stated. It depends on the data above and on the weights that the run began with."
_PLAIN_METRIC = re.compile(r"(val|eval)/[^/]+/[^/]+")  # without those by language
_SHOWN = 40
_CARD = """\
---
library_name: {library}
tags: [indiclip, vision-encoder]
---

# {title}

An image{sides} encoder trained with IndiCLIP, written for {to}. From {weights}.

## How to load

```python
{usage}
```

## How close it is

`parity.json` compares this folder, opened by the other library, with the encoder that was trained: at most
{difference:.1e} apart ({bound}), by case.
{notes}
## Data

{data}

## Scores

{scores}

## Licence

{licence}
"""


def write_card(folder: Path, name: str, source: Source, target: Target, record: dict[str, Any], licence: str) -> None:
    """Write `README.md`.

    Args:
        folder: Where to.
        name: What the folder will be called.
        source: What is exported.
        target: Which has written it, and knows how it is loaded.
        record: What `parity.json` holds.
        licence: As the user named it.
    """
    title = source.run.name if source.run else Path(source.origin).name
    notes = [f"- {note}" for note in (*record["losses"], *record["notes"])]
    bound = "the bound is {bound:.0e}" if record["within_bound"] else "more than the bound of {bound:.0e}"
    card = _CARD.format(
        library=target.library_name,
        title=title,
        sides=" and text" if "text" in record else "",
        to=record["to"],
        weights=record["weights"],
        usage=target.usage.format(out=json.dumps(name, ensure_ascii=False)[1:-1]),  # within quotes
        difference=record["largest_difference"],
        bound=bound.format(bound=record["bound"]),
        notes="\n" + "\n".join(notes) + "\n" if notes else "",
        data="\n".join(_data(source.run)),
        scores="\n".join(_scores(source)),
        licence=licence or _UNKNOWN_LICENCE,
    )
    folder.joinpath("README.md").write_text(card, "utf-8")


def _data(run: Path | None) -> Iterator[str]:
    """A line for each source that the run trained on."""
    if run is None:
        yield "Unknown: these are no weights of a run."
        return
    file = run / "config.yaml"
    try:
        with file.open(encoding="utf-8") as stream:  # whose name stands in the errors
            config = yaml.safe_load(stream) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is no readable YAML ({reason_of(error, None)})") from error
    train = _object(_object(config, file).get("data") or {}, file).get("train") or []
    for source in (_object(one, file) for one in train):
        dataset = _object(source.get("dataset") or {}, file)
        arguments = _object(dataset.get("init_args") or {}, file)
        settings = ", ".join(f"{key} {plain(value)}" for key, value in arguments.items() if value)
        kind = str(dataset.get("class_path", "?")).rpartition(".")[2]
        yield f"- {source.get('task')}: {kind}" + (f" ({settings})" if settings else "")
    if not train:
        yield "The run's config.yaml names none."


def _scores(source: Source) -> Iterator[str]:
    """A table of what the run scored on held-out data, and where these weights are not those that it scored."""
    file = source.run / "metrics.json" if source.run else None
    if file is None or not file.is_file():
        yield "None: the run left no metrics.json."
        return
    record = _object(load_json(file), file)
    rows = {
        name: value
        for name, value in (record.get("metrics") or {}).items()
        if _PLAIN_METRIC.fullmatch(name) and isinstance(value, int | float)
    }
    step = record.get("step")
    others = [] if source.step == step else ["of another step"]
    others += ["not the averages that were scored"] if source.averaged is False else []
    others += [f"cut to a length of {source.length}"] if source.length else []
    apart = f"; not of this folder's weights, which are {', '.join(others)}" if others else ""
    yield f"Of the run, on held-out data, after step {step}{apart}:"
    yield ""
    yield "| metric | value |"
    yield "|---|---|"
    for name in list(rows)[:_SHOWN]:
        yield f"| {name} | {rows[name]:.4g} |"
    if len(rows) > _SHOWN:
        yield f"| {len(rows) - _SHOWN} more in the run's metrics.json | |"


def _object(found: Any, file: Path) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{file}: found a {type(found).__name__}, expected an object")
    return found


def plain(value: Any) -> str:
    """Without folders of this machine, queries and user names of addresses."""
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items())
    return " ".join(re.split(r"[?#]", word)[0].rstrip("/").rpartition("/")[2] for word in mask(str(value)).split())
