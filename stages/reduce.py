"""reduce: principal component analysis of the features, from their covariance alone.

usage: reduce.py FEATURES COVARIANCE OUTPUT --k 64 --scale none

reads   FEATURES    files of FEATURES
        COVARIANCE  SUMS
writes  OUTPUT/model/components  COMPONENTS, k rows
        OUTPUT/model/scaling     SCALING, one row for each feature
        OUTPUT/model/spectrum    SPECTRUM, one row for each component there is
        OUTPUT/model/settings    SETTINGS, one row
        OUTPUT/embeddings        EMBEDDINGS, one row for each row of FEATURES

An embedding is ((features - mean) / scale) @ components.T, as scikit-learn has it. (pyspark.ml.feature.PCAModel does not
subtract the mean.)
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as T
from threadpoolctl import threadpool_limits

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
FEATURES = T.StructType(
    [
        T.StructField("image_id", T.StringType()),
        T.StructField("path", T.StringType()),
        T.StructField("label", T.StringType()),
        T.StructField("features", T.ArrayType(T.FloatType())),
    ]
)
EMBEDDINGS = T.StructType([*FEATURES.fields[:-1], T.StructField("embedding", T.ArrayType(T.FloatType()))])
SPECTRUM = T.StructType(
    [
        T.StructField("component", T.IntegerType()),  # from 1, by falling variance
        T.StructField("explained_variance", T.DoubleType()),
        T.StructField("explained_variance_ratio", T.DoubleType()),  # share of the whole variance, 0 to 1
        T.StructField("cumulative_explained_variance_ratio", T.DoubleType()),
    ]
)
COMPONENTS = T.StructType([*SPECTRUM.fields, T.StructField("weights", T.ArrayType(T.DoubleType()))])
SCALING = T.StructType(
    [
        T.StructField("feature", T.IntegerType()),  # from 0, its place in features
        T.StructField("mean", T.DoubleType()),
        T.StructField("scale", T.DoubleType()),
    ]
)
SETTINGS = T.StructType(
    [
        T.StructField("k", T.IntegerType()),  # components that are kept, also where a share of the variance was asked for
        T.StructField("scale", T.StringType()),  # one of SCALES
    ]
)
SCALES = ("none", "standard")
MAX_K = 100_000
ROUNDING = 1e-12  # of a sum of shares


class PCA(NamedTuple):
    """Principal components of n rows, all that there are."""

    mean: np.ndarray  # (n_features,)
    scale: np.ndarray  # (n_features,)
    components: np.ndarray  # (n_components, n_features), orthonormal rows
    explained_variance: np.ndarray  # (n_components,), falling
    rank: int


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    spark = (
        SparkSession.builder.appName("reduce")
        .config("spark.sql.execution.arrow.pyspark.enabled", True)
        .config("spark.sql.adaptive.enabled", False)
        .getOrCreate()
    )
    # As a file, and by Arrow: to take two matrices out of rows, one by one, takes Spark seconds more.
    files: pd.DataFrame = spark.read.format("binaryFile").load(f"{args.covariance}/*.parquet").select("content").toPandas()
    folds = [row for content in files["content"] for row in parse(content, SUMS.names).to_pylist()]
    n, mean, scatter = moments_of(*total_sums(folds))
    with threadpool_limits(1):  # LAPACK's last bits depend on the number of its threads
        pca = fit(n, mean, scatter, args.scale)
    spectrum = spectrum_of(pca.explained_variance)
    k = choose_k(args.k, spectrum["cumulative_explained_variance_ratio"].to_numpy(), pca.rank)
    components = spectrum[:k].assign(weights=list(pca.components[:k]))
    scaling = pd.DataFrame({"feature": range(mean.size), "mean": pca.mean, "scale": pca.scale})
    for name, table, schema in (
        ("components", components, COMPONENTS),
        ("scaling", scaling, SCALING),
        ("spectrum", spectrum, SPECTRUM),
        ("settings", pd.DataFrame({"k": [k], "scale": [args.scale]}), SETTINGS),
    ):
        spark.createDataFrame(table, schema).coalesce(1).write.parquet(f"{args.output}/model/{name}")

    spark.conf.set("spark.sql.files.maxPartitionBytes", 1)  # a partition is a file,
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 1)  # and so is a row
    features = spark.read.format("binaryFile").load(f"{args.features}/*.parquet")
    project_files(features, pca.mean, pca.scale, pca.components[:k]).write.parquet(f"{args.output}/embeddings")
    kept = components["cumulative_explained_variance_ratio"].iloc[-1]
    print(f"reduce: {n:,} images from {mean.size:,} features to {k:,}, which keep {kept:.1%} of the variance")


def project_files(files: DataFrame, mean: np.ndarray, scale: np.ndarray, components: np.ndarray) -> DataFrame:
    """Make EMBEDDINGS, one row for each row of the files, in their order.

    The files are read here and not by Spark, which would take longer to hand the rows over one by one than to multiply them.
    """
    model = files.sparkSession.sparkContext.broadcast((mean, scale, components))

    def project_all(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with threadpool_limits(1):
            for content in (content for batch in batches for content in batch["content"]):
                table = parse(content.as_buffer(), FEATURES.names)
                if not len(table):  # Spark writes a file for its schema where a partition is empty
                    continue
                embedding = project(to_matrix(table["features"]), *model.value)
                offsets = np.arange(len(table) + 1, dtype=np.int32) * embedding.shape[1]
                lists = pa.ListArray.from_arrays(offsets, embedding.ravel())
                yield from table.drop_columns("features").append_column("embedding", lists).combine_chunks().to_batches()

    return files.select("content").mapInArrow(project_all, EMBEDDINGS)


def total_sums(folds: Sequence[Mapping[str, Any]]) -> tuple[int, float, np.ndarray, np.ndarray]:
    """Add up rows of SUMS: n, step, sum (n_features,) and products (n_features, n_features) of all folds."""
    total = np.sum([np.frombuffer(row["sum"], "<i8") for row in folds], axis=0)
    triangle = np.sum([np.frombuffer(row["products"], "<i8") for row in folds], axis=0)
    return sum(row["n"] for row in folds), folds[0]["step"], total, to_square(triangle, total.size)


def moments_of(n: int, step: float, total: np.ndarray, products: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Compute number, mean and scatter matrix of n rows of whole numbers of steps from their sums.

    The sums of products are large and nearly cancel, so they are moved near the mean while they are whole numbers. Their
    bits above 64 are lost, and do not matter: the result has fewer. What is subtracted then is half of the rest at most.

    Parameters
    ----------
    total : int64 array of shape (n_features,)
    products : int64 array of shape (n_features, n_features), the sum of outer products

    Returns
    -------
    n, and float64 arrays of shapes (n_features,) and (n_features, n_features)
    """
    centre = (2 * total + n) // (2 * n)  # the whole number nearest to the mean
    rest = total - n * centre
    centred = products - np.outer(centre, total) - np.outer(rest, centre)
    offset = rest / n
    return n, (centre + offset) * step, (centred - n * np.outer(offset, offset)) * step**2


