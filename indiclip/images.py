"""Encoded images -> pixels, the same for every dataset.

Only JPEG, PNG and WebP, told by their first bytes and never by a file's name. Decoders run late, when it is known how
large the image has to be: a JPEG is then decoded at an eighth to the whole of its size. The EXIF rotation is reported,
not applied: boxes and points are in the frame of the file as stored (COCO), and `Transform` turns both together.
"""

import errno
import io
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jfif", "jpe")  # what files of the three formats are called
EXTENSION_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # kind of an image -> what its file is called
MAX_PIXELS = 100_000_000  # more is taken for a decompression bomb
HEAD_BYTES = 1 << 18  # of a file hold its header, mostly
# EXIF orientation -> transpose, then mirror left-right, then mirror top-bottom.
TURNS = {
    **{1: (0, 0, 0), 2: (0, 1, 0), 3: (0, 1, 1), 4: (0, 0, 1)},
    **{5: (1, 0, 0), 6: (1, 1, 0), 7: (1, 1, 1), 8: (1, 0, 1)},
}

_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N")  # PIL's names for 16-bit grey
_WIDE_MODES = {"I": "whole numbers of 32 bits", "F": "floats"}  # PIL's modes of no declared range
_XMP_TURN = b"tiff:Orientation"
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_JPEG_MARKER = re.compile(rb"\xff+([^\xff])")  # any number of 0xff may come before it
_ORIENTATION = 0x0112  # EXIF tag
_SURROGATE = re.compile("[\ud800-\udfff]")  # as which Python reads a path's byte that is no UTF-8
# Of the machine or its network, which no sample is to blame for.
_TROUBLES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT)


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


class EncodedImage:
    """An image file whose header has been read and checked, and whose pixels have not. `np.asarray` decodes it.

    Args:
        data: The file's bytes.
        key: Names the sample in errors.
        file: The shard or file that the bytes are from.
        max_pixels: More are refused before anything is decoded.

    Attributes:
        data: The file's bytes.
        kind: `JPEG`, `PNG` or `WEBP`.
        size_hw: (height, width) of the pixels as stored.
        orientation: EXIF's, 1 to 8; 1 is upright.

    Raises:
        UnreadableSample: Another format, too many pixels, damaged bytes.
    """

    def __init__(self, data: bytes, key: str, file: str = "", max_pixels: int = MAX_PIXELS) -> None:
        self.data, self._key, self._file = data, key, file
        self.kind = self._format(data)
        self._turbo = False
        try:
            self.size_hw, self.orientation = self._read_header(max_pixels)
        except UnreadableSample:
            raise
        except Exception as error:  # damaged bytes raise anything in PIL: OSError, SyntaxError, struct.error
            raise self._unreadable(error) from error

    @property
    def upright_hw(self) -> tuple[int, int]:
        """(height, width) after the rotation that EXIF asks for."""
        return self.size_hw if self.orientation < 5 else self.size_hw[::-1]

    def decode(self, min_hw: tuple[int, int] = (0, 0)) -> np.ndarray:
        """The pixels as stored.

        Transparent ones are laid on white, palettes and grey become RGB, and 16-bit channels keep their high byte.

        Args:
            min_hw: A JPEG may come smaller than it is, but not smaller than this; (0, 0) is its whole size. Its last
                row and column then stand for up to seven of the file's pixels that are not there.

        Returns:
            uint8 (height, width, 3), RGB.

        Raises:
            UnreadableSample: Damaged or truncated bytes.
        """
        try:
            if self._turbo and (pixels := self._decode_jpeg(min_hw)) is not None:
                return pixels
            with self._open() as image:
                return np.array(to_rgb(image))
        except Exception as error:
            raise self._unreadable(error) from error

    def decode_upright(self, min_hw: tuple[int, int] = (0, 0)) -> np.ndarray:
        """The pixels turned as EXIF asks; see `decode`, with `min_hw` of what is upright."""
        pixels = self.decode(min_hw if self.orientation < 5 else min_hw[::-1])
        transpose, left_right, top_bottom = TURNS[self.orientation]
        pixels = pixels.transpose(1, 0, 2) if transpose else pixels
        pixels = pixels[:, ::-1] if left_right else pixels
        return np.ascontiguousarray(pixels[::-1] if top_bottom else pixels)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.decode(), dtype)

    def _decode_jpeg(self, min_hw: tuple[int, int]) -> np.ndarray | None:
        """The fast path; None leaves a file with harmless faults to PIL, which forgives them."""
        height, width = self.size_hw
        # Only by powers of two: libjpeg-turbo takes longer over three eighths than over a half.
        shrink = 1
        while min_hw != (0, 0) and shrink < 8 and height >= 2 * shrink * min_hw[0] and width >= 2 * shrink * min_hw[1]:
            shrink *= 2
        smaller = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
        try:
            pixels: np.ndarray = simplejpeg.decode_jpeg(self.data, "RGB", **smaller)
            return pixels
        except ValueError:
            return None

    def _check_size(self, height: int, width: int, max_pixels: int) -> None:
        if height * width > max_pixels:
            reason = f"{width}x{height} pixels are more than the {max_pixels:,} allowed"
            raise UnreadableSample(self._key, reason, self._file)

    def _read_header(self, max_pixels: int) -> tuple[tuple[int, int], int]:
        if self.kind == "JPEG":
            try:
                height, width, colorspace, _ = simplejpeg.decode_jpeg_header(self.data, strict=False)
            except (ValueError, KeyError):  # of a colour space it does not know, as where the header breaks off
                colorspace = "CMYK"
            if colorspace not in ("CMYK", "YCCK"):  # those are PIL's
                self._turbo = True
                self._check_size(height, width, max_pixels)
                return (height, width), self._orientation(self._open()) if _has_exif(self.data) else 1
        image = self._open()
        self._check_size(image.height, image.width, max_pixels)
        return (image.height, image.width), self._orientation(image)

    def _orientation(self, image: Image.Image) -> int:
        if self.kind == "PNG" and not any(mark in self.data for mark in _PNG_EXIF):
            return 1  # PIL would decode the whole image, to look for EXIF behind its pixels
        try:
            found = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # as for pixels, PIL raises anything; damaged metadata leave a good image
            return 1
        return found if found in range(1, 9) else 1

    def _open(self) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked by us
            image = Image.open(io.BytesIO(self.data), formats=(self.kind,))
        if self.kind == "PNG" and "transparency" in image.info:
            image.info["transparency"] = _in_8_bits(image, bits=self.data[24])
        return image

    def _format(self, data: bytes) -> str:
        if data[:3] == b"\xff\xd8\xff":
            return "JPEG"
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return "PNG"
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return "WEBP"
        found = f"found {len(data):,} bytes" + (f", first {data[:8]!r}" if data else "")
        raise UnreadableSample(self._key, f"expected the bytes of a JPEG, PNG or WebP, {found}", self._file)

    def _unreadable(self, error: Exception) -> UnreadableSample:
        reason = " ".join(str(error).split()).partition(" <_io.")[0]  # where PIL names an object
        if not isinstance(error, Image.DecompressionBombError):  # PIL has a limit of its own
            reason = f"damaged {self.kind}: {reason}"
        return UnreadableSample(self._key, reason, self._file)


