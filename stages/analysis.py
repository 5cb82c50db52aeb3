"""analysis: what the stages that never leave this machine have in common, among themselves and with the report.

It is no stage. The stages that ship to a cluster import nothing of the repository. So what reduce has in common with this
file stands there too, and tests hold the two against each other.

The table RECOGNISERS has the ways to recognise an image. One more is one pair of functions and one line.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import scipy.linalg
from scipy.sparse.linalg import eigsh
from threadpoolctl import threadpool_limits
from tqdm import tqdm

SUMS = ("fold", "n", "step", "sum", "products")
UNREDUCED = ("features", "pixels")  # the spaces that no k changes
SPACES = ("embedding", *UNREDUCED)
ROWS = 1024  # of a distance matrix, at once
DRAWS = 2000  # of the bootstrap
INTERVAL = (0.025, 0.975)
# Of an accuracy, a leak explains as much as its share of the images at most. From here on that is too much ...
MAX_LEAK = 0.2
# ... and from here on if raw pixels recognise nearly as well as features. Without near-equal images, they may: labels that
# differ in plain colour are easy.
MAX_LEAK_OF_PIXELS = 0.05
MANY = 16  # features and images for each component: from here on, these are found without the others
AS_WELL = 0.9  # pixels as features: the share of what either recognises beyond chance
RECOGNISED = 0.1  # by the features beyond chance, at least, or there is nothing to compare


class Sums(NamedTuple):
    """Of the features of one fold, in steps, as the stage covariance has them."""

    n: int
    step: float
    total: np.ndarray  # int64, (n_features,)
    products: np.ndarray  # int64, (n_features, n_features): the sum of outer products


class Moments(NamedTuple):
    """Of the features of one fold."""

    n: int
    mean: np.ndarray  # float64, (n_features,)
    scatter: np.ndarray  # float64, (n_features, n_features)


class Basis(NamedTuple):
    """Principal components, as the stage reduce has them."""

    mean: np.ndarray  # float64, (n_features,)
    scale: np.ndarray  # float64, (n_features,)
    components: np.ndarray  # float64, (n_components, n_features), orthonormal rows


class Recogniser(NamedTuple):
    """A way to learn labels from some rows and to give them to others."""

    title: str
    # Takes training rows, float32 of shape (n_train, n_columns), and their labels, (n_train,).
    fit: Callable[[np.ndarray, np.ndarray], Any]
    # Takes what fit gives and test rows, float32 of shape (n_test, n_columns); gives labels, (n_test,).
    predict: Callable[[Any, np.ndarray], np.ndarray]


# Tables


def open_table(folder: str, file_system: Any | None = None) -> ds.Dataset:
    """Open a folder of Parquet files. Where a page read from it is not as it was written, reading raises an OSError."""
    # To read ahead would keep the memory of files that are long done with.
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True, pre_buffer=False)
    return ds.dataset(folder, filesystem=file_system, format=ds.ParquetFileFormat(default_fragment_scan_options=options))


def read(
    folder: str, columns: Sequence[str], wanted: pc.Expression | None = None, file_system: Any | None = None
) -> pa.Table:
    """Read the columns of a folder of Parquet files, of the wanted rows alone."""
    return open_table(folder, file_system).to_table(list(columns), filter=wanted)


def batches(folder: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Read the columns of a folder of Parquet files, some rows at a time."""
    ahead = {"batch_readahead": 1, "fragment_readahead": 1}  # by default, Arrow holds many more batches
    return open_table(folder).to_batches(list(columns), batch_size=4 * ROWS, **ahead)


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Turn a table into a frame whose texts stay Arrow's: Python's strings take two to three times the memory."""
    return table.to_pandas(types_mapper={pa.string(): pd.StringDtype("pyarrow")}.get)


def read_pairs(folder: str, image_ids: pa.Array) -> pd.DataFrame:
    """Read a, b, distance: the numbers of each image and of each of its neighbours, those of an image by rising distance."""
    table = read(folder, ("image_id", "neighbours"))
    own = pc.index_in(table["image_id"], image_ids).to_numpy()
    a = np.repeat(own, pc.list_value_length(table["neighbours"]).to_numpy())
    b = pc.index_in(pc.list_flatten(table["neighbours"]), image_ids).to_numpy()
    del table  # 400 bytes an image
    return pd.DataFrame({"a": a, "b": b, "distance": pc.list_flatten(read(folder, ("distances",))["distances"]).to_numpy()})


def read_vectors(folder: str, column: str, image_ids: pa.Array) -> np.ndarray:
    """Read the vector of each of these images, some at a time: float32 array of shape (n_images, length).

    Parameters
    ----------
    folder : a table with the column image_id; others than these images may be there
    column : of lists of numbers, or of the bytes of float32; of an equal length each

    Raises
    ------
    ValueError
        an image is not there
    """
    places = pc.index_in(read(folder, ("image_id",))["image_id"], image_ids).fill_null(-1).to_numpy()
    if n_missing := len(image_ids) - len(np.unique(places[places >= 0])):
        raise ValueError(f"{n_missing:,} of {len(image_ids):,} images are not in {folder}. Run `dvc repro`.")
    vectors, first = np.zeros((len(image_ids), 0), np.float32), 0
    for batch in batches(folder, [column]):
        here = places[first : first + len(batch)]
        first += len(batch)
        if (here < 0).all():
            continue
        values = batch[column]
        is_binary = pa.types.is_binary(values.type)
        rows = np.frombuffer(b"".join(values.to_pylist()), np.float32) if is_binary else values.flatten().to_numpy()
        rows = rows.reshape(len(batch), -1)
        if not vectors.size:
            vectors = np.zeros((len(image_ids), rows.shape[1]), np.float32)
        vectors[here[here >= 0]] = rows[here >= 0]
    return vectors


def write(table: pd.DataFrame, schema: pa.Schema, folder: str | Path) -> None:
    """Write the columns of the schema as a table of one file; a column that is not there is null."""
    Path(folder).mkdir(parents=True)
    rows = pa.Table.from_pandas(table.reindex(columns=schema.names), schema, preserve_index=False)
    pq.write_table(rows.replace_schema_metadata(), Path(folder, "part-00000.parquet"), write_page_checksum=True)


def hash_below(share: float) -> str:
    """Give the hash below which that share of all image_id lies: they are SHA-256 in hexadecimal, and so uniform."""
    return f"{int(share * 16**8):08x}" if share < 1 else "g"


def of_share(share: float) -> pc.Expression:
    """Choose that share of all images by image_id."""
    return pc.field("image_id") < hash_below(share)


def first_rows(table: pa.Table, image_ids: pd.Series) -> np.ndarray:
    """Find the first row of each of these images in a table with the column image_id: int array of shape (n_images,)."""
    numbers = pd.Series(range(len(table)), table["image_id"].to_pylist())
    return numbers.groupby(level=0).first()[image_ids].to_numpy(int)  # also where there is no image


def to_matrix(values: np.ndarray, n_rows: int) -> np.ndarray:
    """Cut the values of a column of lists of equal length into rows: array of shape (n_rows, length)."""
    return values.reshape(n_rows, -1 if n_rows else 0)


def rounded(value: Any) -> float:
    """Keep four digits after the point, as all metrics have."""
    return round(float(value), 4)


# Folds


def train_and_test(sample: pd.DataFrame, test_fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Tell which rows of the sample (label, fold) train and which are tested: two bool arrays of shape (n_images,).

    Images whose label the other fold does not have cannot be recognised, and are in neither.
    """
    is_train = (sample["fold"] != test_fold).to_numpy()
    return is_train, ~is_train & sample["label"].isin(sample["label"][is_train]).to_numpy()


