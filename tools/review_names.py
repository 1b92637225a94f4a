"""The names of the benchmark's classes: from writers to votes, to a sheet per language for people to correct, and back.

    python tools/review_names.py sheet ta --out ta.tsv           # a row per class: the name, its source and votes
    python tools/review_names.py read ta.tsv --reviewer "A. N."  # what was corrected or confirmed
    python tools/review_names.py coverage                        # classes with a name, and with two votes, by language
    python tools/review_names.py merge A/ B/ --suite india       # names that two writers wrote, see below

A sheet opens in any spreadsheet as tab-separated UTF-8. Its last columns are for the reviewer: `ok` (anything) confirms
the name, `correction` replaces it (a name, and others after `|`), `wrong` (anything) takes it away, one of
the card's page too. A reviewed name has the source `review` and one vote more than a machine can give; what was
romanised by rule follows a new name.

`merge` takes folders of `<card>.tsv` with the columns `id` and languages (`a|b`: a name and another spelling). Each
folder, the card's own page, and each `--source NAME=FILE.json` ({English name: {language: name}}) has a vote. A name on
which two agree gets two; where nobody agrees, names that are near each other stay with one, the first as the name and
the others as aliases, and contradictions are dropped. Names in another script than their language's are refused.
What was reviewed stays as it is, and so does a card that no writer has.

The tables are `indiclip/evals/<suite>/names.tsv`. A page's own `names` stay as they are; the table says what they are
worth, and adds the other languages.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from romanise import LANGUAGES as ROMANISABLE
from romanise import is_romanisable, romanise

from indiclip.datasets.languages import OF_INDIA
from indiclip.evals.cards.card import load_page
from indiclip.evals.cards.classes import Card, bare
from indiclip.evals.cards.names import NameRow, names_file, read_names, with_rows
from indiclip.evals.suites import SUITES, packaged
from indiclip.names import check_choice

LETTERS = {  # ranges of Unicode's blocks
    **dict.fromkeys(("hi", "mr", "ne", "sa", "kok", "mai"), (0x900, 0x97F)),
    **dict.fromkeys(("bn", "as"), (0x980, 0x9FF)),
    "pa": (0xA00, 0xA7F), "gu": (0xA80, 0xAFF), "or": (0xB00, 0xB7F), "ta": (0xB80, 0xBFF), "te": (0xC00, 0xC7F),
    "kn": (0xC80, 0xCFF), "ml": (0xD00, 0xD7F), "ur": (0x600, 0x6FF), "hi-Latn": (0x41, 0x24F),
}  # fmt: skip
NEAR = 0.75  # of difflib's ratio: spellings of one name
REVIEWED = 3

SHEET = ["card", "id", "language", "english", "about", "name", "spellings", "source", "votes"]
SHEET += ["ok", "correction", "wrong"]  # for the reviewer
_ABOUT = ("gloss", "region", "state", "city")  # facts that tell what is meant

Names = dict[tuple[str, str], list[str]]  # (class, language) -> a name and other spellings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="a sheet of one language for a reviewer")
    sheet.add_argument("language", help="such as ta")
    sheet.add_argument("--out", type=Path, required=True, help="the .tsv to write")
    back = commands.add_parser("read", help="take over what a reviewer wrote")
    back.add_argument("sheet", type=Path)
    back.add_argument("--reviewer", required=True, help="a name that stands in the table as the source")
    merged = commands.add_parser("merge", help="names of independent writers")
    merged.add_argument("writers", type=Path, nargs="+", help="folders with <card>.tsv, each of one writer")
    merged.add_argument("--suite", choices=SUITES, required=True)
    merged.add_argument("--source", action="append", default=[], metavar="NAME=FILE", help="names from elsewhere")
    commands.add_parser("coverage", help="how many classes have a name")
    args = parser.parse_args()
    try:
        if args.command == "sheet":
            write_sheet(args.language, args.out)
        elif args.command == "read":
            read_sheet(args.sheet, args.reviewer)
        elif args.command == "merge":
            sources = [one.partition("=") for one in args.source]
            merge(args.suite, args.writers, {name: Path(file) for name, _, file in sources})
        else:
            print_coverage()
    except (ValueError, FileNotFoundError) as error:
        print(f"review_names: {error}", file=sys.stderr)
        return 2
    return 0


def write_sheet(language: str, out: Path) -> None:
    """A row for each class of all cards that have a table of names."""
    check_choice("language", language, LETTERS)
    rows = [SHEET]
    for suite in SUITES:
        found = read_names(suite)
        for name in found:
            for one in load_page(name).classes:
                of_class = [row for row in found[name].get(one.id, []) if row.language == language]
                aliases = "|".join(row.name for row in of_class if row.kind == "alias")
                about = "; ".join(str(one.facts[key]) for key in _ABOUT if key in one.facts)
                used = with_rows(one, of_class)
                main, votes = used.names.get(language, ""), str(used.votes.get(language, ""))
                sources = {row.name: row.source for row in of_class if row.kind == "name"}
                source = sources.get(main, "page") if main else ""
                rows.append([name, one.id, language, one.names["en"], about, main, aliases, source, votes, "", "", ""])
    _write_tsv(out, rows)
    then = f"`review_names.py read {out} --reviewer NAME`"
    print(f"{out}: {len(rows) - 1} classes; fill in ok, correction or wrong, then {then}")


def read_sheet(file: Path, reviewer: str) -> None:
    """Corrections and confirmations into the tables."""
    rows = list(_read_tsv(file))
    needed = {"card", "id", "language", "name", "ok", "correction", "wrong"}
    if not rows or not needed <= rows[0].keys():
        raise ValueError(f"{file}: expected the columns {', '.join(sorted(needed))}, as `sheet` writes them")
    for row in rows:
        if row["ok"] and row["wrong"]:
            raise ValueError(f"{file}: {row['card']}: {row['id']}: found both ok and wrong; expected one of them")
    changed = Counter[str]()
    for suite in SUITES:
        tables = read_names(suite)
        renamed = list[NameRow]()
        for row in rows:
            if row["card"] not in tables or not (row["ok"] or row["correction"] or row["wrong"]):
                continue
            language = row["language"]
            check_choice(f"{file}: language", language, LETTERS)
            before = tables[row["card"]].get(row["id"], [])
            names = [_clean(name) for name in (row["correction"] or row["name"]).split("|") if name.strip()]
            what = "corrected" if row["correction"] else "confirmed"
            if row["wrong"] and not row["correction"]:
                names, what = [], "removed"
            for name in names:
                _check_script(name, language, f"{file}: {row['card']}: {row['id']}")
            kinds = ["name", *["alias"] * (len(names) - 1)]
            source = f"review: {reviewer}"
            reviewed = [
                NameRow(row["card"], row["id"], language, name, kind, source, REVIEWED)
                for name, kind in zip(names, kinds, strict=False)
            ]
            # Neither the page nor writers bring back what was wrong, now or in an earlier review.
            wrong = {one.name: one for one in before if (one.language, one.kind) == (language, "wrong")}
            if not names and row["name"]:
                name = _clean(row["name"])
                wrong[name] = NameRow(row["card"], row["id"], language, name, "wrong", source, REVIEWED)
            reviewed += [one for name, one in wrong.items() if name not in names]
            kept = [one for one in before if one.language != language]
            main = next((one.name for one in before if one.language == language and one.kind == "name"), None)
            if names[:1] != [main]:  # what was made from the old name goes with it
                kept = [one for one in kept if (one.language, one.source) != (f"{language}-Latn", "rule")]
                renamed += [one for one in reviewed[:1] if one.kind == "name"]
            tables[row["card"]][row["id"]] = kept + reviewed
            changed[what] += 1
        for one in renamed:
            _romanise_again(tables[one.card], one)
        if tables:
            _write_table(
                suite, [one for of_card in tables.values() for of_class in of_card.values() for one in of_class]
            )
    counts = ", ".join(f"{count} {what}" for what, count in changed.items()) or "nothing changed"
    print(f"{rows[0]['language']}: {counts}")


def _romanise_again(table: dict[str, list[NameRow]], of: NameRow) -> None:
    """A class's romanised name by rule, from its new name."""
    taken: dict[str, set[str]] = defaultdict(set)
    for one in load_page(of.card).classes:
        for code in one.names.keys() - {*one.derived}:
            taken[code].add(bare(one.names[code]))
    for row in (row for rows in table.values() for row in rows if row.kind != "wrong"):
        taken[row.language].add(bare(row.name))
    own = {row.language: row.name for row in table[of.id] if row.kind == "name"}
    named = {of.language: of.name} | {code: name for code, name in own.items() if code.endswith("-Latn")}
    table[of.id] += _by_rule(of.card, of.id, named, taken)


