"""Facts about stages/ingest.py: what becomes an image, what is refused and why, and that no file vanishes."""

import argparse
import base64
import hashlib
import io
import sqlite3
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps, PngImagePlugin
from pyspark.sql import Row, SparkSession

from stages import ingest
from tests import webhdfs
from tests.helpers import PARAMS, ROOT

PATTERN = PARAMS["ingest"]["group_pattern"]
LIMITS: dict[str, Any] = {
    "max_bytes": 20_000,
    "max_pixels": 10_000,
    "min_side": 7,
    "label_depth": 1,
    "group_pattern": PATTERN,
}
ALL: dict[str, Any] = {"take": [], "leave_out": [], "share": 1.0}
ORIENTATION = 0x0112  # EXIF tag

ImageBytes = Callable[..., bytes]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of metadata, as in a worker


@pytest.fixture(autouse=True)
def no_limit_of_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as in a worker


# What image_bytes is asked for, by the kind of file.
KINDS: dict[str, dict[str, object]] = {
    "jpeg": {"format": "JPEG"},
    "progressive_jpeg": {"format": "JPEG", "progressive": True},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP"},
    "lossless_webp": {"format": "WEBP", "lossless": True},
    "bmp": {"format": "BMP"},
    "gif": {"format": "GIF", "mode": "P"},
    "tiff": {"format": "TIFF"},
    "lzw_tiff": {"format": "TIFF", "compression": "tiff_lzw"},
    "deflate_tiff": {"format": "TIFF", "compression": "tiff_adobe_deflate"},
    "jpeg_tiff": {"format": "TIFF", "compression": "jpeg"},
    "avif": {"format": "AVIF"},
}
# Four fields of 32 x 24 pixels, of these colours from top left to bottom right, as a phone's encoder (x265) writes them.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAAAAAERA"
    "AAEAAQAAAAABoQABAAAAAAAAALUAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAAAADdaXBjbwAA"
    "AHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq"
    "5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAAEAAAAABAAAA"
    "MAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAL1tZGF0AAAAsSgBrwngITip//M8b/78"
    "nZe0xyeVp79Y//xnz7yr7/4b23R+jxPMPTC/8uj/56T62RkjC//g5ZfDNizW+AGdF113oE9BiiD3waNp70kpPtgufAzRNwEimieHKwBGbX3w1P71035c"
    "H+NvkpxEAjbAIza++Gp/eum/Lg/xtbRcbQjlqzaXOZRQi6WMSB+gnNaN247dyvxiWzahhFV4tB3zmoJYw7+apr4ZgyXhlTvct/+ZTA=="
)
FIELDS = np.array([[(200, 30, 30), (30, 180, 40)], [(20, 40, 200), (230, 220, 60)]])
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def encode(image: Image.Image, format: str = "PNG", **save: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **save)
    return file.getvalue()


