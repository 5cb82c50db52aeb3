"""featurize: compute a feature vector for each image, by one pass of the backbone for each distinct image.

usage: featurize.py INGESTED BACKBONE OUTPUT --batch_size 8 --precision float32 --images_per_file 2048

reads   INGESTED/images      IMAGES
        BACKBONE             graph.pb and backbone.json
writes  OUTPUT               FEATURES, sorted by image_id and path within a file
        OUTPUT/_fingerprint  the name of the cache that they come from

Features are rounded to multiples of the step that backbone.json names, a power of two. They are 16-bit numbers of steps
wherever they are kept or travel, and float32 in OUTPUT. Sums of them and of their products are exact, in any order.

Features are kept for reuse in a cache (Spark setting spark.featurize.cache), under a fingerprint of all that determines
them but the image. Only the images that are not there go through the backbone. Every task that ends leaves its features
there, so that a run that is killed loses no more than the tasks that were running. Each row there has a checksum: a file of
which one does not agree is named and deleted, and its features are computed again. A file that cannot be read is no such
file: it ends the run.

A folder may hold the output of an earlier run (Spark setting spark.featurize.earlier), on this machine. What the cache lacks
is taken over from there, if its fingerprint is that of the cache.
"""

import argparse
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import Distribution, distributions
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from py4j.protocol import Py4JJavaError
from pyspark import Accumulator, Broadcast, SparkConf, TaskContext
from pyspark.sql import DataFrame, DataFrameReader, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema

IMAGES = T.StructType(
    [
        T.StructField("image_id", T.StringType()),
        T.StructField("path", T.StringType()),
        T.StructField("label", T.StringType()),
        T.StructField("film", T.StringType()),
        T.StructField("content_id", T.StringType()),  # SHA-256 of content
        T.StructField("content", T.BinaryType()),  # JPEG or PNG, RGB; upright once turned as its EXIF orientation says
    ]
)
FEATURES = T.StructType(
    [
        *IMAGES.fields[:5],
        T.StructField("features", T.ArrayType(T.FloatType())),  # n_features of them, multiples of the step
    ]
)
COMPUTED = T.StructType(
    [
        IMAGES["content_id"],
        T.StructField("features", T.BinaryType()),  # int16, little-endian: how many steps each of the n_features is
    ]
)
CACHED = T.StructType([*COMPUTED.fields, T.StructField("checksum", T.LongType())])  # a row of the cache; see `checksum`
# What was seen in the cache: an image of a sound file, or a file without images.
SEEN = T.StructType(
    [
        T.StructField("url", T.StringType()),  # of the file
        IMAGES["content_id"],  # null of a file without images
        T.StructField("fault", T.StringType()),  # of a file without images, empty if it is sound
    ]
)
PRECISIONS = ("float32", "bfloat16")
LIBRARIES = ("pillow", "tensorflow")  # that determine a feature
PIXELS = {  # the values that `to_pixels` knows, by key of backbone.json's "pixels"; it makes any width and height
    "orientation": ("upright",),  # turned as EXIF says
    "mode": ("RGB",),
    "fit": ("stretch",),
    "resampler": ("Pillow",),
    "resampling": tuple(each.name.lower() for each in Image.Resampling),
    "dtype": ("uint8",),
}

MOST = 32_767  # steps of a feature, either way

# A killed run loses at most this work on each core: of ResNet50 5 s in bfloat16 by AMX, 25 s in float32. Smaller tasks cost
# more: before each task Spark makes Python look for modules anew, which takes as long as several images.
IMAGES_PER_TASK = 512