def merge(suite: str, writers: list[Path], sources: dict[str, Path]) -> None:
    """The table of a suite, from its pages, the writers and the sources."""
    rows, dropped, before = list[NameRow](), Counter[str](), read_names(suite)
    others = {name: json.loads(file.read_text("utf-8")) for name, file in sources.items()}
    for name in packaged(suite):
        if not any(any(folder.rglob(f"{name}.tsv")) for folder in writers):
            rows += [row for of_class in before.get(name, {}).values() for row in of_class]  # stay as they are
            continue
        card = load_page(name)
        voices: dict[str, Names] = {f"written {n}": _written(folder, name) for n, folder in enumerate(writers)}
        voices["page"] = {
            (one.id, code): [text]
            for one in card.classes
            for code, text in one.names.items()
            if code not in one.derived
        }
        for source, of_english in others.items():
            voices[source] = {
                (one.id, code): [_clean(text)]
                for one in card.classes
                for code, text in of_english.get(one.names["en"], {}).items()
            }
        reviewed: dict[tuple[str, str], list[NameRow]] = defaultdict(list)
        for row in (row for of_class in before.get(name, {}).values() for row in of_class):
            if row.source.startswith("review"):
                reviewed[row.id, row.language].append(row)
        rows += _voted(card, voices, reviewed, dropped)
    _write_table(suite, rows)
    print(f"{names_file(suite)}: {len(rows):,} rows")
    for reason, count in dropped.items():
        print(f"  {count:,} {reason}")


