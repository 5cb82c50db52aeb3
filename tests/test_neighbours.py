"""Facts about the nearest images of each image, of stages/neighbours.py."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from stages import neighbours

N_FEATURES = 80


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def random_features(n: int, seed: int = 0) -> np.ndarray:
    """Features as a network has them: not negative, of some directions that vary more than others."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(n, N_FEATURES)) @ random.normal(size=(N_FEATURES, N_FEATURES))
    return np.abs(mixed * np.linspace(2, 0.1, N_FEATURES) + 3).astype(np.float32)


def random_sketches(n: int, n_components: int = 8, seed: int = 0) -> np.ndarray:
    return normalize(np.random.default_rng(seed).normal(size=(n, n_components))).astype(np.float32)


def write(folder: Path, features: np.ndarray, n_files: int = 3, ids: list[str] | None = None) -> str:
    """Write a row of FEATURES for each row, in files of unequal sizes and no order."""
    folder.mkdir()
    rows = pd.DataFrame({"image_id": ids or [digest(i) for i in range(len(features))]})
    rows["path"] = [f"kiwi/{9999 - i}.jpg" for i in range(len(features))]
    rows["label"], rows["film"] = "kiwi", [None if i % 2 else "kiwi/r" for i in range(len(features))]
    for number in range(n_files):
        some = np.flatnonzero(np.arange(len(rows)) ** 2 % n_files == number)
        columns = {name: pa.array(rows[name][some], pa.string()) for name in rows}
        columns["features"] = pa.array(list(features[some]), pa.list_(pa.float32()))
        pq.write_table(pa.table(columns), folder / f"part-{number:05}.parquet")
    return str(folder)


@pytest.fixture(autouse=True)
def own_settings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Spark's settings as they were, after the stage's main has set its own."""
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
    yield
    for name, value in before.items():
        spark.conf.unset(name) if value is None else spark.conf.set(name, value)


def run(features: str, output: Path, n_neighbours: int = 6) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run the stage and return its two tables, sketches as arrays."""
    neighbours.main([features, str(output), "--n_neighbours", str(n_neighbours)])
    sketches, found = (pq.read_table(output / name).to_pandas() for name in ("sketches", "neighbours"))
    sketches["sketch"] = [np.frombuffer(each, "<f4") for each in sketches["sketch"]]
    return sketches.sort_values(["image_id", "path"], ignore_index=True), found.set_index("image_id").sort_index()


