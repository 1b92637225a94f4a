"""Image and annotations move together: coloured things are painted, moved, and looked for where the targets say."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from indiclip import patches
from indiclip.images import EncodedImage
from indiclip.loading.collate import collate
from indiclip.loading.transforms import Transform
from indiclip.preprocessing import Preprocessing
from indiclip.types import FIELDS, Field, targets_of

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
BOXES = np.array([[10, 20, 50, 60], [100, 5, 130, 95], [60, 70, 90, 90]], dtype=np.float32)
SIZE_HW = (100, 140)


def scene(boxes=BOXES):
    """A rectangle of its own colour in every box, with its mask and, on its middle, a point."""
    image = np.full((*SIZE_HW, 3), 128, np.uint8)
    masks = np.zeros((len(boxes), *SIZE_HW), np.uint8)
    for colour, mask, (x1, y1, x2, y2) in zip(COLOURS, masks, boxes.astype(int), strict=False):
        image[y1:y2, x1:x2], mask[y1:y2, x1:x2] = colour, 1
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    numbers = np.arange(len(boxes))
    return {
        "image": image, "key": "s", "caption": "three things", "label": 4,
        "boxes_xyxy": boxes.copy(), "classes": numbers, "crowd": numbers == 1, "masks": masks, "points_xy": middles,
        "count_class": "thing", "dp_boxes_xyxy": boxes.copy(), "dp_masks": masks, "dp_points_xy": middles.repeat(2, 0),
        "dp_person": numbers.repeat(2), "dp_part": numbers.repeat(2) + 1,
        "dp_uv": np.stack([numbers / 9] * 2, 1).repeat(2, 0),
    }  # fmt: skip


def prepare(sample, *augment, max_tokens=100_000, patch_size=2, seed=0, canvas_hw=None):
    prepared = Transform(max_tokens, list(augment))(sample, Preprocessing(patch_size, canvas_hw), seed)
    return prepared, patches.unpatchify(collate([prepared])["images"], 0)


def bounds(image, colour, tolerance=60):
    """The box of the pixels near a colour."""
    rows, columns = np.nonzero((abs(image.astype(int) - colour) <= tolerance).all(-1))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def check(prepared, image, slack):
    """Everything that is left lies where its colour is."""
    assert len(prepared["boxes_xyxy"]) == len(prepared["classes"]) == len(prepared["crowd"]) == len(prepared["masks"])
    assert prepared["masks"].shape[1:] == image.shape[:2]
    for box, number, crowd, mask in zip(
        *(prepared[n] for n in ("boxes_xyxy", "classes", "crowd", "masks")), strict=True
    ):
        assert bounds(image, COLOURS[number]) == pytest.approx(box.numpy(), abs=slack)
        assert bounds(mask.numpy()[..., None] * 255, 255) == pytest.approx(box.numpy(), abs=slack)
        assert crowd == (number == 1)
    height, width = image.shape[:2]
    assert prepared["points_xy"].shape[1:] == prepared["dp_points_xy"].shape[1:] == (2,)
    for x, y in prepared["points_xy"].tolist():
        assert 0 <= x < width
        assert 0 <= y < height
        assert (abs(image[int(y), int(x)].astype(int) - COLOURS) <= 60).all(1).any()
    fields = (prepared[name] for name in ("dp_points_xy", "dp_person", "dp_part", "dp_uv"))
    for (x, y), person, part, uv in zip(*fields, strict=True):
        number = int(part) - 1
        assert (abs(image[int(y), int(x)].astype(int) - COLOURS[number]) <= 60).all()
        assert bounds(image, COLOURS[number]) == pytest.approx(prepared["dp_boxes_xyxy"][person].numpy(), abs=slack)
        assert prepared["dp_masks"][person, int(y), int(x)] == 1
        assert uv.tolist() == pytest.approx([number / 9] * 2)


def test_without_changes_everything_stays_as_it_was():
    sample = scene()
    prepared, image = prepare(sample)
    assert (image == sample["image"]).all()
    assert prepared["boxes_xyxy"].tolist() == BOXES.tolist()
    assert (prepared["caption"], prepared["label"], prepared["count_class"]) == ("three things", 4, "thing")
    assert (prepared["size_hw"], prepared["scale"]) == (SIZE_HW, (1.0, 1.0))
    check(prepared, image, 0)


@pytest.mark.parametrize("flip", [v2.RandomHorizontalFlip(1.0), v2.RandomVerticalFlip(1.0)])
def test_a_flip_is_exact(flip):
    prepared, image = prepare(scene(), flip)
    dims = (1,) if isinstance(flip, v2.RandomHorizontalFlip) else (0,)
    assert (image == np.flip(scene()["image"], dims)).all()
    check(prepared, image, 0)


def test_a_flip_and_its_repetition_are_nothing():
    prepared, image = prepare(scene(), v2.RandomHorizontalFlip(1.0), v2.RandomHorizontalFlip(1.0))
    assert (image == scene()["image"]).all()
    assert prepared["points_xy"].tolist() == scene()["points_xy"].tolist()


@pytest.mark.parametrize(("max_tokens", "patch_size"), [(2000, 2), (300, 4), (40, 16)])
def test_resizing_into_a_budget_moves_everything_along(max_tokens, patch_size):
    for flips in ([], [v2.RandomHorizontalFlip(1.0)]):
        prepared, image = prepare(scene(), *flips, max_tokens=max_tokens, patch_size=patch_size)
        assert image.shape[:2] == prepared["size_hw"] == Preprocessing(patch_size).fit_hw(*SIZE_HW, max_tokens)
        assert prepared["scale"] == pytest.approx((image.shape[0] / SIZE_HW[0], image.shape[1] / SIZE_HW[1]))
        check(prepared, image, 1)  # a pixel: edges fall between pixels


def test_a_canvas_is_filled_without_squashing():
    prepared, image = prepare(scene(), patch_size=10, canvas_hw=(200, 200))
    assert image.shape[:2] == (140, 200)
    check(prepared, image, 1.5)


def test_random_crops_leave_targets_on_what_they_belong_to():
    crop = v2.RandomResizedCrop((64, 96), scale=(0.2, 1.0), antialias=True)
    numbers = set()
    for seed in range(60):
        prepared, image = prepare(scene(), crop, v2.RandomHorizontalFlip(0.5), seed=seed)
        whole = prepared["boxes_xyxy"][:, 2:] - prepared["boxes_xyxy"][:, :2] >= 4
        for name in ("boxes_xyxy", "classes", "crowd", "masks"):  # slivers are lost among blended edges
            prepared[name] = prepared[name][whole.all(1)]
        check(prepared, image, 2)
        numbers.add(len(prepared["boxes_xyxy"]))
    assert numbers >= {1, 2, 3}


@pytest.mark.parametrize("options", [{"interpolation": v2.InterpolationMode.NEAREST}, {"antialias": False}])
def test_another_interpolation_of_a_random_crop_is_torchvisions(options):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    crop = v2.RandomResizedCrop((64, 96), **options)
    found = Transform(100, [crop])({"image": pixels, "key": "k"}, Preprocessing(32), 5)["patches"][0]
    torch.manual_seed(5)
    expected = crop(torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(found, patches.patchify(expected, 32)[0])


class Crop(v2.Transform):
    """One fixed crop."""

    def __init__(self, top, left, height, width):
        super().__init__()
        self.where = (top, left, height, width)

    def transform(self, value, params):
        return v2.functional.crop(value, *self.where)


def test_a_crop_removes_objects_points_and_people_and_numbers_them_anew():
    prepared, image = prepare(scene(), Crop(0, 56, 100, 84))
    assert prepared["classes"].tolist() == [1, 2]
    assert prepared["boxes_xyxy"].tolist() == [[44, 5, 74, 95], [4, 70, 34, 90]]
    assert prepared["dp_person"].tolist() == [0, 0, 1, 1]
    assert prepared["dp_part"].tolist() == [2, 2, 3, 3]
    assert len(prepared["dp_boxes_xyxy"]) == len(prepared["dp_masks"]) == len(prepared["points_xy"]) == 2
    check(prepared, image, 0)


def test_a_crop_between_all_things_leaves_empty_lists():
    prepared, _ = prepare(scene(), Crop(0, 0, 100, 8))
    assert prepared["boxes_xyxy"].shape == (0, 4)
    assert prepared["masks"].shape == (0, 100, 8)
    assert prepared["points_xy"].shape == prepared["dp_points_xy"].shape == (0, 2)
    assert prepared["dp_masks"].shape == (0, 100, 8)


def test_a_box_whose_point_is_cut_off_stays_and_is_clipped():
    prepared, image = prepare(scene(), Crop(0, 0, 100, 24))
    assert prepared["boxes_xyxy"].tolist() == [[10, 20, 24, 60]]
    assert prepared["points_xy"].shape == (0, 2)  # its middle is at 30
    check(prepared, image, 0)


def test_masks_are_resized_after_an_augmentation_too():
    # Indexing a tv_tensor gives a plain tensor, which v2 leaves as it is.
    prepared, image = prepare(scene(), Crop(0, 0, 100, 140), max_tokens=300, patch_size=4)
    assert prepared["masks"].shape[1:] == prepared["dp_masks"].shape[1:] == image.shape[:2] != SIZE_HW


@pytest.mark.parametrize("x", [0.0, np.nextafter(np.float32(140), np.float32(0))])
def test_points_on_the_edge_survive_mirroring_and_resizing(x):
    sample = scene() | {"points_xy": np.array([[x, 0.0]], np.float32)}
    for options in ({}, {"max_tokens": 299, "patch_size": 4}, {"max_tokens": 37, "patch_size": 8}):
        prepared, image = prepare(sample, v2.RandomHorizontalFlip(1.0), **options)
        ((found, y),) = prepared["points_xy"].tolist()
        assert 0 <= found < image.shape[1]
        assert abs(found - (image.shape[1] if x == 0 else 0)) < 1e-2
        assert y == 0


def test_the_augmentation_is_a_function_of_the_seed_alone():
    jitter = v2.RandomResizedCrop((64, 96), scale=(0.2, 1.0), antialias=True)
    torch.manual_seed(1)
    first, _ = prepare(scene(), jitter, seed=9)
    state = torch.get_rng_state()
    again, _ = prepare(scene(), jitter, seed=9)
    other, _ = prepare(scene(), jitter, seed=10)
    assert torch.equal(torch.get_rng_state(), state)  # and the loop's own random numbers are left alone
    assert torch.equal(first["patches"][0], again["patches"][0])
    assert not torch.equal(first["patches"][0], other["patches"][0])


def test_validation_is_not_augmented():
    prepared = Transform(100_000, [v2.RandomHorizontalFlip(1.0)])(scene(), Preprocessing(2), None)
    assert prepared["boxes_xyxy"].tolist() == BOXES.tolist()


def test_the_sample_itself_is_not_changed():
    sample = scene()
    prepare(sample, v2.RandomHorizontalFlip(1.0), max_tokens=300, patch_size=4)
    assert all(np.array_equal(sample[name], value) for name, value in scene().items())


def test_flips_are_known():
    assert Transform(augment=[v2.ColorJitter(0.1), v2.RandomHorizontalFlip()]).flips
    assert not Transform(augment=[v2.ColorJitter(0.1)]).flips
    assert Transform(augment=[v2.RandomApply([v2.Compose([v2.RandomHorizontalFlip()])])]).flips


@pytest.mark.parametrize("step", [v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes(), v2.RandomApply([v2.RandomIoUCrop()])])
def test_a_transform_that_would_lose_points_is_refused(step):
    with pytest.raises(ValueError, match=r"augment: (RandomIoUCrop|SanitizeBoundingBoxes) loses points"):
        Transform(augment=[step])


def test_an_image_must_stay_of_bytes():
    with pytest.raises(ValueError, match=r"augment: gives an image of torch\.float32; expected torch\.uint8"):
        Transform(augment=[v2.ToDtype(torch.float32, scale=True)])(scene(), Preprocessing(8), 0)


def test_a_batch_packs_the_targets_of_every_image():
    empty = scene(BOXES[:0]) | {"key": "e"}
    only_image = {"image": scene()["image"], "key": "i", "label": 2}
    prepared = [prepare(sample, v2.RandomHorizontalFlip(1.0))[0] for sample in (scene(), empty, only_image)]
    batch = collate(prepared)
    assert batch["keys"] == ["s", "e", "i"]
    assert batch["targets"]["label"].tolist() == [4, 4, 2]
    assert batch["targets"]["caption"] == ["three things", "three things", None]
    boxes = batch["targets"]["boxes_xyxy"]
    assert (boxes.counts, boxes.known) == ([3, 0, 0], [True, True, False])
    assert boxes.image_R.tolist() == [0, 0, 0]
    assert type(batch["targets"]["masks"].values) is torch.Tensor
    assert "key" in prepared[0]  # collating leaves its input as it is


def jpeg(image, quality=95, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0, **options)
    return buffer.getvalue()


def encoded_scene(orientation=1, kind="PNG"):
    """The scene as a file whose EXIF asks for a turn; its annotations are in the frame of the file as stored."""
    sample, exif = scene(), Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(sample["image"]).save(buffer, kind, exif=exif, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue()))))
    return sample | {"image": EncodedImage(buffer.getvalue(), "s")}, upright


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_image_and_annotations_together(orientation, kind):
    sample, upright = encoded_scene(orientation, kind)
    prepared, image = prepare(sample)
    assert image.shape == upright.shape
    assert abs(image.astype(int) - upright).max() <= 2 * (kind == "JPEG")
    assert len(prepared["boxes_xyxy"]) == 3
    check(prepared, image, slack=0.01)
    smaller, image = prepare(sample, max_tokens=600)  # resized as well
    check(smaller, image, slack=1.5)


@pytest.mark.parametrize("orientation", [3, 6])
def test_annotations_drawn_on_the_turned_photo_stay_where_they_are(orientation):
    sample, _ = encoded_scene(orientation)
    turned, image = prepare(sample)
    again = sample | {name: turned[name].numpy() for name in ("boxes_xyxy", "dp_boxes_xyxy", "masks", "dp_masks")}
    again |= {name: turned[name].numpy() for name in ("points_xy", "dp_points_xy")}
    prepared, image = prepare(again | {"annotated_upright": True})
    check(prepared, image, slack=0.01)


@pytest.mark.parametrize("size", [(480, 640), (1201, 799), (97, 1000)])
@pytest.mark.parametrize("max_tokens", [16, 49, 196])
def test_a_jpeg_decoded_small_is_the_one_decoded_whole(picture, size, max_tokens):
    data = jpeg(picture(*size))
    whole = {"image": EncodedImage(data, "k").decode(), "key": "k"}
    late = {"image": EncodedImage(data, "k"), "key": "k"}
    assert late["image"].decode((60, 80)).shape[0] < size[0] or min(size) < 120
    (expected, image), (found, quick) = (
        prepare(sample, max_tokens=max_tokens, patch_size=16) for sample in (whole, late)
    )
    assert found["size_hw"] == expected["size_hw"]
    assert found["scale"] == expected["scale"]
    difference = abs(quick.astype(int) - image)
    whole_blocks = all(side % 8 == 0 for side in size)
    assert difference.max() <= (3 if whole_blocks else 10)  # grey levels of a smooth picture; the filters differ
    assert difference.mean() < (0.6 if whole_blocks else 1.2)  # up to half a pixel of the result apart


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_crop_drawn_before_decoding_is_the_crop_drawn_after(orientation):
    sample, upright = encoded_scene(orientation)
    sample["image"].decode = _counting(sample["image"].decode, sizes := [])
    for seed in range(5):
        crop = v2.RandomResizedCrop(40, scale=(0.2, 0.6))
        prepared, image = prepare(sample, crop, v2.RandomHorizontalFlip(), seed=seed)
        torch.manual_seed(seed)
        oracle = v2.Compose([crop, v2.RandomHorizontalFlip()])(torch.from_numpy(upright.copy()).permute(2, 0, 1))
        assert (image == oracle.permute(1, 2, 0).numpy()).all()
        check(prepared, image, slack=1.5)
    assert sizes


def _counting(function, calls):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


def test_a_crop_of_a_large_jpeg_is_decoded_small(picture):
    image = EncodedImage(jpeg(picture(1200, 1600)), "k")
    image.decode = _counting(image.decode, calls := [])
    crop = v2.RandomResizedCrop(64, scale=(0.5, 0.9))
    for seed in range(5):
        _, small = prepare({"image": image, "key": "k"}, crop, seed=seed, patch_size=16)
        torch.manual_seed(seed)
        oracle = crop(torch.from_numpy(image.decode()).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        assert abs(small.astype(int) - oracle).max() <= 3
        asked = calls[-2][0]
        assert 64 <= min(asked) <= max(asked) < 300  # far below 1200 x 1600


def test_what_is_not_declared_is_an_error_that_names_it():
    sample = scene() | {"dept": np.zeros(SIZE_HW, np.float32)}
    with pytest.raises(ValueError, match=r"sample 's' has a field 'dept', which .* does not declare"):
        prepare(sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"masks": np.zeros((3, 10, 10), np.uint8)},
            r"masks of .* shape \(3, 10, 10\), expected \(3, 100",
        ),
        ({"classes": np.arange(2)}, "classes of sample 's' has 2 rows, but boxes_xyxy has 3"),
        ({"boxes_xyxy": None}, "classes of sample 's' has 3 rows, but boxes_xyxy is missing"),
        ({"points_xy": [[1, 2]]}, r"points_xy of sample 's': found \[\[1, 2\]\]; expected ndarray"),
        ({"caption": 5}, "caption of sample 's': found 5; expected str"),
        ({"label": 2.5}, "label of sample 's': found 2.5; expected Integral"),
        ({"image": np.zeros((8, 8, 4), np.uint8)}, r"image of sample 's': found uint8 \(8, 8, 4\); expected an Enc"),
        ({"image": np.zeros((8, 8), np.uint8)}, r"image of sample 's': found uint8 \(8, 8\); expected"),
        ({"image": np.zeros((8, 8, 3))}, r"image of sample 's': found float64 \(8, 8, 3\); expected"),
        ({"image": torch.zeros(3, 8, 8)}, "image of sample 's': found torch.float32 .* expected"),
        ({"image": "x.jpg"}, "image of sample 's': found 'x.jpg'; expected"),
    ],
)
def test_a_field_that_does_not_fit_its_kind_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        prepare(scene() | change)


@pytest.fixture(params=[False, True], ids=["nearest", "bilinear"])
def depth(request, monkeypatch):
    """A field that is declared for a test: the number of every pixel is its column."""
    monkeypatch.setitem(FIELDS, "depth", Field("map", bilinear=request.param))
    return np.tile(np.arange(SIZE_HW[1], dtype=np.float32), (SIZE_HW[0], 1))


def check_depth(prepared, image, first, last, slack):
    """Columns from `first` to `last` (excluded) of the original, spread over the image."""
    height, width = image.shape[:2]
    found = prepared["depth"]
    assert (found.shape, found.dtype) == ((1, height, width), torch.float32)
    step = (last - first) / width
    expected = first + (torch.arange(width) + 0.5) * step - 0.5
    assert (found - expected).abs()[..., 2:-2].max() <= slack + 1e-3


def test_a_map_moves_with_the_image(depth):
    sample = scene() | {"depth": depth}
    check_depth(*prepare(sample), 0, 140, 0)
    check_depth(*prepare(sample, v2.RandomHorizontalFlip(1.0)), 140, 0, 0)
    check_depth(*prepare(sample, Crop(10, 30, 60, 80)), 30, 110, 0)
    smooth = FIELDS["depth"].bilinear
    check_depth(*prepare(sample, max_tokens=300, patch_size=4), 0, 140, 0.1 if smooth else 0.5)
    for seed in range(5):
        crop = v2.RandomResizedCrop((64, 96), scale=(0.2, 0.6))
        prepared, image = prepare(sample, crop, seed=seed)
        torch.manual_seed(seed)
        at = crop.make_params([torch.empty(3, *SIZE_HW)])
        check_depth(prepared, image, at["left"], at["left"] + at["width"], 0.1 if smooth else 0.5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_map_is_turned_upright_with_the_image(depth, orientation):
    """The photo's red channel is the map."""
    pixels = np.zeros((*SIZE_HW, 3), np.uint8)
    pixels[..., 0] = depth
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    prepared, image = prepare({"image": EncodedImage(buffer.getvalue(), "s"), "key": "s", "depth": depth})
    assert (prepared["depth"][0].numpy() == image[..., 0]).all()


