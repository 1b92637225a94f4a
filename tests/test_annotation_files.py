"""What people's annotation files are like, through the command: used and counted, or one line that says why not."""

import copy
import json
import re

import pytest
import yaml
from experiments import config, fit
from PIL import Image
from test_coco import CONTENT, image
from test_points import CONTENT as POINTS

from indiclip.cli import main
from indiclip.datasets.coco import CocoDetection
from indiclip.datasets.split import Split
from indiclip.generated.mela import Mela
from indiclip.webdataset.box_shards import BoxShards


@pytest.fixture
def folder(tmp_path):
    for entry in CONTENT["images"]:
        Image.new("RGB", (entry["width"], entry["height"])).save(tmp_path / entry["file_name"])
    return tmp_path


def write(folder, content=None, change=None, name="instances.json"):
    content = copy.deepcopy(CONTENT if content is None else content)
    if change:
        change(content)
    (folder / name).write_text(json.dumps(content))
    return content


def fit_coco(folder, **options):
    """Contrastive training on the captioned images of `instances.json`."""
    options = {"images": str(folder), "annotations": str(folder / "instances.json"), "captioned": True, **options}
    dataset = {"class_path": "indiclip.datasets.coco.CocoDetection", "init_args": options}
    return fit(folder, config(data__train__0__dataset=dataset, data__train__0__batch_size=1, data__val=[]))


def annotation(**changes):
    return lambda content: content["annotations"][0].update(changes)


