"""Break the files of valid datasets in thousands of ways, and see that no reader crashes or loses something silently.

    python tools/fuzz_readers.py --files 10000

Property: a reader refuses the files in one line that names one of them; or what it uses and what it leaves out by
reason is what the files hold, and every sample can be read or is said to be unreadable. The tests run 500 files of it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import shutil
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from indiclip.commands.pack import read_sample
from indiclip.commands.sources import open_source
from indiclip.datasets.base import SampleDataset
from indiclip.datasets.captions import CaptionTable
from indiclip.datasets.coco import CocoDetection
from indiclip.datasets.points import CountingPoints
from indiclip.evals.images.caption_files import read_caption_file
from indiclip.images import UnreadableSample
from indiclip.webdataset.box_shards import BoxShards
from indiclip.webdataset.shards import read_captions

_LONGEST_MESSAGE = 500  # characters

# What people's tools write where a number, a text or a list is expected, and what breaks programs.
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 1.0, 0.5, -0.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf")),
    *("", " ", "0", "1", "7", "3.5", "false", "nan", "x", "\ud800", "a\nb", "\0", "पतंग", "x" * 9999, "\ufeffx"),
    *("../a.png", "./a.png", "sub\\a.png", "/etc/passwd", "a.png", "b.png", "y" * 300 + ".png"),
    *([], {}, [[]], [1], [1, 2], [0, 0, 1, 1], [-1.5, 0, 9, 9], [3, 3, 0.2, 5], ["a"], {"a": 1}, {"en": "x"}, [None]),
]
_PIECES = (b'"', b"\n", b"\r\n", b"\t", b",", b"\0", b"\xe9", b"\xff\xfe", b"{", b"]", b"NaN", b"1")
_ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "cp1252", "utf-32")


class Reader(NamedTuple):
    """A format.

    Attributes:
        write: Writes valid files into an empty folder.
        read: Reads the folder as a user would; None where that gives no dataset.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], SampleDataset | None]


def mutated(content: bytes, name: str) -> st.SearchStrategy[bytes]:
    """The bytes of a file, changed: a `.json` by its values and structure too."""
    changed = _changed_bytes(content)
    if name.endswith(".json"):
        return st.one_of(*[_changed_tree(json.loads(content))] * 4, changed)
    return changed