def oracle(sketches: np.ndarray, n_neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and distances, by scikit-learn, in float64."""
    search = NearestNeighbors(n_neighbors=n_neighbours, algorithm="brute").fit(sketches.astype(np.float64))
    distances, numbers = search.kneighbors()
    return numbers, distances


# Components and sketches


def test_a_sketch_is_that_of_scikit_learns_pca_scaled_to_unit_length_up_to_sign() -> None:
    features = random_features(300)
    expected = normalize(PCA(64, svd_solver="full").fit_transform(features.astype(np.float64)))
    sketch = neighbours.sketch(features, *neighbours.fit(features.astype(np.float64)))
    signs = np.sign((sketch * expected).sum(axis=0))
    assert sketch.shape == (300, 64)
    np.testing.assert_allclose(sketch * signs, expected, atol=1e-6)  # float32


def test_components_are_orthonormal_and_no_more_than_features() -> None:
    _, components = neighbours.fit(random_features(50)[:, :5].astype(np.float64))
    np.testing.assert_allclose(components @ components.T, np.eye(5), atol=1e-12)


def test_images_equal_to_the_mean_are_one_point_of_unit_length() -> None:
    features = np.array([[1, 5, 2], [3, 1, 2], [2, 3, 2], [2, 3, 2]], np.float32)  # the mean twice
    sketch = neighbours.sketch(features, *neighbours.fit(features.astype(np.float64)))
    np.testing.assert_allclose(np.linalg.norm(sketch, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(sketch[2], sketch[3])


def test_images_that_are_all_equal_are_one_point() -> None:
    features = np.tile(random_features(1), (7, 1))
    sketch = neighbours.sketch(features, *neighbours.fit(features.astype(np.float64)))
    assert (sketch == sketch[0]).all()
    np.testing.assert_allclose(np.linalg.norm(sketch, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_a_feature_that_is_no_finite_number_is_refused(bad: float) -> None:
    features = random_features(7)
    features[2, 1] = features[5, 0] = bad
    with pytest.raises(ValueError, match="2 of 7 feature vectors are not finite"):
        neighbours.to_matrix(pa.chunked_array([pa.array(list(features), pa.list_(pa.float32()))]))


# The search


@pytest.mark.parametrize("columns", [2000, 130, 7, 3], ids=lambda n: f"{n} columns at once")
def test_neighbours_are_those_of_scikit_learn(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "COLUMNS", columns)
    sketches = random_sketches(700)
    numbers, distances = oracle(sketches, 6)
    for start, stop in ((0, 700), (128, 256), (699, 700)):
        found, far = neighbours.nearest(sketches, np.arange(start, stop), 6)
        np.testing.assert_array_equal(found, numbers[start:stop])
        np.testing.assert_allclose(far, distances[start:stop], rtol=1e-6)  # float32


def test_near_copies_are_told_apart_by_more_digits_than_float32_has() -> None:
    # Their scalar products are all 1 in float32, their distances are not equal.
    angle = np.array([0, 1, 3, 7, 15]) * 1e-5
    sketches = np.column_stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
    found, _ = neighbours.nearest(sketches, np.arange(5), 3)
    np.testing.assert_array_equal(found, oracle(sketches, 3)[0])


def test_of_equally_near_images_the_first_is_first() -> None:
    sketches = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)
    found, distances = neighbours.nearest(sketches, np.arange(12), 4)
    np.testing.assert_array_equal(found[[0, 1, 2, 3]], [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 3, 4], [4, 5, 0, 1]])
    np.testing.assert_allclose(distances[0], [0, 0, 2**0.5, 2**0.5])


def test_an_exact_copy_has_the_distance_0_and_no_image_is_its_own_neighbour() -> None:
    sketches = random_sketches(40)
    sketches[31] = sketches[5]
    found, distances = neighbours.nearest(sketches, np.arange(40), 6)
    assert (found[5, 0], found[31, 0], distances[5, 0], distances[31, 0]) == (31, 5, 0, 0)
    assert not (found == np.arange(40)[:, None]).any()


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_of_few_images_all_others_are_neighbours(n: int) -> None:
    sketches = random_sketches(n)
    found, distances = neighbours.nearest(sketches, np.arange(n), 6)
    assert found.shape == distances.shape == (n, min(6, n - 1))
    assert [set(row) | {i} for i, row in enumerate(found.tolist())] == [set(range(n))] * n


# More images than are all compared with all


def films(n_things: int, n_frames: int) -> np.ndarray:
    random = np.random.default_rng(0)
    things = np.repeat(random.normal(size=(n_things, 16)), n_frames, axis=0)
    frames = normalize(things + 0.3 * random.normal(size=things.shape))
    return frames[random.permutation(len(frames))].astype(np.float32)


def test_each_image_is_asked_once_and_is_among_those_that_it_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", 32)
    sketches = films(100, 10)
    cells = neighbours.divide(sketches)
    found = [each for block in range(len(cells.starts) - 1) for each in neighbours.queries(block, len(sketches), cells)]
    assert sorted(np.concatenate([asked for asked, _ in found])) == list(range(1000))
    assert all(np.isin(asked, others).all() and len(asked) <= 32 for asked, others in found)


def test_an_image_is_compared_with_all_of_its_nearest_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ROWS", 32)
    sketches = films(100, 10)
    cells = neighbours.divide(sketches)
    similarity = sketches.astype(np.float64) @ sketches[: 1000 // 32].T.astype(np.float64)
    centres = np.argsort(-similarity, axis=1)[:, : neighbours.N_CENTRES]
    for block in range(len(cells.starts) - 1):
        for asked, others in neighbours.queries(block, len(sketches), cells):
            assert set(others) == {*np.flatnonzero(np.isin(centres[:, 0], centres[asked]))}


def test_of_many_images_nearly_all_of_the_nearest_are_found(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "N_COMPARED", 500)
    monkeypatch.setattr(neighbours, "ROWS", 32)
    features = np.pad(films(100, 10), ((0, 0), (0, 4)))
    sketches, found = run(write(tmp_path / "features", features), tmp_path / "neighbours")
    points, ids = np.stack(sketches["sketch"]), sketches["image_id"].to_numpy()
    numbers, distances = oracle(points, 6)
    assert found.index.tolist() == ids.tolist()
    hits = [len({*row} & {*ids[expected]}) for row, expected in zip(found["neighbours"], numbers, strict=True)]
    assert 0.98 < np.mean(hits) / 6 < 1, "and not all, or all are compared"
    assert (np.stack(found["distances"]) >= distances - 1e-6).all()


def test_lonely_images_have_as_many_neighbours_as_others(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "N_COMPARED", 20)
    monkeypatch.setattr(neighbours, "ROWS", 2)  # cells of two
    _, found = run(write(tmp_path / "features", random_features(60)), tmp_path / "neighbours")
    assert {len(row) for row in found["neighbours"]} == {6}


# The whole stage


def test_main_finds_what_scikit_learn_finds_between_its_sketches(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "ROWS", 64)  # several blocks, the last one short
    monkeypatch.setattr(neighbours, "COLUMNS", 100)
    sketches, found = run(write(tmp_path / "features", random_features(210)), tmp_path / "neighbours")
    numbers, distances = oracle(np.stack(sketches["sketch"]), 6)
    ids = sketches["image_id"].to_numpy()
    assert found.index.tolist() == ids.tolist() == sorted(digest(i) for i in range(210))
    np.testing.assert_array_equal(np.stack(found["neighbours"]), ids[numbers])
    np.testing.assert_allclose(np.stack(found["distances"]), distances, rtol=1e-6)  # float32


def test_sketches_keep_what_is_known_of_each_file(spark: SparkSession, tmp_path: Path) -> None:
    folder = write(tmp_path / "features", random_features(9))
    sketches, _ = run(folder, tmp_path / "neighbours")
    known = pq.read_table(folder).to_pandas().drop(columns="features").sort_values("image_id", ignore_index=True)
    pd.testing.assert_frame_equal(sketches.drop(columns="sketch"), known)


def test_the_components_are_fitted_on_the_images_of_least_sha256(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "N_SAMPLE", 100)
    features = random_features(160)
    order = np.argsort([digest(i) for i in range(160)])
    sketches, _ = run(write(tmp_path / "features", features), tmp_path / "neighbours")
    sample = features[order[:100]].astype(np.float64)
    np.testing.assert_array_equal(np.stack(sketches["sketch"]), neighbours.sketch(features[order], *neighbours.fit(sample)))


def test_the_sample_has_each_image_once_by_image_id(spark: SparkSession, tmp_path: Path) -> None:
    features, numbers = random_features(9), [*range(9), 2, 2, 5]
    folder = write(tmp_path / "features", features[numbers], ids=[digest(i) for i in numbers])
    sample = neighbours.read_sample(spark.read.format("binaryFile").load(f"{folder}/*.parquet"), "g")
    np.testing.assert_array_equal(sample, features[sorted(range(9), key=digest)])


def test_files_of_the_same_bytes_are_one_image_of_several_rows_by_path(spark: SparkSession, tmp_path: Path) -> None:
    features = random_features(5)[[0, 1, 2, 3, 4, 2, 2]]
    ids = [digest(i) for i in (0, 1, 2, 3, 4, 2, 2)]
    sketches, found = run(write(tmp_path / "features", features, ids=ids), tmp_path / "neighbours")
    assert (len(sketches), len(found)) == (7, 5)
    assert {len({*row}) for row in found["neighbours"]} == {4}
    (file,) = (tmp_path / "neighbours" / "sketches").glob("*.parquet")
    written = pq.read_table(file, columns=["image_id", "path"]).to_pandas()
    pd.testing.assert_frame_equal(written, written.sort_values(["image_id", "path"], ignore_index=True))


def test_many_copies_of_few_images_leave_a_sample(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "N_SAMPLE", 8)  # of 120 rows; a share of them by SHA-256 might be none
    features, ids = random_features(3)[np.arange(120) % 3], [digest(i % 3) for i in range(120)]
    _, found = run(write(tmp_path / "features", features, ids=ids), tmp_path / "neighbours")
    assert len(found) == 3


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_images_are_enough(n: int, spark: SparkSession, tmp_path: Path) -> None:
    _, found = run(write(tmp_path / "features", random_features(n)), tmp_path / "neighbours")
    assert [len(row) for row in found["neighbours"]] == [n - 1] * n


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The contents of the files, by the parts of their names that are not random."""
    return {f"{file.parent.name}/{file.name[:10]}": file.read_bytes() for file in folder.rglob("*.parquet")}


def test_cores_and_the_order_of_files_change_no_byte(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "ROWS", 32)
    monkeypatch.setattr(neighbours, "IMAGES_PER_FILE", 50)
    features = random_features(150)
    folders = [write(tmp_path / f"features-{n}", features, n) for n in (1, 4)]
    written = []
    for name, folder, n_cores, max_tasks in (("a", folders[0], 1, 1), ("b", folders[0], 7, 512), ("c", folders[1], 2, 3)):
        monkeypatch.setattr(neighbours, "MAX_TASKS", max_tasks)
        spark.conf.set("spark.sql.leafNodeDefaultParallelism", n_cores)
        run(folder, tmp_path / name)
        written.append(bytes_of(tmp_path / name))
    assert len(written[0]) == 6
    assert written[1:] == written[:1] * 2
