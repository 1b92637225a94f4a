"""The names of our classes: what the tables hold, and the tool that makes and corrects them."""

import csv
import sys
import unicodedata
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from indiclip.evals.cards import names as names_module
from indiclip.evals.cards.card import load_card, load_page
from indiclip.evals.cards.file import parse_card
from indiclip.evals.cards.names import NameRow, read_names, with_rows
from indiclip.evals.protocols.languages import languages_of
from indiclip.evals.protocols.protocol import Options
from indiclip.evals.suites import SUITES

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import review_names
from romanise import LANGUAGES, is_romanisable, romanise

TWELVE = ("bn", "ta", "te", "mr", "gu", "kn", "ml", "pa", "or", "as", "ur", "hi-Latn")
TABLES = {suite: read_names(suite) for suite in SUITES if read_names(suite)}
ROWS = [
    row for table in TABLES.values() for of_card in table.values() for of_class in of_card.values() for row in of_class
]


@pytest.mark.parametrize("language", ["hi", *TWELVE])
@pytest.mark.parametrize("suite", TABLES)
def test_nine_classes_of_ten_have_a_name_and_most_one_that_two_writers_have(suite, language):
    classes = [one for name in TABLES[suite] for one in load_card(name).classes]
    named = [one for one in classes if language in one.names]
    sure = [one for one in named if one.is_sure(language)]
    assert len(named) >= 0.9 * len(classes)
    assert len(sure) >= {"india": 0.9, "culture": 0.8}[suite] * len(classes)


def test_rows_are_of_classes_and_written_in_their_script():
    assert ROWS
    classes = {(name, one.id) for suite in TABLES for name in TABLES[suite] for one in load_page(name).classes}
    kinds = {(row.card, row.id, row.language) for row in ROWS if row.kind == "name"}
    assert len(kinds) == sum(row.kind == "name" for row in ROWS), "two names of a class in a language"
    for row in ROWS:
        assert (row.card, row.id) in classes
        assert row.kind in ("name", "alias", "wrong")
        assert row.votes >= 1
        assert row.name == unicodedata.normalize("NFC", " ".join(row.name.split()))
        if row.source != "rule" and row.kind != "wrong":
            review_names._check_script(row.name, row.language, f"{row.card}: {row.id}")


def consonants(text):
    """What a name keeps in every script, nearly."""
    text = text.lower()
    for old, new in (("ph", "f"), ("w", "v"), ("z", "j"), ("q", "k"), ("x", "ks"), ("c", "k")):
        text = text.replace(old, new)
    return "".join(one for one in text if one.isalpha() and one not in "aeiouhy")


@pytest.mark.parametrize("language", [code for code in ("hi", *TWELVE) if code in LANGUAGES])
def test_proper_names_sound_like_the_english_ones(language):
    """There and back: what is written in a script, romanised, has the consonants of the English name. Few are
    translated (Golden Temple) or have another name (Ganesha, Pillaiyar).
    """
    alike = []
    for card in ("celebrities_face2name", "famous_characters", "geoguess", "indian_gods", "movie_scenes_cartoons"):
        for one in load_card(card).classes:
            name = one.names.get(language, "")
            if is_romanisable(name):
                latin = consonants(romanise(name, language))
                alike.append(SequenceMatcher(None, latin, consonants(one.names["en"])).ratio())
    assert len(alike) > 150
    assert sum(ratio < 0.4 for ratio in alike) < 0.1 * len(alike)
    assert sum(alike) / len(alike) > (0.6 if language == "ta" else 0.8)  # Tamil has one letter for k and g, t and d


def test_a_pages_own_names_stay_and_have_the_votes_of_the_table():
    for suite in TABLES:
        for name in TABLES[suite]:
            page, card = load_page(name), load_card(name)
            for own, one in zip(page.classes, card.classes, strict=True):
                by_hand = {code: text for code, text in own.names.items() if code not in own.derived}
                assert by_hand.items() <= one.names.items()
                assert one.votes.keys() | {"en"} >= one.names.keys()
                assert not set(one.derived) & {code for code in one.names if one.votes.get(code, 0) > 1}