def to_square(triangle: np.ndarray, n: int) -> np.ndarray:
    """Make the symmetric matrix of shape (n, n) that has this lower triangle."""
    square = np.zeros((n, n), triangle.dtype)
    square[np.tri(n, dtype=bool)] = triangle
    return square + np.tril(square, -1).T


def fit(n: int, mean: np.ndarray, scatter: np.ndarray, scale: str) -> PCA:
    """Fit the principal components of n rows that have this mean and scatter matrix.

    Parameters
    ----------
    scale : "none", or "standard" to divide each feature by its standard deviation (ddof 1) first; a constant one by 1

    Raises
    ------
    SystemExit
        there are fewer than two rows
    """
    if n < 2:
        raise SystemExit(f"reduce: {n} image; a covariance needs at least 2")
    deviation = np.sqrt(np.diag(scatter) / (n - 1))
    divisor = np.where(deviation > 0, deviation, 1.0) if scale == "standard" else np.ones_like(mean)
    covariance = scatter / (n - 1)
    if scale == "standard":
        covariance /= np.outer(divisor, divisor)
    variance, vectors = np.linalg.eigh(covariance)
    variance = np.clip(variance[::-1], 0.0, None)
    rank = min(n - 1, int(np.sum(variance > variance[0] * mean.size * np.finfo(np.float64).eps)))
    return PCA(mean, divisor, fix_signs(vectors.T[::-1]), variance, rank)