def read(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def png_without_pixels(width: int, height: int) -> bytes:
    """A 1-bit PNG that is said to be of that size and ends before its first pixel."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\x10\0IDAT"


def png(**chunks: bytes) -> bytes:
    """A PNG of these chunks and an end."""
    parts = [(name.encode(), data) for name, data in chunks.items()] + [(b"IEND", b"")]
    whole = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def decode(content: bytes) -> tuple[np.ndarray, bytes]:
    """The pixels of the image that ingest makes of content, and the file it keeps."""
    image, is_kept = ingest.decode(content, max_pixels=10_000)
    assert image.mode == "RGB"
    return np.asarray(image), content if is_kept else ingest.to_png(image)


def refusal(content: bytes) -> tuple[str, str]:
    """The reason and the detail for which ingest refuses content."""
    with pytest.raises(ingest.Refused) as refused:
        ingest.decode(content, max_pixels=10_000)
    assert refused.value.reason in ingest.REASONS
    return refused.value.reason, refused.value.detail


# Kinds of file


@every_kind
def test_every_kind_of_file_has_the_pixels_that_pillow_reads(kind: dict[str, object], image_bytes: ImageBytes) -> None:
    content = image_bytes(**kind)
    np.testing.assert_array_equal(decode(content)[0], np.asarray(read(content).convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_counts(format: str) -> None:
    first, second = Image.new("RGB", (9, 7), "red"), Image.new("RGB", (9, 7), "blue")
    lossless = {"lossless": True} if format == "WEBP" else {}
    pixels, _ = decode(encode(first, format, save_all=True, append_images=[second], **lossless))
    np.testing.assert_array_equal(pixels, np.asarray(first))


@pytest.mark.parametrize("content", [{"format": "JPEG"}, {"format": "PNG"}, {"format": "TIFF"}], ids=["jpeg", "png", "tiff"])
def test_grey_images_become_rgb(content: dict[str, object], image_bytes: ImageBytes) -> None:
    file = image_bytes(mode="L", **content)
    grey = np.asarray(read(file))
    np.testing.assert_array_equal(decode(file)[0], np.stack([grey, grey, grey], axis=-1))


def test_black_and_white_images_become_rgb(image_bytes: ImageBytes) -> None:
    file = image_bytes("PNG", mode="1")
    white = np.asarray(read(file))
    np.testing.assert_array_equal(decode(file)[0], np.where(white[..., None], 255, [0, 0, 0]))


def test_palette_images_become_rgb(image_bytes: ImageBytes) -> None:
    file = image_bytes("PNG", mode="P")
    indexed = read(file)
    palette = np.array(indexed.getpalette(), np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(decode(file)[0], palette[np.asarray(indexed)])


@pytest.mark.parametrize(("format", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_of_16_bit_grey_the_upper_8_bits_are_kept(format: str, dtype: str) -> None:
    values = np.arange(0, 2**16, 109).reshape(1, -1)
    pixels, _ = decode(encode(Image.fromarray(values.astype(dtype)), format))
    np.testing.assert_array_equal(pixels, np.repeat(values[..., None] // 256, 3, axis=-1))


def test_cmyk_inks_become_rgb() -> None:
    inks = {(0, 0, 0, 0): "white", (255, 0, 0, 0): "cyan", (0, 255, 0, 0): "magenta", (0, 0, 255, 0): "yellow"}
    inks |= {(0, 0, 0, 255): "black", (255, 255, 0, 0): "blue"}
    for ink, colour in inks.items():
        pixels, _ = decode(encode(Image.new("CMYK", (2, 2), ink), "TIFF"))
        np.testing.assert_array_equal(pixels, np.asarray(Image.new("RGB", (2, 2), colour)), err_msg=colour)


def test_cmyk_jpegs_have_the_pixels_that_pillow_reads(image_bytes: ImageBytes) -> None:
    content = image_bytes("JPEG", mode="CMYK")
    np.testing.assert_array_equal(decode(content)[0], np.asarray(read(content).convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("RGBA", "TIFF"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGB", "PNG"),
        ("L", "PNG"),
    ],
)
def test_transparent_pixels_become_white(mode: str, format: str) -> None:
    black: dict[str, int | tuple[int, ...]] = {"RGBA": (0, 0, 0, 255), "LA": (0, 255), "P": 1, "RGB": (0, 0, 0), "L": 0}
    clear: dict[str, int | tuple[int, ...]] = {"RGBA": (0, 0, 0, 0), "LA": (0, 0), "P": 0, "RGB": (5, 5, 5), "L": 5}
    image = Image.new(mode, (8, 6), black[mode])
    if mode == "P":
        image.putpalette([5, 5, 5, 0, 0, 0])
    image.paste(clear[mode], (0, 0, 3, 6))
    save = {} if mode.endswith("A") else {"transparency": clear[mode]}
    pixels, _ = decode(encode(image, format, **save, **({"lossless": True, "exact": True} if format == "WEBP" else {})))
    assert (pixels[:, :3] == 255).all()
    assert (pixels[:, 3:] == 0).all()


def test_a_half_transparent_pixel_is_mixed_with_white() -> None:
    pixels, _ = decode(encode(Image.new("RGBA", (1, 1), (200, 100, 0, 128))))
    mixed = (np.array([200, 100, 0]) * 128 + 255 * (255 - 128)) / 255
    np.testing.assert_allclose(pixels[0, 0], mixed, atol=1)  # of 255: the mix is rounded to whole numbers


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(mode: str) -> None:
    reason, detail = refusal(encode(Image.new(mode, (4, 4), 1), "TIFF"))
    assert reason == "unreadable"
    assert "range" in detail


@pytest.mark.parametrize(
    ("depth", "colour_type"), [*((depth, "grey") for depth in (1, 2, 4, 8, 16)), (8, "rgb"), (16, "rgb")]
)
def test_the_clear_colour_of_a_png_is_compared_with_what_is_stored(depth: int, colour_type: str) -> None:
    most = 2**depth - 1
    levels = np.array([1, 0, most, 256 * (depth == 16)])  # the clear one, and others of which one has its upper byte
    samples = np.repeat(levels, 3 if colour_type == "rgb" else 1)
    bits = "".join(format(each, f"0{depth}b") for each in samples).ljust(8, "0")
    row = int(bits, 2).to_bytes(len(bits) // 8)
    header = struct.pack(">IIBBBBB", 4, 1, depth, 2 if colour_type == "rgb" else 0, 0, 0, 0)
    clear = struct.pack(">H", 1) * (3 if colour_type == "rgb" else 1)
    pixels, _ = decode(png(IHDR=header, tRNS=clear, IDAT=zlib.compress(b"\0" + row)))
    shown = np.where(levels == 1, 255, levels // 256 if depth == 16 else levels * 255 // most)
    np.testing.assert_array_equal(pixels[0], np.stack([shown] * 3, axis=-1))


def test_what_the_first_frame_of_a_gif_leaves_uncovered_is_white() -> None:
    frame = encode(Image.new("RGB", (4, 3), "red"), "GIF")
    assert frame[6:10] == struct.pack("<HH", 4, 3)
    pixels, _ = decode(frame[:6] + struct.pack("<HH", 9, 7) + frame[10:])  # a larger canvas
    expected = Image.new("RGB", (9, 7), "white")
    expected.paste("red", (0, 0, 4, 3))
    np.testing.assert_array_equal(pixels, np.asarray(expected))


def bmp(compression: int, bits: int, runs: bytes) -> bytes:
    """A BMP of 5 x 2 pixels in run-length encoding; index i is the grey i."""
    palette = b"".join(bytes([i, i, i, 0]) for i in range(2**bits))
    start = 54 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", start + len(runs), 0, 0, start)
    return header + struct.pack("<IiiHHIIiiII", 40, 5, 2, 1, bits, compression, len(runs), 1, 1, 0, 0) + palette + runs


def test_a_bmp_in_rle8_has_the_pixels_that_its_runs_say() -> None:
    runs = bytes([3, 7, 2, 9, 0, 0])  # the lower row: three of 7, two of 9
    runs += bytes([0, 3, 1, 2, 3, 0, 2, 4, 0, 1])  # the upper: 1, 2, 3 as they are, padded; two of 4
    pixels, _ = decode(bmp(1, 8, runs))
    np.testing.assert_array_equal(pixels[..., 0], [[1, 2, 3, 4, 4], [7, 7, 7, 9, 9]])


def test_a_bmp_in_rle4_is_refused() -> None:
    reason, detail = refusal(bmp(2, 4, bytes([5, 0x12, 0, 0, 5, 0x34, 0, 1])))
    assert reason == "unreadable"
    assert "RLE4" in detail


# HEIC


def with_box(box: bytes) -> bytes:
    """HEIC with one property more of its image, which is the last one to be applied."""
    n = len(box)
    sizes = {name: HEIC.index(name) - 4 for name in (b"meta", b"iprp", b"ipco", b"ipma")}
    offset, more = HEIC.index(b"iloc") + 22, {b"meta": n + 1, b"iprp": n + 1, b"ipco": n, b"ipma": 1}
    changed = bytearray(HEIC)
    for name, start in sizes.items():
        struct.pack_into(">I", changed, start, struct.unpack_from(">I", HEIC, start)[0] + more[name])
    struct.pack_into(">I", changed, offset, struct.unpack_from(">I", HEIC, offset)[0] + n + 1)  # where the pixels are
    n_before = sizes[b"ipma"] + 18
    changed[n_before] += 1
    end = n_before + 1 + HEIC[n_before]
    changed[end:end] = bytes([0x80 | changed[n_before]])
    changed[sizes[b"ipma"] : sizes[b"ipma"]] = box
    return bytes(changed)


def fields(content: bytes) -> np.ndarray:
    """The colour in the middle of each quarter of an image."""
    pixels, _ = decode(content)
    height, width, _ = pixels.shape
    return pixels[height // 4 :: height // 2, width // 4 :: width // 2]


def test_a_heic_has_the_colours_that_were_encoded() -> None:
    np.testing.assert_allclose(fields(HEIC), FIELDS, atol=8)  # of 255: it is compressed
    assert decode(HEIC)[0].shape == (48, 64, 3)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_heic_is_turned_as_it_says(quarters: int) -> None:
    turned = with_box(b"\0\0\0\x09irot" + bytes([quarters]))  # anticlockwise
    np.testing.assert_allclose(fields(turned), np.rot90(FIELDS, quarters), atol=8)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_heic_is_mirrored_as_it_says(axis: int) -> None:
    mirrored = with_box(b"\0\0\0\x09imir" + bytes([axis]))  # 0: top and bottom change places
    np.testing.assert_allclose(fields(mirrored), np.flip(FIELDS, axis), atol=8)


# Orientation. Where the first row and the first column of the file belong: EXIF 2.3, tag 274.

UPRIGHT = {
    1: lambda stored: stored,  # top, left
    2: lambda stored: stored[:, ::-1],  # top, right
    3: lambda stored: stored[::-1, ::-1],  # bottom, right
    4: lambda stored: stored[::-1],  # bottom, left
    5: lambda stored: stored.swapaxes(0, 1),  # left, top
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda stored: stored.swapaxes(0, 1)[::-1],  # left, bottom
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_as_exif_says(orientation: int, format: str, image_bytes: ImageBytes) -> None:
    stored = np.asarray(read(image_bytes(format)))
    pixels, _ = decode(image_bytes(format, exif=with_orientation(orientation)))
    np.testing.assert_array_equal(pixels, UPRIGHT[orientation](stored))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_what_is_kept_of_a_turned_image_is_upright_once_exif_is_followed(format: str, image_bytes: ImageBytes) -> None:
    pixels, kept = decode(image_bytes(format, exif=with_orientation(6)))
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(read(kept))), pixels)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_avif_is_turned_as_it_says(orientation: int) -> None:
    image = Image.fromarray(np.repeat(np.repeat(FIELDS, 24, axis=0), 32, axis=1).astype(np.uint8))
    turned = encode(image, "AVIF", exif=with_orientation(orientation), quality=90)
    np.testing.assert_allclose(fields(turned), UPRIGHT[orientation](FIELDS), atol=8)  # of 255: it is compressed


# What is kept


@pytest.mark.parametrize(
    "kind",
    [
        *(KINDS[name] for name in ("jpeg", "progressive_jpeg", "png")),
        *({"format": format, "exif": with_orientation(value)} for format in ("JPEG", "PNG") for value in (1, 6)),
        {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (9, 7))]},
    ],
    ids=["jpeg", "progressive_jpeg", "png", "jpeg_marked_upright", "turned_jpeg", "png_marked_upright", "turned_png", "mpo"],
)
def test_an_rgb_jpeg_or_png_is_kept_byte_for_byte(kind: dict[str, object], image_bytes: ImageBytes) -> None:
    content = image_bytes(**kind)
    assert decode(content)[1] == content


@pytest.mark.parametrize(
    "kind",
    [
        *(KINDS[name] for name in ("webp", "bmp", "gif", "tiff")),
        *({"format": "JPEG", "mode": mode} for mode in ("L", "CMYK")),
        *({"format": "PNG", "mode": mode} for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
        {"format": "PNG", "transparency": (1, 2, 3)},
        {"format": "PNG", "icc_profile": bytes(2**21)},
    ],
    ids=lambda kind: "-".join(
        [kind["format"], kind.get("mode", "RGB"), *[key for key in kind if key not in ("format", "mode")]]
    ),
)
def test_anything_else_is_kept_as_a_png_of_equal_pixels(kind: dict[str, object], image_bytes: ImageBytes) -> None:
    content = image_bytes(**kind) if kind.get("mode") != "I;16" else encode(Image.fromarray(np.array([[1, 999]], np.uint16)))
    pixels, kept = decode(content)
    assert read(kept).format == "PNG"
    assert read(kept).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read(kept)), pixels)


# What is refused


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@every_kind
def test_a_file_that_ends_early_is_truncated(kind: dict[str, object], share: float, image_bytes: ImageBytes) -> None:
    content = image_bytes(**kind)
    assert refusal(content[: int(share * len(content))])[0] == "truncated"


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "gif", "tiff"])
def test_a_file_that_ends_within_its_header_is_truncated(name: str, image_bytes: ImageBytes) -> None:
    assert refusal(image_bytes(**KINDS[name])[:12])[0] == "truncated"


@every_kind
def test_a_cut_file_is_refused_or_has_all_its_pixels(kind: dict[str, object], image_bytes: ImageBytes) -> None:
    content = image_bytes(**kind)
    whole, _ = decode(content)
    for length in [*range(1, len(content), 11), *range(len(content) - 20, len(content))]:
        try:
            pixels, _ = decode(content[:length])
        except ingest.Refused:
            continue
        np.testing.assert_array_equal(pixels, whole, err_msg=f"{length} of {len(content)} bytes")


@every_kind
def test_whatever_the_damage_nothing_but_a_refusal_is_raised(kind: dict[str, object], image_bytes: ImageBytes) -> None:
    content, random = image_bytes(**kind), np.random.default_rng(0)
    for _ in range(100):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[random.integers(0, min(len(content), 300), 3)] = random.integers(0, 256, 3)
        with suppress(ingest.Refused):
            ingest.decode(damaged.tobytes(), max_pixels=10_000)


def test_a_tiff_whose_pixels_are_said_to_be_beyond_any_file_is_refused() -> None:
    white = encode(Image.new("RGB", (30, 20), "white"), "TIFF")
    strip_offsets = struct.pack("<HH", 273, 4)
    assert white.count(strip_offsets) == 1
    damaged = white.replace(strip_offsets, struct.pack("<HH", 273, 16))  # 64 bits, and they are 1
    assert refusal(damaged)[0] in ("truncated", "unreadable")


def test_a_file_without_bytes_is_empty() -> None:
    assert refusal(b"")[0] == "empty"


@pytest.mark.parametrize(
    ("content", "telling"),
    [
        (b"Dear customer, the photographs follow.", "Dear customer"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer"),
        (b"\n <!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "web page"),
        (b"<HTML><head></head></HTML>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        (b"%PDF-1.4\n%", "PDF"),
        (b"PK\3\4\x14\0\0\0", "ZIP"),
        (b"\x1f\x8b\x08\0", "archive"),
        (b"RIFF$\0\0\0WAVEfmt ", "WAV"),
        (b"RIFF$\0\0\0AVI LIST", "video"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "MP4"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", "raw photograph"),
    ],
    ids=[
        *("text", "git_lfs_pointer", "html", "html_in_capitals", "xml", "pdf", "zip", "gzip", "wav", "avi", "mp4"),
        *("jpeg_2000", "raw"),
    ],
)
def test_what_is_not_an_image_is_refused_and_said_to_be_what_it_is(content: bytes, telling: str) -> None:
    reason, detail = refusal(content)
    assert reason == "not_an_image"
    assert telling in detail


@pytest.mark.parametrize("height", [1023, 1024, 1025, 2500])
def test_a_large_strip_of_a_deflate_tiff_is_read_to_its_end(height: int) -> None:
    pixels = np.arange(height * 1024, dtype=np.uint32).view(np.uint8).reshape(height, 1024, 4)[..., :1].repeat(3, axis=2)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", compression="zlib", rowsperstrip=height)
    image, _ = ingest.decode(file.getvalue(), max_pixels=10**7)
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("kind", ["float32", "five_bands"])
def test_a_tiff_of_a_kind_that_is_not_read_is_said_to_be_one(kind: str) -> None:
    pixels = np.zeros((4, 4, 3), np.float32) if kind == "float32" else np.zeros((4, 4, 5), np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb" if kind == "float32" else "minisblack", planarconfig="contig")
    assert refusal(file.getvalue()) == ("unreadable", "SyntaxError: unknown pixel mode")


def test_a_png_whose_header_has_a_bad_checksum_is_said_to_have_one(image_bytes: ImageBytes) -> None:
    content = image_bytes("PNG")
    reason, detail = refusal(content[:29] + bytes(4) + content[33:])
    assert reason == "unreadable"
    assert "checksum" in detail


def test_a_lack_of_memory_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch, image_bytes: ImageBytes) -> None:
    def run_out(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ingest, "to_rgb", run_out)
    with pytest.raises(MemoryError):
        decode(image_bytes())


# What libjpeg warns of


@pytest.fixture(scope="module")
def photograph() -> bytes:
    """A JPEG that is larger than what libjpeg does not notice."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    return encode(Image.fromarray(pixels), "JPEG", quality=75)


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def with_segment(jpeg: bytes, data: bytes) -> bytes:
    """A JPEG with these bytes after its first segment."""
    end = 4 + struct.unpack(">H", jpeg[4:6])[0]
    return jpeg[:end] + data + jpeg[end:]


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize("damage", ["hole", "zeros", "half"])
def test_a_jpeg_of_which_a_part_is_missing_but_not_its_end_is_truncated(damage: str, progressive: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    content = encode(Image.fromarray(pixels), "JPEG", progressive=progressive)
    middle, end = len(content) // 2, content[-2:]
    damaged = {
        "hole": content[: middle - 500] + content[middle:],
        "zeros": content[: middle - 500] + bytes(500) + content[middle:],
        "half": content[:middle] + end,
    }[damage]
    read(damaged)  # as an image, without a word
    assert refusal(damaged)[0] == "truncated"


def test_a_jpeg_of_which_restart_intervals_are_zeros_is_truncated() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    content = encode(Image.fromarray(pixels), "JPEG", restart_marker_blocks=8)
    start, end = content.index(b"\xff\xd1") + 2, content.index(b"\xff\xd2")
    assert refusal(content[:start] + bytes(end - start) + content[end:])[0] == "truncated"


@pytest.mark.parametrize(
    "harmless",
    [
        lambda jpeg: jpeg + b"bytes after the end",
        lambda jpeg: jpeg + jpeg,
        lambda jpeg: with_segment(jpeg, bytes(5)),
        lambda jpeg: with_segment(jpeg, segment(0xE2, b"ICC_PROFILE\0\2\3profile")),
        lambda jpeg: jpeg.replace(b"JFIF\0\1\1", b"JFIF\0\2\1"),
        lambda jpeg: jpeg.replace(b"\0\x3f\0", b"\0\0\0"),
    ],
    ids=["after_the_end", "twice", "between_segments", "bad_profile", "other_revision", "odd_scan"],
)
def test_a_jpeg_whose_pixels_are_all_there_stays_an_image(harmless: Callable[[bytes], bytes], photograph: bytes) -> None:
    content = harmless(photograph)
    assert content != photograph
    pixels, kept = decode(content)
    np.testing.assert_array_equal(pixels, np.asarray(read(photograph)))
    assert kept == content


def test_a_harmless_warning_does_not_hide_another(photograph: bytes) -> None:
    assert refusal(with_segment(photograph[:3000] + photograph[-2:], bytes(5)))[0] == "truncated"


def test_bytes_between_the_scan_and_the_end_are_damage(photograph: bytes) -> None:
    assert refusal(photograph[:-2] + bytes(range(1, 99)) + photograph[-2:])[0] == "truncated"


def test_a_jpeg_of_odd_subsampling_is_an_image() -> None:
    grey = encode(Image.new("RGB", (24, 8), (128, 128, 128)), "JPEG", subsampling="4:4:4")
    start = grey.index(b"\xff\xda") + 14
    frame = grey.index(b"\xff\xc0") + 11  # three blocks of Y, each no more than a mean of 0; one of Cb, one of Cr
    scan = int("001010" * 3 + "0000" * 2 + "1" * 6, 2).to_bytes(4)
    content = grey[:frame] + b"\x31" + grey[frame + 1 : start] + scan + b"\xff\xd9"
    np.testing.assert_array_equal(decode(content)[0], np.full((8, 24, 3), 128))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_a_jpeg_has_the_pixels_that_pillow_reads(mode: str, subsampling: str, progressive: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (47, 83, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    content = encode(image, "JPEG", subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(decode(content)[0], np.asarray(read(content).convert("RGB")))


# PNG with much metadata


@pytest.mark.parametrize("key", ["Comment", "XML:com.adobe.xmp"])
def test_a_png_may_have_much_text(key: str, image_bytes: ImageBytes) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt(key, "fruit " * 400_000, zip=True)
    pixels, kept = decode(image_bytes("PNG", pnginfo=text))
    np.testing.assert_array_equal(pixels, np.asarray(read(image_bytes("PNG"))))
    np.testing.assert_array_equal(np.asarray(read(kept)), pixels)


def test_an_image_may_have_max_pixels_but_not_one_more(image_bytes: ImageBytes) -> None:
    content = image_bytes("PNG", size=(30, 20))
    assert ingest.decode(content, max_pixels=600)[0].size == (30, 20)
    with pytest.raises(ingest.Refused, match="30 x 20, more than 599 pixels") as refused:
        ingest.decode(content, max_pixels=599)
    assert refused.value.reason == "too_many_pixels"


def test_an_image_of_too_many_pixels_is_refused_before_its_pixels_are_read() -> None:
    assert refusal(png_without_pixels(100, 100))[0] == "truncated"
    assert refusal(png_without_pixels(60_000, 60_000))[0] == "too_many_pixels"


# Films, by the pattern of params.yaml


@pytest.mark.parametrize(
    ("name", "film"),
    [
        ("31_100.jpg", "Apple/"),
        ("0_100.jpg", "Apple/"),
        ("r_31_100.jpg", "Apple/r"),
        ("r0_31.jpg", "Apple/r0"),
        ("r2_31_100.jpg", "Apple/r2"),
        ("IMG_1.jpg", None),
        ("31_100_edited.jpg", None),
    ],
)
def test_the_name_tells_the_film(name: str, film: str | None) -> None:
    assert ingest.film_of("Apple", name, PATTERN) == film


def test_films_of_two_labels_are_two() -> None:
    assert ingest.film_of("Apple", "31_100.jpg", PATTERN) != ingest.film_of("Pear", "31_100.jpg", PATTERN)


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no regular expression"):
        ingest.regex("(r")


# A delivery with everything in it, through Spark

LABELS = (
    "Kiwi",
    "Red Apple",
    "Pfirsich süß é",
    "a%20b",
    "C#",
    "x+y",
    "a=1",
    "deep/er/est/Fig",
    "deep/Fig",
    "日本",
    "apple.jpg",
)
REFUSED = {
    "bad/empty.jpg": "empty",
    "bad/letter.jpg": "not_an_image",
    "bad/cut.jpg": "truncated",
    "bad/poster.png": "too_many_pixels",
    "bad/large.bmp": "too_large",
    "bad/nowhere.jpg": "unreadable",  # a link to nothing
    "bad/narrow.png": "too_small",
    "loose": "no_label",
}
IGNORED = ("Kiwi/.hidden.jpg", "Kiwi/notes.txt", ".git/a.jpg", "readme.md", "Kiwi/Thumbs.db")


class Delivery(NamedTuple):
    """A folder of files, and what ingest makes of it."""

    files: dict[str, bytes]
    n_ignored: int
    rows: list[Row]
    counts: dict[str, int]

    def row(self, path: str) -> Row:
        (row,) = (row for row in self.rows if row.path == path)
        return row

    def images(self) -> list[Row]:
        return [row for row in self.rows if row.reason is None]


@pytest.fixture(scope="module")
def delivery(spark: SparkSession, image_bytes: ImageBytes, tmp_path_factory: pytest.TempPathFactory) -> Delivery:
    twin = image_bytes(seed=99)
    files = {
        **{f"{label}/{i}_100.jpg": image_bytes(seed=i) for i, label in enumerate(LABELS)},
        **{f"kinds/{name}.{kind['format']}".lower(): image_bytes(**kind) for name, kind in KINDS.items()},
        "kinds/CAPITALS.JPG": image_bytes(seed=50),
        "kinds/tif.Tif": image_bytes("TIFF"),
        "kinds/phone.HEIC": HEIC,
        "kinds/a_png.jpg": image_bytes("PNG"),
        "kinds/12:30.jpg": image_bytes(),  # Hadoop takes what is before the colon for a scheme
        "kinds/_MG_0001.JPG": image_bytes(),
        "kinds/jpg": image_bytes(),
        "kinds/turned.jpg": image_bytes(exif=with_orientation(6)),
        "twins/one.jpg": twin,
        "twins/two.jpg": twin,
        "Kiwi/three.jpg": twin,
        "bad/empty.jpg": b"",
        "bad/letter.jpg": b"Dear customer",
        "bad/cut.jpg": image_bytes()[:600],
        "bad/poster.png": png_without_pixels(60_000, 60_000),
        "bad/large.bmp": image_bytes("BMP", size=(99, 99)),
        "bad/narrow.png": image_bytes("PNG", size=(6, 90)),
        "loose": image_bytes(),
    }
    root = tmp_path_factory.mktemp("delivery") / "photos [2024] {new}"
    others = {path: image_bytes() if Path(path).suffix in (".jpg", ".db") else b"text" for path in IGNORED}
    for path, content in (files | others).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "bad/nowhere.jpg").symlink_to("elsewhere.jpg")
    listing = ingest.find_files(spark, str(root), **ALL)
    inspected = ingest.inspect_files(spark, listing, **LIMITS)
    ignored = ingest.ignore(inspected).collect()
    rows = [row for row in inspected.collect() if row.reason not in ingest.PASSED_OVER]
    return Delivery(files | {"bad/nowhere.jpg": b"?"}, len(ignored), rows, ingest.add_up(ingest.count(inspected)))


def test_nothing_vanishes(delivery: Delivery) -> None:
    assert sorted(row.path for row in delivery.rows) == sorted(delivery.files)


def test_files_found_are_images_and_quarantine_together(delivery: Delivery) -> None:
    counts = delivery.counts
    assert counts["n_files"] == counts["n_images"] + counts["n_quarantined"] == len(delivery.files)


def test_hidden_files_and_files_of_other_names_are_counted_as_ignored(delivery: Delivery) -> None:
    assert delivery.n_ignored == len(IGNORED)


@pytest.mark.parametrize(("path", "reason"), REFUSED.items(), ids=REFUSED.values())
def test_a_file_is_refused_for_its_own_reason(path: str, reason: str, delivery: Delivery) -> None:
    assert delivery.row(path).reason == reason
    assert delivery.row(path).detail


def test_nothing_else_is_refused(delivery: Delivery) -> None:
    assert {row.path for row in delivery.rows if row.reason is not None} == REFUSED.keys()


def test_each_reason_is_one_that_the_schema_names(delivery: Delivery) -> None:
    of_archives = {*ingest.BAD_ARCHIVES, "duplicate_name", "encrypted", "nested_archive", "unsafe_name"}
    assert set(REFUSED.values()) | of_archives == set(ingest.REASONS)


def test_a_refused_file_has_its_length_in_bytes_and_nothing_of_an_image(delivery: Delivery) -> None:
    of_an_image = set(ingest.IMAGES.names) - {"path", "label"}
    for path in REFUSED.keys() - {"bad/nowhere.jpg"}:
        assert delivery.row(path).length == len(delivery.files[path])
        assert all(delivery.row(path)[name] is None for name in of_an_image)


def test_a_file_that_is_too_large_is_refused_with_both_numbers(delivery: Delivery) -> None:
    length = len(delivery.files["bad/large.bmp"])
    assert delivery.row("bad/large.bmp").detail == f"{length:,} bytes, more than {LIMITS['max_bytes']:,}"


def test_the_label_is_the_name_of_the_folder_whatever_its_letters_and_depth(delivery: Delivery) -> None:
    labels = {row.path: row.label for row in delivery.rows}
    assert labels == {path: path.split("/")[-2] if "/" in path else None for path in delivery.files}


def test_image_id_is_the_sha256_of_the_file(delivery: Delivery) -> None:
    for row in delivery.images():
        assert row.image_id == hashlib.sha256(delivery.files[row.path]).hexdigest()


def test_content_id_is_the_sha256_of_the_content(delivery: Delivery) -> None:
    for row in delivery.images():
        assert row.content_id == hashlib.sha256(row.content).hexdigest()


def test_content_is_an_rgb_image_of_that_width_and_height_once_exif_is_followed(delivery: Delivery) -> None:
    for row in delivery.images():
        stored = read(row.content)
        image = ImageOps.exif_transpose(stored)
        assert (stored.format in ("JPEG", "PNG"), image.mode, image.size) == (True, "RGB", (row.width, row.height))


def test_width_and_height_are_those_of_the_upright_image(delivery: Delivery) -> None:
    assert read(delivery.files["kinds/turned.jpg"]).size == (30, 20)
    turned = delivery.row("kinds/turned.jpg")
    assert (turned.width, turned.height) == (20, 30)


def test_the_thumbnail_is_pillows_average_over_boxes(delivery: Delivery) -> None:
    for row in delivery.images():
        assert row.thumbnail == ImageOps.exif_transpose(read(row.content)).resize((16, 16), Image.Resampling.BOX).tobytes()


def test_the_same_bytes_keep_a_row_for_each_file(delivery: Delivery) -> None:
    twins = [delivery.row(path) for path in ("twins/one.jpg", "twins/two.jpg", "Kiwi/three.jpg")]
    assert len({row.image_id for row in twins}) == 1
    assert [row.label for row in twins] == ["twins", "twins", "Kiwi"]


def test_the_film_is_that_of_the_name(delivery: Delivery) -> None:
    assert (delivery.row("Kiwi/0_100.jpg").film, delivery.row("twins/one.jpg").film) == ("Kiwi/", None)


def test_labels_and_bytes_are_counted_of_images_only(delivery: Delivery) -> None:
    images = delivery.images()
    assert delivery.counts["n_labels"] == len({row.label for row in images})
    assert delivery.counts["n_bytes"] == sum(len(row.content) for row in images)


def test_images_are_the_same_though_they_travel_one_by_one(
    spark: SparkSession, delivery: Delivery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "BATCH_BYTES", 1)
    paths = ("kinds/tiff.tiff", "kinds/turned.jpg", "bad/cut.jpg", "bad/empty.jpg")
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(delivery.files[path])
    rows = ingest.inspect_files(spark, ingest.find_files(spark, str(tmp_path), **ALL), **LIMITS).collect()
    assert sorted(rows, key=lambda row: row.path) == sorted(map(delivery.row, paths), key=lambda row: row.path)


# What cannot be read


@pytest.mark.parametrize(("folder", "path"), [("/proc", "self/mem"), (str(ROOT), "tests/golden")], ids=["error", "folder"])
def test_a_file_that_cannot_be_read_is_no_image_refused_but_an_error_with_its_name(folder: str, path: str) -> None:
    with pytest.raises(OSError, match=f"^{path} cannot be read: I"):
        open_file(folder, path, 9)


def test_a_file_that_is_not_as_long_as_it_was_listed_is_an_error_with_both_lengths(tmp_path: Path) -> None:
    (tmp_path / "Kiwi").mkdir()
    (tmp_path / "Kiwi/1.jpg").write_bytes(b"half")
    with pytest.raises(OSError, match=r"Kiwi/1\.jpg: 4 of 9 bytes were read"):
        open_file(str(tmp_path), "Kiwi/1.jpg", 9)


def open_file(folder: str, path: str, length: int) -> None:
    (file,) = ingest.files_in(folder.encode(), path.encode(), length, None)
    ingest.open_file(file, **{name: LIMITS[name] for name in ("max_bytes", "max_pixels", "min_side")})


# The cache of large images


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that takes small images too; of which no image is decoded a second time."""
    monkeypatch.setattr(ingest, "LARGE", 1)
    path = ingest.cache_in(str(tmp_path / "cache"))
    assert path
    return Path(path)


def decodes(monkeypatch: pytest.MonkeyPatch, cache: Path, content: bytes) -> int:
    """Look at an image, as a new worker does; return how often it was decoded. It looks the same in any case."""
    calls = []

    def counted(content: bytes, max_pixels: int) -> ingest.Looks:
        calls.append(content)
        return look_at(content, max_pixels)

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "look_at", counted)
        assert ingest.Cache(str(cache)).look(content, 10_000) == look_at(content, 10_000)
    return len(calls)


look_at = ingest.look_at


def test_a_large_image_is_decoded_once(cache: Path, image_bytes: ImageBytes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [decodes(monkeypatch, cache, image_bytes(seed=seed)) for seed in (0, 0, 1, 0, 1)] == [1, 0, 1, 0, 0]


def test_a_small_image_is_not_cached(cache: Path, image_bytes: ImageBytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "LARGE", len(image_bytes()) + 1)
    assert decodes(monkeypatch, cache, image_bytes()) == 1
    assert not cache.exists()


def test_an_image_that_is_kept_as_png_is_not_cached(
    cache: Path, image_bytes: ImageBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = image_bytes(format="WEBP")
    assert [decodes(monkeypatch, cache, content) for _ in range(2)] == [1, 1]


def test_a_cached_image_is_refused_if_it_has_too_many_pixels(
    cache: Path, image_bytes: ImageBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes(monkeypatch, cache, image_bytes(size=(20, 30)))
    with pytest.raises(ingest.Refused, match="more than 599 pixels"):
        ingest.Cache(str(cache)).look(image_bytes(size=(20, 30)), 599)


@pytest.mark.parametrize("column", ["width", "height", "thumbnail", "checksum"])
def test_a_row_of_the_cache_that_is_altered_is_not_believed(
    column: str, cache: Path, image_bytes: ImageBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes(monkeypatch, cache, image_bytes())
    value = "zeroblob(768)" if column == "thumbnail" else f"{column} + 1"
    alter(cache, column, value)
    assert [decodes(monkeypatch, cache, image_bytes()) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(("column", "value"), [("width", "NULL"), ("height", "height + 0.5"), ("thumbnail", "'text'")])
def test_a_row_of_the_cache_with_other_types_is_not_believed(
    column: str, value: str, cache: Path, image_bytes: ImageBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes(monkeypatch, cache, image_bytes())
    alter(cache, column, value)
    assert [decodes(monkeypatch, cache, image_bytes()) for _ in range(2)] == [1, 0]


def alter(cache: Path, column: str, value: str) -> None:
    with sqlite3.connect(cache) as rows:
        rows.execute(f"UPDATE looks SET {column} = {value}")


def test_a_cache_that_is_damaged_is_named_and_deleted(
    cache: Path, image_bytes: ImageBytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decodes(monkeypatch, cache, image_bytes())
    cache.write_bytes(b"no table at all" * 100)
    assert [decodes(monkeypatch, cache, image_bytes()) for _ in range(2)] == [1, 0]
    assert f"{cache} is damaged (file is not a database) and deleted" in capsys.readouterr().err


def test_a_cache_that_cannot_be_used_is_done_without_and_said_once(
    cache: Path, image_bytes: ImageBytes, capsys: pytest.CaptureFixture[str]
) -> None:
    without = ingest.Cache(str(cache / "nowhere"))
    for seed in range(3):
        assert without.look(image_bytes(seed=seed), 10_000) == look_at(image_bytes(seed=seed), 10_000)
    assert capsys.readouterr().err.count("cannot be used (unable to open database file)") == 1


def test_where_no_folder_can_be_made_there_is_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert ingest.cache_in(str(tmp_path / "file/cache")) is None
    assert "file/cache cannot be used" in capsys.readouterr().err


def test_another_decoder_has_another_cache(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "version", lambda name: f"{name} 99")
    assert ingest.cache_in(str(tmp_path / "cache")) != str(cache)


def test_elsewhere_there_is_no_cache() -> None:
    assert ingest.cache_in("s3://bucket/cache") is None


# A delivery that is elsewhere, where reading fails now and then

THERE = ("Kiwi/0_100.jpg", "kinds/turned.jpg", "kinds/kind of.bmp", "bad/cut.jpg", "bad/empty.jpg", "bad/large.bmp")


@pytest.fixture
def elsewhere(delivery: Delivery, tmp_path: Path) -> Iterator[webhdfs.Server]:
    """Serve some files of the delivery."""
    files = delivery.files | {"kinds/kind of.bmp": delivery.files["kinds/bmp.bmp"]}
    for path in THERE:
        file = tmp_path / "photos [2024] {new}" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(files[path])
    with webhdfs.serve(tmp_path) as server:
        yield server


def inspect(spark: SparkSession, server: webhdfs.Server, **choice: Any) -> list[Row]:
    listing = ingest.find_files(spark, f"{server.url}/photos [2024] {{new}}", **ALL | choice)
    rows = ingest.inspect_files(spark, listing, **LIMITS).collect()
    return [row for row in rows if row.reason not in ingest.PASSED_OVER]


@pytest.mark.parametrize("leave_out", [[], ["other/*"]], ids=["all", "a_part"])
def test_a_delivery_elsewhere_is_the_same_as_here(
    leave_out: list[str], spark: SparkSession, elsewhere: webhdfs.Server, delivery: Delivery
) -> None:
    (elsewhere.folder / "photos [2024] {new}/other").mkdir()
    (elsewhere.folder / "photos [2024] {new}/other/1.jpg").write_bytes(delivery.files["kinds/turned.jpg"])
    rows = {row.path: row for row in inspect(spark, elsewhere, leave_out=leave_out)}
    assert sorted(rows) == sorted([*THERE, *([] if leave_out else ["other/1.jpg"])])
    for path in THERE[:2] + THERE[3:]:
        assert rows[path] == delivery.row(path)


@pytest.mark.parametrize("way", ["busy", "cut", "short", "gone"])
def test_a_file_elsewhere_that_cannot_be_read_ends_the_stage_and_is_named(
    way: str, spark: SparkSession, elsewhere: webhdfs.Server
) -> None:
    elsewhere.fails["photos [2024] {new}/kinds/turned.jpg"] = (99, way)
    with pytest.raises(Exception, match=r"kinds/turned\.jpg"):
        inspect(spark, elsewhere)


def test_a_file_elsewhere_that_changes_after_it_was_listed_ends_the_stage_and_is_named(
    spark: SparkSession, elsewhere: webhdfs.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grow(*given: Any) -> Any:
        with (elsewhere.folder / "photos [2024] {new}/kinds/turned.jpg").open("ab") as file:
            file.write(b"more")
        return read(*given)

    read = ingest.read_elsewhere
    monkeypatch.setattr(ingest, "read_elsewhere", grow)
    with pytest.raises(Exception, match=r"kinds/turned\.jpg: 0 of [\d,]+ bytes were read"):
        inspect(spark, elsewhere)


@pytest.mark.parametrize("short", ["images", "quarantine", "ignored"])
def test_a_table_with_fewer_rows_than_were_counted_ends_the_stage(short: str, spark: SparkSession, tmp_path: Path) -> None:
    for table in ("images", "quarantine", "ignored"):
        spark.range(3 if table == short else 4).write.parquet(str(tmp_path / table))
    with pytest.raises(SystemExit, match=rf"^ingest: 3 rows of {short} were written for 4 files\. "):
        ingest.check_written(spark, str(tmp_path), {"n_images": 4, "n_quarantined": 4}, 4)
