"""HTML pages that stand alone: the shell, elements, tables, pictures. Words are escaped unless they are `Html`."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans Devanagari", sans-serif; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.lead { opacity: .7; margin-top: .2rem; }
table { border-collapse: collapse; } th { text-align: left; }
td, th { padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; } .curves img { max-width: 100%; background: #fff; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; image-rendering: auto; border-radius: 4px; }
figcaption { white-space: pre-line; font-size: 13px; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: 12px; }
"""


class Html(str):
    """A piece of a page, as against words that are still to be escaped."""


def text(words: str) -> Html:
    """Words as a piece of a page."""
    return words if isinstance(words, Html) else Html(html.escape(words))


def many(parts: Iterable[str]) -> Html:
    """The parts one after the other."""
    return Html("".join(map(text, parts)))


def tag(name: str, *inside: str, **attributes: str | None) -> Html:
    """An element. Attributes that are None are left out; `class_` is `class`."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{words}>{many(inside)}</{name}>")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, class_: str | None = None) -> Html:
    """A table that can be scrolled sideways on a narrow screen.

    Args:
        head: Names of the columns.
        rows: Cells; a cell that is a `td` already stays as it is.
        words: How many columns from the left are words; the others are numbers.
        class_: Of the table.
    """
    names = many(tag("th", name, class_=_kind(i, words)) for i, name in enumerate(head))
    body = many(tag("tr", *(_cell(cell, _kind(i, words)) for i, cell in enumerate(row))) for row in rows)
    content = tag("table", tag("thead", tag("tr", names)), tag("tbody", body), class_=class_)
    return tag("div", content, class_="scroll", tabindex="0")


def _kind(column: int, words: int) -> str | None:
    return None if column < words else "number"


def _cell(cell: str, kind: str | None) -> Html:
    return cell if isinstance(cell, Html) and cell.startswith("<td") else tag("td", cell, class_=kind)


def details(summary: str, *inside: str) -> Html:
    """What is folded away until it is asked for."""
    return tag("details", tag("summary", summary), *inside)


def small_print(words: str) -> Html:
    """A paragraph of words that are less important."""
    return tag("p", tag("small", words))


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page that loads nothing."""
    head = many(
        [
            Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            tag("title", title),
            Html(f"<style>{STYLE}{style}</style>"),
        ]
    )
    return f'<!doctype html><html lang="en">{head}{tag("body", *body)}</html>'


def readable(value: float | None) -> str:
    """A metric's value for people; None stands for one that is not finite."""
    return "not finite" if value is None else f"{value:.4g}"


def png(image_HW3: np.ndarray) -> bytes:
    """At least 240 pixels wide, enlarged without blur, so that small pictures can be looked at."""
    picture = Image.fromarray(image_HW3)
    factor = max(1, -(-240 // picture.width))
    return _encoded(picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST), "PNG")


def thumbnail(image_HW3: np.ndarray, longest: int = 240) -> bytes:
    """A small JPEG."""
    picture = Image.fromarray(image_HW3)
    picture.thumbnail((longest, longest))
    return _encoded(picture, "JPEG", quality=80, optimize=True)


def _encoded(picture: Image.Image, kind: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def image(content: bytes, words: str = "") -> Html:
    """An `img` that holds a PNG or a JPEG."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Html(f'<img loading="lazy" alt="{html.escape(words)}" src="{data}">')