def fix_signs(components: np.ndarray) -> np.ndarray:
    """Turn each direction so that its largest weight is positive; LAPACK leaves the sign to chance."""
    largest = np.abs(components).argmax(axis=1)
    signs = np.where(components[np.arange(len(components)), largest] < 0, -1.0, 1.0)
    return components * signs[:, None]


def spectrum_of(explained_variance: np.ndarray) -> pd.DataFrame:
    """Make SPECTRUM of these variances."""
    ratio = explained_variance / (explained_variance.sum() or 1.0)
    return pd.DataFrame(
        {
            "component": range(1, ratio.size + 1),
            "explained_variance": explained_variance,
            "explained_variance_ratio": ratio,
            "cumulative_explained_variance_ratio": np.minimum(ratio.cumsum(), 1.0),
        }
    )


def choose_k(k: int | float, cumulative: np.ndarray, rank: int) -> int:
    """Choose the number of components: k itself, or the fewest that keep the share k of the variance.

    Raises
    ------
    SystemExit
        k is more than rank, or rank is 0
    """
    if not rank:
        raise SystemExit("reduce: all images have the same features; there is nothing to reduce")
    if isinstance(k, float):
        return min(rank, int(np.searchsorted(cumulative, k - ROUNDING)) + 1)
    if k > rank:
        raise SystemExit(f"reduce: k={k:,} but these features vary in {rank:,} directions only; k can be 1 to {rank:,}")
    return k


def project(features: np.ndarray, mean: np.ndarray, scale: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Give the coordinates of the features on the components.

    Parameters
    ----------
    features : float32 array of shape (n_images, n_features)
    mean, scale : float64 arrays of shape (n_features,)
    components : float64 array of shape (n_components, n_features)

    Returns
    -------
    float32 array of shape (n_images, n_components), ``((features - mean) / scale) @ components.T``
    """
    return (((features - mean) / scale) @ components.T).astype(np.float32)


def to_matrix(features: pa.ChunkedArray) -> np.ndarray:
    """Read a column of lists of equal length as an array of shape (n_rows, length)."""
    return features.combine_chunks().flatten().to_numpy().reshape(len(features), -1)


def count_or_share(text: str) -> int | float:
    """Read a whole number of 1 to MAX_K, or a share between 0 and 1."""
    try:
        k = int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        k = 0
    if (isinstance(k, int) and 1 <= k <= MAX_K) or (isinstance(k, float) and 0 < k < 1):
        return k
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither a number of components, 1 to {MAX_K:,}, nor a share of the variance, between 0 and 1"
    )


def parse(content: bytes | pa.Buffer, columns: Sequence[str]) -> pa.Table:
    """Read the columns of a Parquet file's content. Where a page is not as it was written, an OSError is raised."""
    return pq.read_table(pa.py_buffer(content), columns=columns, use_threads=False, page_checksum_verification=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features")
    parser.add_argument("covariance")
    parser.add_argument("output")
    parser.add_argument("--k", type=count_or_share, required=True, help="components, or the share of variance to keep")
    parser.add_argument("--scale", choices=SCALES, required=True, help="what features are divided by")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
