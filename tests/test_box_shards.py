"""Packed COCO files: every field of every image as `CocoDetection` reads it from the JSON."""

import copy
import io
import json

import numpy as np
import pytest
from PIL import Image
from test_coco import CONTENT, DENSEPOSE
from test_shards import write_tar

from indiclip.cli import main
from indiclip.datasets.coco import CocoDetection
from indiclip.images import UnreadableSample
from indiclip.webdataset.box_shards import BoxShards


def pack(annotations, images, folder):
    command = ["shards", "pack", str(annotations), "--images", str(images), "--out", str(folder), "--name", "val"]
    assert main([*command, "--samples", "40", "--workers", "0"]) == 0
    return [str(folder / "val-*.tar")], str(folder / "classes.txt")


def assert_same(shards, dataset):
    places = {shards.key(i).split("/")[1]: i for i in range(len(shards))}
    assert sorted(places) == sorted(map(dataset.key, range(len(dataset))))
    assert shards.classes == dataset.classes
    for i in range(len(dataset)):
        expected, found = dataset[i], shards[places[dataset.key(i)]]
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"image", "key"}:
            mine, theirs = np.asarray(found[name]), np.asarray(expected[name])
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), name
            assert (mine == theirs).all(), (name, dataset.key(i))
        assert found["image"].orientation == expected["image"].orientation
        assert (found["image"].decode((64, 64)) == expected["image"].decode((64, 64))).all()


def test_the_real_coco_photos_come_back_with_every_field(data_root, tmp_path):
    images, annotations = data_root / "coco" / "images", data_root / "coco" / "instances.json"
    shards = BoxShards(*pack(annotations, images, tmp_path), masks=True, densepose=True)
    assert len(shards) == 192
    assert_same(shards, CocoDetection(str(images), str(annotations), masks=True, densepose=True))


@pytest.fixture
def coco(tmp_path):
    """DensePose, crowds, a thin box, an image without boxes, and one annotated as its EXIF orientation shows it.

    The images have keys of their own that mean something in a shard.
    """
    content = copy.deepcopy(CONTENT)
    for entry in content["images"]:
        entry |= {"label": 7, "cls": "x", "text": 5, "caption": "red", "language": "xx", "lang": 1, "license": 3}
    content["annotations"][0].update(DENSEPOSE)
    content["annotations"].append(
        {"id": 4, "image_id": 30, "category_id": 3, "bbox": [3, 3, 0.5, 9], "segmentation": []}
    )
    content["images"].append({"id": 60, "file_name": "turned.jpg", "width": 10, "height": 30})
    content["annotations"].append(
        {"id": 5, "image_id": 60, "category_id": 3, "bbox": [1, 20, 8, 9], "segmentation": []}
    )
    for image in content["images"]:
        size = (image["width"], image["height"])
        if image["id"] == 60:
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.new("RGB", size[::-1]).save(tmp_path / image["file_name"], exif=exif)
        else:
            Image.new("RGB", size).save(tmp_path / image["file_name"])
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def test_densepose_crowds_and_turned_photos_come_back(coco):
    urls, classes = pack(coco / "instances.json", coco, coco / "shards")
    shards = BoxShards(urls, classes, masks=True, densepose=True)
    assert_same(shards, CocoDetection(str(coco), str(coco / "instances.json"), masks=True, densepose=True))
    assert json.loads(shards.parts(0)["json"])["coco"]["license"] == 3
    turned = next(sample for sample in shards if sample["key"] == "val-000000/60")
    assert turned["annotated_upright"]
    assert turned["boxes_xyxy"].tolist() == [[1, 20, 9, 29]]


def test_captions_of_a_file_of_their_own(coco):
    (coco / "captions.json").write_text(json.dumps({"annotations": [
        {"image_id": 7, "caption": " two kites "}, {"image_id": 99, "caption": "x"}, {"image_id": 7, "caption": "y"},
    ]}))  # fmt: skip
    words = ["--images", str(coco), "--captions", str(coco / "captions.json"), "--out", str(coco / "s"), "--name", "a"]
    assert main(["shards", "pack", str(coco / "instances.json"), *words, "--workers", "0"]) == 0
    shards = BoxShards(str(coco / "s" / "*.tar"), str(coco / "s" / "classes.txt"))
    assert {s["key"]: s["captions"] for s in shards if "captions" in s} == {"a-000000/7": {"": ["two kites", "y"]}}


