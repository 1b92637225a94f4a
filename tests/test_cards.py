"""Cards: all of ours are sound and hold the taxonomy; every slip in a page is one line."""

import json
import re
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml

from indiclip.cli import main
from indiclip.datasets.tables import stable_hash
from indiclip.evals.cards.card import SUITES, load_card, load_cards, packaged
from indiclip.evals.cards.imagenet import BabelImageNet, ImageNet

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from romanise import romanised_names

TAXONOMY = Path(__file__).parents[2] / "shared" / "india" / "taxonomy.json"
INDIA = [
    *("architectural_styles", "celebrities_face2name", "edibles", "famous_characters", "festivals", "geoguess"),
    *("indian_clothes", "indian_colours", "indian_gods", "movie_scenes_cartoons", "ocr_indic"),
]
PAGE = """\
title: Dishes
task: classification
prompts:
  en: ["a photo of {c}."]
  hi: ["{c} की तस्वीर।"]
classes:
  - {id: dosa, names: {en: dosa, hi: डोसा, kn: ದೋಸೆ}, romanised: {hi-Latn: dosa, kn-Latn: dose}, aliases: [dosai],
     confusable_with: [uttapam]}
  - {id: uttapam, names: {en: uttapam, hi: उत्तपम}, facts: {group: dish}}
  - {id: idli, names: {en: idli, hi: इडली, hi-Latn: idlee}}
"""


@pytest.fixture
def page(tmp_path):
    def write(*changes, text=PAGE):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "dishes.yaml").write_text(text, "utf-8")
        return load_card(str(tmp_path / "dishes.yaml"))

    return write


def test_suites():
    assert packaged("india") == INDIA
    assert {"cifar10", "imagenet1k", "xm3600"} < set(packaged("world"))
    with pytest.raises(ValueError, match="suite: found 'indai'; nearest is 'india'"):
        packaged("indai")
    with pytest.raises(ValueError, match="no card 'edible'; nearest is 'edibles'"):
        load_card("edible")


def test_a_suites_name_is_all_its_cards_each_once():
    assert [card.id for card in load_cards(["geoguess", "india", "cifar10"])] == [
        "geoguess", *(name for name in INDIA if name != "geoguess"), "cifar10"
    ]  # fmt: skip
    assert {card.suite for card in load_cards(["culture"])} == {"culture"}
    assert len({name for suite in SUITES for name in packaged(suite)}) == sum(len(packaged(suite)) for suite in SUITES)


@pytest.mark.parametrize("name", [name for suite in SUITES for name in packaged(suite)])
def test_packaged_cards_say_what_they_are(name):
    card = load_card(name)
    assert card.title
    assert card.source
    assert card.licence
    assert card.notes
    page = (Path(__file__).parents[1] / "indiclip" / "evals" / card.file).read_text("utf-8")
    assert page.startswith("# ")
    for word in ("Images:", "Chance:", "Unsure:", "Run:"):
        assert f"# {word}" in page
    if not card.classes:
        assert card.chance == (1 / card.num_candidates if card.num_candidates else 0)
        return
    assert "en" in card.prompts
    assert card.chance == pytest.approx(card.protocols[0].chance or 1 / (card.num_candidates or len(card.classes)))
    assert not [name for name in card.names("en").values() if "(" in name]
    alike = {(one.id, other) for one in card.classes for other in one.confusable_with}
    assert alike == {(other, one) for one, other in alike}


