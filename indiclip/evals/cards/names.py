"""Where the names of our cards' classes are from, and how sure they are: a table beside the pages of a suite.

A page's own `names` stay as they are, but for what people reviewed, and the table says what they are worth; other
languages are the table's alone.
`votes` counts the writers and sources that have the name, none of which saw another's; two such votes are no review by
native speakers. tools/review_names.py makes the table and takes corrections over.
"""

import csv
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import NamedTuple

from indiclip.evals.cards.classes import Card, CardClass


class NameRow(NamedTuple):
    """A name of a class.

    Attributes:
        language: BCP 47.
        kind: `name`; `alias` for another spelling or word; `wrong` for a name of the page that is not to be used.
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


def read_names(suite: str) -> Table:
    """The table of a suite; empty where it has none."""
    found: Table = {}
    if names_file(suite).is_file():
        with names_file(suite).open(encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                one = NameRow._make(row[field] for field in NameRow._fields)
                of_class = found.setdefault(one.card, {}).setdefault(one.id, [])
                of_class.append(one._replace(votes=int(one.votes)))
    return found


_table = cache(read_names)


def with_names(card: Card) -> Card:
    """One of our cards with the names and votes of its suite's table."""
    found = _table(card.suite).get(card.id)
    if found is None:
        return card
    return replace(card, classes=tuple(with_rows(one, found.get(one.id, [])) for one in card.classes))


def with_rows(one: CardClass, rows: Sequence[NameRow]) -> CardClass:
    """A class of a page with the names and votes of its rows in the table."""
    wrong = {(row.language, row.name) for row in rows if row.kind == "wrong"}
    refused = {language for language, name in one.names.items() if (language, name) in wrong}
    refused |= {f"{language}-Latn" for language in refused} & {*one.derived}  # by rule, from the wrong name
    names = {language: name for language, name in one.names.items() if language not in refused}
    aliases = [alias for alias in one.aliases if alias not in {name for _, name in wrong}]
    aliases += [row.name for row in rows if row.kind == "alias"]
    votes, derived = dict[str, int](), {*one.derived}
    for row in rows:
        own = None if row.language in one.derived else names.get(row.language)
        if row.kind == "name" and (own in (None, row.name) or row.source.startswith("review")):
            names[row.language], votes[row.language] = row.name, row.votes
            (derived.add if row.source == "rule" else derived.discard)(row.language)
    # A page's name that the table does not have is one writer's: it was changed since.
    votes = {code: 1 for code in names if code != "en"} | votes
    return replace(
        one,
        names=names,
        aliases=tuple(dict.fromkeys(aliases)),
        votes=votes,
        derived=tuple(code for code in names if code in derived),
    )
