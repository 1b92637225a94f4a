"""The same images, words and captions in every layout that the benchmark reads."""

import gzip
import io
import json
import tarfile

import pytest
import yaml
from PIL import Image

from indiclip.evals.cards.card import load_card

CARD = {
    "task": "classification",
    "classes": [
        {"id": "masala_dosa", "names": {"en": "masala dosa", "hi": "मसाला डोसा"}, "facts": {"group": "dish"}},
        {"id": "idli", "names": {"en": "idli"}, "facts": {"group": "dish"}},
        {"id": "ladoo", "names": {"en": "laddu"}, "facts": {"group": "sweet"}},
    ],
}
WORDS = {
    "task": "matching",
    "num_candidates": 3,
    "classes": [
        {"id": "devanagari", "names": {"en": "Devanagari"}, "facts": {"sample_words": {"hi": ["भारत", "डाकघर"]}}},
        {"id": "tamil", "names": {"en": "Tamil"}},
    ],
}


@pytest.fixture
def card(tmp_path):
    """Makes a card of the user's: (its content, its name) -> the card."""

    def make(content=CARD, name="food"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
        return load_card(str(tmp_path / f"{name}.yaml"))

    return make


def jpeg(shade, size=(9, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, (shade * 9, 40, 90)).save(file, "JPEG")  # no two shades have the same bytes
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)


def tar(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as target:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else content.encode()
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    return stream.getvalue()


EXPECTED = [(jpeg(1), "masala_dosa"), (jpeg(2), "masala_dosa"), (jpeg(3), "idli"), (jpeg(4), "ladoo")]
FOLDERS = {"masala_dosa/a.jpg": jpeg(1), "masala_dosa/b.jpg": jpeg(2), "idli/a.JPG": jpeg(3), "laddu/a.jpeg": jpeg(4)}
TABLE = "file,class\nx/1.jpg,masala dosa\n2.jpg,masala_dosa\n3.jpg,Idli\n4.jpg,ladoo\n"
TABLE_IMAGES = {"x/1.jpg": jpeg(1), "2.jpg": jpeg(2), "3.jpg": jpeg(3), "4.jpg": jpeg(4)}
SHARD = {"0.jpg": jpeg(1), "0.cls": "0", "1.jpg": jpeg(2), "1.cls": "0\n", "2.jpg": jpeg(3), "2.cls": "1"}
NAMED = {"0.jpg": jpeg(1), "0.cls": "masala_dosa", "1.jpg": jpeg(2), "1.cls": "masala dosa", "2.jpg": jpeg(3)}
LIST = "masala_dosa\nidli\nladoo\n"
LAYOUTS = {
    "folders": FOLDERS,
    "folders of a split": {f"test/{name}": data for name, data in FOLDERS.items()},
    "csv": {"images.csv": TABLE, **TABLE_IMAGES},
    "tsv": {"images.tsv": TABLE.replace(",", "\t"), **{f"images/{k}": v for k, v in TABLE_IMAGES.items()}},
    "shards": {"a.tar": tar(SHARD), "b.tar": tar({"0.jpg": jpeg(4), "0.cls": "2"}), "classes.txt": LIST},
    "packed shards": {
        "test-0.tar.gz": gzip.compress(tar({**SHARD, "3.jpg": jpeg(4), "3.cls": "2"})),
        "classnames.txt": "\ufeffmasala dosa\nidli\nladdu\n",  # as Windows writes it
    },
    "shards with names": {"a.tar": tar({**NAMED, "2.cls": "idli", "3.jpg": jpeg(4), "3.cls": "Laddu"})},
    "clip-benchmark": {
        "classnames.txt": "masala dosa\nidli\nladdu\n",
        "zeroshot_classification_templates.txt": "a photo of {c}\n",
        "test/nshards.txt": "2\n",
        "test/0.tar": tar(SHARD),
        "test/1.tar": tar({"0.jpg": jpeg(4), "0.cls": "2"}),
        "test/2.tar": b"not counted",
    },
    # Another order: the numbers mean other classes.
    "reordered": {
        "classes.txt": "ladoo\nmasala_dosa\nidli\n",
        "a.tar": tar({"0.jpg": jpeg(1), "0.cls": "1", "1.jpg": jpeg(2), "1.cls": "1", "2.jpg": jpeg(3), "2.cls": "2"}),
        "b.tar": tar({"0.jpg": jpeg(4), "0.cls": "0"}),
    },
}
TEXTS = {"a.jpg": "दिल्ली", "b.jpg": "मुंबई", "c.jpg": "भारत"}
MATCHING = {
    "folders": {
        **{f"devanagari/{name}": jpeg(shade) for shade, name in enumerate(TEXTS)},
        **{f"devanagari/{name[0]}.txt": f"{text}\n" for name, text in TEXTS.items()},
        **{"tamil/t.jpg": jpeg(3), "tamil/t.txt": "மதுரை"},
    },
    "table": {
        "words.csv": "file,class,text\n"
        + "".join(f"{name},devanagari,{text}\n" for name, text in TEXTS.items())
        + "t.jpg,Tamil,மதுரை\n",
        **{name: jpeg(shade) for shade, name in enumerate([*TEXTS, "t.jpg"])},
    },
    "shards": {
        "a.tar": tar(
            {f"{name[0]}.{kind}": data for name, text in TEXTS.items()
             for kind, data in (("jpg", jpeg(1)), ("txt", text), ("cls", "devanagari"))}
            | {"t.jpg": jpeg(1), "t.txt": "மதுரை", "t.cls": "tamil"}
        ),
    },
}  # fmt: skip
CAPTIONS = [["one dosa", "a crisp dosa"], ["an idli"]]
COCO = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": "8", "file_name": "b.jpg"}, {"id": 9, "file_name": "c.jpg"}],
    "annotations": [
        {"image_id": 7, "caption": "one dosa"},
        {"image_id": 8, "caption": "an\n idli "},
        {"image_id": 7, "caption": "a crisp dosa"},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "a.jpg", "split": "test", "sentences": [{"raw": text} for text in CAPTIONS[0]]},
        {"filename": "z.jpg", "split": "train", "sentences": []},
        {"filename": "b.jpg", "split": "test", "sentences": [{"raw": "an idli"}]},
    ]
}
CROSSMODAL = [
    {"image/key": "a", "image/locale": "hi", "en": {"caption": CAPTIONS[0]}, "hi": {"caption": ["एक डोसा"]}},
    {"image/key": "b", "en": {"caption": CAPTIONS[1]}, "hi": {"caption": []}},
]
IMAGES = {name: jpeg(shade) for shade, name in enumerate(("a.jpg", "b.jpg", "c.jpg"))}
RETRIEVAL = {
    "coco": {"captions_val2017.json": json.dumps(COCO), **{f"val2017/{name}": data for name, data in IMAGES.items()}},
    "karpathy": {
        "dataset_flickr30k.json": json.dumps(KARPATHY),
        **{f"flickr30k-images/{n}": d for n, d in IMAGES.items()},
    },
    "karpathy with folders": {
        "dataset_coco.json": json.dumps({"images": [{**one, "filepath": "val2014"} for one in KARPATHY["images"]]}),
        **{f"val2014/{name}": data for name, data in IMAGES.items()},
    },
    "crossmodal": {
        "captions.jsonl": "".join(f"{json.dumps(one)}\n" for one in CROSSMODAL),
        **{f"images/{name}": data for name, data in IMAGES.items()},
    },
    "table": {
        "c.csv": "file,caption,hi,symbol\na.jpg,one dosa,एक डोसा,x\na.jpg,a crisp dosa,,y\nb.jpg,an idli,,z\n",
        **IMAGES,
    },
    "shards": {
        "a.tar": tar(
            {
                "a.jpg": IMAGES["a.jpg"],
                "a.txt": "one dosa\n a crisp dosa\n\n",
                "b.jpg": IMAGES["b.jpg"],
                "b.txt": "an idli",
            }
        )
    },
}