def _voted(
    card: Card, voices: dict[str, Names], reviewed: dict[tuple[str, str], list[NameRow]], dropped: Counter[str]
) -> Iterator[NameRow]:
    taken: dict[str, set[str]] = defaultdict(set)  # language -> names of other classes
    for one in card.classes:
        for code in one.names.keys() - {*one.derived}:
            taken[code].add(bare(one.names[code]))
    for row in (row for rows in reviewed.values() for row in rows if row.kind != "wrong"):
        taken[row.language].add(bare(row.name))
    for one in card.classes:
        named: dict[str, str] = {}
        for language in LETTERS:
            if rows := reviewed.get((one.id, language)):  # no vote is against people
                yield from rows
                named.update((language, row.name) for row in rows if row.kind == "name")
                continue
            own = None if language in one.derived else one.names.get(language)
            said = {voice: names[one.id, language] for voice, names in voices.items() if (one.id, language) in names}
            if not said:
                continue
            found = list(_ranked(said, language))
            if own is not None:
                found.sort(key=lambda item: _folded(item[0], language) != _folded(own, language))
            else:
                found = [item for item in found if bare(item[0]) not in taken[language]]
            if not found:
                dropped["names that another class of the card has"] += 1
                continue
            name, by = found[0]
            if own is None and len(by) == 1 and not _agree(found, name):
                dropped["names that writers contradict each other over"] += 1
                continue
            if own is None:
                taken[language].add(bare(name))
            yield NameRow(card.id, one.id, language, own or name, "name", _source(by), len(by))
            for other, of_other in found[1:]:
                is_near = difflib.SequenceMatcher(None, bare(name), bare(other)).ratio() >= NEAR
                if len(of_other) > 1 or (is_near and len(by) == 1):
                    yield NameRow(card.id, one.id, language, other, "alias", _source(of_other), len(of_other))
            named[language] = own or name
        yield from _by_rule(card.id, one.id, named, taken)


def _by_rule(card: str, class_id: str, named: dict[str, str], taken: dict[str, set[str]]) -> Iterator[NameRow]:
    """What has no romanised name of its own gets one by rule, unless another class is written so."""
    for language, name in named.items():
        code = f"{language}-Latn"
        if language in ROMANISABLE and code not in named and is_romanisable(name):
            latin = romanise(name, language)
            if bare(latin) not in taken[code]:
                taken[code].add(bare(latin))
                yield NameRow(card, class_id, code, latin, "name", "rule", 1)


def _ranked(said: dict[str, list[str]], language: str) -> Iterator[tuple[str, list[str]]]:
    """Spellings and who wrote them: most voices first, among equals those that came first."""
    voices: dict[str, list[str]] = {}
    spelling: dict[str, str] = {}
    for place in range(2):
        for voice, names in said.items():
            for name in names[place : place + 1]:
                key = _folded(name, language)
                spelling.setdefault(key, name)
                voices.setdefault(key, [])
                if voice not in voices[key]:
                    voices[key].append(voice)
    for key in sorted(voices, key=lambda key: -len(voices[key])):
        yield spelling[key], voices[key]


