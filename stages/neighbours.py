"""neighbours: find the images nearest to each image.

usage: neighbours.py FEATURES OUTPUT --n_neighbours 6

reads   FEATURES           files of FEATURES
writes  OUTPUT/sketches    SKETCHES, a row for each row of FEATURES, sorted by image_id and path within a file
        OUTPUT/neighbours  NEIGHBOURS, a row for each distinct image, sorted by image_id within a file

A sketch is a short form of the features: their coordinates on the first principal components of a sample, scaled to unit
length. Neighbours are the nearest in this space. Up to N_COMPARED images, all are compared, and only the rounding of float32
is lost. Of more, each is compared with those that are near to the same centres: the images of least SHA-256, one for about
ROWS images. That finds nearly all of the nearest, of a million images in a fifth of the time. The results are the same on
any number of cores, as one thread computes each block of rows.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
N_SAMPLE = 8192  # images at most, those of least SHA-256, that the components are fitted on
N_COMPARED = 2**17  # images that are all compared with all
# Centres nearest to an image: it is compared with all images that have one of these as their nearest. See docs/scale.md.
N_CENTRES = 4
SPARE = 4  # neighbours found in float32, of which float64 chooses
ROWS, COLUMNS = 1024, 8192  # of a matrix of similarities, at once
IMAGES_PER_FILE = 16384
MAX_TASKS = 512


class Cells(NamedTuple):
    """Images by the nearest of some centres."""

    nearest: np.ndarray  # int32, (n_images, N_CENTRES): the nearest centres of each, the nearest first
    order: np.ndarray  # int64, (n_images,): the numbers of the images, by the nearest centre
    starts: np.ndarray  # int64, (n_centres + 1,): where those of a centre start in it

    def members(self, centre: int) -> np.ndarray:
        """Return the numbers of the images whose nearest centre it is, rising."""
        return self.order[self.starts[centre] : self.starts[centre + 1]]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    spark = (
        SparkSession.builder.appName("neighbours")
        .config("spark.sql.execution.arrow.pyspark.enabled", True)
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 1)  # a row is a whole file, or a block of images
        .config("spark.sql.files.maxPartitionBytes", 1)  # a partition is a file
        .config("spark.sql.adaptive.enabled", False)
        .getOrCreate()
    )
    files = spark.read.format("binaryFile").load(f"{args.features}/*.parquet")
    image_ids = read_ids(files)
    with threadpool_limits(1):  # the last bits of a result depend on the number of BLAS's threads
        mean, components = fit(read_sample(files, image_ids[:N_SAMPLE][-1].decode()))
    n_files = math.ceil(len(image_ids) / IMAGES_PER_FILE)
    sketches = sketch_files(files, mean, components).repartition(n_files, "image_id")
    sketches.sortWithinPartitions("image_id", "path").write.parquet(f"{args.output}/sketches")

    written = spark.read.format("binaryFile").load(f"{args.output}/sketches/*.parquet")
    neighbours = find_neighbours(spark, *read_sketches(written), args.n_neighbours).repartition(n_files, "image_id")
    neighbours.sortWithinPartitions("image_id").write.parquet(f"{args.output}/neighbours")
    print(f"neighbours: {args.n_neighbours} of each of {len(image_ids):,} distinct images")


def read_ids(files: DataFrame) -> np.ndarray:
    """Read the image_id of each distinct image, bytes, rising."""

    def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for table in tables_of(batches, ["image_id"]):
            yield from table.to_batches()

    rows: Any = files.select("content").mapInArrow(read, "image_id string").toPandas()
    return np.unique(np.array(rows["image_id"], "S"))


def read_sample(files: DataFrame, last: str) -> np.ndarray:
    """Read the features of the distinct images up to the image_id last: float64 of shape (n, n_features), by image_id."""

    def choose(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for table in tables_of(batches, ["image_id", "features"]):
            chosen = table.filter(pc.less_equal(table["image_id"], last))
            if len(chosen):
                columns = [chosen["image_id"].combine_chunks(), to_bytes(to_matrix(chosen["features"]))]
                yield pa.RecordBatch.from_arrays(columns, ["image_id", "features"])

    sample: Any = files.select("content").mapInArrow(choose, "image_id string, features binary").toPandas()
    sample = sample.drop_duplicates("image_id").sort_values("image_id")
    return np.frombuffer(b"".join(sample["features"]), np.float32).reshape(len(sample), -1).astype(np.float64)


def read_sketches(files: DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Read the image_id of each distinct image, bytes, rising, and its sketch, float32 of shape (n_images, n_components)."""
    contents: Any = files.select("content").toPandas()  # as files: to take rows one by one takes Spark seconds more
    table = pa.concat_tables(parse(content, ["image_id", "sketch"]) for content in contents["content"])
    image_ids, first = np.unique(np.array(table["image_id"].to_pylist(), "S"), return_index=True)
    return image_ids, np.frombuffer(b"".join(table["sketch"].take(first).to_pylist()), np.float32).reshape(len(first), -1)


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

    An image that equals the mean has no direction; all such get that of the first component.
    """
    coordinates = (features - mean) @ components.T
    coordinates[~coordinates.any(axis=1), 0] = 1.0
    return (coordinates / np.linalg.norm(coordinates, axis=1, keepdims=True)).astype(np.float32)


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


def find_neighbours(spark: SparkSession, image_ids: np.ndarray, sketches: np.ndarray, n_neighbours: int) -> DataFrame:
    """NEIGHBOURS, one row for each image, in blocks of rows that no number of tasks changes."""
    cells = divide(sketches) if len(sketches) > N_COMPARED else None
    # Not as Cells: a worker that reads a broadcast value does not know the classes of this file.
    shared = spark.sparkContext.broadcast((image_ids, sketches, cells and tuple(cells)))
    n_blocks = len(cells.starts) - 1 if cells else math.ceil(len(image_ids) / ROWS)
    schema = to_arrow_schema(NEIGHBOURS)

    def search(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        ids, sketches, parts = shared.value
        divided = Cells(*parts) if parts else None
        with threadpool_limits(1):
            for block in (block for batch in batches for block in batch["id"].to_pylist()):
                for asked, others in queries(block, len(ids), divided):
                    if len(others) <= n_neighbours:  # lonely images and their centres
                        others = np.arange(len(ids))
                    place, distances = nearest(sketches[others], np.searchsorted(others, asked), n_neighbours)
                    names = [ids[asked].tolist(), ids[others[place]].tolist(), distances.tolist()]
                    yield pa.RecordBatch.from_pydict(dict(zip(schema.names, names, strict=True)), schema=schema)

    return spark.range(0, n_blocks, 1, min(n_blocks, MAX_TASKS)).mapInArrow(search, NEIGHBOURS)


def divide(sketches: np.ndarray) -> Cells:
    """Put each image into the cell of its nearest centre; the centres are the first images."""
    centres = sketches[: len(sketches) // ROWS].T
    nearest = np.empty((len(sketches), min(N_CENTRES, centres.shape[1])), np.int32)
    with threadpool_limits(1):
        for start in range(0, len(sketches), ROWS):
            similarity = sketches[start : start + ROWS] @ centres
            found = np.argpartition(-similarity, nearest.shape[1] - 1, axis=1)[:, : nearest.shape[1]]
            order = np.lexsort((found, -np.take_along_axis(similarity, found, 1)))
            nearest[start : start + ROWS] = np.take_along_axis(found, order, 1)
    sizes = np.bincount(nearest[:, 0], minlength=centres.shape[1])
    return Cells(nearest, np.argsort(nearest[:, 0], kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))


def queries(block: int, n_images: int, cells: Cells | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield numbers of images whose neighbours are wanted, and those of the images that they are compared with, rising."""
    if cells is None:
        everything = np.arange(n_images)
        yield everything[block * ROWS : (block + 1) * ROWS], everything
        return
    members = cells.members(block)
    for asked in (members[start : start + ROWS] for start in range(0, len(members), ROWS)):
        yield asked, np.sort(np.concatenate([cells.members(cell) for cell in np.unique(cells.nearest[asked])]))


