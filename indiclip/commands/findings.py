"""What `check` found: counted, with the first examples, and written line by line."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple, TextIO

from indiclip.datasets.inventory import Inventory
from indiclip.masking import mask

_EXAMPLES = 3  # of each kind that are printed
_LONGEST = 160  # characters of a reason that are printed


class Finding(NamedTuple):
    """Something about a shard or one of its samples."""

    kind: str
    shard: str
    key: str  # of the sample or the member; nothing where it is about the whole shard
    reason: str


class Findings:
    """Collects findings without keeping them.

    Args:
        warnings: The kinds that do not make data unusable.
        file: For all of them, one JSON object a line.
    """

    def __init__(self, warnings: Iterable[str], file: TextIO | None) -> None:
        self.warnings = frozenset(warnings)
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[Finding]] = defaultdict(list)
        self._file = file

    def add(self, findings: Iterable[Finding]) -> None:
        """Count them, and write them."""
        for finding in findings:
            self.counts[finding.kind] += 1
            if len(self.examples[finding.kind]) < _EXAMPLES:
                self.examples[finding.kind].append(finding)
            if self._file:
                level = "warning" if finding.kind in self.warnings else "problem"
                self._file.write(json_line({"level": level, **finding._asdict()}))

    @property
    def clean(self) -> bool:
        """Whether there is nothing but warnings."""
        return self.counts.keys() <= self.warnings

    def summary(self) -> dict[str, Any]:
        """Problems and warnings by kind: their number, and examples."""
        kinds: dict[str, Any] = {"problems": {}, "warnings": {}}
        for kind, count in self.counts.most_common():
            examples = [finding._asdict() for finding in self.examples[kind]]
            kinds["warnings" if kind in self.warnings else "problems"][kind] = {"count": count, "examples": examples}
        return kinds

    def show(self) -> None:
        """Print the summary."""
        for level, kinds in self.summary().items():
            if kinds:
                print(f"{level}:")
            for kind, found in kinds.items():
                print(f"{found['count']:>9,}  {kind}")
                for example in found["examples"]:
                    reason = " ".join(example["reason"].split())
                    shown = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..."
                    line = f"             {example['shard']}: {example['key']}: {shown}"
                    print(mask(line.replace(": : ", ": ")).encode(errors="backslashreplace").decode())


def show_lines(inventory: Inventory) -> None:
    """Print what is used of everything, and what is left out."""
    for line in inventory.lines():
        print(mask(f"  {line}").encode(errors="backslashreplace").decode())


def json_line(entry: dict[str, Any]) -> str:
    """One line of JSON, without secrets, in which Indian scripts can be read and broken names can be stored."""
    return mask(json.dumps(entry, ensure_ascii=False)).encode(errors="backslashreplace").decode() + "\n"
