"""Folders as they are: deeper ones, files that are no images, links; all counted."""

import os

import pytest
from PIL import Image

from indiclip.cli import main
from indiclip.datasets.folders import list_images, subfolders
from indiclip.webdataset.shards import Shards


def save(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in (".jpg", ".png", ".gif", ".bmp", ".tif", ".webp"):
        Image.new("RGB", (4, 4)).save(file)
    elif file.suffix in (".jfif", ".jpe", ".JPG"):
        Image.new("RGB", (4, 4)).save(file, "JPEG")
    else:
        file.write_bytes(b"x")


FILES = [
    *("a/1.jpg", "a/deep/er/2.PNG.png", "a/3.jfif", "b/4.JPG", "b/5.webp", "b/6.jpe"),
    *("a/1.gif", "a/2.bmp", "b/3.tif", "b/4.avif", "b/5.heic", "b/6.gif"),
    *("a/1.txt", "a/7.txt", "classes.json", "README", "b/.DS_Store"),
]


@pytest.fixture
def folder(tmp_path):
    for name in FILES:
        save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def test_every_file_is_used_or_left_out_by_kind(folder):
    images, _, inventory = list_images(folder)
    inventory.verify()
    assert images == ["a/1.jpg", "a/3.jfif", "a/deep/er/2.PNG.png", "b/4.JPG", "b/5.webp", "b/6.jpe"]
    found = inventory.summary()["files"]
    assert (found["present"], found["used"]) == (len(FILES), 7)
    assert {reason: entry["count"] for reason, entry in found["left_out"].items()} == {
        ".gif, which is not read": 2, ".bmp, which is not read": 1, ".tif, which is not read": 1,
        ".avif, which is not read": 1, ".heic, which is not read": 1, "no extension": 1, "hidden": 1,
        "text without an image of its name": 2,
    }  # fmt: skip


def pack(folder):
    return main(["shards", "pack", str(folder), "--out", str(folder.parent / "o"), "--name", "x", "--workers", "0"])


def test_pack_says_what_it_leaves_out(folder, capsys):
    assert pack(folder) == 0
    said = capsys.readouterr().out
    assert "7 of 17 files; left out: " in said
    assert "2 .gif, which is not read (a/1.gif)" in said
    shards = Shards(str(folder.parent / "o" / "*.tar"), str(folder.parent / "o" / "classes.txt"))
    assert shards.classes == ["a", "b"]
    labels = {shards.key(i).split("/")[1]: int(shards.labels[i]) for i in range(len(shards))}
    assert labels == {"a_1": 0, "a_3": 0, "a_deep_er_2_PNG": 0, "b_4": 1, "b_5": 1, "b_6": 1}


def test_a_folder_without_images_says_what_is_in_it(folder, capsys):
    for name in FILES[:6]:
        (folder / name).unlink()
    assert pack(folder) == 2
    assert "no images (jpg, jpeg, png, webp, jfif, jpe) in it or below it; found 0 of " in capsys.readouterr().err


def test_a_deep_folder_and_classes_in_alphabetical_order(tmp_path, monkeypatch):
    for name in ("cat", "cat-2", "Bat"):
        save(tmp_path / "photos" / name / "x.png")
    assert pack(tmp_path / "photos") == 0
    assert (tmp_path / "o" / "classes.txt").read_text() == "Bat\ncat\ncat-2\n"
    monkeypatch.chdir(tmp_path / "photos" / "cat")
    for _ in range(1200):
        os.mkdir("d")  # noqa: PTH102 (step by step, as mkdir and rmtree recurse)
        os.chdir("d")
    try:
        assert list_images(tmp_path / "photos").images == ["Bat/x.png", "cat-2/x.png", "cat/x.png"]
    finally:
        for _ in range(1200):
            os.chdir("..")
            os.rmdir("d")  # noqa: PTH106


def test_links_to_folders_above_end(folder):
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "higher").symlink_to(folder.parent)
    assert len(list_images(folder).images) == 6
    assert list_images(folder, "a").images == ["a/1.jpg", "a/3.jfif", "a/deep/er/2.PNG.png"]
    (folder.parent / "link").symlink_to(folder)
    assert len(list_images(folder.parent / "link").images) == 6


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "lost+found", ".ipynb_checkpoints"])
def test_folders_that_systems_make_are_no_classes(folder, name):
    save(folder / name / "x.jpg")
    save(folder / "a" / name / "x.jpg")
    assert len(list_images(folder).images) == 6
    assert subfolders(folder) == ["a", "b"]
