"""Pictograms named in English and 12 Indian languages in <out>/emoji_multilingual: `images/` and `names.tsv`.

Pictures of Noto Emoji (Apache-2.0), one request each, and names of Unicode CLDR (Unicode licence v3). Only pictograms
that have a name in every language and a picture.

    python tools/prepare_emoji.py
    python tools/prepare_emoji.py --source folder   # with png/128/ and annotations/<language>/annotations.json
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from _download import as_url, download, parser, run, write
from PIL import Image
from rich.progress import track

PICTURES = "https://raw.githubusercontent.com/googlefonts/noto-emoji/main"
NAMES = "https://raw.githubusercontent.com/unicode-org/cldr-json/main/cldr-json/cldr-annotations-full"
LANGUAGES = ("en", "hi", "bn", "ta", "te", "mr", "gu", "kn", "ml", "pa", "or", "as", "ur")
SIDE = 96  # pixels
_VARIATION = "\ufe0f"  # "as a picture": not part of Noto's file names


def names(base: str, out: Path, language: str) -> dict[str, str]:
    """Symbol -> its name (CLDR's text for speech) in a language."""
    file = download(f"{base}/annotations/{language}/annotations.json", out)
    entries = json.loads(file.read_bytes())["annotations"]["annotations"]
    return {symbol: " ".join(entry["tts"][0].split()) for symbol, entry in entries.items() if entry.get("tts")}


def picture(png: bytes) -> bytes:
    """The pictogram as JPEG of 96x96 on white."""
    image = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2), image)
    jpeg = io.BytesIO()
    canvas.save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()


def main(argv: list[str] | None = None) -> None:
    """See the module's docstring."""
    options = parser(__doc__ or "", "a folder or URL with png/128 and annotations/<language>")
    options.add_argument("--limit", type=int, help="stop after so many pictograms")
    arguments = options.parse_args(argv)
    folder = arguments.out / "emoji_multilingual"
    pictures, bases = (as_url(arguments.source or base) for base in (PICTURES, NAMES))
    of_language = [names(bases, arguments.out, language) for language in LANGUAGES]
    symbols = [symbol for symbol in of_language[0] if all(symbol in found for found in of_language)]
    rows, absent = [["file", "symbol", *LANGUAGES]], 0
    for symbol in track(symbols, "pictures", transient=True):
        if arguments.limit and len(rows) > arguments.limit:
            break
        code = "_".join(f"{ord(character):04x}" for character in symbol if character != _VARIATION)
        try:
            png = download(f"{pictures}/png/128/emoji_u{code}.png", arguments.out)
        except FileNotFoundError:  # CLDR names letters and signs too, which have no picture
            absent += 1
            continue
        write(folder / "images" / f"{code}.jpg", picture(png.read_bytes()))
        rows.append([f"{code}.jpg", symbol, *(found[symbol] for found in of_language)])
    if len(rows) == 1:
        raise FileNotFoundError(f"{pictures}/png/128: no picture of {len(symbols)} named symbols")
    write(folder / "names.tsv", "".join("\t".join(row) + "\n" for row in rows))
    print(f"{folder}: {len(rows) - 1} pictograms in {len(LANGUAGES)} languages; {absent} symbols have no picture")


if __name__ == "__main__":
    run(main)
