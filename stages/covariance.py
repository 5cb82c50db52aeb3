"""covariance: number, sum and sum of outer products of the features of each fold, in one pass.

usage: covariance.py FEATURES SPLIT BACKBONE OUTPUT

reads   FEATURES                files of FEATURES
        SPLIT/images            IMAGES
        BACKBONE/backbone.json  the step whose multiples features are
writes  OUTPUT                  SUMS, one row for each fold

Every PCA of the collection, of a fold or of the whole, of any number of components and any scaling, follows from these few
numbers; no image or feature is looked at again. They are whole numbers of steps. So they are exact, and the same for any
order of rows and any number of tasks; rows can be added and taken away to the bit.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_schema

FEATURES = T.StructType(
    [
        T.StructField("image_id", T.StringType()),
        T.StructField("features", T.ArrayType(T.FloatType())),
    ]
)
IMAGES = T.StructType([T.StructField("image_id", T.StringType()), T.StructField("fold", T.IntegerType())])
SUMS = T.StructType(
    [
        T.StructField("fold", T.IntegerType()),
        T.StructField("n", T.LongType()),
        T.StructField("step", T.DoubleType()),  # the unit of what follows
        T.StructField("sum", T.BinaryType()),  # int64, little-endian, of shape (n_features,)
        # Int64, little-endian: the lower triangle of a symmetric matrix of shape (n_features, n_features), row by row.
        T.StructField("products", T.BinaryType()),
    ]
)
MOST = 32_767  # steps of a feature, either way: a product of two is less than 2**30
MOST_ROWS = 2**33  # so many sums of such products are less than 2**63
ROWS = 2**16  # at once: 2**23 products would be exact in float64 too, but take more memory


class Sums(NamedTuple):
    """Of some rows, in steps: how many, their sum, and the sum of their outer products."""

    n: int
    sum: np.ndarray  # int64, (n_features,)
    products: np.ndarray  # int64, (n_features * (n_features + 1) / 2,)


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
    backbone: Any = spark.read.format("binaryFile").load(f"{args.backbone}/backbone.json").select("content").toPandas()
    step = json.loads(backbone.at[0, "content"])["step"]
    files = spark.read.format("binaryFile").load(f"{args.features}/*.parquet")
    image_ids, folds = read_folds(spark.read.format("binaryFile").load(f"{args.split}/images/*.parquet"))
    written = Observation()
    (
        add_up(sum_files(files, image_ids, folds, step))
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


def sum_files(files: DataFrame, image_ids: np.ndarray, folds: np.ndarray, step: float) -> DataFrame:
    """Make SUMS, one row for each fold and task; each file is a partition.

    The files are read here and not by Spark, which would take longer to hand the rows over one by one than to multiply them.
    """
    shared = files.sparkSession.sparkContext.broadcast((image_ids, folds))

    def sum_some(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        total: dict[int, Sums] = {}
        for content in (content for batch in batches for content in batch["content"]):
            for rows in parse(content.as_buffer(), FEATURES.names).to_batches(ROWS):
                fold = look_up(np.array(rows["image_id"].to_pylist(), "S64"), *shared.value)
                steps = to_steps(to_matrix(rows["features"]), step)
                for each in np.unique(fold).tolist():
                    part = sums_of(steps[fold == each])
                    total[each] = add(total[each], part) if each in total else part
        yield from to_batches(total, step)

    return files.select("content").coalesce(files.sparkSession.sparkContext.defaultParallelism).mapInArrow(sum_some, SUMS)


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


def add_up(sums: DataFrame) -> DataFrame:
    """Make SUMS, one row for each fold, of the rows of all tasks."""

    def add_all(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        total: dict[int, Sums] = {}
        step = 0.0
        for row in (row for batch in batches for row in batch.to_pylist()):
            part = Sums(row["n"], np.frombuffer(row["sum"], "<i8"), np.frombuffer(row["products"], "<i8"))
            fold, step = row["fold"], row["step"]
            total[fold] = add(total[fold], part) if fold in total else part
        yield from to_batches(total, step)

    return sums.repartition(1).mapInArrow(add_all, SUMS)


def to_steps(features: np.ndarray, step: float) -> np.ndarray:
    """Give float32 features as whole numbers of steps, in float64.

    Raises
    ------
    ValueError
        one is no whole number of them, or too large
    """
    steps = features / np.float64(step)
    is_whole = (steps == np.rint(steps)) & (np.abs(steps) <= MOST)
    if not is_whole.all():
        raise ValueError(
            f"{np.sum(~is_whole.all(axis=1)):,} of {len(steps):,} feature vectors are not -{MOST:,} to {MOST:,} times "
            f"{step}, the step of backbone.json. Run `dvc repro`."
        )
    return steps


def sums_of(steps: np.ndarray) -> Sums:
    """Add up the rows of a float64 array of shape (n, n_features), n up to ROWS: no sum is rounded."""
    return Sums(len(steps), steps.sum(axis=0).astype("<i8"), lower_triangle(steps.T @ steps).astype("<i8"))


def add(a: Sums, b: Sums) -> Sums:
    """Add up the rows of both.

    Raises
    ------
    ValueError
        they are so many that a sum might be beyond 64 bits
    """
    n = a.n + b.n
    if n > MOST_ROWS:
        raise ValueError(f"{n:,} images in one fold; sums of 64 bits are exact up to {MOST_ROWS:,}")
    return Sums(n, a.sum + b.sum, a.products + b.products)


def lower_triangle(matrix: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix: half as much to move, and to keep."""
    return matrix[np.tri(len(matrix), dtype=bool)]


def to_matrix(features: pa.ListArray) -> np.ndarray:
    """Turn a column of lists of equal length into an array of shape (n_rows, length)."""
    return features.flatten().to_numpy().reshape(len(features), -1)


def to_batches(total: dict[int, Sums], step: float) -> Iterator[pa.RecordBatch]:
    """Make a batch of SUMS of each fold, in their order: of 2,048 features, it is 17 MB."""
    for fold, (n, sums, products) in sorted(total.items()):
        row = {"fold": fold, "n": n, "step": step, "sum": sums.tobytes(), "products": products.tobytes()}
        yield pa.RecordBatch.from_pylist([row], schema=to_arrow_schema(SUMS))


def parse(content: bytes | pa.Buffer, columns: Sequence[str]) -> pa.Table:
    """Read the columns of a Parquet file's content. Where a page is not as it was written, an OSError is raised."""
    return pq.read_table(pa.py_buffer(content), columns=columns, use_threads=False, page_checksum_verification=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features")
    parser.add_argument("split")
    parser.add_argument("backbone")
    parser.add_argument("output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
