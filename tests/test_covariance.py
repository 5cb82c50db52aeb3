"""Facts about the exact sums of each fold, of stages/covariance.py; Python's whole numbers are the oracle."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from stages import covariance
from stages.covariance import MOST, MOST_ROWS, ROWS, Sums

N_FEATURES = 5
STEP = 2.0**-9

Rows = tuple[np.ndarray, np.ndarray]  # fold, int32 (n,), and features, float32 (n, n_features)
Row = tuple[int, float, bytes, bytes]  # n, step, sum and products


def random_steps(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-MOST, MOST + 1, (n, N_FEATURES))


def random_rows(n: int, seed: int = 0, folds: tuple[int, ...] = (0, 1)) -> Rows:
    fold = np.random.default_rng(seed).choice(folds, n).astype(np.int32)
    return fold, (random_steps(n, seed) * STEP).astype(np.float32)


def oracle(steps: np.ndarray) -> Row:
    """The sums by whole numbers of any size."""
    whole = steps.astype(object)
    products = (whole.T @ whole)[np.tril_indices(whole.shape[1])]
    return len(whole), STEP, whole.sum(axis=0).astype("<i8").tobytes(), products.astype("<i8").tobytes()


def to_row(sums: Sums) -> Row:
    return sums.n, STEP, sums.sum.tobytes(), sums.products.tobytes()


def sums_of(steps: np.ndarray) -> Sums:
    return covariance.sums_of(steps.astype(np.float64))


def write(folder: Path, files: list[Rows]) -> tuple[str, str]:
    """Write features/part-00000.parquet and so on, with another column as the stage featurize has, and the split of them."""
    (folder / "features").mkdir(parents=True)
    (folder / "split" / "images").mkdir(parents=True)
    images = []
    for number, (fold, features) in enumerate(files):
        ids = pa.array([hashlib.sha256(b"%d/%d" % (number, i)).hexdigest() for i in range(len(fold))], pa.string())
        rows = pa.array(list(features), pa.list_(pa.float32()))
        table = pa.table({"image_id": ids, "label": pa.array(["apple"] * len(fold), pa.string()), "features": rows})
        pq.write_table(table, folder / "features" / f"part-{number:05}.parquet")
        images.append(pa.table({"image_id": ids, "group": ids, "fold": pa.array(fold, pa.int32())}))
    pq.write_table(pa.concat_tables(images), folder / "split" / "images" / "part-00000.parquet")
    return str(folder / "features"), str(folder / "split")


Inputs = tuple[DataFrame, np.ndarray, np.ndarray]  # files of features, image_id and fold of each image


def read(spark: SparkSession, features: str, split: str) -> Inputs:
    files, images = (spark.read.format("binaryFile").load(f"{place}/*.parquet") for place in (features, f"{split}/images"))
    return files, *covariance.read_folds(images)


def run(inputs: Inputs) -> dict[int, Row]:
    """All rows of SUMS, by fold."""
    rows = covariance.add_up(covariance.sum_files(*inputs, STEP)).collect()
    assert len({row["fold"] for row in rows}) == len(rows)
    return {row["fold"]: (row["n"], row["step"], bytes(row["sum"]), bytes(row["products"])) for row in rows}


def assert_sums(actual: dict[int, Row], files: list[Rows]) -> None:
    """Each fold's sums are those of all its rows at once."""
    fold, features = (np.concatenate(parts) for parts in zip(*files, strict=True))
    steps = (features / STEP).astype(int)
    assert actual == {each: oracle(steps[fold == each]) for each in set(fold.tolist())}


@pytest.fixture(autouse=True)
def own_settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """A partition for each file; and Spark's settings as they were, after a stage's main has set its own."""
    if "spark" not in request.fixturenames:
        yield
        return
    spark = request.getfixturevalue("spark")
    names = (
        "spark.app.name",
        "spark.sql.execution.arrow.maxRecordsPerBatch",
        "spark.sql.files.maxPartitionBytes",
        "spark.sql.adaptive.enabled",
    )
    before = {name: spark.conf.get(name, None) for name in names}
    spark.conf.set("spark.sql.files.maxPartitionBytes", 1)
    yield
    for name, value in before.items():
        spark.conf.unset(name) if value is None else spark.conf.set(name, value)


# Sums


@pytest.mark.parametrize("n", [1, 2, 500])
def test_sums_are_exact(n: int) -> None:
    assert to_row(sums_of(random_steps(n))) == oracle(random_steps(n))


def test_sums_of_the_most_rows_and_of_the_largest_features_are_exact() -> None:
    steps = np.full((ROWS, 2), [MOST, -MOST])
    steps[::3] += [-2, 1]
    assert to_row(sums_of(steps)) == oracle(steps)


def test_so_many_rows_as_are_taken_at_once_have_exact_products_in_float64() -> None:
    assert ROWS * MOST**2 < 2**53


def test_so_many_rows_as_a_fold_may_have_have_exact_products_in_64_bits() -> None:
    assert MOST_ROWS * MOST**2 < 2**63


def test_more_rows_are_refused() -> None:
    one = sums_of(random_steps(1))
    covariance.add(one._replace(n=MOST_ROWS - 1), one)
    with pytest.raises(ValueError, match="8,589,934,593 images in one fold; sums of 64 bits are exact up to 8,589,934,592"):
        covariance.add(one._replace(n=MOST_ROWS), one)