@st.composite
def _changed_tree(draw: st.DrawFn, tree: Any) -> bytes:
    box = [copy.deepcopy(tree)]
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(box))
        if not places:
            break
        parent, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace"] * 4 + ["as text", "remove", "repeat", "exchange", "rename", "wrap"]))
        if how == "remove":
            del parent[key]
        elif how == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif how == "exchange":
            other, where = draw(st.sampled_from(places))
            parent[key] = copy.deepcopy(other[where])
        elif how == "rename" and isinstance(parent, dict):
            parent[f"{key}s"] = parent.pop(key)
        elif how == "as text":
            parent[key] = json.dumps(parent[key])
        elif how == "wrap":
            parent[key] = [parent[key]]
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return json.dumps(box[0] if box else None, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


def _places(tree: Any) -> Any:
    """(parent, key) of every value below the top."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


@st.composite
def _changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    place = draw(st.integers(0, len(content)))
    how = draw(st.sampled_from(["cut", "insert", "overwrite", "remove", "encode", "empty"]))
    if how == "cut":
        return content[:place]
    if how == "encode":
        text = content.decode(errors="replace")
        return text.encode(draw(st.sampled_from(_ENCODINGS)), errors="replace")
    if how == "empty":
        return b""
    piece = draw(st.sampled_from(_PIECES))
    end = place if how == "insert" else place + draw(st.integers(1, 8))
    return content[:place] + (b"" if how == "remove" else piece) + content[end:]


def check(reader: Reader, folder: Path) -> str:
    """`used`, or `refused` in one line.

    Raises:
        AssertionError: Neither.
    """
    names = [path.name for path in folder.rglob("*")] + [str(folder)]
    message = ""
    try:
        dataset = reader.read(folder)
    except (ValueError, FileNotFoundError) as error:
        dataset, message = None, str(error)
    if message:
        _check_message(message)
        assert any(name in message for name in names), f"names no file: {message}"
        return "refused"
    if dataset is None:
        return "used"
    dataset.inventory.verify()
    assert dataset.inventory.lines()
    assert len({dataset.key(i) for i in range(len(dataset))}) == len(dataset)
    for i in range(len(dataset)):
        assert dataset.group(i)
        assert all(isinstance(text, str) and text for texts in dataset.captions(i).values() for text in texts)
        try:
            sample = dataset[i]
            height, width = np.asarray(sample["image"]).shape[:2]
        except UnreadableSample as error:
            _check_message(str(error))
            continue
        if sample.get("annotated_upright") and sample["image"].orientation >= 5:
            height, width = width, height
        if "boxes_xyxy" in sample:
            boxes = sample["boxes_xyxy"]
            assert ((boxes >= 0) & (boxes <= [width, height, width, height])).all()
        if "points_xy" in sample:
            assert ((sample["points_xy"] >= 0) & (sample["points_xy"] < [width, height])).all()
    return "used"


def _check_message(message: str) -> None:
    assert message
    assert "\n" not in message, repr(message)
    assert len(message) < _LONGEST_MESSAGE, f"{len(message)} characters: {message[:700]}"


def run(name: str, files: int, derandomize: bool = True, random_seed: int = 0) -> Counter[str]:
    """Mutate one format so many times, in a folder of its own.

    Returns:
        How many files were `used` and `refused`.
    """
    reader, counts = READERS[name], Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        valid, folder = Path(place, "valid"), Path(place, "data")
        valid.mkdir()
        reader.write(valid)
        files_in = [path for path in sorted(valid.rglob("*")) if path.is_file()]
        contents = {str(path.relative_to(valid)): path.read_bytes() for path in files_in}
        # Annotations rather than images, of which there are more.
        texts = [name for name in contents if not name.endswith((".png", ".jpg"))]

        @settings(
            max_examples=files,
            derandomize=derandomize,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def one_file(data: st.DataObject) -> None:
            changed = data.draw(st.sampled_from([*texts * 8, *contents]))
            content = data.draw(mutated(contents[changed], changed))
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(valid, folder)
            (folder / changed).write_bytes(content)
            counts[check(reader, folder)] += 1

        (one_file if derandomize else seed(random_seed)(one_file))()
    return counts


_GRID = {"size": [256, 256], "counts": [0, 256 * 256]}
_BODY = {"dp_masks": [_GRID, []], "dp_x": [0, 255], "dp_y": [9, 9.5], "dp_I": [1, 24], "dp_U": [0, 1], "dp_V": [0.5, 1]}
_COCO: dict[str, Any] = {
    "info": {"year": 2026},
    "images": [
        {"id": 7, "file_name": "a.png", "width": 8, "height": 6, "captions": ["a kite", "पतंग"]},
        {"id": 30, "file_name": "b.png", "width": 6, "height": 6},
        {"id": 31, "file_name": "a.png", "width": 8, "height": 6},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 1, 4, 4.5], "iscrowd": 0, "area": 18,
         "segmentation": [[1, 1, 5, 1, 5, 5]], **_BODY},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 6], "segmentation": []},
        {"id": 3, "image_id": 30, "category_id": 1, "bbox": [0, 0, 0.5, 6], "iscrowd": 1,
         "segmentation": {"size": [6, 6], "counts": [6, 30]}},
    ],
    "categories": [{"id": 90, "name": "kite"}, {"id": 1, "name": "person"}],
}  # fmt: skip
_CAPTIONS = {
    "annotations": [{"id": 4, "image_id": 7, "caption": "x"}, {"id": 5, "image_id": 99, "caption": "far"}],
}
_POINTS: list[dict[str, Any]] = [
    {"file_name": "a.png", "class_name": "kite", "count": 2, "points": [[1, 2], [7.5, 4]],
     "boxes": [[0, 0, 2, 4], [5, 0, 4, 6]], "width": 8, "height": 6},
    {"file_name": "b.png", "class_name": "diya", "count": 1, "points": [[6.5, 0]], "boxes": None},
    {"file_name": "c.jpg", "class_name": "kite", "count": 0, "points": []},
]  # fmt: skip


def _write(folder: Path, **contents: Any) -> None:
    """Three images, and a `.json` of each content."""
    for name, size in (("a.png", (8, 6)), ("b.png", (6, 6)), ("c.jpg", (5, 4))):
        Image.new("RGB", size, "red").save(folder / name)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _read_coco(folder: Path) -> SampleDataset:
    captions = str(folder / "captions.json") if (folder / "captions.json").exists() else None
    return CocoDetection(str(folder), str(folder / "instances.json"), captions, masks=True, densepose=True)


def _read_selected_coco(folder: Path) -> SampleDataset:
    return CocoDetection(str(folder), str(folder / "instances.json"), keep_empty=False, captioned=True)


def _read_as_pack(folder: Path) -> None:
    source = open_source(str(folder / "instances.json"))
    for i in range(len(source.keys)):
        if reason := read_sample(source, i).reason:
            _check_message(reason)


def _write_box_shard(folder: Path) -> None:
    _write(folder)
    (folder / "c.jpg").unlink()
    for name, image in (("a", _COCO["images"][0]), ("b", _COCO["images"][1])):
        boxes = [{**one, "class": 0} for one in _COCO["annotations"] if one["image_id"] == image["id"]]
        (folder / f"{name}.json").write_text(json.dumps({**image, "annotations": boxes}), encoding="utf-8")


def _read_box_shard(folder: Path) -> SampleDataset:
    shard = folder / "boxes.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(folder.glob("*.*")):
            if path != shard:
                tar.add(path, path.name)
    return BoxShards(str(shard), ["kite"], masks=True, densepose=True)


def _read_points(folder: Path) -> SampleDataset:
    return CountingPoints(str(folder), str(folder / "counting.json"))


def _read_captions(folder: Path) -> None:
    read_caption_file(folder / "captions.json")


def _write_table(folder: Path, kind: str) -> None:
    _write(folder)
    rows = [
        ("file", "en", "hi-Latn", "id"),
        ("a.png", 'a "kite", red', "patang", "1"),
        ("b.png", "one\ntwo", "", "2"),
        ("c.jpg", "", "दीया", "3"),
        ("a.png", '6" tall', "ek\tdo", "4"),
    ]
    if kind == "parquet":
        header, *cells = rows
        columns = dict(zip(header, map(list, zip(*cells, strict=True)), strict=True))
        parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
        return
    with (folder / f"t.{kind}").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, "excel" if kind == "csv" else "excel-tab").writerows(rows)


def _read_table(folder: Path, on_bad_row: Any) -> SampleDataset:
    return CaptionTable(str(folder), str(next(folder.glob("t.*"))), on_bad_row=on_bad_row)


def _write_names(folder: Path) -> None:
    names = ["1.jpg", "दीया.PNG", "2.gif", "2.txt", "3.txt", ".x.png", "y.heic", "z", "[4].jfif", "c d.json"]
    (folder / "names.json").write_text(json.dumps(names), encoding="utf-8")


def _read_folder_as_pack(folder: Path) -> None:
    """A folder of files that are called by the texts of `names.json`, where a file system takes them."""
    try:
        tree = json.loads((folder / "names.json").read_bytes())
    except (ValueError, RecursionError):
        tree = {}
    texts = [str(parent[key]) for parent, key in _places(tree) if isinstance(parent[key], str | int | None)]
    photos = folder / "photos"
    photos.mkdir()
    for place, name in enumerate(texts):
        path = photos / ("", "a", "a/deep")[place % 3 if len(texts) % 2 else 0] / name
        try:
            if path.resolve().is_relative_to(photos):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"x")
        except (ValueError, OSError):
            continue
    _read_source_as_pack(str(photos))


def _read_source_as_pack(path: str) -> None:
    source = open_source(path, on_bad_row="skip")
    source.inventory.verify()
    for i in range(len(source.keys)):
        try:
            read_captions(source[i].texts, {})
        except (OSError, ValueError) as error:
            _check_message(str(error))


_RETRIEVAL = {
    "images": _COCO["images"][:2],
    "annotations": [{"image_id": 7, "caption": "a kite"}, {"image_id": 30, "caption": "x"}],
}
READERS: dict[str, Reader] = {
    "coco": Reader(lambda folder: _write(folder, instances=_COCO), _read_coco),
    "coco with captions": Reader(lambda folder: _write(folder, instances=_COCO, captions=_CAPTIONS), _read_coco),
    "coco, selected": Reader(lambda folder: _write(folder, instances=_COCO), _read_selected_coco),
    "coco, packed": Reader(lambda folder: _write(folder, instances=_COCO), _read_as_pack),
    "coco, benchmark": Reader(lambda folder: _write(folder, captions=_RETRIEVAL), _read_captions),
    "box shard": Reader(_write_box_shard, _read_box_shard),
    "points": Reader(lambda folder: _write(folder, counting=_POINTS), _read_points),
    **{
        f"{kind} table{word}": Reader(partial(_write_table, kind=kind), partial(_read_table, on_bad_row=on_bad_row))
        for kind in ("csv", "tsv", "parquet")
        for word, on_bad_row in (("", "error"), (", bad rows skipped", "skip"))
    },
    "table, packed": Reader(
        partial(_write_table, kind="csv"), lambda folder: _read_source_as_pack(str(folder / "t.csv"))
    ),
    "folder, packed": Reader(_write_names, _read_folder_as_pack),
}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--files", type=int, default=10_000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="*", default=list(READERS), choices=list(READERS))
    options = parser.parse_args(arguments)
    each, total, began = -(-options.files // len(options.readers)), 0, time.monotonic()
    for name in options.readers:
        counts = run(name, each, derandomize=False, random_seed=options.seed)
        total += counts.total()
        said = "  ".join(f"{count:7,} {what}" for what, count in sorted(counts.items()))
        print(f"{name:24} {counts.total():7,} files: {said}", flush=True)
    print(f"{total:,} files in {time.monotonic() - began:.0f} s: none crashed a reader or lost something silently")


if __name__ == "__main__":
    main()
