"""Encoded images -> pixels, the same for every dataset.

Only JPEG, PNG and WebP, told by their first bytes and never by a file's name. EXIF rotation is not applied: boxes and
points are in the frame of the file as stored (COCO), and a decoder that rotates would move the image away from them.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 100_000_000  # more is taken for a decompression bomb

_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # PIL's names for 16-bit grey


class UnreadableSample(ValueError):
    """A sample whose bytes cannot be used. It is counted and replaced; it never ends a run.

    Args:
        key: The sample's key.
        reason: What is wrong with it.
        file: The shard or file that it lies in.
    """

    def __init__(self, key: str, reason: str, file: str = "") -> None:
        super().__init__(key, reason, file)
        self.key, self.reason, self.file = key, reason, file

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


def decode(data: bytes, key: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one image.

    Transparent pixels are laid on white, palettes and grey become RGB, and 16-bit channels keep their high byte.

    Args:
        data: The file's bytes.
        key: Names the sample in errors.
        max_pixels: Read from the header before anything is decoded.

    Returns:
        uint8 (height, width, 3), RGB, in the orientation of the file as stored.

    Raises:
        UnreadableSample: Another format, too many pixels, damaged or truncated bytes.
    """
    kind = _format(data, key)
    try:
        if kind == "JPEG" and (pixels := _decode_jpeg(data, key, max_pixels)) is not None:
            return pixels
        with _open(io.BytesIO(data), kind) as image:
            _check_size(image.width, image.height, key, max_pixels)
            return np.array(to_rgb(image))
    except UnreadableSample:
        raise
    except Image.DecompressionBombError as error:  # PIL has a limit of its own
        raise UnreadableSample(key, str(error)) from error
    except Exception as error:  # damaged bytes raise anything in PIL: OSError, SyntaxError, struct.error, zlib.error
        raise UnreadableSample(key, f"damaged {kind}: {' '.join(str(error).split())}") from error


def read_image(path: Path, key: str) -> np.ndarray:
    """Decode a file; see `decode`."""
    try:
        return decode(path.read_bytes(), key)
    except OSError as error:
        raise UnreadableSample(key, f"{path}: {error.strerror}") from error


def read_size_hw(path: Path) -> tuple[int, int]:
    """(height, width) in pixels, from a file's header alone.

    Raises:
        ValueError: The file is no readable image, naming it.
    """
    with path.open("rb") as file:
        kind = _format(file.read(16), str(path))
        file.seek(0)
        try:
            with _open(file, kind) as image:
                return image.height, image.width
        except Exception as error:
            raise UnreadableSample(str(path), f"damaged {kind}: {error}") from error


def _format(data: bytes, key: str) -> str:
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise UnreadableSample(key, f"expected the bytes of a JPEG, PNG or WebP, found {len(data)} beginning {data[:8]!r}")


def _check_size(width: int, height: int, key: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UnreadableSample(key, f"{width}x{height} pixels are more than the {max_pixels:,} allowed")


def _decode_jpeg(data: bytes, key: str, max_pixels: int) -> np.ndarray | None:
    """The fast path; None leaves the image to PIL (CMYK, and files with harmless faults that it forgives)."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        _check_size(width, height, key, max_pixels)
        if colorspace in ("CMYK", "YCCK"):
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
        return pixels
    except UnreadableSample:
        raise
    except ValueError:
        return None


def _open(file: IO[bytes], kind: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked by us
        return Image.open(file, formats=(kind,))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB; see `decode`. PIL's own conversion shows what is behind transparent pixels."""
    if image.mode in _DEEP_MODES:  # PIL's own conversion clips to 255 instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
