"""Romanising: every letter against its Unicode name, real Sanskrit there and back, and words as people type them."""

import sys
import unicodedata
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from indiclip.evals.cards.card import SUITES, load_card, packaged

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from romanise import LANGUAGES, is_romanisable, iso15919, main, romanise

SCRIPTS = ("DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU", "KANNADA", "MALAYALAM")
# The syllables of Unicode's names, which its editors wrote without diacritics, and ISO 15919's letters.
CONSONANTS = {
    **{name: name.lower() for name in ("K", "KH", "G", "GH", "C", "CH", "J", "JH", "T", "TH", "D", "DH", "N", "P")},
    **{name: name.lower() for name in ("PH", "B", "BH", "M", "Y", "R", "L", "V", "S", "H")},
    "NG": "ṅ", "NY": "ñ", "TT": "ṭ", "TTH": "ṭh", "DD": "ḍ", "DDH": "ḍh", "NN": "ṇ", "NNN": "ṉ", "RR": "ṟ", "LL": "ḷ",
    "LLL": "ḻ", "SH": "ś", "SS": "ṣ",
}  # fmt: skip
VOWELS = {"A": "a", "AA": "ā", "I": "i", "II": "ī", "U": "u", "UU": "ū", "VOCALIC R": "r̥", "VOCALIC RR": "r̥̄"}
VOWELS |= {"E": "ē", "AI": "ai", "O": "ō", "AU": "au"}
SHORT = ("TAMIL", "TELUGU", "KANNADA", "MALAYALAM")  # E and O are short there, EE and OO long


@pytest.mark.parametrize("script", SCRIPTS)
def test_letters_are_those_that_unicode_names(script):
    checked = 0
    for name, latin in CONSONANTS.items():
        try:
            letter = unicodedata.lookup(f"{script} LETTER {name}A")
        except KeyError:
            continue
        if name == "RR" and script in ("BENGALI", "GURMUKHI", "ORIYA"):
            latin = "ṛ"  # the flap, which Devanagari writes with a dot
        assert iso15919(letter) == f"{latin}a", letter
        checked += 1
    vowels = VOWELS | ({"E": "e", "EE": "ē", "O": "o", "OO": "ō"} if script in SHORT else {})
    if script == "GURMUKHI":
        vowels = {**vowels, "EE": "ē", "OO": "ō"}
    ka = unicodedata.lookup(f"{script} LETTER KA")
    for name, latin in vowels.items():
        for kind, expected in (("LETTER", latin), ("VOWEL SIGN", f"k{latin}")):
            try:
                sign = unicodedata.lookup(f"{script} {kind} {name}")
            except KeyError:
                continue
            assert iso15919(sign if kind == "LETTER" else ka + sign) == expected
            checked += 1
    assert iso15919(ka + unicodedata.lookup(f"{script} SIGN VIRAMA")) == "k"
    assert iso15919(unicodedata.lookup(f"{script} DIGIT SEVEN")) == "7"
    assert checked > 35


def devanagari(word):
    """IAST -> Devanagari, by Unicode's names."""
    iso = {"ṃ": "ṁ", "ṛ": "r̥", "ṝ": "r̥̄", "e": "ē", "o": "ō"}
    vowels = {next((old for old, new in iso.items() if new == latin), latin): name for name, latin in VOWELS.items()}
    consonants = {latin: name for name, latin in CONSONANTS.items()}
    text, place, is_open = "", 0, False
    while place < len(word):
        for length in (2, 1):
            part = word[place : place + length]
            if part in vowels:
                if not is_open:
                    text += unicodedata.lookup(f"DEVANAGARI LETTER {vowels[part]}")
                elif part != "a":
                    text += unicodedata.lookup(f"DEVANAGARI VOWEL SIGN {vowels[part]}")
                is_open = False
                break
            if part in consonants:
                text += unicodedata.lookup("DEVANAGARI SIGN VIRAMA") if is_open else ""
                text += unicodedata.lookup(f"DEVANAGARI LETTER {consonants[part]}A")
                is_open = True
                break
            if part in ("ṃ", "ḥ"):
                text += unicodedata.lookup(f"DEVANAGARI SIGN {'ANUSVARA' if part == 'ṃ' else 'VISARGA'}")
                break
        else:
            return None  # a letter that is rare, or none
        place += length
    return text + (unicodedata.lookup("DEVANAGARI SIGN VIRAMA") if is_open else "")


def test_sanskrit_comes_back_as_it_was(data_root):
    words = sorted(set((data_root / "text" / "sanskrit_vedic.txt").read_text("utf-8").split()))
    checked = 0
    for word in words:
        written = devanagari(word)
        if written is None:
            continue
        expected = word.replace("ṃ", "ṁ").replace("ṝ", "r̥̄").replace("ṛ", "r̥").replace("e", "ē").replace("o", "ō")
        assert iso15919(written).replace(":", "") == expected, (word, written)
        checked += 1
    assert checked > 0.95 * len(words) > 8_000


