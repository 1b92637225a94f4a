"""Small, medium and large go by the annotation's `area`, as in COCO's own evaluation: from the file to the number."""

import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from helpers import noise
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.transforms import v2

from heads.detection import Detection
from heads.torchvision_detector import TorchvisionDetector
from indiclip.datasets.coco import CocoDetection
from indiclip.images import EncodedImage
from indiclip.loading.collate import collate
from indiclip.loading.transforms import Transform
from indiclip.preprocessing import Preprocessing
from indiclip.tasks.detection_metric import DetectionMetric
from indiclip.types import Batch, class_names

NAMES = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
NAMES += ["ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"]


def boxed(box, **rest):
    return {"bbox": box, "category_id": 7, "image_id": 1, "iscrowd": 0} | rest


# The box of a thin ring says medium, its area small; that of a crowd is half of its box.
ANNOTATIONS = [
    boxed([10, 10, 60, 60], id=1, area=600.5),
    boxed([100, 20, 40, 40], id=2, area=1600),
    boxed([150, 60, 32, 32], id=3, area=1024),  # both small and medium
    boxed([20, 90, 120, 100], id=4, area=5000, category_id=3),  # by its box it is large
    boxed([5, 5, 110, 100], id=5, image_id=2, area=11000),
    boxed([120, 5, 70, 60], id=6, image_id=2),  # nothing is said: the box's
    boxed([0, 100, 200, 100], id=7, image_id=2, area=9000, iscrowd=1),
    boxed([120, 70, 30, 25], id=8, image_id=2, area=700, category_id=3),
]


def hand_made(folder):
    images = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 200 + 8 * i} for i in (1, 2)]
    for entry in images:
        Image.fromarray(noise(entry["height"], entry["width"])).save(folder / entry["file_name"])
    categories = [{"id": 7, "name": "ring"}, {"id": 3, "name": "blob"}]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": ANNOTATIONS, "categories": categories}))
    return folder, file


def batch_of(dataset, max_tokens) -> Batch:
    """All of it, scaled down to so many patches of 8 pixels, as a validation has it."""
    transform = Transform(max_tokens)
    return collate([transform(dataset[i], Preprocessing(8), None) for i in range(len(dataset))])


def detections(batch, seed=0):
    """Each true box a little off, some missing and some of another class, and two more per image."""
    rng, found = np.random.default_rng(seed), []
    boxes, classes = batch["targets"]["boxes_xyxy"], batch["targets"]["classes"]
    for i in range(len(batch["keys"])):
        own = boxes.values[boxes.rows_of(i)].numpy()
        sides = np.tile(own[:, 2:] - own[:, :2], 2)
        moved = own + rng.normal(0, 0.06, own.shape) * sides
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        labels = classes.values[boxes.rows_of(i)].numpy()
        labels = np.where(rng.random(len(labels)) < 0.9, labels, labels[::-1])
        kept = rng.random(len(own)) < 0.9
        corner = rng.random((2, 2)) * 40
        wrong = np.concatenate([corner, corner + 5 + rng.random((2, 2)) * 60], 1)
        found.append(
            {
                "boxes_xyxy": torch.from_numpy(np.concatenate([moved[kept], wrong])).float(),
                "labels": torch.from_numpy(np.concatenate([labels[kept], rng.integers(0, 2, 2)])),
                "scores": torch.from_numpy(rng.permutation(kept.sum() + 2) / 1000 + rng.random() / 1e4).float(),
            }
        )
    return found


def cocos(file, batch, predictions):
    """pycocotools' 12 numbers, of the file itself."""
    with redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
    for annotation in truth.dataset["annotations"]:  # pycocotools must have one; ours need not
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    ids = sorted(truth.getCatIds())
    results = []
    for key, found, (height, width) in zip(batch["keys"], predictions, batch["images"]["scale"], strict=True):
        boxes = found["boxes_xyxy"] / torch.tensor([width, height] * 2)
        for (x1, y1, x2, y2), label, score in zip(
            boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
        ):
            result = {"image_id": int(key), "category_id": ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            results.append(result | {"score": score})
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.imgIds = [int(key) for key in batch["keys"]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NAMES, evaluation.stats.tolist(), strict=True))


