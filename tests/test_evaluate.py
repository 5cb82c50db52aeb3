"""Facts about what stages/evaluate.py measures; scikit-learn is the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.stats
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
    write(pd.DataFrame({"reason": ["hidden", *["not_in_share"] * 60]}), tmp_path / "ignored")
    assert evaluate.count_images(pd.concat([images, same, conflict, third]), str(tmp_path)) == {
        "images": 18,
        "labels": 5,
        "groups": 2,
        "quarantined": 2,
        "ignored": 61,
        "share": 0.25,
        "duplicates": 6,
        "label_conflicts": 2,
    }


# The whole stage


@pytest.fixture(scope="module")
def images() -> pd.DataFrame:
    """With copies under another label."""
    images = make_images()
    copies = images[:4].assign(path=[f"zucchini/{i}.jpg" for i in range(4)], label="zucchini")
    return pd.concat([images, copies], ignore_index=True)


@pytest.fixture(scope="module", params=["none", "standard"])
def scale(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, images: pd.DataFrame, scale: str) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), images, k=3, scale=scale, n_quarantined=7, n_ignored=5)


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
    assert run_evaluate(write_inputs(tmp_path, shuffled, 3, scale, 7, 5), tmp_path / "report") == metrics
    assert (tmp_path / "report" / "predictions.csv").read_bytes() == (output / "predictions.csv").read_bytes()


def test_metrics_count_the_images(metrics: dict[str, Any]) -> None:
    counts = {
        "images": 84,
        "labels": 4,
        "groups": 14,
        "quarantined": 7,
        "ignored": 5,
        "share": 1.0,
        "duplicates": 4,
        "label_conflicts": 4,
    }
    assert metrics["images"] == counts
    assert metrics["tested"] == {"images": 80, "groups": 14, "labels": 3, "labels_untested": 1}


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
    embeddings = pq.read_table(f"{inputs[5]}/embeddings").to_pandas().sort_values("path")
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
    predictions, labels = read_csv(output, "predictions"), read_csv(output, "labels").set_index("label")
    of_label = predictions.groupby("label")
    assert labels["n_images"].to_dict() == {**of_label.size(), "zucchini": 0}  # whose images are copies of others
    recall = of_label[["label", "predicted"]].apply(lambda rows: np.mean(rows["label"] == rows["predicted"]))
    assert labels["recall"].dropna().to_dict() == pytest.approx(recall.to_dict(), abs=ROUNDED)


def test_the_spectrum_is_that_of_the_stage_reduce(output: Path, inputs: list[str]) -> None:
    expected = pq.read_table(f"{inputs[5]}/model/spectrum").to_pandas().drop(columns="explained_variance")
    pd.testing.assert_frame_equal(read_csv(output, "spectrum"), expected, check_dtype=False)


def test_the_summary_says_the_numbers_of_the_metrics(output: Path, metrics: dict[str, Any]) -> None:
    summary = (output / "summary.txt").read_text()
    assert (
        "84 images of 4 labels (7 files quarantined, 4 duplicates, 4 of them under two labels)\n5 other files are ignored"
        in summary
    )
    assert "first look" not in summary
    for key in ("nearest_neighbour", "linear_probe"):
        accuracies = " ".join(f"{metrics[key][space]:>12.1%}".strip() for space in analysis.SPACES)
        assert accuracies in " ".join(summary.split())


# Which k is enough


def curve(*losses: tuple[int, float, float]) -> pd.DataFrame:
    """The losses of some k, each with its interval, as accuracy.csv has them."""
    rows = [(k, (low + high) / 2, low, high) for k, low, high in losses]
    return pd.DataFrame(rows, columns=["k", "loss", "loss_low", "loss_high"])


@pytest.mark.parametrize(
    ("high", "enough"), [([0.3, 0.02, 0.01], 4), ([0.01, 0.3, 0.01], 2), ([0.3, 0.2, 0.0], 8), ([0.3, 0.2, 0.021], None)]
)
def test_the_smallest_k_whose_loss_is_surely_small_is_enough(high: list[float], enough: int | None) -> None:
    losses = curve(*((k, -0.1, each) for k, each in zip((2, 4, 8), high, strict=True)))
    assert evaluate.smallest_k(losses, 100, 0.02) == enough


def test_few_groups_tell_of_no_k_that_it_is_enough() -> None:
    n_groups = [evaluate.GROUPS - 1, evaluate.GROUPS]
    assert [evaluate.smallest_k(curve((2, 0, 0)), each, 0.02) for each in n_groups] == [None, 2]


def test_an_enough_k_is_said_with_its_loss() -> None:
    said = evaluate.say_loss(curve((2, 0.1, 0.3), (4, -0.01, 0.018), (8, 0, 0)), 8, 4, 50, 0.02)
    assert said.startswith("k = 4 is enough: its loss is 0.4 points")
    assert "(95 % interval -1.0 to 1.8; 2 are allowed)" in said


@pytest.mark.parametrize(
    ("n_groups", "low", "why"),
    [
        (50, 0.021, "No k tried is enough: "),
        (50, 0.02, "50 groups are too few to tell which k is enough: "),  # a loss of 0.02 may be the true one
        (9, 0.1, "9 groups are too few to tell which k is enough: "),
    ],
    ids=["none is", "wide intervals", "few groups"],
)
def test_why_no_k_is_enough_is_said_with_the_loss_of_the_runs_own(n_groups: int, low: float, why: str) -> None:
    said = evaluate.say_loss(curve((2, 0.5, 0.7), (4, low, 0.3)), 2, None, n_groups, 0.02)
    assert said.startswith(f"{why}the loss of k = 2 is 60.0 points")
    assert "interval 50.0 to 70.0" in said


def test_a_loss_that_rounds_to_none_has_no_sign() -> None:
    assert "loss is 0.0 points of the features' accuracy (95 % interval 0.0 to 0.0;" in evaluate.say_loss(
        curve((2, -0.0004, -0.0001)), 2, 2, 50, 0.02
    )


def test_metrics_have_the_loss_of_the_runs_own_k(output: Path, metrics: dict[str, Any]) -> None:
    (own,) = read_csv(output, "accuracy").query("k == 3")[["loss", "loss_low", "loss_high"]].to_dict("records")
    assert {key: metrics["nearest_neighbour"][key] for key in own} == own


def test_metrics_name_an_enough_k_only_where_there_is_one(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, make_images(), k=3)
    found = [run_evaluate(inputs, tmp_path / str(most), (1, 2), most)["variance"] for most in (0.0, 1.0)]
    assert [each.get("k_enough") for each in found] == [None, 1]


# What cannot be tested


@pytest.fixture(scope="module")
def one_group_images() -> pd.DataFrame:
    more = make_images(86, seed=3)[80:].assign(label="quince", group="one film", fold=0)
    return pd.concat([make_images(), more], ignore_index=True)


@pytest.fixture(scope="module")
def one_group(tmp_path_factory: pytest.TempPathFactory, one_group_images: pd.DataFrame) -> Path:
    """Where the stage has run on three labels of several groups, and quince, of one."""
    folder = tmp_path_factory.mktemp("one_group")
    run_evaluate(write_inputs(folder, one_group_images, k=3), folder / "report")
    return folder / "report"


def test_a_label_of_one_group_is_counted_and_left_out_of_the_accuracy(
    one_group: Path, one_group_images: pd.DataFrame
) -> None:
    metrics = json.loads((one_group / "metrics.json").read_text())
    assert metrics["tested"] == {"images": 80, "groups": 14, "labels": 3, "labels_untested": 1}
    assert metrics["images"]["labels"] == 4
    # Others can still be taken for it: its images are in one of the two trainings.
    assert metrics["nearest_neighbour"]["features"] == pytest.approx(
        accuracy_oracle(KNeighborsClassifier(1), one_group_images, "features", 3), abs=ROUNDED
    )


def test_a_label_of_one_group_has_no_recall(one_group: Path) -> None:
    labels = read_csv(one_group, "labels").set_index("label")
    assert labels["n_images"].to_dict() == {"apple": 27, "banana": 27, "cherry": 26, "quince": 6}
    assert labels.index[labels["recall"].isna()].tolist() == ["quince"]


def test_the_summary_says_on_what_an_accuracy_is(one_group: Path) -> None:
    summary = (one_group / "summary.txt").read_text()
    assert "tested: 80 images of 3 of 4 labels" in summary
    assert "not tested, as a label needs images of two groups: quince\n" in summary


def test_of_many_untested_labels_ten_are_named(tmp_path: Path) -> None:
    images = make_images()
    images["label"] = [f"label {i:02}" if i >= 60 else label for i, label in enumerate(images["label"])]
    run_evaluate(write_inputs(tmp_path, images, k=3), tmp_path / "report")
    named = ", ".join(f"label {i}" for i in range(60, 70))
    assert f"of two groups: {named} and 10 more" in " ".join((tmp_path / "report/summary.txt").read_text().split())


def test_a_group_in_both_folds_ends_it_and_is_named(tmp_path: Path) -> None:
    images = make_images()
    images.loc[7, "fold"] = 0
    with pytest.raises(SystemExit, match=r"^evaluate: 1 of 14 groups are in both folds, such as film 1: [^\n]*$"):
        run_evaluate(write_inputs(tmp_path, images, k=3), tmp_path / "report")
    assert not (tmp_path / "report").exists()


# Whether it can be trusted


def test_of_images_that_leak_no_k_is_called_enough(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, make_images(), k=3, leak=0.55561)
    metrics = run_evaluate(inputs, tmp_path / "report", max_loss=1.0)
    assert ("k_enough" in metrics["variance"], "enough" in (tmp_path / "report/summary.txt").read_text()) == (False, False)


def test_a_leak_is_warned_of_in_summary_and_metrics(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, make_images(), k=3, leak=0.55561)
    metrics = run_evaluate(inputs, tmp_path / "report")
    assert metrics["leak"] == {"near_equal": 0.5556, "is_suspected": 1}
    summary = (tmp_path / "report/summary.txt").read_text()
    assert "Warning: these accuracies flatter: 55.6% of the images have" in summary
    assert summary.index("Warning") < summary.index("Accuracy")


def test_an_easy_collection_without_near_equal_images_is_not_warned_of(tmp_path: Path) -> None:
    images = make_images(spread=0.05)
    metrics = run_evaluate(write_inputs(tmp_path, images.assign(group=images["path"]), k=3), tmp_path / "report")
    assert metrics["nearest_neighbour"]["pixels"] == 1.0
    assert metrics["leak"] == {"near_equal": 0.0, "is_suspected": 0}
    assert "Warning" not in (tmp_path / "report/summary.txt").read_text()


# Unseen kinds


def siblings() -> pd.DataFrame:
    """Three fruits, of which some have siblings: apple 1 to 3, banana 1 and 2, cherry."""
    images = make_images(300, spread=3)
    number = np.arange(300) // 3 % np.array([3, 2, 1])[np.arange(300) % 3] + 1
    images["label"] = [each if each == "cherry" else f"{each} {i}" for each, i in zip(images["label"], number, strict=True)]
    return images


def test_a_label_left_out_is_recognised_by_its_kind_as_scikit_learn_does(tmp_path: Path) -> None:
    images = siblings()
    metrics = run_evaluate(write_inputs(tmp_path, images, k=3), tmp_path / "report")
    features, kinds = np.stack(images["features"]), images["label"].str.rstrip(" 123")
    scores = []
    for label in ("apple 1", "apple 2", "apple 3", "banana 1", "banana 2"):
        out = images["label"] == label
        scores.append(KNeighborsClassifier(1).fit(features[~out], kinds[~out]).score(features[out], kinds[out]))
    unseen = metrics["unseen"]
    assert unseen["accuracy"] == pytest.approx(np.mean(scores), abs=ROUNDED)
    assert (unseen["labels"], unseen["kinds"]) == (5, 2)
    interval = scipy.stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", random_state=0)
    expected = interval.confidence_interval
    # 0.01: both draw at random.
    assert (unseen["low"], unseen["high"]) == pytest.approx((expected.low, expected.high), abs=0.01)
    said = f"Of a label that is left out, {unseen['accuracy']:.1%} of the images are taken for its kind"
    assert said in (tmp_path / "report/summary.txt").read_text()


def test_a_collection_without_siblings_says_nothing_of_unseen_kinds(output: Path, metrics: dict[str, Any]) -> None:
    assert "unseen" not in metrics
    assert "left out" not in (output / "summary.txt").read_text()


# Odd collections


def test_images_that_are_easy_to_tell_apart_are_all_recognised(tmp_path: Path) -> None:
    metrics = run_evaluate(write_inputs(tmp_path, make_images(spread=0.05), k=3), tmp_path / "report")
    assert {metrics[name][space] for name in analysis.RECOGNISERS for space in analysis.SPACES} == {1.0}


def test_the_summary_says_that_it_is_of_a_share(tmp_path: Path) -> None:
    run_evaluate(write_inputs(tmp_path, make_images(), k=3, n_not_in_share=240), tmp_path / "report")
    assert "This is a first look: 25.00% of the files" in (tmp_path / "report/summary.txt").read_text()


def test_a_copy_in_the_other_fold_does_not_help(tmp_path: Path) -> None:
    images = make_images(40, spread=5)
    copies = images.assign(path="copy/" + images["path"], group="copy of " + images["group"], fold=1 - images["fold"])
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
    assert metrics.keys() == {"images", "variance", "tested", "leak"}
    assert metrics["tested"] == {"images": 0, "groups": 0, "labels": 0, "labels_untested": 3}
    assert metrics["images"]["images"] == 80


def test_images_of_one_fold_are_told_of_in_the_summary(one_fold: Path) -> None:
    assert "No accuracy" in (one_fold / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("accuracy", ["k", "embedding", "features", "pixels", "loss", "loss_low", "loss_high", "is_kept"]),
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
    recall = read_csv(tmp_path / "report", "labels").set_index("label")["recall"]
    assert recall.dropna().index.tolist() == ["apple", "banana"]
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
    images["group"] = images["path"]
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
    images["features"] = [np.where(np.arange(N_FEATURES) == 2, np.float32(0.125), each) for each in images["features"]]
    metrics = run_evaluate(write_inputs(tmp_path, images, 3, "standard"), tmp_path / "report")
    assert 0 < metrics["variance"]["held_out_error"] < 1


@pytest.mark.parametrize("constant", [False, True], ids=["all features", "all features but a constant one"])
def test_scaling_is_told_where_all_deviations_are_one(constant: bool, tmp_path: Path) -> None:
    # 81 rows whose squares sum up to 80: of fold 0 some are +-2, of fold 1 some +-1, so many that each feature has a
    # deviation of exactly 1, but another one in each fold.
    images = make_images(81).assign(group=[str(i) for i in range(81)], fold=[0] * 40 + [1] * 41)
    random, features = np.random.default_rng(0), np.zeros((81, N_FEATURES), np.float32)
    for feature, n_pairs in enumerate([5, 6, 7, 8, 9, 5]):
        columns = features[:, feature]
        columns[random.permutation(40)[: 2 * n_pairs]] = [2, -2] * n_pairs
        columns[40 + random.permutation(41)[: 80 - 8 * n_pairs]] = [1, -1] * (40 - 4 * n_pairs)
    if constant:
        features[:, 3] = 5
    images["features"] = list(features)
    inputs = write_inputs(tmp_path, images, 3, "standard")
    assert pq.read_table(f"{inputs[5]}/model/scaling")["scale"].to_pylist() == [1.0] * N_FEATURES
    found = run_evaluate(inputs, tmp_path / "report")["variance"]["held_out_error"]
    assert found == pytest.approx(np.mean(held_out_errors(images, 3, "standard")), abs=ROUNDED)
    assert found != pytest.approx(np.mean(held_out_errors(images, 3, "none")), abs=10 * ROUNDED)


PLACES = ["ingested", "features", "split", "covariance", "baseline", "reduced", "output"]


@pytest.mark.parametrize("loss", ["-0.01", "1.01", "nan", "much"])
def test_a_loss_that_can_be_none_is_refused(loss: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args([*PLACES, "--curve", "4", "--max_loss", loss])
    assert "argument --max_loss: " in capsys.readouterr().err


@pytest.mark.parametrize("k", ["0", "-1", "100001", "1.5", "nan", "many"])
def test_a_number_of_the_curve_that_can_be_none_is_refused(k: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse_args([*PLACES, "--curve", "4", k, "--max_loss", "0.02"])
    assert "argument --curve: " in capsys.readouterr().err
