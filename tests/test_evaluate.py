"""Facts about what stages/evaluate.py measures; scikit-learn is the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from stages import analysis, evaluate, reduce
from tests.helpers import (
    N_FEATURES,
    digest,
    make_images,
    moments_of,
    run_evaluate,
    spaces,
    split,
    write,
    write_inputs,
)

ROUNDED = 5.1e-5  # metrics.json has four digits after the point


def read_csv(output: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(output / f"{name}.csv")


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


def held_out_errors(images: pd.DataFrame, k: int, scale: str) -> list[float]:
    """What scikit-learn's k components of one fold lose of the other's variance, a share, by fold."""
    errors = []
    for fold in (0, 1):
        train, test = (np.stack(images[images["fold"] == each]["features"]).astype(np.float64) for each in (1 - fold, fold))
        scaler = StandardScaler(with_std=scale == "standard").fit(train)
        pca = PCA(k, svd_solver="full").fit(scaler.transform(train))
        rows = scaler.transform(test)
        errors.append(np.sum((rows - pca.inverse_transform(pca.transform(rows))) ** 2) / np.sum(rows**2))
    return errors


# Parts


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
    """Where the stage has run."""
    folder = tmp_path_factory.mktemp("reports")
    run_evaluate(inputs, folder / "evaluation")
    return folder / "evaluation"


@pytest.fixture(scope="module")
def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def test_the_stage_writes_its_files_and_nothing_else(output: Path) -> None:
    tables = ["accuracy.csv", "confusion.csv", "labels.csv", "points.csv", "predictions.csv", "spectrum.csv"]
    assert sorted(path.name for path in output.iterdir()) == sorted([*tables, "metrics.json", "summary.txt"])
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_second_run_writes_the_same_bytes(inputs: list[str], output: Path, tmp_path: Path) -> None:
    run_evaluate(inputs, tmp_path / "again")
    for path in output.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_the_order_of_the_tables_changes_no_measurement(
    tmp_path: Path, images: pd.DataFrame, scale: str, metrics: dict[str, Any], output: Path
) -> None:
    shuffled = images.sample(frac=1, random_state=0)
    assert run_evaluate(write_inputs(tmp_path, shuffled, 3, scale, 7), tmp_path / "report") == metrics
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
    errors = held_out_errors(images, 3, scale)
    assert metrics["variance"]["held_out_error"] == pytest.approx(np.mean(errors), abs=ROUNDED)


@pytest.mark.parametrize("space", analysis.SPACES)
def test_metrics_have_scikit_learns_accuracy_of_the_nearest_neighbour(
    space: str, metrics: dict[str, Any], images: pd.DataFrame, scale: str
) -> None:
    expected = accuracy_oracle(KNeighborsClassifier(1), images, space, 3, scale)
    assert metrics["nearest_neighbour"][space] == pytest.approx(expected, abs=ROUNDED)


@pytest.mark.parametrize("space", analysis.SPACES)
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
    expected: dict[str, str] = {}
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
    run_evaluate(write_inputs(tmp_path, make_images(), k=1), tmp_path / "report")
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
        accuracies = " ".join(f"{metrics[key][space]:>12.1%}".strip() for space in analysis.SPACES)
        assert accuracies in " ".join(summary.split())


# Which k is enough


def hits(n_groups: int, n_images: int, features: float, by_k: dict[int, float], seed: int = 0) -> pd.DataFrame:
    """Whole groups that are recognised or not, with these chances: images of a group are no news of one another."""
    random = np.random.default_rng(seed)
    luck = random.random(n_groups)
    rows = {each: np.repeat(luck < chance, n_images) for each, chance in [*by_k.items(), ("features", features)]}
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
    metrics = run_evaluate(write_inputs(tmp_path, make_images(spread=0.05), k=3), tmp_path / "report")
    assert set(metrics["nearest_neighbour"].values()) | set(metrics["linear_probe"].values()) == {1.0}


def test_a_copy_in_the_other_fold_does_not_help(tmp_path: Path) -> None:
    images = make_images(40, spread=5)
    copies = images.assign(path="copy/" + images["path"], fold=1 - images["fold"])
    both = pd.concat([images, copies], ignore_index=True)
    metrics = run_evaluate(write_inputs(tmp_path, both, k=3), tmp_path / "report")
    assert metrics["tested"]["images"] == 40
    assert metrics["nearest_neighbour"]["features"] < 0.8  # each image's nearest neighbour would be its copy: 1.0


@pytest.fixture
def one_fold(tmp_path: Path) -> Path:
    """Where the stage has run on images of fold 0 alone."""
    run_evaluate(write_inputs(tmp_path, make_images().assign(fold=0), k=3, n_quarantined=2), tmp_path / "report")
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
    metrics = run_evaluate(write_inputs(tmp_path, images, k=3), tmp_path / "report")
    assert metrics["images"]["labels"] == 4
    assert read_csv(tmp_path / "report", "labels")["label"].tolist() == ["apple", "banana"]
    assert metrics["nearest_neighbour"]["embedding"] == pytest.approx(
        accuracy_oracle(KNeighborsClassifier(1), images, "embedding", 3), abs=ROUNDED
    )


def test_folds_without_a_common_label_are_told_of_in_the_summary(tmp_path: Path) -> None:
    images = make_images()
    metrics = run_evaluate(
        write_inputs(tmp_path, images.assign(label=images["label"] + images["fold"].astype(str)), k=3), tmp_path / "r"
    )
    assert "nearest_neighbour" not in metrics
    summary = (tmp_path / "r" / "summary.txt").read_text()
    assert "No accuracy" in summary
    assert "all images are in one fold" not in summary


def test_k_is_no_more_than_the_rank_of_the_training_fold(tmp_path: Path) -> None:
    images = make_images()
    images["fold"] = (np.arange(80) >= 4).astype(int)  # four images: three directions
    metrics = run_evaluate(write_inputs(tmp_path, images, k=5), tmp_path / "report", curve=(1,))
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
    metrics = run_evaluate(write_inputs(tmp_path, images, 3, "standard"), tmp_path / "report")
    assert 0 < metrics["variance"]["held_out_error"] < 1


@pytest.mark.parametrize("constant", [False, True], ids=["all features", "all features but a constant one"])
def test_scaling_is_told_where_all_deviations_are_one(constant: bool, tmp_path: Path) -> None:
    # 81 rows whose squares sum up to 80: of fold 0 some are +-2, of fold 1 some +-1, so many that each feature has a
    # deviation of exactly 1, but another one in each fold.
    images = make_images(81).assign(fold=[0] * 40 + [1] * 41)
    random, features = np.random.default_rng(0), np.zeros((81, N_FEATURES), np.float32)
    for feature, n_pairs in enumerate([5, 6, 7, 8, 9, 5]):
        columns = features[:, feature]
        columns[random.permutation(40)[: 2 * n_pairs]] = [2, -2] * n_pairs
        columns[40 + random.permutation(41)[: 80 - 8 * n_pairs]] = [1, -1] * (40 - 4 * n_pairs)
    if constant:
        features[:, 3] = 5
    images["features"] = list(features)
    inputs = write_inputs(tmp_path, images, 3, "standard")
    assert pq.read_table(f"{inputs[4]}/model/scaling")["scale"].to_pylist() == [1.0] * N_FEATURES
    found = run_evaluate(inputs, tmp_path / "report")["variance"]["held_out_error"]
    assert found == pytest.approx(np.mean(held_out_errors(images, 3, "standard")), abs=ROUNDED)
    assert found != pytest.approx(np.mean(held_out_errors(images, 3, "none")), abs=10 * ROUNDED)


@pytest.mark.parametrize("k", ["0", "-1", "100001", "1.5", "nan", "many"])
def test_a_number_of_the_curve_that_can_be_none_is_refused(k: str, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["ingested", "features", "covariance", "baseline", "reduced", "output"]
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args([*places, "--curve", "4", k])
    assert "argument --curve: " in capsys.readouterr().err
