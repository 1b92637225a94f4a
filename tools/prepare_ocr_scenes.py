"""Photos with word polygons and transcripts -> images of the cards `ocr_indic` (words cut out) and `ocr_scenes`.

    python tools/prepare_ocr_scenes.py $INDICLIP_DATA/india_ocr_scenes photos
    indiclip bench --model MODEL --images photos --cards ocr_indic ocr_scenes

SCENES has `scenes.json` and `images/`: a list of photos, each with `file_name` and `words` of `polygon` ([[x, y], ...],
pixels), `text`, `script`, `language`, `text_is_romanised`. Written are

    OUT/ocr_indic/words.tsv    file, class (the script's id on the card), text; an upright crop of each word in images/
    OUT/ocr_scenes/words.tsv   file, word, script; the photos as they are in images/

`--rendered FOLDER` writes FOLDER/ocr_indic beside them: the same words drawn on pictures of the same shape, in the
benchmark's test fonts, so that scores on both differ by the pictures alone.

Left out, and counted: romanised transcripts, marked or seen by their letters (what they say is not what is written),
transcripts without a letter, scripts that are not on the card, polygons outside of the photo, and words too small to
be read, which `ocr_scenes` does not ask for either.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _download import run, write
from PIL import Image

from indiclip.datasets.scripts import scripts
from indiclip.datasets.tables import stable_hash
from indiclip.evals.cards.card import load_card
from indiclip.generated.fonts import find_face
from indiclip.generated.lettering import SCRIPTS
from indiclip.generated.lettering_draw import draw_word
from indiclip.images import read_image

# Names that data sets give to scripts -> ids on the card; Assamese is told from Bengali by the word's language.
ALIASES = {
    "bangla": "bengali",
    "bengali_assamese": "bengali",
    "oriya": "odia",
    "english": "latin",
    "urdu": "urdu_nastaliq",
}
ASSAMESE = ("assamese", "assamesse", "as")
WRITTEN_IN = {"assamese": "Bengali", "urdu_nastaliq": "Arabic", "ol_chiki": "Ol Chiki", "meetei_mayek": "Meetei Mayek"}
SIDE = 96  # pixels of a drawn word's shorter side

Box = tuple[int, int, int, int]  # (x1, y1, x2, y2) in whole pixels


def script_of(word: dict[str, Any]) -> str:
    """The id of a word's class on the card, or what its script is called where it has none."""
    name = str(word.get("script", "")).strip().lower().replace(" ", "_")
    found = ALIASES.get(name, name)
    is_assamese = str(word.get("language", "")).strip().lower() in ASSAMESE
    return "assamese" if found == "bengali" and is_assamese else found


def why_left_out(word: dict[str, Any], known: list[str]) -> str:
    """The reason for which a word is not used whatever its size; "" where there is none."""
    if word.get("text_is_romanised"):
        return "with a romanised transcript"
    script = script_of(word)
    if script not in known:
        return f"in a script that is not on the card ({script or 'not said'})"
    found = scripts(str(word["text"]))
    if not found:
        return "without a letter in the transcript"
    if found != (WRITTEN_IN.get(script, script.capitalize()),):
        return f"with a transcript in another script ({script} written as {' + '.join(found)})"
    return ""


def box_of(polygon: list[list[float]], width: int, height: int, margin: float) -> Box:
    """The upright box around a polygon, wider by a share of its height, within the photo."""
    xs, ys = zip(*polygon, strict=True)
    by = margin * (max(ys) - min(ys))
    x1, y1, x2, y2 = min(xs) - by, min(ys) - by, max(xs) + by, max(ys) + by
    return max(int(x1), 0), max(int(y1), 0), min(round(x2), width), min(round(y2), height)