SECONDS_WATCHED, SECONDS_LOGGED = 10, 600  # between two lines of progress: on a terminal, in a log


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    is_watched = SparkConf().get("spark.ui.showConsoleProgress") == "true"
    spark = (
        SparkSession.builder.appName("featurize")
        # They bound a worker's memory, whatever the number and the size of images, and of files of the cache, of some 4 MB.
        # Spark 3 knows the first only.
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", min(args.batch_size, 32))
        .config("spark.sql.execution.arrow.maxBytesPerBatch", 64 * 2**20)
        .config("spark.sql.execution.arrow.pyspark.enabled", True)  # a graph of 100 MB is read in half the time
        .config("spark.sql.adaptive.enabled", False)  # it would merge tasks whose rows are small but dear
        .config("spark.ui.showConsoleProgress", False)  # `progress` says more
        # Spark 4 lists these with all that is below by one call for a thousand files, not by one for each folder.
        .config("spark.sql.sources.useListFilesFileSystemList", "s3,s3a")
        .getOrCreate()
    )
    backbone = json.loads(read_bytes(spark, f"{args.backbone}/backbone.json"))
    check_pixels(backbone.get("pixels", {}))
    images = spark.read.schema(IMAGES).parquet(f"{args.ingested}/images")
    keys = images.drop("content").persist()  # and Spark knows how large it is: small enough, no join shuffles features
    n_images = keys.count()
    n_files = math.ceil(n_images / args.images_per_file)
    spark.conf.set("spark.sql.shuffle.partitions", max(n_files, spark.sparkContext.defaultParallelism))

    about = {"backbone": backbone, "batch_size": args.batch_size, "precision": args.precision}
    name = fingerprint(**about)
    cache = open_cache(spark, name, about)
    missing = missing_ids(keys, heal(spark, cache, backbone["n_features"])).persist()
    n_missing, n_earlier = missing.count(), 0
    if n_missing and (files := earlier_files(spark, name)):
        earlier = take_over(spark, files, missing, backbone["step"], cache)
        missing = missing_ids(missing, earlier).persist()
        n_earlier = n_missing - missing.count()
        n_missing -= n_earlier
    if n_missing:
        graph = read_bytes(spark, f"{args.backbone}/graph.pb")
        if hashlib.sha256(graph).hexdigest() != backbone["graph_sha256"]:
            raise SystemExit(
                f"featurize: {args.backbone}/graph.pb is not what backbone.json says. Run `dvc repro -f backbone`."
            )
        passes = spark.sparkContext.accumulator(0)
        network = spark.sparkContext.broadcast({"graph": graph})
        work = spread(images.join(missing, "content_id", "left_semi"), n_missing)
        computed = forward(work, network, backbone, args.batch_size, args.precision, passes)
        with progress(passes, n_missing, every=SECONDS_WATCHED if is_watched else SECONDS_LOGGED):
            append(computed, cache)
        if passes.value != n_missing:
            raise SystemExit(
                f"featurize: {passes.value:,} passes of the backbone for {n_missing:,} images; it must be one each."
            )

    rows = (
        read_cache(spark, cache)
        .join(keys, "content_id")
        .select(*FEATURES.names)
        .repartition(n_files, "image_id")
        .dropDuplicates(["image_id", "path"])  # two runs at once may both have computed an image
        .sortWithinPartitions("image_id", "path")
    )
    beyond = [spark.sparkContext.accumulator(0) for _ in ("features", "images")]
    to_numbers(rows, backbone["step"], *beyond).write.parquet(args.output)
    write_bytes(spark, f"{args.output}/_fingerprint", f"{name}\n".encode())
    n_written = spark.read.parquet(args.output).count()
    if n_written != n_images:
        raise SystemExit(f"featurize: features for {n_written:,} of {n_images:,} images; was {cache} emptied meanwhile?")
    if beyond[0].value:
        n_features, n_images_beyond = (each.value for each in beyond)
        print(
            f"featurize: {n_features:,} features of {n_images_beyond:,} images were at ±{MOST * backbone['step']:,g} or "
            "beyond, the most that 16 bits hold"
        )
    print(
        f"featurize: {n_images:,} images x {backbone['n_features']:,} features; {n_missing:,} passes of {backbone['name']}"
        + (f", {n_earlier:,} images from an earlier run" if n_earlier else "")
    )


def check_pixels(wanted: dict[str, Any]) -> None:
    """Exit if backbone.json asks for pixels with a key or a value that is not in PIXELS."""
    for key in sorted({*PIXELS, *wanted} - {"width", "height"}):
        value, known = wanted.get(key), PIXELS.get(key, ())
        if value not in known:
            raise SystemExit(
                f"featurize: backbone.json asks for pixels whose {key} is {value!r}; this stage knows "
                f"{', '.join(known) or 'no such key'}. Run `dvc repro -f backbone`."
            )


