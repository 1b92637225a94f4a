"""A map of a card's places: how often the pictures of each were told, and how many there are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from indiclip.evals.formatting import language_name, number, share, words
from indiclip.evals.results import CardResult, Prediction, Result

_NEAR = 0.3  # degrees, some 30 km: places of one city are one circle
_WIDEST, _TALLEST = 460.0, 620.0  # pixels
_STEPS = (1, 5, 15, 30)  # degrees between the lines
_LINES = 8  # at most, along a side
_RADII = (4.0, 13.0)  # pixels, of a circle of no image, nearly, and of the one with most images
_LETTER = (5.9, 12.0)  # pixels, the width and height of a letter of a label


@dataclass
class _Spot:
    """Places that are one circle, of one state."""

    state: str
    lat: float
    lon: float
    names: list[str]
    images: int
    hits: int


class Circle(NamedTuple):
    """Pixels from the upper left; `share` is of the images that were told, nothing where there are none."""

    x: float
    y: float
    radius: float
    share: str
    words: str


class Label(NamedTuple):
    """Where its middle is."""

    x: float
    y: float
    text: str


class PlaceMap(NamedTuple):
    """What `place_map.html` draws; all in pixels. North is up."""

    language: str
    width: float
    height: float
    circles: list[Circle]
    states: list[Label]
    parallels: list[Label]  # lines across, and what they are called
    meridians: list[Label]


def place_map(result: Result, card: CardResult) -> PlaceMap | None:
    """The places of a card that says where its classes are, by the answers of its main protocol in its first language,
    English where it has any. None where there are no places or no answers.
    """
    of_card = result.answers_of(card)
    found = {language: rows for (protocol, language), rows in of_card.items() if protocol == card.protocol}
    if not card.places or not found:
        return None
    language = min(found, key=lambda code: code != "en")
    spots = _spots(card, found[language])
    frame = _Frame([spot.lat for spot in spots], [spot.lon for spot in spots])
    most = max(spot.images for spot in spots)
    circles = []
    for spot in sorted(spots, key=lambda one: -one.images):  # small ones in front
        rate = spot.hits / spot.images if spot.images else math.nan
        told = f"{number(rate, digits=2)} of {spot.images} images" if spot.images else "no images"
        radius = _RADII[0] + (_RADII[1] - _RADII[0]) * math.sqrt(spot.images / most) if spot.images else 3.5
        said = f"{', '.join(map(words, spot.names))}: {told}"
        circles.append(Circle(*frame.at(spot.lat, spot.lon), radius, share(rate) if spot.images else "", said))
    return PlaceMap(
        language_name(language),
        frame.width,
        frame.height,
        circles,
        _labels(spots, circles, frame),
        [Label(0, frame.at(lat, frame.west)[1], _degrees(lat, "NS")) for lat in frame.lines(frame.south, frame.north)],
        [Label(frame.at(frame.south, lon)[0], 0, _degrees(lon, "EW")) for lon in frame.lines(frame.west, frame.east)],
    )


def _spots(card: CardResult, rows: Sequence[Prediction]) -> list[_Spot]:
    """The places, those of a state that are near each other as one."""
    spots: list[_Spot] = []
    for class_id, (lat, lon, state) in card.places.items():
        hits = [row.rank == 0 for row in rows if row.truth == class_id]
        beside = (one for one in spots if one.state == state and math.dist((one.lat, one.lon), (lat, lon)) < _NEAR)
        if (spot := next(beside, None)) is None:
            spots.append(_Spot(state, lat, lon, [class_id], len(hits), sum(hits)))
            continue
        spot.names.append(class_id)
        spot.images, spot.hits = spot.images + len(hits), spot.hits + sum(hits)
    return spots


class _Frame:
    """An equirectangular map of whole lines, true to scale at its middle parallel."""

    def __init__(self, lats: Sequence[float], lons: Sequence[float]) -> None:
        widest = max(max(lats) - min(lats), max(lons) - min(lons))
        self.step = next((step for step in _STEPS if widest / step <= _LINES - 2), _STEPS[-1])
        self.south, self.north = self._whole(lats)
        self.west, self.east = self._whole(lons)
        stretch = math.cos(math.radians((self.south + self.north) / 2))
        wide, tall = (self.east - self.west) * stretch, self.north - self.south
        scale = min(_WIDEST / wide, _TALLEST / tall)
        self.width, self.height = wide * scale, tall * scale

    def _whole(self, degrees: Sequence[float]) -> tuple[int, int]:
        """The lines around all places, with room beside these."""
        room = 0.2 * self.step
        first = math.floor((min(degrees) - room) / self.step)
        return first * self.step, math.ceil((max(degrees) + room) / self.step) * self.step

    def at(self, lat: float, lon: float) -> tuple[float, float]:
        """Where a place is, in pixels."""
        x = (lon - self.west) / (self.east - self.west) * self.width
        return x, (self.north - lat) / (self.north - self.south) * self.height

    def lines(self, first: int, last: int) -> range:
        return range(first + self.step, last, self.step)


def _degrees(value: int, signs: str) -> str:
    return f"{abs(value)}°{signs[value < 0] if value else ''}"


def _labels(spots: list[_Spot], circles: list[Circle], frame: _Frame) -> list[Label]:
    """The states' names beside their largest circles, where they hide neither another name nor a circle if that can
    be.
    """
    taken = [(one.x - one.radius, one.y - one.radius, one.x + one.radius, one.y + one.radius) for one in circles]
    labels = []
    for state in dict.fromkeys(spot.state for spot in spots if spot.state):
        largest = max((spot for spot in spots if spot.state == state), key=lambda one: one.images)
        x, y = frame.at(largest.lat, largest.lon)
        half, tall = len(state) * _LETTER[0] / 2, _LETTER[1]
        away = _RADII[1] + tall / 2
        beside = [(0, away), (0, -away), (half + away, 0), (-half - away, 0)]
        beside += [(across * half, down * away) for across in (0.8, -0.8) for down in (1, -1)]
        beside += [(0, 2 * away), (0, -2 * away), (half, 1.6 * away), (-half, 1.6 * away)]
        boxes = [(x + dx - half, y + dy - tall / 2, x + dx + half, y + dy + tall / 2) for dx, dy in beside]
        box = min(boxes, key=lambda box: (_outside(box, frame), sum(_overlap(box, other) for other in taken)))
        taken.append(box)
        labels.append(Label((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, state))
    return labels


def _outside(box: tuple[float, float, float, float], frame: _Frame) -> bool:
    return box[0] < 0 or box[1] < 0 or box[2] > frame.width or box[3] > frame.height


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """The area that two boxes share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0.0) * max(tall, 0.0)
