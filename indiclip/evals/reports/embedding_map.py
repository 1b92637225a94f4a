"""A map of a card's images, on which those with similar embeddings lie close together.

Shape letters: S images of the sample, E embedding length.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from indiclip.evals.reports.page import webp
from indiclip.evals.samples import Sample

WIDTH, HEIGHT, SIDE = 720, 460, 42  # of the map, and of the place of a thumbnail, in the page's pixels
_MARGIN = SIDE // 2 + 4
_FEWEST = 10  # images, of fewer a map says nothing
_COMPONENTS = 50  # that t-SNE is given, as its authors advise (van der Maaten and Hinton, JMLR 9, 2008, section 4.2)
_PERPLEXITY = 30
_DENSITY = 1.5  # pixels of a thumbnail for each of the page's


class Point(NamedTuple):
    """An image on the map."""

    key: str
    class_id: str
    kind: str  # `right`, `wrong`, or `open` without an answer
    x: int
    y: int
    has_picture: bool


class EmbeddingMap(NamedTuple):
    """What `embedding_map.html` shows."""

    points: list[Point]
    thumbnails: str  # a data URI of a picture as large as the map, with all thumbnails at their places
    closest: list[tuple[str, str, float]]  # pairs of classes and the cosine of their mean embeddings, the nearest first
    width: int = WIDTH
    height: int = HEIGHT
    side: int = SIDE


def embedding_map(
    sample: Sample, is_right: Mapping[str, bool], picture: Callable[[str], np.ndarray | None], most: int
) -> EmbeddingMap | None:
    """A map by t-SNE, the same for the same embeddings; None where there are too few, or all are one.

    Args:
        sample: Images and embeddings.
        is_right: Keys of the images that were answered for.
        picture: Key -> uint8 (height, width, 3), or None.
        most: Thumbnails. As many as have room without covering each other are shown; the other images are points.
    """
    places_S2 = _places(sample.image_SE)
    if places_S2 is None:
        return None
    canvas = Image.new("RGBA", (int(WIDTH * _DENSITY), int(HEIGHT * _DENSITY)))
    with_picture = set()
    for place in _spread(places_S2, most):
        pixels_HW3 = picture(sample.keys[place])
        if pixels_HW3 is not None:
            thumbnail = Image.fromarray(pixels_HW3)
            thumbnail.thumbnail((int(SIDE * _DENSITY), int(SIDE * _DENSITY)))
            corner = places_S2[place] * _DENSITY - np.array(thumbnail.size) / 2
            canvas.paste(thumbnail, (int(corner[0]), int(corner[1])))
            with_picture.add(place)
    kinds = {True: "right", False: "wrong", None: "open"}
    points = [
        Point(key, class_id, kinds[is_right.get(key)], x, y, place in with_picture)
        for place, (key, class_id, (x, y)) in enumerate(
            zip(sample.keys, sample.classes, places_S2.tolist(), strict=True)
        )
    ]
    return EmbeddingMap(points, webp(canvas, 60) if with_picture else "", closest(sample))


def _places(image_SE: np.ndarray) -> np.ndarray | None:
    """int64 (S, 2), in pixels of the map: t-SNE from the first two principal components, on one thread, as its sums
    depend on their order.
    """
    if len(image_SE) < _FEWEST or image_SE.shape[1] < 2 or np.ptp(image_SE, axis=0).max() < 1e-6:
        return None
    from sklearn.decomposition import PCA  # here, as it takes a second to import
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        components_SE = PCA(min(_COMPONENTS, *image_SE.shape), svd_solver="full").fit_transform(image_SE)
        perplexity = min(_PERPLEXITY, (len(image_SE) - 1) / 3)
        found_S2 = TSNE(init="pca", random_state=0, perplexity=perplexity).fit_transform(components_SE)
    share_S2 = (found_S2 - found_S2.min(0)) / np.maximum(np.ptp(found_S2, axis=0), 1e-9)
    room = np.array([WIDTH, HEIGHT]) - 2 * _MARGIN
    places_S2: np.ndarray = (share_S2 * room + _MARGIN).round().astype(int)
    return places_S2


def _spread(places_S2: np.ndarray, most: int) -> list[int]:
    """Images that lie far from each other: again and again that which is farthest from all that were taken, until the
    next one would cover another.
    """
    chosen = [int(np.abs(places_S2 - places_S2.mean(0)).max(1).argmin())]  # the first is that in the middle
    distance_S = np.full(len(places_S2), np.inf)
    while len(chosen) < most:
        distance_S = np.minimum(distance_S, np.abs(places_S2 - places_S2[chosen[-1]]).max(1))
        if distance_S.max() <= SIDE:
            break
        chosen.append(int(distance_S.argmax()))
    return chosen


def closest(sample: Sample, most: int = 8) -> list[tuple[str, str, float]]:
    """The pairs of classes whose mean embeddings are nearest to each other, each with its cosine."""
    classes = sorted(set(sample.classes) - {""})
    if len(classes) < 2:
        return []
    of_class = np.array(sample.classes)
    mean_CE = np.stack([sample.image_SE[of_class == name].mean(0) for name in classes])
    mean_CE /= np.maximum(np.linalg.norm(mean_CE, axis=1, keepdims=True), 1e-12)
    rows, columns = np.triu_indices(len(classes), 1)
    cosines = (mean_CE @ mean_CE.T)[rows, columns]
    order = np.argsort(-cosines, kind="stable")[:most].tolist()
    return [(classes[rows[i]], classes[columns[i]], float(cosines[i])) for i in order]
