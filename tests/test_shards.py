"""Shards: the members that webdataset sees, and a clear error for everything that is wrong with them."""

import gzip
import io
import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from helpers import only_caption
from PIL import Image
from torch.utils.data import DataLoader

from indiclip.images import UnreadableSample
from indiclip.webdataset.shards import Shards, expand


def png(value=0, size=(4, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, mode="w", **options):
    """Members as name -> bytes, text, or a ready TarInfo."""
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members if isinstance(members, list) else members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_a_sample_has_the_image_its_text_and_its_label(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", {"0.png": png(9), "0.txt": " a diya\n", "0.cls": "1", "1.cls": "0", "1.PNG": png()}
    )
    shards = Shards(path, classes=["kite", "diya"])
    assert len(shards) == 2
    sample = shards[0]
    assert sample["image"].decode().tolist() == np.full((4, 4, 3), 9).tolist()
    assert (sample["key"], only_caption(sample), sample["label"]) == ("a/0", "a diya", 1)
    assert shards[1].keys() == {"image", "key", "label"}
    assert shards.labels.tolist() == [1, 0]
    assert shards[-1]["key"] == "a/1" == shards.key(-1)
    with pytest.raises(IndexError):
        shards[2]


def test_json_gives_caption_and_label_under_either_name(tmp_path):
    entries = [{"caption": "x", "label": 2}, {"text": "y", "cls": 0, "url": "z"}, {"caption": None, "text": "w"}]
    members = {
        f"{i}.{kind}": png() if kind == "png" else json.dumps(e)
        for i, e in enumerate(entries)
        for kind in ("png", "json")
    }
    shards = Shards(write_tar(tmp_path / "a.tar", members))
    assert [(only_caption(s), s["label"]) for s in shards] == [("x", 2), ("y", 0), ("w", -1)]


def test_a_caption_of_the_json_beside_the_txt_is_one_more_and_cls_goes_before_json(tmp_path):
    said = {"same": ("t", {"caption": "t ", "text": 3}), "other": ("t", {"caption": "j", "label": 5})}
    said["in a language"] = ("t", {"caption": "j", "language": "de", "captions": {"de": "t", "hi": "h"}})
    members = {f"{i}.txt": text for i, (text, _) in enumerate(said.values())}
    members |= {f"{i}.json": json.dumps(entry) for i, (_, entry) in enumerate(said.values())}
    members |= {f"{i}.png": png() for i in range(3)} | {f"{i}.cls": "4" for i in range(3)}
    samples = list(Shards(write_tar(tmp_path / "a.tar", members)))
    assert [sample["captions"] for sample in samples] == [
        {"": ["t"]},
        {"": ["t", "j"]},
        {"de": ["t", "j"], "hi": ["h"]},
    ]
    assert [sample["label"] for sample in samples] == [4, 4, 4]


def test_the_template_captions_what_has_no_text(tmp_path):
    members = {
        "0.png": png(),
        "0.cls": "1",
        "1.png": png(),
        "1.cls": "0",
        "1.txt": "own words",
        "2.png": png(),
        "2.json": '{"label": 0}',
    }
    (tmp_path / "classes.txt").write_text("kite\nमटका\n", "utf-8")
    shards = Shards(write_tar(tmp_path / "a.tar", members), str(tmp_path / "classes.txt"), "a photo of a {}")
    assert [only_caption(sample) for sample in shards] == ["a photo of a मटका", "own words", "a photo of a kite"]


def test_captions_by_language(tmp_path):
    both = {"en": " a lamp", "hi-Latn": "diya"}
    entries = [
        {"captions": both},
        {"captions": both, "caption": "ein Licht", "language": "de"},
        {"captions": both, "caption": "a light", "language": "en"},
        {"captions": both, "caption": "who knows"},
        {"caption": "दीया", "lang": "hi"},
        {"caption": "x", "language": "und"},
        {"captions": ["one", "two"], "caption": "one"},
        {"captions": {"ta_IN": ["விளக்கு", "அகல்"], "Hindi": "दीया"}},
    ]
    members = {
        f"{i}.{kind}": png() if kind == "png" else json.dumps(e)
        for i, e in enumerate(entries)
        for kind in ("png", "json")
    }
    samples = [
        {k: v for k, v in s.items() if k not in ("image", "key")}
        for s in Shards(write_tar(tmp_path / "a.tar", members))
    ]
    clean = {"en": ["a lamp"], "hi-Latn": ["diya"]}
    assert samples == [
        {"captions": clean},
        {"captions": {"de": ["ein Licht"]} | clean},
        {"captions": clean | {"en": ["a light", "a lamp"]}},
        {"captions": clean | {"": ["who knows"]}},
        {"captions": {"hi": ["दीया"]}},
        {"captions": {"": ["x"]}},
        {"captions": {"": ["one", "two"]}},
        {"captions": {"ta-IN": ["விளக்கு", "அகல்"], "hi": ["दीया"]}},
    ]
    shards = Shards(str(tmp_path / "a.tar"))
    assert [shards.captions(i) for i in (4, 6)] == [{"hi": ["दीया"]}, {"": ["one", "two"]}]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_indian_names_in_every_tar_dialect(tmp_path, layout):
    name = "folder-" * 11 + "/दीया-" + "x" * 60  # longer than the 100 bytes of a plain header
    path = write_tar(tmp_path / "a.tar", {f"./{name}.png": png(5), f"./{name}.txt": "दीया"}, format=layout)
    sample = Shards(path)[0]
    assert (sample["key"], only_caption(sample), sample["image"].decode().max()) == (f"a/{name}", "दीया", 5)


def test_webdataset_reads_the_same_samples(tmp_path):
    rng = np.random.default_rng(0)
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"s-{shard}.tar")) as writer:
            for i in range(7):
                image = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                writer.write({"__key__": f"{shard}_{i}", "png": image, "txt": f"caption {i}", "cls": i})
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    ours = Shards(str(tmp_path / "s-{0..2}.tar"))
    assert len(ours) == len(theirs) == 21
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["key"].split("/")[1] == other["__key__"]
        assert (mine["image"].decode() == other["png"]).all()
        assert (only_caption(mine), mine["label"]) == (other["txt"], other["cls"])


