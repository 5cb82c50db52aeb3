"""ingest: a folder of labelled photographs, every one decoded and checked, packed into a few Parquet files.

usage: ingest.py SOURCE OUTPUT --group_pattern REGEX --max_pixels N ...

reads   SOURCE             any tree of images; the folder that holds a file is its label
writes  OUTPUT/images      IMAGES, sorted by image_id and path within a file
        OUTPUT/quarantine  QUARANTINE, one row for each file that was refused

Nothing vanishes: files in = rows of images + rows of quarantine. Only names that start with `.` or `_` and names
without an image's extension are passed over; they are counted and said.
"""

import argparse
import hashlib
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import BmpImagePlugin, Image, ImageFile, ImageOps, UnidentifiedImageError
from pyspark import StorageLevel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema

# image_id and path: sorted by both within a file; path is unique.
IMAGES = T.StructType(
    [
        T.StructField("image_id", T.StringType()),  # SHA-256 of the file's bytes, hexadecimal
        T.StructField("path", T.StringType()),  # relative to SOURCE
        T.StructField("label", T.StringType()),  # name of the folder that holds the file
        T.StructField("film", T.StringType()),  # of which it is a frame, by its name; null where that says nothing
        T.StructField("width", T.IntegerType()),  # pixels, upright
        T.StructField("height", T.IntegerType()),
        T.StructField("thumbnail", T.BinaryType()),  # 16 x 16 RGB pixels, row by row, 768 bytes
        T.StructField("content_id", T.StringType()),  # SHA-256 of content; image_id, unless ingest had to re-encode it
        T.StructField("content", T.BinaryType()),  # JPEG or PNG, RGB; upright once turned as its EXIF orientation says
    ]
)
QUARANTINE = T.StructType(
    [
        T.StructField("path", T.StringType()),
        T.StructField("label", T.StringType()),
        T.StructField("length", T.LongType()),  # bytes
        T.StructField("reason", T.StringType()),  # one of REASONS
        T.StructField("detail", T.StringType()),
    ]
)
REASONS = ("empty", "not_an_image", "too_large", "too_many_pixels", "truncated", "unreadable")
FILES = "path string, length long, content binary"
INSPECTED = T.StructType([*IMAGES.fields, *QUARANTINE.fields[2:]])  # reason is null where the file is an image
ARROW_INSPECTED = to_arrow_schema(INSPECTED)

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "heif")
FORMATS = {  # that are read, by Pillow's name: what a file of each starts with
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n",
    "WEBP": rb"RIFF.{4}WEBP",
    "BMP": rb"BM",
    "GIF": rb"GIF8",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb".{4}ftyp(.{4}){0,7}?avi[fs]",
    "HEIF": rb".{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)",
}
OTHERS = {  # that people deliver by mistake
    rb"version https://git-lfs": "a Git LFS pointer: run `git lfs pull` where it came from",
    rb"\s*<(!doctype html|html|\?xml)": "a web page or XML, perhaps a failed download",
    rb"%PDF": "a PDF document",
    rb"PK\x03\x04": "a ZIP archive, or a document that is one",
    rb"\x1f\x8b|7z\xbc\xaf|Rar!|.{257}ustar": "an archive",
    rb".{4}ftypcrx |FUJIFILM|IIRO|IIU\0": "a raw photograph of a camera",
    rb"RIFF.{4}WAVE|ID3|OggS|fLaC": "a sound (WAV, MP3, Ogg or FLAC)",
    rb"RIFF.{4}AVI |.{4}ftyp|.{4}(moov|mdat)|\x1aE\xdf\xa3": "a video (AVI, MP4, QuickTime or Matroska)",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "a JPEG 2000",
    rb"\0\0\0\x0cJXL |\xff\x0a": "a JPEG XL",
    rb"8BPS": "a Photoshop document",
}
THUMBNAIL = (16, 16)
# What decoders raise on damaged files. A lack of memory is no fault of the file: it ends the task.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# What they say if bytes are missing.
SHORT = re.compile(
    "truncat|broken data|create decoder|requires a buffer|incomplete|premature|corrupt jpeg|end of file|out of range"
    "|not enough|not a|not defined|parsing failed|insufficient|too small|cannot read full|missing dimensions"
    "|no more images|data organization|chunk b'(?!IHDR)",
    re.IGNORECASE,
)
# A segment of a JPEG's header: its marker and its length.
SEGMENT = re.compile(rb"\xff([\xc0-\xcf\xda-\xfe])(..)", re.DOTALL)
BATCH_BYTES = 64 * 2**20  # of files or images that travel to or from a worker at once, about


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    spark = (
        SparkSession.builder.appName("ingest")
        # Whole files: these bound a worker's memory. Spark 3 knows the first only, and Arrow takes no 2 GiB in one batch.
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", max(1, min(32, 1024 // args.max_file_mb)))
        .config("spark.sql.execution.arrow.maxBytesPerBatch", BATCH_BYTES)
        # Photographs are small files: a task takes some 500, and folders are listed by the driver up to a thousand.
        .config("spark.sql.files.openCostInBytes", 256 * 2**10)
        .config("spark.sql.sources.parallelPartitionDiscovery.threshold", 1000)
        .getOrCreate()
    )
    files, paths, n_ignored = find_files(spark, args.source)
    inspected = inspect_files(
        files,
        args.source,
        paths,
        max_bytes=args.max_file_mb * 2**20,
        max_pixels=args.max_pixels,
        group_pattern=args.group_pattern,
    )
    quarantine = inspected.where("reason IS NOT NULL").select(*QUARANTINE.names)
    quarantine.repartition(1).sortWithinPartitions("path").write.parquet(f"{args.output}/quarantine")
    counts = count(inspected)
    if not counts["n_images"] or counts["n_quarantined"] > args.max_quarantine_ratio * counts["n_files"]:
        raise SystemExit(too_many_refused(quarantine, counts, args.max_quarantine_ratio))

    images = inspected.where("reason IS NULL").select(*IMAGES.names)
    n_parts = max(1, math.ceil(counts["n_bytes"] / (args.file_size_mb * 2**20)))
    (images.repartition(n_parts, "image_id").sortWithinPartitions("image_id", "path").write.parquet(f"{args.output}/images"))
    print(
        f"ingest: {counts['n_images']:,} images of {counts['n_labels']:,} labels; "
        f"{counts['n_quarantined']:,} files quarantined, {n_ignored:,} other files ignored"
    )