def nearest(sketches: np.ndarray, asked: np.ndarray, n_neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the n_neighbours images nearest to each of some rows, fewer where there are fewer others.

    Parameters
    ----------
    sketches : float32 array of shape (n_images, n_components), rows of unit length
    asked : the numbers of the rows whose neighbours are wanted, (n_asked,)

    Returns
    -------
    row numbers and distances, (n_asked, n_neighbours), by rising distance, then by number
    """
    queries, n_rows = sketches[asked], len(asked)
    n_kept = min(n_neighbours + SPARE, len(sketches) - 1)
    best = np.full((n_rows, n_kept), -np.inf, np.float32)
    numbers = np.zeros((n_rows, n_kept), np.int64)
    for first in range(0, len(sketches), COLUMNS):
        similarity = queries @ sketches[first : first + COLUMNS].T
        own = asked - first  # no image is its own neighbour
        inside = (own >= 0) & (own < similarity.shape[1])
        similarity[np.flatnonzero(inside), own[inside]] = -np.inf
        # Only what is not below the worst that is kept is sorted. That is little, but in the first columns.
        worst = best.min(axis=1, initial=np.inf)
        if first == 0 and 0 < n_kept < similarity.shape[1]:
            worst = np.partition(similarity, -n_kept, axis=1)[:, -n_kept]
        row, column = np.divmod(np.flatnonzero(similarity >= worst[:, None]), similarity.shape[1])
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
        table = parse(content.as_buffer(), columns)
        if len(table):
            yield table


def to_bytes(rows: np.ndarray) -> pa.BinaryArray:
    return pa.array([row.tobytes() for row in rows], pa.binary())


def to_matrix(features: pa.ChunkedArray) -> np.ndarray:
    """Turn a column of lists of equal length into an array of shape (n_rows, length).

    Raises
    ------
    ValueError
        a feature is not a finite number
    """
    matrix = features.combine_chunks().flatten().to_numpy().reshape(len(features), -1)
    if not (is_finite := np.isfinite(matrix).all(axis=1)).all():
        raise ValueError(f"{np.sum(~is_finite)} of {len(matrix)} feature vectors are not finite")
    return matrix


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
    parser.add_argument("output")
    parser.add_argument("--n_neighbours", type=between(int, 1, 1000), required=True, help="of each image")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
