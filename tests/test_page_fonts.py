"""The fonts that a page carries: of its own characters, shaped as the whole font shapes them."""

import base64
import io
import re

import numpy as np
import pytest
from fontTools import subset
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from indiclip.evals.reports import fonts
from indiclip.evals.reports.fonts import cut, page_fonts
from indiclip.evals.reports.page import write_page
from indiclip.generated.fonts import MissingFonts, find_face
from indiclip.generated.lettering import SCRIPTS

# A kite, of several colours, in the thirteen languages; with conjuncts, signs of two parts and joiners among them.
TEXTS = {
    "en": "A kite, naïve résumé",
    "hi": "रंग-बिरंगी पतंग, क्षत्रिय की",
    "bn": "রঙিন ঘুড়ি, ক্ষুদ্র কোলাহল",
    "ta": "வண்ணமயமான பட்டம், கொடி கௌரி",
    "te": "రంగురంగుల గాలిపటం, క్షేత్రం",
    "mr": "रंगीबेरंगी पतंग, दर्‍या",
    "gu": "રંગબેરંગી પતંગ, ક્ષેત્ર",
    "kn": "ಬಣ್ಣಬಣ್ಣದ ಗಾಳಿಪಟ, ಕ್ಷೇತ್ರ ಕೋಟೆ",
    "ml": "വർണ്ണശബളമായ പട്ടം, കൊടി",
    "pa": "ਰੰਗ-ਬਿਰੰਗੀ ਪਤੰਗ, ਪ੍ਰੇਮ",
    "or": "ରଙ୍ଗୀନ ଗୁଡ଼ି, କ୍ଷେତ୍ର କୋଣାର୍କ",
    "as": "ৰঙীন চিলা, ক্ষেত্ৰ",
    "ur": "رنگ برنگی پتنگ، خوبصورت",
}


def faces(css: str) -> list[tuple[set[str], bytes]]:
    """The characters that each rule is for, and its font."""
    found = []
    for ranges, content in re.findall(r'unicode-range: ([^;]+);.*?base64,([^)]+)\) format\("woff"\)', css, re.DOTALL):
        found.append(({chr(int(one[2:], 16)) for one in ranges.split(", ")}, base64.b64decode(content)))
    return found


def unhinted(family: str) -> bytes:
    """The whole font, with every feature; only its hints, which a cut font has none of, are left out."""
    options = subset.Options(hinting=False, layout_features=["*"], ignore_missing_glyphs=True)
    with TTFont(find_face(family).file) as font:
        subsetter = subset.Subsetter(options)
        subsetter.populate(glyphs=font.getGlyphOrder(), unicodes=font.getBestCmap())
        subsetter.subset(font)
        content = io.BytesIO()
        font.save(content)
    return content.getvalue()


def difference(text: str, *font_files: bytes) -> float:
    """Of the pictures that two fonts give, as a share of the ink.

    Without hints FreeType makes up its own from the font's letters, which moves edges by up to a pixel: 0.03 of the ink
    at most. Unshaped words differ by 0.1 to 1.5.
    """
    first, second = (drawn(text, file).astype(int) for file in font_files)
    return float(np.abs(first - second).sum() / second.sum())


def drawn(text: str, font_file: bytes) -> np.ndarray:
    """Shaped by raqm."""
    font = ImageFont.truetype(io.BytesIO(font_file), 200, layout_engine=ImageFont.Layout.RAQM)
    canvas = Image.new("L", (200 * len(text) + 400, 800))
    ImageDraw.Draw(canvas).text((200, 500), text, fill=255, font=font, anchor="ls")
    return np.asarray(canvas)


