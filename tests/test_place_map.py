"""The map of a card's places against numbers made by hand, and accuracy by state against a loop."""

import math
import re

import numpy as np
import pytest
from bench_fakes import answer, card, score, small_run
from test_bench_report import page_of, section, words_of
from test_protocols import items_of, make_card, scores_of, unit

from indiclip.evals.cards.card import load_card
from indiclip.evals.find import card_result
from indiclip.evals.reports.place_map import PlaceMap, Spot, place_map
from indiclip.evals.result_files import load_result, save_result
from indiclip.evals.results import PHOTOGRAPHS, Result

__all__ = ["make_card"]

PLACES = {
    "qutub": [28.5, 77.0, "Delhi"],
    "fort": [28.7, 77.1, "Delhi"],
    "ghat": [25.0, 83.0, "Uttar Pradesh"],
    "rock": [8.0, 77.5, "Tamil <b>Nadu"],
}


def run_of(*answers):
    one = card("geoguess", places=PLACES)
    result = Result("m", [8], ["native"], cards=[one])
    result.scores = [
        score("geoguess", 0.5, chance=0.25, num_items=4),
        score("geoguess", 12.0, metric="median_km", protocol="places"),
        score("geoguess", 2 / 3, protocol="places", subset="Delhi", chance=0.25, num_items=3),
        score("geoguess", 0.0, protocol="places", subset="Tamil <b>Nadu", chance=0.25, num_items=1),
    ]
    result.predictions = list(answers)
    return result, one


ANSWERS = [
    answer("1.jpg", "qutub", "qutub", card="geoguess"),
    answer("2.jpg", "qutub", "ghat", card="geoguess"),
    answer("3.jpg", "fort", "fort", card="geoguess"),
    answer("4.jpg", "rock", "ghat", card="geoguess"),
]


def test_circles_are_where_the_places_are_and_places_of_a_city_are_one():
    result, one = run_of(*ANSWERS)
    drawn = place_map(one, result.predictions)
    # Lines of 5 degrees: latitude 5 to 30, longitude 75 to 85, true to scale at 17.5 degrees north.
    scale = min(460 / (10 * math.cos(math.radians(17.5))), 620 / 25)
    assert (drawn.width, drawn.height) == pytest.approx((10 * math.cos(math.radians(17.5)) * scale, 25 * scale))
    delhi, rock, ghat = drawn.spots
    assert [spot.class_ids for spot in drawn.spots] == [["qutub", "fort"], ["rock"], ["ghat"]]
    assert [sorted(spot.hits) for spot in drawn.spots] == [[False, True, True], [False], []]
    assert drawn.at(delhi.lat, delhi.lon) == pytest.approx((0.2 * drawn.width, 1.5 / 25 * drawn.height))
    assert drawn.at(rock.lat, rock.lon) == pytest.approx((0.25 * drawn.width, 22 / 25 * drawn.height))
    assert drawn.radius(delhi) > drawn.radius(rock) > drawn.radius(ghat)
    assert [(name, round(y)) for y, name in drawn.parallels()] == [
        (f"{lat}°N", round((30 - lat) * scale)) for lat in (10, 15, 20, 25)
    ]
    assert [name for _, name in drawn.meridians()] == ["80°E"]
    assert {name for _, _, name in drawn.states()} == {"Delhi", "Uttar Pradesh", "Tamil <b>Nadu"}


def test_a_map_holds_its_places_in_any_part_of_the_earth():
    generator = np.random.default_rng(0)
    for _ in range(200):
        spread = generator.uniform(0, 80)
        lats = np.clip(generator.uniform(-60, 60) + generator.uniform(-spread, spread, 5) / 3, -80, 80)
        lons = np.clip(generator.uniform(-120, 120) + generator.uniform(-spread, spread, 5), -179, 179)
        drawn = PlaceMap([Spot("", lat, lon) for lat, lon in zip(lats, lons, strict=True)])
        for lat, lon in zip(lats, lons, strict=True):
            x, y = drawn.at(lat, lon)
            assert 0 < x < drawn.width
            assert 0 < y < drawn.height
        assert drawn.width <= 460.001
        assert drawn.height <= 620.001


