"""covariance: number, mean and scatter matrix of the features of each fold, in one pass.

usage: covariance.py FEATURES SPLIT OUTPUT --max_blocks 16

reads   FEATURES      files of FEATURES
        SPLIT/images  IMAGES
writes  OUTPUT        MOMENTS, one row for each fold

Every PCA of the collection, of a fold or of the whole, of any number of components and any scaling, follows from these few
numbers; no image or feature is looked at again.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import TaskContext
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema
from threadpoolctl import threadpool_limits

FEATURES = T.StructType(
    [
        T.StructField("image_id", T.StringType()),
        T.StructField("features", T.ArrayType(T.FloatType())),
    ]
)
IMAGES = T.StructType([T.StructField("image_id", T.StringType()), T.StructField("fold", T.IntegerType())])
MOMENTS = T.StructType(
    [
        T.StructField("fold", T.IntegerType()),
        T.StructField("n", T.LongType()),
        T.StructField("mean", T.BinaryType()),  # float64, little-endian, of shape (n_features,)
        # Float64, little-endian: the lower triangle of a symmetric matrix of shape (n_features, n_features), row by row.
        T.StructField("scatter", T.BinaryType()),
    ]
)
FILES = 3  # of a block, at least: to move its sums takes as long as to make them from as many
PARTIAL = T.StructType([T.StructField("block", T.IntegerType()), *MOMENTS.fields])


class Moments(NamedTuple):
    """Of some rows: how many, their mean, and the sum of the outer products of their deviations from it."""

    n: int
    mean: np.ndarray  # float64, (n_features,)
    scatter: np.ndarray  # float64, (n_features * (n_features + 1) / 2,)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    spark = (
        SparkSession.builder.appName("covariance")
        .config("spark.sql.execution.arrow.pyspark.enabled", True)
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 1)  # a row is a whole file, or a matrix
        .config("spark.sql.files.maxPartitionBytes", 1)  # a partition is a file
        .config("spark.sql.adaptive.enabled", False)
        .getOrCreate()
    )
    files = spark.read.format("binaryFile").load(f"{args.features}/*.parquet")
    image_ids, folds = read_folds(spark.read.format("binaryFile").load(f"{args.split}/images/*.parquet"))
    written = Observation()
    (
        merge_blocks(sum_blocks(files, image_ids, folds, args.max_blocks))
        .observe(written, F.sum("n").alias("images"), F.count("fold").alias("folds"))
        .write.parquet(args.output)
    )
    print(f"covariance: {written.get['images']:,} images in {written.get['folds']} folds")


def read_folds(files: DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Read the fold of each distinct image: its image_id, bytes, rising, and its fold, int8, both of shape (n_images,)."""
    contents: Any = files.select("content").toPandas()  # as files: to take rows one by one takes Spark seconds more
    table = pa.concat_tables(parse(content, IMAGES.names) for content in contents["content"])
    image_ids, first = np.unique(np.array(table["image_id"].to_pylist(), "S64"), return_index=True)
    return image_ids, table["fold"].to_numpy()[first].astype(np.int8)


