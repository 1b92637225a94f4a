"""A word drawn as on a board: shaped text of any colour, slightly turned, stretched and blurred."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from indiclip.generated.base import Floats, SizeHW, UInt8, grainy
from indiclip.generated.cielab import lab_to_srgb
from indiclip.generated.fonts import Face

MIN_SIDE = 48  # below this the signs of a long word run into each other
CONTRAST = 45.0  # least difference in L between word and ground; WCAG's 3:1 is about 40
_TURN = 7.0  # degrees to either side
_UNEVEN = 7.0  # how far the ground strays from its colour, in L, a and b
_TRIAL = 64  # pixels at which a word is measured


def draw_word(rng: Generator, text: str, face: Face, size_hw: SizeHW) -> UInt8:
    """Draw a word somewhere on an uneven ground, whole, as uint8 (height, width, 3).

    Args:
        rng: Where size, place, turn, stretch, blur and colours come from.
        text: The word; one line.
        face: The font.
        size_hw: Of the image, both sides from `MIN_SIDE` up.

    Raises:
        ValueError: The font lacks a character of the word; names both.
        MissingFonts: Pillow cannot shape text on this machine.
    """
    face.require(text)
    ground_lab, ink_lab = _colours(rng)
    image = Image.fromarray(lab_to_srgb(_ground(rng, ground_lab, size_hw)))
    ink = _ink(rng, text, face, size_hw)
    spare = image.width - ink.width, image.height - ink.height
    left, top = (int(rng.integers(room // 8, room - room // 8 + 1)) for room in spare)
    mask = Image.new("L", image.size)
    mask.paste(ink, (left, top))
    mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.006) * min(size_hw)))
    image.paste(tuple(lab_to_srgb(ink_lab).tolist()), mask=mask)
    return grainy(rng, np.asarray(image), 4)


def _colours(rng: Generator) -> tuple[Floats, Floats]:
    """A ground and an ink in Lab, far apart in lightness: dark on light, or light on dark."""
    away = CONTRAST + _UNEVEN
    lightness = rng.uniform(15, 95)
    darker = lightness - away
    ink = rng.uniform(0, darker) if darker > 0 else rng.uniform(min(lightness + away, 95), 100)
    return _of_lightness(rng, lightness), _of_lightness(rng, ink)


def _of_lightness(rng: Generator, lightness: float) -> Floats:
    """A muted colour; near black and white screens have little of it, and clipping would change the lightness."""
    chroma = rng.uniform(0, 35) * min(1.0, lightness / 35, (100 - lightness) / 25)
    hue = rng.uniform(0, 2 * np.pi)
    return np.array([lightness, chroma * np.cos(hue), chroma * np.sin(hue)])


def _ground(rng: Generator, lab: Floats, size_hw: SizeHW) -> Floats:
    """Large soft patches around a colour, as light and dirt make them."""
    coarse = rng.uniform(-_UNEVEN, _UNEVEN, (4, 4, 3)).astype(np.float32)
    channels = np.moveaxis(coarse, -1, 0)
    planes = [Image.fromarray(channel).resize(size_hw[::-1], Image.Resampling.BILINEAR) for channel in channels]
    return np.asarray(lab + np.stack([np.asarray(plane) for plane in planes], axis=-1))


def _ink(rng: Generator, text: str, face: Face, size_hw: SizeHW) -> Image.Image:
    """The word's ink as a mask (255 is ink), cut to its tight box, which fits in the image."""
    height, width = size_hw
    wide, high = rng.uniform(0.6, 0.9) * width, rng.uniform(0.3, 0.6) * height
    stretch, turn = float(np.exp(rng.normal(0, 0.08))), rng.uniform(-_TURN, _TURN)
    trial = _written(text, face, _TRIAL)
    size = int(_TRIAL * min(wide / trial.width, high / trial.height))
    ink = _written(text, face, max(size, 8))
    ink = ink.resize((max(1, round(ink.width * stretch)), ink.height), Image.Resampling.BICUBIC)
    ink = _tight(ink.rotate(turn, Image.Resampling.BICUBIC, expand=True))
    fit = min(1.0, 0.94 * width / ink.width, 0.94 * height / ink.height)
    if fit == 1:
        return ink
    return ink.resize((int(ink.width * fit), int(ink.height * fit)), Image.Resampling.LANCZOS)


def _written(text: str, face: Face, pixels: int) -> Image.Image:
    """The word at a font size, cut to its tight box.

    Signs above and below reach beyond the lines that a font declares, and Nastaliq climbs as the word goes on: the
    canvas has room for both, and the ink is what is found on it.
    """
    font = face.at(pixels)
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    canvas = Image.new("L", (int(right - left) + 4 * pixels, int(bottom - top) + 4 * pixels))
    ImageDraw.Draw(canvas).text((2 * pixels - left, 2 * pixels - top), text, fill=255, font=font, anchor="ls")
    return _tight(canvas)


def _tight(mask: Image.Image) -> Image.Image:
    box = mask.getbbox()
    assert box is not None, "a font with all the characters drew nothing"
    return mask.crop(box)