@pytest.mark.parametrize(
    ("language", "native", "iso", "typed"),
    [
        ("hi", "समोसा", "samōsā", "samosa"),
        ("hi", "इडली", "iḍalī", "idli"),  # silent between VC and CV
        ("hi", "चुलबुल", "culabula", "chulbul"),  # and at the end
        ("hi", "कमल", "kamala", "kamal"),
        ("hi", "सूर्य", "sūrya", "surya"),  # a cluster that opens keeps it
        ("hi", "कृष्ण", "kr̥ṣṇa", "krishna"),
        ("hi", "संत", "saṁta", "sant"),
        ("hi", "भगत सिंह", "bhagata siṁha", "bhagat singh"),
        ("hi", "मुंबई", "muṁba:ī", "mumbai"),
        ("hi", "बढ़ई", "baṛha:ī", "badhai"),
        ("hi", "अच्छा बच्चा", "acchā baccā", "achha baccha"),
        ("hi", "ज्ञान", "jñāna", "gyan"),
        ("hi", "स्वामी", "svāmī", "swami"),
        ("hi", "फ़िल्म", "filma", "film"),
        ("hi", "मुग़ल-ए-आज़म", "muġala-ē-āzama", "mugal-e-azam"),
        ("hi", "१२ रुपये।", "12 rupayē.", "12 rupye."),
        ("sa", "मत्स्य", "matsya", "matsya"),
        ("sa", "राम", "rāma", "rama"),
        ("mr", "वडापाव", "vaḍāpāva", "vadapav"),
        ("gu", "ગુજરાતી", "gujarātī", "gujrati"),
        ("bn", "রবীন্দ্রনাথ ঠাকুর", "rabīndranātha ṭhākura", "rabindranath thakur"),
        ("bn", "বাংলা", "bāṁlā", "bangla"),
        ("bn", "উৎসব", "utsaba", "utsab"),
        ("pa", "ਲੋਹੜੀ", "lōhaṛī", "lohri"),
        ("pa", "ਮਹੱਲਾ", "mahallā", "mahalla"),
        ("or", "ଓଡ଼ିଶା", "ōṛiśā", "odisha"),
        ("or", "ଜଗନ୍ନାଥ", "jagannātha", "jagannatha"),
        ("ta", "முருகன்", "murukaṉ", "murugan"),
        ("ta", "தமிழ்", "tamiḻ", "thamizh"),
        ("ta", "பொங்கல்", "poṅkal", "pongal"),
        ("te", "హైదరాబాద్", "haidarābād", "haidarabad"),
        ("kn", "ಬೆಂಗಳೂರು", "beṁgaḷūru", "bengaluru"),
        ("ml", "മോഹൻലാൽ", "mōhanlāl", "mohanlal"),
        ("ml", "മുണ്ട്", "muṇṭ", "mundu"),
        ("ml", "കേരളം", "kēraḷaṁ", "keralam"),
    ],
)
def test_words(language, native, iso, typed):
    for form in ("NFC", "NFD"):
        assert iso15919(unicodedata.normalize(form, native)) == unicodedata.normalize("NFC", iso)
        assert romanise(unicodedata.normalize(form, native), language) == typed


def test_romanised_names_are_near_those_that_people_use():
    """The rules against 150 names of people, gods and dishes whose English spelling is a romanisation of its own."""
    pairs = [
        (romanise(one.names["hi"], "hi"), one.names["en"].lower())
        for card in ("celebrities_face2name", "indian_gods", "festivals", "edibles", "famous_characters")
        for one in load_card(card).classes
        if "hi" in one.names and "." not in one.names["en"]
    ]
    near = [SequenceMatcher(None, *pair).ratio() for pair in pairs]
    assert len(near) > 150
    assert sum(near) / len(near) > 0.86
    assert sum(ratio > 0.8 for ratio in near) / len(near) > 0.8


def test_what_is_typed_is_ascii_for_every_name_of_every_card():
    for card in (load_card(name) for suite in SUITES for name in packaged(suite)):
        for one in card.classes:
            for language, name in one.names.items():
                if language in LANGUAGES and is_romanisable(name):
                    assert romanise(name, language).isascii(), name


def test_scripts_without_vowels_are_left_alone():
    assert not is_romanisable("اردو")
    assert not is_romanisable("ᱚᱞ ᱪᱤᱠᱤ")
    assert not is_romanisable("plain")
    assert is_romanisable("मिर्च 2 go")
    with pytest.raises(ValueError, match="romanise: 'ur' is not among the languages as, bn"):
        romanise("اردو", "ur")


CARD = """\
task: classification
classes:
  - {id: dosa, names: {en: dosa, hi: डोसा, kn: ದೋಸೆ}, aliases: [dosai]}
  - {id: idli, names: {en: idli, hi: इडली, hi-Latn: idlee}}  # a comment
  - {id: mul, names: {en: radish, hi: ARE_ALIKE}}
  - {id: mula, names: {en: root, hi: मूल}}
"""


def test_the_command_writes_names_into_a_card(tmp_path, monkeypatch, capsys):
    file = tmp_path / "dishes.yaml"
    monkeypatch.setattr(sys, "argv", ["romanise.py", str(file)])
    file.write_text(CARD.replace("ARE_ALIKE", "मुल"), "utf-8")  # both are typed mul
    for _ in range(2):  # the second run changes nothing
        main()
        assert capsys.readouterr().out == f"{file}: 2 names\n"
        written = file.read_text("utf-8")
        assert "kn: ದೋಸೆ}, romanised: {hi-Latn: dosa, kn-Latn: dose}, aliases: [dosai]}" in written
        assert written.count("romanised") == 1
        assert "{id: idli, names: {en: idli, hi: इडली, hi-Latn: idlee}}  # a comment" in written
        names = [one.names for one in load_card(str(file)).classes]
        assert [one.get("hi-Latn") for one in names] == ["dosa", "idlee", None, None]
    file.write_text(CARD.replace("ARE_ALIKE", "मूली"), "utf-8")
    main()
    assert [one.names.get("hi-Latn") for one in load_card(str(file)).classes] == ["dosa", "idlee", "muli", "mul"]
    file.write_text(CARD.replace("names: {en: root", "names:\n      {en: root").replace("ARE_ALIKE", "मूली"), "utf-8")
    with pytest.raises(ValueError, match="3 lines with `names: {...}`; expected one for each of 4 classes"):
        main()