def test_cifar_shards_equal_webdatasets_reading(data_root):
    url = str(data_root / "cifar10" / "test-0000.tar.gz")
    ours = Shards(url, str(data_root / "cifar10" / "classes.txt"))
    theirs = webdataset.WebDataset(url, shardshuffle=False)
    for i, other in zip(range(200), theirs, strict=False):
        sample = ours[i]
        expected = np.asarray(Image.open(io.BytesIO(other["jpg"])).convert("RGB")).astype(int)
        assert abs(sample["image"].decode() - expected).max() <= 2
        assert only_caption(sample) == other["txt"].decode().strip()
        assert sample["label"] == int(other["cls"])
        assert ours.classes[sample["label"]] in only_caption(sample)
    assert np.bincount(ours.labels).size == 10
    assert not list(ours.inventory.left_out())


def test_gz_is_unpacked_once_and_again_when_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "cache"))
    path = write_tar(tmp_path / "a.tar.gz", {"0.png": png(1), "0.txt": "one"}, "w:gz")
    assert only_caption(Shards(path)[0]) == "one"
    (unpacked,) = (tmp_path / "cache").glob("*.tar")
    inode = unpacked.stat().st_ino
    assert only_caption(Shards(path)[0]) == "one"
    assert [entry.stat().st_ino for entry in (tmp_path / "cache").glob("*.tar")] == [inode]
    write_tar(tmp_path / "a.tar.gz", {"0.png": png(1), "0.txt": "another"}, "w:gz")
    assert only_caption(Shards(path)[0]) == "another"


def test_plain_and_packed_shards_have_the_same_keys(tmp_path):
    members = {"0.png": png(), "0.txt": "x"}
    (tmp_path / "p").mkdir()
    plain, packed = write_tar(tmp_path / "a.tar", members), write_tar(tmp_path / "p" / "a.tar.gz", members, "w:gz")
    assert Shards(plain).key(0) == Shards(packed).key(0) == "a/0"


