"""Benchmark images among training shards: which were planted there is known."""

import io
import json

import numpy as np
import pytest
import yaml
from bench_fakes import Shades
from experiments import config
from layout_files import tar, write
from PIL import Image

from indiclip.commands.bench_training import TrainingData
from indiclip.evals import overlap, procedural
from indiclip.evals.bench import run_bench
from indiclip.evals.find import find_bench
from indiclip.evals.protocols.protocol import Options


def flag(bench, training, num_workers=0):
    return overlap.flag(bench, TrainingData(training if isinstance(training, list) else [training]), num_workers)


TINTS = {"red": (1.0, 0.6, 0.5), "green": (0.5, 1.0, 0.6), "blue": (0.6, 0.5, 1.0)}
CARD = {"task": "classification", "classes": [{"id": name, "names": {"en": name}} for name in TINTS]}


def scene(seed, tint=(1, 1, 1), height=120, width=160):
    """Blobs, as a photograph has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return (pixels * np.array(tint)).astype(np.uint8)


def encoded(pixels, kind="PNG", size=None, **options):
    image, file = Image.fromarray(pixels), io.BytesIO()
    (image.resize(size) if size else image).save(file, kind, **options)
    return file.getvalue()


FILES = {
    f"test/{name}/{i}.png": (10 * row + i, tint) for row, (name, tint) in enumerate(TINTS.items()) for i in range(7)
}
# Others of these that lie in the training data, in another size, aspect or format.
COPIES = {
    "test/red/0.png": {"kind": "JPEG", "size": (80, 60), "quality": 60},
    "test/green/3.png": {"kind": "WEBP", "size": (200, 200), "quality": 60},
    "test/blue/2.png": {"kind": "JPEG", "size": (320, 240), "quality": 90},
}


@pytest.fixture
def make_bench(tmp_path):
    def make(files, content=CARD, name="tints", **options):
        write(tmp_path / name, files)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content), "utf-8")
        return find_bench(tmp_path, [str(tmp_path / f"{name}.yaml")], **options)

    return make


@pytest.fixture
def training(tmp_path):
    """Shards of the copies, of other pictures, and of one that cannot be read."""
    copies = [encoded(scene(*FILES[name]), **how) for name, how in COPIES.items()]
    others = [encoded(scene(1000 + i), "JPEG", quality=80) for i in range(5)]
    members = {f"{i}.jpg": data for i, data in enumerate([*others, *copies, copies[0][:300]])}
    captions = {f"{i}.txt": f"picture {i}" for i in range(len(members))}
    write(tmp_path, {"train-0.tar": tar(members | captions), "train-1.tar": tar({"a.jpg": others[0], "a.txt": "x"})})
    return str(tmp_path / "train-{0..1}.tar")


PNGS = {name: encoded(scene(*of)) for name, of in FILES.items()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_copies_are_flagged_and_clean_numbers_are_those_without_them(make_bench, training, tmp_path, num_workers):
    """The oracle is a run on the folder from which the copied files were deleted."""
    bench = make_bench(PNGS)
    found = flag(bench, training, num_workers)
    keys = np.array(bench.items[0].keys)
    assert set(keys[bench.items[0].is_flagged]) == set(COPIES)
    counts = {"images": 21, "flagged": 3, "by_bytes": 0, "by_image": 3, "by_caption": 0, "not_comparable": 0}
    counts["looked_for"] = ["bytes", "image"]
    assert found.pop("cards") == {"tints": counts}
    assert list(found.values()) == [10, 0, 9, 1]  # images, texts alone, captions, unreadable
    result = run_bench(Shades(), bench, Options(resamples=20))
    assert {row.key for row in result.predictions if row.flagged} == set(COPIES)
    for name in COPIES:
        (tmp_path / "tints" / name).unlink()
    without = run_bench(Shades(), find_bench(tmp_path, [str(tmp_path / "tints.yaml")]), Options(resamples=20))
    clean = [row._replace(subset="") for row in result.scores if row.subset == "clean"]
    names = {row.metric for row in clean}
    assert {"acc1", "mean_per_class_recall"} <= names
    assert clean == [row for row in without.scores if row.protocol == "zero_shot" and row.metric in names]
    assert not any(row.subset for row in without.scores if row.protocol != "wording")


def test_a_gallery_is_not_looked_for(make_bench, training):
    """Only the copies among the files that are scored count; the gallery comes before them."""
    files = {name.replace("test/", "train/" if "red" in name else "val/"): data for name, data in PNGS.items()}
    bench = make_bench(files)
    found = flag(bench, training)
    flagged = np.array(bench.items[0].keys)[bench.items[0].is_flagged]
    assert set(flagged) == {"val/green/3.png", "val/blue/2.png"}
    assert found["cards"]["tints"]["images"] == 14
    assert found["cards"]["tints"]["flagged"] == 2


def test_pictures_without_structure_are_known_by_their_bytes_alone(make_bench, tmp_path):
    """A blank page is in the training data too, and as another file; one file is broken."""
    blank, other = (encoded(np.full((40, side, 3), 200, np.uint8)) for side in (40, 50))
    bench = make_bench({"red/0.png": blank, "red/1.png": b"broken", "red/2.png": encoded(scene(1)), "red/3.png": other})
    write(tmp_path, {"train.tar": tar({"0.png": blank, "0.txt": "a page"})})
    found = flag(bench, str(tmp_path / "train.tar"))["cards"]["tints"]
    assert (found["by_bytes"], found["by_image"], found["not_comparable"]) == (1, 0, 3)
    assert dict(zip(bench.items[0].keys, bench.items[0].is_flagged.tolist(), strict=True))["red/0.png"]


CHANGED = {"same": lambda x: x, "mirror": lambda x: x[:, ::-1], "crop": lambda x: x[6:-6, 8:-8]}


@pytest.mark.parametrize("kind", ["shards", "folder", "table", "coco", "config"])
def test_training_data_of_any_kind(make_bench, tmp_path, kind):
    """A file of the benchmark as it is, and a mirrored and a cropped one."""
    bench = make_bench({f"red/{i}.png": encoded(scene(i)) for i in range(6)})
    copies = {
        f"{name}.png": encoded(np.ascontiguousarray(change(scene(i))))
        for i, (name, change) in enumerate(CHANGED.items())
    }
    if kind == "shards":
        write(tmp_path, {"train.tar": tar(copies | {name.replace(".png", ".txt"): "x" for name in copies})})
        training = tmp_path / "train.tar"
    else:
        training = tmp_path / "train"
        write(training / "things" if kind == "folder" else training, copies)
    if kind in ("table", "config"):
        write(training, {"t.csv": "file,en\n" + "".join(f"{name},a picture\n" for name in copies)})
        training /= "t.csv"
    if kind == "coco":
        images = [{"id": i, "file_name": name} for i, name in enumerate(copies)]
        for image in images:
            image["width"], image["height"] = Image.open(training / image["file_name"]).size
        content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]}
        write(training, {"t.json": json.dumps(content)})
        training /= "t.json"
    if kind == "config":
        dataset = {
            "class_path": "indiclip.datasets.captions.CaptionTable",
            "init_args": {"images": str(training.parent), "table": str(training)},
        }
        training = tmp_path / "train.yaml"
        training.write_text(yaml.safe_dump(config(data__train__0__dataset=dataset)), "utf-8")
    found = flag(bench, str(training))
    assert found["training_images"] == 3
    found = found["cards"]["tints"]
    assert (found["flagged"], found["by_bytes"], found["by_image"]) == (3, 1, 3)
    assert bench.items[0].is_flagged.tolist() == [True, True, True, False, False, False]


def test_what_is_generated_is_not_read(tmp_path):
    """However long it is: the bar would never end."""
    mela = {"class_path": "indiclip.generated.mela.Mela", "init_args": {"num_scenes": 10**12}}
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(config(data__train__0__dataset=mela)), "utf-8")
    with pytest.raises(ValueError, match=r"train\.yaml: all of data\.train is generated, and is not looked at"):
        TrainingData([str(file)])
    (tmp_path / "texts.txt").write_text("tea\n")
    training = TrainingData([str(file), str(tmp_path / "texts.txt")])
    assert len(training) == 1
    assert len(training.generated) == 1


def test_texts_alone_are_looked_for_in_cards_of_texts_and_of_images(make_bench, tmp_path):
    content = {"protocols": ["indiclip.evals.protocols.bitext.Bitext"]}
    table = "en,hi\ntea,चाय\na street,सड़क\nbread,रोटी\n"
    bench = make_bench({"t.csv": table}, content, "pairs")
    write(tmp_path, {"train.txt": "Tea!\nsomething\n", "more.csv": "hi,ta\nरोटी,x\n"})
    found = flag(bench, [str(tmp_path / "train.txt"), str(tmp_path / "more.csv")])
    assert (found["training_images"], found["training_texts"]) == (0, 3)
    counts = {"images": 3, "flagged": 2, "by_bytes": 0, "by_image": 0, "by_caption": 2, "not_comparable": 0}
    assert found["cards"] == {"pairs": counts | {"looked_for": ["caption"]}}
    assert bench.items[0].is_flagged.tolist() == [True, False, True]
    assert run_bench(Shades(), bench, Options(resamples=20)).scores


def test_what_is_generated_is_new(monkeypatch, training):
    monkeypatch.setattr(procedural, "SWATCHES", {"test": 1, "train": 1})
    bench = find_bench(None, ["indian_colours"])
    assert flag(bench, training)["cards"] == {}
    assert [items.is_flagged.tolist() for items in bench.items] == [[False] * len(bench.items[0])]


CAPTIONS = "file,en,hi\n" + "".join(
    f"{i}.png,{english},{hindi}\n"
    for i, (english, hindi) in enumerate(
        [
            ("A masala dosa on a plate.", "मसाला डोसा"),
            ("Two idlis", "दो इडली"),
            ("A cup of tea", "चाय"),
            ("Poha", "पोहा की थाली"),
            ("A street", "सड़क"),
        ]
    )
)


def test_captions_are_found_whatever_the_picture_and_the_language(make_bench, tmp_path):
    """Training has the first by its words, the second by its Hindi text in a `.json`, the third beside a broken picture
    from which nothing is learned, and the fourth's picture.
    """
    bench = make_bench(
        {"c.csv": CAPTIONS, **{f"{i}.png": encoded(scene(i)) for i in range(5)}}, {"task": "retrieval"}, "dishes"
    )
    copy = encoded(scene(3), "JPEG", size=(100, 75), quality=70)
    members = {
        "0.png": encoded(scene(100)), "0.txt": "a MASALA dosa, on a plate",
        "1.png": encoded(scene(101)), "1.json": json.dumps({"caption": "x", "captions": {"hi": "दो  इडली", "ta": "y"}}),
        "2.png": encoded(scene(102))[:200], "2.txt": "A cup of tea",
        "3.jpg": copy, "3.txt": "breakfast",
        "4.png": encoded(scene(104)), "4.txt": "A street in Pune",
    }  # fmt: skip
    write(tmp_path, {"train.tar": tar(members)})
    found = flag(bench, [str(tmp_path / "train.tar")])
    assert bench.items[0].is_flagged.tolist() == [True, True, False, True, False]
    counts = {"images": 5, "flagged": 3, "by_bytes": 0, "by_image": 1, "by_caption": 2, "not_comparable": 0}
    assert found.pop("cards") == {"dishes": counts | {"looked_for": ["bytes", "image", "caption"]}}
    assert list(found.values()) == [5, 0, 6, 1]
    result = run_bench(Shades(), bench, Options(resamples=20))
    clean = [row for row in result.scores if row.subset == "clean"]
    assert {(row.language, row.num_items) for row in clean} == {("en", 2), ("hi", 2)}
    hits = [row.rank == 0 for row in result.predictions if row.language == "en" and not row.flagged]
    value = {row.metric: row.value for row in clean if (row.language, row.length) == ("en", 3)}["image_to_text_r1"]
    assert value == pytest.approx(np.mean(hits))
