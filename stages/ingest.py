"""ingest: a folder of labelled photographs, every one decoded and checked, packed into a few Parquet files.

usage: ingest.py SOURCE OUTPUT --group_pattern REGEX --max_pixels N ...

reads   SOURCE             any tree of images; the folder that holds a file is its label. An archive counts as a folder
writes  OUTPUT/images      IMAGES, sorted by image_id and path within a file
        OUTPUT/quarantine  QUARANTINE, one row for each file that should be an image and was refused
        OUTPUT/ignored     IGNORED, one row for each other file

Nothing vanishes: files below SOURCE = rows of images + rows of quarantine + rows of ignored. What a file is, its content
tells, whatever its name. Its name decides only whether it is hidden, left out, or refused rather than ignored.

An archive is a file whose content and name are those of one: many documents are ZIP archives by content. Its files count,
and not itself; but one that cannot be read to its end has a row of the quarantine too. Nothing is unpacked to disk.
"""

import argparse
import fnmatch
import hashlib
import io
import math
import os
import re
import sqlite3
import stat
import struct
import sys
import tarfile
import unicodedata
import uuid
import warnings
import zipimport
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import BmpImagePlugin, Image, ImageFile, ImageOps, UnidentifiedImageError
from pyspark import SparkFiles, StorageLevel
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema

