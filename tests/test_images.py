"""Decoding: the same pixels as PIL, and one kind of error for anything that is no image."""

import errno
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from indiclip.images import MAX_PIXELS, EncodedImage, UnreadableSample, read_header, read_image, storable, to_rgb
from indiclip.preprocessing import Preprocessing


def decode(data, key, max_pixels=MAX_PIXELS):
    return EncodedImage(data, key, max_pixels=max_pixels).decode()


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, bits=8, colours=2, pixels=b"", transparent=b""):
    """A PNG by the book. `colours`: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    header += chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(48, 64), (1, 1), (17, 31)])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_is_close_to_pil(picture, size, subsampling):
    data = encoded(Image.fromarray(picture(*size)), "JPEG", quality=90, subsampling=subsampling)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    found = decode(data, "k")
    assert found.dtype == np.uint8
    assert found.shape == (*size, 3)
    assert abs(found - expected).max() <= 2  # both are libjpeg-turbo, which may round chroma in another way


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_are_exact(picture, kind, options):
    image = picture(20, 33)
    assert (decode(encoded(Image.fromarray(image), kind, **options), "k") == image).all()


def test_grey_jpeg_becomes_rgb():
    data = encoded(Image.new("L", (8, 8), 77), "JPEG")
    assert decode(data, "k").tolist() == np.full((8, 8, 3), 77).tolist()


def test_cmyk_jpeg_goes_through_pil(picture):
    data = encoded(Image.fromarray(picture(16, 16)).convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (decode(data, "k") == expected).all()


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 51)])  # opaque, clear, a fifth
    assert decode(encoded(image), "k")[0].tolist() == [[200, 0, 0], [255, 255, 255], [244, 204, 204]]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(10, 255), (10, 0)])
    assert decode(encoded(grey), "k")[0].tolist() == [[10] * 3, [255] * 3]


def test_every_transparency_is_as_alpha_composite_makes_it():
    colours = np.random.default_rng(0).integers(0, 256, (64, 256, 4), dtype=np.uint8)
    colours[..., 3] = np.arange(256)
    image = Image.fromarray(colours)
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert abs(decode(encoded(image), "k").astype(int) - np.asarray(expected)).max() <= 1  # PIL rounds in another way


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decode(encoded(image), "k")[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert decode(encoded(image, transparency=1), "k")[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_sixteen_bits_keep_their_high_byte():
    values = np.array([[0x0000, 0x00FF, 0x0100, 0x7FFF, 0xFFFF]], dtype=np.uint16)
    assert decode(encoded(Image.fromarray(values)), "k")[0, :, 0].tolist() == [0, 0, 1, 127, 255]
    assert decode(encoded(Image.fromarray(values), transparency=0x0100), "k")[0, :, 0].tolist() == [0, 0, 255, 127, 255]


@pytest.mark.parametrize(("colours", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_alike_in_grey_and_colour(colours, channels):
    """And a picture of 8 bits that was stored with 16 is itself again."""
    levels = np.arange(256, dtype=np.uint16) * 257
    for values, shown in ((levels, np.arange(256)), (levels[:-1] + 256, np.arange(1, 256))):
        pixels = np.repeat(values[:, None], channels, 1).astype(">u2")
        if colours > 2:
            pixels[:, -1] = 0xFFFF  # alpha
        found = decode(png(len(values), 1, 16, colours, b"\0" + pixels.tobytes()), "k")
        assert (found == shown[:, None]).all()


def test_a_transparent_colour_is_scaled_as_the_pixels_are():
    """PIL leaves it as the file has it: of 2 and 4 bits and of colours with 16, it hits other pixels or none."""
    four = png(4, 1, 4, 0, b"\0" + bytes([0x1F, 0x3A]), struct.pack(">H", 3))
    assert decode(four, "k")[0, :, 0].tolist() == [17, 255, 255, 170]
    two = png(4, 1, 2, 0, b"\0" + bytes([0b00011011]), struct.pack(">H", 2))
    assert decode(two, "k")[0, :, 0].tolist() == [0, 85, 255, 255]
    one = png(4, 1, 1, 0, b"\0" + bytes([0b01010000]), struct.pack(">H", 0))
    assert decode(one, "k")[0, :, 0].tolist() == [255, 255, 255, 255]
    pixels = b"\0" + np.array([1000, 2000, 3000, 40000, 50000, 60000], ">u2").tobytes()
    deep = png(2, 1, 16, 2, pixels, struct.pack(">HHH", 1000, 2000, 3000))
    assert decode(deep, "k")[0].tolist() == [[255, 255, 255], [156, 195, 234]]


PIL_MODES = ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "La", "PA", "RGBa", "LAB"]


@pytest.mark.parametrize("mode", [*PIL_MODES, "I;16", "I;16L", "I;16B", "I;16N"])
def test_white_and_black_of_every_mode_are_white_and_black(mode):
    greys = Image.fromarray(np.array([[0, 255]], np.uint8))
    if mode.startswith("I;16"):
        kind = {"I;16N": "=u2", "I;16B": ">u2"}.get(mode, "<u2")
        image = Image.frombytes(mode, (2, 1), np.array([0, 0xFFFF], kind).tobytes())
    else:
        step = {"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode, "RGB" if mode == "LAB" else "L")
        image = greys.convert(step).convert(mode)
    assert image.mode == mode
    assert abs(np.asarray(to_rgb(image)).astype(int)[0] - [[0] * 3, [255] * 3]).max() <= 1  # LAB rounds


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_declared_range_are_refused(mode):
    expected = f"mode '{mode}', .*, whose range is not declared; expected 8 or 16 bits a channel"
    with pytest.raises(ValueError, match=expected):
        to_rgb(Image.new(mode, (2, 1), 7))
    with pytest.raises(ValueError, match=f"image 1: found pixels of PIL's {expected}"):
        Preprocessing(8).batch([Image.new("L", (8, 8)), Image.new(mode, (8, 8))], 4)


def test_an_animation_is_its_first_picture():
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    for kind in ("WEBP", "PNG"):
        data = encoded(red, kind, save_all=True, append_images=[blue], lossless=True)
        assert decode(data, "k")[0, 0].tolist() == [255, 0, 0]
    gif = encoded(red, "GIF", save_all=True, append_images=[blue])
    with pytest.raises(UnreadableSample, match="k: expected the bytes of a JPEG, PNG or WebP, found .* b'GIF8"):
        decode(gif, "k")


def test_one_bit_becomes_black_and_white():
    image = Image.new("1", (2, 1))
    image.putdata([0, 1])
    assert decode(encoded(image), "k")[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_reported_and_not_applied(tmp_path, picture, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    path = tmp_path / "photo"
    path.write_bytes(encoded(Image.fromarray(picture(20, 40)), kind, exif=exif))
    image = read_image(path, "k")
    assert image.decode().shape == (20, 40, 3)
    assert (image.size_hw, image.upright_hw, image.orientation) == ((20, 40), (40, 20), 6)
    header = read_header(path)
    assert (header.size_hw, header.orientation) == ((20, 40), 6)


def test_pixels_are_not_decoded_to_look_for_exif_behind_them(picture, monkeypatch):
    decoded = []
    monkeypatch.setattr(PngImageFile, "load", lambda image: decoded.append(image))
    assert EncodedImage(encoded(Image.fromarray(picture(20, 40))), "k").size_hw == (20, 40)
    with pytest.raises(UnreadableSample, match="40x20 pixels are more than the 799 allowed"):
        EncodedImage(encoded(Image.fromarray(picture(20, 40))) + b"eXIf", "k", max_pixels=799)
    assert decoded == []


def test_exif_behind_the_pixels_of_a_png_counts(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(picture(20, 40)))
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert EncodedImage(data[:-12] + chunk + data[-12:], "k").orientation == 6


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_header_behind_long_metadata_is_read(tmp_path, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 400, 3), dtype=np.uint8))
    data = encoded(noise, kind, lossless=True) if kind == "WEBP" else encoded(noise, kind, icc_profile=bytes(400_000))
    assert len(data) > 400_000
    (tmp_path / "photo").write_bytes(data)
    assert read_header(tmp_path / "photo").size_hw == (500, 400)
    (tmp_path / "photo").write_bytes(data[:300_000])
    with pytest.raises(UnreadableSample, match="photo: damaged"):
        read_header(tmp_path / "photo")


def test_fill_bytes_before_a_marker_are_not_gone_through_one_by_one(picture):
    data = encoded(Image.fromarray(picture(8, 8)), "JPEG")
    lines = []

    def trace(frame, event, argument):
        lines.append(event)
        return trace

    sys.settrace(trace)
    try:
        assert EncodedImage(data[:2] + b"\xff" * 2**16 + data[2:], "k").size_hw == (8, 8)
    finally:
        sys.settrace(None)
    assert len(lines) < 1000


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_truncated_files_are_unreadable(kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(UnreadableSample, match=r"^shard/7: ") as caught:
        decode(data[: max(16, int(share * len(data)))], "shard/7")
    assert "\n" not in str(caught.value)


def test_a_jpeg_that_breaks_off_in_its_header_is_said(picture):
    data = encoded(Image.fromarray(picture(32, 32)), "JPEG")
    for most in (12, 300):
        with pytest.raises(UnreadableSample, match="damaged JPEG: Truncated File Read"):
            decode(data[:most], "shard/7")


def test_random_damage_gives_pixels_or_unreadable_never_another_error(picture):
    rng = np.random.default_rng(3)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(Image.fromarray(picture(32, 32)), kind)
        for _ in range(150):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 3):
                damaged[place] = rng.integers(256)
            with suppress(UnreadableSample):
                assert decode(bytes(damaged), "k", max_pixels=10**6).dtype == np.uint8


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(20), b"<svg/>", b"BM" + bytes(60), b"II*\0" + bytes(60)])
def test_other_formats_are_refused_by_their_first_bytes(data):
    with pytest.raises(UnreadableSample, match="k: expected the bytes of a JPEG, PNG or WebP, found"):
        decode(data, "k")


def test_a_bomb_is_refused_from_its_header_alone():
    with pytest.raises(UnreadableSample, match=r"k: 11000x10000 pixels are more than the 100,000,000 allowed"):
        decode(png(11_000, 10_000), "k")
    with pytest.raises(UnreadableSample, match=r"k: Image size .* exceeds limit of 178956970 pixels"):
        decode(png(60_000, 60_000), "k")  # PIL's own limit comes first


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_cap_is_on_the_product_of_the_sides(kind):
    data = encoded(Image.new("RGB", (10, 30)), kind)
    assert decode(data, "k", max_pixels=300).shape == (30, 10, 3)
    with pytest.raises(UnreadableSample, match="10x30 pixels are more than the 299 allowed"):
        decode(data, "k", max_pixels=299)


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableSample, match="No such file"):
        read_image(tmp_path / "gone.jpg", "k")


def test_a_name_that_is_no_utf8_can_be_stored(tmp_path):
    with pytest.raises(UnreadableSample) as caught:
        read_image(tmp_path / os.fsdecode(b"caf\xe9.jpg"), "k")
    assert caught.value.file == f"{tmp_path}/caf\\xe9.jpg"
    assert str(caught.value) == f"k: {tmp_path}/caf\\xe9.jpg: No such file or directory"


def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0.jpg")
    for read in (read_header, lambda path: read_image(path, "k")):
        with pytest.raises(UnreadableSample, match="found 0 bytes$"):
            read(tmp_path / "0.jpg")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE])
def test_no_image_is_to_blame_for_the_machine(tmp_path, monkeypatch, number):
    def fail(path, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        read_image(tmp_path / "a.jpg", "k")


def test_unreadable_survives_the_way_back_from_a_worker_process():
    error = pickle.loads(pickle.dumps(UnreadableSample("a", "torn")))
    assert (error.key, error.reason, str(error)) == ("a", "torn", "a: torn")


def test_no_lightning_is_imported_for_images():
    code = "import sys, indiclip.images; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "stored"),
    [("दोसा/é.jpg", "दोसा/é.jpg"), (os.fsdecode(b"a\xe9\xff.jpg"), r"a\xe9\xff.jpg"), ("\ud800", r"\x00")],
)
def test_what_is_utf8_is_stored_as_it_is(name, stored):
    """In any locale, as the file system's encoding may be another one."""
    assert storable(name) == storable(Path(name)) == stored