def _in_8_bits(image: Image.Image, bits: int) -> Any:
    """The colour of a PNG that is transparent, which PIL leaves as the file has it, beside pixels that it scales."""
    found = image.info["transparency"]
    if image.mode == "L" and bits < 8:
        return found * 255 // (2**bits - 1)
    if image.mode == "RGB" and bits == 16:
        return tuple(value >> 8 for value in found)
    return found


def _has_exif(jpeg: bytes) -> bool:
    """Whether a JPEG may say before its pixels how to turn it, in EXIF data or, which PIL reads as well, in XMP's.

    PIL takes twenty times as long to say so.
    """
    place = 2
    while (marker := _JPEG_MARKER.match(jpeg, place)) and marker[1] != b"\xda":
        place = marker.end()
        end = place + int.from_bytes(jpeg[place : place + 2], "big")
        if marker[1] == b"\xe1" and (jpeg[place + 2 : place + 8] == b"Exif\0\0" or _XMP_TURN in jpeg[place:end]):
            return True
        place = end
    return False


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image; what it holds is seen when it is read."""
    return name.rpartition(".")[2].lower() in EXTENSIONS


def storable(path: str | Path) -> str:
    """A path as text that any file can hold: bytes of it that are no UTF-8 are written out."""
    return _SURROGATE.sub(lambda half: f"\\x{ord(half[0]) & 0xFF:02x}", str(path))


def is_trouble(error: OSError) -> bool:
    """Whether it says that the machine is in trouble, not that a file is bad."""
    return error.errno in _TROUBLES


def read_image(path: Path, key: str) -> EncodedImage:
    """An image file; see `EncodedImage`.

    Raises:
        UnreadableSample: No image, or no such file.
        OSError: The machine is in trouble.
    """
    shown = storable(path)
    try:
        return EncodedImage(read_file(path), key, shown)
    except OSError as error:
        if is_trouble(error):
            raise
        raise UnreadableSample(key, f"{shown}: {error.strerror}", shown) from error


def read_header(path: Path) -> EncodedImage:
    """Size and orientation of a file, not to be decoded; see `header`.

    Raises:
        UnreadableSample: The file is no readable image, naming it.
    """
    return header(read_file(path, HEAD_BYTES), lambda: read_file(path), str(path), str(path))


def header(head: bytes, whole: Callable[[], bytes], key: str = "", file: str = "") -> EncodedImage:
    """Size and orientation of an image, not to be decoded.

    Args:
        head: Its first `HEAD_BYTES`, which are enough for most.
        whole: Gives all of it, where they are not: PIL wants the whole of a WebP, and a JPEG may begin with a long
            colour profile.
        key: Names the sample in errors.
        file: The shard or file that it lies in.

    Raises:
        UnreadableSample: No readable image.
    """
    try:
        return EncodedImage(head, key, file)
    except UnreadableSample:
        if len(head) < HEAD_BYTES:
            raise
        return EncodedImage(whole(), key, file)


def read_file(path: Path, most: int = -1) -> bytes:
    """The first bytes of a file that was found in a folder; none of a pipe, which might never be written to."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read(most) or b""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB; see `EncodedImage.decode`. PIL's own conversion shows what is behind transparency.

    Raises:
        ValueError: An image of 32 bits a pixel, whose values may have any range: PIL cuts them at 0 and 255.
    """
    if image.mode in _WIDE_MODES:
        found = f"found pixels of PIL's mode {image.mode!r}, {_WIDE_MODES[image.mode]}, whose range is not declared"
        raise ValueError(f"{found}; expected 8 or 16 bits a channel")
    if image.mode in _DEEP_MODES:  # PIL's own conversion clips to 255 instead of scaling
        values = np.asarray(image)
        grey = (values.astype(np.uint32) >> 8).astype(np.uint8)  # as PIL reads 16-bit colours
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "La":  # of which PIL knows this conversion alone
        image = image.convert("LA")
    if image.has_transparency_data:
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image)
        return canvas
    return image.convert("RGB")
