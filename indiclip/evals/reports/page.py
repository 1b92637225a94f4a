"""HTML pages that stand alone, from the templates beside this file: every word that is put into them is escaped."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from indiclip import json_lines
from indiclip.evals import formatting
from indiclip.evals.reports.fonts import page_fonts
from indiclip.evals.suites import has_mean
from indiclip.masking import mask
from indiclip.names import plain


def write_page(file: Path, template: str, **values: Any) -> Path:
    """Write a page that loads nothing, and has its fonts in it where it is HTML; the folder is made.

    Args:
        file: Where.
        template: Name of a file in `templates`.
        values: What it shows.

    Returns:
        The file.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    page = "\n".join(map(plain, mask(TEMPLATES.get_template(template).render(values)).split("\n")))
    if template.endswith(".html"):
        fonts = page_fonts(page)
        # Words cannot be taken for these places: in words, < is escaped.
        page = page.replace("<!--fonts-->", fonts.css, 1)
        page = page.replace("<!--missing fonts-->", f'<p class="note">{fonts.missing}</p>' if fonts.missing else "", 1)
    json_lines.write_whole(file, page.encode())
    return file


def readable(value: float | None) -> str:
    """A metric's value for people; None stands for one that is not finite."""
    return "not finite" if value is None else f"{value:.4g}"


def large(image_HW3: np.ndarray, quality: int = 85) -> str:
    """A WebP, a third of a PNG, as a data URI; at least 240 pixels wide, enlarged without blur, so that small pictures
    can be looked at.
    """
    picture = Image.fromarray(image_HW3)
    factor = max(1, -(-240 // picture.width))
    enlarged = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return webp(enlarged, quality)


def webp(picture: Image.Image, quality: int = 70) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "WebP", quality=quality)
    return data_uri(buffer.getvalue(), "webp")


def data_uri(content: bytes, kind: str) -> str:
    """What an `img` loads without a file, of a `webp` or an `svg+xml`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=select_autoescape(),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
# Templates may call every function of `formatting`.
TEMPLATES.globals |= vars(formatting) | {
    "readable": readable,
    "isfinite": math.isfinite,
    "zip": zip,
    "has_mean": has_mean,
}
_FILTERS = ("language_name", "markdown_cell", "number", "suite_name", "words")
TEMPLATES.filters |= {name: getattr(formatting, name) for name in _FILTERS}
