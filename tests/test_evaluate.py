"""Facts about what stages/evaluate.py measures; scikit-learn is the oracle."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from stages import baseline, evaluate, reduce
from tests import test_reduce

N_FEATURES = 6
LABELS = ("apple", "banana", "cherry")
ROUNDED = 5.1e-5  # metrics.json has four digits after the point

INT32 = {"fold", "feature", "component"}  # all other columns have the type that their values have


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_images(n: int = 80, spread: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Images of three labels in two folds; the smaller the spread, the easier they are to tell apart."""
    random = np.random.default_rng(seed)
    label = np.arange(n) % len(LABELS)
    centres = random.normal(size=(len(LABELS), N_FEATURES)) * 2
    features = (centres[label] + random.normal(size=(n, N_FEATURES)) * spread * [3, 2, 1, 1, 0.5, 0.2]).astype(np.float32)
    pixels = np.clip(80 * label[:, None] + random.normal(size=(n, 768)) * 80 * spread, 0, 255).astype(np.uint8)
    return pd.DataFrame(
        {
            "image_id": [digest(str(i)) for i in range(n)],
            "path": [f"{LABELS[each]}/{i:03}.jpg" for i, each in enumerate(label)],
            "label": [LABELS[each] for each in label],
            "group": [f"film {i // 6}" for i in range(n)],
            "fold": np.arange(n) // 6 % 2,
            "features": list(features),
            "thumbnail": [row.tobytes() for row in pixels],
        }
    )


def write(table: pd.DataFrame, folder: Path) -> None:
    folder.mkdir(parents=True)
    columns = {name: pa.array(table[name].tolist(), pa.int32() if name in INT32 else None) for name in table}
    pq.write_table(pa.table(columns), folder / "part-00000.parquet")


def moments_of(features: np.ndarray) -> evaluate.Moments:
    return evaluate.Moments(*test_reduce.moments_of(features))


def write_inputs(folder: Path, images: pd.DataFrame, k: int, scale: str = "none", n_quarantined: int = 0) -> list[str]:
    """What the stages before write for these images; the places that evaluate takes."""
    write(images.drop(columns="features"), folder / "ingested" / "images")
    quarantine = pd.DataFrame({"path": [f"bad/{i}.jpg" for i in range(n_quarantined)]}, dtype=object)
    write(quarantine, folder / "ingested" / "quarantine")
    write(images.drop(columns="thumbnail"), folder / "features")
    moments = {fold: moments_of(np.stack(rows["features"])) for fold, rows in images.groupby("fold")}
    lower = np.tril_indices(N_FEATURES)
    rows = [(fold, n, mean.tobytes(), scatter[lower].tobytes()) for fold, (n, mean, scatter) in moments.items()]
    write(pd.DataFrame(rows, columns=["fold", "n", "mean", "scatter"]), folder / "covariance")
    whole = moments_of(np.stack(images["features"]))
    pca = reduce.fit(*whole, scale)
    spectrum = reduce.spectrum_of(pca.explained_variance)
    write(spectrum, folder / "reduced" / "model" / "spectrum")
    write(spectrum[:k].assign(weights=list(pca.components[:k])), folder / "reduced" / "model" / "components")
    scaling = pd.DataFrame({"feature": range(N_FEATURES), "mean": pca.mean, "scale": pca.scale})
    write(scaling, folder / "reduced" / "model" / "scaling")
    embeddings = reduce.project(np.stack(images["features"]), pca.mean, pca.scale, pca.components[:k])
    write(images[["image_id", "path", "label"]].assign(embedding=embeddings.tolist()), folder / "reduced" / "embeddings")
    places = [str(folder / name) for name in ("ingested", "features", "baseline")]
    baseline.main([*places, "--max_images", "1000"])
    return [str(folder / name) for name in ("ingested", "features", "covariance", "baseline", "reduced")]


def run(inputs: list[str], output: Path, curve: tuple[int, ...] = (1, 2, 4, 64)) -> dict[str, Any]:
    """Run the stage and return metrics.json."""
    evaluate.main([*inputs, str(output), "--curve", *map(str, curve)])
    return json.loads((output / "metrics.json").read_text())


