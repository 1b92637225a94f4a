"""What a user's files hold, and what of it is used: nothing is lost silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


class Inventory:
    """For each unit (rows, images, boxes, captions, points, members, ...): present == used + left out, by reason.

    A reader counts `present` before it filters anything, and `used` from what it really gives; that the two sides agree
    is therefore a check, which `verify` makes.

    Attributes:
        present: Unit -> how many the files hold.
        used: Unit -> how many are given.
    """

    def __init__(self) -> None:
        self.present: Counter[str] = Counter()
        self.used: Counter[str] = Counter()
        self._left_out: dict[tuple[str, str], tuple[int, str]] = {}
        self._altered: dict[tuple[str, str], tuple[int, str]] = {}

    def leave_out(self, unit: str, reason: str, example: str, count: int = 1) -> None:
        """Count what is not used.

        Args:
            unit: As in `present`.
            reason: The same words for all of a kind ("thinner than a pixel"), so that they can be counted.
            example: Where one of them is: file and row, id or member. The first is kept.
            count: How many.
        """
        _add(self._left_out, unit, reason, example, count)

    def leave_out_each(self, unit: str, reason: str, wheres: Sequence[str], which: np.ndarray) -> None:
        """As `leave_out`, of those of `wheres` that the bool array `which` says."""
        if which.any():
            self.leave_out(unit, reason, wheres[int(which.argmax())], int(which.sum()))

    def alter(self, unit: str, how: str, example: str, count: int = 1) -> None:
        """Count what is used, but not as it stands in the file; see `leave_out`."""
        _add(self._altered, unit, how, example, count)

    def alter_each(self, unit: str, how: str, wheres: Sequence[str], which: np.ndarray) -> None:
        """See `alter` and `leave_out_each`."""
        if which.any():
            self.alter(unit, how, wheres[int(which.argmax())], int(which.sum()))

    def left_out(self) -> Iterator[tuple[str, str, int, str]]:
        """(unit, reason, count, example)."""
        for (unit, reason), (count, example) in self._left_out.items():
            yield unit, reason, count, example

    def __iadd__(self, other: Inventory) -> Inventory:
        self.present.update(other.present)
        self.used.update(other.used)
        for mine, theirs in ((self._left_out, other._left_out), (self._altered, other._altered)):
            for (unit, reason), (count, example) in theirs.items():
                _add(mine, unit, reason, example, count)
        return self

    def verify(self) -> None:
        """Raise an AssertionError where something is neither used nor left out for a reason."""
        sums = Counter(self.used)
        for unit, _, count, _ in self.left_out():
            sums[unit] += count
        assert +sums == +self.present, f"present {dict(self.present)}, used and left out {dict(sums)}"

    def summary(self) -> dict[str, Any]:
        """Unit -> `{present, used, altered, left_out}`, for JSON; the last two are `{reason: {count, example}}`."""
        units: dict[str, Any] = {
            unit: {"present": count, "used": self.used[unit], "altered": {}, "left_out": {}}
            for unit, count in self.present.items()
        }
        for kind, found in (("altered", self._altered), ("left_out", self._left_out)):
            for (unit, reason), (count, example) in found.items():
                units[unit][kind][reason] = {"count": count, "example": example}
        return units

    @classmethod
    def of_summary(cls, summary: dict[str, Any]) -> Inventory:
        """From what `summary` gave."""
        inventory = cls()
        for unit, found in summary.items():
            inventory.present[unit], inventory.used[unit] = int(found["present"]), int(found["used"])
            for reason, entry in found["left_out"].items():
                inventory.leave_out(unit, reason, str(entry["example"]), int(entry["count"]))
            for how, entry in found["altered"].items():
                inventory.alter(unit, how, str(entry["example"]), int(entry["count"]))
        return inventory

    def lines(self) -> list[str]:
        """One line per unit: "1,434 of 1,436 boxes, 3 of them clipped to the image (annotation 7); left out: 2 thinner
        than a pixel (annotation 17)".
        """
        lines = []
        for unit, found in self.summary().items():
            altered, left_out = (
                ", ".join(f"{entry['count']:,} {of_them}{reason} ({entry['example']})" for reason, entry in one.items())
                for one, of_them in ((found["altered"], "of them "), (found["left_out"], ""))
            )
            said = f"{found['used']:,} of {found['present']:,} {unit}" if left_out else f"{found['present']:,} {unit}"
            said += f", {altered}" if altered else ""
            lines.append(f"{said}; left out: {left_out}" if left_out else said)
        return lines


def _add(counts: dict[tuple[str, str], tuple[int, str]], unit: str, reason: str, example: str, count: int) -> None:
    before, first = counts.get((unit, reason), (0, example))
    if count:
        counts[unit, reason] = before + count, first
