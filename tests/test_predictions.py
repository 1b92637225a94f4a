"""`indiclip predict`: JSON in the pixels of the original images, whatever the ranks, and pycocotools reads it."""

import base64
import io
import json
import resource
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
import yaml
from experiments import config, fit
from helpers import noise
from PIL import Image, ImageOps
from processes import as_ranks, in_processes
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from heads.counting import peaks
from heads.densepose import DensePose
from indiclip import json_lines
from indiclip.datasets.base import SampleDataset
from indiclip.head import Frame, Head
from indiclip.images import EncodedImage
from indiclip.loading.collate import collate
from indiclip.loading.transforms import Transform
from indiclip.preprocessing import Preprocessing
from indiclip.tasks.surface_charts import PART_NAMES, paste
from indiclip.training.cli import run
from indiclip.training.predictions import safe_name

# Far from the 36 patches of 8 pixels that the model sees, each by another factor.
SIZES_HW = {30: (300, 170), 7: (96, 333), 50: (210, 204)}
IDS = {"kite": 1, "diya": 3, "drum": 90}


def coco_file(folder):
    """Three photos, ids with gaps. Before it has learnt, the head finds a box of 16 pixels around each patch."""
    images, annotations = [], []
    for image_id, (height, width) in SIZES_HW.items():
        name = f"photo {image_id}.png"
        Image.fromarray(noise(height, width, image_id)).save(folder / name)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        rows, columns = Preprocessing(8).fit_hw(height, width, 36)
        for category_id in IDS.values():
            box = [4 * width / columns, 4 * height / rows, 13 * width / columns, 15 * height / rows]
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id, "bbox": box}
            annotations.append(row | {"area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": number, "name": name} for name, number in IDS.items()]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return {"images": str(folder), "annotations": str(file)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose detector knows nothing and says everything, and the COCO file that it is tried on."""
    folder = tmp_path_factory.mktemp("trained")
    dataset = {"class_path": "indiclip.datasets.coco.CocoDetection", "init_args": coco_file(folder)}
    head = {"num_classes": 3, "out_channels": 8, "num_convs": 1, "scales": [1.0], "score_thresh": 0.0}
    tree = config(model__heads=[{"class_path": "heads.detection.Detection", "init_args": head}])
    source = {"task": "detection", "dataset": dataset, "batch_size": 2, "max_tokens": 36}
    tree["data"] |= {"train": [source], "val": [source]}
    assert fit(folder, tree) == 0
    return folder / "runs" / "experiment"


def command(word, trained, *flags):
    flags = ["--config", str(trained / "config.yaml"), "--ckpt_path", str(trained / "checkpoints/last.ckpt"), *flags]
    return run([word, *flags])


def predicted(trained):
    found = {}
    for file in sorted((trained / "predictions").rglob("*.json")):
        found[str(file.relative_to(trained / "predictions"))] = json.loads(file.read_text())
    return found


def test_pycocotools_scores_the_file_as_validate_does(trained):
    """With the user's own annotations: ids of images and categories are theirs, boxes in the original pixels."""
    assert command("predict", trained) == 0
    assert command("validate", trained) == 0
    metrics = json.loads((trained / "validate" / "metrics.json").read_text())["metrics"]
    folder, instances = trained / "predictions", trained.parents[1] / "instances.json"
    with redirect_stdout(io.StringIO()):
        own = COCO(str(folder / "images" / "detection.json"))
        own.loadRes(str(folder / "detection.json"))
        truth = COCO(str(instances))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / "detection.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
    found = {f"val/detection/{name}": value for name, value in zip(names, evaluation.stats, strict=False) if value >= 0}
    assert found["val/detection/ar100"] > 0
    assert found == pytest.approx({name: metrics[name] for name in found}, abs=1e-5)
    assert {category["name"]: category["id"] for category in own.dataset["categories"]} == IDS
    sizes = {image["id"]: (image["height"], image["width"]) for image in own.dataset["images"]}
    assert sizes == SIZES_HW
    assert [image["file_name"] for image in own.dataset["images"]] == [f"photo {key}.png" for key in SIZES_HW]


def test_each_image_has_a_file_of_its_own(trained):
    assert command("predict", trained, "--pictures", "2") == 0
    found = predicted(trained)
    assert sorted(found) == ["detection.json", *(f"images/detection{name}.json" for name in ("", "/30", "/50", "/7"))]
    for key, (height, width) in SIZES_HW.items():
        content = found[f"images/detection/{key}.json"]
        head = content["heads"].pop("detection")
        about = {"key": str(key), "file_name": f"photo {key}.png", "width": width, "height": height, "heads": {}}
        assert content == about
        picture = trained / "predictions" / "images" / "detection" / f"{key}.detection.jpg"
        assert picture.is_file() == ("picture" in head) == (key != 50)
        if picture.is_file():
            assert Image.open(picture).size[0] >= 320
            assert head["picture"]["file"] == picture.name
            assert "of the truth missed" in head["picture"]["words"]
        assert {row["class"] for row in head["detections"]} <= IDS.keys()
        boxes = np.array([row["bbox"] for row in head["detections"]])
        assert (boxes >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= np.array([width, height]) + 0.01).all()
        of_image = [row for row in found["detection.json"] if row["image_id"] == key]
        assert [(row["bbox"], row["score"]) for row in of_image] == [
            (row["bbox"], row["score"]) for row in head["detections"]
        ]
        assert [row["category_id"] for row in of_image] == [IDS[row["class"]] for row in head["detections"]]


def test_what_an_earlier_predict_left_is_removed_and_nothing_else(trained):
    folder = trained / "predictions"
    old = [folder / "000000-0.pt", folder / "other.json", folder / "images" / "gone" / "1.json"]
    for file in (*old, folder / "notes.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert command("predict", trained) == 0
    assert not any(file.exists() for file in old)
    assert (folder / "notes.txt").is_file()


def test_ranks_write_each_image_once_and_the_same(trained, tmp_path):
    assert command("predict", trained) == 0
    expected = predicted(trained)
    flags = ("--trainer.devices", "2", "--pictures", "1")
    done = as_ranks(lambda: command("predict", trained, *flags), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "predictions of 3 images" in done.stdout
    found = predicted(trained)
    heads = [content["heads"]["detection"] for content in found.values() if "heads" in content]
    assert sum("picture" in head for head in heads) == 1
    assert found.keys() == expected.keys()
    for part in ("images", "categories"):
        assert found["images/detection.json"][part] == expected["images/detection.json"][part]
    one, two = (content["detection.json"] for content in (expected, found))
    assert [(row["image_id"], row["category_id"]) for row in two] == [
        (row["image_id"], row["category_id"]) for row in one
    ]
    assert [row["bbox"] for row in two] == [pytest.approx(row["bbox"], abs=1e-2) for row in one]


def test_a_full_disk_is_named_and_leaves_no_part_of_a_file(trained, tmp_path):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))
        return command("predict", trained)

    done = in_processes([work], tmp_path)
    assert done.returncode == 2
    assert "indiclip: [Errno 27] File too large" in done.stderr
    assert "predictions/images/detection/" in done.stderr
    assert [file for file in (trained / "predictions").rglob("*") if file.name.endswith(".part")] == []
    assert not (trained / "predictions" / "detection.json").exists()


def test_several_sources_and_keys_that_are_paths(tmp_path):
    """Of `a/b.png` and `a_b.png` none takes the place of the other."""
    (tmp_path / "photos" / "a").mkdir(parents=True)
    names = ["a/b.png", "a_b.png", "a b.png", "पतंग.png"]
    for number, name in enumerate(names):
        Image.fromarray(noise(40, 50, number)).save(tmp_path / "photos" / name)
    (tmp_path / "photos.csv").write_text("file,en\n" + "".join(f"{name},a kite\n" for name in names))
    tree = config()
    table = {"images": str(tmp_path / "photos"), "table": str(tmp_path / "photos.csv")}
    photos = {"class_path": "indiclip.datasets.captions.CaptionTable", "init_args": table}
    tree["data"]["val"].append(tree["data"]["val"][0] | {"dataset": photos, "name": "photos"})
    assert fit(tmp_path, tree) == 0
    trained = tmp_path / "runs" / "experiment"
    assert command("predict", trained, "--pictures", "1") == 0
    found = predicted(trained)
    listed = found["images/contrastive/photos.json"]["images"]
    assert [(entry["id"], entry["key"], entry["file_name"]) for entry in listed] == [
        (number, name, name) for number, name in enumerate(names, 1)
    ]
    for entry in listed:
        assert entry["file"].startswith("images/contrastive/photos/")
        assert found[entry["file"]]["key"] == entry["key"]
        assert found[entry["file"]]["heads"]["contrastive"]["nearest"] == ["a kite"]
    assert len(found["images/contrastive/0.json"]["images"]) == 12
    assert len(list((trained / "predictions").rglob("*.jpg"))) == 2  # one of each source


class Bare(SampleDataset):
    """Photos of which nothing is known."""

    classes = tuple(IDS)

    def __len__(self):
        return 3

    def key(self, index):
        return f"bare {index}"

    def __getitem__(self, index):
        return {"image": noise(40 + index, 50)}


def test_pictures_need_no_truth(trained, tmp_path):
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    saved["data"]["val"][0]["dataset"] = {"class_path": "test_predictions.Bare"}
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(saved))
    flags = ["--config", str(tmp_path / "bare.yaml"), "--ckpt_path", str(trained / "checkpoints" / "last.ckpt")]
    assert run(["predict", *flags, "--pictures", "1"]) == 0
    found = predicted(trained)
    heads = [content["heads"]["detection"] for content in found.values() if "heads" in content]
    words = [head["picture"]["words"] for head in heads if "picture" in head]
    assert len(words) == 1
    assert "found (score" in words[0]
    assert "truth" not in words[0]
    listed = found["images/detection.json"]
    assert [(entry["id"], entry["file_name"], entry["height"]) for entry in listed["images"]] == [
        (number, f"bare {number - 1}", 39 + number) for number in (1, 2, 3)
    ]
    assert listed["categories"] == [{"id": i, "name": name} for i, name in enumerate(IDS, 1)]  # the file's are unknown


