"""neighbours: find the images nearest to each image, all against all.

usage: neighbours.py FEATURES OUTPUT --n_neighbours 6

reads   FEATURES           files of FEATURES
writes  OUTPUT/sketches    SKETCHES, a row for each row of FEATURES, sorted by image_id and path within a file
        OUTPUT/neighbours  NEIGHBOURS, a row for each distinct image, sorted by image_id within a file

A sketch is a short form of the features: their coordinates on the first principal components of a sample, scaled to unit
length. Neighbours are the nearest in this space. They are exact, and the same on any number of cores: one thread computes
each block of rows. All against all takes time that grows with the square of the number of images.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema
from threadpoolctl import threadpool_limits

FEATURES = T.StructType(
    [
        T.StructField("image_id", T.StringType()),
        T.StructField("path", T.StringType()),
        T.StructField("label", T.StringType()),
        T.StructField("film", T.StringType()),  # null where the file's name does not tell it
        T.StructField("features", T.ArrayType(T.FloatType())),
    ]
)
SKETCHES = T.StructType(
    [
        *FEATURES.fields[:4],
        T.StructField("sketch", T.BinaryType()),  # float32, little-endian, N_COMPONENTS of them or fewer, of unit length
    ]
)
NEIGHBOURS = T.StructType(
    [
        T.StructField("image_id", T.StringType()),
        T.StructField("neighbours", T.ArrayType(T.StringType())),  # image_id of the nearest others, by rising distance
        T.StructField("distances", T.ArrayType(T.FloatType())),  # of unit vectors: 0 to 2
    ]
)
N_COMPONENTS = 64
N_SAMPLE = 8192  # distinct images, about, that the components are fitted on
SPARE = 4  # neighbours found in float32, of which float64 chooses
ROWS, COLUMNS = 1024, 16384  # of a matrix of similarities, at once
IMAGES_PER_FILE = 16384
MAX_TASKS = 512


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    spark = (
        SparkSession.builder.appName("neighbours")
        .config("spark.sql.execution.arrow.pyspark.enabled", True)
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 1)  # a row is a whole file
        .config("spark.sql.files.maxPartitionBytes", 1)  # a partition is a file
        .config("spark.sql.adaptive.enabled", False)
        .getOrCreate()
    )
    files = spark.read.format("binaryFile").load(f"{args.features}/*.parquet")
    n_rows = count(files)
    with threadpool_limits(1):  # the last bits of a result depend on the number of BLAS's threads
        mean, components = fit(read_sample(files, n_rows))
    n_files = math.ceil(n_rows / IMAGES_PER_FILE)
    sketches = (
        sketch_files(files, mean, components).repartition(n_files, "image_id").sortWithinPartitions("image_id", "path")
    )
    sketches.write.parquet(f"{args.output}/sketches")

    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 10_000)
    spark.conf.unset("spark.sql.files.maxPartitionBytes")
    images: Any = spark.read.parquet(f"{args.output}/sketches").select("image_id", "sketch").toPandas()
    images = images.drop_duplicates("image_id").sort_values("image_id", ignore_index=True)
    neighbours = (
        find_neighbours(spark, images, args.n_neighbours).repartition(n_files, "image_id").sortWithinPartitions("image_id")
    )
    neighbours.write.parquet(f"{args.output}/neighbours")
    print(f"neighbours: {args.n_neighbours} of each of {len(images):,} distinct images")


def count(files: DataFrame) -> int:
    """Count the rows of all files."""

    def count_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for content in (content for batch in batches for content in batch["content"]):
            yield pa.RecordBatch.from_pydict({"n": [pq.read_metadata(pa.py_buffer(content.as_buffer())).num_rows]})

    counts: Any = files.select("content").mapInArrow(count_rows, "n long").toPandas()
    return int(counts["n"].sum())


def read_sample(files: DataFrame, n_rows: int) -> np.ndarray:
    """The features of about N_SAMPLE distinct images, chosen by SHA-256: float64 array of shape (n, n_features)."""
    limit = f"{int(N_SAMPLE / n_rows * 16**8):08x}" if n_rows > N_SAMPLE else "g"  # which follows all hashes

    def choose(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for table in tables_of(batches, ["image_id", "features"]):
            chosen = [i for i, image_id in enumerate(table["image_id"].to_pylist()) if image_id < limit]
            features = to_matrix(table["features"])[chosen]
            ids = table["image_id"].take(chosen).combine_chunks()
            yield pa.RecordBatch.from_arrays([ids, to_bytes(features)], ["image_id", "features"])

    sample: Any = files.select("content").mapInArrow(choose, "image_id string, features binary").toPandas()
    sample = sample.drop_duplicates("image_id").sort_values("image_id")
    return np.frombuffer(b"".join(sample["features"]), np.float32).reshape(len(sample), -1).astype(np.float64)


def fit(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit the first principal components of the sample, at most N_COMPONENTS.

    Returns
    -------
    mean, float64 of shape (n_features,), and components, float64 of shape (n_components, n_features), orthonormal rows
    """
    mean = sample.mean(axis=0)
    centred = sample - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return mean, np.ascontiguousarray(vectors.T[::-1][:N_COMPONENTS])