def missing_ids(images: DataFrame, computed: DataFrame) -> DataFrame:
    """List the content_id of each distinct image that has not been computed."""
    return images.select("content_id").distinct().join(computed, "content_id", "left_anti")


def spread(images: DataFrame, n_distinct: int) -> DataFrame:
    """Divide the distinct images among tasks of equal size: one for each core, or small ones.

    A cluster that grows says its cores by spark.default.parallelism. Without it, they are those that are there by now.
    """
    n_cores = images.sparkSession.sparkContext.defaultParallelism
    n_tasks = n_cores * math.ceil(n_distinct / (n_cores * IMAGES_PER_TASK))
    return images.select("content_id", "path", "content").repartition(n_tasks, "content_id").dropDuplicates(["content_id"])


def forward(
    images: DataFrame,
    network: Broadcast[dict[str, Any]],
    backbone: dict[str, Any],
    batch_size: int,
    precision: str,
    passes: Accumulator[int],
) -> DataFrame:
    """Compute CACHED, one row for each row of images.

    Batches are filled up to batch_size: with one shape for all, TensorFlow's result for an image does not depend, to the
    last bit, on the images beside it.

    Parameters
    ----------
    images : content_id, path and content

    Raises
    ------
    ValueError
        in the task: a feature is not a finite number; with the path of the image
    """
    wanted = backbone["pixels"]

    def compute(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        task = TaskContext.get()
        n_threads = task.cpus() if task else 1
        gpus = task.resources()["gpu"].addresses if task and "gpu" in task.resources() else []
        # Spark unpickles this function for each task, but a broadcast value only once in a worker's life.
        if "forward" not in network.value:
            network.value["forward"] = load(network.value["graph"], backbone, precision, n_threads, gpus)
            del network.value["graph"]
        images = (
            (content_id.as_py(), path.as_py(), to_pixels(content.as_py(), wanted))
            for batch in batches
            for content_id, path, content in zip(batch["content_id"], batch["path"], batch["content"], strict=True)
        )
        while some := list(islice(images, batch_size)):
            ids, paths, decoded = zip(*some, strict=True)
            pixels = np.zeros((batch_size, wanted["height"], wanted["width"], 3), np.uint8)
            pixels[: len(some)] = decoded
            features = network.value["forward"](pixels)[: len(some)]
            passes.add(len(some))
            for path, row in zip(paths, features, strict=True):
                if not np.isfinite(row).all():
                    raise ValueError(
                        f"featurize: {np.count_nonzero(~np.isfinite(row)):,} of {len(row):,} features of {path} are not "
                        f"finite in {precision}. In params.yaml, choose another featurize.precision or another backbone, or "
                        "leave the image out by ingest.leave_out."
                    )
            steps = [row.tobytes() for row in to_steps(features, backbone["step"])]
            checksums = [checksum(*row) for row in zip(ids, steps, strict=True)]
            yield pa.RecordBatch.from_arrays([pa.array(each) for each in (ids, steps, checksums)], names=CACHED.names)

    return images.mapInArrow(compute, CACHED)


def to_steps(features: np.ndarray, step: float) -> np.ndarray:
    """Round features to whole steps, the nearest that 16 bits can hold: little-endian int16 of the same shape."""
    return np.clip(np.rint(features / step), -32_767, 32_767).astype("<i2")


def to_numbers(rows: DataFrame, step: float, n_beyond: Accumulator[int], n_images_beyond: Accumulator[int]) -> DataFrame:
    """Make FEATURES of rows whose features are whole steps, and count those that 16 bits could not hold, if any.

    Up to here they are bytes, which Spark moves as one value. It moves the numbers of a list one by one.
    """

    def convert(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            steps = np.frombuffer(b"".join(batch["features"].to_pylist()), "<i2").reshape(batch.num_rows, -1)
            is_beyond = np.abs(steps) == MOST
            n_beyond.add(int(is_beyond.sum()))
            n_images_beyond.add(int(is_beyond.any(axis=1).sum()))
            values = steps.astype(np.float32).ravel() * np.float32(step)  # exact: step is a power of two
            lists = pa.ListArray.from_arrays(np.arange(len(steps) + 1, dtype=np.int32) * steps.shape[1], values)
            yield pa.RecordBatch.from_arrays([*batch.columns[:-1], lists], names=FEATURES.names)

    return rows.mapInArrow(convert, FEATURES)


def checksum(content_id: str, features: bytes) -> int:
    """Compute the CRC-32 of an image's name and of its features' bytes."""
    return zlib.crc32(features, zlib.crc32(content_id.encode()))


def load(
    graph: bytes, backbone: dict[str, Any], precision: str, n_threads: int, gpus: Sequence[str] = ()
) -> Callable[[np.ndarray], np.ndarray]:
    """Load the backbone as a function: pixels, uint8 (n, height, width, 3) -> features, float32 (n, n_features)."""
    import tensorflow as tf  # slow to import, and only workers need it

    if gpus:
        tf.config.experimental.enable_op_determinism()
        tf.config.experimental.enable_tensor_float_32_execution(False)  # float32 is what it says
    with tf.Graph().as_default() as frozen:
        tf.import_graph_def(tf.compat.v1.GraphDef.FromString(graph), name="")
    session = tf.compat.v1.Session(graph=frozen, config=settings(precision, n_threads, gpus))
    return session.make_callable(backbone["output"], [backbone["input"]])


def settings(precision: str, n_threads: int, gpus: Sequence[str]) -> Any:
    """Make TensorFlow's settings for a task that has those GPUs to itself: it sees no others, for they may be another's."""
    import tensorflow as tf

    config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=n_threads, inter_op_parallelism_threads=1)
    config.device_count["GPU"] = len(gpus)
    config.gpu_options.visible_device_list = ",".join(gpus)
    config.gpu_options.allow_growth = True
    # On a frozen graph this is faster than Keras's mixed_bfloat16 policy, which gains nothing on a CPU. A GPU has its own,
    # in which the half is float16.
    half = "auto_mixed_precision" if gpus else "auto_mixed_precision_onednn_bfloat16"
    setattr(config.graph_options.rewrite_options, half, int(precision == "bfloat16"))
    return config


def to_pixels(content: bytes, wanted: dict[str, Any]) -> np.ndarray:
    """Make the pixels that backbone.json asks for, uint8 RGB of shape (height, width, 3): the whole image is stretched."""
    with Image.open(io.BytesIO(content)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        resampling = Image.Resampling[wanted["resampling"].upper()]
        return np.asarray(image.resize((wanted["width"], wanted["height"]), resampling))


def fingerprint(backbone: dict[str, Any], batch_size: int, precision: str) -> str:
    """Name all that determines a feature except the image: the cache never mixes features that differ in it."""
    determines = {
        "backbone": {key: backbone[key] for key in ("graph_sha256", "input", "output", "pixels", "step")},
        "batch_size": batch_size,
        "precision": precision,
        "code": [inspect.getsource(function) for function in (to_pixels, load, settings, to_steps, checksum)],
        "layout": CACHED.simpleString(),
        "versions": sorted({f"{name} {each.version}" for name in LIBRARIES for each in packages_of(name)}),
    }
    return hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:32]


def packages_of(library: str) -> Iterable[Distribution]:
    """Find what is installed of a library. The same code comes as `tensorflow` and as `tensorflow-cpu`."""
    return [*distributions(name=library), *distributions(name=f"{library}-cpu")]


def open_cache(spark: SparkSession, name: str, about: dict[str, Any]) -> str:
    """Make the folder of the cache of that name, if need be, with a note that says people what it is about.

    Raises
    ------
    SystemExit
        nothing can be written there.
    """
    cache = f"{spark.conf.get('spark.featurize.cache')}/{name}"
    try:
        write_bytes(spark, f"{cache}/about.json", json.dumps(about, indent=2).encode())
    except Py4JJavaError as error:
        reason = error.java_exception.getMessage()
        raise SystemExit(f"featurize: cannot write to the feature cache {cache}: {reason}. Set FEATURE_CACHE.") from None
    return cache


def heal(spark: SparkSession, cache: str, n_features: int) -> DataFrame:
    """Delete each file of the cache that is damaged, and say so; give the content_id of each row of the others.

    Only bytes that were read are called damaged. Another run may delete the same files at the same time.
    """

    def look(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for url, content in files_of(batches):
            ids: list[str | None] = []
            fault = ""
            try:
                ids += parse(content, n_features)[0]
            except ValueError as error:
                fault = str(error)
            rows = [(url, each, None) for each in ids] if ids else [(url, None, fault)]
            columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
            yield pa.RecordBatch.from_arrays(columns, names=SEEN.names)

    files = reader(spark).format("binaryFile").load(literal(cache))
    files = files.select(F.col("_metadata.file_path").alias("url"), "length", "content")
    seen = files.mapInArrow(look, SEEN).persist()
    faults = {row.url: row.fault for row in seen.groupBy("url").agg(F.first("fault").alias("fault")).collect()}
    read = {urlsplit(url).path for url in faults}
    for url in files.inputFiles():
        if urlsplit(url).path not in read:  # Spark reads no file of 0 bytes
            file, file_system = hadoop_path(spark, unquote(url))
            with suppress(Py4JJavaError):  # another run has deleted it
                if file_system.getFileStatus(file).getLen() == 0:
                    faults[url] = "0 bytes"
    for url, fault in sorted((url, fault) for url, fault in faults.items() if fault is not None):
        file, file_system = hadoop_path(spark, unquote(url))
        file_system.delete(file, False)
        if fault:  # Spark writes a sound file without a row where a task has none
            path = file.toUri().getPath() if file.toUri().getScheme() == "file" else file.toString()
            print(f"featurize: {path} is damaged ({fault}); its features are computed again", file=sys.stderr)
    return seen.where("content_id IS NOT NULL").select("content_id")


def read_cache(spark: SparkSession, cache: str) -> DataFrame:
    """Read COMPUTED of the files that `heal` has left. One whose bytes have changed since ends the stage, and is named."""
    pages = reader(spark).option("parquet.page.verify-checksum.enabled", True)
    return pages.schema(CACHED).parquet(literal(cache)).select(*COMPUTED.names)


def reader(spark: SparkSession) -> DataFrameReader:
    """Make a reader of all files of the cache. One that cannot be read ends the stage, and is named."""
    return (
        spark.read.option("recursiveFileLookup", True)
        .option("pathGlobFilter", "*.parquet")
        .option("ignoreMissingFiles", True)  # another run may have deleted it, as damaged
        # Without the checksums that Hadoop keeps beside a file: where they do not agree, it cannot be read.
        .option("fs.file.impl", "org.apache.hadoop.fs.RawLocalFileSystem")
        .option("fs.file.impl.disable.cache", True)
    )


def literal(path: str) -> str:
    """Write a path so that Spark takes it for a name, not for a pattern of names."""
    return re.sub(r"([\\{}\[\]*?])", r"\\\1", path)


def files_of(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, pa.Buffer]]:
    """Yield url and content of each file.

    Raises
    ------
    OSError
        not all of it was read; with its name and both lengths
    """
    for batch in batches:
        for url, length, content in zip(*batch.columns, strict=True):
            read = content.as_buffer()
            if len(read) != length.as_py():
                raise OSError(f"featurize: {len(read):,} of {length.as_py():,} bytes of {url} were read. Run again.")
            yield url.as_py(), read


def parse(content: pa.Buffer, n_features: int) -> tuple[list[str], list[bytes]]:
    """Read the columns of COMPUTED of a file of the cache.

    Raises
    ------
    ValueError
        the file is damaged, or is no such file
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read(CACHED.names, use_threads=False)
        ids, features, checksums = (table[name].to_pylist() for name in CACHED.names)
        agree = [checksum(*row) for row in zip(ids, features, strict=True)] == checksums
    except MemoryError:
        raise
    except Exception as error:  # pyarrow raises nearly any on damaged bytes
        raise ValueError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error
    if not (agree and {*map(len, features)} <= {2 * n_features}):
        raise ValueError("a row does not agree with its checksum")
    return ids, features


def append(computed: DataFrame, cache: str) -> None:
    """Write to the cache, each task's rows as soon as the task has ended: they outlive a killed run."""
    (
        computed.write
        # Of Hadoop's two ways to commit, the one that does not wait for the job's end. It may leave a row twice after a
        # retry, which is no harm here.
        .option("mapreduce.fileoutputcommitter.algorithm.version", 2).parquet(f"{cache}/{uuid.uuid4().hex}")
    )


def earlier_files(spark: SparkSession, name: str) -> list[str]:
    """List the files of an earlier run's output; none if it has not that fingerprint, or if there is no such output."""
    folder = Path(spark.conf.get("spark.featurize.earlier", None) or "/nowhere")
    with suppress(OSError, ValueError):  # not there, or no text
        if (folder / "_fingerprint").read_text() == f"{name}\n":
            return sorted(map(str, folder.glob("*.parquet")))
    return []


def take_over(spark: SparkSession, files: list[str], missing: DataFrame, step: float, cache: str) -> DataFrame:
    """Write to the cache what the files have of the missing images, and give CACHED of these.

    A file that is damaged, or cannot be read, is named and passed over: its features are computed again.
    """

    def look(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for path in (path for batch in batches for path in batch["path"].to_pylist()):
            try:
                ids, steps = parse_output(path, step)
            except ValueError as error:
                columns = [[None], [None], [None], [f"{os.path.realpath(path)} is damaged ({error})"]]
            else:
                columns = [ids, steps, [checksum(*row) for row in zip(ids, steps, strict=True)], [None] * len(ids)]
            yield pa.RecordBatch.from_pydict(dict(zip(seen.names, columns, strict=True)), schema=seen)

    seen = pa.schema([*to_arrow_schema(CACHED), ("fault", pa.string())])
    paths = spark.createDataFrame([(path,) for path in files], "path string").repartition(len(files))
    rows = paths.mapInArrow(look, "content_id string, features binary, checksum long, fault string").persist()
    for row in rows.where("fault IS NOT NULL").sort("fault").collect():
        print(f"featurize: {row.fault}; its features are computed again", file=sys.stderr)
    found = rows.drop("fault").join(missing, "content_id", "left_semi").dropDuplicates(["content_id"]).persist()
    append(found, cache)
    return found


def parse_output(path: str, step: float) -> tuple[list[str], list[bytes]]:
    """Read a file of FEATURES as columns of COMPUTED.

    Raises
    ------
    ValueError
        the file is damaged, or is no such file
    """
    try:
        table = pq.read_table(path, columns=["content_id", "features"], use_threads=False, page_checksum_verification=True)
        ids = table["content_id"].to_pylist()
        features = table["features"].combine_chunks().flatten().to_numpy().reshape(len(ids), -1 if ids else 0)
        steps = to_steps(features, step)
    except MemoryError:
        raise
    except Exception as error:  # pyarrow raises nearly any on damaged bytes
        raise ValueError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error
    if None in ids or not np.array_equal(steps * np.float32(step), features):
        raise ValueError("a row is not as this stage writes it")
    return ids, [row.tobytes() for row in steps]


@contextmanager
def progress(passes: Accumulator[int], n_missing: int, every: float) -> Iterator[None]:
    """Say how far the backbone is, every so many seconds."""
    started, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(every):
            seconds = time.monotonic() - started
            left = f"{seconds / passes.value * (n_missing - passes.value):,.0f} s left" if passes.value else "starting"
            print(f"featurize: {passes.value:,} of {n_missing:,} images, {passes.value / seconds:,.1f} a second, {left}")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()


def hadoop_path(spark: SparkSession, path: str) -> tuple[Any, Any]:
    """Find a path of any file system that Spark knows, and that file system."""
    jvm: Any = spark._jvm
    hadoop = jvm.org.apache.hadoop.fs.Path(path)
    return hadoop, hadoop.getFileSystem(spark._jsc.hadoopConfiguration())


def write_bytes(spark: SparkSession, path: str, content: bytes) -> None:
    file, file_system = hadoop_path(spark, path)
    stream = file_system.create(file, True)
    stream.write(bytearray(content))
    stream.close()


def read_bytes(spark: SparkSession, path: str) -> bytes:
    file: Any = spark.read.format("binaryFile").load(path).select("content").toPandas()
    return bytes(file.at[0, "content"])


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
    parser.add_argument("ingested")
    parser.add_argument("backbone")
    parser.add_argument("output")
    parser.add_argument("--batch_size", type=between(int, 1, 4096), required=True, help="images in one pass")
    parser.add_argument("--precision", choices=PRECISIONS, required=True, help="of the arithmetic")
    parser.add_argument(
        "--images_per_file", type=between(int, 1, 10_000_000), required=True, help="rows of an output file, about"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
