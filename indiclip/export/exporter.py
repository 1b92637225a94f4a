"""From an encoder to a folder of another library: written beside its place, proved, and put in it, or nothing."""

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from indiclip.export.card import plain, write_card
from indiclip.export.new_folder import new_folder
from indiclip.export.parity import measure
from indiclip.export.source import Source
from indiclip.export.target import Loss, Target, find_target, who_could


class Refused(ValueError):
    """An encoder that does not fit a target.

    Args:
        lines: A line for each reason.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = list(lines)


def export(
    source: Source,
    to: str,
    out: Path,
    allow_loss: bool = False,
    licence: str = "",
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model for another library.

    Args:
        source: What is exported.
        to: A target, see `indiclip.export.target.target_names`.
        out: The folder; not there, or empty.
        allow_loss: Also where the other library computes something else, as far as that is measured.
        licence: For the card; empty is said to be unknown.
        options: Of the target alone.

    Returns:
        What `parity.json` holds.

    Raises:
        Refused: It does not fit.
        ValueError: The other library gives other numbers than the bound allows.
        OSError: The folder holds something, or cannot be written.
    """
    target = find_target(to, options)
    losses = target.check(source.encoder)
    refusing = [loss for loss in losses if not (loss.is_degree and allow_loss)]
    if refusing:
        raise Refused(_reasons(source, to, refusing))
    with new_folder(out) as part:
        record = _write(target, to, source, part, out.resolve(), losses, licence)
        largest = record["largest_difference"]
        if not (record["within_bound"] or (allow_loss and isfinite(largest))):
            hint = " (--allow-loss writes it nevertheless)" if isfinite(largest) else ""
            raise ValueError(f"--to {to}: differs by {largest:.1e}; expected at most {record['bound']:.0e}{hint}")
    return record


def _write(
    target: Target, to: str, source: Source, part: Path, out: Path, losses: list[Loss], licence: str
) -> dict[str, Any]:
    target.write(source.encoder, part, out)
    record = {"to": to, "from": plain(source.origin), "weights": plain(source.chosen)}
    record |= measure(target, source.encoder, target.reload(source.encoder, part)) | {
        "losses": [loss.reason for loss in losses]
    }
    part.joinpath("parity.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    write_card(part, out.name, source, target, record, licence)
    return record


def _reasons(source: Source, to: str, losses: list[Loss]) -> list[str]:
    lines = [f"--to {to}: {loss.reason}" + (" (--allow-loss)" if loss.is_degree else "") for loss in losses]
    if all(loss.is_degree for loss in losses):
        return [*lines, "--allow-loss writes it and measures the loss"]
    return [*lines, who_could(source.encoder, to)]
