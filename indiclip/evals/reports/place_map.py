"""A map of a card's places: how often the pictures of each were told, and how many there are."""

import math
from dataclasses import dataclass, field
from itertools import product

from indiclip.evals.results import CardResult, Prediction

_NEAR = 0.3  # degrees, some 30 km: places of one city are one circle
_WIDEST, _TALLEST = 460.0, 620.0  # pixels
_STEPS = (1, 5, 15, 30, 60)  # degrees between the lines
_SPACES = 6  # between lines that go through the places, at most, along a side
_NO_IMAGE, _FEW, _MOST = 3.5, 4.0, 13.0  # pixels, radius of a circle
_LETTER = (5.9, 12.0)  # pixels, the width and height of a letter of a name
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass
class Spot:
    """Places that are one circle, of one state; `hits` has an entry for each image."""

    state: str
    lat: float
    lon: float
    class_ids: list[str] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)


class PlaceMap:
    """What `place_map.html` draws: an equirectangular map of whole lines, true to scale at its middle parallel.

    Positions are pixels from the upper left. North is up.
    """

    def __init__(self, spots: list[Spot]) -> None:
        self.spots = sorted(spots, key=lambda spot: -len(spot.hits))  # small ones in front
        lats, lons = [spot.lat for spot in spots], [spot.lon for spot in spots]
        widest = max(max(lats) - min(lats), max(lons) - min(lons))
        self._step = next(step for step in _STEPS if widest <= _SPACES * step)
        self._south, self._north = self._whole(lats)
        self._west, self._east = self._whole(lons)
        stretch = math.cos(math.radians((self._south + self._north) / 2))
        wide, tall = (self._east - self._west) * stretch, self._north - self._south
        self._per_lat = min(_WIDEST / wide, _TALLEST / tall)  # pixels of a degree
        self._per_lon = self._per_lat * stretch
        self.width, self.height = self.at(self._south, self._east)

    def _whole(self, degrees: list[float]) -> tuple[int, int]:
        """The lines around all places, with room beside these."""
        room = 0.2 * self._step
        first = math.floor((min(degrees) - room) / self._step)
        return first * self._step, math.ceil((max(degrees) + room) / self._step) * self._step

    def at(self, lat: float, lon: float) -> tuple[float, float]:
        """x and y of a place."""
        return (lon - self._west) * self._per_lon, (self._north - lat) * self._per_lat

    def radius(self, spot: Spot) -> float:
        """Of its circle, whose area grows with its images."""
        if not spot.hits:
            return _NO_IMAGE
        return _FEW + (_MOST - _FEW) * math.sqrt(len(spot.hits) / len(self.spots[0].hits))

    def parallels(self) -> list[tuple[float, str]]:
        """y of the lines across, and what they are called."""
        lats = range(self._south + self._step, self._north, self._step)
        return [(self.at(lat, 0)[1], _degrees(lat, "NS")) for lat in lats]

    def meridians(self) -> list[tuple[float, str]]:
        """x of the lines from north to south, and what they are called."""
        lons = range(self._west + self._step, self._east, self._step)
        return [(self.at(0, lon)[0], _degrees(lon, "EW")) for lon in lons]

    def states(self) -> list[tuple[float, float, str]]:
        """x and y of the middle of the states' names, and these: beside their largest circles, on the map, where they
        hide neither another name nor a circle if that can be.
        """
        largest: dict[str, tuple[float, float]] = {}
        taken = []
        for spot in self.spots:
            x, y = self.at(spot.lat, spot.lon)
            taken.append(_box(x, y, self.radius(spot), self.radius(spot)))
            if spot.state:
                largest.setdefault(spot.state, (x, y))

        def cost(box: Box) -> tuple[float, float]:
            """How much of a name is off the map, which weighs more, and how much it hides."""
            return -round(overlap(box, (0, 0, self.width, self.height))), sum(overlap(box, other) for other in taken)

        labels = []
        for state, (x, y) in largest.items():
            half, tall = len(state) * _LETTER[0] / 2, _LETTER[1]
            down, right = _MOST + tall / 2, _MOST + tall / 2 + half
            beside = product((x, x + right, x - right), (y + down, y - down, y, y + 2 * down, y - 2 * down))
            box = min((_box(*middle, half, tall / 2) for middle in beside), key=cost)
            taken.append(box)
            labels.append(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, state))
        return labels


def place_map(card: CardResult, rows: list[Prediction]) -> PlaceMap | None:
    """The places of a card that says where its classes are, by its answers; those of a state that are near each other
    are one. None where there are no places or no answers.
    """
    if not card.places or not rows:
        return None
    spots: list[Spot] = []
    for class_id, (lat, lon, state) in card.places.items():
        beside = (one for one in spots if one.state == state and math.dist((one.lat, one.lon), (lat, lon)) < _NEAR)
        spot = next(beside, None)
        if spot is None:
            spot = Spot(state, lat, lon)
            spots.append(spot)
        spot.class_ids.append(class_id)
        spot.hits += [row.rank == 0 for row in rows if row.truth == class_id]
    return PlaceMap(spots)


def _degrees(value: int, signs: str) -> str:
    return f"{abs(value)}°{signs[value < 0] if value else ''}"


def _box(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0.0) * max(tall, 0.0)