def test_scores_are_by_names_that_two_writers_have_unless_all_are_asked_for():
    card = load_card("architectural_styles")
    page = {language.code: len(language.class_D) for language in languages_of(card, Options())}
    every = {language.code: len(language.class_D) for language in languages_of(card, Options(all_names=True))}
    assert page.keys() < every.keys()  # what is romanised by rule is one vote's
    assert page["en"] == every["en"] == len(card.classes)
    unsure = sum(not one.is_sure("hi") for one in card.classes if "hi" in one.names)
    assert unsure > 0
    assert page["hi"] == every["hi"] - unsure


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A suite of one card of four classes, of which the page names one in Tamil; and its table's place."""
    folder = tmp_path / "india"
    folder.mkdir()
    (folder / "food.yaml").write_text(
        "task: classification\nclasses:\n"
        "  - {id: idli, names: {en: idli, ta: இட்லி}}\n  - {id: dosa, names: {en: dosa}}\n"
        "  - {id: vada, names: {en: vada}}\n  - {id: puri, names: {en: puri}}\n",
        "utf-8",
    )
    files = lambda *_: tmp_path  # noqa: E731
    monkeypatch.setattr("importlib.resources.files", files)
    for module in (review_names, names_module):
        monkeypatch.setattr(module, "SUITES", ("india",), raising=False)
    page = parse_card((folder / "food.yaml").read_text("utf-8"), "india/food.yaml", "food", "india")
    monkeypatch.setattr(review_names, "load_page", lambda name: page)
    monkeypatch.setattr(review_names, "packaged", lambda suite: ["food"])
    return tmp_path


def written(folder, *rows):
    folder.mkdir(parents=True)
    (folder / "food.tsv").write_text("id\tta\n" + "".join(f"{one}\t{name}\n" for one, name in rows), "utf-8")
    return folder


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["review_names.py", *map(str, words)])
    return review_names.main()


def test_votes_are_counted_by_hand(small, monkeypatch, capsys):
    a = written(small / "a", ("idli", "இட்டிலி"), ("dosa", "தோசை"), ("vada", "தயிர்வடை"), ("puri", "பூரி"))
    b = written(small / "b", ("idli", "இட்லி"), ("dosa", "தோசை|தோசை அப்பம்"), ("vada", "தயிர் வடை"), ("puri", "ரொட்டி"))
    (small / "c.json").write_text('{"dosa": {"ta": "தோசை"}}', "utf-8")
    assert run(monkeypatch, "merge", a, b, "--suite", "india", "--source", f"CLDR={small / 'c.json'}") == 0
    found = {(row.id, row.language, row.name): row[4:] for row in read_names("india")["food"].items() for row in row[1]}
    tamil = {key[::2]: value for key, value in found.items() if key[1] == "ta"}
    assert tamil == {
        ("idli", "இட்லி"): ("name", "written", 2),  # the page's, which one writer has too
        ("dosa", "தோசை"): ("name", "written+CLDR", 3),
        ("vada", "தயிர்வடை"): ("name", "written", 1),  # near each other: a name and an alias
        ("vada", "தயிர் வடை"): ("alias", "written", 1),
    }  # of puri the writers contradict each other
    assert "1 names that writers contradict each other over" in capsys.readouterr().out
    assert found["dosa", "ta-Latn", "thosai"] == ("name", "rule", 1)


def test_a_letter_of_another_script_is_refused(small, monkeypatch, capsys):
    a = written(small / "a", ("idli", "इडली"))
    assert run(monkeypatch, "merge", a, "--suite", "india") == 2
    err = capsys.readouterr().err
    assert "food.tsv: idli: 'इडली' has DEVANAGARI LETTER I, no letter of ta" in err
    assert err.count("\n") == 1


