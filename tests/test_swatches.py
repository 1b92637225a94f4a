"""Generated colours: the same everywhere, apart between parts, and still what their label says."""

import pickle

import numpy as np
import pytest

from indiclip.generated.cielab import delta_e76, delta_e2000, rgb_of_hex, srgb_to_lab
from indiclip.generated.mela_things import draw_thing
from indiclip.generated.swatch_draw import SHAPES, WEAVES, draw_cloth
from indiclip.generated.swatches import KINDS, THINGS, Swatches
from indiclip.generated.swatches import WEAVES as WEAVES_OF

# The India benchmark's colours, and their Lab values as they were computed when they were chosen.
COLOURS = {
    "kesariya": ("#FF9933", (72.4, 31.0, 65.7)),
    "narangi": ("#F07D32", (64.5, 39.3, 58.1)),
    "haldi": ("#D99A1E", (68.0, 13.9, 66.9)),
    "basanti": ("#FFD91A", (87.5, -2.7, 84.7)),
    "gulabi": ("#DF5FB7", (59.2, 59.7, -22.3)),
    "rani_pink": ("#D5006D", (46.0, 74.0, 1.7)),
    "sindoori": ("#E34234", (52.4, 61.1, 44.4)),
    "geru": ("#A6452C", (42.1, 38.5, 34.5)),
    "katthai": ("#5C2A1A", (23.7, 21.5, 20.9)),
    "maroon": ("#800000", (25.5, 48.0, 38.1)),
    "baingani": ("#7D3FA9", (39.2, 45.9, -46.5)),
    "neel": ("#264E8A", (33.3, 7.4, -37.6)),
    "navy_blue": ("#000080", (13.0, 47.5, -64.7)),
    "peacock_blue": ("#00677F", (40.0, -16.1, -20.5)),
    "firozi": ("#40E0D0", (81.3, -44.1, -4.0)),
    "aasmani": ("#87CEEB", (79.2, -14.8, -21.3)),
    "india_green": ("#138808", (49.2, -52.2, 50.8)),
    "totai": ("#56C23A", (70.1, -55.5, 56.3)),
    "dhani": ("#A8CB3A", (76.9, -31.2, 64.5)),
    "pista": ("#B7CFA0", (80.3, -16.4, 20.7)),
    "mehendi": ("#6B7A2A", (48.5, -17.6, 40.6)),
    "badami": ("#DDB892", (77.1, 8.0, 24.3)),
    "khaki": ("#B3A369", (67.1, -2.5, 32.2)),
    "surmai": ("#4A5560", (35.6, -1.6, -7.8)),
}
HEX = {name: value for name, (value, _) in COLOURS.items()}
LABS = np.array([srgb_to_lab(rgb_of_hex(value)) for value in HEX.values()])


def test_lab_values_of_the_colours():
    assert np.abs(LABS - np.array([lab for _, lab in COLOURS.values()])).max() <= 0.05001  # they have one decimal


def test_a_sample_is_a_pure_function_of_seed_and_index():
    swatches, again = Swatches(HEX, 96, seed=4, size=64), pickle.loads(pickle.dumps(Swatches(HEX, 96, seed=4, size=64)))
    for index in (90, 3, 30):
        a, b = swatches[index], again[index]
        assert np.array_equal(a.pop("image"), b.pop("image"))
        assert a == b
    assert np.array_equal(Swatches(HEX, 960, seed=4, size=64)[3]["image"], swatches[3]["image"])
    assert not np.array_equal(Swatches(HEX, 96, seed=5, size=64)[3]["image"], swatches[3]["image"])
    assert not np.array_equal(Swatches(HEX, 96, part="test", seed=4, size=64)[3]["image"], swatches[3]["image"])


def test_colours_take_turns_then_kinds():
    swatches = Swatches(HEX, 24 * 6, part="test", size=[40, 70])
    assert [swatches.label(i) for i in range(48)] == [*range(24), *range(24)]
    assert [swatches.kind(24 * i) for i in range(6)] == [*KINDS, *KINDS]
    sample = swatches[25]
    assert (sample["image"].shape, sample["image"].dtype) == ((40, 70, 3), np.uint8)
    assert (sample["label"], sample["caption"], sample["key"]) == (1, "a piece of cloth in narangi", "swatch-test-0-25")
    with pytest.raises(IndexError, match="expected 0 to 143; found 144"):
        swatches[144]


def test_parts_have_no_weave_and_no_thing_in_common():
    assert not set(WEAVES_OF["train"]) & set(WEAVES_OF["test"])
    assert sorted([*WEAVES_OF["train"], *WEAVES_OF["test"]]) == sorted(WEAVES)
    assert not set(THINGS["train"]) & set(THINGS["test"])


def test_a_colour_strays_less_than_half_the_way_to_the_nearest_other():
    swatches = Swatches(HEX)
    rng = np.random.default_rng(0)
    for label in range(24):
        drawn = np.array([swatches.stray(rng, label) for _ in range(100)])
        for distance in (delta_e76, delta_e2000):
            to_all = distance(srgb_to_lab(drawn)[:, None], LABS)
            others = distance(LABS[label], np.delete(LABS, label, axis=0))
            assert (to_all[:, label] < others.min() / 2).all()
            assert (to_all.argmin(axis=1) == label).all()
        assert len(np.unique(drawn, axis=0)) > 50, "it is hardly ever the exact value"


@pytest.mark.parametrize("part", ["train", "test"])
def test_what_is_drawn_is_nearest_to_its_label(part):
    """After folds, light, noise and rounding: the median of the coloured pixels."""
    swatches = Swatches(HEX, 24 * 12, part=part, size=96, seed=1)
    for index in range(len(swatches)):
        image, own = swatches.draw(index)
        assert own.mean() > 0.06, swatches.key(index)
        lab = srgb_to_lab(np.median(image[own], axis=0))
        for distance in (delta_e76, delta_e2000):
            assert distance(lab, LABS).argmin() == swatches.label(index), swatches.key(index)


@pytest.mark.parametrize("kind", [*THINGS["train"], *THINGS["test"]])
def test_most_of_a_thing_has_its_colour(kind):
    rgb = (64, 224, 208)
    sprite = draw_thing(SHAPES[kind], rgb, 120, 0.1)
    assert (sprite.rgb[sprite.mask] == rgb).all(axis=1).mean() > 0.5


@pytest.mark.parametrize("weave", WEAVES)
def test_weaves_differ(weave):
    """With the same draws, noise included, any other weave gives another picture in much of the cloth."""
    cloth = {name: draw_cloth(np.random.default_rng(2), (38, 78, 138), (96, 96), name)[0] for name in WEAVES}
    mine = cloth.pop(weave)
    assert min((mine != other).any(axis=-1).mean() for other in cloth.values()) > 0.2


@pytest.mark.parametrize(
    ("colours", "arguments", "said"),
    [
        (HEX, {"part": "val"}, "part: found 'val'; expected one of train, test"),
        (HEX, {"size": 20}, "size: expected .* at least 32 pixels; found 20"),
        (HEX, {"num_images": 0}, "num_images: expected a whole number from 1 up; found 0"),
        ({"a": "#FF9933"}, {}, r"at least two; found \['a'\]"),
        ({"a": "#FF9933", "b": "orange"}, {}, "expected #RRGGBB; found 'orange'"),
        ({"a": "#FF9933", "c": "#000000", "b": "#FF9934"}, {}, "a and b are too alike"),
    ],
)
def test_mistakes_are_named(colours, arguments, said):
    with pytest.raises(ValueError, match=said):
        Swatches(colours, **arguments)
