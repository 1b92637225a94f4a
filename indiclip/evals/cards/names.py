"""Where the names of our cards' classes are from, and how sure they are: a table beside the pages of a suite.

A page's own `names` stay as they are, but for what people reviewed, and the table says what they are worth; other
languages are the table's alone.
`votes` counts the writers and sources that have the name, none of which saw another's; two such votes are no review by
native speakers. tools/review_names.py makes the table and takes corrections over.
"""

import csv
from dataclasses import replace
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import NamedTuple

from indiclip.evals.cards.classes import Card, CardClass

FIELDS = ("card", "id", "language", "name", "kind", "source", "votes")


class NameRow(NamedTuple):
    """A name of a class.

    Attributes:
        language: BCP 47.
        kind: `name`, or `alias` for another spelling or word.
        source: `written` (from memory), `holidays` (the package's translations), `CLDR`, `rule` (romanised by
            tools/romanise.py), `review: ...`; with `+` between several.
        votes: How many of these have it.
    """

    card: str
    id: str
    language: str
    name: str
    kind: str
    source: str
    votes: int


Table = dict[str, dict[str, list[NameRow]]]  # card -> class -> its names


def names_file(suite: str) -> Traversable:
    """The table of a suite, whether it is there or not."""
    return resources.files("indiclip.evals") / suite / "names.tsv"


@cache
def _table(suite: str) -> Table:
    return read_names(suite)


def read_names(suite: str) -> Table:
    """The table of a suite; empty where it has none."""
    found: Table = {}
    if names_file(suite).is_file():
        with names_file(suite).open(encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                card, class_id, language, name, kind, source, votes = (row[field] for field in FIELDS)
                one = NameRow(card, class_id, language, name, kind, source, int(votes))
                found.setdefault(one.card, {}).setdefault(one.id, []).append(one)
    return found


def with_names(card: Card) -> Card:
    """One of our cards with the names and votes of its suite's table."""
    found = _table(card.suite).get(card.id)
    if found is None:
        return card
    return replace(card, classes=tuple(_named(one, found.get(one.id, [])) for one in card.classes))


def _named(one: CardClass, rows: list[NameRow]) -> CardClass:
    names, votes, derived = dict(one.names), dict[str, int](), set(one.derived)
    aliases = dict.fromkeys(one.aliases)
    for row in rows:
        has_own = row.language in one.names and row.language not in one.derived
        if row.kind == "alias":
            aliases[row.name] = None
        elif not has_own or row.name == one.names[row.language] or row.source.startswith("review"):
            names[row.language], votes[row.language] = row.name, row.votes
            derived.discard(row.language)
            if row.source == "rule":
                derived.add(row.language)
    # A page's name that the table does not have is one writer's: it was changed since.
    votes |= {code: 1 for code in one.names if code not in votes and code != "en"}
    return replace(
        one, names=names, aliases=tuple(aliases), votes=votes, derived=tuple(c for c in names if c in derived)
    )
