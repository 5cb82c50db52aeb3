"""Facts about what the stages share in stages/analysis.py; scikit-learn, and the stage reduce, are the oracles."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from stages import analysis, reduce
from tests.helpers import LABELS, N_FEATURES, make_images, moments_of, on_grid, sums_of


def basis_of(features: np.ndarray, scale: str = "none", max_components: int = N_FEATURES) -> analysis.Basis:
    return analysis.fit_basis(analysis.Moments(*moments_of(features)), scale, max_components)


# Recognisers


def predict(recogniser: str, train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    _, fit, predict = analysis.RECOGNISERS[recogniser]
    return predict(fit(train, labels), test)


@pytest.mark.parametrize("n_test", [1, 2500], ids=["one row", "more rows than a block"])
def test_the_nearest_row_is_that_of_scikit_learn(n_test: int) -> None:
    random = np.random.default_rng(0)
    train, test = (random.normal(size=(n, 8)).astype(np.float32) for n in (60, n_test))
    for k in (1, 3, 8):
        expected = KNeighborsClassifier(1).fit(train[:, :k], range(60)).predict(test[:, :k])
        # 0.999: float32 cannot always tell which of two neighbours is nearer, where both are as near to the seventh digit.
        assert np.mean(analysis.nearest(train[:, :k], test[:, :k]) == expected) >= 0.999


def test_of_equally_near_images_the_first_counts() -> None:
    train = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    assert analysis.nearest(train, np.zeros((1, 2), np.float32)).tolist() == [0]


def test_rows_of_an_equal_number_are_passed_over() -> None:
    random = np.random.default_rng(0)
    train, test, of_train, of_test = (
        random.normal(size=(60, 8)),
        random.normal(size=(2500, 8)),
        *(random.integers(0, 4, n) for n in (60, 2500)),
    )
    found = analysis.nearest(train, test, (of_train, of_test))
    for number in range(4):
        others = np.flatnonzero(of_train != number)
        expected = KNeighborsClassifier(1).fit(train[others], others).predict(test[of_test == number])
        np.testing.assert_array_equal(found[of_test == number], expected)


@pytest.mark.parametrize("recogniser", analysis.RECOGNISERS)
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3], ids=str)
def test_a_recogniser_knows_what_is_separable_in_any_unit(unit: float, recogniser: str) -> None:
    images = make_images(90, spread=0.1)
    features, labels = np.stack(images["features"]) * unit, images["label"].to_numpy()
    np.testing.assert_array_equal(predict(recogniser, features[:60], labels[:60], features[60:]), labels[60:])


@pytest.mark.parametrize("recogniser", analysis.RECOGNISERS)
def test_a_recogniser_of_noise_is_near_chance(recogniser: str) -> None:
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(1200, 4)).astype(np.float32), random.choice(LABELS, 1200)
    score = np.mean(predict(recogniser, features[:600], labels[:600], features[600:]) == labels[600:])
    assert score == pytest.approx(1 / 3, abs=0.08)  # four standard deviations of a share of 600


@pytest.mark.parametrize("recogniser", analysis.RECOGNISERS)
def test_a_recogniser_of_one_label_gives_that_label(recogniser: str) -> None:
    rows = np.eye(3, dtype=np.float32)
    assert predict(recogniser, rows, np.array(["a"] * 3), rows).tolist() == ["a"] * 3


# Principal components


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_components_of_a_fold_are_those_of_scikit_learn_up_to_sign(scale: str) -> None:
    features = np.stack(make_images()["features"]).astype(np.float64)
    oracle = PCA(svd_solver="full").fit(StandardScaler(with_std=scale == "standard").fit_transform(features))
    # 1e-9: the oracle decomposes the data, the stage their covariance, which squares the rounding.
    components = basis_of(features, scale).components
    np.testing.assert_allclose(np.abs(components @ oracle.components_.T), np.eye(N_FEATURES), atol=1e-9)


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_the_basis_of_a_fold_is_that_of_the_stage_reduce_up_to_sign(scale: str) -> None:
    features = np.stack(make_images()["features"])
    features[:, 2] = 0.1  # constant: divided by 1
    basis, pca = basis_of(features, scale), reduce.fit(*moments_of(features), scale)
    np.testing.assert_array_equal([basis.mean, basis.scale], [pca.mean, pca.scale])
    # 1e-12: two of LAPACK's ways to the same eigenvectors, of variances that are well apart.
    np.testing.assert_allclose(np.abs(basis.components @ pca.components[: pca.rank].T), np.eye(N_FEATURES - 1), atol=1e-12)


def test_a_projection_is_that_of_the_stage_reduce() -> None:
    features = np.stack(make_images()["features"])
    basis = basis_of(features, "standard", 3)
    np.testing.assert_array_equal(analysis.project(features, basis), reduce.project(features, *basis))


def test_sums_give_the_moments_that_they_give_in_the_stage_reduce(tmp_path: Path) -> None:
    features = on_grid(np.stack(make_images()["features"]) + 20)
    pq.write_table(pa.Table.from_pylist([sums_of(features, fold=1)]), tmp_path / "part-00000.parquet")
    moments = analysis.to_moments(analysis.read_sums(str(tmp_path))[1])
    for ours, theirs in zip(moments, reduce.moments_of(*reduce.total_sums([sums_of(features)])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_triangle_makes_the_square_that_it_makes_in_the_stage_reduce() -> None:
    square = analysis.to_square(np.arange(6.0), 3)
    np.testing.assert_array_equal(square, [[0, 1, 3], [1, 2, 4], [3, 4, 5]])
    np.testing.assert_array_equal(square, reduce.to_square(np.arange(6.0), 3))


def test_the_first_components_of_a_fold_are_the_first_of_all() -> None:
    features = np.stack(make_images()["features"])
    two, all_ = (basis_of(features, max_components=n).components for n in (2, N_FEATURES))
    np.testing.assert_allclose(np.abs(two @ all_.T), np.eye(2, N_FEATURES), atol=1e-9)


@pytest.mark.parametrize("rank", [2, 120], ids=["fewer directions than components", "many directions"])
def test_a_few_components_of_many_features_are_those_of_scikit_learn_up_to_sign(rank: int) -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(200, rank)) * 0.9 ** np.arange(rank) @ random.normal(size=(rank, 100)) + 3
    n = min(rank, 5)
    oracle = PCA(n, svd_solver="full").fit(features).components_
    np.testing.assert_allclose(np.abs(basis_of(features, max_components=5).components @ oracle.T), np.eye(n), atol=1e-9)


def test_a_fold_of_equal_images_of_many_features_still_has_a_component() -> None:
    assert basis_of(np.ones((200, 100)), max_components=2).components.shape == (1, 100)


def test_a_fold_of_few_images_has_one_component_less_than_images() -> None:
    assert basis_of(np.stack(make_images(4)["features"])).components.shape == (3, N_FEATURES)


def test_a_fold_of_one_image_still_has_a_component() -> None:
    assert basis_of(np.stack(make_images(1)["features"])).components.shape == (1, N_FEATURES)


@pytest.mark.parametrize("scale", ["none", "standard"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_held_out_error_is_the_direct_sum_over_all_rows(k: int, scale: str) -> None:
    train, test = np.split(np.stack(make_images(100)["features"]).astype(np.float64), [45])
    moments = [analysis.Moments(*moments_of(rows)) for rows in (train, test)]
    scaler = StandardScaler(with_std=scale == "standard").fit(train)
    pca = PCA(k, svd_solver="full").fit(scaler.transform(train))
    rows = scaler.transform(test)
    lost = np.sum((rows - pca.inverse_transform(pca.transform(rows))) ** 2)
    basis = analysis.fit_basis(moments[0], scale, k)
    # 1e-10: both are shares of 1 in float64; one is a difference of sums, the other a sum of differences.
    assert analysis.held_out_error(moments[1], basis, k) == pytest.approx(lost / np.sum(rows**2), abs=1e-10)


# Confidence


def hits(n_groups: int, n_images: int, features: float, by_k: dict[int, float], seed: int = 0) -> pd.DataFrame:
    """Whole groups that are recognised or not, with these chances: images of a group are no news of one another."""
    random = np.random.default_rng(seed)
    luck = random.random(n_groups)
    rows = {each: np.repeat(luck < chance, n_images) for each, chance in [*by_k.items(), ("features", features)]}
    return pd.DataFrame(rows).assign(group=np.repeat(np.arange(n_groups), n_images))


def test_the_loss_is_the_difference_of_accuracies_averaged_over_folds() -> None:
    folds = [hits(50, 3, 0.8, {2: 0.5}, seed) for seed in (1, 2)]
    expected = np.mean([fold["features"].mean() - fold[2].mean() for fold in folds])
    assert analysis.losses(folds).loc[2, "loss"] == pytest.approx(expected)


def test_the_interval_is_that_of_the_normal_approximation_over_groups() -> None:
    fold = hits(400, 5, 0.8, {2: 0.6})
    by_group = (fold["features"].astype(int) - fold[2]).groupby(fold["group"]).mean()
    half = 1.96 * by_group.std() / np.sqrt(400)
    found = analysis.losses([fold]).loc[2]
    assert found["loss_low"] == pytest.approx(by_group.mean() - half, abs=0.1 * half)
    assert found["loss_high"] == pytest.approx(by_group.mean() + half, abs=0.1 * half)


def test_more_images_of_the_same_groups_do_not_narrow_the_interval() -> None:
    few, many = (analysis.losses([hits(30, n_images, 0.8, {2: 0.6})]).loc[2] for n_images in (1, 50))
    assert few["loss_high"] - few["loss_low"] == pytest.approx(many["loss_high"] - many["loss_low"])


def test_a_k_that_one_fold_lacks_has_no_loss() -> None:
    assert analysis.losses([hits(9, 2, 0.8, {2: 0.6, 4: 0.7}), hits(9, 2, 0.8, {2: 0.6})]).index.tolist() == [2]


def found(leak: float, features: float, pixels: float, n_labels: int) -> dict[str, Any]:
    """What metrics.json has of it."""
    accuracies = {"features": features, "pixels": pixels}
    return {"leak": {"near_equal": leak}, "nearest_neighbour": accuracies, "tested": {"labels": n_labels}}


@pytest.mark.parametrize(
    ("leak", "pixels", "is_warned"),
    [
        (0.2, 0.2, False),
        (0.21, 0.2, True),
        (0.06, 0.2, False),  # two fruits that look alike from some sides
        (0.06, 0.9, True),  # what raw pixels recognise are the near-equal ones
        (0.0, 0.95, False),  # easy: labels differ in plain colour
        (0.05, 0.95, False),
    ],
)
def test_near_equal_images_are_warned_of_the_sooner_the_more_raw_pixels_recognise(
    leak: float, pixels: float, is_warned: bool
) -> None:
    assert (analysis.leak_warning(found(leak, 0.95, pixels, 60)) is not None) == is_warned


@pytest.mark.parametrize(("features", "pixels"), [(0.55, 0.55), (0.6, 0.55), (0.9, 0.83)], ids=str)
def test_raw_pixels_do_as_well_only_by_what_is_recognised_beyond_chance(features: float, pixels: float) -> None:
    # Of two labels, chance alone recognises half. 0.83 is 92 % of 0.9, but 0.33 is 83 % of 0.4.
    assert analysis.leak_warning(found(0.1, features, pixels, 2)) is None


def test_without_accuracies_there_is_nothing_to_warn_of() -> None:
    assert analysis.leak_warning({"leak": {"near_equal": 0.9}, "tested": {"labels": 0}}) is None


def test_a_warning_says_the_figures_and_what_to_do() -> None:
    warning = analysis.leak_warning(found(0.978, 1.0, 0.999, 63))
    assert warning is not None
    for words in ("97.8%", "raw pixels", "split.near", "ingest.group_pattern"):
        assert words in warning


# Command lines


@pytest.mark.parametrize(("kind", "text"), [(int, "1"), (int, "10"), (float, "1"), (float, "9.5")], ids=str)
def test_a_number_within_the_bounds_is_taken(kind: type, text: str) -> None:
    value = analysis.between(kind, 1, 10)(text)
    assert (value, type(value)) == (float(text), kind)


@pytest.mark.parametrize("text", ["0.999", "10000.1", "-1", "nan", "inf"])
def test_a_number_out_of_bounds_is_told_what_is_allowed(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not between 1 and 10,000$"):
        analysis.between(float, 1, 10_000)(text)