def _folded(name: str, language: str) -> str:
    """What two spellings that any reader takes for one have in common: without hyphens and joiners and, in Devanagari,
    without the dot of borrowed sounds, and with a dot for every nasal before a consonant (चाँद, चांद, चान्द).
    """
    folded = re.sub("[\u200c\u200d]", "", bare(name)).replace("-", " ")
    if language in ("hi", "mr"):
        folded = re.sub("[ङञणनम]\u094d(?=[क-म])", "\u0902", unicodedata.normalize("NFD", folded).replace("\u093c", ""))
        folded = folded.replace("\u0901", "\u0902")
    return folded


def _agree(found: list[tuple[str, list[str]]], name: str) -> bool:
    """Whether another voice has a name near this one."""
    own = dict(found)[name]
    return any(
        by != own and difflib.SequenceMatcher(None, bare(name), bare(other)).ratio() >= NEAR for other, by in found
    )


def _source(voices: Iterable[str]) -> str:
    """`written+holidays`: pages and writers are alike."""
    return "+".join(
        dict.fromkeys("written" if voice == "page" or voice.startswith("written") else voice for voice in voices)
    )


def _written(folder: Path, card: str) -> Names:
    """What a writer's files have of a card, in folders of the folder too."""
    names: Names = {}
    for file in sorted(folder.rglob(f"{card}.tsv")):
        for row in _read_tsv(file):
            for language, cell in row.items():
                texts = [_clean(text) for text in cell.split("|") if text.strip()]
                if language == "id" or not texts:
                    continue
                check_choice(f"{file}: column", language, LETTERS)
                for text in texts:
                    _check_script(text, language, f"{file}: {row['id']}")
                names[row["id"], language] = texts
    return names


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _check_script(text: str, language: str, where: str) -> None:
    """Raise ValueError for a letter of another script, or a vowel sign that stands on nothing."""
    low, high = LETTERS[language]
    for character in text:
        is_letter = character.isalpha() or unicodedata.category(character).startswith("M")
        if is_letter and not low <= ord(character) <= high:
            raise ValueError(f"{where}: {text!r} has {unicodedata.name(character, '?')}, no letter of {language}")
    for word in text.split():
        if unicodedata.category(word[0]).startswith("M"):
            raise ValueError(f"{where}: {text!r}: {word!r} begins with a sign that stands on a letter")


def print_coverage() -> None:
    """Of each suite and language: classes, names, names with two votes, sources."""
    for suite in SUITES:
        tables = read_names(suite)
        if not tables:
            continue
        classes = sum(len(load_page(name).classes) for name in tables)
        rows = [row for of_card in tables.values() for of_class in of_card.values() for row in of_class]
        names = [row for row in rows if row.kind == "name" and row.source != "rule"]
        print(f"{suite}: {classes} classes, {len(names):,} names, {sum(row.kind == 'alias' for row in rows):,} aliases")
        print(f"{'language':10} {'named':>6} {'share':>6} {'2 votes':>8} {'share':>6}  sources")
        for language in dict.fromkeys([*OF_INDIA, "hi-Latn"]):
            of = [row for row in names if row.language == language]
            if not of:
                continue
            two = sum(row.votes >= 2 for row in of)
            sources = ", ".join(
                f"{source} {count}" for source, count in Counter(row.source for row in of).most_common()
            )
            print(f"{language:10} {len(of):6} {len(of) / classes:6.1%} {two:8} {two / classes:6.1%}  {sources}")


def _read_tsv(file: Path) -> Iterator[dict[str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield {key: (value or "").strip() for key, value in row.items() if key}
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: is no text in UTF-8 ({error}); save it as tab-separated UTF-8") from error


def _write_tsv(file: Path, rows: Iterable[Iterable[str]]) -> None:
    lines = ["\t".join(re.sub(r"[\t\r\n]+", " ", cell) for cell in row) + "\n" for row in rows]
    file.write_text("".join(lines), "utf-8")


def _write_table(suite: str, rows: list[NameRow]) -> None:
    _write_tsv(names_file(suite), [NameRow._fields, *([str(value) for value in row] for row in rows)])


if __name__ == "__main__":
    sys.exit(main())