BAD = {
    r"annotation 1: iscrowd is '0'; expected 0 or 1": annotation(iscrowd="0"),
    r"annotation 1: iscrowd is 'false'; expected 0 or 1": annotation(iscrowd="false"),
    r"annotation 1: iscrowd is 0\.0; expected 0 or 1": annotation(iscrowd=0.0),
    r"annotation 1: iscrowd is None; expected 0 or 1": annotation(iscrowd=None),
    r"annotation 1: category_id is '90'; expected the id of one of the category entries": annotation(category_id="90"),
    r"annotation 1: category_id is 90\.0; expected the id of one": annotation(category_id=90.0),
    r"annotation 1: category_id is True; expected the id of one": annotation(category_id=True),
    r"category 1: id is 1; expected str, as the first is '90'": lambda c: c["categories"][0].update(id="90"),
    r"category 90: name is 3; expected text": lambda c: c["categories"][0].update(name=3),
    r"annotation 1: image_id is 7\.0; expected the id of one of the image entries": annotation(image_id=7.0),
    r"image '7' is duplicated, 2 times": lambda c: c["images"][0].update(id="7"),
    r"image number 1: id is 30\.0; expected a whole number or text": image(id=30.0),
    r"image number 1: id is True; expected a whole number or text": image(id=True),
    r"image 30: \(height, width\) is \(20, '40'\); expected whole pixels": image(width="40"),
    r"image 30: \(height, width\) is \(True, 40\); expected whole pixels": image(height=True),
    r"image 30: file_name is None; expected text": image(file_name=None),
    r"1 of 3 images are not in .*, first 'sub\\\\b\.png'": image(file_name="sub\\b.png"),
    r"the image '/b\.png' lies outside the folder": image(file_name="/b.png"),
    r"annotation 1: bbox is None; expected \[x, y, width, height\]": annotation(bbox=None),
    r"annotation 1: bbox is \[True, 3, 10, 12\]; expected": annotation(bbox=[True, 3, 10, 12]),
    r"annotation 1: bbox is \['2', 3, 10, 12\]; expected": annotation(bbox=["2", 3, 10, 12]),
    r"annotation 1: the box .* lies outside its image \(30x24": annotation(bbox=[20.5, 4, 12, 5]),
    r"image 30: a caption is nan; expected text": image(captions=[float("nan")]),
    r"image 30: captions is 'a'; expected a list of texts": image(captions="a"),
    r"image 30: a caption is '\\ud800'; expected text": image(captions=["\ud800"]),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_type_is_one_line_with_file_row_found_and_expected(message, folder):
    write(folder, change=BAD[message])
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        CocoDetection(str(folder), str(folder / "instances.json"), captioned=True)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("message", [*BAD][::9])
def test_a_wrong_type_is_one_line_of_the_command(message, folder, capsys):
    write(folder, change=BAD[message])
    assert fit_coco(folder) != 0
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1
    assert len(error) < 600


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8-sig", "utf-16"])
def test_encodings_of_json(encoding, folder, capsys):
    text = json.dumps(CONTENT, ensure_ascii=False).replace("a kite", "un thé")
    (folder / "instances.json").write_bytes(text.encode(encoding))
    assert fit_coco(folder) == (2 if encoding == "cp1252" else 0)
    if encoding == "cp1252":
        error = capsys.readouterr().err
        assert re.search(r"instances\.json: line 1: found the byte 0xe9; expected UTF-8, or UTF-16", error)
        assert len(error.splitlines()) == 1


def run_data(folder):
    """What the run's record says of its first source."""
    (metrics,) = folder.glob("runs/*/metrics.json")
    return json.loads(metrics.read_text())["data"]["data.train[0]"]


def test_what_is_used_clipped_or_left_out_is_said_at_start_and_in_the_record(folder, capsys):
    def change(content):
        content["annotations"][1]["bbox"] = [-1.5, 0, 41.5, 21.5]  # 1.5 pixels over three edges of image 30
        content["annotations"].append({"id": 4, "image_id": 30, "category_id": 1, "bbox": [3, 3, 0.5, 9]})

    write(folder, change=change)
    captions = [(7, "x"), ("30", "y"), (999, "z"), ("30", "w")]
    found = [{"id": i, "image_id": image_id, "caption": text} for i, (image_id, text) in enumerate(captions)]
    write(folder, {"annotations": found}, name="captions.json")
    assert fit_coco(folder, captions=str(folder / "captions.json")) == 0
    data = run_data(folder)
    assert {unit: (one["present"], one["used"]) for unit, one in data.items()} == {
        "images": (3, 2), "boxes": (4, 3), "captions": (4, 3),
    }  # fmt: skip
    reasons = {unit: {reason: one["count"] for reason, one in data[unit]["left_out"].items()} for unit in data}
    assert reasons == {
        "images": {"without a caption": 1},
        "boxes": {"thinner than a pixel": 1},
        "captions": {"of images that are not at hand": 1},
    }
    assert data["boxes"]["altered"]["clipped to the image"]["count"] == 2  # the other by half a pixel
    shown = capsys.readouterr().out
    assert "data.train[0]: 2 of 3 images; left out: 1 without a caption (" in shown
    assert "3 of 4 boxes, 2 of them clipped to the image (" in shown
    assert "3 of 4 captions; left out: 1 of images that are not at hand (" in shown
    (report,) = folder.glob("runs/*/report.html")
    assert "3 of 4 captions; left out: 1 of images that are not at hand (" in report.read_text()


def test_a_tolerance_of_ones_own(folder):
    write(folder, change=annotation(bbox=[20.5, 4, 14, 5]))
    arguments = (str(folder), str(folder / "instances.json"))
    with pytest.raises(ValueError, match="lies outside its image"):
        CocoDetection(*arguments)
    dataset = CocoDetection(*arguments, tolerance=5)
    assert dataset[1]["boxes_xyxy"].tolist()[0] == [20.5, 4, 30, 9]


def test_one_picture_under_several_ids_is_on_one_side(folder):
    """... also after packing, where the second of them has the key of the first and a number."""

    def change(content):
        entries = []
        for i in range(60):
            Image.new("RGB", (40, 20), (i, i, i)).save(folder / f"{i}.png")
            for image_id, name in ((i, f"{i}.png"), (100 + i, f"./{i}.png")):
                entries.append({"id": image_id, "file_name": name, "width": 40, "height": 20})
        content["images"], content["annotations"] = entries, []

    write(folder, change=change)
    dataset = CocoDetection(str(folder), str(folder / "instances.json"))
    train, val = Split(dataset, "train"), Split(dataset, "val")
    sides = [{int(split.key(i)) % 100 for i in range(len(split))} for split in (train, val)]
    assert not sides[0] & sides[1]
    assert len(train) + len(val) == 120
    assert len(val) % 2 + len(val) > 0
    words = ["--out", str(folder / "s"), "--name", "a", "--samples", "7", "--workers", "0"]
    assert main(["shards", "pack", str(folder / "instances.json"), *words]) == 0
    shards = BoxShards(str(folder / "s" / "a-*.tar"), str(folder / "s" / "classes.txt"))
    parts = [Split(shards, part) for part in ("train", "val")]
    sides = [{part.key(i).split("/")[1].split("_")[0] for i in range(len(part))} for part in parts]
    assert sum(map(len, parts)) == 120
    assert not sides[0] & sides[1]


def point(**changes):
    return lambda content: content[1].update(changes)


BAD_COUNTING = {
    r"'a\.png': count is '3', but there are 3 points": point(count="3"),
    r"'a\.png': count is 3\.0, but there are 3 points": point(count=3.0),
    r"'a\.png': count is True, but there are 1 points": point(count=True, points=[[1, 2]]),
    r"'a\.png': points is \[\['1', 2\]\]; expected \[\[x, y\]": point(points=[["1", 2]], count=1),
    r"'a\.png': points is \[\[True, 2\]\]; expected": point(points=[[True, 2]], count=1),
    r"'a\.png': points is None; expected": point(points=None),
    r"'a\.png': the point \[nan, 2\.0\] lies outside": point(points=[[float("nan"), 2]], count=1),
    r"'a\.png': the point \[10\.5, 2\.0\] lies outside the image of 8x8": point(points=[[10.5, 2]], count=1),
    r"'a\.png': boxes is False; expected null or a list": point(boxes=False),
    r"'a\.png': boxes is ''; expected null or a list": point(boxes=""),
    r"'a\.png': boxes is \[\['0', 0, 1, 1\]\]; expected null": point(boxes=[["0", 0, 1, 1]]),
    r"'a\.png': class_name is 7; expected text": point(class_name=7),
    r"entry number 2: file_name is \['a\.png'\]; expected text": point(file_name=["a.png"]),
    r"image 'b\.png' is duplicated, 2 times": point(file_name="b.png"),
    r"'a\.png': the file has \(height, width\) \(8, 8\), the entry says \('8', 8\)": point(height="8"),
    r"'a\.png': the file has \(height, width\) \(8, 8\), the entry says \(8\.0, 8\)": point(height=8.0),
}


@pytest.fixture
def counting(tmp_path):
    for entry, size in zip(POINTS, [(40, 20), (8, 8), (9, 9)], strict=True):
        Image.new("RGB", size).save(tmp_path / entry["file_name"])
    return tmp_path


def fit_counting(folder):
    options = {"images": str(folder), "annotations": str(folder / "counting.json")}
    dataset = {"class_path": "indiclip.datasets.points.CountingPoints", "init_args": options}
    head = {"class_path": "heads.counting.Counting"}
    changes = {"data__train__0__dataset": dataset, "data__train__0__batch_size": 1, "data__train__0__task": "counting"}
    return fit(folder, config(**changes, data__val=[], model__heads=[head]))


@pytest.mark.parametrize("message", BAD_COUNTING)
def test_counting_files_are_taken_as_they_stand(message, counting, capsys):
    write(counting, POINTS, BAD_COUNTING[message], "counting.json")
    assert fit_counting(counting) != 0
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "counting.json" in error
    assert len(error.splitlines()) == 1


def test_points_that_are_moved_into_the_image_are_counted(counting, capsys):
    write(counting, POINTS, point(points=[[0, 0], [9.5, 8], [8.5, -1.5]]), "counting.json")
    assert fit_counting(counting) == 0
    data = run_data(counting)
    assert {unit: (one["present"], one["used"]) for unit, one in data.items()} == {
        "images": (3, 3), "points": (5, 5), "boxes": (2, 2),
    }  # fmt: skip
    assert data["points"]["altered"]["moved into the image"]["count"] == 2
    assert data["boxes"]["altered"]["clipped to the image"]["count"] == 1
    assert "5 points, 2 of them moved into the image (" in capsys.readouterr().out


def test_packed_boxes_thinner_than_a_pixel_are_counted(folder, capsys):
    write(folder, change=annotation(bbox=[2, 3, 0.5, 12]))
    words = ["--out", str(folder / "s"), "--name", "a", "--workers", "0", "--json"]
    assert main(["shards", "pack", str(folder / "instances.json"), *words]) == 0
    shards = BoxShards(str(folder / "s" / "a-*.tar"), str(folder / "s" / "classes.txt"))
    assert shards.inventory.summary()["boxes"]["left_out"]["thinner than a pixel"]["count"] == 1
    assert (shards.inventory.present["boxes"], shards.inventory.used["boxes"]) == (3, 2)
    (example,) = {found["example"] for found in shards.inventory.summary()["boxes"]["left_out"].values()}
    assert example.endswith("a-000000.tar: 7: annotation 1")


def test_splits_by_a_regular_expression(folder):
    class Frames(Mela):
        def key(self, index):
            return f"film{index // 10}_{index % 10}"

    frames = Frames(200, 32)
    films = [{part.key(i).split("_")[0] for i in range(len(part))} for part in (
        Split(frames, "train", 0.3, group_by=r"^(film\d+)_"), Split(frames, "val", 0.3, group_by=r"^(film\d+)_"),
    )]  # fmt: skip
    assert not films[0] & films[1]
    assert len(films[0] | films[1]) == 20
    with pytest.raises(ValueError, match=r"group_by: 'shot' is not found in the key 'film0_0'"):
        Split(frames, "val", group_by="shot")
    with pytest.raises(ValueError, match=r"is not found in the key 'film0_0'; expected it in every key"):
        Split(frames, "val", group_by=r"film1(\d)|film")
    with pytest.raises(ValueError, match=r"group_by: '\(' is no regular expression"):
        Split(frames, "val", group_by="(")


def test_packing_says_how_many_captions_are_of_images_that_are_not_at_hand(folder, capsys):
    write(folder)
    entries = [{"image_id": 7, "caption": "x"}, {"image_id": "30", "caption": "y"}, {"image_id": 8, "caption": "z"}]
    write(folder, {"annotations": entries}, name="captions.json")
    words = ["--captions", str(folder / "captions.json"), "--out", str(folder / "s"), "--name", "a", "--workers", "0"]
    assert main(["shards", "pack", str(folder / "instances.json"), *words]) == 0
    assert "2 of 3 captions; left out: 1 of images that are not at hand (" in capsys.readouterr().out
    shards = BoxShards(str(folder / "s" / "a-*.tar"), str(folder / "s" / "classes.txt"))
    found = {shards.key(i).split("/")[1]: shards.captions(i) for i in range(len(shards))}
    assert found == {"7": {"": ["x"]}, "30": {"": ["y"]}, "50": {}}


def test_indiclip_check_says_what_a_config_would_use(folder, capsys):
    write(folder, change=annotation(bbox=[2, 3, 0.5, 12]))
    init = {"images": str(folder), "annotations": str(folder / "instances.json"), "captioned": True}
    dataset = {"class_path": "indiclip.datasets.coco.CocoDetection", "init_args": init}
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(config(data__train__0__dataset=dataset, data__train__0__batch_size=1, data__val=[])))
    assert main(["check", "--config", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "1 of 3 images; left out: 2 without a caption (" in shown
    assert "1 thinner than a pixel (" in shown
