"""Colour conversions and differences against published numbers."""

import numpy as np
import pytest

from indiclip.generated.cielab import delta_e76, delta_e2000, lab_to_srgb, rgb_of_hex, srgb_to_lab


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        # Bruce Lindbloom's calculator, sRGB with D65
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0, 0)),
    ],
)
def test_lab_of_known_colours(rgb, lab):
    assert srgb_to_lab(rgb) == pytest.approx(lab, abs=0.02)


def test_every_8_bit_colour_comes_back():
    rgb = np.random.default_rng(0).integers(0, 256, (20_000, 3))
    assert np.array_equal(lab_to_srgb(srgb_to_lab(rgb)), rgb)


def test_what_no_screen_shows_is_clipped():
    assert lab_to_srgb((50, 200, 0)).tolist()[1] == 0
    assert lab_to_srgb((120, 0, 0)).tolist() == [255, 255, 255]


# Rows 1, 7, 13, 16, 17, 21, 25, 29, 34 of table 1 of Sharma, Wu and Dalal (2005).
@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
        ((50.0, -0.0010, 2.4900), (50.0, 0.0011, -2.4900), 4.7461),
        ((50.0, 2.5, 0.0), (50.0, 0.0, -2.5), 4.3065),
        ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
        ((50.0, 2.5, 0.0), (50.0, 3.1736, 0.5854), 1.0000),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_ciede2000_of_the_paper(a, b, difference):
    assert delta_e2000(a, b) == pytest.approx(difference, abs=1e-4)
    assert delta_e2000(b, a) == pytest.approx(difference, abs=1e-4)


def test_cie76_is_the_plain_distance():
    assert delta_e76([[50, 3, 4], [53, 0, 4]], [50, 0, 0]).tolist() == [5, 5]


def test_hex():
    assert rgb_of_hex("#FF9933") == (255, 153, 51)
    for wrong in ("#FF993", "saffron", "#GG0000", "", "FF9933", "#0xFF99"):
        with pytest.raises(ValueError, match=f"expected #RRGGBB; found '{wrong}'"):
            rgb_of_hex(wrong)