def test_states_of_our_card_hide_no_other_and_stay_on_the_map():
    ours = load_card("geoguess")
    answers = [answer(f"{one}.jpg", one, one, card="geoguess") for one in ours.ids]
    drawn = place_map(card_result(ours, PHOTOGRAPHS, "scored", []), answers)
    labels = drawn.states()
    assert {name for _, _, name in labels} == {one.facts["state"] for one in ours.classes}
    for x, y, name in labels:
        assert 0 < x < drawn.width
        assert 0 < y < drawn.height
        for other_x, other_y, other in labels:
            wide = 5.9 * (len(name) + len(other)) / 2
            assert other == name or abs(y - other_y) >= 12 or abs(x - other_x) >= wide


def test_the_page_has_the_map_and_a_table_of_its_states(tmp_path):
    page = section(page_of(tmp_path, run_of(*ANSWERS)[0]), "geoguess-photographs")
    assert page.count("<svg role=") == 1
    for drawn, title in (
        (' 66.7%, var(--page))" stroke="var(--hit)"', "qutub, fort: 0.67 of 3 images"),
        (' 0.0%, var(--page))" stroke="var(--hit)"', "rock: 0.00 of 1 image"),
        ('stroke-dasharray="2 1.5"', "ghat: no images"),
    ):
        assert page.count(f"{drawn}><title>{title}</title>") == 1
    assert "Tamil &lt;b&gt;Nadu" in page
    assert "<b>Nadu" not in page
    words = words_of(page)
    assert "Accuracy by place, English" in words
    # Once, beside the map.
    assert len(re.findall("Delhi 3 0.667", words)) == 1
    assert "median distance 12 km" not in words.split("Accuracy by place")[1]


def test_no_map_without_places_or_answers(tmp_path):
    assert "<svg role=" not in page_of(tmp_path, small_run())
    assert place_map(run_of()[1], []) is None
    assert place_map(card("food"), ANSWERS) is None
    words = words_of(section(page_of(tmp_path, run_of()[0]), "geoguess-photographs"))
    assert "Delhi 3 0.667" in words  # the table stays with its protocol


def test_where_places_are_is_saved(tmp_path):
    pytest.importorskip("pyarrow")
    result, one = run_of(*ANSWERS)
    save_result(result, tmp_path)
    again = load_result(tmp_path)
    assert again.cards == [one]
    assert again.predictions == result.predictions


def test_accuracy_by_state_is_that_of_a_loop(make_card):
    states = ["Goa", "Goa", "Assam", "Assam", None, "Kerala"]
    facts = [{"lat": 10 + c, "lon": 75} | ({"state": state} if state else {}) for c, state in enumerate(states)]
    classes = [{"id": f"class_{c}", "names": {"en": f"name {c}"}, "facts": of} for c, of in enumerate(facts)]
    one = make_card("places.Places", classes=classes)
    generator = np.random.default_rng(0)
    label_N = generator.integers(0, 5, 50)  # no image of Kerala
    center_CE = generator.normal(size=(6, 12))
    image_NE = center_CE[label_N] + 2 * generator.normal(size=(50, 12))
    found = scores_of(items_of(one, 50, label_N), image_NE, {f"name {c}": center_CE[c] for c in range(6)})
    hit_N = (unit(image_NE) @ unit(center_CE).T).argmax(1) == label_N
    for state in ("Goa", "Assam"):
        of_N = np.array([states[c] == state for c in label_N])
        row = found["acc1", "en", 12, state]
        assert (row.value, row.num_items) == (pytest.approx(hit_N[of_N].mean()), of_N.sum())
        assert row.chance == pytest.approx(1 / 6)
    assert {subset for metric, *_, subset in found if metric == "acc1"} == {"Goa", "Assam"}
    assert card_result(one, PHOTOGRAPHS, "scored", []).places["class_4"] == [14, 75, ""]
