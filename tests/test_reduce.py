"""Facts about the principal component analysis of stages/reduce.py; scikit-learn is the oracle."""

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.decomposition
from pyspark.sql import SparkSession
from sklearn.preprocessing import StandardScaler

from stages import reduce
from tests.helpers import STEP, moments_of, on_grid, sums_of

N_IMAGES, N_FEATURES = 90, 6
# The oracle takes the singular values of the data, the stage the eigenvalues of its covariance: of 16 digits the second
# way keeps half for the smallest values in the worst case, and 11 or more with values as near to each other as here.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
# An embedding is rounded to float32, which has 7 digits; the largest here are near 50.
assert_close_float32 = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def random_features(n: int = N_IMAGES, seed: int = 0) -> np.ndarray:
    """Features of clearly different units, so that scaling matters, and of no mean near zero."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(n, N_FEATURES)) @ random.normal(size=(N_FEATURES, N_FEATURES))
    return on_grid(mixed * [1, 2, 4, 0.5, 8, 1] + [5, 0, -3, 1, 20, 0])


def fit(features: np.ndarray, scale: str = "none") -> reduce.PCA:
    return reduce.fit(*moments_of(features), scale)


def fit_oracle(features: np.ndarray, scale: str) -> tuple[sklearn.decomposition.PCA, np.ndarray]:
    """The oracle's PCA, and the rows it was fitted to."""
    wide = features.astype(np.float64)
    if scale == "standard":
        # StandardScaler divides by the deviation of ddof 0, the stage by that of ddof 1.
        wide = StandardScaler().fit_transform(wide) * np.sqrt((len(wide) - 1) / len(wide))
    return sklearn.decomposition.PCA(svd_solver="full").fit(wide), wide


def largest_positive(rows: np.ndarray) -> np.ndarray:
    """The same rows, with the sign that makes the weight of largest size positive."""
    return np.array([row if max(row, key=abs) > 0 else -row for row in rows])


def embed(features: np.ndarray, pca: reduce.PCA, k: int) -> np.ndarray:
    return reduce.project(features, pca.mean, pca.scale, pca.components[:k])


def table_of(features: np.ndarray, start: int = 0) -> pa.Table:
    ids = [f"{start + i:064x}" for i in range(len(features))]
    columns = {
        "image_id": pa.array(ids, pa.string()),
        "path": pa.array([f"apple/{each[-3:]}.jpg" for each in ids], pa.string()),
        "label": pa.array(["apple"] * len(ids), pa.string()),
        "group": pa.array(ids, pa.string()),
        "fold": pa.array([0] * len(ids), pa.int32()),
        "features": pa.array(list(features), pa.list_(pa.float32())),
    }
    return pa.table(columns)


def write_features(folder: Path, features: np.ndarray, n_files: int) -> str:
    folder.mkdir()
    start = 0
    for number, part in enumerate(np.array_split(features, n_files)):
        pq.write_table(table_of(part, start), folder / f"part-{number:05}.parquet")
        start += len(part)
    return str(folder)


def rows_of(folds: list[np.ndarray]) -> list[dict[str, Any]]:
    """Rows of SUMS."""
    return [sums_of(features, fold) for fold, features in enumerate(folds)]


def write_sums(path: Path, folds: list[np.ndarray]) -> str:
    path.mkdir()
    pq.write_table(pa.Table.from_pylist(rows_of(folds)), path / "part-00000.parquet")
    return str(path)


@pytest.fixture
def own_settings(spark: SparkSession) -> Iterator[None]:
    """Spark's settings as they were, after a stage's main has set its own."""
    names = (
        "spark.app.name",
        "spark.sql.execution.arrow.maxRecordsPerBatch",
        "spark.sql.execution.arrow.pyspark.enabled",
        "spark.sql.files.maxPartitionBytes",
        "spark.sql.adaptive.enabled",
    )
    before = {name: spark.conf.get(name) for name in names}
    yield
    for name, value in before.items():
        assert value is not None
        spark.conf.set(name, value)


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_variances_are_those_of_scikit_learn(scale: str) -> None:
    oracle, _ = fit_oracle(random_features(), scale)
    assert_close(fit(random_features(), scale).explained_variance, oracle.explained_variance_)


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_ratios_are_those_of_scikit_learn(scale: str) -> None:
    oracle, _ = fit_oracle(random_features(), scale)
    spectrum = reduce.spectrum_of(fit(random_features(), scale).explained_variance)
    assert_close(spectrum["explained_variance_ratio"], oracle.explained_variance_ratio_)


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_components_are_those_of_scikit_learn_with_the_largest_weight_positive(scale: str) -> None:
    oracle, _ = fit_oracle(random_features(), scale)
    assert_close(fit(random_features(), scale).components, largest_positive(oracle.components_))


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_embeddings_are_those_of_scikit_learn_up_to_sign(scale: str) -> None:
    features = random_features()
    oracle, rows = fit_oracle(features, scale)
    pca = fit(features, scale)
    signs = np.sign(np.sum(pca.components * oracle.components_, axis=1))
    assert_close_float32(embed(features, pca, 4), (oracle.transform(rows) * signs)[:, :4])