def test_a_head_that_draws_nothing_has_no_pictures(tmp_path):
    """Its predictions are codes that its metric reads."""
    assert fit(tmp_path, config(), "--config", "methods/dinov2") == 0
    run_folder = tmp_path / "runs" / "experiment"
    page = (run_folder / "report.html").read_text()
    assert "Image-text matching: held-out images" in page
    assert "Self-distillation: held-out images" not in page
    assert "Self-distillation" in page  # its score
    assert command("predict", run_folder, "--pictures", "2") == 0
    heads = [content["heads"] for content in predicted(run_folder).values() if "heads" in content]
    assert [[name for name in found if "picture" in found[name]] for found in heads].count(["contrastive"]) == 2
    assert len([*run_folder.rglob("*.jpg")]) == 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_frame_is_that_of_the_upright_image(orientation):
    """A bright patch in a photo that is stored lying: its box, moved to the model's pixels and back, is on it."""
    pixels = np.zeros((120, 200, 3), np.uint8)
    pixels[10:50, 100:180] = 255
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    sample = {"image": EncodedImage(buffer.getvalue(), "k"), "key": "k"}
    sample |= {"boxes_xyxy": np.array([[100, 10, 180, 50]], np.float32), "classes": np.zeros(1, np.int64)}
    batch = collate([Transform(20)(sample, Preprocessing(8), None)])
    assert batch["images"]["sizes_hw"][0] not in ((120, 200), (200, 120))
    frame = Frame.of(batch, 0)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue()))))
    assert frame.size_hw == upright.shape[:2]
    rows, columns = np.nonzero(upright[..., 0])
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert frame.boxes(batch["targets"]["boxes_xyxy"].values)[0].tolist() == pytest.approx(expected, abs=1e-3)