# image_id and path: sorted by both within a file; path is unique.
IMAGES = T.StructType(
    [
        T.StructField("image_id", T.StringType()),  # SHA-256 of the file's bytes, hexadecimal
        T.StructField("path", T.StringType()),  # relative to SOURCE
        T.StructField("label", T.StringType()),  # the last label_depth folders of path, as Unicode's form NFC
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
IGNORED = T.StructType(
    [
        T.StructField("path", T.StringType()),
        T.StructField("length", T.LongType()),  # bytes
        T.StructField("reason", T.StringType()),  # one of PASSED_OVER
        T.StructField("kind", T.StringType()),  # what it is; of left_out, the pattern
    ]
)
BAD_ARCHIVES = ("archive_bomb", "bad_archive")  # reasons for an archive itself: nobody knows how many files are lost
REASONS = (
    *BAD_ARCHIVES,
    "duplicate_name",
    "empty",
    "encrypted",
    "nested_archive",
    "no_label",
    "not_an_image",
    "too_large",
    "too_many_pixels",
    "too_small",
    "truncated",
    "unreadable",
    "unsafe_name",
)
PASSED_OVER = ("hidden", "left_out", "no_image", "not_in_share")
# A path is in bytes, as a file system has it: it need not be UTF-8. content is null where Spark has not read it.
FILES = T.StructType(
    [
        T.StructField("path", T.BinaryType()),
        T.StructField("length", T.LongType()),
        T.StructField("content", T.BinaryType()),
    ]
)
# reason is null where the file is an image, and one of PASSED_OVER where it is ignored: detail is then the kind.
INSPECTED = T.StructType(
    [*IMAGES.fields, *QUARANTINE.fields[2:], T.StructField("file", T.StringType())]
)  # file: below SOURCE
ARROW_FILES, ARROW_INSPECTED = to_arrow_schema(FILES), to_arrow_schema(INSPECTED)

# Names that claim to be an image.
EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "heif")
# A camera's raw file looks like a TIFF, which would be its small preview.
RAW = ("arw", "cr2", "cr3", "dng", "nef", "nrw", "orf", "pef", "raf", "raw", "rw2", "srw")
# What operating systems and network disks leave, besides names that start with a dot.
SYSTEM = ("$recycle.bin", "@eadir", "__macosx", "desktop.ini", "ehthumbs.db", "system volume information", "thumbs.db")
ARCHIVES = (".tar.zst", ".tar.gz", ".tgz", ".tar", ".zip")  # names that claim to be an archive that is read
# Folders that tell no labels apart. The last is an archive that reports/pack.py writes.
SUBSETS = re.compile(r"train(ing)?|tests?|testing|val|valid|validation|dev|eval|.*\.part-[0-9a-f]{12}\.zip", re.I)
EXAMPLES = 10  # of files or labels that are named on screen
TASK_BYTES = 128 * 2**20  # of files in a task
OPEN_BYTES = 256 * 2**10  # that to open a file costs: a task has some 500 small files
LARGE = 2**18  # bytes of a file whose image is kept in the cache: a smaller one is decoded in some milliseconds
DECODERS = ("numpy", "pi-heif", "pillow", "simplejpeg")  # whose version may change how an image looks
LISTED = 10_000  # files whose names come from the JVM in one call
SMALL_ARCHIVE = 4 * 2**20  # bytes of one that shares its task with other files, and is not cut
# Bytes of an archive that is not on this machine, at most. Spark moves it as one value, and has several copies at once: 250
# MB were too much for a JVM of 2 GiB, and 1 GB for one of 6.
MOVABLE = 2**27
# An archive may hold so many bytes, and so many times its own; photographs hardly shrink, and bombs do by thousands.
HARMLESS, RATIO = 2**30, 100
ARCHIVE_HEADER = 2**20  # bytes of a name and other metadata of one file in a tar, at most
CAMERA_RAW = "a raw photograph of a camera"
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
    rb"\x1f\x8b|7z\xbc\xaf|Rar!|.{257}ustar|\x28\xb5\x2f\xfd": "an archive",
    rb".{4}ftypcrx |FUJIFILM|IIRO|IIU\0": CAMERA_RAW,
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


# What tarfile and decompressors raise on damaged archives; an OSError with a number is the file system's.
ARCHIVE_ERRORS = (tarfile.TarError, *DECODE_ERRORS)

Why = Callable[[str, bool], tuple[str, str] | None]
Look = Callable[[bytes, int], "Looks"]


class Listing(NamedTuple):
    """The files below SOURCE, by their paths relative to it, with their lengths in bytes."""

    root: str  # SOURCE, as the file system names it
    is_local: bool
    n_files: int  # an archive is one
    name: str  # among Spark's files, of the one that lists them: path and length of each, separated by zeros
    tasks: list[tuple[Any, ...]]  # what each reads: from where to where in that list, bytes; and the fields of a Part
    why: Why  # as reader_of_names returns it
    chosen: list[str] | None  # those to be read, if Spark reads them and not all are


class File(NamedTuple):
    """A file, perhaps in an archive."""

    path: bytes  # relative to SOURCE
    labelled: str  # the path that its label is told by: an archive's name without its ending
    length: int  # bytes
    read: Callable[[], bytes]  # raises Refused or OSError
    refused: "Refused | None" = None  # before it is read


class Looks(NamedTuple):
    """What is known of an image that has been decoded."""

    width: int  # pixels, upright
    height: int
    thumbnail: bytes
    png: bytes | None  # its pixels; None if the file itself is kept


class Part(NamedTuple):
    """A part of an archive."""

    start: int = 0  # bytes: of a tar, where its first header is; of a ZIP, where in the directory its first entry is
    stop: int | None = None  # where it ends; None for the end of the archive
    twins: tuple[int, ...] = ()  # where headers or entries are whose name an earlier one has


WHOLE = Part()


class Member(NamedTuple):
    """What an archive says of one of its files."""

    at: int  # where its header or entry is
    name: str
    length: int  # bytes, unpacked
    read: Callable[[], bytes]
    refused: "Refused | None" = None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    spark = (
        SparkSession.builder.appName("ingest")
        # Whole files: these bound a worker's memory. Spark 3 knows the first only, and Arrow takes no 2 GiB in one batch.
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", max(1, min(32, 1024 // args.max_file_mb)))
        .config("spark.sql.execution.arrow.maxBytesPerBatch", BATCH_BYTES)
        .config("spark.buffer.pageSize", "8m")  # to sort rows; not 64, of which each task has some
        # Photographs are small files: a task takes some 500, and folders are listed by the driver up to a thousand.
        .config("spark.sql.files.openCostInBytes", OPEN_BYTES)
        .config("spark.sql.sources.parallelPartitionDiscovery.threshold", 1000)
        # Spark 4 lists these with all that is below by one call for a thousand files, not by one for each folder.
        .config("spark.sql.sources.useListFilesFileSystemList", "s3,s3a")
        .getOrCreate()
    )
    listing = find_files(spark, args.source, take=args.take, leave_out=args.leave_out, share=args.share)
    inspected = inspect_files(
        spark,
        listing,
        max_bytes=args.max_file_mb * 2**20,
        max_pixels=args.max_pixels,
        min_side=args.min_side,
        label_depth=args.label_depth,
        group_pattern=args.group_pattern,
        cache=cache_in(spark.conf.get("spark.featurize.cache", None)),
    )
    # Few rows, beside images of gigabytes: three passes follow.
    others = inspected.where("reason IS NOT NULL").drop(*IMAGES.names[3:]).persist()
    quarantine = others.where(~F.col("reason").isin(*PASSED_OVER)).select(*QUARANTINE.names)
    quarantine.repartition(1).sortWithinPartitions("path").write.parquet(f"{args.output}/quarantine")
    ignored = ignore(others)
    ignored.repartition(1).sortWithinPartitions("path").write.parquet(f"{args.output}/ignored")
    groups = count(inspected)
    counts, folders, kinds = add_up(groups), folders_of(groups), kinds_of(groups)
    refused = say_refused(quarantine, counts["n_quarantined"]) if counts["n_quarantined"] else []
    for line in [*refused, *say_ignored(kinds), *say_labels(folders, args.label_depth)]:
        print(f"ingest: {line}")
    said = say_counts(counts, kinds)
    if not counts["n_images"]:
        raise SystemExit(f"ingest: no image below {args.source}: {said}")
    if too_many := say_too_many(counts, args.max_quarantined):
        raise SystemExit(f"ingest: {too_many}")
    for line in breaches(folders, args.labels, args.min_images_per_label):
        if args.on_breach == "end":
            raise SystemExit(f"ingest: {line}. ingest.on_breach=say in params.yaml goes on and only says so.")
        print(f"ingest: {line}")

    images = inspected.where("reason IS NULL").select(*IMAGES.names)
    n_parts = max(1, math.ceil(counts["n_bytes"] / (args.file_size_mb * 2**20)))
    (images.repartition(n_parts, "image_id").sortWithinPartitions("image_id", "path").write.parquet(f"{args.output}/images"))
    check_written(spark, args.output, counts, sum(n for _, n, _ in kinds))
    print(f"ingest: {said}")


def check_written(spark: SparkSession, output: str, counts: dict[str, int], n_ignored: int) -> None:
    """Exit if a table has not as many rows as files were counted."""
    for table, n in (("images", counts["n_images"]), ("quarantine", counts["n_quarantined"]), ("ignored", n_ignored)):
        n_rows = spark.read.parquet(f"{output}/{table}").count()
        if n_rows != n:
            raise SystemExit(
                f"ingest: {n_rows:,} rows of {table} were written for {n:,} files. Files that a lost task had read may have "
                "changed before they were read again. Run again."
            )


def find_files(spark: SparkSession, source: str, *, take: list[str], leave_out: list[str], share: float) -> Listing:
    """List every file below source, and share them out to tasks.

    Parameters
    ----------
    take, leave_out : patterns for paths, as fnmatch has them; none in take takes all
    share : of all other files, chosen by the SHA-256 of their paths

    Raises
    ------
    SystemExit
        source does not exist, is empty, has a link to a folder, or an image outside any label's folder; or it is on another
        file system and has names that Spark does not read there.
    """
    folder, file_system = hadoop_path(spark, source)
    if not (file_system.exists(folder) and file_system.getFileStatus(folder).isDirectory()):
        raise SystemExit(f"ingest: {source} is no folder. `images` in params.yaml names the folder of images.")
    folder = file_system.makeQualified(folder)
    is_local = folder.toUri().getScheme() == "file"
    root = folder.toUri().getPath() if is_local else folder.toString().rstrip("/")
    why = reader_of_names(take, leave_out, share)
    n_files, is_part = 0, False
    chosen: list[str] = []
    unlabelled: list[str] = []

    def files() -> Iterator[tuple[str, int]]:
        nonlocal n_files, is_part
        for path, length in list_local(root) if is_local else list_elsewhere(spark, folder, root):
            n_files += 1
            if "/" not in path and extension_of(path) in EXTENSIONS and not why(path, False):
                unlabelled.append(path)
            if not is_local:
                reason, _ = why(path, is_archive_name(path)) or ("", "")
                is_part |= reason in ("left_out", "not_in_share")
                if not reason:
                    chosen.append(path)
            yield path, length

    name, tasks = f"ingest-{uuid.uuid4()}", []
    with open(SparkFiles.get(name), "wb") as file:
        for listed, part in share_out(root if is_local else None, files(), why):
            tasks.append((file.tell(), file.tell() + file.write(listed), *part))
    spark.sparkContext.addFile(SparkFiles.get(name))  # for workers elsewhere
    if not n_files:
        raise SystemExit(f"ingest: no image below {source}: it has no file.")
    if unlabelled:
        raise SystemExit(
            f"ingest: {len(unlabelled):,} of {n_files:,} files have no label: {min(unlabelled)} is in {source} "
            "itself. Move each into a folder that is named as its label."
        )
    if passed_over := [path for path in chosen if any(name.startswith("_") for name in path.split("/"))]:
        raise SystemExit(
            f"ingest: Spark does not read names that start with _ from {root}: {len(passed_over):,} of "
            f"{n_files:,} files, such as {min(passed_over)}. Run ingest on this machine, or rename them."
        )
    return Listing(root, is_local, n_files, name, tasks, why, chosen if is_part else None)


def share_out(root: str | None, files: Iterable[tuple[str, int]], why: Why) -> "Iterator[tuple[bytes, Part]]":
    """Yield what a task reads: some 500 small files, or as large a part of an archive.

    Parameters
    ----------
    root : the folder on this machine that the files are in; None if they are elsewhere, where archives are not cut
    files : path and length of each

    Yields
    ------
    path and length of each file, with a zero after each; and the part
    """
    names: list[bytes] = []
    n_bytes = 0
    for path, length in files:
        name = b"%b\0%d\0" % (os.fsencode(path), length)
        if root is not None and length > SMALL_ARCHIVE and is_archive_name(path) and not why(path, True):
            for part in cut(root, os.fsencode(path), length):
                yield name, part
            continue
        names.append(name)
        cost = TASK_BYTES // SMALL_ARCHIVE * length if is_archive_name(path) else length
        n_bytes += max(cost, 0) + OPEN_BYTES
        if n_bytes >= TASK_BYTES:
            yield b"".join(names), WHOLE
            names, n_bytes = [], 0
    if names:
        yield b"".join(names), WHOLE


def listed_in(name: str, start: int, stop: int) -> Iterator[tuple[bytes, int]]:
    """Yield path and length of each file of a task; a worker has no other names in its memory."""
    with open(SparkFiles.get(name), "rb") as file:
        file.seek(start)
        fields = file.read(stop - start).split(b"\0")
    return zip(fields[:-1:2], map(int, fields[1::2]), strict=True)


def list_local(root: str) -> Iterator[tuple[str, int]]:
    """Yield path and length of each file; -1 for a link to nothing.

    Hadoop's listing would hide links, and cannot name a file whose name has a colon or is not in UTF-8.
    """
    links, folders = [], [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                path = entry.path[len(root.rstrip("/")) + 1 :]
                if not entry.is_dir():
                    yield path, entry.stat().st_size if entry.is_file() else -1
                elif entry.is_symlink():
                    links.append(path)
                else:
                    folders.append(entry.path)
    if links:
        raise SystemExit(
            f"ingest: {len(links):,} links to folders are below {root}, such as {min(links)}. DVC does not follow them, and "
            "would not see a change there. Put the folders themselves in their place."
        )


def list_elsewhere(spark: SparkSession, folder: Any, root: str) -> Iterator[tuple[str, int]]:
    """Yield path and length of each file on any file system that Hadoop knows."""
    jvm: Any = spark._jvm
    java, hadoop = jvm.java.lang, jvm.org.apache.hadoop
    statuses = hadoop.util.functional.RemoteIterators.toList(
        folder.getFileSystem(spark._jsc.hadoopConfiguration()).listFiles(folder, True)
    )

    # Java asks thousands of them in one call: to ask it for one after the other takes some minutes for a million.
    def ask(some: Any, getter: str, result: Any) -> list[str]:
        status = java.Class.forName("org.apache.hadoop.fs.FileStatus")
        get = java.invoke.MethodHandles.publicLookup().findVirtual(status, getter, java.invoke.MethodType.methodType(result))
        answers = jvm.java.util.ArrayList(some)
        answers.replaceAll(
            java.invoke.MethodHandleProxies.asInterfaceInstance(java.Class.forName("java.util.function.UnaryOperator"), get)
        )
        return list(hadoop.util.StringUtils.join("\0", answers).split("\0"))

    n = len(statuses)
    for start in range(0, n, LISTED):
        some = statuses.subList(start, min(start + LISTED, n))
        paths = ask(some, "getPath", java.Class.forName("org.apache.hadoop.fs.Path"))
        lengths = ask(some, "getLen", java.Long.TYPE)
        yield from ((path[len(root) + 1 :], int(length)) for path, length in zip(paths, lengths, strict=True))


def reader_of_names(take: list[str], leave_out: list[str], share: float) -> Why:
    """Make a function that tells of a path why its file need not be read, as reason and kind of IGNORED, or None.

    It is also told whether the file is an archive: the paths of its files tell what is taken, and what is in the share.
    """
    taken, left_out = ([(each, re.compile(fnmatch.translate(nfc(each)))) for each in given] for given in (take, leave_out))

    def why(path: str, is_archive: bool) -> tuple[str, str] | None:
        names = path.lower().split("/")
        if any(name.startswith(".") and name != ".." for name in names):  # which is unsafe, in an archive
            return "hidden", "hidden"
        if any(name in SYSTEM for name in names):
            return "hidden", "system"
        # With the slash, */test/* is also true of test/1.jpg.
        forms = (nfc(path), nfc(f"/{path}"))
        for pattern, regex in left_out:
            if any(map(regex.match, forms)):
                return "left_out", pattern
        if is_archive:
            return None
        if taken and not any(regex.match(form) for _, regex in taken for form in forms):
            return "left_out", "not taken"
        if int(hashlib.sha256(os.fsencode(path)).hexdigest()[:8], 16) >= share * 2**32:
            return "not_in_share", f"not in the share of {share:g}"
        return None

    return why


def inspect_files(
    spark: SparkSession,
    listing: Listing,
    *,
    max_bytes: int,
    max_pixels: int,
    min_side: int,
    label_depth: int,
    group_pattern: str,
    cache: str | None = None,
) -> DataFrame:
    """INSPECTED, one row for each file: an image, or the reason why it is none.

    Parameters
    ----------
    cache : the file of a Cache, if there is one
    """
    root, why, name = os.fsencode(listing.root) if listing.is_local else None, listing.why, listing.name
    tasks = spark.sparkContext.broadcast(listing.tasks)  # which a worker unpickles once, and its functions for each task

    def inspect(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Inspect what rows of FILES name, or tasks of these numbers."""
        forget_zips()
        quiet_pillow()
        look = Cache(cache).look if cache else look_at
        rows, n_bytes = [], 0
        for row in (row for batch in batches for i in range(len(batch)) for row in batch.slice(i, 1).to_pylist()):
            for inspected in inspect_task(look, row["id"]) if "id" in row else inspect_path(look, **row):
                rows.append(inspected)
                n_bytes += len(inspected.get("content", b""))
                if n_bytes > BATCH_BYTES:
                    yield pa.RecordBatch.from_pylist(rows, schema=ARROW_INSPECTED)
                    rows, n_bytes = [], 0
        yield pa.RecordBatch.from_pylist(rows, schema=ARROW_INSPECTED)

    def inspect_task(look: Look, number: int) -> Iterator[dict[str, Any]]:
        start, stop, *of_archive = tasks.value[number]
        part = Part(*of_archive)
        for path, length in listed_in(name, start, stop):
            yield from inspect_path(look, path, length, None, part)

    def inspect_path(
        look: Look, path: bytes, length: int, content: bytes | None, part: Part = WHOLE
    ) -> Iterator[dict[str, Any]]:
        shown = show(path)
        row = {"file": shown, "path": shown, "label": label_of(shown, label_depth), "length": length}
        if passed_over := why(os.fsdecode(path), is_archive_name(shown)):
            yield row | dict(zip(("reason", "detail"), passed_over, strict=True))
            return
        try:
            for file in files_in(root, path, length, content, part):
                yield {"file": shown} | inspect_file(look, file, is_member=file.path != path)
        except Refused as refused:
            yield row | {"reason": refused.reason, "detail": refused.detail}

    def inspect_file(look: Look, file: File, is_member: bool) -> dict[str, Any]:
        shown, label = show(file.path), label_of(file.labelled, label_depth)
        row = {"path": shown, "label": label, "length": file.length}
        try:
            if is_member and (passed_over := why(os.fsdecode(file.path), False)):
                raise Refused(*passed_over)
            content, looks = open_file(file, max_bytes=max_bytes, max_pixels=max_pixels, min_side=min_side, look=look)
        except Refused as refused:
            return row | {"reason": refused.reason, "detail": refused.detail}
        assert label is not None  # open_file refuses what is in no folder
        image_id = hashlib.sha256(content).hexdigest()
        return row | {
            "image_id": image_id,
            "film": film_of(label, shown.split("/")[-1], group_pattern),
            "width": looks.width,
            "height": looks.height,
            "thumbnail": looks.thumbnail,
            "content_id": hashlib.sha256(looks.png).hexdigest() if looks.png else image_id,
            "content": looks.png or content,
        }

    def unlist(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column("id").to_pylist():
                rows = [(path, length, None) for path, length in listed_in(name, *tasks.value[number][:2])]
                yield pa.RecordBatch.from_pylist([dict(zip(FILES.names, row, strict=True)) for row in rows], ARROW_FILES)

    # By numbers: to make rows of what tasks read, each task would need a second worker.
    numbers = spark.range(0, len(listing.tasks), 1, len(listing.tasks))
    # Written as images, as quarantine and as ignored, but decoded once.
    if listing.is_local:
        return numbers.mapInArrow(inspect, INSPECTED).persist(StorageLevel.DISK_ONLY)
    if any(is_archive_name(show(path)) for task in listing.tasks for path, _ in listed_in(name, *task[:2])):
        spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 1)  # Spark 3 bounds no batch by its bytes
    files = numbers.mapInArrow(unlist, FILES)
    listed = F.broadcast(files.select("path", "length"))
    there = read_elsewhere(spark, listing, max_bytes).join(listed, ["path", "length"], "left_semi")
    inspected = there.mapInArrow(inspect, INSPECTED).persist(StorageLevel.DISK_ONLY)
    seen = inspected.select(F.encode("file", "UTF-8").alias("path")).distinct()
    if seen.count() == listing.n_files:
        return inspected
    # Spark gives no row for a file that is hidden, empty, or too large. Nor have we one that changed since it was listed.
    others = files.join(seen, "path", "left_anti").mapInArrow(inspect, INSPECTED)
    return inspected.union(others.persist(StorageLevel.DISK_ONLY))


def forget_zips() -> None:
    """Let Python not read pyspark.zip anew for each of its folders, some 0.1 s in all, when Spark starts the next task."""
    for path in [path for path, finder in sys.path_importer_cache.items() if isinstance(finder, zipimport.zipimporter)]:
        del sys.path_importer_cache[path]


def quiet_pillow() -> None:
    """Let Pillow open what `open_file` is to judge, and say nothing of it."""
    Image.MAX_IMAGE_PIXELS = None  # the limit is ours; Pillow's own only warns
    warnings.simplefilter("ignore")  # of metadata that is not as it should be; pixels are checked by `decode`


def open_file(
    file: File, *, max_bytes: int, max_pixels: int, min_side: int, look: "Look | None" = None
) -> tuple[bytes, Looks]:
    """Read a file that is an image, and look at it.

    Parameters
    ----------
    look : `look_at`, or that of a Cache

    Raises
    ------
    Refused
        the file is no image that we can use. The reason is no_image, and the detail its kind, if neither name nor content
        claims to be one.
    MemoryError, OSError
        with the name of the file: it takes too much memory; it cannot be read, or not all of it
    """
    shown = show(file.path)
    try:
        if file.refused:
            raise file.refused
        if extension_of(shown) in RAW:
            raise Refused("not_an_image", CAMERA_RAW)
        if file.length > max_bytes:
            raise Refused("too_large", f"{file.length:,} bytes, more than {max_bytes:,}")
        try:
            file.path.decode()
        except UnicodeDecodeError as error:
            raise Refused("unreadable", "its name is not in UTF-8: rename it, as `convmv -f latin1 -t utf8` does") from error
        content = file.read()
        if len(content) != file.length:
            raise OSError(
                f"{shown}: {len(content):,} of {file.length:,} bytes were read. If nobody changes it now, run again."
            )
        looks = (look or look_at)(content, max_pixels)
        if min(looks.width, looks.height) < min_side:
            raise Refused("too_small", f"{looks.width} x {looks.height}, less than {min_side:,} on a side")
        if "/" not in shown:
            raise Refused("no_label", "in no folder")
    except Refused as refused:
        claims = extension_of(shown) in EXTENSIONS or is_archive_name(shown)
        if refused.reason in ("empty", "not_an_image", "too_large") and not claims:
            raise Refused("no_image", kind_of(shown, refused.detail)) from refused
        raise
    except MemoryError as error:
        raise MemoryError(f"{shown} takes more memory than a worker has: lower max_pixels or use fewer cores") from error
    return content, looks


def read_file(root: bytes | None, path: bytes, length: int) -> bytes:
    """Read a file that Spark has not read.

    Parameters
    ----------
    root : the folder that the path is relative to; None if it is not on this machine, where Spark reads all but empty files

    Raises
    ------
    Refused
        it is no regular file
    OSError
        it cannot be read, which need be no fault of the file; with its name
    """
    if length < 0:
        raise Refused("unreadable", "no regular file, nor a link to one")  # to read a pipe would wait for ever
    try:
        if root is None:
            return b""
        with open(os.path.join(root, path), "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise unread(path, error) from error


def unread(path: bytes, error: OSError) -> OSError:
    return OSError(f"{show(path)} cannot be read: {error.strerror}. If it can now, run again.")


def is_archive_name(path: str) -> bool:
    return path.lower().endswith(ARCHIVES)


def archive_of(head: bytes) -> str | None:
    """Name the kind of an archive by its first 512 bytes; None if it is none that is read."""
    kinds = {"zip": rb"PK(\x03\x04|\x05\x06)", "gzip": rb"\x1f\x8b", "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"}
    if kind := next((kind for kind, start in kinds.items() if re.match(start, head)), None):
        return kind
    try:  # an old tar has no more than a checksum; one without a file is all zeros
        return "tar" if not head.strip(b"\0") or tarfile.TarInfo.frombuf(head, "utf-8", "replace") else None
    except tarfile.HeaderError:
        return None


def files_in(root: bytes | None, path: bytes, length: int, content: bytes | None, part: Part = WHOLE) -> Iterator[File]:
    """Yield the file, or those of a part of an archive.

    Parameters
    ----------
    root : the folder that the path is relative to; None if it is not on this machine
    content : of the file; None if it has not been read

    Raises
    ------
    Refused
        it is named as an archive, and cannot be read as one to its end
    OSError
        with its name: it cannot be read, or not all of it
    """
    shown = show(path)
    as_file = File(path, shown, length, lambda: read_file(root, path, length) if content is None else content)
    if length <= 0 or not is_archive_name(shown):
        yield as_file
        return
    if root is None and length > MOVABLE:
        raise Refused("too_large", f"{length:,} bytes; Spark moves an archive of at most {MOVABLE:,}: pack smaller ones")
    folder, names, twins = shown[: -len(next(filter(shown.lower().endswith, ARCHIVES)))], set(), set(part.twins)
    with open_archive(root, path, length, content) as archive:
        if archive_of(head := archive.read(512)) is None and format_of(head):  # an image with another's name
            yield as_file
            return
        for member in members_of(archive, path, length, part):
            name, refused = clean(member.name)
            if member.at in twins or name in names:
                refused = refused or Refused("duplicate_name", "an earlier file of the archive has the same name")
            elif is_archive_name(name):
                refused = refused or Refused("nested_archive", "an archive in an archive: unpack the outer one")
            names.add(name)
            yield File(
                path + b"/" + os.fsencode(name),
                f"{folder}/{show(name)}",
                member.length,
                partial(read_member, path, member),
                refused or member.refused,
            )
    if part == WHOLE and not names:
        raise Refused("empty", "an archive without a file")


def open_archive(root: bytes | None, path: bytes, length: int, content: bytes | None) -> Any:
    """Open an archive; raise an OSError with its name if it cannot be read, or is not as long as it was listed."""
    try:
        file = open(os.path.join(root, path), "rb") if root is not None else io.BytesIO(content or b"")  # noqa: SIM115
        n = file.seek(0, os.SEEK_END)
        file.seek(0)
    except OSError as error:
        raise unread(path, error) from error
    if n != length:
        raise OSError(f"{show(path)}: {n:,} of {length:,} bytes were read. If nobody changes it now, run again.")
    return file


def members_of(file: BinaryIO, path: bytes, length: int, part: Part) -> Iterator[Member]:
    """Yield the files of a part of an archive.

    Raises
    ------
    Refused
        it cannot be read to its end
    OSError
        with its name: the file system cannot read it
    """
    n = 0
    try:
        file.seek(0)
        kind = archive_of(head := file.read(512))
        if kind is None:
            raise Refused("bad_archive", f"named as an archive, but {what_else(head)}")
        for member in zip_members(file, length, part) if kind == "zip" else tar_members(file, kind, length, part):
            yield member
            n += 1
    except ARCHIVE_ERRORS as error:
        if isinstance(error, OSError) and error.errno:
            raise unread(path, error) from error
        raise Refused("bad_archive", f"after {n:,} files: {error or type(error).__name__}") from error


def read_member(path: bytes, member: Member) -> bytes:
    """Read a file of the archive at path; raise what `members_of` raises."""
    try:
        return member.read()
    except ARCHIVE_ERRORS as error:
        if isinstance(error, OSError) and error.errno:
            raise unread(path, error) from error
        raise Refused("truncated" if re.search("end of data|Truncated", str(error)) else "unreadable", str(error)) from error


def clean(name: str) -> tuple[str, "Refused | None"]:
    """Leave out of a name in an archive what names the same folder; refuse one that leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or "\0" in name or re.match("/|[A-Za-z]:/", name):
        return name, Refused("unsafe_name", f"the name {show(name)!r} leads out of the archive")
    return "/".join(parts), None


def cut(root: str, path: bytes, length: int) -> list[Part]:
    """Cut an archive into parts of about a task each; one that is damaged, or that only a stream reads, is one part."""
    parts: list[Part] = []
    twins: list[int] = []
    names: set[str] = set()
    start = n_bytes = 0
    try:
        with open_archive(os.fsencode(root), path, length, None) as file:
            if archive_of(file.read(512)) not in ("zip", "tar"):
                return [WHOLE]
            for member in members_of(file, path, length, WHOLE):
                if n_bytes >= TASK_BYTES:
                    parts.append(Part(start, member.at, tuple(twins)))
                    start, n_bytes, twins = member.at, 0, []
                n_bytes += member.length + OPEN_BYTES
                name, _ = clean(member.name)
                if name in names:
                    twins.append(member.at)
                names.add(name)
    except Refused:
        return [WHOLE]
    except OSError as error:
        raise SystemExit(f"ingest: {error}") from None
    return [*parts, Part(start, None, tuple(twins))] if parts else [WHOLE]


def zip_members(file: BinaryIO, length: int, part: Part) -> Iterator[Member]:
    """Yield the files of a part of a ZIP archive, as its directory has them.

    Python's zipfile would read the whole directory for each part: of 100,000 files, 0.6 s and 69 MiB.
    """
    start, stop = zip_directory(file, length)
    at, stop = max(start, part.start), part.stop or stop
    file.seek(at)
    directory, total = memoryview(file.read(stop - at)), 0
    while directory:
        if len(directory) < 46 or directory[:4] != b"PK\1\2":
            raise Refused("bad_archive", f"its directory is damaged at byte {at:,}")
        maker, flags, method, crc, packed, size, n_name, n_extra, n_more, attributes, offset = struct.unpack_from(
            "<HxxHHxxxxIIIHHHxxxxII", directory, 4
        )
        n = 46 + n_name + n_extra + n_more
        if n > len(directory):
            raise Refused("bad_archive", f"its directory is damaged at byte {at:,}")
        text = zip_name(bytes(directory[46 : 46 + n_name]), is_utf8=bool(flags & 0x800))
        size, packed, offset = long_numbers(bytes(directory[46 + n_name :][:n_extra]), size, packed, offset)
        total += size
        if total > HARMLESS + RATIO * length:
            raise Refused("archive_bomb", f"{total:,} bytes and more in {length:,}")
        refused = None
        if maker >> 8 == 3 and stat.S_ISLNK(attributes >> 16):
            refused = Refused("unreadable", "a link: pack the file itself")
        elif flags & 1:
            refused = Refused("encrypted", "it has a password: pack it without")
        if not text.endswith("/"):
            yield Member(at, text, size, partial(read_zipped, file, offset, packed, size, method, crc), refused)
        at, directory = at + n, directory[n:]


def zip_directory(file: BinaryIO, length: int) -> tuple[int, int]:
    """Find where the directory of a ZIP archive starts and stops, by the record at its end."""
    tail = max(0, length - 2**16 - 64)
    file.seek(tail)
    end = file.read()
    at = end.rfind(b"PK\5\6")
    if not 0 <= at <= len(end) - 22:
        raise Refused("bad_archive", "a ZIP archive without the directory at its end: it is cut short, or damaged")
    disk, size, start = struct.unpack_from("<HxxxxxxII", end, at + 4)
    stop = tail + at
    if end[max(0, at - 20) : at].startswith(b"PK\6\7"):  # ZIP64: more than 65,535 files, or 4 GiB
        (stop,) = struct.unpack_from("<Q", end, at - 12)
        file.seek(min(stop, length))
        size, start = struct.unpack("<40xQQ", file.read(56).ljust(56))
    if disk not in (0, 0xFFFF) or start + size != stop:
        raise Refused("bad_archive", f"its directory should end at byte {start + size:,}, and does at {stop:,}: not whole")
    return start, stop


def long_numbers(extra: bytes, *numbers: int) -> Iterator[int]:
    """Yield the numbers of an entry of a ZIP's directory; those of more than 32 bits are in its extra field."""
    at, longs = 0, b""
    while at + 4 <= len(extra):
        key, n = struct.unpack_from("<HH", extra, at)
        longs = extra[at + 4 : at + 4 + n] if key == 1 else longs
        at += 4 + n
    for number in numbers:
        is_long = number == 0xFFFFFFFF and len(longs) >= 8
        yield int.from_bytes(longs[:8], "little") if is_long else number
        longs = longs[8:] if is_long else longs


def zip_name(name: bytes, is_utf8: bool) -> str:
    """Decode a name of a ZIP archive. macOS writes UTF-8 and does not say so; others that say nothing, code page 437."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = name.decode("utf-8", "surrogateescape") if is_utf8 else name.decode("cp437")
    return text if "/" in text else text.replace("\\", "/")  # which some programs of Windows write


def read_zipped(file: BinaryIO, offset: int, packed: int, length: int, method: int, crc: int) -> bytes:
    """Read a file of a ZIP archive; never more than length bytes, whatever is packed there."""
    if method not in (0, 8):
        raise Refused("unreadable", f"packed by method {method} of ZIP: pack it by Deflate")
    file.seek(offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4" or packed > 2 * length + 1024:
        raise Refused("unreadable", "the archive's directory does not lead to it")
    file.seek(sum(struct.unpack_from("<HH", header, 26)), os.SEEK_CUR)
    content = file.read(packed)
    if method == 8:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, length + 1)
    if len(content) != length or zlib.crc32(content) != crc:
        raise Refused("unreadable", "the archive has another checksum for it: it is damaged")
    return content


class Header(tarfile.TarInfo):
    """A header of a tar; where it is damaged, tarfile itself would see the end of the archive."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in b"xgXLK" and header.size > ARCHIVE_HEADER):
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if str(error) == "end of file header":
                raise
            raise tarfile.ReadError("no end mark: cut short" if str(error) == "empty header" else str(error)) from error


class Stream:
    """A compressed tar, unpacked as it is read, as long as that is no bomb."""

    def __init__(self, file: BinaryIO, kind: str, length: int) -> None:
        self.unpacked, self.length, self.n = pa.CompressedInputStream(file, kind), length, 0

    def read(self, size: int) -> bytes:
        content: bytes = self.unpacked.read(size)
        self.n += len(content)
        if self.n > HARMLESS + RATIO * self.length:
            raise Refused("archive_bomb", f"{self.n:,} bytes and more in {self.length:,}")
        return content


def tar_members(file: BinaryIO, kind: str, length: int, part: Part) -> Iterator[Member]:
    """Yield the files of a part of a tar; of a compressed one, each must be read before the next."""
    file.seek(part.start)
    mode, opened = ("r:", file) if kind == "tar" else ("r|", Stream(file, kind, length))
    open_tar: Any = partial(tarfile.open, tarinfo=Header, encoding="utf-8", errors="surrogateescape", bufsize=2**20)
    tar = open_tar(mode=mode, fileobj=opened)
    while (header := tar.next()) is not None and (part.stop is None or header.offset < part.stop):
        tar.members.clear()  # which would keep all headers
        if header.size < 0:  # as an extended header may say
            raise tarfile.ReadError(f"a file of {header.size:,} bytes")
        if header.isreg():
            yield Member(header.offset, header.name, header.size, tar.extractfile(header).read)
        elif not header.isdir():
            what = "a link: pack with `tar --dereference --hard-dereference`" if header.linkname else "no regular file"
            yield Member(header.offset, header.name, 0, bytes, Refused("unreadable", what))
    while header is None and (block := tar.fileobj.read(2**20)):
        if block.strip(b"\0"):
            raise tarfile.ReadError("bytes after its end mark: two archives in one file?")


def read_elsewhere(spark: SparkSession, listing: Listing, max_bytes: int) -> DataFrame:
    """FILES that are not on this machine, read by Spark; those of more than max_bytes are left out, if they are no archives.

    Spark asks again for one that cannot be read, as often as it repeats a task, and then ends the stage with its name: that
    need be no fault of the file.
    """
    paths = [listing.root] if listing.chosen is None else [f"{listing.root}/{path}" for path in listing.chosen]
    is_archive = F.lower("path").rlike("(" + "|".join(map(re.escape, ARCHIVES)) + ")$")
    return (
        spark.read.format("binaryFile")
        .option("recursiveFileLookup", True)
        .load([re.sub(r"([\\{}\[\]*?])", r"\\\1", path) for path in paths])  # names, not patterns
        .where((F.col("length") <= max_bytes) | ((F.col("length") <= MOVABLE) & is_archive))
        .select(F.encode(F.col("path").substr(len(listing.root) + 2, 2**31 - 1), "UTF-8").alias("path"), "length", "content")
    )


def hadoop_path(spark: SparkSession, path: str) -> tuple[Any, Any]:
    """Make a path of any file system that Spark knows, and find that file system."""
    jvm: Any = spark._jvm
    hadoop = jvm.org.apache.hadoop.fs.Path(path)
    return hadoop, hadoop.getFileSystem(spark._jsc.hadoopConfiguration())


def ignore(inspected: DataFrame) -> DataFrame:
    """IGNORED: files that were not read, and those whose content and name are not those of an image."""
    is_ignored = F.col("reason").isin(*PASSED_OVER)
    return inspected.where(is_ignored).select("path", "length", "reason", F.col("detail").alias("kind"))


def count(inspected: DataFrame) -> list[Row]:
    """Count the files of each folder by what became of them: label, folder, reason, kind, n, n_bytes, path of the first."""
    is_other = F.col("reason").isin(*PASSED_OVER)
    keys = ("label", F.regexp_replace("path", "/[^/]*$", "").alias("folder"), "reason", F.when(is_other, F.col("detail")))
    return (
        inspected.groupBy(*keys[:3], keys[3].alias("kind"))
        .agg(F.count("*").alias("n"), F.sum(F.octet_length("content")).alias("n_bytes"), F.min("path").alias("path"))
        .collect()
    )


def add_up(groups: list[Row]) -> dict[str, int]:
    images = [group for group in groups if group.reason is None]
    n_images = sum(group.n for group in images)
    n_quarantined = sum(group.n for group in groups if group.reason not in (None, *PASSED_OVER))
    return {
        "n_files": n_images + n_quarantined,
        "n_quarantined": n_quarantined,
        "n_bad_archives": sum(group.n for group in groups if group.reason in BAD_ARCHIVES),
        "n_images": n_images,
        "n_labels": len({group.label for group in images}),
        "n_bytes": sum(group.n_bytes for group in images),
    }


def folders_of(groups: list[Row]) -> list[tuple[str, str, int]]:
    """List the folders that have images: label, path of the folder, number of images."""
    return sorted((group.label, group.folder, group.n) for group in groups if group.reason is None)


def kinds_of(groups: list[Row]) -> list[tuple[str, int, str]]:
    """List the kinds of ignored files: kind, number, path of the first; the most frequent first."""
    others = [(group.kind, group.n, group.path) for group in groups if group.reason in PASSED_OVER]
    kinds: dict[str, tuple[int, str]] = {}
    for kind, n, path in others:
        n_before, first = kinds.get(kind, (0, path))
        kinds[kind] = (n_before + n, min(first, path))
    return sorted(((kind, n, first) for kind, (n, first) in kinds.items()), key=lambda kind: (-kind[1], kind[0]))


def say_counts(counts: dict[str, int], kinds: list[tuple[str, int, str]]) -> str:
    named = [f"{n:,} {kind}" for kind, n, _ in kinds[:EXAMPLES]] + ["others"] * (len(kinds) > EXAMPLES)
    return (
        f"{counts['n_images']:,} images of {counts['n_labels']:,} labels; {counts['n_quarantined']:,} files quarantined, "
        f"{sum(n for _, n, _ in kinds):,} ignored" + (f" ({', '.join(named)})" if named else "")
    )


def say_refused(quarantine: DataFrame, n_quarantined: int) -> list[str]:
    """Name the first files that were refused, with their reasons."""
    lines = [
        f"refused: {row.path}: {row.reason}, {row.detail}" for row in quarantine.orderBy("path").limit(EXAMPLES).collect()
    ]
    n_more = n_quarantined - len(lines)
    return [*lines, *([f"refused: {n_more:,} more; the quarantine table has all"] if n_more else [])]


def say_ignored(kinds: list[tuple[str, int, str]]) -> list[str]:
    """Name one file of each kind that was ignored."""
    return [f"ignored: {n:,} {kind}, such as {example}" for kind, n, example in kinds[:EXAMPLES]]


def say_labels(folders: list[tuple[str, str, int]], label_depth: int) -> list[str]:
    """Warn of labels that may be one, and of a label that may be several.

    Parameters
    ----------
    folders : as count_folders returns them
    """
    images: dict[str, int] = {}
    parents: dict[str, dict[str, int]] = {}
    for label, folder, n in folders:
        images[label] = images.get(label, 0) + n
        above = "/".join(each for each in folder.split("/")[:-label_depth] if not SUBSETS.fullmatch(each))
        parents.setdefault(label, {}).setdefault(above, 0)
        parents[label][above] += n
    alike: dict[str, list[str]] = {}
    for label in images:
        alike.setdefault("".join(label.casefold().split()), []).append(label)
    lines = [
        "warning: labels that differ by capitals or blanks only: "
        + ", ".join(f"{label!r} ({images[label]:,} images)" for label in labels)
        for labels in alike.values()
        if len(labels) > 1
    ]
    lines += [f"warning: the label {label!r} starts or ends with a blank" for label in images if label != label.strip()]
    several = {label: above for label, above in parents.items() if len(above) > 1}
    if several:
        label, folders_above = next(iter(several.items()))
        named = ", ".join(f"{name or '.'} {n:,}" for name, n in sorted(folders_above.items())[:EXAMPLES])
        lines.append(
            f"note: {len(several):,} of {len(images):,} labels lie below several folders, such as {label!r} ({named}). "
            f"If these are different things, ingest.label_depth={label_depth + 1} in params.yaml tells them apart."
        )
    return lines[:EXAMPLES] + ([f"and {len(lines) - EXAMPLES:,} more warnings"] if len(lines) > EXAMPLES else [])


def say_too_many(counts: dict[str, int], max_quarantined: int | float) -> str | None:
    """Say that more files are refused than max_quarantined allows, a number or a share of all; None if not."""
    if counts["n_bad_archives"] and not isinstance(max_quarantined, int):
        return (
            f"{counts['n_bad_archives']:,} archives cannot be read to their ends. Nobody knows how many files they have, so "
            f"max_quarantined {max_quarantined}, a share of all, allows none. All are in the quarantine table. Mend or "
            "remove them, or set max_quarantined to a number of files."
        )
    allowed = max_quarantined if isinstance(max_quarantined, int) else max_quarantined * counts["n_files"]
    if counts["n_quarantined"] <= allowed:
        return None
    return (
        f"{counts['n_quarantined']:,} of {counts['n_files']:,} files are refused, more than max_quarantined "
        f"{max_quarantined} allows. All are in the quarantine table. Mend or remove them, or set max_quarantined higher."
    )


def breaches(folders: list[tuple[str, str, int]], expected: list[str], min_images: int) -> Iterator[str]:
    """Yield what the labels should be and are not.

    Parameters
    ----------
    folders : as count_folders returns them
    expected : names of labels, or their number; empty if any will do
    min_images : of each label, at least
    """
    images: dict[str, int] = {}
    for label, _, n in folders:
        images[label] = images.get(label, 0) + n
    if len(expected) == 1 and expected[0].isdigit():
        if len(images) != int(expected[0]):
            yield f"{len(images):,} labels instead of {int(expected[0]):,}"
    elif expected:
        wanted = {nfc(each) for each in expected}
        for what, labels in (("are missing", wanted - images.keys()), ("were not expected", images.keys() - wanted)):
            if labels:
                yield f"{len(labels):,} labels {what}: {', '.join(sorted(labels)[:EXAMPLES])}"
    few = {label: n for label, n in images.items() if n < min_images}
    if few:
        named = ", ".join(f"{label} {n:,}" for label, n in list(few.items())[:EXAMPLES])
        yield f"{len(few):,} labels have less than {min_images:,} images: {named}"


class Refused(Exception):
    """A file that is not an image we can use."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def look_at(content: bytes, max_pixels: int) -> Looks:
    """Decode an image, and keep what the tables have of it; raise what `decode` raises."""
    image, is_kept = decode(content, max_pixels)
    thumbnail = image.resize(THUMBNAIL, Image.Resampling.BOX).tobytes()
    return Looks(image.width, image.height, thumbnail, None if is_kept else to_png(image))


class Cache:
    """What large images look like, by the SHA-256 of their files: to decode one takes 20 times as long as to hash it.

    It is a file of SQLite, which several workers and runs may use at once. Each row has a checksum. A damaged file is
    deleted. Where it cannot be used, images are decoded to the end of the task.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.rows: sqlite3.Connection | None = None
        self.is_usable = True

    def look(self, content: bytes, max_pixels: int) -> Looks:
        """Return what `look_at` does. Images that are refused or written again as PNG are decoded each time."""
        if len(content) < LARGE or not self.is_usable:
            return look_at(content, max_pixels)
        name = hashlib.sha256(content).digest()
        found = self.ask("SELECT width, height, thumbnail, checksum FROM looks WHERE name = ?", name)
        is_sound = found and [*map(type, found)] == [int, int, bytes, int] and checksum(name, *found[:3]) == found[3]
        if is_sound and found[0] * found[1] <= max_pixels:
            return Looks(found[0], found[1], found[2], None)
        looks = look_at(content, max_pixels)
        if looks.png is None and self.is_usable:
            row = name, *looks[:3]
            self.ask("INSERT OR REPLACE INTO looks VALUES (?, ?, ?, ?, ?)", *row, checksum(*row))
        return looks

    def ask(self, statement: str, *values: Any) -> Any:
        """Return the first row that the statement finds; None if there is none, or the file cannot be used."""
        try:
            if self.rows is None:
                self.rows = sqlite3.connect(self.path, timeout=60, isolation_level=None)
                # Of a file that a crash damages, nothing is lost but time.
                self.rows.executescript("PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF;")
                self.rows.execute(
                    "CREATE TABLE IF NOT EXISTS looks (name BLOB PRIMARY KEY, width INT, height INT, thumbnail BLOB, "
                    "checksum INT) WITHOUT ROWID"
                )
            return self.rows.execute(statement, values).fetchone()
        except sqlite3.OperationalError as error:  # such as a full disk, or a lock that somebody holds
            print(f"ingest: {self.path} cannot be used ({error}): images are decoded again", file=sys.stderr)
            self.is_usable = False
        except sqlite3.DatabaseError as error:
            print(f"ingest: {self.path} is damaged ({error}) and deleted: images are decoded again", file=sys.stderr)
            self.rows = None
            with suppress(FileNotFoundError):
                os.unlink(self.path)
        return None


def checksum(name: bytes, width: int, height: int, thumbnail: bytes) -> int:
    """Compute the CRC-32 of a row of the cache."""
    return zlib.crc32(b"%b%d %d %b" % (name, width, height, thumbnail))


def cache_in(place: str | None) -> str | None:
    """Name the file of the cache in a folder of this machine, and make the folder; None if there is none.

    The name covers all that determines how an image looks, except the image: this file, and the decoders.
    """
    if not place or "://" in place:
        return None
    try:
        os.makedirs(place, exist_ok=True)
    except OSError as error:
        print(f"ingest: {place} cannot be used ({error}): images are decoded again", file=sys.stderr)
        return None
    with open(__file__, "rb") as source:
        determines = [source.read(), *(f"{name} {version(name)}".encode() for name in DECODERS)]
    return os.path.abspath(f"{place}/ingest-{hashlib.sha256(b' '.join(determines)).hexdigest()[:32]}.sqlite")


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
        decoded = load(image, content)
        ImageOps.exif_transpose(decoded, in_place=True)
        return to_rgb(decoded), is_kept
    except DECODE_ERRORS as error:
        if "MAX_TEXT" in str(error):  # Pillow reads no PNG with more text; whoever opens what we keep shall not meet it
            return decode(without_text(content), max_pixels)[0], False
        raise broken(error) from error


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Read the header of an image, whose format its first bytes tell."""
    format = format_of(content)
    if format is None:
        raise Refused("not_an_image", what_else(content))
    if format == "HEIF":
        import pi_heif  # seldom needed, and slow to import

        pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    try:
        return Image.open(io.BytesIO(content), formats=[format])
    except UnidentifiedImageError:
        return Image.OPEN[format][0](io.BytesIO(content), "")  # fails too, and says why


def format_of(content: bytes) -> str | None:
    """Name the format of an image as Pillow does, by its first bytes; None if it is not one of FORMATS."""
    return next((name for name, start in FORMATS.items() if re.match(start, content, re.DOTALL)), None)


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
    return image if image.mode == "RGB" else image.convert("RGB")


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


def label_of(path: str, label_depth: int) -> str | None:
    """Name the label of a file: the last label_depth folders of its path, in Unicode's form NFC; None without a folder."""
    folders = path.split("/")[:-1]
    return nfc("/".join(folders[-label_depth:])) if folders else None


def film_of(label: str, name: str, group_pattern: str) -> str | None:
    """Name the film that a photograph is a frame of, by its label and what the pattern's groups match in its file's name."""
    match = re.search(group_pattern, name)
    return "/".join([label, *(part or "" for part in match.groups())]) if match else None


def show(path: bytes | str) -> str:
    """Write a path as UTF-8, also one that is not."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def nfc(text: str) -> str:
    """Compose letters and their accents: macOS writes them apart, others as one."""
    return unicodedata.normalize("NFC", text)


def extension_of(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def kind_of(name: str, seen: str = "") -> str:
    """Say what a file is that is no image: what was seen in it, if that is one of OTHERS; or else the ending of its name."""
    if seen in OTHERS.values():
        return re.sub(r"^an? |([,:]| \().*", "", seen)  # without its article and what is said besides
    return extension_of(name) or "without extension"


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


def count_or_share(text: str) -> int | float:
    """Read a whole number, or a share from 0 to 1 with a decimal point."""
    try:
        return between(int, 0, 10**9)(text) if text.isdigit() else between(float, 0, 1)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of files nor a share, such as 0.01") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("output")
    # DVC writes no flag for an empty list.
    parser.add_argument("--take", nargs="+", default=[], help="patterns for paths; others are left out")
    parser.add_argument("--leave_out", nargs="+", default=[], help="patterns for paths that are left out")
    parser.add_argument("--share", type=between(float, 1e-6, 1), required=True, help="of the files, chosen by SHA-256")
    parser.add_argument(
        "--label_depth", type=between(int, 1, 16), required=True, help="folders above a file that make its label"
    )
    parser.add_argument("--group_pattern", type=regex, required=True, help="regular expression for a file's name")
    parser.add_argument(
        "--max_pixels", type=between(int, 1, 2**31 - 1), required=True, help="width x height of an image, at most"
    )
    parser.add_argument("--min_side", type=between(int, 1, 2**15), required=True, help="width and height, at least")
    parser.add_argument("--max_file_mb", type=between(int, 1, 2047), required=True, help="MiB of an image's file, at most")
    parser.add_argument(
        "--max_quarantined", type=count_or_share, required=True, help="number or share of files refused, at most"
    )
    parser.add_argument("--labels", nargs="+", default=[], help="names of labels, or their number, that are expected")
    parser.add_argument(
        "--min_images_per_label", type=between(int, 1, 10**9), required=True, help="images of each label, at least"
    )
    parser.add_argument(
        "--on_breach", choices=("end", "say"), required=True, help="what to do if labels are not as expected"
    )
    parser.add_argument(
        "--file_size_mb", type=between(int, 1, 4096), required=True, help="MiB of images in an output file, about"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