def scored(head, batch, predictions):
    head.metric = DetectionMetric()
    head.update_metric(predictions, None, batch)
    return {name: float(value) for name, value in head.metric.compute().items()}


@pytest.mark.parametrize("kind", [Detection, TorchvisionDetector])
@pytest.mark.parametrize("max_tokens", [10_000, 220])
def test_the_buckets_of_a_file_whose_areas_are_not_its_boxes_are_cocos(kind, max_tokens, tmp_path):
    """As stored, and resized by another factor along each side."""
    folder, file = hand_made(tmp_path)
    dataset = CocoDetection(str(folder), str(file))
    batch = batch_of(dataset, max_tokens)
    assert (batch["images"]["scale"][0] == (1.0, 1.0)) == (max_tokens == 10_000)
    head = kind(num_classes=2)
    for seed in range(3):
        predictions = detections(batch, seed)
        expected = cocos(file, batch, predictions)
        assert scored(head, batch, predictions) == pytest.approx(expected, abs=1e-6)
    batch["targets"].pop("area")  # by boxes it would be another number
    by_box = scored(head, batch, predictions)
    assert by_box["ap"] == pytest.approx(expected["ap"])
    assert by_box["ap_small"] != pytest.approx(expected["ap_small"], abs=0.01)


def test_real_photos_are_scored_as_cocos_own_evaluation_does(data_root):
    if not (data_root / "coco").is_dir():
        pytest.skip(f"no coco in {data_root}")
    file = data_root / "coco" / "instances.json"
    dataset = CocoDetection(str(data_root / "coco" / "images"), str(file))
    batch = batch_of(dataset, 256)
    crowd = batch["targets"]["crowd"].values
    assert crowd.any()
    predictions = detections(batch)
    expected = cocos(file, batch, predictions)
    assert scored(Detection(len(dataset.classes)), batch, predictions) == pytest.approx(expected, abs=2e-4)
    assert class_names(batch) == ()


def test_an_area_grows_with_its_image_and_goes_with_its_box():
    sample = {
        "image": noise(100, 140), "key": "s", "boxes_xyxy": np.array([[10, 20, 50, 60], [100, 5, 130, 95.0]], "f4"),
        "classes": np.arange(2), "area": np.array([900, 1500.5], np.float32),
    }  # fmt: skip

    def area(*augment, max_tokens=100_000):
        prepared = Transform(max_tokens, list(augment))(dict(sample), Preprocessing(2), 0)
        return prepared["area"], prepared["scale"]

    same, _ = area()
    assert same.dtype == torch.float32
    assert same.tolist() == [900, 1500.5]
    smaller, (height, width) = area(max_tokens=50 * 40)
    assert smaller.tolist() == pytest.approx([900 * height * width, 1500.5 * height * width], rel=1e-6)
    turned, _ = area(v2.RandomHorizontalFlip(1), v2.RandomVerticalFlip(1))
    assert turned.tolist() == pytest.approx([900, 1500.5], rel=1e-6)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(sample["image"]).save(buffer, "PNG", exif=exif)
    lying = Transform(24)(sample | {"image": EncodedImage(buffer.getvalue(), "s")}, Preprocessing(8), None)
    height, width = lying["scale"]
    assert height != width
    assert lying["area"].tolist() == pytest.approx([900 * height * width, 1500.5 * height * width], rel=1e-6)
    cropped, _ = area(v2.Compose([v2.CenterCrop((100, 40))]))  # columns 50 to 90: no box is left
    assert cropped.tolist() == []
    cropped, _ = area(v2.Compose([v2.CenterCrop((100, 70)), v2.Resize((200, 210))]))  # of the first 15 columns are left
    assert cropped.tolist() == pytest.approx([900 * 6, 1500.5 * 6], rel=1e-6)


@pytest.mark.parametrize("area", ["900", -1, True, float("nan"), float("inf"), [900]])
def test_what_is_no_area_is_refused(area, tmp_path):
    folder, file = hand_made(tmp_path)
    content = json.loads(file.read_text())
    content["annotations"][1]["area"] = area
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotation 2: area is .*; expected a number of pixels") as raised:
        CocoDetection(str(folder), str(file))
    assert "\n" not in str(raised.value)
