"""COCO files: the boxes and masks that pycocotools sees, DensePose to the pixel, and an error for every bad entry."""

import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from heads.contrastive import Contrastive
from indiclip.datasets.coco import CocoDetection
from indiclip.datasets.split import Split
from indiclip.images import UnreadableSample

PERSON_GRID = np.zeros((256, 256), np.uint8)
PERSON_GRID[64:192, :] = 1  # the middle half of the box's height


def code(mask):
    packed = rle.encode(np.asfortranarray(mask))
    return {"size": packed["size"], "counts": packed["counts"].decode()}


CONTENT = {
    "images": [
        {"id": 30, "file_name": "b.png", "width": 40, "height": 20, "captions": ["a kite ", "two kites"]},
        {"id": 7, "file_name": "a.png", "width": 30, "height": 24},
        {"id": 50, "file_name": "empty.png", "width": 8, "height": 8},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 3, 10, 12],
         "segmentation": [[2, 3, 12, 3, 12, 15, 2, 15]]},
        {"id": 2, "image_id": 30, "category_id": 1, "bbox": [0, 0, 40, 20], "iscrowd": 1,
         "segmentation": {"size": [20, 40], "counts": [0, 20, 780]}},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [20.5, 4, 10, 20.25],
         "segmentation": code(np.eye(24, 30, dtype=np.uint8))},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
}  # fmt: skip
DENSEPOSE = {
    "dp_masks": [code(PERSON_GRID), []] + [[]] * 12,
    "dp_x": [0, 127.5, 255], "dp_y": [0, 51, 255], "dp_I": [1, 24, 3], "dp_U": [0, 0.5, 1], "dp_V": [1, 0.25, 0],
}  # fmt: skip


@pytest.fixture
def build(tmp_path):
    """Writes the images and the file (after `change`), and makes the dataset of them."""

    def make(change=None, **options):
        content = copy.deepcopy(CONTENT)
        for image in content["images"]:
            Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
        if change:
            change(content)
        (tmp_path / "instances.json").write_text(json.dumps(content))
        return CocoDetection(str(tmp_path), str(tmp_path / "instances.json"), **options)

    return make


def test_categories_with_gaps_become_classes_in_the_order_of_their_ids(build):
    dataset = build()
    assert dataset.classes == ["person", "car", "toothbrush"]
    assert dataset.category_ids == Split(dataset, "train", 0.01).category_ids == [1, 3, 90]
    assert [dataset[i]["file_name"] for i in range(3)] == ["b.png", "a.png", "empty.png"]
    assert [dataset.key(i) for i in range(3)] == ["30", "7", "50"]
    assert dataset[1]["classes"].tolist() == [2, 0]
    assert dataset[0]["crowd"].tolist() == [True]


def test_xywh_becomes_xyxy_and_an_overshoot_of_a_pixel_is_clipped(build):
    boxes = build()[1]["boxes_xyxy"]
    assert boxes.dtype == np.float32
    assert boxes.tolist() == [[2, 3, 12, 15], [20.5, 4, 30, 24]]  # the second reached to (30.5, 24.25) of 30x24


def test_images_without_boxes_are_kept_or_left_out(build):
    sample = build(masks=True)[2]
    assert sample["boxes_xyxy"].shape == (0, 4)
    assert sample["masks"].shape == (0, 8, 8)
    assert [build(keep_empty=False).key(i) for i in range(2)] == ["30", "7"]
    assert len(build(keep_empty=False)) == 2


def test_all_captions_are_given_and_can_be_asked_for(build):
    dataset = build()
    assert dataset[0]["captions"] == {"": ["a kite", "two kites"]}
    assert dataset.captions(0) == {"": ["a kite", "two kites"]}
    assert "captions" not in dataset[1]
    assert dataset.captions(1) == {}


def test_only_captioned_images_make_pairs(build):
    """The contrastive head refuses images without a caption before training, not in the middle of it."""
    for dataset in (build(), Split(build(), "train", 0.01)):
        with pytest.raises(ValueError, match=r"contrastive\.task: data\.train\[0\]: .* without a caption; `captioned"):
            Contrastive().check({"data.train[0]": dataset}, {})
    captioned = build(captioned=True)
    assert [captioned.key(i) for i in range(len(captioned))] == ["30"]
    Contrastive().check({"data.train[0]": captioned}, {})