def words_of(
    scene: dict[str, Any], size: tuple[int, int], min_height: int, margin: float, left_out: Counter[str]
) -> Iterator[tuple[str, Box, str, str]]:
    """The words of a photo of a size (width, height) that can be asked for: name of the crop, box, class and text."""
    known = load_card("ocr_indic").ids
    for number, word in enumerate(scene["words"]):
        heights = [y for _, y in word["polygon"]]
        box = box_of(word["polygon"], *size, margin)
        if why := why_left_out(word, known):
            left_out[why] += 1
        elif box[2] <= box[0] or box[3] <= box[1]:
            left_out["outside of the photo"] += 1
        elif max(heights) - min(heights) < min_height:
            left_out[f"less than {min_height} px high"] += 1
        else:
            text = unicodedata.normalize("NFC", " ".join(str(word["text"]).split()))
            yield f"{Path(scene['file_name']).stem}-{number:03}.jpg", box, script_of(word), text


def prepare(
    folder: Path, out: Path, min_height: int, margin: float, rendered: Path | None = None
) -> tuple[Counter[str], Counter[str]]:
    """Writes both cards' folders, and the words drawn where asked.

    Returns:
        The words that were kept by class, and those left out by reason.
    """
    scenes = json.loads((folder / "scenes.json").read_text("utf-8"))
    if not isinstance(scenes, list) or not scenes:
        raise ValueError(f"{folder / 'scenes.json'}: expected a list of photos with `file_name` and `words`")
    crops, words, left_out = [("file", "class", "text")], [("file", "word", "script")], Counter[str]()
    for scene in scenes:
        name = scene["file_name"]
        photo = folder / "images" / name
        pixels = Image.fromarray(read_image(photo, name).decode())
        for crop, box, script, text in words_of(scene, pixels.size, min_height, margin, left_out):
            cut = pixels.crop(box)
            write(out / "ocr_indic" / "images" / crop, jpeg(cut))
            if rendered:
                write(rendered / "ocr_indic" / "images" / crop, jpeg(draw(crop, text, script, cut.size)))
            crops.append((crop, script, text))
            words.append((name, text, script))
            write(out / "ocr_scenes" / "images" / name, photo.read_bytes())
    if len(crops) == 1:
        raise ValueError(f"{folder / 'scenes.json'}: no word is left; left out: {dict(left_out)}")
    for card, rows in {"ocr_indic": crops, "ocr_scenes": words}.items():
        table = io.StringIO()
        csv.writer(table, "excel-tab", lineterminator="\n").writerows(rows)
        write(out / card / "words.tsv", table.getvalue())
        if rendered and card == "ocr_indic":
            write(rendered / card / "words.tsv", table.getvalue())
    return Counter(script for _, script, _ in crops[1:]), left_out


def jpeg(image: Image.Image) -> bytes:
    """As a file of high quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def draw(name: str, text: str, script: str, size: tuple[int, int]) -> Image.Image:
    """A word on a picture with the aspect of a size (width, height); a function of its name and the arguments."""
    face = find_face(SCRIPTS["bengali" if script == "assamese" else script].fonts["test"])  # one script
    scale = SIDE / min(size)
    size_hw = round(size[1] * scale), round(size[0] * scale)
    return Image.fromarray(draw_word(np.random.default_rng(stable_hash(name)), text, face, size_hw))


def main(argv: list[str] | None = None) -> None:
    """See the module's docstring."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("scenes", type=Path, metavar="SCENES", help="folder with scenes.json and images/")
    options.add_argument("out", type=Path, metavar="OUT", help="for ocr_indic/ and ocr_scenes/")
    options.add_argument("--min-height", type=int, default=16, help="of a word's polygon, in pixels (default: 16)")
    options.add_argument("--margin", type=float, default=0.1, help="around a word, of its height (default: 0.1)")
    options.add_argument(
        "--rendered", type=Path, metavar="FOLDER", help="draw the same words too, for FOLDER/ocr_indic/"
    )
    arguments = options.parse_args(argv)
    kept, left_out = prepare(
        arguments.scenes, arguments.out, arguments.min_height, arguments.margin, arguments.rendered
    )
    print(f"{arguments.out}: {kept.total():,} words ({', '.join(f'{name} {n:,}' for name, n in kept.most_common())})")
    for why, count in left_out.most_common():
        print(f"  left out: {count:,} words {why}")


if __name__ == "__main__":
    run(main)