def read_csv(output: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(output / f"{name}.csv")


def split(images: pd.DataFrame, test_fold: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test images; no copies, and none in the test whose label is not in training."""
    distinct = images.sort_values(["image_id", "path"]).drop_duplicates("image_id")
    train, test = distinct[distinct["fold"] != test_fold], distinct[distinct["fold"] == test_fold]
    return train, test[test["label"].isin(train["label"])]


def spaces(images: pd.DataFrame, test_fold: int, k: int, scale: str = "none") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Training and test rows in each space, by scikit-learn. (A PCA fits all rows of training, copies too.)"""
    train, test = split(images, test_fold)
    fitted = np.stack(images[images["fold"] != test_fold]["features"]).astype(np.float64)
    scaler = StandardScaler(with_std=scale == "standard").fit(fitted)
    pca = PCA(k, svd_solver="full").fit(scaler.transform(fitted))

    def pixels(rows: pd.DataFrame) -> np.ndarray:
        return np.stack([np.frombuffer(each, np.uint8) for each in rows["thumbnail"]]).astype(np.float64)

    features = [np.stack(rows["features"]).astype(np.float64) for rows in (train, test)]
    return {
        "embedding": tuple(pca.transform(scaler.transform(rows)) for rows in features),
        "features": tuple(features),
        "pixels": (pixels(train), pixels(test)),
    }


def accuracy_oracle(model: Any, images: pd.DataFrame, space: str, k: int, scale: str = "none") -> float:
    """Mean over both folds of what a scikit-learn classifier, trained on one, scores on the other."""
    scores = []
    for fold in (0, 1):
        train, test = split(images, fold)
        train_rows, test_rows = spaces(images, fold, k, scale)[space]
        if isinstance(model, LogisticRegression):
            total_deviation = np.sqrt(train_rows.var(axis=0).sum())
            train_rows, test_rows = train_rows / total_deviation, test_rows / total_deviation
            train_rows, test_rows = train_rows - train_rows.mean(axis=0), test_rows - train_rows.mean(axis=0)
        scores.append(model.fit(train_rows, train["label"]).score(test_rows, test["label"]))
    return float(np.mean(scores))


# Parts


@pytest.mark.parametrize("n_test", [1, 2500], ids=["one row", "more rows than a block"])
def test_the_nearest_row_is_that_of_scikit_learn_for_several_k_at_once(n_test: int) -> None:
    random = np.random.default_rng(0)
    train, test = (random.normal(size=(n, 8)).astype(np.float32) for n in (60, n_test))
    nearest = evaluate.nearest(train, test, [1, 3, 8])
    for k in (1, 3, 8):
        expected = KNeighborsClassifier(1).fit(train[:, :k], range(60)).predict(test[:, :k])
        # 0.999: float32 cannot always tell which of two neighbours is nearer, where both are as near to the seventh digit.
        assert np.mean(nearest[k] == expected) >= 0.999


def test_of_equally_near_images_the_first_counts() -> None:
    train = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    assert evaluate.nearest(train, np.zeros((1, 2), np.float32), [2])[2].tolist() == [0]


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3], ids=str)
def test_a_linear_probe_recognises_what_is_separable_in_any_unit(unit: float) -> None:
    images = make_images(90, spread=0.1)
    features, labels = np.stack(images["features"]) * unit, images["label"].to_numpy()
    np.testing.assert_array_equal(evaluate.linear_probe(features[:60], features[60:], labels[:60]), labels[60:])


def test_a_linear_probe_of_noise_is_near_chance() -> None:
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(1200, 4)).astype(np.float32), random.choice(LABELS, 1200)
    score = np.mean(evaluate.linear_probe(features[:600], features[600:], labels[:600]) == labels[600:])
    assert score == pytest.approx(1 / 3, abs=0.08)  # four standard deviations of a share of 600


def test_a_linear_probe_of_one_label_gives_that_label() -> None:
    rows = np.eye(3, dtype=np.float32)
    assert evaluate.linear_probe(rows, rows, np.array(["a"] * 3)).tolist() == ["a"] * 3


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_components_of_a_fold_are_those_of_scikit_learn_up_to_sign(scale: str) -> None:
    features = np.stack(make_images()["features"]).astype(np.float64)
    oracle = PCA(svd_solver="full").fit(StandardScaler(with_std=scale == "standard").fit_transform(features))
    basis = evaluate.fit(moments_of(features), scale == "standard", N_FEATURES)
    # 1e-9: the oracle decomposes the data, the stage their covariance, which squares the rounding.
    np.testing.assert_allclose(np.abs(basis.components @ oracle.components_.T), np.eye(N_FEATURES), atol=1e-9)