@pytest.mark.skipif(not TAXONOMY.is_file(), reason="no taxonomy beside the repository")
def test_every_class_and_fact_of_the_taxonomy_is_on_a_card():
    taxonomy = json.loads(TAXONOMY.read_text("utf-8"))
    assert sorted(taxonomy) == INDIA
    for name, category in taxonomy.items():
        card = load_card(name)
        assert card.ids == [entry["id"] for entry in category["classes"]]
        for one, entry in zip(card.classes, category["classes"], strict=True):
            assert entry["names"].items() <= one.names.items()
            assert list(one.confusable_with) == entry["confusable_with"]
            kept = {key: entry[key] for key in entry.keys() - {"id", "en", "names", "aliases", "confusable_with"}}
            assert kept.items() <= one.facts.items()
            # The English name, and each gloss, are somewhere: as a name, an alias, or a fact.
            known = " ".join(map(str, (one.names["en"], *one.aliases, *one.names.values(), *one.facts.values())))
            for words in re.split(r"[(),]+| and ", entry["en"]):
                assert all(word.lower() in known.lower() for word in words.split()), (entry["en"], known)
            assert set(entry.get("aliases", [])) <= {*one.aliases, *one.names.values()}


def test_a_card_of_ones_own(page):
    card = page()
    assert (card.id, card.suite, card.metric, card.folder) == ("dishes", "own", "acc1", "dishes")
    assert card.names("hi") == {0: "डोसा", 1: "उत्तपम", 2: "इडली"}
    assert card.names("hi-Latn") == {0: "dosa", 2: "idlee"}
    assert [one.derived for one in card.classes] == [("hi-Latn", "kn-Latn"), (), ()]
    assert card.templates("hi-Latn") == ("{c}",)
    assert card.languages == {"en": 3, "hi": 3, "hi-Latn": 2, "kn": 1, "kn-Latn": 1}
    assert [card.place(name) for name in ("Dosa", "dosai", "ದೋಸೆ", "idlee", "vada")] == [0, 0, 0, 2, None]


@pytest.mark.parametrize("name", [f"{suite}/{name}" for suite in SUITES for name in packaged(suite)])
def test_names_by_rule_on_our_pages_are_those_of_the_rule(name):
    card = load_card(name.split("/")[1])
    if not isinstance(yaml.safe_load(Path(f"indiclip/evals/{name}.yaml").read_text("utf-8")).get("classes"), list):
        return  # a list of ImageNet's, or captions
    by_rule = [{code: one.names[code] for code in one.derived} for one in card.classes]
    assert by_rule == romanised_names(card), "run tools/romanise.py on it again"


def test_a_name_is_found_in_any_of_unicodes_ways_of_writing_it(page):
    card = page(("hi: उत्तपम", "hi: पकौड़ा"))
    for form in ("NFC", "NFD"):
        assert card.place(unicodedata.normalize(form, "पकौड़ा")) == 1
    assert card.place("पकौ\u095cा") == 1  # one character, as many keyboards give it


