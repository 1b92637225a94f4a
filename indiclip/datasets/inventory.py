"""What a user's files hold, and what of it is used: nothing is lost silently."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

Kind = Literal["left_out", "altered"]


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
        self._counts: dict[tuple[Kind, str, str], tuple[int, str]] = {}  # (kind, unit, reason) -> (count, example)

    def leave_out(self, unit: str, reason: str, example: str, count: int = 1) -> None:
        """Count what is not used.

        Args:
            unit: As in `present`.
            reason: The same words for all of a kind ("thinner than a pixel"), so that they can be counted.
            example: Where one of them is: file and row, id or member. The first is kept.
            count: How many.
        """
        self.count("left_out", unit, reason, example, count)

    def count_each(self, kind: Kind, unit: str, reason: str, wheres: Sequence[str], which: np.ndarray) -> None:
        """Count those of `wheres` that `which` says, bool or how many of each: what is left out, or is used otherwise
        than it stands in the file.
        """
        if which.any():
            self.count(kind, unit, reason, wheres[int((which > 0).argmax())], int(which.sum()))

    def count(self, kind: Kind, unit: str, reason: str, example: str, count: int = 1) -> None:
        """As `leave_out`, also of what is used otherwise than it stands in the file."""
        before, first = self._counts.get((kind, unit, reason), (0, example))
        if count:
            self._counts[kind, unit, reason] = before + count, first

    def left_out(self) -> Iterator[tuple[str, str, int, str]]:
        """(unit, reason, count, example)."""
        counts = self._counts.items()
        return ((unit, reason, *found) for (kind, unit, reason), found in counts if kind == "left_out")

    def __iadd__(self, other: "Inventory") -> "Inventory":
        self.present.update(other.present)
        self.used.update(other.used)
        for (kind, unit, reason), (count, example) in other._counts.items():
            self.count(kind, unit, reason, example, count)
        return self

    def verify(self) -> None:
        """Raise an AssertionError where something is neither used nor left out for a reason."""
        sums = Counter(self.used)
        for unit, _, count, _ in self.left_out():
            sums[unit] += count
        assert +sums == +self.present, f"present {dict(self.present)}, used and left out {dict(sums)}"

    def unused(self) -> str:
        """What is said of the first unit that is there and of which nothing is used; empty where there is none."""
        for line, (unit, count) in zip(self.lines(), self.present.items(), strict=True):
            if count and not self.used[unit]:
                return f"none of the {unit} can be used: {line}"
        return ""

    def check_used(self, where: str) -> None:
        """Raise a ValueError, which begins with `where`, where there is a unit of which nothing is used."""
        if unused := self.unused():
            raise ValueError(f"{where}: {unused}")

    def summary(self) -> dict[str, Any]:
        """Unit -> `{present, used, altered, left_out}`, for JSON; the last two are `{reason: {count, example}}`."""
        units: dict[str, Any] = {
            unit: {"present": count, "used": self.used[unit], "altered": {}, "left_out": {}}
            for unit, count in self.present.items()
        }
        for (kind, unit, reason), (count, example) in self._counts.items():
            units[unit][kind][reason] = {"count": count, "example": example}
        return units

    @classmethod
    def of_summary(cls, summary: dict[str, Any], where: str = "") -> "Inventory":
        """From what `summary` gave; `where` begins every example."""
        inventory = cls()
        for unit, found in summary.items():
            inventory.present[unit], inventory.used[unit] = int(found["present"]), int(found["used"])
            for kind in get_args(Kind):
                for reason, entry in found[kind].items():
                    inventory.count(kind, unit, reason, f"{where}{entry['example']}", int(entry["count"]))
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
            said = f"{said}; left out: {left_out}" if left_out else said
            lines.append("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in said))
        return lines

    def left_out_lines(self, where: str) -> list[str]:
        """The lines of the units of which something is left out; each begins with `where`."""
        return [f"{where}: {line}" for line in self.lines() if "left out" in line]