def sketch(features: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Coordinates on the components, scaled to unit length: float32 array of shape (n_images, n_components).

    An image that equals the mean has no direction; all such are one point.
    """
    coordinates = (features - mean) @ components.T
    length = np.linalg.norm(coordinates, axis=1, keepdims=True)
    return (coordinates / np.where(length > 0, length, 1.0)).astype(np.float32)


def sketch_files(files: DataFrame, mean: np.ndarray, components: np.ndarray) -> DataFrame:
    """SKETCHES, one row for each row of the files."""
    model = files.sparkSession.sparkContext.broadcast((mean, components))

    def sketch_all(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with threadpool_limits(1):
            for table in tables_of(batches, FEATURES.names):
                sketches = to_bytes(sketch(to_matrix(table["features"]), *model.value))
                columns = [table[name].combine_chunks() for name in SKETCHES.names[:4]]
                yield pa.RecordBatch.from_arrays([*columns, sketches], schema=to_arrow_schema(SKETCHES))

    return files.select("content").mapInArrow(sketch_all, SKETCHES)


def find_neighbours(spark: SparkSession, images: pd.DataFrame, n_neighbours: int) -> DataFrame:
    """NEIGHBOURS, one row for each image (image_id, sketch), in blocks of ROWS that no number of tasks changes."""
    sketches = np.frombuffer(b"".join(images["sketch"]), np.float32).reshape(len(images), -1)
    shared = spark.sparkContext.broadcast((sketches, images["image_id"].to_numpy(str)))
    n_blocks = math.ceil(len(images) / ROWS)
    schema = to_arrow_schema(NEIGHBOURS)

    def search(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        sketches, ids = shared.value
        with threadpool_limits(1):
            for block in (block for batch in batches for block in batch["id"].to_pylist()):
                start, stop = block * ROWS, min((block + 1) * ROWS, len(ids))
                found, distances = nearest(sketches, start, stop, n_neighbours)
                names = [ids[start:stop].tolist(), ids[found].tolist(), distances.tolist()]
                yield pa.RecordBatch.from_pydict(dict(zip(schema.names, names, strict=True)), schema=schema)

    return spark.range(0, n_blocks, 1, min(n_blocks, MAX_TASKS)).mapInArrow(search, NEIGHBOURS)


def nearest(sketches: np.ndarray, start: int, stop: int, n_neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the n_neighbours images nearest to each of some rows, fewer where there are fewer others.

    Parameters
    ----------
    sketches : float32 array of shape (n_images, n_components), rows of unit length
    start, stop : the rows whose neighbours are wanted

    Returns
    -------
    row numbers and distances, (stop - start, n_neighbours), by rising distance, then by number
    """
    queries, n_rows = sketches[start:stop], stop - start
    n_kept = min(n_neighbours + SPARE, len(sketches) - 1)
    best = np.full((n_rows, n_kept), -np.inf, np.float32)
    numbers = np.zeros((n_rows, n_kept), np.int64)
    for first in range(0, len(sketches), COLUMNS):
        similarity = queries @ sketches[first : first + COLUMNS].T
        own = np.arange(start, stop) - first  # no image is its own neighbour
        inside = (own >= 0) & (own < similarity.shape[1])
        similarity[np.flatnonzero(inside), own[inside]] = -np.inf
        # Few are better than the worst that is kept, but in the first columns: what is below that is not sorted.
        if similarity.shape[1] > n_kept:
            worst = np.maximum(best.min(axis=1), -np.partition(-similarity, n_kept - 1, axis=1)[:, n_kept - 1])
        else:
            worst = best.min(axis=1)
        row, column = np.nonzero(similarity >= worst[:, None])
        row = np.concatenate([row, np.repeat(np.arange(n_rows), n_kept)])
        number = np.concatenate([column + first, numbers.ravel()])
        value = np.concatenate([similarity[row[: len(column)], column], best.ravel()])
        order = np.lexsort((number, -value, row))
        starts = np.searchsorted(row[order], np.arange(n_rows))
        kept = order[starts[:, None] + np.arange(n_kept)]
        best, numbers = value[kept], number[kept]
    exact = np.linalg.norm(queries[:, None].astype(np.float64) - sketches[numbers], axis=2).astype(np.float32)
    order = np.lexsort((numbers, exact))[:, :n_neighbours]
    return np.take_along_axis(numbers, order, 1), np.take_along_axis(exact, order, 1)


def tables_of(batches: Iterable[pa.RecordBatch], columns: list[str]) -> Iterator[pa.Table]:
    """Read each file that has rows; Spark writes an empty one where a partition is empty."""
    for content in (content for batch in batches for content in batch["content"]):
        table = pq.read_table(pa.py_buffer(content.as_buffer()), columns=columns, use_threads=False)
        if len(table):
            yield table


def to_bytes(rows: np.ndarray) -> pa.BinaryArray:
    return pa.array([row.tobytes() for row in rows], pa.binary())


def to_matrix(features: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of equal length as an array of shape (n_rows, length)."""
    return features.combine_chunks().flatten().to_numpy().reshape(len(features), -1)


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
    parser.add_argument("output")
    parser.add_argument("--n_neighbours", type=between(int, 1, 1000), required=True, help="of each image")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
