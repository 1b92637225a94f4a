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
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from indiclip.datasets.languages import OF_INDIA, language_tag
from indiclip.datasets.tables import is_number
from indiclip.evals.cards.classes import Card, CardClass, ClassSource, bare
from indiclip.evals.cards.objects import named, object_of
from indiclip.evals.cards.protocols import protocol_of
from indiclip.evals.protocols.protocol import Protocol
from indiclip.names import check_choice, did_you_mean, plain, reason_of
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
_ID = re.compile(r"[\w-]+")
_CANDIDATES = 10
_CLASS_FIELDS = {"class", "classes"}  # what is known of an image in classes


class _Loader(UniqueKeys):
    """Safe YAML in which `no` (Norwegian) is text."""


_NOT_TEXT = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_TEXT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_card(text: str, file: str, card_id: str, suite: str) -> Card:
    """The card that a YAML text is; see the module and `load_card`."""
    try:
        tree = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        reason = reason_of(error, None).replace('in "<unicode string>", ', "in ")
        raise ValueError(f"{file}: no YAML: {reason}") from error
    tree = _mapping(tree, file, _KEYS)
    task = _text(tree.get("task", ""), f"{file}: task", optional="protocols" in tree)
    if task:
        check_choice(f"{file}: task", task, _tasks())
    protocols = _protocols(tree.get("protocols", _tasks().get(task)), file)
    fields = {field for protocol in protocols for field in protocol.required_fields}
    source = object_of(tree["class_source"], f"{file}: class_source") if "class_source" in tree else None
    if source is not None:
        if "classes" in tree:
            raise ValueError(f"{file}: class_source: there are `classes` too; expected one of both")
        if not isinstance(source, ClassSource):
            expected = "expected a class of indiclip.evals.cards.classes.ClassSource"
            raise ValueError(f"{file}: class_source: {type(source).__name__} is none; {expected}")
        classes = source.classes()
    else:
        classes = _classes(tree.get("classes", []), file, bool(fields & _CLASS_FIELDS))
    has_texts = any(protocol.candidates == "texts" for protocol in protocols)
    num_candidates = tree.get("num_candidates", _CANDIDATES) if has_texts else 0
    if not isinstance(num_candidates, int) or (has_texts and num_candidates < 2):
        raise ValueError(f"{file}: num_candidates: found {num_candidates!r}; expected a whole number from 2")
    chance = 1 / num_candidates if num_candidates else 1 / len(classes) if classes else 0.0
    chance = protocols[0].chance or chance
    _check_chance(tree.get("chance", chance), chance, file)
    metrics = protocols[0].metrics
    metric = _text(tree.get("metric", metrics[0]), f"{file}: metric")
    check_choice(f"{file}: metric", metric, metrics)
    generator = named(tree["generator"], f"{file}: generator") if "generator" in tree else None
    about = {key: _text(tree.get(key, ""), f"{file}: {key}", optional=True) for key in ("source", "licence", "notes")}
    folder = _text(tree.get("folder", card_id), f"{file}: folder")
    if not _ID.fullmatch(folder):
        raise ValueError(f"{file}: folder: found {folder!r}; expected the name of a folder")
    title = _text(tree.get("title", card_id), f"{file}: title")
    prompts = _prompts(tree.get("prompts", {}), file)
    return Card(
        card_id, title, suite, task, protocols, classes, prompts, metric, **about,
        file=file, chance=chance, folder=folder, num_candidates=num_candidates, class_source=source,
        generator=generator,
    )  # fmt: skip


@cache
def _tasks() -> dict[str, list[Any]]:
    tasks: dict[str, list[Any]] = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text("utf-8"))
    return tasks


def _protocols(entries: Any, file: str) -> tuple[Protocol, ...]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: protocols: found {_found(entries)}; expected a list of names or class paths")
    protocols = [protocol_of(entry, f"{file}: protocols") for entry in entries]
    _check_unique((protocol.name for protocol in protocols), f"{file}: protocols: the name")
    return tuple(protocols)


def _classes(entries: Any, file: str, are_asked: bool) -> tuple[CardClass, ...]:
    if not are_asked:
        if entries:
            found = f"found {len(entries) if isinstance(entries, list) else _found(entries)}"
            raise ValueError(f"{file}: classes: {found}; no protocol of the card tells classes apart")
        return ()
    if not isinstance(entries, list) or len(entries) < 2:
        raise ValueError(f"{file}: classes: found {_found(entries)}; expected a list of at least two classes")
    classes = [_class(entry, file, number) for number, entry in enumerate(entries)]
    _check_unique((one.id for one in classes), f"{file}: the id")
    ids = [one.id for one in classes]
    for one in classes:
        for other in one.confusable_with:
            if other == one.id or other not in ids:
                hint = did_you_mean(other, [name for name in ids if name != one.id])
                raise ValueError(f"{file}: {one.id}: confusable_with: {other!r} is no other class of the card{hint}")
    for language in {language for one in classes for language in one.names}:
        _check_unique((one.names[language] for one in classes if language in one.names), f"{file}: the {language} name")
    id_of = {bare(one.id): one.id for one in classes}
    for one in classes:
        if id_of.get(bare(one.names["en"]), one.id) != one.id:
            raise ValueError(f"{file}: {one.id}: names: en: {one.names['en']!r} is the id of another class")
    return tuple(classes)