def test_rows_can_be_added_and_taken_away_to_the_bit() -> None:
    some, rest = random_steps(40), random_steps(60, seed=1)
    whole = sums_of(np.concatenate([some, rest]))
    assert to_row(covariance.add(sums_of(some), sums_of(rest))) == to_row(whole)
    gone = sums_of(some)
    left = Sums(whole.n - gone.n, whole.sum - gone.sum, whole.products - gone.products)
    assert to_row(left) == oracle(rest)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, STEP / 2, (MOST + 1) * STEP, 0.1], ids=str)
def test_a_feature_that_is_no_whole_number_of_steps_is_refused(bad: float) -> None:
    _, features = random_rows(7)
    features[2, 1] = features[2, 3] = features[5, 0] = bad
    with pytest.raises(ValueError, match=r"2 of 7 feature vectors are not -32,767 to 32,767 times 0\.001953125"):
        covariance.to_steps(features, STEP)


def test_a_sliced_column_becomes_its_own_rows_only() -> None:
    _, features = random_rows(5)
    rows = pa.array(list(features), pa.list_(pa.float32())).slice(2, 3)
    np.testing.assert_array_equal(covariance.to_matrix(rows), features[2:])


# Files


@pytest.mark.parametrize("sizes", [[40], [9, 30, 1], [11, 7, 13, 5, 3, 8, 2]], ids=lambda sizes: f"{len(sizes)} files")
def test_each_fold_has_the_sums_of_its_rows(sizes: list[int], spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(n, seed) for seed, n in enumerate(sizes)]
    assert_sums(run(read(spark, *write(tmp_path, files))), files)


def test_a_file_that_is_read_in_parts_has_the_sums_of_its_rows(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covariance, "ROWS", 7)
    files = [random_rows(40)]
    assert_sums(run(read(spark, *write(tmp_path, files))), files)


def test_a_fold_may_be_missing_in_some_files(spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(9, 0, (0,)), random_rows(8, 1, (1,)), random_rows(7, 2), random_rows(6, 3, (1,))]
    assert_sums(run(read(spark, *write(tmp_path, files))), files)


def test_a_fold_without_any_image_has_no_row(spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(5, seed, (1,)) for seed in range(3)]
    assert run(read(spark, *write(tmp_path, files))).keys() == {1}


def test_a_file_without_rows_adds_nothing(spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(0), random_rows(9, 1), random_rows(8, 2)]
    assert_sums(run(read(spark, *write(tmp_path, files))), files)


def test_folds_are_written_in_their_order() -> None:
    sums = covariance.sums_of(np.ones((1, 2)))
    written = covariance.to_batches({1: sums, 0: sums, 2: sums}, 0.5)
    assert [batch["fold"][0].as_py() for batch in written] == [0, 1, 2]


def test_neither_the_order_of_rows_nor_files_nor_tasks_change_a_byte(spark: SparkSession, tmp_path: Path) -> None:
    fold, features = random_rows(90)
    found = []
    for cuts in ([], [50], [1, 2, 30, 31, 70]):  # one task, two, and two of three files each
        order = np.random.default_rng(len(cuts)).permutation(90)
        files = list(zip(np.split(fold[order], cuts), np.split(features[order], cuts), strict=True))
        found.append(run(read(spark, *write(tmp_path / str(len(cuts)), files))))
    assert found[1:] == found[:1] * 2


def test_main_writes_one_row_of_sums_for_each_fold(spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(10, seed) for seed in range(3)]
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone/backbone.json").write_text(json.dumps({"step": STEP}))
    output = str(tmp_path / "covariance")
    covariance.main([*write(tmp_path, files), str(tmp_path / "backbone"), output])
    rows = pq.read_table(output).to_pylist()
    assert [list(row) for row in rows] == [["fold", "n", "step", "sum", "products"]] * 2
    assert_sums({row["fold"]: tuple(list(row.values())[1:]) for row in rows}, files)


def test_files_of_the_same_bytes_are_rows_of_one_fold(spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(9, 0), random_rows(8, 1)]
    features, split = write(tmp_path, files)
    twice = pq.read_table(f"{split}/images")
    pq.write_table(pa.concat_tables([twice, twice]), f"{split}/images/part-00000.parquet")
    assert_sums(run(read(spark, features, split)), files)


def test_images_are_found_among_those_that_have_a_fold() -> None:
    ids, folds = np.array([b"a", b"c", b"e"]), np.array([0, 1, 0], np.int8)
    np.testing.assert_array_equal(covariance.look_up(np.array([b"e", b"a", b"c", b"e"]), ids, folds), [0, 0, 1, 0])


@pytest.mark.parametrize("missing", [b"0", b"b", b"z"], ids=str)
def test_an_image_without_a_fold_is_refused(missing: bytes) -> None:
    ids, folds = np.array([b"a", b"c", b"e"]), np.array([0, 1, 0], np.int8)
    with pytest.raises(ValueError, match=f"^1 of 3 images have no fold; the first is {missing.decode()}\\."):
        covariance.look_up(np.array([b"e", missing, b"c"]), ids, folds)
