"""Facts about number, mean and scatter matrix of each fold, of stages/covariance.py."""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession

from stages import covariance
from stages.covariance import Moments

N_FEATURES = 5
# Both sides are float64 sums of some hundred numbers near 1, in another order: they differ by some 1e-15 of the largest.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)

Rows = tuple[np.ndarray, np.ndarray]  # fold, int32 (n,), and features, float32 (n, n_features)
Row = tuple[int, bytes, bytes]  # n, mean and scatter


def random_features(n: int, seed: int = 0) -> np.ndarray:
    """Features as a network has them: not negative, far from mean zero, correlated."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(n, N_FEATURES)) @ random.normal(size=(N_FEATURES, N_FEATURES))
    return np.abs(mixed + 3).astype(np.float32)


def random_rows(n: int, seed: int = 0, folds: tuple[int, ...] = (0, 1)) -> Rows:
    fold = np.random.default_rng(seed).choice(folds, n).astype(np.int32)
    return fold, random_features(n, seed)


def oracle(features: np.ndarray) -> Moments:
    wide = features.astype(np.float64)
    scatter = np.cov(wide, rowvar=False, ddof=0) * len(wide)
    return Moments(len(wide), wide.mean(axis=0), scatter[np.tril_indices(N_FEATURES)])


def assert_same(actual: Moments, expected: Moments) -> None:
    assert actual.n == expected.n
    assert_close(actual.mean, expected.mean)
    assert_close(actual.scatter, expected.scatter)


def write(folder: Path, files: list[Rows]) -> tuple[str, str]:
    """Write features/part-00000.parquet and so on, with another column as the stage featurize has, and the split of them."""
    (folder / "features").mkdir()
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


def run(inputs: Inputs, max_blocks: int) -> dict[int, Row]:
    """All rows of MOMENTS, by fold."""
    rows = covariance.merge_blocks(covariance.sum_blocks(*inputs, max_blocks)).collect()
    assert len({row["fold"] for row in rows}) == len(rows)
    return {row["fold"]: (row["n"], bytes(row["mean"]), bytes(row["scatter"])) for row in rows}


def parse(row: Row) -> Moments:
    n, mean, scatter = row
    return Moments(n, np.frombuffer(mean, "<f8"), np.frombuffer(scatter, "<f8"))


def assert_moments(actual: dict[int, Row], files: list[Rows]) -> None:
    """Each fold's moments are what numpy finds for all its rows at once."""
    fold, features = (np.concatenate(parts) for parts in zip(*files, strict=True))
    assert actual.keys() == set(fold.tolist())
    for each, row in actual.items():
        assert_same(parse(row), oracle(features[fold == each]))


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
        "spark.sql.leafNodeDefaultParallelism",
    )
    before = {name: spark.conf.get(name, None) for name in names}
    spark.conf.set("spark.sql.files.maxPartitionBytes", 1)
    yield
    for name, value in before.items():
        spark.conf.unset(name) if value is None else spark.conf.set(name, value)


@pytest.mark.parametrize("n", [2, 3, 500])
def test_moments_are_those_of_numpy(n: int) -> None:
    assert_same(covariance.moments_of(random_features(n)), oracle(random_features(n)))