def test_unless_a_head_says_otherwise_boxes_and_points_are_moved_and_tensors_are_lists():
    frame = Frame((50, 200), (2.0, 0.5))
    prediction = {
        "boxes_xyxy": torch.tensor([[10.0, 20.0, 30.0, 200.0]]),
        "points_xy": torch.tensor([[1.0, 2.0]]),
        "depth": torch.tensor([[1 / 3, torch.inf], [torch.nan, 2]]),
        "by": {"hi": (torch.tensor(3), None, "पतंग")},
    }
    assert json.loads(json.dumps(Head.to_json(None, prediction, frame), allow_nan=False)) == {
        "boxes_xyxy": [[20.0, 10.0, 60.0, 50.0]],  # not below the image's edge
        "points_xy": [[2.0, 1.0]],
        "depth": [[0.333333, None], [None, 2.0]],
        "by": {"hi": [3, None, "पतंग"]},
    }


def test_surfaces_are_masks_of_the_original_image():
    """Two people who overlap: each has what `paste` gives of it alone, in COCO's code."""
    torch.manual_seed(0)
    frame, scale = Frame((90, 140), (0.5, 0.8)), torch.tensor([0.8, 0.5] * 2)
    boxes = torch.tensor([[10.0, 4.0, 70.0, 80.0], [60.5, 20.25, 139.0, 90.0]])
    coarse = torch.randint(0, 25, (2, 7, 7), dtype=torch.uint8)
    prediction = {
        "boxes_xyxy": boxes * scale,
        "scores": torch.tensor([0.5, 0.75]),
        "part": coarse.repeat_interleave(4, 1).repeat_interleave(4, 2),
        "uv": torch.rand(2, 2, 28, 28),
    }
    people = DensePose().to_json(prediction, frame)["people"]
    assert [person["score"] for person in people] == [0.5, 0.75]
    for q, person in enumerate(people):
        alone = {name: value[q : q + 1] for name, value in prediction.items()} | {"boxes_xyxy": boxes[q : q + 1]}
        expected, _ = paste(alone, frame.size_hw)
        found = np.zeros(frame.size_hw, np.uint8)
        for part in person["parts"]:
            assert part["name"] == PART_NAMES[part["number"] - 1]
            assert part["segmentation"]["size"] == [90, 140]
            found += rle.decode(part["segmentation"]) * np.uint8(part["number"])
        assert (found == expected.numpy()).all()
        left, top, width, height = person["bbox"]
        assert [left, top, left + width, top + height] == pytest.approx(boxes[q].tolist(), abs=1e-3)
        iuv = np.asarray(Image.open(io.BytesIO(base64.b64decode(person["iuv_png"]))))
        assert (iuv[..., 0] == prediction["part"][q].numpy()).all()
        assert iuv[..., 1:] / 255 == pytest.approx(prediction["uv"][q].permute(1, 2, 0).numpy(), abs=0.5 / 255 + 1e-6)
    assert (len(PART_NAMES), PART_NAMES[2], PART_NAMES[9], PART_NAMES[23]) == (
        24,
        "right hand",
        "left upper leg",
        "head",
    )


