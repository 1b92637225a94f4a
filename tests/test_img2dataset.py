"""Folders as img2dataset writes them: against a layout made by hand, with what its writer puts into tar and table."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from indiclip.loading.source import Source
from indiclip.loading.steps import Steps
from indiclip.preprocessing import Preprocessing
from indiclip.webdataset.img2dataset import Img2dataset

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write(folder, shard, rows, in_tar=lambda row: row["status"] == "success", hashes=True, draw=jpeg):
    """Rows are (status, picture or error, caption); members and columns as img2dataset's WebDatasetSampleWriter."""
    metas = []
    with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
        for number, (status, picture, caption) in enumerate(rows):
            good = status == "success"
            meta = {
                "url": f"https://example.org/{shard}/{number}.jpg", "caption": caption, "similarity": 0.3,
                "key": f"{shard:05d}{number:04d}", "status": status, "error_message": None if good else picture,
                "width": 32 if good else None, "height": 24 if good else None, "original_width": 32 if good else None,
                "original_height": 24 if good else None, "exif": "{}" if good else None,
            }  # fmt: skip
            if hashes:
                meta["sha256"] = f"{picture:064x}" if good else None
            metas.append(meta)
            if not in_tar(meta):
                continue
            members = {
                "jpg": draw(picture),
                "txt": (caption or "").encode(),
                "json": json.dumps(meta, indent=4).encode(),
            }
            for name, data in members.items():
                info = tarfile.TarInfo(f"{meta['key']}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist(metas), folder / f"{shard:05d}.parquet")
    statistics = {"count": len(rows), "successes": sum(row[0] == "success" for row in rows)}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(statistics))


ROWS = [
    [("success", 1, "a kite"), ("failed_to_download", "HTTP Error 404", "gone"), ("success", 2, "a drum")],
    [("success", 1, "the kite again"), ("success", 3, ""), ("failed_to_resize", "Image decoding error", "x"),
     ("failed_to_download", "timed out", "y"), ("success", 4, "एक दीया")],
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for number, rows in enumerate(ROWS):
        write(tmp_path, number, rows)
    return tmp_path


def test_rows_are_used_or_counted_under_a_reason(folder):
    dataset = Img2dataset(str(folder))
    assert [dataset.key(i) for i in range(len(dataset))] == ["00000/000000000", "00000/000000002", "00001/000010004"]
    assert dataset.captions(2) == {"": ["एक दीया"]}
    rows = dataset.inventory.summary()["rows"]
    assert (rows["present"], rows["used"]) == (8, 3)
    left_out = {reason: (found["count"], found["example"]) for reason, found in rows["left_out"].items()}
    assert left_out == {
        "failed to download": (2, "00000.parquet row 2: HTTP Error 404"),
        "failed to resize": (1, "00001.parquet row 3: Image decoding error"),
        "whose picture was there before": (1, "00001.parquet row 1"),
        "without a caption": (1, "00001.parquet row 2"),
    }
    dataset.inventory.verify()


def test_duplicates_may_stay(folder):
    dataset = Img2dataset(str(folder), duplicates=True)
    assert len(dataset) == 4
    assert dataset.captions(2) == {"": ["the kite again"]}


def test_what_is_in_one_of_shard_and_table_alone(tmp_path):
    """A member without a row is used; a row without a member is counted."""
    rows = [("success", number, "a kite") for number in range(3)]
    write(tmp_path, 0, rows, in_tar=lambda row: row["key"] != "000000000")
    table = pq.read_table(tmp_path / "00000.parquet")
    pq.write_table(table.slice(0, 2), tmp_path / "00000.parquet")
    dataset = Img2dataset(str(tmp_path))
    assert [dataset.key(i) for i in range(len(dataset))] == ["00000/000000001", "00000/000000002"]
    rows = dataset.inventory.summary()["rows"]
    assert rows["left_out"] == {"whose image is not in the shard": {"count": 1, "example": "00000.parquet row 1"}}
    dataset.inventory.verify()


def test_samples_train_as_those_of_any_shards(folder):
    source = Source("contrastive", Img2dataset(str(folder)), 3, max_tokens=16)
    batch = Steps([source], 0, Preprocessing(8), train=True)[0]["contrastive"]
    assert sorted(batch["keys"]) == ["00000/000000000", "00000/000000002", "00001/000010004"]
    assert batch["images"]["sizes_hw"] == [(24, 32)] * 3
    assert sorted(batch["targets"]["caption"]) == ["a drum", "a kite", "एक दीया"]


def test_wrong_folders_are_one_line(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: found no .tar; expected what `img2dataset"):
        Img2dataset(str(tmp_path / "empty"))
    write(tmp_path / "empty", 0, ROWS[0], hashes=False)
    with pytest.raises(ValueError, match=r"00000.parquet: found none of the columns sha256.*duplicates: true"):
        Img2dataset(str(tmp_path / "empty"))
    assert len(Img2dataset(str(tmp_path / "empty"), duplicates=True)) == 2
    (folder / "00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001.parquet: no such file"):
        Img2dataset(str(folder))