def test_more_features_than_images_agree_with_scikit_learn() -> None:
    features = random_features(4)
    oracle, _ = fit_oracle(features, "none")
    pca = fit(features)
    assert pca.rank == 3
    assert_close(pca.explained_variance[:3], oracle.explained_variance_[:3])
    assert_close(pca.components[:3], largest_positive(oracle.components_[:3]))


def test_components_are_orthonormal() -> None:
    components = fit(random_features()).components
    # 1e-14: LAPACK's own promise is a small multiple of 2.2e-16.
    np.testing.assert_allclose(components @ components.T, np.eye(N_FEATURES), atol=1e-14)


def test_the_largest_weight_of_each_component_is_positive() -> None:
    components = reduce.fix_signs(np.array([[0.6, -0.8], [0.8, 0.6], [-1.0, 0.0], [0.5, -0.25]]))
    np.testing.assert_array_equal(components, [[-0.6, 0.8], [0.8, 0.6], [1.0, 0.0], [0.5, -0.25]])


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_the_variance_of_an_embedding_is_the_explained_variance(scale: str) -> None:
    pca = fit(random_features(), scale)
    variance = embed(random_features(), pca, N_FEATURES).astype(np.float64).var(axis=0, ddof=1)
    # 1e-6: embeddings are float32, of 7 digits.
    np.testing.assert_allclose(variance, pca.explained_variance, rtol=1e-6)


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_the_mean_of_embeddings_is_zero(scale: str) -> None:
    mean = embed(random_features(), fit(random_features(), scale), N_FEATURES).mean(axis=0, dtype=np.float64)
    # 1e-6: float32 rounds numbers near 10 by up to 5e-7, up and down alike.
    np.testing.assert_allclose(mean, 0, atol=1e-6)


def test_dimensions_of_an_embedding_are_not_correlated() -> None:
    correlation = np.corrcoef(embed(random_features(), fit(random_features()), N_FEATURES), rowvar=False)
    # 1e-5: float32 has 7 digits, and the smallest dimension is a hundred times smaller than the largest.
    np.testing.assert_allclose(correlation, np.eye(N_FEATURES), atol=1e-5)


def test_ratios_sum_to_one_and_fall() -> None:
    ratio = reduce.spectrum_of(fit(random_features()).explained_variance)["explained_variance_ratio"]
    assert ratio.sum() == pytest.approx(1, abs=1e-12)  # a sum of six float64
    assert ratio.is_monotonic_decreasing


def test_the_cumulative_ratio_ends_at_one_and_never_above() -> None:
    # Thirds and the like: their cumulative sum rounds to 1.0000000000000002 for some of these numbers.
    spectra = [reduce.spectrum_of(np.full(n, 0.1)) for n in range(1, 60)]
    last = [spectrum["cumulative_explained_variance_ratio"].iloc[-1] for spectrum in spectra]
    assert max(last) <= 1
    np.testing.assert_allclose(last, 1, atol=1e-14)  # a sum of at most 60 float64


def test_components_are_counted_from_one() -> None:
    assert reduce.spectrum_of(np.array([4.0, 1.0]))["component"].tolist() == [1, 2]