def test_points_of_a_count_are_the_peaks_of_its_density():
    density = torch.zeros(4, 6)
    density[1, 1], density[1, 2], density[3, 5], density[0, 4] = 0.9, 0.4, 0.7, 0.2
    assert peaks(density, 9).tolist() == [[1.5, 1.5], [5.5, 3.5], [4.5, 0.5]]
    assert peaks(density, 2).tolist() == [[1.5, 1.5], [5.5, 3.5]]
    assert peaks(density, 0).shape == (0, 2)
    assert peaks(torch.zeros(2, 2), 3).shape == (0, 2)


def test_names_of_files_are_safe_and_different(tmp_path):
    keys = ["7", "a-b.png", "a/b.png", "a_b.png", "../../x", "..", ".", "", "/etc/passwd", "a\udcff", "a?", "a\0b"]
    keys += ["x" * 300, "x" * 301, "पतंग" * 60, "पतंग.png", "two words", "two\nwords", ".hidden"]
    names = [safe_name(key) for key in keys]
    assert len({*names}) == len(keys)
    assert names[0] == "7"
    assert names[1] == "a-b.png"
    for name in names:
        json_lines.write_whole(tmp_path / f"{name}.detection.json", b"")
    assert len(list(tmp_path.iterdir())) == len(keys)
    assert all(file.parent == tmp_path for file in tmp_path.rglob("*"))


def test_a_file_that_is_written_piece_by_piece_is_whole_or_not_there(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")

    def write():
        with json_lines.open_whole(file) as opened:
            opened.write(b"new")
            (tmp_path / "missing").read_bytes()

    with pytest.raises(FileNotFoundError, match="missing"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert file.read_text() == "old"
    with json_lines.open_whole(file) as opened:
        opened.write(b"n")
        opened.write(b"ew")
    assert file.read_text() == "new"
