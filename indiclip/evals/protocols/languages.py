"""The languages in which a card's classes are told apart, and how they are asked for.

Shape letters: D classes that have a name in a language, P prompts.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from indiclip.evals.protocols.protocol import Options

if TYPE_CHECKING:
    from indiclip.evals.cards.classes import Card

_FEWEST_CLASSES = 5  # named in a language: fewer say nothing, unless the card has no more


class Language(NamedTuple):
    """The classes that have a name in a language, and their prompts."""

    code: str
    class_D: np.ndarray  # int64, ascending
    prompts: list[str]
    row_P: np.ndarray  # int64, for which of `class_D` a prompt is


def languages_of(card: "Card", options: Options) -> list[Language]:
    """The languages in which a card's classes are told apart, English first."""
    wanted = [code for code in card.languages if options.wants(code)]
    return [_language(card, code, options) for code in wanted if len(options.names(card, code)) >= fewest(card)]


def fewest(card: "Card") -> int:
    """Classes that have to have a name in a language for it to be scored."""
    return min(_FEWEST_CLASSES, len(card.classes))


def _language(card: "Card", code: str, options: Options) -> Language:
    names, templates = options.names(card, code), card.templates(code)
    classes = sorted(names)
    prompts = [template.replace("{c}", names[i]) for i in classes for template in templates]
    row_P = np.repeat(np.arange(len(classes)), len(templates))
    return Language(code, np.array(classes, dtype=np.int64), prompts, row_P)