def test_a_rectangle_of_sides_two_and_one_has_ratios_of_four_fifths_and_one_fifth() -> None:
    pca = fit(np.array([[0, 0], [2, 0], [0, 1], [2, 1]], np.float32))
    # Sums of squares of four numbers by hand: variances 4/3 and 1/3. 1e-15: within a few units of the last bit.
    np.testing.assert_allclose(pca.explained_variance, [4 / 3, 1 / 3], rtol=1e-15)
    np.testing.assert_allclose(
        reduce.spectrum_of(pca.explained_variance)["explained_variance_ratio"], [0.8, 0.2], rtol=1e-15
    )
    np.testing.assert_array_equal(pca.components, np.eye(2))


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_copies_and_sums_of_features_add_nothing_to_the_rank(scale: str) -> None:
    features = random_features()[:, :3]
    features = np.column_stack([features, features[:, 0], 2 * features[:, 1]])  # exact in float32
    pca = fit(features, scale)
    assert pca.rank == 3
    np.testing.assert_allclose(pca.explained_variance[3:], 0, atol=1e-12)  # rounding of variances near 100


def test_a_direction_of_little_variance_counts() -> None:
    features = random_features()[:, :2] * np.array([1, 1e-4], np.float32)
    assert fit(features).rank == 2


def test_no_variance_is_negative() -> None:
    features = np.repeat(random_features()[:, :1], 40, axis=1)
    assert fit(features).explained_variance.min() >= 0


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(SystemExit, match="1 image; a covariance needs at least 2"):
        reduce.fit(1, np.zeros(3), np.zeros((3, 3)), "none")


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_two_images_vary_in_one_direction(scale: str) -> None:
    assert fit(random_features(2), scale).rank == 1


def test_a_constant_feature_is_divided_by_one() -> None:
    features = random_features()
    features[:, 2] = 0.1  # no binary number, but its sums are exact in float64: its deviation is 0 and not some 1e-17
    pca = fit(features, "standard")
    assert pca.scale[2] == 1
    np.testing.assert_allclose(pca.components[:-1, 2], 0, atol=1e-12)  # eigenvectors of variances near 1
    assert pca.rank == N_FEATURES - 1


def test_without_scaling_features_are_divided_by_one() -> None:
    np.testing.assert_array_equal(fit(random_features(), "none").scale, np.ones(N_FEATURES))


def test_standard_scaling_makes_the_unit_of_a_feature_irrelevant() -> None:
    features = random_features()
    pca, other = fit(features, "standard"), fit(features * np.array([1, 8, 1, 0.25, 1, 1024], np.float32), "standard")
    assert_close(other.explained_variance, pca.explained_variance)
    assert_close(other.components, pca.components)


def test_a_count_of_components_is_kept_as_it_is() -> None:
    assert reduce.choose_k(3, np.array([0.5, 0.8, 0.9, 1.0]), rank=4) == 3


def test_as_many_components_as_there_are_directions_can_be_kept() -> None:
    assert reduce.choose_k(4, np.array([0.5, 0.8, 0.9, 1.0]), rank=4) == 4


def test_more_components_than_directions_are_refused_with_both_numbers() -> None:
    with pytest.raises(SystemExit, match=r"k=2,048 but .* vary in 1,023 directions"):
        reduce.choose_k(2048, np.linspace(0, 1, 1280), rank=1023)


@pytest.mark.parametrize(
    ("share", "k"),
    [(0.4, 1), (0.5, 1), (0.6, 2), (0.95, 3), (0.951, 4), (0.999, 4)],
    ids=["below the first", "the first exactly", "between", "0.95 exactly", "little more than 0.95", "nearly all"],
)
def test_a_share_keeps_the_fewest_components_that_reach_it(share: float, k: int) -> None:
    assert reduce.choose_k(share, np.array([0.5, 0.8, 0.95, 1.0]), rank=4) == k


@pytest.mark.parametrize(
    ("variances", "share", "k"),
    [([7, 2, 1], 0.9, 2), ([14, 4, 1, 1], 0.9, 2), ([6, 3, 1], 0.9, 2)],
)
def test_a_share_that_rounding_alone_misses_is_reached(variances: list[float], share: float, k: int) -> None:
    cumulative = reduce.spectrum_of(np.array(variances, np.float64))["cumulative_explained_variance_ratio"].to_numpy()
    assert reduce.choose_k(share, cumulative, rank=len(variances)) == k


def test_a_share_keeps_no_direction_without_variance() -> None:
    # The last bits of a cumulative sum may be missing: the share must not reach for components that are not there.
    assert reduce.choose_k(0.9999999, np.array([0.7, 0.99999, 0.99999, 0.99999]), rank=2) == 2


@pytest.mark.parametrize("text", ["1", "64", "+3", "2048", "100000"])
def test_a_whole_number_is_a_count(text: str) -> None:
    k = reduce.count_or_share(text)
    assert (k, type(k)) == (int(text), int)


