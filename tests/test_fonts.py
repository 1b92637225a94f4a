"""Text is drawn with the right glyphs, shaped, or not at all."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from indiclip.generated.fonts import Face, MissingFonts, check_shaping, find_face
from indiclip.generated.lettering import SCRIPTS
from indiclip.generated.lettering_draw import draw_word

# Comes with matplotlib, so it is on every machine; Latin, Arabic, no script of India.
DEJAVU = Face("DejaVu Sans", str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"))
FAMILIES = sorted({family for script in SCRIPTS.values() for family in script.fonts.values()})


def ink(text: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    canvas = Image.new("L", (600, 200))
    ImageDraw.Draw(canvas).text((100, 120), text, fill=255, font=font, anchor="ls")
    return np.asarray(canvas.crop(canvas.getbbox()))


def test_a_font_without_the_characters_is_an_error_that_names_both():
    assert DEJAVU.missing("INDIA") == ""
    with pytest.raises(ValueError, match=r"DejaVu Sans .*no glyph for 'क' \(U\+0915\), 'ि' \(U\+093F\) of 'कि कि'"):
        DEJAVU.require("कि कि")


def test_nothing_is_drawn_in_a_font_without_the_characters():
    with pytest.raises(ValueError, match="DejaVu Sans .*U\\+0915"):
        draw_word(np.random.default_rng(0), "कमल", DEJAVU, (96, 96))


def test_joiners_need_no_glyph():
    assert DEJAVU.missing("A\u200cB\u200d") == ""


@pytest.fixture
def fontconfig(tmp_path, monkeypatch):
    """Takes what `fc-list` prints from now on."""

    def prints(lines):
        fake = tmp_path / "fc-list"
        fake.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    find_face.cache_clear()
    yield prints
    find_face.cache_clear()


def test_a_missing_family_is_an_error_that_names_the_package(fontconfig):
    fontconfig("")
    with pytest.raises(MissingFonts, match="no font 'Noto Sans Tamil'.*install fonts-noto-core .*libfribidi0"):
        find_face("Noto Sans Tamil")
    with pytest.raises(MissingFonts, match="no font 'UniOl'.*install fonts-uniol "):
        find_face("UniOl")


def test_a_machine_without_fontconfig_is_told_so(tmp_path, monkeypatch, fontconfig):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingFonts, match="no fc-list.*install fontconfig"):
        find_face("Noto Sans")


def test_the_first_of_several_files_is_taken_whatever_their_order(fontconfig):
    fontconfig(r"/b.ttf\t0\tTwo\n/a.ttc\t3\tTwo\n")
    assert find_face("Two") == Face("Two", "/a.ttc", 3)


@pytest.mark.parametrize(("lacking", "said"), [("raqm", "without raqm"), ("fribidi", "install libfribidi0")])
def test_unshaped_text_is_never_drawn(monkeypatch, lacking, said):
    monkeypatch.setattr(features, "check", lambda feature: feature != lacking)
    with pytest.raises(MissingFonts, match=said):
        check_shaping()
    with pytest.raises(MissingFonts, match=said):
        draw_word(np.random.default_rng(0), "INDIA", DEJAVU, (96, 96))


@pytest.mark.usefixtures("requires_fonts")
class TestInstalled:
    @pytest.mark.parametrize("family", ["Noto Sans Devanagari", "Noto Serif Devanagari"])
    def test_a_conjunct_is_one_sign_and_a_vowel_sign_is_put_in_front(self, family):
        face = find_face(family)
        shaped, basic = face.at(60), ImageFont.truetype(face.file, 60, layout_engine=ImageFont.Layout.BASIC)
        # Laid one by one, the parts of क्ष are wider than the sign, and the virama shows.
        assert ink("क्ष", shaped).shape[1] < 0.8 * ink("क्ष", basic).shape[1]
        # कि: the stem of the sign stands left of the letter, so the picture is not the letter's with something behind.
        letter, syllable, unshaped = ink("क", shaped), ink("कि", shaped), ink("कि", basic)
        height = letter.shape[0]
        assert (
            np.abs(unshaped[-height:, : letter.shape[1] // 2].astype(int) - letter[:, : letter.shape[1] // 2]).max() < 8
        )
        assert (
            np.abs(syllable[-height:, : letter.shape[1] // 2].astype(int) - letter[:, : letter.shape[1] // 2]).max()
            > 200
        )

    def test_nastaliq_letters_join_and_run_from_right_to_left(self):
        face = find_face("Noto Nastaliq Urdu")
        shaped = face.at(60)
        assert ink("بب", shaped).shape[1] < 0.85 * 2 * ink("ب", shaped).shape[1]
        # alef does not join to what follows it: it stands alone at the right
        columns = ink("اب", shaped).max(axis=0)
        alone = ink("ا", shaped)
        assert np.array_equal(columns[-alone.shape[1] :] > 128, alone.max(axis=0) > 128)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_no_character_is_drawn_as_the_box_of_a_missing_one(self, family):
        scripts = [script for script in SCRIPTS.values() if family in script.fonts.values()]
        face = find_face(family)
        font = face.at(40)
        box = ink("\U0010fffe", font)
        for character in scripts[0].characters:
            assert not np.array_equal(ink(character, font), box), character
        assert face.missing(scripts[0].characters) == ""