def sum_blocks(files: DataFrame, image_ids: np.ndarray, folds: np.ndarray, max_blocks: int) -> DataFrame:
    """PARTIAL, one row for each fold of each block of files; each file is a partition.

    A block is some partitions in a row, summed up in their order. Spark puts larger files first, equal ones by name, and how
    many blocks there are follows from the number of files: sums of floating-point numbers must not depend on how many cores
    there are. The files are read here and not by Spark, which would take longer to hand the rows over one by one than to
    multiply them.
    """
    n_blocks = min(max_blocks, math.ceil(len(files.inputFiles()) / FILES))
    shared = files.sparkSession.sparkContext.broadcast((image_ids, folds))

    def sum_files(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        block = cast(TaskContext, TaskContext.get()).partitionId()
        total: dict[int, Moments] = {}
        with threadpool_limits(1):
            for content in (content for batch in batches for content in batch["content"]):
                table = parse(content.as_buffer(), FEATURES.names)
                fold = look_up(np.array(table["image_id"].to_pylist(), "S64"), *shared.value)
                features = to_matrix(table["features"])
                for each in np.unique(fold).tolist():
                    part = moments_of(features[fold == each])
                    total[each] = merge(total[each], part) if each in total else part
        for each, moments in total.items():
            yield to_batch({"block": block, "fold": each}, moments, PARTIAL)

    return files.select("content").coalesce(n_blocks).mapInArrow(sum_files, PARTIAL)


def look_up(wanted: np.ndarray, image_ids: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Find the folds of the wanted images.

    Raises
    ------
    ValueError
        an image has none
    """
    places = np.searchsorted(image_ids, wanted).clip(max=len(image_ids) - 1)
    if not (is_there := image_ids[places] == wanted).all():
        first = wanted[~is_there][0].decode()
        raise ValueError(f"{np.sum(~is_there)} of {len(wanted)} images have no fold; the first is {first}. Run `dvc repro`.")
    return folds[places]


def merge_blocks(partial: DataFrame) -> DataFrame:
    """MOMENTS, one row for each fold, its blocks merged in their order."""

    def merge_all(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rows = (row for batch in batches for row in batch.to_pylist())
        for fold, blocks in groupby(rows, key=lambda row: row["fold"]):
            yield to_batch({"fold": fold}, functools.reduce(merge, map(from_row, blocks)), MOMENTS)

    return partial.repartition(1).sortWithinPartitions("fold", "block").mapInArrow(merge_all, MOMENTS)


def moments_of(features: np.ndarray) -> Moments:
    """Moments of the rows of a float32 array of shape (n, n_features), in float64.

    Raises
    ------
    ValueError
        a feature is not a finite number
    """
    if not np.isfinite(features).all():
        raise ValueError(f"{np.sum(~np.isfinite(features).all(axis=1))} of {len(features)} feature vectors are not finite")
    wide = features.astype(np.float64)
    mean = wide.mean(axis=0)
    wide -= mean
    return Moments(len(wide), mean, lower_triangle(wide.T @ wide))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of both (Chan, Golub and LeVeque 1979, "Updating formulae", equation 2.1)."""
    n = a.n + b.n
    shift = b.mean - a.mean
    scatter = lower_triangle(np.outer(shift * (a.n * b.n / n), shift))
    scatter += a.scatter
    scatter += b.scatter
    return Moments(n, a.mean + shift * (b.n / n), scatter)


def lower_triangle(matrix: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix: half as much to move, and to keep."""
    return matrix[np.tri(len(matrix), dtype=bool)]


def to_matrix(features: pa.ChunkedArray) -> np.ndarray:
    """Turn a column of lists of equal length into an array of shape (n_rows, length)."""
    return features.combine_chunks().flatten().to_numpy().reshape(len(features), -1 if len(features) else 0)


def to_batch(keys: dict[str, int], moments: Moments, schema: T.StructType) -> pa.RecordBatch:
    values = {**keys, "n": moments.n, "mean": moments.mean.tobytes(), "scatter": moments.scatter.tobytes()}
    return pa.RecordBatch.from_pylist([values], schema=to_arrow_schema(schema))


def from_row(row: dict[str, bytes]) -> Moments:
    return Moments(int(row["n"]), np.frombuffer(row["mean"]), np.frombuffer(row["scatter"]))


def parse(content: bytes | pa.Buffer, columns: Sequence[str]) -> pa.Table:
    """Read the columns of a Parquet file's content. Where a page is not as it was written, an OSError is raised."""
    return pq.read_table(pa.py_buffer(content), columns=columns, use_threads=False, page_checksum_verification=True)


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
    parser.add_argument("features")
    parser.add_argument("split")
    parser.add_argument("output")
    parser.add_argument("--max_blocks", type=between(int, 1, 4096), required=True, help="partial sums, at most")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
