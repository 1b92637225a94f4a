"""Names of tensors, from ours to another library's."""

import re
from collections.abc import Iterable, Sequence


def renamed(names: Iterable[str], table: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Our name -> theirs, of all that one of the patterns matches from the beginning on.

    Args:
        names: Ours.
        table: Pattern of the beginning of a name, and what takes its place.
    """
    found = {}
    for name in names:
        for pattern, theirs in table:
            if re.match(pattern, name):
                found[name] = re.sub(f"^{pattern}", theirs, name)
                break
    return found