def test_the_first_components_of_a_fold_are_the_first_of_all() -> None:
    moments = moments_of(np.stack(make_images()["features"]))
    two, all_ = (evaluate.fit(moments, False, n).components for n in (2, N_FEATURES))
    np.testing.assert_allclose(np.abs(two @ all_.T), np.eye(2, N_FEATURES), atol=1e-9)


def test_a_fold_of_few_images_has_one_component_less_than_images() -> None:
    features = np.stack(make_images(4)["features"])
    assert evaluate.fit(moments_of(features), False, N_FEATURES).components.shape == (3, N_FEATURES)


def test_a_fold_of_one_image_still_has_a_component() -> None:
    features = np.stack(make_images(1)["features"])
    assert evaluate.fit(moments_of(features), False, N_FEATURES).components.shape == (1, N_FEATURES)


@pytest.mark.parametrize("scale", ["none", "standard"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_held_out_error_is_the_direct_sum_over_all_rows(k: int, scale: str) -> None:
    train, test = np.split(np.stack(make_images(100)["features"]).astype(np.float64), [45])
    moments = [moments_of(rows) for rows in (train, test)]
    scaler = StandardScaler(with_std=scale == "standard").fit(train)
    pca = PCA(k, svd_solver="full").fit(scaler.transform(train))
    rows = scaler.transform(test)
    lost = np.sum((rows - pca.inverse_transform(pca.transform(rows))) ** 2)
    basis = evaluate.fit(moments[0], scale == "standard", k)
    # 1e-10: both are shares of 1 in float64; one is a difference of sums, the other a sum of differences.
    assert evaluate.held_out_error(moments[1], basis, k) == pytest.approx(lost / np.sum(rows**2), abs=1e-10)


def test_thresholds_of_variance_name_the_fewest_components() -> None:
    assert evaluate.variance(np.array([0.5, 0.8, 0.85, 0.95, 0.97, 1.0]), 3) == {
        "components": 3,
        "explained": 0.85,
        "k80": 2,
        "k90": 4,
        "k95": 4,
        "k99": 6,
    }


def test_a_threshold_that_rounding_alone_misses_is_reached() -> None:
    cumulative = reduce.spectrum_of(np.array([7.0, 2.0, 1.0]))["cumulative_explained_variance_ratio"].to_numpy()
    assert evaluate.variance(cumulative, 1)["k90"] == 2


# Counts


def test_copies_and_those_under_two_labels_are_counted(tmp_path: Path) -> None:
    images = make_images(12)
    same = images[:3].assign(path="again", label=images["label"])
    conflict = images[3:5].assign(path="conflict", label="pear")
    third = images[4:5].assign(path="third", label="quince")  # the second copy of one image: a duplicate, no new conflict
    write(pd.DataFrame({"path": ["a", "b"]}), tmp_path / "quarantine")
    assert evaluate.count_images(pd.concat([images, same, conflict, third]), str(tmp_path)) == {
        "images": 18,
        "labels": 5,
        "groups": 2,
        "quarantined": 2,
        "duplicates": 6,
        "label_conflicts": 2,
    }


# The whole stage


@pytest.fixture(scope="module")
def images() -> pd.DataFrame:
    """With copies: some under another label, some in the other fold."""
    images = make_images()
    copies = images[:4].assign(path=[f"zucchini/{i}.jpg" for i in range(4)], label="zucchini", fold=[0, 1, 0, 1])
    return pd.concat([images, copies], ignore_index=True)


@pytest.fixture(scope="module", params=["none", "standard"])
def scale(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, images: pd.DataFrame, scale: str) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), images, k=3, scale=scale, n_quarantined=7)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, inputs: list[str]) -> Path:
    """Where the stage has run, over what earlier runs had left."""
    folder = tmp_path_factory.mktemp("reports")
    for left_over in ("evaluation/old.txt", "evaluation.partial/old.txt"):
        (folder / left_over).parent.mkdir()
        (folder / left_over).touch()
    run(inputs, folder / "evaluation")
    return folder / "evaluation"