HUGE = 10**400  # JSON can hold it, no number of NumPy's can
BAD = {
    "no annotations": ({"annotations": None}, r"annotations is None; expected a list"),
    "size": ({"height": 9}, r"has 40x20 pixels, the annotations say 40x9"),
    "class": ({"annotations": [{"bbox": [0, 0, 5, 5], "class": 3}]}, r"annotation 0: class is 3; expected 0 to 2"),
    "no class": ({"annotations": [{"id": 7, "bbox": [0, 0, 5, 5]}]}, r"annotation 7 has no 'class'"),
    "box": ({"annotations": [{"bbox": [0, 0, 90, 5], "class": 0}]}, r"annotation 0: the box .* lies outside its image"),
    "mask": (
        {"annotations": [{"bbox": [0, 0, 5, 5], "class": 0, "segmentation": {"size": [20, 40], "counts": [1]}}]},
        r"annotation 0: segmentation: the runs cover 1 pixels; expected 800",
    ),
    "fraction": ({"height": 20.0}, r"\(height, width\) is \(20\.0, 40\); expected whole pixels"),
    "text": ({"width": "40"}, r"\(height, width\) is \(20, '40'\); expected whole pixels"),
    "huge box": ({"annotations": [{"bbox": [0, 0, HUGE, 5], "class": 0}]}, r"annotation 0: bbox is \[0, 0, 1000"),
    "huge polygon": (
        {"annotations": [{"bbox": [0, 0, 5, 5], "class": 0, "segmentation": [[0, 0, HUGE, 0, 5, 5]]}]},
        r"annotation 0: a polygon is \[0, 0, 1000",
    ),
    "huge run": (
        {"annotations": [{"bbox": [0, 0, 5, 5], "class": 0, "segmentation": {"size": [20, 40], "counts": [HUGE]}}]},
        r"annotation 0: segmentation: the runs cover 1000",
    ),
    "huge point": (
        {"annotations": [{"bbox": [0, 0, 5, 5], "class": 0, "segmentation": [], **DENSEPOSE, "dp_x": [0, HUGE, 0]}]},
        r"annotation 0: dp_x is \[0, 1000.*; expected numbers",
    ),
    "captions": ({"captions": ["x", None]}, r"captions of the \.json is None; expected text"),
}


def test_captions_by_language_beside_boxes(tmp_path, capsys):
    picture = io.BytesIO()
    Image.new("RGB", (40, 20)).save(picture, "PNG")
    entry = {"height": 20, "width": 40, "annotations": [], "captions": {"en": "a kite", "hi": "पतंग"}}
    path = write_tar(tmp_path / "a.tar", {"0.png": picture.getvalue(), "0.json": json.dumps(entry)})
    assert BoxShards(path, ["a"])[0]["captions"] == {"en": ["a kite"], "hi": ["पतंग"]}
    assert main(["shards", "check", path, "--workers", "0"]) == 0
    entry["captions"]["hi"] = None
    path = write_tar(tmp_path / "b.tar", {"0.png": picture.getvalue(), "0.json": json.dumps(entry)})
    with pytest.raises(UnreadableSample, match=r"captions of the \.json: hi is None; expected text"):
        BoxShards(path, ["a"])[0]
    assert main(["shards", "check", path, "--workers", "0"]) == 1


@pytest.mark.parametrize("what", BAD)
def test_malformed_annotations_make_the_sample_unreadable(what, tmp_path, capsys):
    changes, message = BAD[what]
    picture = io.BytesIO()
    Image.new("RGB", (40, 20)).save(picture, "PNG")
    entry = {"height": 20, "width": 40, "annotations": [], **changes}
    path = write_tar(tmp_path / "a.tar", {"0.png": picture.getvalue(), "0.json": json.dumps(entry)})
    with pytest.raises(UnreadableSample, match=message):
        BoxShards(path, ["a", "b", "c"], masks=True, densepose=True)[0]
    if what != "class":  # the shards alone do not say how many classes there are
        assert main(["shards", "check", path, "--workers", "0"]) == 1
        kind = "caption" if what == "captions" else "boxes"
        assert f"1  unreadable {kind}" in capsys.readouterr().out