def test_a_sheet_goes_to_a_reviewer_and_back(small, monkeypatch, capsys):
    a = written(small / "a", ("idli", "இட்லி"), ("dosa", "தோசா"), ("vada", "வடை"), ("puri", "பூரி"))
    b = written(small / "b", ("idli", "இட்லி"), ("dosa", "தோசா"), ("vada", "வடை"), ("puri", "பூரி"))
    assert run(monkeypatch, "merge", a, b, "--suite", "india") == 0
    assert run(monkeypatch, "sheet", "ta", "--out", small / "ta.tsv") == 0
    table = read_names("india")["food"]
    before = {one: [row.name for row in of_class if row.language == "ta-Latn"] for one, of_class in table.items()}
    rows = list(csv.DictReader((small / "ta.tsv").open(encoding="utf-8"), delimiter="\t"))
    assert [(row["id"], row["english"], row["name"], row["votes"]) for row in rows] == [
        ("idli", "idli", "இட்லி", "3"), ("dosa", "dosa", "தோசா", "2"), ("vada", "vada", "வடை", "2"),
        ("puri", "puri", "பூரி", "2"),
    ]  # fmt: skip
    rows[0]["ok"], rows[1]["correction"], rows[2]["wrong"] = "x", "தோசை|தோசா", "x"
    with (small / "ta.tsv").open("w", encoding="utf-8-sig", newline="") as file:  # as a spreadsheet saves it
        writer = csv.DictWriter(file, review_names.SHEET, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    assert run(monkeypatch, "read", small / "ta.tsv", "--reviewer", "A. N.") == 0
    assert "1 confirmed, 1 corrected, 1 removed" in capsys.readouterr().out
    table = read_names("india")["food"]
    found = {one: [row for row in of_class if row.language == "ta"] for one, of_class in table.items()}
    assert found["idli"] == [NameRow("food", "idli", "ta", "இட்லி", "name", "review: A. N.", 3)]
    assert [(row.name, row.kind) for row in found["dosa"]] == [("தோசை", "name"), ("தோசா", "alias")]
    assert [(row.name, row.kind) for row in found["vada"]] == [("வடை", "wrong")]
    assert found["puri"][0].source == "written"
    by_rule = {one: [row.name for row in of_class if row.language == "ta-Latn"] for one, of_class in table.items()}
    assert by_rule.pop("vada", []) == []
    assert before | by_rule == before | {"dosa": [romanise("தோசை", "ta")]}  # they follow the names
    assert before["dosa"] == [romanise("தோசா", "ta")]
    assert run(monkeypatch, "merge", a, b, "--suite", "india") == 0  # no vote is against people
    assert {one: sorted(rows) for one, rows in read_names("india")["food"].items()} == {
        one: sorted(rows) for one, rows in table.items()
    }
    rows[1]["correction"] = "दोसा"
    (small / "bad.tsv").write_text("\t".join(rows[1]) + "\n" + "\t".join(rows[1].values()) + "\n", "utf-8")
    assert run(monkeypatch, "read", small / "bad.tsv", "--reviewer", "A. N.") == 2
    assert "no letter of ta" in capsys.readouterr().err


def test_names_that_two_classes_change_over_are_romanised_both(small, monkeypatch):
    a = written(small / "a", ("dosa", "தோசை"), ("vada", "வடை"))
    assert run(monkeypatch, "merge", a, a, "--suite", "india") == 0
    rows = [f"food\t{one}\tta\t\t\t{name}\t" for one, name in (("dosa", "வடை"), ("vada", "தோசை"))]
    (small / "ta.tsv").write_text("\n".join(["card\tid\tlanguage\tname\tok\tcorrection\twrong", *rows]), "utf-8")
    assert run(monkeypatch, "read", small / "ta.tsv", "--reviewer", "A. N.") == 0
    latin = {row.id: row.name for rows in read_names("india")["food"].values() for row in rows if row.source == "rule"}
    assert (latin["dosa"], latin["vada"]) == (romanise("வடை", "ta"), romanise("தோசை", "ta"))


@pytest.mark.parametrize("in_table", [True, False])
def test_a_name_of_the_page_that_is_marked_wrong_is_no_longer_used(in_table, small, monkeypatch):
    """Nor what was romanised from it; another name that the page gets later is used."""
    page = small / "india" / "food.yaml"
    text = page.read_text("utf-8").replace("ta: இட்லி}", "ta: இட்லி}, romanised: {ta-Latn: itli}, aliases: [இட்லி, rice]")
    own = parse_card(text, "india/food.yaml", "food", "india")
    monkeypatch.setattr(review_names, "load_page", lambda name: own)
    rows = [("idli", "இட்லி"), ("dosa", "தோசை")]
    a = written(small / "a", *rows[0 if in_table else 1 :])
    assert run(monkeypatch, "merge", a, "--suite", "india") == 0
    if not in_table:
        table = small / "india" / "names.tsv"
        lines = table.read_text("utf-8").splitlines(keepends=True)
        table.write_text("".join(line for line in lines if "இட்லி" not in line), "utf-8")
    idli = lambda card: with_rows(card.classes[0], read_names("india")["food"].get("idli", []))  # noqa: E731
    assert idli(own).names == {"en": "idli", "ta": "இட்லி", "ta-Latn": "itli"}
    assert run(monkeypatch, "sheet", "ta", "--out", small / "ta.tsv") == 0
    sheet = list(csv.DictReader((small / "ta.tsv").open(encoding="utf-8"), delimiter="\t"))
    assert (sheet[0]["name"], sheet[0]["votes"]) == ("இட்லி", "2" if in_table else "1")
    mark = "card\tid\tlanguage\tname\tok\tcorrection\twrong\nfood\tidli\tta\tஇட்லி\t\t\tx\n"
    (small / "ta.tsv").write_text(mark, "utf-8")
    assert run(monkeypatch, "read", small / "ta.tsv", "--reviewer", "A. N.") == 0
    found = idli(own)
    assert (found.names, found.aliases, found.votes, found.derived) == ({"en": "idli"}, ("rice",), {}, ())
    assert not any(row.source == "rule" for row in read_names("india")["food"]["idli"])
    assert run(monkeypatch, "sheet", "ta", "--out", small / "ta.tsv") == 0
    assert "food\tidli\tta\tidli\t\t\t\t" in (small / "ta.tsv").read_text("utf-8")
    again = "card\tid\tlanguage\tname\tok\tcorrection\twrong\nfood\tidli\tta\t\t\t\tx\n"  # of the sheet without a name
    (small / "ta.tsv").write_text(again, "utf-8")
    assert run(monkeypatch, "read", small / "ta.tsv", "--reviewer", "B. C.") == 0
    assert idli(own).names == {"en": "idli"}
    for name, mark in (("", "\tஇட்டிலி\t"), ("இட்டிலி", "\t\tx"), ("இட்டிலி", "\t\tx")):  # corrected, and wrong again
        row = f"food\tidli\tta\t{name}\t{mark}\n"
        (small / "ta.tsv").write_text("card\tid\tlanguage\tname\tok\tcorrection\twrong\n" + row, "utf-8")
        assert run(monkeypatch, "read", small / "ta.tsv", "--reviewer", "B. C.") == 0
    assert idli(own).names == {"en": "idli"}
    marked = [row.name for row in read_names("india")["food"]["idli"] if row.kind == "wrong"]
    assert marked == ["இட்லி", "இட்டிலி"]
    monkeypatch.setattr(review_names, "packaged", lambda suite: ["food", "sweets"])
    before = read_names("india")
    (small / "none").mkdir()
    assert run(monkeypatch, "merge", small / "none", "--suite", "india") == 0  # no writer has the card
    assert read_names("india") == before
    changed = parse_card(text.replace("ta: இட்லி", "ta: இட்டலி"), "india/food.yaml", "food", "india")
    assert (idli(changed).names["ta"], idli(changed).votes["ta"]) == ("இட்டலி", 1)


@pytest.mark.parametrize(
    ("marks", "encoding", "said"),
    [
        ("x\t\tx", "utf-8", "ta.tsv: food: dosa: found both ok and wrong"),
        ("x\t\t", "utf-16", "ta.tsv: is no text in UTF-8"),
        ("x\t\t", "utf-16-le", "ta.tsv: "),
        ("é\t\t", "latin-1", "ta.tsv: is no text in UTF-8"),
    ],
)
def test_a_sheet_that_cannot_be_meant_is_one_line_and_changes_nothing(
    marks, encoding, said, small, monkeypatch, capsys
):
    a = written(small / "a", ("dosa", "தோசை"))
    assert run(monkeypatch, "merge", a, "--suite", "india") == 0
    before = read_names("india")
    sheet = f"card\tid\tlanguage\tname\tok\tcorrection\twrong\nfood\tdosa\tta\tdosa\t{marks}\n"
    (small / "ta.tsv").write_bytes(sheet.encode(encoding))
    capsys.readouterr()
    assert run(monkeypatch, "read", small / "ta.tsv", "--reviewer", "A. N.") == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert read_names("india") == before


def test_a_sheet_without_a_mark_changes_nothing(small, monkeypatch, capsys):
    a = written(small / "a", ("dosa", "தோசை"))
    assert run(monkeypatch, "merge", a, "--suite", "india") == 0
    assert run(monkeypatch, "sheet", "ta", "--out", small / "ta.tsv") == 0
    assert run(monkeypatch, "read", small / "ta.tsv", "--reviewer", "A. N.") == 0
    assert "ta: nothing changed" in capsys.readouterr().out