def find_files(spark: SparkSession, source: str) -> tuple[DataFrame, list[str], int]:
    """Every file below source that is named like an image.

    Returns
    -------
    DataFrame of path (relative to source), length (bytes) and content; all paths, also those that the DataFrame has no row
    of because they are empty or cannot be opened; the number of other files

    Raises
    ------
    SystemExit
        source does not exist, holds no file named like an image, or holds one outside any label's folder.
    """
    folder, file_system = hadoop_path(spark, source)
    if not (file_system.exists(folder) and file_system.getFileStatus(folder).isDirectory()):
        raise SystemExit(f"ingest: {source} is no folder. `images` in params.yaml names the folder of images.")
    folder = file_system.makeQualified(folder)
    root = folder.toString().rstrip("/")
    any_case = ["".join(f"[{letter}{letter.upper()}]" for letter in extension) for extension in EXTENSIONS]
    files = (
        spark.read.format("binaryFile")
        .option("recursiveFileLookup", True)
        .option("pathGlobFilter", "*.{" + ",".join(any_case) + "}")
        # A file that cannot be opened must not end the run: `inspect_files` sees that it is missing.
        .option("ignoreMissingFiles", True)
        .option("ignoreCorruptFiles", True)
        .load(re.sub(r"([\\{}\[\]*?])", r"\\\1", root))  # a folder's name, not a pattern
        .select(F.col("path").substr(len(root) + 2, 2**31 - 1).alias("path"), "length", "content")
    )
    jvm: Any = spark._jvm
    # In one call: to ask Java for one after the other takes a minute for a million.
    urls = jvm.org.apache.hadoop.util.StringUtils.join("\n", files._jdf.inputFiles())
    start = len(folder.toUri().getPath().rstrip("/")) + 1
    paths = [unquote(urlsplit(url).path)[start:] for url in urls.split("\n") if url]
    if not paths:
        raise SystemExit(f"ingest: no image below {source}: no name ends in {', '.join(EXTENSIONS)}.")
    unlabelled = sorted(path for path in paths if "/" not in path)
    if unlabelled:
        raise SystemExit(
            f"ingest: {len(unlabelled):,} of {len(paths):,} images have no label: {unlabelled[0]} is in {source} itself. "
            "Move each into a folder that is named as its label."
        )
    return files, paths, file_system.getContentSummary(folder).getFileCount() - len(paths)