@pytest.fixture(scope="module")
def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def test_the_stage_writes_its_files_and_nothing_else(output: Path) -> None:
    tables = ["accuracy.csv", "confusion.csv", "labels.csv", "points.csv", "predictions.csv", "spectrum.csv"]
    assert sorted(path.name for path in output.iterdir()) == sorted([*tables, "metrics.json", "summary.txt"])
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_second_run_writes_the_same_bytes(inputs: list[str], output: Path) -> None:
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    run(inputs, output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_the_order_of_the_tables_changes_no_measurement(
    tmp_path: Path, images: pd.DataFrame, scale: str, metrics: dict[str, Any], output: Path
) -> None:
    shuffled = images.sample(frac=1, random_state=0)
    assert run(write_inputs(tmp_path, shuffled, 3, scale, 7), tmp_path / "report") == metrics
    assert (tmp_path / "report" / "predictions.csv").read_bytes() == (output / "predictions.csv").read_bytes()


def test_metrics_count_the_images(metrics: dict[str, Any]) -> None:
    counts = {"images": 84, "labels": 4, "groups": 14, "quarantined": 7, "duplicates": 4, "label_conflicts": 4}
    assert metrics["images"] == counts
    assert metrics["tested"] == {"images": 80, "folds": 2}


def test_metrics_have_the_variance_that_scikit_learn_explains(
    metrics: dict[str, Any], images: pd.DataFrame, scale: str
) -> None:
    features = StandardScaler(with_std=scale == "standard").fit_transform(np.stack(images["features"]).astype(np.float64))
    cumulative = PCA(svd_solver="full").fit(features).explained_variance_ratio_.cumsum()
    variance = metrics["variance"]
    assert variance["components"] == 3
    assert variance["explained"] == pytest.approx(cumulative[2], abs=ROUNDED)
    for key, share in (("k80", 0.8), ("k90", 0.9), ("k95", 0.95), ("k99", 0.99)):
        assert variance[key] == np.sum(cumulative < share) + 1


def test_metrics_have_the_error_of_components_on_the_other_fold(
    metrics: dict[str, Any], images: pd.DataFrame, scale: str
) -> None:
    errors = []
    for fold in (0, 1):
        train, test = (np.stack(images[images["fold"] == each]["features"]).astype(np.float64) for each in (1 - fold, fold))
        scaler = StandardScaler(with_std=scale == "standard").fit(train)
        pca = PCA(3, svd_solver="full").fit(scaler.transform(train))
        rows = scaler.transform(test)
        errors.append(np.sum((rows - pca.inverse_transform(pca.transform(rows))) ** 2) / np.sum(rows**2))
    assert metrics["variance"]["held_out_error"] == pytest.approx(np.mean(errors), abs=ROUNDED)


@pytest.mark.parametrize("space", evaluate.SPACES)
def test_metrics_have_scikit_learns_accuracy_of_the_nearest_neighbour(
    space: str, metrics: dict[str, Any], images: pd.DataFrame, scale: str
) -> None:
    expected = accuracy_oracle(KNeighborsClassifier(1), images, space, 3, scale)
    assert metrics["nearest_neighbour"][space] == pytest.approx(expected, abs=ROUNDED)


@pytest.mark.parametrize("space", evaluate.SPACES)
def test_metrics_have_scikit_learns_accuracy_of_logistic_regression(
    space: str, metrics: dict[str, Any], images: pd.DataFrame, scale: str
) -> None:
    expected = accuracy_oracle(LogisticRegression(C=100, max_iter=5000), images, space, 3, scale)
    assert metrics["linear_probe"][space] == pytest.approx(expected, abs=ROUNDED)


def test_the_curve_has_the_accuracy_at_each_k_up_to_the_rank(output: Path, images: pd.DataFrame, scale: str) -> None:
    curve = read_csv(output, "accuracy")
    assert curve["k"].tolist() == [1, 2, 3, 4]  # those asked for up to six features, and k itself
    assert curve["is_kept"].tolist() == [0, 0, 1, 0]
    expected = [accuracy_oracle(KNeighborsClassifier(1), images, "embedding", k, scale) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(curve["embedding"], expected, atol=ROUNDED)


def test_predictions_have_each_tested_image_once(output: Path, images: pd.DataFrame) -> None:
    predictions = read_csv(output, "predictions")
    tested = pd.concat([split(images, fold)[1] for fold in (0, 1)]).sort_values("path")
    assert predictions[["path", "label"]].values.tolist() == tested[["path", "label"]].values.tolist()


def test_predictions_name_the_nearest_image_of_the_other_fold(output: Path, images: pd.DataFrame, scale: str) -> None:
    expected = {}
    for fold in (0, 1):
        train, test = split(images, fold)
        train_rows, test_rows = spaces(images, fold, 3, scale)["embedding"]
        nearest = KNeighborsClassifier(1).fit(train_rows, train["path"]).predict(test_rows)
        expected |= dict(zip(test["path"], nearest, strict=True))
    predictions = read_csv(output, "predictions")
    assert dict(zip(predictions["path"], predictions["nearest"], strict=True)) == expected


def test_the_confusion_of_few_labels_is_scikit_learns_matrix(output: Path) -> None:
    predictions, confusion = read_csv(output, "predictions"), read_csv(output, "confusion")
    labels = sorted({*predictions["label"], *predictions["predicted"]})
    expected = confusion_matrix(predictions["label"], predictions["predicted"], labels=labels)
    cells = confusion.pivot(index="label", columns="predicted", values="n_images").reindex(index=labels, columns=labels)
    np.testing.assert_array_equal(cells.fillna(0), expected)
    assert confusion.groupby("label")["share"].sum().tolist() == pytest.approx([1] * confusion["label"].nunique(), abs=2e-4)


def test_of_many_labels_the_most_confused_are_in_the_confusion() -> None:
    labels = [f"label {i:02}" for i in range(60)]
    right = pd.DataFrame({"label": labels * 9, "predicted": labels * 9})
    wrong = pd.DataFrame([(labels[59 - i], labels[30 + i]) for i in range(10) for _ in range(i + 1)], columns=right.columns)
    confusion = evaluate.confusion(pd.concat([right, wrong]))
    assert sorted(set(confusion["label"])) == [*labels[30:40], *labels[50:60]]
    assert confusion.set_index(["label", "predicted"]).loc[("label 50", "label 39"), "n_images"] == 10


def test_points_are_the_first_two_coordinates_of_the_embeddings(output: Path, inputs: list[str]) -> None:
    embeddings = pq.read_table(f"{inputs[4]}/embeddings").to_pandas().sort_values("path")
    points = read_csv(output, "points")
    assert points[["path", "label"]].values.tolist() == embeddings[["path", "label"]].values.tolist()
    np.testing.assert_allclose(
        points[["component_1", "component_2"]], np.stack(embeddings["embedding"])[:, :2], atol=ROUNDED
    )


def test_points_are_bounded_however_many_images_there_are(tmp_path: Path) -> None:
    ids = [digest(str(i)) for i in range(20_000)]
    table = pd.DataFrame({"image_id": ids, "path": ids, "label": "a", "embedding": [[1.0, 2.0]] * len(ids)})
    write(table, tmp_path / "embeddings")
    points = evaluate.read_points(str(tmp_path), len(ids))
    assert len(points) == pytest.approx(evaluate.POINTS, rel=0.1)
    assert points["path"].max() < sorted(ids)[3 * evaluate.POINTS // 2]  # those of the least SHA-256


def test_one_component_is_drawn_on_a_line(tmp_path: Path) -> None:
    run(write_inputs(tmp_path, make_images(), k=1), tmp_path / "report")
    assert set(read_csv(tmp_path / "report", "points")["component_2"]) == {0.0}


def test_recall_of_a_label_is_the_share_of_its_images_predicted_so(output: Path) -> None:
    predictions, labels = read_csv(output, "predictions"), read_csv(output, "labels")
    assert labels["label"].tolist() == sorted(set(predictions["label"]))
    for row in labels.itertuples():
        predicted = predictions[predictions["label"] == row.label]["predicted"]
        assert row.n_images == len(predicted)
        assert row.recall == pytest.approx(np.mean(predicted == row.label), abs=ROUNDED)


def test_the_spectrum_is_that_of_the_stage_reduce(output: Path, inputs: list[str]) -> None:
    expected = pq.read_table(f"{inputs[4]}/model/spectrum").to_pandas().drop(columns="explained_variance")
    pd.testing.assert_frame_equal(read_csv(output, "spectrum"), expected, check_dtype=False)


def test_the_summary_says_the_numbers_of_the_metrics(output: Path, metrics: dict[str, Any]) -> None:
    summary = (output / "summary.txt").read_text()
    assert "84 images of 4 labels (7 files quarantined, 4 duplicates, 4 of them under two labels)" in summary
    for key in ("nearest_neighbour", "linear_probe"):
        accuracies = " ".join(f"{metrics[key][space]:>12.1%}".strip() for space in evaluate.SPACES)
        assert accuracies in " ".join(summary.split())


# Which k is enough


def hits(n_groups: int, n_images: int, features: float, by_k: dict[int, float], seed: int = 0) -> pd.DataFrame:
    """Whole groups that are recognised or not, with these chances: images of a group are no news of one another."""
    random = np.random.default_rng(seed)
    luck = random.random(n_groups)
    rows = {each: np.repeat(luck < chance, n_images) for each, chance in {**by_k, "features": features}.items()}
    return pd.DataFrame(rows).assign(group=np.repeat(np.arange(n_groups), n_images))


def test_the_loss_is_the_difference_of_accuracies_averaged_over_folds() -> None:
    folds = [hits(50, 3, 0.8, {2: 0.5}, seed) for seed in (1, 2)]
    expected = np.mean([fold["features"].mean() - fold[2].mean() for fold in folds])
    assert evaluate.losses(folds).loc[2, "loss"] == pytest.approx(expected)


def test_the_interval_is_that_of_the_normal_approximation_over_groups() -> None:
    fold = hits(400, 5, 0.8, {2: 0.6})
    by_group = (fold["features"].astype(int) - fold[2]).groupby(fold["group"]).mean()
    half = 1.96 * by_group.std() / np.sqrt(400)
    found = evaluate.losses([fold]).loc[2]
    assert found["loss_low"] == pytest.approx(by_group.mean() - half, abs=0.1 * half)
    assert found["loss_high"] == pytest.approx(by_group.mean() + half, abs=0.1 * half)


def test_more_images_of_the_same_groups_do_not_narrow_the_interval() -> None:
    few, many = (evaluate.losses([hits(30, n_images, 0.8, {2: 0.6})]).loc[2] for n_images in (1, 50))
    assert few["loss_high"] - few["loss_low"] == pytest.approx(many["loss_high"] - many["loss_low"])


def test_a_k_that_one_fold_lacks_has_no_loss() -> None:
    assert evaluate.losses([hits(9, 2, 0.8, {2: 0.6, 4: 0.7}), hits(9, 2, 0.8, {2: 0.6})]).index.tolist() == [2]


@pytest.mark.parametrize(
    ("low", "enough"), [([0.1, -0.01, -0.2], 4), ([0.1, 0.2, 0.0], 8), ([-0.1, 0.1, -0.1], 2), ([0.1, 0.2, 0.3], 8)]
)
def test_the_smallest_k_whose_loss_may_be_none_is_enough(low: list[float], enough: int) -> None:
    assert evaluate.smallest_k(pd.DataFrame({"k": [2, 4, 8], "loss_low": low})) == enough


# Odd collections


def test_images_that_are_easy_to_tell_apart_are_all_recognised(tmp_path: Path) -> None:
    metrics = run(write_inputs(tmp_path, make_images(spread=0.05), k=3), tmp_path / "report")
    assert set(metrics["nearest_neighbour"].values()) | set(metrics["linear_probe"].values()) == {1.0}


def test_a_copy_in_the_other_fold_does_not_help(tmp_path: Path) -> None:
    images = make_images(40, spread=5)
    copies = images.assign(path="copy/" + images["path"], fold=1 - images["fold"])
    both = pd.concat([images, copies], ignore_index=True)
    metrics = run(write_inputs(tmp_path, both, k=3), tmp_path / "report")
    assert metrics["tested"]["images"] == 40
    assert metrics["nearest_neighbour"]["features"] < 0.8  # each image's nearest neighbour would be its copy: 1.0


@pytest.fixture
def one_fold(tmp_path: Path) -> Path:
    """Where the stage has run on images of fold 0 alone."""
    run(write_inputs(tmp_path, make_images().assign(fold=0), k=3, n_quarantined=2), tmp_path / "report")
    return tmp_path / "report"


def test_images_of_one_fold_are_counted_without_accuracy(one_fold: Path) -> None:
    metrics = json.loads((one_fold / "metrics.json").read_text())
    assert metrics.keys() == {"images", "variance"}
    assert metrics["images"]["images"] == 80


def test_images_of_one_fold_are_told_of_in_the_summary(one_fold: Path) -> None:
    assert "No accuracy" in (one_fold / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("accuracy", ["k", "embedding", "features", "pixels", "loss", "loss_low", "loss_high", "is_kept"]),
        ("labels", ["label", "n_images", "recall"]),
        ("predictions", ["path", "label", "predicted", "nearest"]),
        ("confusion", ["label", "predicted", "n_images", "share"]),
    ],
)
def test_images_of_one_fold_give_tables_without_rows(name: str, columns: list[str], one_fold: Path) -> None:
    table = read_csv(one_fold, name)
    assert (table.columns.tolist(), len(table)) == (columns, 0)


def test_a_label_that_is_in_one_fold_only_is_left_out(tmp_path: Path) -> None:
    images = make_images()
    images.loc[(images["label"] == "cherry") & (images["fold"] == 1), "label"] = "date"
    metrics = run(write_inputs(tmp_path, images, k=3), tmp_path / "report")
    assert metrics["images"]["labels"] == 4
    assert read_csv(tmp_path / "report", "labels")["label"].tolist() == ["apple", "banana"]
    assert metrics["nearest_neighbour"]["embedding"] == pytest.approx(
        accuracy_oracle(KNeighborsClassifier(1), images, "embedding", 3), abs=ROUNDED
    )


def test_folds_without_a_common_label_are_told_of_in_the_summary(tmp_path: Path) -> None:
    images = make_images()
    metrics = run(
        write_inputs(tmp_path, images.assign(label=images["label"] + images["fold"].astype(str)), k=3), tmp_path / "r"
    )
    assert "nearest_neighbour" not in metrics
    summary = (tmp_path / "r" / "summary.txt").read_text()
    assert "No accuracy" in summary
    assert "all images are in one fold" not in summary


def test_k_is_no_more_than_the_rank_of_the_training_fold(tmp_path: Path) -> None:
    images = make_images()
    images["fold"] = (np.arange(80) >= 4).astype(int)  # four images: three directions
    metrics = run(write_inputs(tmp_path, images, k=5), tmp_path / "report", curve=(1,))
    assert metrics["variance"]["components"] == 5
    assert read_csv(tmp_path / "report", "accuracy")["k"].tolist() == [1, 3, 5]
    scores = []
    for fold, k in ((0, 5), (1, 3)):
        train, test = split(images, fold)
        train_rows, test_rows = spaces(images, fold, k)["embedding"]
        scores.append(KNeighborsClassifier(1).fit(train_rows, train["label"]).score(test_rows, test["label"]))
    assert metrics["nearest_neighbour"]["embedding"] == pytest.approx(np.mean(scores), abs=ROUNDED)


def test_a_constant_feature_does_no_harm(tmp_path: Path) -> None:
    images = make_images()
    images["features"] = [np.where(np.arange(N_FEATURES) == 2, np.float32(0.1), each) for each in images["features"]]
    metrics = run(write_inputs(tmp_path, images, 3, "standard"), tmp_path / "report")
    assert 0 < metrics["variance"]["held_out_error"] < 1


@pytest.mark.parametrize("flags", [{"curve": (0,)}, {"curve": (-1,)}], ids=str)
def test_a_number_below_one_is_refused(flags: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        run(write_inputs(tmp_path, make_images(), k=3), tmp_path / "report", **flags)
    assert error.value.code == 2
