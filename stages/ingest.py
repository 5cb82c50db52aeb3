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
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError
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
        T.StructField("content", T.BinaryType()),  # JPEG or PNG, upright RGB
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

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"RIFF")
THUMBNAIL = (16, 16)
ORIENTATION = 0x0112  # EXIF tag
# What Pillow's decoders raise on damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    struct.error,
    MemoryError,
)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    spark = (
        SparkSession.builder.appName("ingest")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 32)  # whole files: bounds a worker's memory
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
            rows = [inspect_file(**file) for file in batch.to_pylist()]
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
    image of mode RGB; whether content can be kept: whether it is a JPEG or PNG that is upright RGB already

    Raises
    ------
    Refused
        with the reason and what was seen
    """
    if not content:
        raise Refused("empty", "0 bytes")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        if content.startswith(SIGNATURES):
            raise Refused("truncated", f"{len(content)} bytes, not even a header") from error
        raise Refused("not_an_image", what_else(content)) from error
    except DECODE_ERRORS as error:
        raise broken(error) from error
    if image.width * image.height > max_pixels:
        raise Refused("too_many_pixels", f"{image.width} x {image.height}, more than {max_pixels:,} pixels")
    try:
        image.load()
        rgb = to_rgb(ImageOps.exif_transpose(image))
    except DECODE_ERRORS as error:
        raise broken(error) from error
    as_it_is = image.format in ("JPEG", "PNG") and image.mode == "RGB" and not image.has_transparency_data
    return rgb, as_it_is and image.getexif().get(ORIENTATION, 1) == 1


def to_png(image: Image.Image) -> bytes:
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to mode RGB: 16 bits scaled to 8, transparency over white as a viewer shows it."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Refused("unreadable", f"mode {image.mode}: the range of its pixels is not known")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def broken(error: Exception) -> Refused:
    # libwebp says no more than that it could not create a decoder.
    is_short = isinstance(error, EOFError) or re.search("truncat|broken data|create decoder", str(error), re.I)
    return Refused("truncated" if is_short else "unreadable", f"{type(error).__name__}: {error}")


def what_else(content: bytes) -> str:
    """Say what a file that is no image seems to be."""
    start = content[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run `git lfs pull` where it came from"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page or XML, perhaps a failed download"
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