def test_a_batch_packs_maps_and_masks_of_several_sizes(depth):
    whole = prepare(scene() | {"depth": depth})[0]
    part = prepare(scene() | {"depth": depth, "key": "p"}, Crop(0, 56, 60, 84))[0]
    without = prepare({"image": scene()["image"], "key": "w"})[0]
    batch = collate([whole, without, part])
    found = batch["targets"]["depth"]
    assert (found.counts, found.known, found.image_R.tolist()) == ([1, 0, 1], [True, False, True], [0, 2])
    assert found.values.shape == (2, *SIZE_HW)
    for i, prepared in enumerate([whole, without, part]):
        targets = targets_of(batch, i)
        expected = {name: value for name, value in prepared.items() if name in FIELDS and name != "key"}
        for name, value in expected.items():
            value = value[0] if name == "depth" else value
            assert torch.equal(targets[name], value) if isinstance(value, torch.Tensor) else targets[name] == value
        left = {name for name in targets.keys() - expected.keys() if FIELDS[name].kind != "scalar"}
        assert left == set()
    person = batch["targets"]["dp_person"].values.tolist()
    assert person == [0, 0, 1, 1, 2, 2, 3, 3]  # numbered through the batch, as the boxes of people are


def test_rows_of_a_list_stay_aligned_where_a_field_of_it_is_missing():
    bare = {name: value for name, value in scene().items() if name not in ("crowd", "masks")} | {"key": "b"}
    targets = collate([prepare(bare)[0], prepare(scene())[0]])["targets"]
    assert targets["crowd"].values.tolist() == [False] * 3 + [False, True, False]
    assert (targets["crowd"].known, targets["crowd"].counts) == ([False, True], [3, 3])
    assert targets["boxes_xyxy"].index_BM.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(targets["masks"].values) == 6
