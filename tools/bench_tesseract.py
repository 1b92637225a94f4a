"""Tesseract on the words of the card `ocr_indic`, rendered ones and photographs: the baseline that reads.

    apt-get install tesseract-ocr tesseract-ocr-script-{deva,beng,guru,gujr,orya,taml,telu,knda,mlym,arab,latn}
    python tools/bench_tesseract.py --images photos   # of tools/prepare_ocr_scenes.py

Tesseract is told the script of each image (its data of the script, not of one language) and that the image is a single
line (`--psm 7`); one word (`--psm 8`) by `--psm`. What it read is scored three ways:

- matching: the candidate with the smallest edit distance to what was read, divided by the longer of the two, is the
  answer, among the same candidates that an encoder chooses from; a tie counts against the right one;
- exact: what was read is the word, but for spaces around it and Unicode's ways of writing it (NFC);
- character error rate: edit distance of all words, divided by their length; of code points, so that a missing vowel
  sign is one error. It is above 1 where more is read than is there.

Intervals are 95%, Wilson's; that of the error rate is of a bootstrap over the images.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from indiclip.evals.find import find_bench
from indiclip.evals.images.items import Items
from indiclip.evals.protocols.metrics import Interval, bootstrap_weights, hit_rate, resampled
from indiclip.evals.results import part_of
from indiclip.generated.lettering_words import edit_distance
from indiclip.images import UnreadableSample
from indiclip.preprocessing import read_upright, upright_hw

# A class of the card -> Tesseract's data of its script, and the Debian package that has it.
DATA = {
    "devanagari": ("Devanagari", "deva"), "bengali": ("Bengali", "beng"), "assamese": ("Bengali", "beng"),
    "gurmukhi": ("Gurmukhi", "guru"), "gujarati": ("Gujarati", "gujr"), "odia": ("Oriya", "orya"),
    "tamil": ("Tamil", "taml"), "telugu": ("Telugu", "telu"), "kannada": ("Kannada", "knda"),
    "malayalam": ("Malayalam", "mlym"), "urdu_nastaliq": ("Arabic", "arab"), "latin": ("Latin", "latn"),
}  # fmt: skip
SECONDS = 60  # for an image


class Read(NamedTuple):
    """What was read of an image, beside what is right."""

    script: str
    text: str
    candidates: list[str]  # the right one first


def normal(text: str) -> str:
    """NFC, one space between words, none around them; no characters that are not seen but for joiners."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def is_matched(text: str, candidates: Sequence[str]) -> bool:
    """Whether the first candidate is nearer to a text than every other."""
    right, *others = (edit_distance(text, one) / max(len(text), len(one), 1) for one in map(normal, candidates))
    return right < min(others, default=2.0)


def installed_scripts() -> set[str]:
    """What Tesseract has data of.

    Raises:
        FileNotFoundError: Tesseract is not installed; says what to install.
    """
    if shutil.which("tesseract") is None:
        packages = "tesseract-ocr " + " ".join(sorted({f"tesseract-ocr-script-{code}" for _, code in DATA.values()}))
        raise FileNotFoundError(f"no `tesseract` on PATH; on Debian and Ubuntu: apt-get install {packages}")
    listed = subprocess.run(["tesseract", "--list-langs"], capture_output=True, text=True, check=True)
    return {line.strip().removeprefix("script/") for line in listed.stdout.splitlines()[1:]}


def read(image: Path, script: str, psm: int) -> str:
    """What Tesseract reads on an image; nothing where it takes too long."""
    command = ["tesseract", str(image), "stdout", "-l", DATA[script][0], "--psm", str(psm)]
    alone = os.environ | {"OMP_THREAD_LIMIT": "1"}  # several threads for one image are slower than one
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, env=alone)
    except subprocess.TimeoutExpired:
        return ""
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
    return normal(done.stdout.decode("utf-8", "replace"))


def read_all(items: Items, available: set[str], psm: int, processes: int) -> list[Read]:
    """Every image to score of a script that there is data of; prints what is left out."""
    tested = np.flatnonzero(items.tested_N).tolist()
    scripts = {place: items.card.ids[int(items.labels[place])] for place in tested}
    missing = sorted({script for script in scripts.values() if DATA.get(script, ("",))[0] not in available})
    if missing:
        packages = [f"tesseract-ocr-script-{DATA[script][1]}" for script in missing if script in DATA]
        hint = f"; apt-get install {' '.join(packages)}" if packages else ""
        print(f"left out: no data of Tesseract for {', '.join(missing)}{hint}")
    assert items.candidates is not None

    def one(place: int) -> Read | None:
        image = items.images[place]
        try:
            pixels = read_upright(image, upright_hw(image)).permute(1, 2, 0).numpy()
        except UnreadableSample as error:
            print(f"left out: {error}")
            return None
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            Image.fromarray(pixels).save(file, "PNG")
            file.flush()
            assert items.candidates is not None
            return Read(scripts[place], read(Path(file.name), scripts[place], psm), items.candidates[place])

    wanted = [place for place, script in scripts.items() if script not in missing]
    with ThreadPoolExecutor(processes) as pool:
        return [found for found in pool.map(one, wanted) if found is not None]


def scores(rows: Sequence[Read]) -> tuple[Interval, Interval, Interval]:
    """Matching, exact and character error rate."""
    words = [normal(row.candidates[0]) for row in rows]
    matched = np.array([is_matched(row.text, row.candidates) for row in rows])
    exact = np.array([row.text == word for row, word in zip(rows, words, strict=True)])
    errors = np.array([edit_distance(row.text, word) for row, word in zip(rows, words, strict=True)])
    lengths = np.array(list(map(len, words)))
    weights = bootstrap_weights(len(rows))
    rate = resampled(errors.sum() / lengths.sum(), weights @ errors / (weights @ lengths))
    return hit_rate(matched), hit_rate(exact), rate


def main(argv: list[str] | None = None) -> None:
    """See the module's docstring."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=Path, help="folder with ocr_indic/ (default: rendered words alone)")
    options.add_argument("--no-procedural", action="store_true", help="leave out rendered words")
    options.add_argument("--psm", type=int, default=7, help="Tesseract's page segmentation mode (default: 7, a line)")
    options.add_argument("--processes", type=int, default=1)
    arguments = options.parse_args(argv)
    try:
        available = installed_scripts()
        bench = find_bench(arguments.images, ["ocr_indic"], not arguments.no_procedural)
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    print(
        "| images | script | words | chance | matching | exact | character error rate |\n|---|---|---|---|---|---|---|"
    )
    for items in bench.items:
        rows = read_all(items, available, arguments.psm, arguments.processes)
        for name in ("all", *dict.fromkeys(row.script for row in rows)):
            of_group = [row for row in rows if name in ("all", row.script)]
            if of_group:
                chance = np.mean([1 / len(row.candidates) for row in of_group])
                cells = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in scores(of_group)]
                about = (part_of(items.procedural), name, str(len(of_group)), f"{chance:.2f}")
                print("| " + " | ".join((*about, *cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