def test_one_row_has_no_scatter() -> None:
    features = random_features(1)
    n, mean, scatter = covariance.moments_of(features)
    assert n == 1
    np.testing.assert_array_equal(mean, features[0])
    np.testing.assert_array_equal(scatter, np.zeros(N_FEATURES * (N_FEATURES + 1) // 2))


def test_moments_are_of_double_precision() -> None:
    _, mean, scatter = covariance.moments_of(random_features(4))
    assert (mean.dtype, scatter.dtype) == (np.float64, np.float64)


def test_the_features_are_left_as_they_were() -> None:
    features = random_features(20)
    covariance.moments_of(features)
    np.testing.assert_array_equal(features, random_features(20))


def test_a_large_common_offset_does_not_swallow_the_scatter() -> None:
    # 4096 + n / 1024 are exact in float32; squares summed without their mean would lose 7 of 16 digits.
    steps = np.arange(100, dtype=np.float64)[:, None] / 1024
    _, _, scatter = covariance.moments_of((4096 + steps).astype(np.float32))
    # 1e-12: only the last bits of the sum of 100 squares may differ.
    np.testing.assert_allclose(scatter, [np.sum((steps - steps.mean()) ** 2)], rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_feature_that_is_no_finite_number_is_refused(bad: float) -> None:
    features = random_features(7)
    features[2, 1] = features[2, 3] = features[5, 0] = bad
    with pytest.raises(ValueError, match="2 of 7 feature vectors are not finite"):
        covariance.moments_of(features)


@pytest.mark.parametrize("cut", [1, 50, 137, 299])
def test_the_moments_of_two_parts_merge_to_those_of_the_whole(cut: int) -> None:
    features = random_features(300)
    a, b = covariance.moments_of(features[:cut]), covariance.moments_of(features[cut:])
    assert_same(covariance.merge(a, b), oracle(features))


def test_any_number_of_parts_merges_to_the_whole() -> None:
    features = random_features(300)
    parts = np.split(features, [1, 2, 30, 31, 190])
    assert_same(functools.reduce(covariance.merge, map(covariance.moments_of, parts)), oracle(features))


def test_parts_with_far_means_merge_to_the_whole() -> None:
    features = np.concatenate([random_features(40), random_features(60) + 1000])
    merged = covariance.merge(covariance.moments_of(features[:40]), covariance.moments_of(features[40:]))
    # Relative alone: with means 1,000 apart the scatter is near 1e7, and so is its rounding.
    np.testing.assert_allclose(merged.scatter, oracle(features).scatter, rtol=1e-12)


def test_merging_changes_neither_part() -> None:
    a, b = covariance.moments_of(random_features(5)), covariance.moments_of(random_features(6, seed=1))
    covariance.merge(a, b)
    np.testing.assert_array_equal(a.scatter, covariance.moments_of(random_features(5)).scatter)
    np.testing.assert_array_equal(b.scatter, covariance.moments_of(random_features(6, seed=1)).scatter)


def test_a_feature_that_is_constant_has_a_scatter_of_exactly_zero() -> None:
    features = random_features(100)
    features[:, 2] = 0.1  # no binary number, but 24 bits of it: its sums are exact in float64
    merged = covariance.merge(covariance.moments_of(features[:33]), covariance.moments_of(features[33:]))
    assert merged.scatter[5] == 0  # row 2, column 2


def test_a_sliced_column_becomes_its_own_rows_only() -> None:
    rows = pa.chunked_array([pa.array(list(random_features(3)), pa.list_(pa.float32()))] * 2).slice(2, 3)
    np.testing.assert_array_equal(covariance.to_matrix(rows), random_features(3)[[2, 0, 1]])


@pytest.mark.parametrize(
    ("sizes", "max_blocks"),
    [([40], 4), ([9, 30, 1], 4), ([11, 7, 13, 5, 3, 8, 2], 3), ([11, 7, 13, 5], 1)],
    ids=["one file", "fewer files than blocks", "more files than blocks", "one block"],
)
def test_each_fold_has_the_moments_that_numpy_finds(
    sizes: list[int], max_blocks: int, spark: SparkSession, tmp_path: Path
) -> None:
    files = [random_rows(n, seed) for seed, n in enumerate(sizes)]
    assert_moments(run(read(spark, *write(tmp_path, files)), max_blocks), files)


def test_a_fold_may_be_missing_in_some_files(spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(9, 0, (0,)), random_rows(8, 1, (1,)), random_rows(7, 2), random_rows(6, 3, (1,))]
    assert_moments(run(read(spark, *write(tmp_path, files)), max_blocks=3), files)


def test_a_fold_without_any_image_has_no_row(spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(5, seed, (1,)) for seed in range(3)]
    assert run(read(spark, *write(tmp_path, files)), max_blocks=2).keys() == {1}


def test_a_file_without_rows_adds_nothing(spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(0), random_rows(9, 1), random_rows(8, 2)]
    assert_moments(run(read(spark, *write(tmp_path, files)), max_blocks=3), files)


def test_the_number_of_cores_changes_no_byte(spark: SparkSession, tmp_path: Path) -> None:
    places = write(tmp_path, [random_rows(12 + seed % 3, seed) for seed in range(7)])
    found = []
    for n_cores in (1, 2, 7):  # as Spark takes them into account when it divides files among partitions
        spark.conf.set("spark.sql.leafNodeDefaultParallelism", n_cores)
        found.append(run(read(spark, *places), max_blocks=3))
    assert found[1:] == found[:1] * 2


def test_a_block_has_three_files_or_more(spark: SparkSession, tmp_path: Path) -> None:
    inputs = read(spark, *write(tmp_path, [random_rows(6, seed) for seed in range(6)]))
    assert covariance.sum_blocks(*inputs, 16).select("block").distinct().count() == 2


def test_there_are_no_more_blocks_than_asked_for(spark: SparkSession, tmp_path: Path) -> None:
    inputs = read(spark, *write(tmp_path, [random_rows(6, seed) for seed in range(7)]))
    blocks = covariance.sum_blocks(*inputs, 3).select("block").distinct().collect()
    assert sorted(row["block"] for row in blocks) == [0, 1, 2]


def test_main_writes_one_row_of_moments_for_each_fold(spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(10, seed) for seed in range(3)]
    output = str(tmp_path / "covariance")
    covariance.main([*write(tmp_path, files), output, "--max_blocks", "2"])
    rows = pq.read_table(output).to_pylist()
    assert [list(row) for row in rows] == [["fold", "n", "mean", "scatter"]] * 2
    assert_moments({row["fold"]: (row["n"], row["mean"], row["scatter"]) for row in rows}, files)


def test_files_of_the_same_bytes_are_rows_of_one_fold(spark: SparkSession, tmp_path: Path) -> None:
    files = [random_rows(9, 0), random_rows(8, 1)]
    features, split = write(tmp_path, files)
    twice = pq.read_table(f"{split}/images")
    pq.write_table(pa.concat_tables([twice, twice]), f"{split}/images/part-00000.parquet")
    assert_moments(run(read(spark, features, split), max_blocks=2), files)


def test_images_are_found_among_those_that_have_a_fold() -> None:
    ids, folds = np.array([b"a", b"c", b"e"]), np.array([0, 1, 0], np.int8)
    np.testing.assert_array_equal(covariance.look_up(np.array([b"e", b"a", b"c", b"e"]), ids, folds), [0, 0, 1, 0])


@pytest.mark.parametrize("missing", [b"0", b"b", b"z"], ids=str)
def test_an_image_without_a_fold_is_refused(missing: bytes) -> None:
    ids, folds = np.array([b"a", b"c", b"e"]), np.array([0, 1, 0], np.int8)
    with pytest.raises(ValueError, match=f"^1 of 3 images have no fold; the first is {missing.decode()}\\."):
        covariance.look_up(np.array([b"e", missing, b"c"]), ids, folds)