def test_an_id_counts_before_a_name_and_shared_names_for_none(page):
    card = page(("aliases: [dosai]", "aliases: [snack, idli]"), ("facts: {group: dish}", "aliases: [snack]"))
    assert card.place("idli") == 2
    assert card.place("snack") is None
    with pytest.raises(ValueError, match="uttapam: names: en: 'Rice Cake' is the id of another class"):
        page(("id: idli", "id: rice_cake"), ("en: uttapam", "en: Rice Cake"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: Dishes", "titel: Dishes", "dishes.yaml: no such key 'titel'; nearest is 'title'"),
        ("title: Dishes", "title: 1975", "title: found 1975; expected text"),
        ("task: classification", "task: clasification", "task: found 'clasification'; nearest is 'classification'"),
        (
            "task: classification",
            "metric: acc1",
            "task: found nothing; expected classification, matching, retrieval, or",
        ),
        ("title: Dishes", "metric: acc", "metric: found 'acc'; nearest is 'acc5'"),
        ("title: Dishes", "chance: 0.5", "chance: found 0.5; of this card it is 0.3333"),
        ("title: Dishes", "folder: ../x", "folder: found '../x'; expected a folder's name"),
        ("en: [", "english: [", "prompts: 'english' is no language; .*expected a BCP 47 code such as en, hi, hi-Latn"),
        ("a photo of {c}.", "a photo of {}.", r"prompts: en: 'a photo of \{\}.'; expected one \{c\}"),
        ('["a photo of {c}."]', "[]", "prompts: en: found none"),
        ('["a photo of {c}."]', "a {c}", "prompts: en: found 'a {c}'; expected a list"),
        ("id: uttapam", "id: dosa", "the id 'dosa' is that of 2 classes"),
        ("id: uttapam", "id: a/b", "id: found 'a/b'; expected a folder's name: letters, digits, _ or -"),
        ("{id: idli, ", "{", "class number 3: id: found nothing; expected text"),
        ("{en: idli, hi", "{hi", r"idli: names: no name in `en`; found \['hi', 'hi-Latn'\]"),
        ("hi: इडली", "hindi: इडली", "idli: names: 'hindi' is no language"),
        ("hi: इडली", "hi-Lat: इडली", "idli: names: 'hi-Lat' is no language; nearest is 'hi-Latn'"),
        ("{hi-Latn: dosa, kn", "{hi-Lat: dosa, kn", "dosa: romanised: 'hi-Lat' is no language; nearest is 'hi-Latn'"),
        ("hi-Latn: dosa", "hi: dosa", "dosa: romanised: hi is a language of `names` too; expected one name"),
        ("hi: इडली", "hi: [x]", r"idli: names: hi: found \['x'\]; expected text"),
        ("hi: इडली", "hi: डोसा", "the hi name 'डोसा' is that of 2 classes"),
        ("en: idli", "en: Dosa", "the en name 'dosa' is that of 2 classes"),
        (
            "[uttapam]",
            "[utapam]",
            "dosa: confusable_with: 'utapam' is no other class of the card; nearest is 'uttapam'",
        ),
        ("[uttapam]", "[dosa]", "dosa: confusable_with: 'dosa' is no other class"),
        ("aliases:", "alias:", "dishes.yaml: dosa: no such key 'alias'; nearest is 'aliases'"),
        ("kn: ದೋಸೆ", "en: dosai", "no YAML: the key 'en' is duplicated"),
        ("{group: dish}", "{lat: 91.0}", "uttapam: facts: lat: found 91.0; expected degrees, -90 to 90"),
        ("{group: dish}", "{lon: 77E}", "uttapam: facts: lon: found '77E'; expected degrees, -180 to 180"),
        (
            "{group: dish}",
            "{sample_words: [x]}",
            r"facts: sample_words: found \['x'\]; expected keys and values",
        ),
        ("{group: dish}", "{sample_words: {hi: x}}", "sample_words: hi: found 'x'; expected a list"),
        ("classes:\n", "classes: [\n", r"dishes.yaml: no YAML: [^<]*\bin line \d+, column \d+[^<]*$"),
    ],
)
def test_a_slip_is_one_line(page, old, new, message):
    with pytest.raises(ValueError, match=message) as caught:
        page((old, new))
    assert "\n" not in str(caught.value)
    assert "dishes.yaml" in str(caught.value)


def test_pages_without_classes(page):
    with pytest.raises(ValueError, match="classes: found 'imagenet'; expected a list of at least two classes"):
        page(text="task: classification\nclasses: imagenet\n")
    with pytest.raises(ValueError, match="classes: found 0; expected a list of at least two"):
        page(text="task: classification\nclasses: []\n")
    with pytest.raises(ValueError, match="expected keys and values"):
        page(text="[]")
    assert page(text="task: retrieval\n").metric == "image_to_text_r5"
    with pytest.raises(ValueError, match="no protocol of the card tells classes apart"):
        page(("task: classification", "task: retrieval"))


def test_norwegian_is_a_language(page):
    assert page(("kn: ದೋಸೆ", "no: pannekake")).names("no") == {0: "pannekake"}