@pytest.mark.usefixtures("requires_fonts")
class TestInstalled:
    @pytest.mark.parametrize("language", TEXTS)
    def test_each_character_of_a_language_has_its_glyph_and_the_tables_that_shape_it(self, language):
        text = TEXTS[language]
        found = page_fonts(f"<p>{text}</p>")
        assert found.missing == ""
        has = set()
        for characters, content in faces(found.css):
            font = TTFont(io.BytesIO(content))
            assert characters <= {chr(code) for code in font.getBestCmap()}
            assert {"GSUB", "GPOS", "GDEF"} <= set(font.keys())
            has |= characters
        assert {c for c in text if ord(c) > 0x24F and c not in "،"} <= has

    @pytest.mark.parametrize("script", sorted(set(SCRIPTS) - {"latin", "urdu_nastaliq"}))
    def test_a_cut_font_draws_words_as_the_whole_font_does(self, script):
        words = SCRIPTS[script].words[:12]
        text = " ".join(words)
        ((_, content),) = faces(page_fonts(f"<p>{text}</p>").css)
        whole = unhinted(SCRIPTS[script].fonts["test"])
        for word in words:
            assert difference(word, content, whole) < 0.05

    def test_a_sign_of_two_parts_brings_both(self):
        """கொ is written as ெ before and ா behind the letter; the font must have these, which the text has not."""
        ((characters, content),) = faces(page_fonts("<p>கொ</p>").css)
        assert {"\u0bc6", "\u0bbe", "\u0bca"} <= characters
        assert difference("கொ", content, unhinted("Noto Sans Tamil")) < 0.05

    def test_thirteen_languages_are_a_small_part_of_a_page(self):
        words = " ".join(word for script in SCRIPTS.values() for word in script.words)
        assert len(page_fonts(f"<p>{words} {' '.join(TEXTS.values())}</p>").css) < 500_000

    def test_urdu_is_in_nastaliq_where_the_reader_has_it_and_joined_where_not(self):
        css = page_fonts(f"<p>{TEXTS['ur']}</p>").css
        assert 'src: local("Noto Nastaliq Urdu"), url(data:font/woff;base64,' in css

    def test_a_script_that_is_not_of_india_is_looked_for_in_all_fonts(self):
        found = page_fonts("<p>ไทย</p>")
        assert "\u0e44" in set().union(*(characters for characters, _ in faces(found.css)))

    def test_pages_of_the_benchmark_have_theirs_too(self, tmp_path):
        tables = [("मॉडल", [], [])]
        page = write_page(tmp_path / "leaderboard.html", "leaderboard.html", tables=tables).read_text()
        assert page.count('"page text"; unicode-range') == 1
        assert "<!--" not in page
        lines = write_page(tmp_path / "leaderboard.md", "leaderboard.md", tables=[]).read_text()
        assert "@font-face" not in lines


def test_latin_needs_no_font_and_signs_have_one_for_machines_without_them():
    assert page_fonts("<p>a kite — “naïve”</p>").css.count("page text") == 0
    signs = page_fonts("<p>✓ IoU ≥ 0.5 → &#2325;</p><style>/* क */</style>").css
    ((characters, _),) = [face for face in faces(signs) if "✓" in face[0]]
    assert characters == {"✓", "≥", "→"}


def test_without_a_font_the_page_says_so(monkeypatch, tmp_path):
    def none(family):
        raise MissingFonts(family)

    monkeypatch.setattr(fonts, "find_face", none)
    monkeypatch.setattr(fonts, "find_covering", lambda character: None)
    page = write_page(tmp_path / "x.html", "leaderboard.html", tables=[("க", [], [])]).read_text()
    assert "had no font for 1 of its characters (U+0B95), which may show as boxes" in page
    many = "".join(chr(0x905 + i) for i in range(30))
    assert "30 of its characters" in page_fonts(many).missing
    assert "and 18 more" in page_fonts(many).missing


@pytest.mark.usefixtures("requires_fonts")
def test_a_font_is_cut_once_for_the_same_characters():
    face = find_face("Noto Sans Tamil")
    assert cut(face, frozenset("கண")) is cut(face, frozenset("ணக"))