def inspect_files(
    files: DataFrame,
    source: str,
    paths: list[str],
    *,
    max_bytes: int,
    max_pixels: int,
    group_pattern: str,
) -> DataFrame:
    """INSPECTED, one row for each of the paths: an image, or the reason why it is none."""

    def inspect(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        Image.MAX_IMAGE_PIXELS = None  # the limit is ours; Pillow's own only warns
        warnings.simplefilter("ignore")  # of metadata that is not as it should be; pixels are checked below
        for batch in batches:
            rows, n_bytes = [], 0
            for i in range(len(batch)):
                rows.append(inspect_file(**batch.slice(i, 1).to_pylist()[0]))
                n_bytes += len(rows[-1].get("content", b""))
                if n_bytes > BATCH_BYTES:
                    yield pa.RecordBatch.from_pylist(rows, schema=ARROW_INSPECTED)
                    rows, n_bytes = [], 0
            yield pa.RecordBatch.from_pylist(rows, schema=ARROW_INSPECTED)

    def inspect_file(path: str, length: int, content: bytes | None) -> dict[str, Any]:
        *_, label, name = path.split("/")
        row = {"path": path, "label": label, "length": length}
        try:
            if length > max_bytes:
                raise Refused("too_large", f"{length:,} bytes, more than {max_bytes:,}")
            if content is None:
                raise Refused("unreadable", "cannot be opened")
            image_id = hashlib.sha256(content).hexdigest()
            image, is_kept = decode(content, max_pixels)
        except Refused as refused:
            return row | {"reason": refused.reason, "detail": refused.detail}
        except MemoryError as error:
            raise MemoryError(f"{path} takes more memory than a worker has: lower max_pixels or use fewer cores") from error
        if not is_kept:
            content = to_png(image)
        return row | {
            "image_id": image_id,
            "film": film_of(label, name, group_pattern),
            "width": image.width,
            "height": image.height,
            "thumbnail": image.resize(THUMBNAIL, Image.Resampling.BOX).tobytes(),
            "content_id": hashlib.sha256(content).hexdigest(),
            "content": content,
        }

    # Written twice, as images and as quarantine, but decoded once.
    inspected = files.where(F.col("length") <= max_bytes).mapInArrow(inspect, INSPECTED).persist(StorageLevel.DISK_ONLY)
    if inspected.count() == len(paths):
        return inspected
    # Spark gives no row for a file that is empty, too large for us, or cannot be opened.
    import pandas as pd  # seldom needed, and slow to import for a program that uses `decode` only

    spark = files.sparkSession
    listed = spark.createDataFrame(pd.DataFrame({"path": paths}), "path string")
    unseen = listed.join(inspected, "path", "left_anti").collect()
    lengths = {path: length_of(spark, source, path) for (path,) in unseen}
    missing = [(path, length, None if length else b"") for path, length in lengths.items()]
    return inspected.union(spark.createDataFrame(missing, FILES).mapInArrow(inspect, INSPECTED))


def length_of(spark: SparkSession, source: str, path: str) -> int:
    """Bytes of a file; -1 if it is there no more."""
    file, file_system = hadoop_path(spark, f"{source}/{path}")
    return file_system.getFileStatus(file).getLen() if file_system.exists(file) else -1


def hadoop_path(spark: SparkSession, path: str) -> tuple[Any, Any]:
    """Make a path of any file system that Spark knows, and find that file system."""
    jvm: Any = spark._jvm
    hadoop = jvm.org.apache.hadoop.fs.Path(path)
    return hadoop, hadoop.getFileSystem(spark._jsc.hadoopConfiguration())


def count(inspected: DataFrame) -> dict[str, int]:
    is_image = F.col("reason").isNull()
    return (
        inspected.agg(
            F.count("*").alias("n_files"),
            F.count_if(~is_image).alias("n_quarantined"),
            F.count_if(is_image).alias("n_images"),
            F.countDistinct(F.when(is_image, F.col("label"))).alias("n_labels"),
            F.coalesce(F.sum(F.octet_length("content")), F.lit(0)).alias("n_bytes"),
        )
        .collect()[0]
        .asDict()
    )


def too_many_refused(quarantine: DataFrame, counts: dict[str, int], max_ratio: float) -> str:
    examples = "".join(
        f"\n  {row.path}: {row.reason}, {row.detail}" for row in quarantine.orderBy("path").limit(5).collect()
    )
    return (
        f"ingest: {counts['n_quarantined']:,} of {counts['n_files']:,} files are refused, more than "
        f"max_quarantine_ratio {max_ratio} allows. All are in the quarantine table; the first:{examples}"
    )


class Refused(Exception):
    """A file that is not an image we can use."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def decode(content: bytes, max_pixels: int) -> tuple[Image.Image, bool]:
    """Decode an image to its last byte; return it upright and RGB.

    Returns
    -------
    image of mode RGB; whether content can be kept: whether it is a JPEG or PNG that is RGB, upright or turned by EXIF

    Raises
    ------
    Refused
        with the reason and what was seen
    """
    if not content:
        raise Refused("empty", "0 bytes")
    try:
        image = open_image(content)
        if image.width * image.height > max_pixels:
            raise Refused("too_many_pixels", f"{image.width} x {image.height}, more than {max_pixels:,} pixels")
        is_kept = image.format in ("JPEG", "MPO", "PNG") and image.mode == "RGB" and not image.has_transparency_data
        return to_rgb(ImageOps.exif_transpose(load(image, content))), is_kept
    except DECODE_ERRORS as error:
        if "MAX_TEXT" in str(error):  # Pillow reads no PNG with more text; whoever opens what we keep shall not meet it
            return decode(without_text(content), max_pixels)[0], False
        raise broken(error) from error


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Read the header of an image, whose format its first bytes tell."""
    format = next((name for name, start in FORMATS.items() if re.match(start, content, re.DOTALL)), None)
    if format is None:
        raise Refused("not_an_image", what_else(content))
    if format == "HEIF":
        import pi_heif  # seldom needed, and slow to import

        pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    try:
        return Image.open(io.BytesIO(content), formats=[format])
    except UnidentifiedImageError:
        return Image.OPEN[format][0](io.BytesIO(content), "")  # fails too, and says why


def load(image: ImageFile.ImageFile, content: bytes) -> Image.Image:
    """Decode the pixels of an opened image, and see to what Pillow passes over or gets wrong."""
    if image.format in ("JPEG", "MPO"):
        return load_jpeg(image, content)
    if image.format == "PNG" and "transparency" in image.info:
        return load_png(image, content)
    if image.format == "TIFF":
        check_strips(image, content)
    if image.format == "BMP" and image.info["compression"] == BmpImagePlugin.BmpImageFile.COMPRESSIONS["RLE4"]:
        raise Refused("unreadable", "a BMP in RLE4, which Pillow gets wrong")
    drawn = image.tile[0].extents if image.format == "GIF" else None
    image.load()
    if drawn in (None, (0, 0, *image.size)):
        return image
    canvas = Image.new("RGB", image.size, "white")  # a GIF's first frame may be smaller than the GIF; the rest is clear
    canvas.paste(to_rgb(image).crop(drawn), drawn)
    return canvas


def load_jpeg(image: Image.Image, content: bytes) -> Image.Image:
    """Decode a JPEG to the pixels that Pillow reads, but refuse it if libjpeg warns that some of them are wrong.

    Pillow drops these warnings: a JPEG with a hole would be an image. These are harmless, so the file stays an image: bytes
    after its end, bytes between the segments of its header, odd metadata, odd parameters of a scan. Bytes between a scan and
    the end are not: most often the scan is damaged. Of 8 bytes or fewer libjpeg says nothing, nor of most bits that flipped.
    Where the colours are stored with less detail in an odd ratio, only Pillow decodes.
    """
    colours = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[image.mode]
    try:
        pixels = simplejpeg.decode_jpeg(content, colours)
    except ValueError:
        try:  # it stops at the first warning, which a harmless one may be
            simplejpeg.decode_jpeg(without_metadata(content), colours)
        except ValueError as error:
            if not re.search("Invalid SOS parameters|determine subsampling", str(error)):
                raise
        image.load()
        return image
    if image.mode == "CMYK":  # whose inks Pillow inverts
        image.load()
        return image
    decoded = Image.fromarray(pixels.squeeze(2) if image.mode == "L" else pixels)
    decoded.info = image.info
    return decoded


def without_metadata(content: bytes) -> bytes:
    """Leave out of a JPEG's header what does not change a scan, and bytes that belong to no segment."""
    kept, segment = [content[:2]], SEGMENT.search(content, 2)
    while segment and segment[1] != b"\xda":
        end = segment.start() + 2 + int.from_bytes(segment[2])
        if segment[1] < b"\xe0":
            kept.append(content[segment.start() : end])
        segment = SEGMENT.search(content, end)
    return b"".join([*kept, content[segment.start() :]]) if segment else content


def load_png(image: ImageFile.ImageFile, content: bytes) -> Image.Image:
    """Decode a PNG one of whose colours is clear, which Pillow compares with pixels that it has scaled to 8 bits already."""
    clear, stored = image.info["transparency"], image.tile[0].args
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[stored]
    if stored != "RGB;16B":
        image.load()
        return image
    lower = Image.open(io.BytesIO(content), formats=["PNG"])
    lower.tile = [lower.tile[0]._replace(args="RGB;16L")]  # of each 16 bits, the 8 that "RGB;16B" leaves out
    pixels = np.array(image)
    pixels[(pixels * np.uint16(256) + np.asarray(lower) == clear).all(axis=2)] = 255
    return Image.fromarray(pixels)


def check_strips(image: Any, content: bytes) -> None:
    """Decode the parts of a TIFF that are whole files of Deflate or JPEG; libtiff passes over the errors in these."""
    tags = image.tag_v2
    starts, lengths = (tags.get(strips, tags.get(tiles, ())) for strips, tiles in ((273, 324), (279, 325)))
    for start, length in zip(starts, lengths, strict=False):  # some old TIFF files state no lengths
        part = content[start : start + length]
        if tags.get(259) in (8, 32946):
            stream = zlib.decompressobj()
            while part:
                stream.decompress(part, 2**20)
                part = stream.unconsumed_tail
            stream.flush()
            if not stream.eof:
                raise EOFError("incomplete Deflate stream")
        elif tags.get(259) == 7:
            tables = tags.get(347, b"\xff\xd8\xff\xd9")
            simplejpeg.decode_jpeg(tables[:-2] + part[2:], "CMYK" if tags.get(277) == 4 else "RGB")


def without_text(content: bytes) -> bytes:
    """Leave out of a PNG its texts and its colour profile."""
    kept, start = [content[:8]], 8
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        if content[start + 4 : start + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(content[start:end])
        start = end
    return b"".join(kept)


def to_png(image: Image.Image) -> bytes:
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to mode RGB: 16 bits scaled to 8, transparency over white as a viewer shows it."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        image = Image.fromarray(np.where(values == image.info.get("transparency"), 255, values >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Refused("unreadable", f"mode {image.mode}: the range of its pixels is not known")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def broken(error: Exception) -> Refused:
    # libwebp says no more than that it could not create a decoder.
    is_short = isinstance(error, EOFError) or SHORT.search(str(error))
    return Refused("truncated" if is_short else "unreadable", f"{type(error).__name__}: {error}")


def what_else(content: bytes) -> str:
    """Say what a file that is no image seems to be."""
    for start, name in OTHERS.items():
        if re.match(start, content, re.DOTALL | re.IGNORECASE):
            return name
    return f"starts with {content[:16]!r}"


def film_of(label: str, name: str, group_pattern: str) -> str | None:
    """Name the film that a photograph is a frame of, by its label and what the pattern's groups match in its file's name."""
    match = re.search(group_pattern, name)
    return "/".join([label, *(part or "" for part in match.groups())]) if match else None


def regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def between(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """Make a parser of numbers of that kind, from low to high, for argparse."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:  # false for NaN too
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return value

    return number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("output")
    parser.add_argument("--group_pattern", type=regex, required=True, help="regular expression for a file's name")
    parser.add_argument(
        "--max_pixels", type=between(int, 1, 2**31 - 1), required=True, help="width x height of an image, at most"
    )
    parser.add_argument("--max_file_mb", type=between(int, 1, 2047), required=True, help="MiB of an image's file, at most")
    parser.add_argument(
        "--max_quarantine_ratio", type=between(float, 0, 1), required=True, help="share of files refused, at most"
    )
    parser.add_argument(
        "--file_size_mb", type=between(int, 1, 4096), required=True, help="MiB of images in an output file, about"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
