"""The YAML of a card -> `Card`, everything checked: a slip in a page would be a wrong score that nobody notices.

Keys of a card: `title`, `task` or `protocols`, `classes` or `class_source`, `prompts`, and `metric`, `chance`,
`num_candidates`, `generator`, `source`, `licence`, `notes`, `folder` where they differ from what is usual. `protocols`,
`class_source` and `generator` name Python classes and functions by their paths, and so can run any code; protocols of
ours may be named shortly, such as `few_shot`.

A class has `id`, `names` (with `en`), and `aliases`, `confusable_with`, `facts` where there are any. `romanised` are
names made by rule, see tools/romanise.py.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from indiclip.datasets.languages import OF_INDIA, language_tag
from indiclip.datasets.tables import is_number
from indiclip.evals.cards.classes import Card, CardClass, ClassSource, bare
from indiclip.evals.cards.objects import named, object_of
from indiclip.evals.cards.protocols import protocol_of
from indiclip.evals.protocols.protocol import Protocol, check_group
from indiclip.names import check_choice, check_whole, did_you_mean, plain, reason_of, shorten
from indiclip.strict_yaml import UniqueKeys

_KEYS = (
    "title",
    "task",
    "protocols",
    "classes",
    "class_source",
    "generator",
    "prompts",
    "metric",
    "chance",
    "num_candidates",
    "source",
    "licence",
    "notes",
    "folder",
)
_CLASS_KEYS = ("id", "names", "romanised", "aliases", "confusable_with", "facts")
_FOLDER = re.compile(r"[\w-]+")
_CANDIDATES = 10
_CLASS_FIELDS = {"class", "classes"}  # what is known of an image in classes


class _Loader(UniqueKeys):
    """Safe YAML in which `no` (Norwegian) is text."""


_NOT_TEXT = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_TEXT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Entry:
    """Keys and values of a page, whose errors begin with where they stand.

    Args:
        value: As YAML reads it.
        where: For messages.
        keys: The ones that it may have; none stands for any.
    """

    def __init__(self, value: Any, where: str, keys: Sequence[str] = ()) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: found {shorten(value)}; expected keys and values")
        for key in value:
            if keys and key not in keys:
                hint = did_you_mean(str(key), keys)
                raise ValueError(f"{where}: no such key {key!r}{hint}; expected {', '.join(keys)}")
        self.value: dict[str, Any] = value
        self.where = where

    def text(self, key: str, default: str | None = None, optional: bool = False) -> str:
        return _text(self.value.get(key, default), f"{self.where}: {key}", optional)

    def folder(self, key: str, default: str | None = None) -> str:
        found = self.text(key, default)
        if not _FOLDER.fullmatch(found):
            raise ValueError(f"{self.where}: {key}: found {found!r}; expected a folder's name: letters, digits, _ or -")
        return found

    def texts(self, key: str) -> tuple[str, ...]:
        found = self.value.get(key, [])
        if not isinstance(found, list):
            raise ValueError(f"{self.where}: {key}: found {shorten(found)}; expected a list")
        return tuple(_text(one, f"{self.where}: {key}") for one in found)

    def entry(self, key: str) -> "_Entry":
        return _Entry(self.value.get(key, {}), f"{self.where}: {key}")

    def by_language(self, key: str) -> "_Entry":
        found = self.entry(key)
        for language in found.value:
            if not isinstance(language, str) or language_tag(language) != language:
                hint = did_you_mean(str(language), [*OF_INDIA, *(f"{one}-Latn" for one in OF_INDIA)])
                expected = "expected a BCP 47 code such as en, hi, hi-Latn"
                raise ValueError(f"{found.where}: {language!r} is no language{hint}; {expected}")
        return found


def _text(value: Any, where: str, optional: bool = False) -> str:
    if not isinstance(value, str) or not (value.strip() or optional):
        found = "nothing" if value is None else shorten(value)
        raise ValueError(f"{where}: found {found}; expected text (quote what YAML takes for a number)")
    return plain(value).strip()


def parse_card(text: str, file: str, card_id: str, suite: str) -> Card:
    """The card that a YAML text is; see the module and `load_card`."""
    try:
        tree = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        reason = reason_of(error, None).replace('in "<unicode string>", ', "in ")
        raise ValueError(f"{file}: no YAML: {reason}") from error
    page = _Entry(tree, file, _KEYS)
    if not {"task", "protocols"} & tree.keys():
        raise ValueError(f"{file}: task: found nothing; expected {', '.join(_tasks())}, or `protocols`")
    task = page.text("task", "", optional="protocols" in tree)
    if task:
        check_choice(f"{file}: task", task, _tasks())
    protocols = _protocols(tree.get("protocols", _tasks().get(task)), file)
    source, classes = _classes(page, protocols)
    has_texts = any(protocol.candidates == "texts" for protocol in protocols)
    num_candidates = tree.get("num_candidates", _CANDIDATES) if has_texts else 0
    if has_texts:
        check_whole({f"{file}: num_candidates": num_candidates}, 2)
    choices = num_candidates or len(classes)
    chance = protocols[0].chance or (1 / choices if choices else 0.0)
    stated = tree.get("chance", chance)
    if not is_number(stated) or abs(stated - chance) > 5e-4:
        raise ValueError(f"{file}: chance: found {stated!r}; of this card it is {chance:.4f}")
    metrics = protocols[0].metrics
    metric = page.text("metric", metrics[0])
    check_choice(f"{file}: metric", metric, metrics)
    about = {key: page.text(key, "", optional=True) for key in ("source", "licence", "notes")}
    generator = named(tree["generator"], f"{file}: generator") if "generator" in tree else None
    return Card(
        card_id, page.text("title", card_id), suite, task, protocols, classes, _prompts(page), metric, **about,
        file=file, chance=chance, folder=page.folder("folder", card_id), num_candidates=num_candidates,
        class_source=source, generator=generator,
    )  # fmt: skip


@cache
def _tasks() -> dict[str, list[Any]]:
    tasks: dict[str, list[Any]] = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text("utf-8"))
    return tasks


def _protocols(entries: Any, file: str) -> tuple[Protocol, ...]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: protocols: found {shorten(entries)}; expected a list of names or class paths")
    protocols = [protocol_of(entry, f"{file}: protocols") for entry in entries]
    _check_unique((protocol.name for protocol in protocols), f"{file}: protocols: the name")
    return tuple(protocols)


def _classes(page: _Entry, protocols: Sequence[Protocol]) -> tuple[ClassSource | None, tuple[CardClass, ...]]:
    """What gives the classes, if they do not stand on the page, and the classes."""
    where, entries = f"{page.where}: classes", page.value.get("classes", [])
    found = len(entries) if isinstance(entries, list) else shorten(entries)
    if "class_source" in page.value:
        if "classes" in page.value:
            raise ValueError(f"{page.where}: class_source: there are `classes` too; expected one of both")
        source: ClassSource = object_of(page.value["class_source"], f"{page.where}: class_source", ClassSource)
        return source, source.classes()
    if not any(protocol.required_fields & _CLASS_FIELDS for protocol in protocols):
        if entries:
            raise ValueError(f"{where}: found {found}; no protocol of the card tells classes apart")
        return None, ()
    if not isinstance(entries, list) or len(entries) < 2:
        raise ValueError(f"{where}: found {found}; expected a list of at least two classes")
    classes = [_class(entry, page.where, number) for number, entry in enumerate(entries, 1)]
    _check_together(classes, page.where)
    has_texts = any("text" in protocol.required_fields for protocol in protocols)
    for one in classes:  # which scores are by
        group = one.id if has_texts else one.facts.get("group")
        if group is not None:
            check_group(str(group), f"{page.where}: {one.id}: the group")
    return None, tuple(classes)


def _check_together(classes: Sequence[CardClass], file: str) -> None:
    """Raise ValueError for names of several classes, and for names of none."""
    _check_unique((one.id for one in classes), f"{file}: the id")
    for language in {language for one in classes for language in one.names}:
        _check_unique((one.names[language] for one in classes if language in one.names), f"{file}: the {language} name")
    id_of = {bare(one.id): one.id for one in classes}
    for one in classes:
        others = [other.id for other in classes if other is not one]
        for other in one.confusable_with:
            if other not in others:
                hint = did_you_mean(other, others)
                raise ValueError(f"{file}: {one.id}: confusable_with: {other!r} is no other class of the card{hint}")
        if id_of.get(bare(one.names["en"]), one.id) != one.id:
            raise ValueError(f"{file}: {one.id}: names: en: {one.names['en']!r} is the id of another class")


def _check_unique(names: Iterable[str], what: str) -> None:
    """Two classes of one name could not be told right."""
    for name, count in Counter(map(bare, names)).items():
        if count > 1:
            raise ValueError(f"{what} {name!r} is that of {count} classes; expected each once")


def _class(value: Any, file: str, number: int) -> CardClass:
    class_id = value.get("id") if isinstance(value, dict) else None
    entry = _Entry(value, f"{file}: {class_id or f'class number {number}'}", _CLASS_KEYS)
    class_id, where = entry.folder("id"), entry.where
    names, by_rule = _names(entry, "names"), _names(entry, "romanised")
    if twice := names.keys() & by_rule.keys():
        raise ValueError(f"{where}: romanised: {min(twice)} is a language of `names` too; expected one name")
    if "en" not in names:
        raise ValueError(f"{where}: names: no name in `en`; found {sorted(names)}")
    return CardClass(
        class_id,
        names | by_rule,
        entry.texts("aliases"),
        entry.texts("confusable_with"),
        _facts(entry.entry("facts")),
        derived=tuple(by_rule),
    )


def _names(entry: _Entry, key: str) -> dict[str, str]:
    found = entry.by_language(key)
    return {language: unicodedata.normalize("NFC", found.text(language)) for language in found.value}


def _facts(facts: _Entry) -> dict[str, Any]:
    """Anything, but for the facts that scores come from."""
    for name, most in (("lat", 90), ("lon", 180)):
        degrees = facts.value.get(name, 0)
        if not is_number(degrees) or abs(degrees) > most:
            raise ValueError(f"{facts.where}: {name}: found {shorten(degrees)}; expected degrees, -{most} to {most}")
    sample_words = facts.entry("sample_words")
    for language in sample_words.value:
        sample_words.texts(language)
    return facts.value


def _prompts(page: _Entry) -> dict[str, tuple[str, ...]]:
    found = page.by_language("prompts")
    prompts = {language: found.texts(language) for language in found.value}
    for language, templates in prompts.items():
        for template in templates:
            if template.count("{c}") != 1:
                raise ValueError(f"{found.where}: {language}: {template!r}; expected one {{c}}, where the name goes")
        if not templates:
            raise ValueError(f"{found.where}: {language}: found none; expected templates with {{c}}")
    return prompts
