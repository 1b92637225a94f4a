"""Mela, an Indian fair: generated scenes with exact labels for every task, at any size, without any file.

The default data of the quickstart and the tests. A scene is a pure function of (seed, index), drawn when it is asked
for (a few milliseconds), so the data set has no size on disk, workers share nothing and resume is exact.

    mela = Mela(num_scenes=1000, size=[96, 160], layout="mixed", languages=["en", "hi"])
    mela[7]["image"], mela[7]["captions"]["hi"], mela[7]["boxes_xyxy"]
"""

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator, default_rng

from indiclip.generated.base import Generated, must_be_at_least, pick
from indiclip.generated.mela_scene import MIN_SIDE, Scene, draw_scene, kinds_in
from indiclip.generated.mela_words import CLASSES, LANGUAGES, PERSON, class_names
from indiclip.names import check_choice
from indiclip.types import Sample

ABSENT = 0.15  # share of samples that ask for the points of a class which is not there


class Mela(Generated):
    """Generated scenes of a fair as a map-style data set.

    Args:
        num_scenes: Length of the data set; scenes 0 to num_scenes - 1 of the fair `seed`.
        size: Of the images in pixels: one number for square ones, or [height, width].
        layout: "single": one kind of thing in an image, for captions and classification. "mixed": several kinds and
            people, for detection, DensePose and counting.
        people: Probability that a mixed scene has people (use 1 for DensePose); 0 keeps them out of single ones too.
        languages: A scene has a caption in each of these, and its count question in one, drawn from (seed, index).
        seed: Which fair; take another one for validation.
        densepose_points: Surface points per person, drawn evenly over the visible pixels, with replacement.
        depth: Samples have a `depth` too, float32 (height, width) in (0, 1]: 1 on the background, and less the later a
            thing was painted, so what hides another is nearer.
        kinds: Which of the 17 classes occur, as ['diya', 'kite', 'person']; all by default. Those that are held out are
            neither drawn nor asked for; class ids and `classes` stay.
        difficulty: "normal", or "hard": clutter behind, sizes 1:8, look-alikes of one colour, much of it hidden.

    Raises:
        ValueError: An argument is out of its range; the message names it.
    """

    def __init__(
        self,
        num_scenes: int = 100_000,
        size: int | list[int] = 128,
        layout: str = "mixed",
        people: float = 0.5,
        languages: Sequence[str] = ("en",),
        seed: int = 0,
        densepose_points: int = 100,
        depth: bool = False,
        kinds: Sequence[str] | None = None,
        difficulty: str = "normal",
    ) -> None:
        super().__init__("mela", size, MIN_SIDE, seed, num_scenes=num_scenes)
        if isinstance(languages, str) or not languages:
            raise ValueError(f"languages: expected a list such as ['en', 'hi']; found {languages!r}")
        for language in languages:
            check_choice("languages", language, LANGUAGES)
        must_be_at_least(0, densepose_points=densepose_points)
        self.languages, self.densepose_points, self.depth = list(languages), densepose_points, depth
        self.layout, self.people, self.kinds, self.difficulty = layout, people, kinds, difficulty
        self.classes = class_names("en")
        self.scene(0)  # checks what the scene is drawn with

    def scene(self, index: int) -> Scene:
        """The scene behind sample `index`: image, instance, part and UV maps, captions in all languages."""
        return draw_scene(self.seed, index, *self.size_hw, self.layout, self.people, self.kinds, self.difficulty)

    def __getitem__(self, index: int) -> Sample:
        self.must_have(index)
        scene = self.scene(index)
        # A stream of its own, so that what is asked about a scene never changes the scene.
        rng = default_rng([self.seed, index, 1])
        language = pick(rng, self.languages)
        sample: Sample = {
            "image": scene.image_HW3,
            "key": self.key(index),
            "captions": {name: [scene.captions[name]] for name in self.languages},
            "label": int(scene.classes[0]) if self.layout == "single" else -1,
            "boxes_xyxy": scene.boxes_xyxy,
            "classes": scene.classes,
            "crowd": np.zeros(len(scene.classes), bool),
        }
        sample |= self._question(rng, scene, language) | _surface(rng, scene, self.densepose_points)
        if self.depth:
            sample["depth"] = scene.depth_HW
        return sample

    def _question(self, rng: Generator, scene: Scene, language: str) -> Sample:
        """Which class is to be counted, and where its instances are; sometimes one that is not there."""
        kinds = CLASSES if self.kinds is None else kinds_in(self.kinds, self.people)
        present = np.unique(scene.classes)
        absent = np.setdiff1d([CLASSES.index(kind) for kind in kinds], present)
        ask_absent = not len(present) or rng.random() < ABSENT
        asked = absent if ask_absent and len(absent) else present
        label = pick(rng, asked.tolist())
        points_xy = scene.points_xy[scene.classes == label]
        return {"points_xy": points_xy, "count_class": class_names(language)[label], "count_label": label}


def _surface(rng: Generator, scene: Scene, num_points: int) -> Sample:
    """DensePose targets: points drawn evenly over the visible pixels of each person."""
    people = np.flatnonzero(scene.classes == PERSON)
    masks = scene.instances_HW[None] == people[:, None, None]
    ys, xs = np.zeros((2, len(people), num_points), np.int64)
    for row, mask in enumerate(masks):
        pixels = np.flatnonzero(mask)
        drawn = pixels[rng.integers(len(pixels), size=num_points)]
        ys[row], xs[row] = np.divmod(drawn, mask.shape[1])
    y, x = ys.ravel(), xs.ravel()
    return {
        "dp_boxes_xyxy": scene.boxes_xyxy[people],
        "dp_masks": masks.astype(np.uint8),
        "dp_points_xy": np.stack([x + 0.5, y + 0.5], axis=1).astype(np.float32),
        "dp_person": np.repeat(np.arange(len(people)), num_points),
        "dp_part": scene.parts_HW[y, x].astype(np.int64),
        "dp_uv": scene.uv_HW2[y, x],
    }