def test_imagenet_takes_the_names_of_a_list_in_the_usual_order_only():
    card = load_card("imagenet1k")
    assert (card.ids[0], card.classes[1].names["en"], len(set(card.names("en").values()))) == (
        "n01440764",
        "goldfish",
        1000,
    )
    # CLIP's names differ from WordNet's in a fifth of the lines.
    names = [name if stable_hash(name) % 5 else f"{name} (thing)" for name in card.names("en").values()]
    renamed, notes = ImageNet().with_list(card, names, "classnames.txt")
    assert list(renamed.names("en").values()) == names
    assert notes == ["English class names are those of classnames.txt"]
    names[744] = names[657]  # "missile", as CLIP has it
    assert ImageNet().with_list(card, names, "classnames.txt")[1][1] == (
        f"classnames.txt: 1 names are those of several classes, whose images count as missed, first {names[657]!r}"
    )
    names[744] = "projectile"
    with pytest.raises(ValueError, match="999 lines; expected ImageNet's 1000"):
        ImageNet().with_list(card, names[1:], "classnames.txt")
    with pytest.raises(ValueError, match="expected the usual order"):
        ImageNet().with_list(card, sorted(names), "classnames.txt")


def test_babel_names_some_classes(tmp_path):
    card, file = load_card("babel_imagenet"), tmp_path / "babel_imagenet.json"
    file.write_text(json.dumps({"HI": [[1, 9, 4], ["सुनहरी मछली", "शुतुरमुर्ग", "शुतुरमुर्ग"]], "NO": [[0], ["suter"]]}))
    named, notes = BabelImageNet().with_file(card, file)
    assert named.names("hi") == {1: "सुनहरी मछली", 4: "शुतुरमुर्ग", 9: "शुतुरमुर्ग"}
    assert named.names("no") == {0: "suter"}
    assert notes == ["hi: 1 names are those of several classes, whose images count as missed, first 'शुतुरमुर्ग'"]
    for content, message in (
        ([], "found a list"),
        ({"HI": [[1], []]}, "HI: 1 class numbers and 0 names"),
        ({"HI": [[1000], ["x"]]}, "HI: the class number: found 1000; expected a whole number from 0 to 999"),
        ({"HI": [[1], [""]]}, "HI: the name of class 1 is ''"),
        ({"HI": {"1": "x"}}, r"HI: expected \[\[class numbers\], \[names\]\]"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            BabelImageNet().with_file(card, file)


def test_bench_cards_prints_them(capsys, page):
    assert main(["bench", "cards"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"india/edibles +classification +40 +2.5% +en, hi, as, ", out)
    assert re.search(r"multi_label +classes +Mean average precision of the cosines", out)
    assert re.search(r"composed_retrieval +captions, target +Recall of the target image", out)
    assert main(["bench", "cards", "edibles"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\nclass +en +hi +looks like +languages\n", out)
    assert re.search(r"\nbenne_dosa +benne dosa +बेन्ने डोसा +\S.* \d+\n", out)
    assert main(["bench", "cards", "edibles", "--all"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"benne_dosa +benne dosa +बेन्ने डोसा .*kn-Latn: benne dose\*", out)
    assert main(["bench", "cards", "edible"]) == 2
    assert "no card 'edible'; nearest is 'edibles'" in capsys.readouterr().err


def test_a_card_made_of_a_folder_of_real_photos(data_root, tmp_path):
    for category in ("edibles_food", "edibles_fruit_veg", "clothes_saree"):
        found = json.loads((data_root / "india" / category / "classes.json").read_text("utf-8"))
        names = {key: {"en": one["english"], "hi": one["hindi"]} for key, one in found.items()}
        classes = [{"id": key, "names": {code: name for code, name in names[key].items() if name}} for key in found]
        file = tmp_path / f"{category}.yaml"
        file.write_text(yaml.safe_dump({"task": "classification", "classes": classes}, allow_unicode=True), "utf-8")
        card = load_card(str(file))
        assert card.ids == list(found)
        assert len(romanised_names(card)) == len(found)
        assert sum("hi-Latn" in names for names in romanised_names(card)) > 0.9 * len(found)
