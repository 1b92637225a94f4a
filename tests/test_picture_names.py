"""A picture has one name, however a file spells it, and lies in its folder: for training and for packing alike."""

import json

import pytest
from test_pack import pack, save

from indiclip.cli import main
from indiclip.datasets.captions import CaptionTable
from indiclip.datasets.coco import CocoDetection
from indiclip.datasets.points import CountingPoints
from indiclip.datasets.split import Split
from indiclip.webdataset.shards import Shards


@pytest.fixture
def spellings(tmp_path):
    """The folder `photos`, and how its pictures may be called: {name: spellings}."""
    photos = tmp_path / "photos"
    for i in range(6):
        save(photos / "sub" / f"{i}.png", i)
    return photos, {
        f"sub/{i}.png": [f"sub/{i}.png", f"./sub//{i}.png", f"{photos}/sub/{i}.png", f"x/../../photos/sub/{i}.png"]
        for i in range(6)
    }


def write_table(folder, rows):
    (folder / "t.csv").write_text("file,caption\n" + "".join(f"{name},text {i}\n" for i, name in enumerate(rows)))
    return folder / "t.csv"


def write_coco(folder, names):
    images = [{"id": i, "file_name": name, "height": 4, "width": 4} for i, name in enumerate(names)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "kite"}]}
    (folder / "coco.json").write_text(json.dumps(content))
    return folder / "coco.json"


def write_points(folder, names):
    entries = [{"file_name": name, "class_name": "kite", "count": 0, "points": []} for name in names]
    (folder / "points.json").write_text(json.dumps(entries))
    return folder / "points.json"


def test_one_picture_is_on_one_side_of_a_split_and_one_sample(spellings, tmp_path):
    photos, names = spellings
    every = [name for of_picture in zip(*names.values(), strict=True) for name in of_picture]
    table = CaptionTable(str(photos), str(write_table(tmp_path, every)))
    assert [table.key(i) for i in range(len(table))] == list(names)
    assert {len(table.captions(i)[""]) for i in range(6)} == {4}
    coco = CocoDetection(str(photos), str(write_coco(tmp_path, every)))
    sides = [Split(coco, part, fraction=0.5) for part in ("train", "val")]
    pictures = [{int(side.key(i)) % 6 for i in range(len(side))} for side in sides]
    assert sorted([*pictures[0], *pictures[1]]) == list(range(6))
    with pytest.raises(ValueError, match=r"image 'sub/0\.png' is duplicated, 2 times"):
        CountingPoints(str(photos), str(write_points(tmp_path, [*names, every[6]])))
    assert pack(tmp_path / "t.csv", tmp_path / "out", "--images", photos) == 0
    shards = Shards(str(tmp_path / "out" / "*.tar"))
    assert [len(shards.captions(i)[""]) for i in range(len(shards))] == [4] * 6


@pytest.mark.parametrize("name", ["../outside.png", "sub/../../outside.png", "{folder}/outside.png", ".."])
def test_a_path_that_climbs_out_is_refused_by_all_readers(spellings, tmp_path, capsys, name):
    photos, names = spellings
    save(tmp_path / "outside.png")
    rows = [*names, name.format(folder=tmp_path)]
    for read, write in ((CaptionTable, write_table), (CocoDetection, write_coco), (CountingPoints, write_points)):
        with pytest.raises(ValueError, match=r"\.(csv|json): the image '.*' lies outside the folder "):
            read(str(photos), str(write(tmp_path, rows)))
    for file in ("t.csv", "coco.json"):
        assert pack(tmp_path / file, tmp_path / f"out-{file}", "--images", photos) == 0
        assert "6 of 7 samples; left out: 1 without an image file" in (shown := capsys.readouterr().out)
        assert "lies outside the folder" in shown


def test_links_in_a_folder_are_followed_by_training_and_packing(spellings, tmp_path, capsys):
    photos, names = spellings
    links, classes = tmp_path / "links", tmp_path / "classes"
    links.mkdir()
    classes.mkdir()
    for i, name in enumerate(names):
        (links / f"{i}.png").symlink_to(photos / name)
    (classes / "kite").symlink_to(photos / "sub")
    table = write_table(tmp_path, [f"{i}.png" for i in range(6)])
    assert len([*CaptionTable(str(links), str(table))]) == 6
    assert pack(table, tmp_path / "a", "--images", links) == pack(classes, tmp_path / "b") == 0
    assert main(["shards", "check", *map(str, tmp_path.glob("[ab]/*.tar")), "--workers", "0"]) == 0
    assert "12 samples in 2 shards" in capsys.readouterr().out
