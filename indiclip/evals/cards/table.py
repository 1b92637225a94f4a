"""Cards as text for a terminal."""

import unicodedata
from collections.abc import Sequence
from textwrap import shorten

from indiclip.evals.cards.card import Card, CardClass, load_card
from indiclip.evals.cards.protocols import protocol_classes, required_arguments
from indiclip.evals.suites import SUITES, packaged
from indiclip.names import plain

_SHOWN = 5  # languages in the list of cards
_FIRST = ("en", "hi")  # languages of the names in the short table
_SENTENCE = 100  # letters of what a protocol gives


def list_cards(suites: Sequence[str] = SUITES) -> list[str]:
    """A table of the packaged cards."""
    rows = [["card", "task", "classes", "chance", "languages"]]
    for suite in suites:
        for card in map(load_card, packaged(suite)):
            chance = f"{card.chance:.1%}" if card.chance else "-"
            task = card.task or card.protocols[0].name
            rows.append([f"{suite}/{card.id}", task, str(len(card.classes) or "-"), chance, _languages(card)])
    return _aligned(rows)


def list_protocols() -> list[str]:
    """A table of the protocols that come with IndiCLIP."""
    rows = [["protocol", "needs of an image", "gives"]]
    for name, one in protocol_classes().items():
        needs = [*sorted(one.required_fields), *(f"init_args: {argument}" for argument in required_arguments(one))]
        gives = " ".join((one.__doc__ or "").split()).partition(". ")[0].rstrip(".")
        rows.append([name, ", ".join(needs), shorten(gives, _SENTENCE, placeholder=" ...")])
    return _aligned(rows)


def show_card(card: Card, all_names: bool = False) -> list[str]:
    """What a card says of itself, and its classes as a table: with their English and Hindi names, or with all.

    `*` marks names that were romanised by rule, `?` those that only one writer has, which no score is by.
    """
    about = {
        "task": f"{card.task or card.protocols[0].name}, by {card.metric}",
        "chance": f"{card.chance:.2%}" if card.chance else "depends on the number of images",
        "images": f"{card.source} (folder {card.folder})",
        "licence": card.licence,
        "notes": " ".join(card.notes.split()),
    }
    lines = [
        f"{card.id}: {card.title} ({plain(card.file)})",
        *(f"  {key}: {text}" for key, text in about.items() if text),
    ]
    lines += [f"  prompts in {language}: {templates[0]}" for language, templates in card.prompts.items()]
    if not card.classes:
        return lines
    # A language that few classes have a name in is left to the last column.
    most = [language for language, count in card.languages.items() if 2 * count > len(card.classes)]
    wide = most[:_SHOWN] if all_names else _FIRST
    rows = [["class", *wide, "looks like", "other names" if all_names else "languages"]]
    for one in card.classes:
        names = {language: f"{name}{_mark(one, language)}" for language, name in one.names.items()}
        columns = [names.get(language, "-") for language in wide]
        others = [f"{language}: {name}" for language, name in names.items() if language not in wide]
        last = ", ".join([*others, *one.aliases]) if all_names else str(len(names))
        rows.append([one.id, *columns, ", ".join(one.confusable_with) or "-", last])
    return [*lines, "", *_aligned(rows), *([] if all_names else ["", "all names: --all"])]


def _mark(one: CardClass, language: str) -> str:
    if language in one.derived:
        return "*"
    return "" if one.is_sure(language) else "?"


def _languages(card: Card) -> str:
    stated = {language: count for language, count in card.languages.items() if not language.endswith("-Latn")}
    counts = [code if count == len(card.classes) else f"{code} ({count})" for code, count in stated.items()]
    return ", ".join(counts[:_SHOWN]) + (f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _width(text: str) -> int:
    """Cells of a terminal, nearly: signs that stand on a letter take none."""
    return sum(unicodedata.category(one) not in ("Mn", "Me", "Cf") for one in text)