@pytest.mark.parametrize("text", ["0.95", ".5", "1e-3", "0.999999"])
def test_a_number_between_0_and_1_is_a_share(text: str) -> None:
    k = reduce.count_or_share(text)
    assert (k, type(k)) == (float(text), float)


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "abc", "1.5", "1.0", "0.0", "-0.5", "nan", "inf", "", "²", "none", "100001", "1e5", "9" * 5000],
    ids=lambda text: text[:9],
)
def test_all_else_is_neither_a_count_nor_a_share(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="neither a number of components"):
        reduce.count_or_share(text)


def test_a_wrong_k_ends_the_stage_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        reduce.main(["features", "covariance", "output", "--k", "1.5", "--scale", "none"])
    assert error.value.code == 2
    assert "'1.5' is neither a number of components" in capsys.readouterr().err


def moments_of_rows(rows: list[dict[str, Any]]) -> tuple[int, np.ndarray, np.ndarray]:
    return reduce.moments_of(*reduce.total_sums(rows))


@pytest.mark.parametrize("cuts", [[], [30], [1, 60]], ids=["one fold", "two folds", "three folds"])
def test_the_moments_of_folds_are_those_of_all_rows(cuts: list[int]) -> None:
    features = random_features() + np.float32(100) * (np.arange(N_IMAGES) < 30)[:, None]  # folds with different means
    n, mean, scatter = moments_of_rows(rows_of(np.split(features, cuts)))
    _, expected_mean, expected_scatter = moments_of(features)
    assert n == N_IMAGES
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-13)  # numpy rounds its float64 sums
    np.testing.assert_allclose(scatter, expected_scatter, rtol=1e-10)  # the same, of numbers that cancel in part


def test_neither_the_order_nor_the_number_of_folds_changes_a_bit() -> None:
    found = [moments_of_rows(rows_of(np.split(random_features(), cuts))) for cuts in ([20, 50], [], [50])]
    found.append(moments_of_rows(rows_of(np.split(random_features(), [20, 50]))[::-1]))
    for each in zip(*found, strict=True):
        for other in each[1:]:
            np.testing.assert_array_equal(other, each[0])


def test_a_constant_feature_has_a_scatter_of_exactly_zero() -> None:
    features = random_features()
    features[:, 2] = on_grid(np.array(0.1))
    _, _, scatter = moments_of_rows(rows_of(np.split(features, [37])))
    assert not scatter[2].any()
    assert not scatter[:, 2].any()


@pytest.mark.parametrize("n", [3, 10**6, 2**33])
def test_a_small_variance_far_from_zero_is_right_to_the_last_bits(n: int) -> None:
    # Of n rows, each 32,767 or, one of three, 32,766 steps; as n grows, the sums of squares lose bits above the 64th.
    low = n // 3
    high = n - low
    total, products = 32_767 * high + 32_766 * low, 32_767**2 * high + 32_766**2 * low
    as_int64 = [np.array(each).astype(np.int64) for each in ([total], [[products]])]
    _, mean, scatter = reduce.moments_of(n, STEP, *as_int64)
    np.testing.assert_allclose(mean, total / n * STEP, rtol=1e-15)
    np.testing.assert_allclose(scatter, high * low / n * STEP**2, rtol=1e-15)


def test_the_scatter_is_symmetric_to_the_bit() -> None:
    _, _, scatter = moments_of_rows(rows_of([random_features()]))
    np.testing.assert_array_equal(scatter, scatter.T)


@pytest.mark.parametrize("n_partitions", [1, 2, 7])
def test_each_row_is_projected_as_numpy_does_whatever_the_number_of_partitions(
    n_partitions: int, spark: SparkSession, tmp_path: Path
) -> None:
    features = random_features()
    folder = write_features(tmp_path / "features", features, n_files=4)
    mean, scale, components = np.arange(6.0), np.arange(1.0, 7.0), np.random.default_rng(1).normal(size=(3, N_FEATURES))
    files = spark.read.format("binaryFile").load(f"{folder}/*.parquet").select("path", "content")
    projection = reduce.project_files(files.repartition(n_partitions), mean, scale, components)
    projected: pd.DataFrame = projection.orderBy("image_id").toPandas()
    expected = ((features - mean) / scale) @ components.T
    assert projected.columns.tolist() == ["image_id", "path", "label", "embedding"]
    assert projected["image_id"].tolist() == [f"{i:064x}" for i in range(N_IMAGES)]
    assert projected["path"].tolist() == [f"apple/{i:03x}.jpg" for i in range(N_IMAGES)]
    assert_close_float32(np.stack(projected["embedding"]), expected)


