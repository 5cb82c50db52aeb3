"""Damaged files of each format, judged by other decoders: what ingest makes of them, and where the two disagree, and why.

The judge is imagecodecs, with tifffile for the parts of a TIFF: libspng, giflib, libdeflate and own code where Pillow has
others. It says nothing of libjpeg's warnings. It has no HEVC, so that HEIC is judged by the sound image only.
"""

import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from stages import ingest
from tests.test_ingest import HEIC, encode

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of metadata, as in a worker

logging.getLogger("tifffile").setLevel(logging.CRITICAL)

N_EACH = 35  # mutations of each kind of file


def photograph() -> Image.Image:
    """Smooth colours, as a photograph has: noise would hide what damage does."""
    blocks = np.random.default_rng(7).integers(0, 256, (10, 13, 3), np.uint8)
    return Image.fromarray(blocks).resize((96, 75), Image.Resampling.BICUBIC)


IMAGE = photograph()
SOUND: dict[str, bytes] = {
    "jpeg": encode(IMAGE, "JPEG", quality=90),
    "progressive_jpeg": encode(IMAGE, "JPEG", quality=90, progressive=True),
    "jpeg_with_restarts": encode(IMAGE, "JPEG", quality=90, restart_marker_blocks=4),
    "png": encode(IMAGE, "PNG"),
    "palette_png": encode(IMAGE.quantize(64), "PNG"),
    "webp": encode(IMAGE, "WEBP", quality=80),
    "lossless_webp": encode(IMAGE, "WEBP", lossless=True),
    "gif": encode(IMAGE.quantize(64), "GIF"),
    "tiff": encode(IMAGE, "TIFF"),
    "lzw_tiff": encode(IMAGE, "TIFF", compression="tiff_lzw"),
    "deflate_tiff": encode(IMAGE, "TIFF", compression="tiff_adobe_deflate"),
    "jpeg_tiff": encode(IMAGE, "TIFF", compression="jpeg"),
    "bmp": encode(IMAGE, "BMP"),
    "avif": encode(IMAGE, "AVIF"),
    "heic": HEIC,
}
FORMATS = {name: "tiff" if "tiff" in name else name.partition("_")[0] for name in SOUND}
FORMATS |= {"progressive_jpeg": "jpeg", "palette_png": "png", "lossless_webp": "webp"}
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "jpeg": imagecodecs.jpeg8_decode,
    "png": imagecodecs.png_decode,
    "webp": imagecodecs.webp_decode,
    "gif": imagecodecs.gif_decode,
    "tiff": lambda content: tifffile.imread(io.BytesIO(content)),
    "bmp": imagecodecs.bmp_decode,
    "avif": imagecodecs.avif_decode,
}
EXPLAINED = {  # refused here, and read right by another decoder
    ("progressive_jpeg", "joined"),  # a scan stands there twice, the first time cut: libjpeg warns, the judge does not tell
}


def mutations(name: str) -> Iterator[tuple[str, bytes]]:
    """Damage as it happens: bits that flipped, holes, bytes lost or too many, ends missing, files joined."""
    sound = SOUND[name]
    random = np.random.default_rng([*SOUND].index(name))
    for i in range(N_EACH):
        start, length = int(random.integers(4, len(sound) - 4)), int(random.integers(1, 300))
        end = start + length
        bit = bytes([sound[start] ^ 1 << int(random.integers(8))])
        noise = random.integers(0, 256, length, np.uint8).tobytes()
        yield (
            ("flipped", sound[:start] + bit + sound[start + 1 :]),
            ("zeroed", sound[:start] + bytes(len(sound[start:end])) + sound[end:]),
            ("lost", sound[:start] + sound[end:]),
            ("inserted", sound[:start] + noise + sound[start:]),
            ("cut", sound[:start]),
            ("joined", sound[:start] + sound[start // 2 :]),
            ("cut but ended well", sound[:start] + sound[-12:]),
        )[i % 7]


def ingested(content: bytes) -> np.ndarray | None:
    """The pixels that ingest reads, uint8 (height, width, 3), or None. Anything but a refusal is raised."""
    try:
        image, _ = ingest.decode(content, max_pixels=100_000)
    except ingest.Refused:
        return None
    return np.asarray(image)


def judged(name: str, content: bytes) -> np.ndarray | None:
    """The pixels that other decoders read, or None."""
    try:
        return np.asarray(DECODERS[FORMATS[name]](content))
    except Exception:  # of any kind: it refuses
        return None


def is_equal(some: np.ndarray | None, others: np.ndarray | None) -> bool:
    return some is not None and others is not None and np.array_equal(some, others)


each = pytest.mark.parametrize("name", SOUND)
each_judged = pytest.mark.parametrize("name", [name for name in SOUND if name != "heic"])


def test_there_are_500_mutated_files() -> None:
    assert N_EACH * len(SOUND) >= 500


@each
def test_a_mutated_file_is_an_image_or_refused_and_nothing_else_happens(name: str) -> None:
    for _, content in mutations(name):
        ingested(content)


@each_judged
def test_what_is_an_image_has_the_pixels_that_another_decoder_reads(name: str) -> None:
    assert is_equal(judged(name, SOUND[name]), ingested(SOUND[name]))
    for damage, content in mutations(name):
        pixels = ingested(content)
        assert pixels is None or is_equal(judged(name, content), pixels), damage


@each_judged
def test_what_is_refused_another_decoder_refuses_or_reads_wrong(name: str) -> None:
    sound = ingested(SOUND[name])
    for damage, content in mutations(name):
        if ingested(content) is None and is_equal(judged(name, content), sound):
            assert (name, damage) in EXPLAINED


@pytest.mark.parametrize("name", ["png", "palette_png", "deflate_tiff"])
def test_where_the_pixels_have_a_checksum_no_damage_stays_unseen(name: str) -> None:
    sound = ingested(SOUND[name])
    for damage, content in mutations(name):
        pixels = ingested(content)
        assert pixels is None or is_equal(pixels, sound), damage


@pytest.mark.parametrize("name", ["jpeg", "progressive_jpeg", "jpeg_with_restarts"])
def test_of_jpegs_with_more_damage_than_a_flipped_bit_few_stay_images(name: str) -> None:
    sound = ingested(SOUND[name])
    pixels = [ingested(content) for damage, content in mutations(name) if damage != "flipped"]
    n_wrong = sum(each is not None and not is_equal(each, sound) for each in pixels)
    assert n_wrong <= len(pixels) / 5  # as it was without libjpeg's warnings: more than half
