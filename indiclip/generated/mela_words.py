"""What the fair is called: names and captions in English and twelve Indian languages (mela_words.json).

Captions are noun phrases whose parts need no agreement: a number follows its thing as in a list ("केसरिया रंग की
पतंग: तीन"), and where a language marks the gender of what follows "of the colour", `of` holds that word per noun.
"""

from dataclasses import dataclass
from typing import Any

from numpy.random import Generator

from indiclip.generated.base import load_table
from indiclip.generated.mela_things import THINGS
from indiclip.names import check_choice

CLASSES = [*THINGS, "person"]  # class id = place in this list
PERSON = CLASSES.index("person")

_WORDS: dict[str, dict[str, Any]] = load_table("mela_words.json")
LANGUAGES = list(_WORDS)  # ISO 639-1 codes


@dataclass(frozen=True)
class Group:
    """All instances of one kind in a scene; `colour` and `garment` are "" where they differ or do not apply."""

    kind: str
    count: int
    colour: str
    garment: str


def words(language: str) -> dict[str, Any]:
    """The tables of one language: kinds, garments, colours, numbers, places, templates, frames."""
    check_choice("language", language, LANGUAGES)
    return _WORDS[language]


def class_names(language: str = "en") -> list[str]:
    """Names of all classes in class-id order (16 things and the person), in native script."""
    kinds = words(language)["kinds"]
    return [kinds[kind] for kind in CLASSES]


def captions(rng: Generator, groups: list[Group], place: str) -> dict[str, str]:
    """One caption per language, all with the same attributes.

    Args:
        rng: Draws which attributes are told (number, colour, place) and the frame around them.
        groups: What is in the scene; empty for a fairground without any object.
        place: A key of the `places` table, or "" when there is none to tell.
    """
    number, colour, where, frame = rng.random(4)
    # Several kinds are rarely in the same place: only one kind has its place told.
    place = place if len(groups) == 1 else ""
    told = {"number": number < 0.5, "colour": colour < 0.65, "place": where < 0.45}
    return {language: caption(language, groups, place, told, frame) for language in LANGUAGES}


def caption(language: str, groups: list[Group], place: str, told: dict[str, bool], frame: float = 0.0) -> str:
    """A caption that tells these attributes, `number`, `colour` and `place`; `frame` in [0, 1) chooses the words around
    it, none below 0.5.
    """
    table = words(language)
    templates, frames = table["templates"], table["frames"]
    if not groups:
        return str(templates["empty"])
    phrases = [_phrase(table, group, told) for group in groups]
    what = templates["and"].join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    if place and told["place"]:
        what = templates["placed"].format(what=what, place=table["places"][place])
    # Half of the captions are bare; the rest share the other frames.
    chosen = 0 if frame < 0.5 else 1 + int((frame - 0.5) * 2 * (len(frames) - 1))
    return str(frames[chosen].format(what))


def _phrase(table: dict[str, Any], group: Group, told: dict[str, bool]) -> str:
    templates = table["templates"]
    # Only languages in which the captions use the plural have a table of it.
    plurals = table.get("plurals", {}) if group.count > 1 else {}
    what = plurals.get(group.kind, table["kinds"][group.kind])
    if told["colour"] and group.colour and (group.garment or group.kind != "person"):
        worn = group.garment and plurals.get(group.garment, table["garments"][group.garment])
        of = table.get("of", {}).get(group.garment or group.kind, "")
        template = templates["wearing" if worn else "coloured"]
        what = template.format(colour=table["colours"][group.colour], of=of, garment=worn, kind=what)
    if told["number"]:
        what = templates["counted"].format(number=table["numbers"][group.count - 1], what=what)
    return str(what)