def test_a_file_without_rows_has_no_embeddings(spark: SparkSession, tmp_path: Path) -> None:
    folder = write_features(tmp_path / "features", random_features(3), n_files=4)  # the last one is empty
    files = spark.read.format("binaryFile").load(f"{folder}/*.parquet").select("path", "content")
    projected = reduce.project_files(files, np.zeros(6), np.ones(6), np.eye(6)[:2])
    assert projected.count() == 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The folders features and covariance of the same images."""
    folder = tmp_path_factory.mktemp("inputs")
    features = random_features()
    return [
        write_features(folder / "features", features, n_files=3),
        write_sums(folder / "covariance", np.split(features, [37])),
    ]


def read(folder: str, sort_by: str) -> pd.DataFrame:
    return pq.read_table(folder).to_pandas().sort_values(sort_by, ignore_index=True)


@pytest.mark.usefixtures("own_settings")
@pytest.mark.parametrize("scale", ["none", "standard"])
def test_main_writes_a_model_that_gives_its_embeddings(
    scale: str, spark: SparkSession, inputs: list[str], tmp_path: Path
) -> None:
    output = str(tmp_path / "reduced")
    reduce.main([*inputs, output, "--k", "2", "--scale", scale])
    scaling, components = read(f"{output}/model/scaling", "feature"), read(f"{output}/model/components", "component")
    scaled = (random_features() - scaling["mean"].to_numpy()) / scaling["scale"].to_numpy()
    embeddings = read(f"{output}/embeddings", "image_id")
    expected = scaled @ np.stack(components["weights"]).T
    assert_close_float32(np.stack(embeddings["embedding"]), expected)


@pytest.mark.usefixtures("own_settings")
def test_main_keeps_the_whole_spectrum_and_of_components_the_share_asked_for(
    spark: SparkSession, inputs: list[str], tmp_path: Path
) -> None:
    output = str(tmp_path / "reduced")
    reduce.main([*inputs, output, "--k", "0.9", "--scale", "none"])
    oracle, _ = fit_oracle(random_features(), "none")
    k = int(np.searchsorted(oracle.explained_variance_ratio_.cumsum(), 0.9)) + 1
    spectrum, components = read(f"{output}/model/spectrum", "component"), read(f"{output}/model/components", "component")
    assert_close(spectrum["explained_variance"], oracle.explained_variance_)
    assert components["component"].tolist() == list(range(1, k + 1))
    pd.testing.assert_frame_equal(components.drop(columns="weights"), spectrum[:k])


@pytest.mark.usefixtures("own_settings")
@pytest.mark.parametrize(("asked", "k", "scale"), [("2", 2, "standard"), ("0.999999", 6, "none")], ids=["count", "share"])
def test_main_states_how_many_components_it_keeps_and_what_it_divides_by(
    asked: str, k: int, scale: str, spark: SparkSession, inputs: list[str], tmp_path: Path
) -> None:
    reduce.main([*inputs, str(tmp_path / "reduced"), "--k", asked, "--scale", scale])
    assert pq.read_table(tmp_path / "reduced/model/settings").to_pylist() == [{"k": k, "scale": scale}]


@pytest.mark.usefixtures("own_settings")
def test_main_writes_nothing_where_k_is_above_the_rank(spark: SparkSession, inputs: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"k=7 but .* vary in 6 directions"):
        reduce.main([*inputs, str(tmp_path / "reduced"), "--k", "7", "--scale", "none"])
    assert not (tmp_path / "reduced").exists()


@pytest.mark.usefixtures("own_settings")
@pytest.mark.parametrize("k", ["1", "0.9"], ids=["count", "share"])
def test_images_that_are_all_equal_end_in_a_message(k: str, spark: SparkSession, tmp_path: Path) -> None:
    features = np.repeat(random_features(1), 5, axis=0)
    folders = [
        write_features(tmp_path / "features", features, n_files=1),
        write_sums(tmp_path / "covariance", [features]),
    ]
    with pytest.raises(SystemExit, match="reduce: "):
        reduce.main([*folders, str(tmp_path / "reduced"), "--k", k, "--scale", "none"])
