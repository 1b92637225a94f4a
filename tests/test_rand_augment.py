"""Drawn things stay under their labels through every geometric transform that a YAML may name.

Oracles: the pixels of what is drawn; torchvision's RandAugment, whose images must be ours bit by bit; big_vision's
operations by hand.
"""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from indiclip import patches
from indiclip.loading.collate import collate
from indiclip.loading.rand_augment import BIG_VISION, RandAugment
from indiclip.loading.transforms import Transform
from indiclip.preprocessing import Preprocessing

HEIGHT, WIDTH, RADIUS = 96, 128, 5
POINTS = np.array([[20, 20], [64, 48], [100, 30], [40, 70], [110, 80]], np.float32)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255]], np.uint8)
# Every transform of v2 that moves pixels and is not refused. A flip is in `test_transforms`.
MOVES = {
    "affine": v2.RandomAffine(30, (0.2, 0.2), (0.7, 1.4), (-20, 20, -20, 20), fill=128),
    "center_crop": v2.CenterCrop((80, 150)),
    "crop": v2.RandomCrop(70, padding=6),
    "elastic": v2.ElasticTransform(alpha=100.0, sigma=6.0, fill=128),
    "pad": v2.Pad(9, fill=[1, 2, 3]),
    "perspective": v2.RandomPerspective(0.4, p=1, fill=128),
    "rand_augment": RandAugment(3, 8, "big_vision", fill=128),
    "rand_augment_of_torchvision": RandAugment(2, 25),
    "random_resize": v2.RandomResize(90, 130),
    "resize": v2.Resize(64, max_size=80),
    "resized_crop": v2.RandomResizedCrop(90),
    "rotation": v2.RandomRotation(40, fill=[128, 0, 0]),
    "rotation_expand": v2.RandomRotation(40, expand=True),
    "scale_jitter": v2.ScaleJitter((90, 90), (0.8, 1.2)),
    "shortest_size": v2.RandomShortestSize(100, 140),
    "twice": v2.RandomApply([v2.RandomRotation(30), v2.RandomAffine(0, (0.3, 0.3))], p=1.0),
    "zoom_out": v2.RandomZoomOut(fill=128, p=1, side_range=(1.0, 1.5)),
}