def test_a_captions_file_of_coco_goes_instead(build, tmp_path):
    found = [
        {"id": i, "image_id": image, "caption": text}
        for i, (image, text) in enumerate([(7, "x"), (999, "y"), (7, "z")])
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": found}))
    dataset = build(captions=str(tmp_path / "captions.json"))
    assert [dataset.captions(i) for i in range(3)] == [{}, {"": ["x", "z"]}, {}]


def test_thin_boxes_are_dropped_and_counted_with_their_masks(build, tmp_path):
    def thin(content):
        content["annotations"][0]["bbox"] = [2, 3, 0.5, 12]
        content["annotations"][1]["bbox"] = [39.5, 3, 1.5, 12]  # half a pixel is inside

    dataset = build(thin, masks=True)
    dataset.inventory.verify()
    assert dataset.inventory.summary()["boxes"]["left_out"] == {
        "thinner than a pixel": {"count": 2, "example": f"{tmp_path / 'instances.json'}: annotation 1"}
    }
    assert dataset[1]["classes"].tolist() == [0]
    assert (dataset[1]["masks"][0] == np.eye(24, 30)).all()


def test_polygons_and_both_run_length_codes(build):
    dataset = build(masks=True)
    polygon = dataset[1]["masks"][0]
    assert polygon[3:15, 2:12].all()
    assert polygon.sum() == 120
    assert dataset[0]["masks"].dtype == np.uint8
    assert dataset[0]["masks"][0].sum(0).tolist() == [20] + [0] * 39  # column by column
    assert dataset[0]["masks"].shape == (1, 20, 40)


def test_densepose_fields_are_flattened_over_the_people(build):
    def people(content):
        content["annotations"][0] |= DENSEPOSE
        content["annotations"][2] |= DENSEPOSE | {"bbox": [20, 4, 10, 20]}

    dataset = build(people, densepose=True)
    sample = dataset[1]
    assert sample["dp_boxes_xyxy"].tolist() == [[2, 3, 12, 15], [20, 4, 30, 24]]
    assert sample["dp_person"].tolist() == [0, 0, 0, 1, 1, 1]
    assert sample["dp_part"].tolist() == [1, 24, 3] * 2
    assert sample["dp_uv"].tolist() == [[0, 1], [0.5, 0.25], [1, 0]] * 2
    # (0, 0) is the box's corner, 127.5 and 51 of 255 a half and a fifth of the way, 255 the far corner.
    assert sample["dp_points_xy"] == pytest.approx(
        np.array([[2, 3], [7, 5.4], [12, 15], [20, 4], [25, 8], [30, 24]]), abs=1e-4
    )
    assert (sample["dp_points_xy"][5] < [30, 24]).all()  # inside, where the image ends
    body = np.zeros((2, 24, 30), np.uint8)
    body[0, 6:12, 2:12], body[1, 9:19, 20:30] = 1, 1
    assert (sample["dp_masks"] == body).all()
    assert dataset[0]["dp_points_xy"].shape == (0, 2)
    assert dataset[0]["dp_masks"].shape == (0, 20, 40)
    assert [build(people, densepose=True, keep_empty=False).key(0)] == ["7"]


def test_densepose_points_do_not_move_where_the_box_is_clipped(build):
    def overshooting(content):
        content["annotations"][0] |= DENSEPOSE | {"bbox": [-1, 0, 20, 20]}

    sample = build(overshooting, densepose=True)[1]
    assert sample["dp_boxes_xyxy"].tolist() == [[0, 0, 19, 20]]
    assert sample["dp_points_xy"][1].tolist() == [9, 4]  # half of 20 from -1
    assert sample["dp_points_xy"][0].tolist() == [0, 0]


def test_an_image_of_another_size_than_said_is_unreadable(build, tmp_path):
    dataset = build()
    Image.new("RGB", (24, 30)).save(tmp_path / "a.png")  # as if rotated by its EXIF entry
    with pytest.raises(UnreadableSample, match=r"7: a\.png has 24x30 pixels, the annotations say 30x24"):
        dataset[1]


def test_an_image_whose_masks_unpack_to_too_much_is_unreadable(build, monkeypatch):
    dataset = build(masks=True)
    monkeypatch.setattr("indiclip.datasets.masks._MOST_BYTES", 24 * 30 - 1)
    with pytest.raises(UnreadableSample, match=r"7: \d masks of 30x24 pixels; expected 719 pixels at most") as caught:
        dataset[1]
    assert caught.value.file.endswith("instances.json")


def test_changing_a_sample_does_not_change_the_dataset(build):
    dataset = build()
    dataset[1]["boxes_xyxy"][:] = -1
    dataset[1]["classes"][:] = -1
    assert dataset[1]["boxes_xyxy"].min() == 2
    assert dataset[1]["classes"].min() == 0


def annotation(**changes):
    return lambda content: content["annotations"][0].update(changes)


def image(**changes):
    return lambda content: content["images"][0].update(changes)


def person(**changes):
    return annotation(**DENSEPOSE | changes)


def run_lengths(size, count):
    return annotation(segmentation={"size": size, "counts": [count]})


def misnamed(name, found):
    return lambda content: content["annotations"][0].update({found: content["annotations"][0].pop(name)})


def without(part, name):
    return lambda content: content[part][0].pop(name)


NAN = float("nan")
BAD = {
    r"instances\.json: no list 'categories'; found \['annotations', 'images'\]": lambda c: c.pop("categories"),
    r"annotation 1 has no 'bbox'": without("annotations", "bbox"),
    r"annotation 1 has no 'category_id'; nearest is 'category'": misnamed("category_id", "category"),
    r"annotation number 1 has no 'id'": without("annotations", "id"),
    r"image 30 has no 'width'": without("images", "width"),
    r"category 90 has no 'name'": without("categories", "name"),
    r"annotation 1: category_id is 2; expected the id of one of the category entries": annotation(category_id=2),
    r"annotation 1: image_id is 8; expected the id of one of the image entries": annotation(image_id=8),
    r"annotation '3' is duplicated, 2 times; expected each": annotation(id=3),
    r"image '7' is duplicated": image(id=7),
    r"category 'car' is duplicated": lambda c: c["categories"][0].update(name="car"),
    r"image 30: \(height, width\) is \(20, 40\.5\); expected whole pixels": image(width=40.5),
    r"1 of 3 images are not in .*, first 'c\.png'": image(file_name="c.png"),
    r"the image '\.\./b\.png' lies outside the folder": image(file_name="../b.png"),
    r"image 30: a caption is ' '; expected text": image(captions=["x", " "]),
    r"annotation 1: bbox is \[1, 2, 3\]; expected \[x, y, width, height\]": annotation(bbox=[1, 2, 3]),
    r"annotation 1: bbox is \[1, 2, 1000.*; expected": annotation(bbox=[1, 2, 10**400, 3]),
    r"image 30: \(height, width\) is \(20, 1000.*; expected whole pixels": image(width=10**400),
    r"annotation 1: the box .* = \[2\.0, 3\.0, -1\.0, 5\.0\] has a negative size": annotation(bbox=[2, 3, -1, 5]),
    r"annotation 1: the box .* lies outside its image \(30x24 pixels\)": annotation(bbox=[25, 3, 7.5, 5]),
    r"annotation 1: the box .* = \[-2\.5, .* lies outside its image": annotation(bbox=[-2.5, 3, 6, 5]),
    r"annotation 1: the box .*nan.* is not finite": annotation(bbox=[2, 3, NAN, 5]),
    r"annotation 1: segmentation of size \[3, 3\]; expected polygons .* of size \[24, 30\]": run_lengths([3, 3], 9),
    r"annotation 1: segmentation: the runs cover 719 pixels; expected 720": run_lengths([24, 30], 719),
    r"annotation 1: segmentation None; expected polygons": annotation(segmentation=None),
    r"annotation 1: a polygon is \[1, 2, 3, 4, 5, 6, 7\]; expected": annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
    # pycocotools would take four numbers for a box
    r"annotation 1: no polygon of \[\[2, 3, 8, 9\]\] has three corners": annotation(segmentation=[[2, 3, 8, 9]]),
    r"annotation 1: dp_I is 25; expected 1 to 24": person(dp_I=[1, 25, 3]),
    r"annotation 1: dp_I is 0; expected 1 to 24": person(dp_I=[0, 2, 3]),
    r"annotation 1: dp_I is 1\.5; expected 1 to 24": person(dp_I=[1.5, 2, 3]),
    r"annotation 1: dp_U is 1\.01; expected 0 to 1": person(dp_U=[0, 1.01, 1]),
    r"annotation 1: dp_V is -0\.5; expected 0 to 1": person(dp_V=[0, -0.5, 1]),
    r"annotation 1: dp_x is nan; expected 0 to 256": person(dp_x=[0, NAN, 1]),
    r"annotation 1: dp_V is None; expected a list": person(dp_V=None),
    r"annotation 1: the dp_ fields have different lengths .*'dp_y': 2": person(dp_y=[0, 1]),
    r"annotation 1: dp_U is \['x'.*; expected numbers": person(dp_U=["x", 0, 1]),
    r"annotation 1: a dp_masks entry of size \[9, 9\]; expected": person(dp_masks=[{"size": [9, 9], "counts": [81]}]),
    r"annotation 1: a dp_masks entry \{'size': \[256, 256\]\}; expected": person(dp_masks=[{"size": [256, 256]}]),
    r"annotation 1: segmentation: counts is \[-5, 725\]; expected": annotation(
        segmentation={"size": [24, 30], "counts": [-5, 725]}
    ),
    r"annotation 1: a polygon reaches from 0 to 1e\+08": annotation(segmentation=[[0, 0, 1e8, 0, 1e8, 9]]),
    r"annotation 1: a polygon is \[0, 0, inf": annotation(segmentation=[[0, 0, float("inf"), 0, 9, 9]]),
    r"image 30: captions is 'kite'; expected a list of texts": image(captions="kite"),
    r"file_name is 5; expected text": image(file_name=5),
    r"annotation number 1: id is \[1\]; expected a whole number or text": annotation(id=[1]),
    r"annotation 1: image_id is \[7\]; expected the id of one of the image": annotation(image_id=[7]),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_entries_are_named_in_one_line(build, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build(BAD[message], masks=True, densepose=True)
    assert "instances.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files(build, tmp_path):
    dataset = build()
    with pytest.raises(
        FileNotFoundError, match=r"instance\.json: no such file or folder; nearest is 'instances\.json'"
    ):
        CocoDetection(str(tmp_path), str(tmp_path / "instance.json"))
    (tmp_path / "instances.json").write_text('{"images": [}')
    with pytest.raises(ValueError, match=r"instances\.json: broken JSON: .*line 1 column 13"):
        CocoDetection(str(tmp_path), str(tmp_path / "instances.json"))
    (tmp_path / "instances.json").write_text("[]")
    with pytest.raises(ValueError, match=r"instances\.json: no list 'images'; found list"):
        CocoDetection(str(tmp_path), str(tmp_path / "instances.json"))
    assert len(pickle.loads(pickle.dumps(dataset))) == 3


def test_real_boxes_and_masks_equal_pycocotools(data_root):
    file = data_root / "coco" / "instances.json"
    dataset, theirs = CocoDetection(str(data_root / "coco" / "images"), str(file), masks=True), COCO(str(file))
    dataset.inventory.verify()
    assert dataset.inventory.used == {"images": 192, "boxes": 1436, "captions": 735}
    boxes = masks = 0
    for i in range(len(dataset)):
        expected = theirs.loadAnns(theirs.getAnnIds(int(dataset.key(i))))
        sample = dataset[i]
        names = [theirs.cats[entry["category_id"]]["name"] for entry in expected]
        assert [dataset.classes[k] for k in sample["classes"]] == names
        assert sample["crowd"].tolist() == [bool(entry["iscrowd"]) for entry in expected]
        if not expected:
            continue
        xywh = np.array([entry["bbox"] for entry in expected])
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
        assert sample["boxes_xyxy"] == pytest.approx(xyxy, abs=1e-3)  # float32 at 640 pixels
        for mask, entry in zip(sample["masks"], expected, strict=True):
            # pycocotools fails on the annotations without a mask; ours is empty there.
            assert (mask == (theirs.annToMask(entry) if entry["segmentation"] else 0)).all()
            masks += bool(entry["segmentation"])
        boxes += len(expected)
    assert (boxes, masks) == (1436, 1351)
