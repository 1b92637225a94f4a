"""Scripts of texts: Unicode's own property, the taxonomy's words, and no language that the script does not tell."""

import json

import pytest

from indiclip.datasets.scripts import LANGUAGE, count_scripts, language, scripts

regex = pytest.importorskip("regex")


@pytest.mark.parametrize("name", [*LANGUAGE, "Han", "Cyrillic", "Hiragana"])
def test_every_letter_has_unicodes_script(name):
    letter = regex.compile(rf"[\p{{{name.replace('Odia', 'Oriya')}}}&&\p{{Assigned}}]", regex.VERSION1)
    letters = [chr(point) for point in range(0x10000) if letter.match(chr(point))]
    assert len(letters) > 40
    assert not [one for one in letters if count_scripts(one) != {name: 1}]


def test_the_taxonomys_words_are_in_their_scripts(data_root):
    taxonomy = json.loads((data_root.parent / "india" / "taxonomy.json").read_text("utf-8"))
    names = {"assamese": "Bengali", "urdu_nastaliq": "Arabic"}
    seen = set()
    for entry in taxonomy["ocr_indic"]["classes"]:
        expected = names.get(entry["id"], entry["id"].replace("_", " ").title())
        for words in entry["sample_words"].values():
            seen |= {expected}
            assert {scripts(word) for word in words} == {(expected,)}
    assert len(seen) == 13


def test_shared_signs_and_digits_belong_to_no_script():
    assert count_scripts("।॥ 12,500! \u200d\u200c\u0301 😀") == {}
    assert count_scripts("नमस्ते, chai ३") == {"Devanagari": 7, "Latin": 4}
    assert count_scripts("\ud800x") == {"Latin": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("மாட்டு வண்டி", "ta"),
        ("एक दीया", "Devanagari (hi, mr, ne, sa, ...)"),
        ("একটি প্রদীপ", "Bengali (bn, as, mni)"),
        ("namaste duniya", "Latin (English, romanised, ...)"),
        ("मेरा favourite खाना", "Devanagari + Latin"),
        ("a very long English caption of a photo: 'दी'", "Latin (English, romanised, ...)"),
        ("日本", "Han"),
        ("42 !", "no letters"),
        ("", "no letters"),
    ],
)
def test_a_language_only_where_the_script_tells_it(text, expected):
    assert language(scripts(text)) == expected
