"""What a user's files hold, and what of it is used: nothing is lost silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any


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

    def leave_out(self, unit: str, reason: str, example: str, count: int = 1) -> None:
        """Count what is not used.

        Args:
            unit: As in `present`.
            reason: The same words for all of a kind ("thinner than a pixel"), so that they can be counted.
            example: Where one of them is: file and row, id or member. The first is kept.
            count: How many.
        """
        before, first = self._left_out.get((unit, reason), (0, example))
        if count:
            self._left_out[unit, reason] = before + count, first

    def left_out(self) -> Iterator[tuple[str, str, int, str]]:
        """(unit, reason, count, example)."""
        for (unit, reason), (count, example) in self._left_out.items():
            yield unit, reason, count, example

    def __iadd__(self, other: Inventory) -> Inventory:
        self.present.update(other.present)
        self.used.update(other.used)
        for unit, reason, count, example in other.left_out():
            self.leave_out(unit, reason, example, count)
        return self

    def verify(self) -> None:
        """Raise an AssertionError where something is neither used nor left out for a reason."""
        sums = Counter(self.used)
        for unit, _, count, _ in self.left_out():
            sums[unit] += count
        assert +sums == +self.present, f"present {dict(self.present)}, used and left out {dict(sums)}"

    def summary(self) -> dict[str, Any]:
        """Unit -> `{present, used, left_out: {reason: {count, example}}}`, for JSON."""
        units: dict[str, Any] = {
            unit: {"present": count, "used": self.used[unit], "left_out": {}} for unit, count in self.present.items()
        }
        for unit, reason, count, example in self.left_out():
            units[unit]["left_out"][reason] = {"count": count, "example": example}
        return units

    def lines(self) -> list[str]:
        """One line per unit: "1,434 of 1,436 boxes; left out: 2 thinner than a pixel (annotation 17)"."""
        lines = []
        for unit, found in self.summary().items():
            reasons = [
                f"{entry['count']:,} {reason} ({entry['example']})" for reason, entry in found["left_out"].items()
            ]
            said = f"{found['used']:,} of {found['present']:,} {unit}" if reasons else f"{found['present']:,} {unit}"
            lines.append("; left out: ".join([said, ", ".join(reasons)]) if reasons else said)
        return lines