def test_braces_globs_and_lists_expand_in_order(tmp_path):
    for name in ("b-0.tar", "b-1.tar", "b-2.tar", "c.tar"):
        write_tar(tmp_path / name, {"0.png": png(), "0.txt": "x"})
    names = [Path(path).name for path in expand([f"{tmp_path}/c.tar", f"{tmp_path}/b-*.tar"])]
    assert names == ["c.tar", "b-0.tar", "b-1.tar", "b-2.tar"]
    assert [Path(path).name for path in expand(f"{tmp_path}/b-{{1..2}}.tar")] == ["b-1.tar", "b-2.tar"]


def test_only_listed_extensions_are_read_and_the_rest_is_counted(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.abort, ()

    link = tarfile.TarInfo("7.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = {
        "0.png": png(), "0.txt": "x", "0.pkl": pickle.dumps(Trap()), "0.pyd": b"", "0.seg.png": png(), "README": "",
        "7.txt": link, "../8.png": png(), "../8.txt": "y", "._0.png": b"", "9.txt": "text of a lost image",
    }  # fmt: skip
    shards = Shards(write_tar(tmp_path / "a.tar", members))
    assert len(shards) == 1
    assert only_caption(shards[0]) == "x"
    shards.inventory.verify()
    members = shards.inventory.summary()["members"]
    assert (members["present"], members["used"]) == (11, 2)
    found = {reason: (entry["count"], entry["example"]) for reason, entry in members["left_out"].items()}
    assert {reason: (count, example.rpartition(" ")[2]) for reason, (count, example) in found.items()} == {
        ".pkl": (1, "0.pkl"), ".pyd": (1, "0.pyd"), ".*.png": (1, "0.seg.png"),
        "without a key or an extension": (2, "README"), "links or special files": (1, "7.txt"),
        "with a name that leads out of the folder": (2, "../8.png"), "without an image": (1, "9.txt"),
    }  # fmt: skip
    assert shards.inventory.lines()[1].startswith("1 of 2 samples; left out: 1 without an image (")


def test_workers_read_a_forked_and_a_pickled_dataset(tmp_path):
    members = [(f"{i}.{kind}", png(i) if kind == "png" else str(i)) for i in range(40) for kind in ("png", "cls")]
    shards = Shards(write_tar(tmp_path / "a.tar", members))
    assert shards[0]["label"] == 0  # the descriptor is open before the fork
    for method in ("fork", "spawn"):
        loader = DataLoader(shards, batch_size=None, num_workers=2, multiprocessing_context=method)
        assert [int(sample["image"].decode().max()) for sample in loader] == list(range(40))


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("indiclip.webdataset.shard_files._OPEN_FILES", 3)
    for i in range(8):
        write_tar(tmp_path / f"{i}.tar", {"0.png": png(i), "0.cls": str(i)})
    shards = Shards(str(tmp_path / "*.tar"))
    before = open_files()
    order = np.random.default_rng(0).integers(0, 8, 60).tolist()
    assert [int(shards[i]["image"].decode().max()) for i in order] == order
    assert open_files() == before + 3
    del shards
    assert open_files() == before


UNREADABLE = {
    "empty caption": ({"0.png": png(), "0.txt": " \n"}, r"a/0: the caption is ' \\n'; expected text"),
    "captions of another type": (
        {"0.png": png(), "0.txt": "x", "0.json": '{"captions": "x"}'},
        r"a/0: captions of the \.json is 'x'; expected texts by language, or a list",
    ),
    "a caption in a language of another type": (
        {"0.png": png(), "0.json": '{"captions": {"en": "x", "hi": 3}}'},
        r"a/0: captions of the \.json: hi is 3; expected text",
    ),
    "an empty caption in a language": (
        {"0.png": png(), "0.json": '{"captions": {"hi": " "}}'},
        r"a/0: captions of the \.json: hi is ' '; expected text",
    ),
    "a language that is none": (
        {"0.png": png(), "0.json": '{"captions": {"Hindi language": "x"}}'},
        r"a/0: found the language 'Hindi language'; expected a code such as hi",
    ),
    "no captions at all": ({"0.jpg": png(), "0.json": '{"captions": {}}'}, r"a/0: neither text"),
    "empty caption in json": ({"0.png": png(), "0.json": '{"caption": ""}'}, r"a/0: the caption is ''"),
    "caption of another type": ({"0.png": png(), "0.json": '{"text": 3}'}, r"a/0: the caption is 3; expected text"),
    "half a character": ({"0.png": png(), "0.json": '{"text": "\\ud800"}'}, r"a/0: the caption is '.*ud800'"),
    "negative label": ({"0.png": png(), "0.cls": "-1"}, r"a/0: the label is no whole number from 0"),
    "no number": ({"0.png": png(), "0.json": '{"label": 0.5}'}, r"a/0: the label is no whole number"),
    "yes or no": ({"0.png": png(), "0.json": '{"label": true}'}, r"a/0: the label is no whole number"),
    "neither text nor label": ({"0.jpg": png()}, r"a/0: neither text \(\.txt, \.json\) nor label"),
    "json without either": ({"0.jpg": png(), "0.json": "{}"}, r"a/0: neither text"),
    "broken json": ({"0.png": png(), "0.json": "{"}, r"a/0: broken JSON"),
    "json list": ({"0.png": png(), "0.json": "[]"}, r"a/0: found a JSON list; expected an object"),
    "not utf-8": ({"0.png": png(), "0.txt": b"\xff"}, r"a/0: the .txt: line 1: found the byte 0xff"),
    "no bytes": ({"0.png": b"", "0.txt": "x"}, r"a/0: expected the bytes of a JPEG, PNG or WebP, found 0"),
    "another format": ({"0.png": b"GIF89a" * 9, "0.txt": "x"}, r"a/0: expected the bytes of a JPEG, PNG or WebP"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_bad_sample_is_unreadable_and_its_neighbour_is_not(tmp_path, what):
    members, message = UNREADABLE[what]
    path = write_tar(tmp_path / "a.tar", {**members, "1.png": png(5), "1.txt": "good"})
    shards = Shards(path)
    with pytest.raises(UnreadableSample, match=message) as caught:
        shards[0]
    assert caught.value.file == path
    assert "\n" not in str(caught.value)
    assert only_caption(shards[1]) == "good"


def test_labels_that_are_no_class_and_shards_without_images_are_errors(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": png(), "0.cls": "0", "1.png": png(), "1.cls": "2"})
    with pytest.raises(ValueError, match=r"a\.tar: a/1: the label is 2; expected 0 to 1 \(diya\)"):
        Shards(path, classes=["kite", "diya"])
    path = write_tar(tmp_path / "b.tar", {"0.txt": "x"})
    with pytest.raises(
        ValueError, match=r"b\.tar: no images in 1 shards; found 0 of 1 members; left out: 1 without an"
    ):
        Shards(path)


def test_members_in_another_order_and_strange_texts_are_kept(tmp_path):
    texts = {"0": "None", "1": "NA", "2": "a\x01b", "3": "क" * 100_000}
    members = [(f"{i}.png", png(int(i))) for i in texts] + [(f"{i}.txt", texts[i]) for i in reversed(texts)]
    shards = Shards(write_tar(tmp_path / "a.tar", members))
    assert {s["key"].split("/")[1]: only_caption(s) for s in shards} == texts
    assert [int(s["image"].decode().max()) for s in shards] == [0, 1, 2, 3]


def test_a_member_that_is_there_twice_counts_once(tmp_path):
    members = [("0.png", png(1)), ("0.txt", "first"), ("0.png", png(2)), ("0.jpg", png(3)), ("0.txt", "second")]
    shards = Shards(write_tar(tmp_path / "a.tar", members))
    assert (len(shards), only_caption(shards[0]), int(shards[0]["image"].decode().max())) == (1, "first", 1)
    assert shards.inventory.lines()[0] == f"2 of 5 members; left out: 3 duplicated ({tmp_path}/a.tar: 0.png)"
    assert [(lost.key, lost.reason.split()[0]) for lost in shards.damaged] == [
        ("a/0", "0.png"), ("a/0", "0.jpg"), ("a/0", "0.txt"),
    ]  # fmt: skip


def test_a_broken_tar_keeps_what_is_whole_and_says_what_is_lost(tmp_path):
    members = {f"{i}.{kind}": png() if kind == "png" else "x" for i in range(3) for kind in ("txt", "png")}
    whole = Path(write_tar(tmp_path / "whole.tar", members)).read_bytes()
    header = whole.index(b"1.png")
    damaged = bytearray(whole)
    damaged[header + 20] ^= 1
    cases = {
        "in-header": (
            whole[: header + 200],
            "broken tar: no valid header at byte 3,072; what may",
        ),
        "in-member": (whole[: header + 530], "truncated tar: .* bytes end inside of this member"),
        "damaged": (bytes(damaged), "broken tar: no valid header at byte 3,072; what may have followed"),
        "at-member": (whole[:header], "broken tar: no end mark; what may have followed this member is lost"),
    }
    for name, (data, reason) in cases.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(data)
        shards = Shards(str(path))
        assert [sample["key"] for sample in shards] == [f"{name}/0"], name
        (lost,) = shards.damaged
        assert re.search(reason, lost.reason), lost
        shards.inventory.verify()
        assert (lost.key, lost.shard) == (f"{name}/1.{'png' if name == 'in-member' else 'txt'}", str(path))
    for data in (b"", b"no tar at all" * 100, gzip.compress(whole)):
        (tmp_path / "none.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"none\.tar: no (tar|images)"):
            Shards(str(tmp_path / "none.tar"))
        (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(data))
        with pytest.raises(ValueError, match=rf"^{tmp_path}/packed\.tar\.gz: no (tar|images)"):  # and not its copy
            Shards(str(tmp_path / "packed.tar.gz"))


def test_broken_gzip_is_named_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("INDICLIP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.tar.gz"
    whole = Path(write_tar(path, {"0.png": png(), "0.txt": "x"}, "w:gz")).read_bytes()
    for data in (b"plain", whole[: len(whole) // 2], whole[:60] + b"\0\0\0\0" + whole[64:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.tar\.gz: broken gzip"):
            Shards(str(path))
        assert not [entry for entry in (tmp_path / "cache").iterdir() if not entry.name.startswith(".lock")]


def test_bad_urls_and_classes(tmp_path):
    write_tar(tmp_path / "train-0000.tar", {"0.png": png(), "0.cls": "0"})
    (tmp_path / "x").mkdir()
    write_tar(tmp_path / "x" / "train-0000.tar.gz", {"0.png": png(), "0.cls": "0"}, "w:gz")
    path = str(tmp_path / "train-0000.tar")
    with pytest.raises(FileNotFoundError, match=r"train-0001\.tar: no such file or folder; nearest is 'train-0000"):
        Shards(str(tmp_path / "train-{0000..0001}.tar"))
    with pytest.raises(FileNotFoundError, match=r"val-\*\.tar: no such file"):
        Shards(str(tmp_path / "val-*.tar"))
    with pytest.raises(ValueError, match="urls: no shards given"):
        Shards([])
    (tmp_path / "a.zip").touch()
    with pytest.raises(ValueError, match=r"a\.zip is no shard; expected \.tar, \.tar\.gz or \.tgz"):
        Shards(str(tmp_path / "a.zip"))
    with pytest.raises(ValueError, match="have one name, so keys would be duplicate; make them two sources"):
        Shards([path, str(tmp_path / "x" / "train-0000.tar.gz")])
    with pytest.raises(ValueError, match=r"caption: the template 'a photo' needs a \{\} for the class's name"):
        Shards(path, ["kite"], "a photo")
    with pytest.raises(ValueError, match=r"caption: the template 'a \{\}' needs .*, and `classes`"):
        Shards(path, caption="a {}")
    with pytest.raises(ValueError, match="class 1 is 'kite'; expected one name per class, each once"):
        Shards(path, ["kite", "kite"])
    with pytest.raises(FileNotFoundError, match=r"clases\.txt: no such file or folder"):
        Shards(path, str(tmp_path / "clases.txt"))


def test_damage_found_at_reading_is_unreadable_not_fatal(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": png()[:40], "0.txt": "x", "1.png": png(), "1.txt": "y"})
    shards = Shards(path)
    with pytest.raises(UnreadableSample, match=r"^a/0: damaged PNG"):
        shards[0]["image"].decode()
    os.truncate(path, 100)
    with pytest.raises(UnreadableSample, match=r"^a/1: the shard has become shorter since it was indexed"):
        shards[1]
    Path(path).unlink()
    with pytest.raises(UnreadableSample, match=r"^a/1: .*No such file"):
        pickle.loads(pickle.dumps(shards))[1]