def _class(entry: Any, file: str, number: int) -> CardClass:
    entry = _mapping(entry, f"{file}: class number {number + 1}", _CLASS_KEYS, entry_id=True)
    class_id = _text(entry.get("id"), f"{file}: class number {number + 1}: id")
    where = f"{file}: {class_id}"
    if not _ID.fullmatch(class_id):
        raise ValueError(f"{where}: id: found {class_id!r}; expected letters, digits, '_' and '-': a folder's name")
    names = _names(entry.get("names"), f"{where}: names")
    by_rule = _names(entry.get("romanised", {}), f"{where}: romanised")
    if twice := names.keys() & by_rule.keys():
        raise ValueError(f"{where}: romanised: {min(twice)} is a language of `names` too; expected one name")
    if "en" not in names:
        raise ValueError(f"{where}: names: no name in `en`; found {sorted(names)}")
    facts = _facts(entry.get("facts", {}), f"{where}: facts")
    aliases, others = (_texts(entry.get(key, []), f"{where}: {key}") for key in ("aliases", "confusable_with"))
    return CardClass(class_id, names | by_rule, aliases, others, facts, derived=tuple(by_rule))


def _names(entry: Any, where: str) -> dict[str, str]:
    names = {}
    for language, name in _mapping(entry, where).items():
        _check_language(language, where)
        names[language] = unicodedata.normalize("NFC", _text(name, f"{where}: {language}"))
    return names


def _facts(entry: Any, where: str) -> dict[str, Any]:
    """Anything, but for the facts that scores come from."""
    facts = _mapping(entry, where)
    for name, most in (("lat", 90), ("lon", 180)):
        if name in facts and not (is_number(facts[name]) and abs(facts[name]) <= most):
            raise ValueError(f"{where}: {name}: found {_found(facts[name])}; expected degrees, -{most} to {most}")
    for language, words in _mapping(facts.get("sample_words", {}), f"{where}: sample_words").items():
        _texts(words, f"{where}: sample_words: {language}")
    return facts


def _prompts(entries: Any, file: str) -> dict[str, tuple[str, ...]]:
    prompts = {}
    for language, templates in _mapping(entries, f"{file}: prompts").items():
        _check_language(language, f"{file}: prompts")
        prompts[language] = _texts(templates, f"{file}: prompts: {language}")
        for template in prompts[language]:
            if template.count("{c}") != 1:
                raise ValueError(f"{file}: prompts: {language}: {template!r}; expected one {{c}}, where the name goes")
        if not prompts[language]:
            raise ValueError(f"{file}: prompts: {language}: found none; expected templates with {{c}}")
    return prompts


def _check_language(language: Any, where: str) -> None:
    if not isinstance(language, str) or language_tag(language) != language:
        known = [*OF_INDIA, *(f"{one}-Latn" for one in OF_INDIA)]
        hint = did_you_mean(str(language), known)
        raise ValueError(f"{where}: {language!r} is no language{hint}; expected a BCP 47 code such as en, hi, hi-Latn")


def _check_chance(stated: Any, chance: float, file: str) -> None:
    if not is_number(stated) or abs(stated - chance) > 5e-4:
        raise ValueError(f"{file}: chance: found {stated!r}; of this card it is {chance:.4f}")


def _check_unique(names: Iterable[str], what: str) -> None:
    """Two classes of one name could not be told right."""
    for name, count in Counter(map(bare, names)).items():
        if count > 1:
            raise ValueError(f"{what} {name!r} is that of {count} classes; expected each once")


def _mapping(value: Any, where: str, keys: tuple[str, ...] = (), entry_id: bool = False) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found {_found(value)}; expected keys and values")
    if entry_id and isinstance(value.get("id"), str):
        where = f"{where} ({value['id']})"
    for key in value:
        if keys and key not in keys:
            raise ValueError(f"{where}: no such key {key!r}{did_you_mean(str(key), keys)}; expected {', '.join(keys)}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: found {_found(value)}; expected a list")
    return tuple(_text(one, where) for one in value)


def _text(value: Any, where: str, optional: bool = False) -> str:
    if not isinstance(value, str) or not (value.strip() or optional):
        raise ValueError(f"{where}: found {_found(value)}; expected text (quote what YAML takes for a number)")
    return plain(value).strip()


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    return repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