def in_both_folds(stage: str, n_steps: int, measure: Callable[[int, tqdm], Any]) -> list[Any]:
    """Measure on each fold, side by side, with a progress bar of n_steps for each of the two."""
    # One thread for each fold, and one of BLAS in it: the last bits of a result depend on the number of BLAS's threads.
    steps = tqdm(total=2 * n_steps, desc=stage)
    with threadpool_limits(1), ThreadPoolExecutor() as pool, steps:
        return list(pool.map(lambda fold: measure(fold, steps), (0, 1)))


# Principal components


def read_sums(covariance: str, file_system: Any | None = None) -> dict[int, Sums]:
    """Read the sums of each fold."""
    rows = read(covariance, SUMS, file_system=file_system).to_pandas().itertuples()
    return {
        row.fold: Sums(
            row.n,
            row.step,
            np.frombuffer(row.sum, "<i8"),
            to_square(np.frombuffer(row.products, "<i8"), len(row.sum) // 8),
        )
        for row in rows
    }


def to_square(triangle: np.ndarray, n: int) -> np.ndarray:
    """Make the symmetric matrix of shape (n, n) that has this lower triangle."""
    square = np.zeros((n, n), triangle.dtype)
    square[np.tri(n, dtype=bool)] = triangle
    return square + np.tril(square, -1).T


def to_moments(sums: Sums) -> Moments:
    """Compute the moments, as the stage reduce does, whose function says why it is done so."""
    n, step, total, products = sums
    centre = (2 * total + n) // (2 * n)
    rest = total - n * centre
    centred = products - np.outer(centre, total) - np.outer(rest, centre)
    offset = rest / n
    return Moments(n, (centre + offset) * step, (centred - n * np.outer(offset, offset)) * step**2)


def fit_basis(moments: Moments, scale: str, max_components: int) -> Basis:
    """Fit the first principal components of one fold: those of the stage reduce, as if the fold were all.

    Parameters
    ----------
    scale : "none", or "standard" to divide each feature by its standard deviation (ddof 1) first; a constant one by 1
    max_components : the most to fit; there are never more than directions in which the fold varies
    """
    n, mean, scatter = moments
    deviation = np.sqrt(np.diag(scatter) / max(n - 1, 1))
    divisor = np.where(deviation > 0, deviation, 1.0) if scale == "standard" else np.ones_like(mean)
    scaled = scatter / np.outer(divisor, divisor)
    if min(n, mean.size) >= MANY * max_components and scaled.any():
        # By Lanczos's algorithm, always from the same start: 64 of 2,048 to twelve digits, in less than half of the time.
        variance, vectors = eigsh(scaled, max_components, rng=0)
    else:
        wanted = (max(0, mean.size - max_components), mean.size - 1)
        variance, vectors = scipy.linalg.eigh(scaled, subset_by_index=wanted)
    rank = max(1, int(np.sum(variance > variance[-1] * mean.size * np.finfo(np.float64).eps)))
    return Basis(mean, divisor, vectors.T[::-1][: min(rank, max(n - 1, 1))])


def project(features: np.ndarray, basis: Basis) -> np.ndarray:
    """Give the coordinates of features (n_images, n_features) on the components: float32, (n_images, n_components)."""
    return (((features - basis.mean) / basis.scale) @ basis.components.T).astype(np.float32)


def held_out_error(test: Moments, basis: Basis, k: int) -> float:
    """Compute the share of the test fold's variance about the training fold's mean that k components lose.

    It is exact, and of all images.
    """
    shift = (test.mean - basis.mean) / basis.scale
    about = test.scatter / np.outer(basis.scale, basis.scale) + test.n * np.outer(shift, shift)
    components = basis.components[:k]
    kept = np.einsum("kd,kd->", components @ about, components)
    return float(1 - kept / np.trace(about))


# Confidence


def resample(sums: np.ndarray, sizes: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draw as many units as there are, such as groups, with replacement, and divide their sums by their sizes.

    Parameters
    ----------
    sums : of each unit, array of shape (n_units, n_columns)
    sizes : of each unit, array of shape (n_units,)

    Returns
    -------
    float64 array of shape (DRAWS, n_columns); the INTERVAL of a column is that of the bootstrap (Efron and Tibshirani 1993,
    "An introduction to the bootstrap", 8.5)
    """
    chosen = random.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=DRAWS)
    return chosen @ sums / (chosen @ sizes)[:, None]


def losses(folds: list[pd.DataFrame]) -> pd.DataFrame:
    """Compute what the first k components lose of the full space's accuracy, the mean of the folds, with its interval.

    Parameters
    ----------
    folds
        for each fold a row an image tested: its group, and whether it was recognised in the full space (column features)
        and by the first k components (column k, for each k)

    Returns
    -------
    loss, loss_low, loss_high by k, for those k that all folds have
    """
    random = np.random.default_rng(0)
    draws, observed = [], []
    for hits in folds:
        by_group = hits.assign(n=1).groupby("group").sum()
        lost = -by_group.drop(columns=["features", "n"]).sub(by_group["features"], axis=0)
        sizes = by_group["n"].to_numpy()
        draws.append(pd.DataFrame(resample(lost.to_numpy(), sizes, random), columns=lost.columns))
        observed.append(lost.sum() / sizes.sum())
    mean = sum(draws) / len(draws)
    low, high = (mean.quantile(each) for each in INTERVAL)
    return pd.DataFrame({"loss": sum(observed) / len(observed), "loss_low": low, "loss_high": high}).dropna()


def leak_warning(metrics: dict[str, Any]) -> str | None:
    """Say why the accuracies of metrics.json cannot be trusted, and what to do; None where nothing speaks against them."""
    leak, n_labels = metrics["leak"]["near_equal"], metrics["tested"]["labels"]
    if not n_labels:
        return None
    features, pixels = (metrics["nearest_neighbour"][space] - 1 / n_labels for space in UNREDUCED)  # beyond chance
    is_as_well = features >= RECOGNISED and pixels >= AS_WELL * features
    if leak <= (MAX_LEAK_OF_PIXELS if is_as_well else MAX_LEAK):
        return None
    pixels_too = ", and raw pixels recognise nearly as many as the features" if is_as_well else ""
    return (
        f"these accuracies flatter: {leak:.1%} of the images have a near-equal image of their label in the other fold"
        f"{pixels_too}. Set split.near to 0.5, or ingest.group_pattern if the names of files tell the films."
    )


# Confusions


def count_confusions(predictions: pd.DataFrame) -> pd.DataFrame:
    """Count the images (label, predicted) of each label by the label that they were given.

    Returns
    -------
    label, predicted, n_images, and their share of the label's images, by label and predicted
    """
    cells = predictions.groupby(["label", "predicted"]).size().rename("n_images").reset_index()
    return cells.assign(share=cells["n_images"] / cells.groupby("label")["n_images"].transform("sum"))


def most_confused(cells: pd.DataFrame) -> pd.DataFrame:
    """Keep the cells of count_confusions that are errors, those of the most images first."""
    errors = cells[cells["label"] != cells["predicted"]]
    return errors.sort_values(["n_images", "label", "predicted"], ascending=[False, True, True])


def recalls(predictions: pd.DataFrame, sample: pd.DataFrame, labels: Iterable[str]) -> pd.DataFrame:
    """Tell of each label how many of its images the sample has, and its recall: none if it cannot be tested."""
    names = pd.Index(sorted(labels), name="label")
    recall = (predictions["label"] == predictions["predicted"]).groupby(predictions["label"]).mean().round(4)
    n_images = sample["label"].value_counts().reindex(names, fill_value=0)
    return pd.DataFrame({"n_images": n_images, "recall": recall.reindex(names)}).reset_index()


# Recognisers


def nearest(train: np.ndarray, test: np.ndarray, unlike: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """Find the row of train that is nearest to each row of test (Euclidean), the first of equals: int array, (n_test,).

    With unlike, a number of each row of train and of each of test, rows of an equal number are passed over.
    """
    squares = (train**2).sum(axis=1)
    found = [np.zeros(0, int)]
    for some in (slice(start, start + ROWS) for start in range(0, len(test), ROWS)):
        distances = squares - 2 * test[some] @ train.T
        if unlike:
            distances[unlike[1][some, None] == unlike[0]] = np.inf
        found.append(distances.argmin(axis=1))
    return np.concatenate(found)


def fit_nearest_neighbour(train: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return train, labels


def predict_nearest_neighbour(model: tuple[np.ndarray, np.ndarray], test: np.ndarray) -> np.ndarray:
    train, labels = model
    return labels[nearest(train, test)]


def fit_linear_probe(train: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float, Any]:
    """Fit a logistic regression to rows that are scaled, so that one penalty suits spaces of any unit."""
    from sklearn.dummy import DummyClassifier  # slow to import, and most stages do not need it
    from sklearn.linear_model import LogisticRegression

    mean = train.mean(axis=0)
    spread = np.sqrt(((train - mean) ** 2).sum(axis=1).mean()) or 1.0
    is_choice = len(set(labels)) > 1  # which a regression must have
    probe = LogisticRegression(C=100.0, max_iter=500) if is_choice else DummyClassifier()
    return mean, spread, probe.fit((train - mean) / spread, labels)


def predict_linear_probe(model: tuple[np.ndarray, float, Any], test: np.ndarray) -> np.ndarray:
    mean, spread, probe = model
    return probe.predict((test - mean) / spread)


RECOGNISERS = {
    "nearest_neighbour": Recogniser("nearest neighbour", fit_nearest_neighbour, predict_nearest_neighbour),
    "linear_probe": Recogniser("linear probe", fit_linear_probe, predict_linear_probe),
}
# The columns that baseline writes for them and evaluate reads.
PREDICTED = tuple(f"{space}_{name}" for name in RECOGNISERS for space in UNREDUCED)


# Command lines


def between(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """Make a parser of numbers of that kind, from low to high, for argparse."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:  # false for NaN too
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return value

    return number