def scene():
    """Discs, each with its box, mask, area and, in its middle, a surface point; depth is the column."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    masks = np.stack([np.hypot(columns - x, rows - y) <= RADIUS for x, y in POINTS])
    for mask, colour in zip(masks, COLOURS, strict=True):
        image[mask] = colour
    numbers, boxes = np.arange(len(POINTS)), np.concatenate([POINTS - RADIUS, POINTS + RADIUS], 1)
    return {
        "image": image, "key": "s", "boxes_xyxy": boxes, "classes": numbers, "masks": masks.astype(np.uint8),
        "area": masks.sum((1, 2)).astype(np.float32), "points_xy": POINTS.copy(), "dp_points_xy": POINTS.copy(),
        "dp_boxes_xyxy": boxes.copy(), "dp_masks": masks.astype(np.uint8), "dp_person": numbers, "dp_part": numbers,
        "depth": columns.astype(np.float32),
    }  # fmt: skip


def prepare(step, seed, sample=None):
    prepared = Transform(100_000, [step])(sample or scene(), Preprocessing(1), seed)
    return prepared, patches.unpatchify(collate([prepared])["images"], 0)


def whole(mask_HW):
    """Whether something is seen, and does not touch the border, where part of it may be lost."""
    border = mask_HW[[0, -1]].any() or mask_HW[:, [0, -1]].any()
    return mask_HW.sum() > 20 and not border


@pytest.mark.parametrize("name", MOVES)
def test_what_is_drawn_stays_under_its_label(name, monkeypatch):
    # Without the operations that change colours, which discs are told apart by.
    moves = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
    step, seen = MOVES[name], 0
    if isinstance(step, RandAugment):
        monkeypatch.setattr(step, "space", {key: step.space[key] for key in moves})
    for seed in range(12):
        prepared, image = prepare(step, seed)
        rows, columns = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
        assert prepared["masks"].shape[1:] == prepared["dp_masks"].shape[1:] == prepared["depth"].shape[1:]
        assert prepared["depth"].shape[1:] == image.shape[:2]
        assert set(np.unique(prepared["masks"])) <= {0, 1}  # never filled as the image is
        depth = prepared["depth"][0]
        assert 0.4 < depth[~depth.isnan()].min() <= depth[~depth.isnan()].max() < WIDTH
        people = prepared["dp_boxes_xyxy"][prepared["dp_person"]]
        points = zip(prepared["dp_points_xy"].tolist(), prepared["dp_part"].tolist(), people.tolist(), strict=True)
        for (x, y), number, person in points:
            assert person[0] <= x <= person[2]
            assert person[1] <= y <= person[3]
            drawn = abs(image.astype(int) - COLOURS[number]).sum(-1) < 150
            assert drawn[int(y), int(x)] or not whole(drawn)
            seen += whole(drawn)
            if not whole(drawn) or name == "twice":  # where the first of the two may have cut something off
                continue
            slack = 2 if name == "elastic" else 1  # the middle of what is bent is not the bent middle
            assert np.hypot(columns[drawn].mean() - x, rows[drawn].mean() - y) < slack
            at = prepared["classes"].tolist().index(number)
            x1, y1, x2, y2 = prepared["boxes_xyxy"][at].tolist()
            for seen_at, low, high in ((columns[drawn], x1, x2), (rows[drawn], y1, y2)):
                assert low - 0.5 < seen_at.min()
                assert seen_at.max() < high + 0.5
            assert (x2 - x1) * (y2 - y1) < 5 * drawn.sum()  # around it, not anywhere
            mask = prepared["masks"][at].numpy() > 0
            assert (mask & drawn).sum() > 0.55 * (mask | drawn).sum()  # colours are blended at a disc's edge
            assert prepared["area"][at] / mask.sum() == pytest.approx(1, abs=0.45 if name == "elastic" else 0.3)
            if name not in ("elastic", "perspective"):
                assert depth[int(y), int(x)] == pytest.approx(POINTS[number, 0], abs=1.5)
    assert seen >= 10


def test_a_turn_changes_no_area_and_a_shear_by_its_determinant():
    sample = scene()
    for degrees in (30, 45, 90):
        prepared, _ = prepare(v2.RandomRotation((degrees, degrees), expand=True), 0, sample)
        assert prepared["area"].tolist() == pytest.approx(sample["area"].tolist(), rel=1e-5)
    doubled = v2.RandomAffine(0, scale=(2, 2), shear=(20, 20, 0, 0))
    prepared, _ = prepare(doubled, 0, sample)
    left = prepared["classes"].tolist()
    assert 0 < len(left) < 5  # the outer ones are gone
    assert prepared["area"].tolist() == pytest.approx((sample["area"][left] * 2**2).tolist(), rel=1e-4)


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_images_are_those_of_torchvision_bit_by_bit(magnitude):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 56), dtype=np.uint8))
    for seed in range(20):
        torch.manual_seed(seed)
        expected = v2.RandAugment(3, magnitude, fill=7)(image)
        torch.manual_seed(seed)
        found = RandAugment(3, magnitude, fill=7)({"image": tv_tensors.Image(image)})["image"]
        assert torch.equal(found, expected)


# Of `level_to_arg` in big_vision/pp/archive/autoaugment.py, by hand; its factors are torchvision's and 1.
@pytest.mark.parametrize(
    ("magnitude", "expected"),
    [
        (0, {"Rotate": 0, "Posterize": 1, "Solarize": 0, "Color": -0.9, "ShearX": 0, "Cutout": 0, "SolarizeAdd": 0}),
        (10, {"Rotate": 30, "Posterize": 4, "Solarize": 256 / 255, "Color": 0.9, "ShearX": 0.3, "TranslateX": 100}),
        (15, {"Rotate": 45, "Posterize": 6, "Brightness": 1.8, "TranslateY": 150, "Cutout": 60, "SolarizeAdd": 165}),
        (20, {"Rotate": 60, "Posterize": 8, "Sharpness": 2.7, "ShearY": 0.6, "Cutout": 80, "SolarizeAdd": 220}),
    ],
)
def test_magnitudes_are_those_of_the_paper(magnitude, expected):
    found = {name: float(BIG_VISION[name][0](31, 224, 224)[magnitude]) for name in expected}
    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(signed for _, signed in BIG_VISION.values()) == 5


def test_what_left_the_image_does_not_come_back():
    class Away(RandAugment):
        """To the right and back by more than half of the width."""

        def _get_random_item(self, space):
            self.back = not getattr(self, "back", True)
            size = 77 * (-1 if self.back else 1)
            return "TranslateX", (lambda *_: torch.full((31,), float(size)), False)

    prepared, image = prepare(Away(2), 0)
    assert prepared["dp_part"].tolist() == prepared["classes"].tolist() == [0, 3]
    assert not image[:, WIDTH - 77 :].any()
    assert prepared["depth"][0, :, WIDTH - 77 :].isnan().all()
    assert prepared["boxes_xyxy"].numpy() == pytest.approx(scene()["boxes_xyxy"][[0, 3]])


def test_cutout_and_erasing_leave_labels_where_they_are(recwarn):
    cut = RandAugment(1, 15, "big_vision", fill=128)
    cut.space = {"Cutout": BIG_VISION["Cutout"]}
    for step, grey in ((cut, 128), (v2.RandomErasing(1.0, value=[128, 128, 128]), 128)):
        prepared, image = prepare(step, 1)
        changed = (image != scene()["image"]).any(-1)
        assert changed.any()
        assert (image[changed] == grey).all()
        assert prepared["points_xy"].tolist() == POINTS.tolist()
        assert prepared["area"].numpy() == pytest.approx(scene()["area"])
    assert not recwarn.list  # torchvision warns that boxes stay


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (v2.RandAugment(), "RandAugment moves the image without its boxes.*indiclip.loading.rand_augment.RandAugment"),
        (v2.RandomApply([v2.TrivialAugmentWide()], p=1.0), "RandomApply moves the image without its boxes"),
        (v2.FiveCrop(8), "FiveCrop makes several images of one"),
        (v2.MixUp(num_classes=2), "MixUp mixes the images of a batch, which is what `mix` of the source does"),
        (v2.SetClampingMode("hard"), "SetClampingMode loses points"),
        (v2.ToPureTensor(), "ToPureTensor gives fields of another kind"),
        (v2.RandomErasing(value="random"), r"RandomErasing\.value: found random.*expected 0 to 255"),
    ],
)
def test_what_would_move_the_image_alone_is_refused(step, message):
    with pytest.raises(ValueError, match=f"augment: {message}"):
        prepare(step, 0)


@pytest.mark.parametrize("options", [{"magnitude": 31}, {"num_ops": -1}, {"space": "timm"}])
def test_wrong_numbers_are_refused(options):
    with pytest.raises(ValueError, match=rf"augment: RandAugment\.{next(iter(options))}"):
        RandAugment(**options)
