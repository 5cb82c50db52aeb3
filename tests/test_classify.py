"""Facts about what stages/classify.py learns and measures; scikit-learn, and NumPy row by row, are the oracles."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import f1_score, log_loss
from sklearn.preprocessing import normalize
from tqdm import tqdm

from stages import classify
from stages.analysis import read_sums
from tests.helpers import make_images, run_classify, spaces, split, sums_of, write, write_inputs

K = 3


def read(output: Path, table: str) -> pd.DataFrame:
    return pq.read_table(output / table).to_pandas()


def metrics_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())["recognition"]


def scores(similarities: list[list[float]], labels: str, strangeness: float = 0.5, fold: int = 0) -> classify.Scores:
    """Of images of these labels, one letter each, of the labels a, b, c."""
    n_images = len(similarities)
    images = pd.DataFrame({"path": [str(i) for i in range(n_images)], "label": list(labels), "group": "g", "fold": fold})
    names = np.array(list("abc")[: len(similarities[0])])
    return classify.Scores(images, names, np.array(similarities), np.full(n_images, strangeness), [])


@pytest.fixture(scope="module")
def images() -> pd.DataFrame:
    return make_images(160, spread=1.3)


@pytest.fixture(scope="module")
def folder(images: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_inputs(folder, images, K)
    return folder


@pytest.fixture(scope="module")
def output(folder: Path) -> Path:
    return run_classify(folder)


@pytest.fixture(scope="module")
def predictions(output: Path) -> pd.DataFrame:
    return read(output, "predictions").set_index("path")


# The head


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1.0])
def test_the_whitening_makes_the_covariance_within_labels_a_sphere(shrinkage: float, images: pd.DataFrame) -> None:
    rows = np.stack(images["features"])
    labels = images["label"].to_numpy()
    analysis = LinearDiscriminantAnalysis(solver="eigen", shrinkage=shrinkage).fit(normalize(rows.astype(float)), labels)
    whitening = classify.fit(rows, labels, 1, shrinkage).whitening
    sphere = whitening @ analysis.covariance_ @ whitening
    np.testing.assert_allclose(sphere, np.eye(len(sphere)) * sphere[0, 0], atol=1e-9 * sphere[0, 0])


def test_the_similarity_to_a_label_is_the_largest_cosine_to_one_of_its_exemplars(images: pd.DataFrame) -> None:
    rows, labels = np.stack(images["features"]), images["label"].to_numpy()
    head = classify.fit(rows, labels, 3, 0.2)
    owner = np.repeat(head.labels, head.n_exemplars)
    for row, found in zip(rows, classify.compare(rows, head), strict=True):
        point = row.astype(float) / np.linalg.norm(row) @ head.whitening
        cosines = [point @ each / np.linalg.norm(point) / np.linalg.norm(each) for each in head.exemplars]
        best = [max(cosine for cosine, name in zip(cosines, owner, strict=True) if name == label) for label in head.labels]
        np.testing.assert_allclose(found, best, atol=1e-12)


def test_exemplars_are_the_middles_of_what_a_label_consists_of() -> None:
    middles = np.eye(4)
    points = normalize(np.repeat(middles, 25, axis=0) + np.random.default_rng(0).normal(size=(100, 4)) * 0.05)
    found = classify.find_exemplars(points, 4)
    expected = normalize(points.reshape(4, 25, 4).mean(axis=1))
    np.testing.assert_allclose(found[np.argsort(found.argmax(axis=1))], expected, atol=1e-12)


def test_a_label_has_no_more_exemplars_than_images() -> None:
    rows = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    head = classify.fit(rows, np.array(list("aaaaabb")), 4, 0.2)
    assert head.n_exemplars.tolist() == [4, 2]


@pytest.mark.filterwarnings("ignore:One of the clusters")
@pytest.mark.parametrize("labels", ["ab", "aaaa"], ids=["one image a label", "equal images"])
def test_where_images_of_a_label_do_not_vary_all_directions_count_the_same(labels: str) -> None:
    rows = np.eye(3, dtype=np.float32)[[0, 1] if labels == "ab" else [0] * 4]
    np.testing.assert_allclose(classify.fit(rows, np.array(list(labels)), 4, 0.2).whitening, np.eye(3), atol=1e-12)


def test_what_ships_is_fitted_on_all_images_with_the_embedding_of_reduce(folder: Path, output: Path) -> None:
    table = read(folder / "reduced", "embeddings")
    head = classify.fit(np.stack(table["embedding"]), table["label"].to_numpy(), 1, 0.2)
    np.testing.assert_allclose(np.stack(read(output, "whitening")["weights"]), head.whitening, atol=1e-9)
    np.testing.assert_allclose(np.stack(read(output, "exemplars")["vector"]), head.exemplars, atol=1e-9)


def test_an_exemplar_names_the_image_of_its_label_that_is_nearest_to_it(folder: Path) -> None:
    output = run_classify(folder, "three", exemplars=3)
    table = read(folder / "reduced", "embeddings")
    points = normalize(
        normalize(np.stack(table["embedding"]).astype(float)) @ np.stack(read(output, "whitening")["weights"])
    )
    for row in read(output, "exemplars").itertuples():
        own = (table["label"] == row.label).to_numpy()
        nearest = table["path"][own].iloc[np.linalg.norm(points[own] - row.vector, axis=1).argmin()]
        assert row.path == nearest


def test_exemplars_are_numbered_within_their_label(folder: Path) -> None:
    rows = read(run_classify(folder, "two", exemplars=2), "exemplars")
    assert list(zip(rows["label"], rows["exemplar"], strict=True)) == [
        (label, number) for label in ("apple", "banana", "cherry") for number in (1, 2)
    ]


def test_the_order_of_rows_changes_no_byte(images: pd.DataFrame, output: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path, images, K)
    for name in ("features", "split/images", "reduced/embeddings"):
        (path,) = (tmp_path / name).glob("*.parquet")
        table = pq.read_table(path)
        pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    other = run_classify(tmp_path)
    files = [path.relative_to(output) for path in sorted(output.rglob("*")) if path.is_file()]
    assert [path for path in files if (output / path).read_bytes() != (other / path).read_bytes()] == []


# What is measured, on images of the other fold


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_each_image_is_recognised_by_what_was_fitted_on_the_other_fold(
    scale: str, images: pd.DataFrame, tmp_path: Path
) -> None:
    write_inputs(tmp_path, images, K, scale)
    found = read(run_classify(tmp_path), "predictions").set_index("path")
    for fold in (0, 1):
        train, test = split(images, fold)
        reduced, whole = (spaces(images, fold, k, scale)["embedding"] for k in (K, 6))
        rows = [normalize(each) for each in reduced]
        analysis = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.2).fit(rows[0], train["label"])
        variance, axes = np.linalg.eigh(analysis.covariance_)
        points = [normalize(each @ axes / np.sqrt(variance) @ axes.T) for each in rows]
        labels = sorted(set(train["label"]))
        cosines = points[1] @ normalize([points[0][train["label"] == label].mean(axis=0) for label in labels]).T
        expected = found.loc[test["path"]]
        assert expected["predicted"].tolist() == [labels[each] for each in cosines.argmax(axis=1)]
        np.testing.assert_allclose(expected["similarity"], cosines.max(axis=1), atol=1e-5)
        lost = 1 - (reduced[1] ** 2).sum(axis=1) / (whole[1] ** 2).sum(axis=1)
        np.testing.assert_allclose(expected["strangeness"], lost, atol=1e-5)


def test_the_temperature_has_the_least_log_loss() -> None:
    random = np.random.default_rng(0)
    labels = random.choice(list("abc"), 400)
    cosines = random.normal(size=(400, 3)) * 0.1 + 0.2 * (labels[:, None] == np.array(list("abc")))
    found = classify.calibrate([scores(cosines.tolist(), "".join(labels))], 0.9).temperature

    def loss(temperature: float) -> float:
        raised = np.exp(cosines / temperature)
        return log_loss(labels, raised / raised.sum(axis=1, keepdims=True))

    assert loss(found) <= min(loss(found * 0.99), loss(found * 1.01))


def test_each_threshold_keeps_the_share_asked_for(predictions: pd.DataFrame) -> None:
    random = np.random.default_rng(0)
    own = scores(random.normal(size=(1000, 3)).tolist(), "a" * 1000)._replace(strangeness=random.random(1000))
    found = classify.calibrate([own], 0.9)
    assert np.mean(own.similarities.max(axis=1) >= found.min_similarity) == pytest.approx(0.9, abs=0.001)
    assert np.mean(own.strangeness <= found.max_strangeness) == pytest.approx(0.9, abs=0.001)


def test_temperature_and_thresholds_never_see_what_they_are_judged_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[set[str], set[str]]] = []
    seen: dict[int, set[str]] = {}
    calibrate, judge = classify.calibrate, classify.judge

    def calibrate_and_note(several: Any, keep: float) -> classify.Calibration:
        found = calibrate(several, keep)
        seen[id(found)] = {path for each in several for path in each.images["path"]}
        kept.append(found)  # so that no other gets its id
        return found

    def judge_and_note(own: classify.Scores, calibration: classify.Calibration) -> pd.DataFrame:
        judged.append((set(own.images["path"]), seen[id(calibration)]))
        return judge(own, calibration)

    kept: list[classify.Calibration] = []
    monkeypatch.setattr(classify, "calibrate", calibrate_and_note)
    monkeypatch.setattr(classify, "judge", judge_and_note)
    run_classify(folder, "noted")
    assert [(bool(own), own & fitted) for own, fitted in judged] == [(True, set()), (True, set())]


def test_what_ships_is_calibrated_on_both_folds(folder: Path, predictions: pd.DataFrame, output: Path) -> None:
    (settings,) = read(output, "settings").to_dict("records")
    assert settings["min_similarity"] == pytest.approx(np.quantile(predictions["similarity"], 0.1))
    assert settings["max_strangeness"] == pytest.approx(np.quantile(predictions["strangeness"], 0.9))


def test_a_probability_is_the_softmax_of_similarities_by_the_temperature() -> None:
    own = scores([[0.5, 0.4, 0.1]], "b")
    (row,) = classify.judge(own, classify.Calibration(0.1, -1, 1)).to_dict("records")
    shares = np.exp([5, 4, 1]) / np.exp([5, 4, 1]).sum()
    assert (row["predicted"], row["probability"], row["rank"]) == ("a", pytest.approx(shares[0]), 2)
    assert row["squared_error"] == pytest.approx(((shares - [0, 1, 0]) ** 2).sum())


@pytest.mark.parametrize(
    ("similarity", "strangeness", "is_kept"), [(0.5, 0.5, True), (0.3, 0.5, False), (0.5, 0.7, False)], ids=str
)
def test_either_threshold_refuses_an_image(similarity: float, strangeness: float, is_kept: bool) -> None:
    own = scores([[similarity, 0.1, 0.1]], "a", strangeness)
    assert classify.judge(own, classify.Calibration(0.1, 0.4, 0.6))["is_kept"].tolist() == [is_kept]


def test_the_shares_are_those_of_scikit_learn(predictions: pd.DataFrame, output: Path) -> None:
    found = metrics_of(output)
    truth, predicted = predictions["label"], predictions["predicted"]
    assert found["accuracy"] == pytest.approx((truth == predicted).mean(), abs=1e-4)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"), abs=1e-4)
    assert found["brier"] == pytest.approx(predictions["squared_error"].mean(), abs=1e-4)
    assert found["kept"] == pytest.approx(predictions["is_kept"].mean(), abs=1e-4)


def test_a_label_that_is_third_is_among_the_first_three(predictions: pd.DataFrame) -> None:
    rows = predictions.reset_index().assign(rank=np.arange(len(predictions)) % 4 + 1, group="one")
    assert classify.measure(rows)["top_3"] == 0.75


def test_the_calibration_error_is_the_mean_distance_of_bins_from_the_diagonal(
    predictions: pd.DataFrame, output: Path
) -> None:
    total = 0.0
    for low in np.arange(15) / 15:
        rows = predictions[(predictions["probability"] >= low) & (predictions["probability"] < low + 1 / 15)]
        if len(rows):
            total += abs((rows["label"] == rows["predicted"]).sum() - rows["probability"].sum())
    assert metrics_of(output)["ece"] == pytest.approx(total / len(predictions), abs=2e-4)


def test_coverage_takes_the_surest_images_first(predictions: pd.DataFrame, output: Path) -> None:
    curve = pd.read_csv(output / "coverage.csv").set_index("coverage")
    surest = predictions.nlargest(int(np.ceil(0.8 * len(predictions))), "probability")
    accuracy = (surest["label"] == surest["predicted"]).mean()
    assert curve.loc[0.8, "accuracy"] == pytest.approx(accuracy, abs=1e-4) == metrics_of(output)["accuracy_of_surest_80"]
    assert curve.loc[1.0, "accuracy"] == pytest.approx(metrics_of(output)["accuracy"], abs=1e-4)


def test_recall_and_kept_are_told_of_each_label(predictions: pd.DataFrame, output: Path) -> None:
    for row in pd.read_csv(output / "labels.csv").itertuples():
        own = predictions[predictions["label"] == row.label]
        assert row.n_images == len(own)
        assert row.recall == pytest.approx((own["predicted"] == row.label).mean(), abs=1e-4)
        assert row.kept == pytest.approx(own["is_kept"].mean(), abs=1e-4)


def test_labels_that_are_left_out_are_ranked_by_their_largest_similarity() -> None:
    known, strange = np.array([0.9, 0.8, 0.3, 0.7]), np.array([0.5, 0.2, 0.85])
    parts = [(known, strange), (known, np.array([0.1]))]
    left_out = [
        classify.LeftOut(
            np.concatenate(each), np.full(sum(map(len, each)), 0.5), np.repeat([False, True], list(map(len, each)))
        )
        for each in parts
    ]
    both = [scores([[0.5, 0.1]], "a")._replace(left_out=[each]) for each in left_out]
    found = classify.unknown(both, [classify.Calibration(0.1, 0.4, 1), classify.Calibration(0.1, 0.6, 1)])["unknown"]
    pairs = [np.mean([one > other for one in known for other in each]) for _, each in parts]
    assert found["auroc"] == pytest.approx(np.mean(pairs), abs=1e-4)
    assert found["accepted"] == 0.5, "two of three are above 0.4, and the other is not above 0.6"
    assert found["false_positives"] == 0.5, "two of four are above 0.36, which 95 % of the known reach"


def test_an_unknown_image_that_is_strange_is_not_accepted() -> None:
    left_out = [classify.LeftOut(np.array([0.9, 0.9, 0.9]), np.array([0.5, 0.5, 0.8]), np.array([False, True, True]))]
    both = [scores([[0.5, 0.1]], "a")._replace(left_out=left_out)] * 2
    assert classify.unknown(both, [classify.Calibration(0.1, 0.4, 0.6)] * 2)["unknown"]["accepted"] == 0.5


def test_nothing_that_is_said_of_an_unknown_label_depends_on_its_training_images(
    images: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "PARTS", 3)  # one label each
    found = []
    for name in ("as they are", "changed"):
        if name == "changed":  # in the fold that trains the other, where they are left out; their tests stay
            is_changed = (images["label"] == "apple") & (images["fold"] == 0)
            features = [
                each * 3 + 1 if changed else each for each, changed in zip(images["features"], is_changed, strict=True)
            ]
            images = images.assign(features=features)
        write_inputs(tmp_path / name, images, K)
        args = classify.parse_args(
            [str(tmp_path / name / each) for each in ("features", "split", "covariance", "reduced", "output")]
            + ["--exemplars", "2", "--shrinkage", "0.2", "--keep", "0.9", "--max_images", "1000"]
        )
        rows = classify.read_images(args.split)
        sums = classify.read_sums(args.covariance)
        vectors = np.stack(images.set_index("image_id")["features"][rows["image_id"]])
        whole = classify.score_fold(rows, vectors, len(rows), args, sums, 1, K, "none", tqdm(disable=True))
        assert whole is not None
        found.append(whole.left_out[0])
    for one, other in zip(*map(np.asarray, found), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_sums_of_parts_are_those_of_all_their_rows_to_the_bit(images: pd.DataFrame, folder: Path) -> None:
    features, step = np.stack(images["features"]), sums_of(np.stack(images["features"]))["step"]
    found = classify.add_up([classify.sum_up(features[:20], step), classify.sum_up(features[20:], step)])
    write(pd.DataFrame([sums_of(features)]), folder / "sums")
    (expected,) = read_sums(str(folder / "sums")).values()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_of_a_large_collection_about_so_many_images_are_learnt_from_as_are_held(
    images: pd.DataFrame, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[int] = []
    fit = classify.fit

    def fit_and_note(embedding: np.ndarray, *settings: Any) -> classify.Head:
        learnt.append(len(embedding))
        return fit(embedding, *settings)

    monkeypatch.setattr(classify, "fit", fit_and_note)
    monkeypatch.setattr(classify, "N_LEARNT", len(images) // 2)
    run_classify(folder, "learnt", max_images=40)
    assert max(learnt[:-1]) == pytest.approx(len(images) // 4, rel=0.4)  # those of one fold
    assert learnt[-1] == len(images), "what ships is fitted on all"


def test_a_label_that_is_left_out_has_no_exemplar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[set[str]] = []
    fit = classify.fit

    def fit_and_note(embedding: np.ndarray, labels: np.ndarray, *settings: Any) -> classify.Head:
        fitted.append(set(labels))
        return fit(embedding, labels, *settings)

    monkeypatch.setattr(classify, "fit", fit_and_note)
    run_classify(folder, "left-out")
    three = {"apple", "banana", "cherry"}
    left_out = sorted(str(*(three - labels)) for labels in fitted if labels != three)
    assert left_out == sorted(2 * [*three])


def test_of_equal_similarities_the_first_label_is_predicted_and_has_the_first_rank() -> None:
    rows = classify.judge(scores([[0.5, 0.5, 0.5]] * 3, "abc"), classify.Calibration(0.1, -1, 1))
    assert (rows["predicted"].tolist(), rows["rank"].tolist()) == (["a"] * 3, [1, 2, 3])


def test_macro_f1_is_over_the_labels_that_are_tested(predictions: pd.DataFrame) -> None:
    rows = predictions.reset_index().assign(
        label="apple", predicted=["apple", "pear"] * (len(predictions) // 2), group="one"
    )
    assert classify.measure(rows)["macro_f1"] == pytest.approx(2 / 3, abs=1e-4), "pear is no label of the test"


def test_errors_of_two_folds_that_cancel_are_told(predictions: pd.DataFrame) -> None:
    n_images = len(predictions) // 4 * 4
    rows = predictions.reset_index()[:n_images].assign(group="one", label="apple", probability=0.5, rank=1)
    rows["fold"] = np.arange(n_images) % 2
    rows["predicted"] = np.where(rows["fold"] == 0, "apple", "pear")
    found = classify.measure(rows)
    assert (found["ece"], found["ece_in_worse_fold"]) == (0, 0.5)


def test_what_a_person_meets_is_told(predictions: pd.DataFrame, output: Path) -> None:
    is_right = predictions["label"] == predictions["predicted"]
    found = metrics_of(output)
    assert found["right"] == pytest.approx((is_right & predictions["is_kept"]).mean(), abs=1e-4)
    assert found["right"] + found["wrong"] == pytest.approx(found["kept"], abs=2e-4)


def test_where_all_components_are_kept_nothing_is_too_strange(images: pd.DataFrame, tmp_path: Path) -> None:
    write_inputs(tmp_path, images, 6)
    (settings,) = read(run_classify(tmp_path), "settings").to_dict("records")
    assert settings["max_strangeness"] == 1e-3


def test_labels_that_nobody_can_tell_apart_get_equal_probabilities() -> None:
    opposite = [[1.0, -1.0], [-1.0, 1.0]] * 20
    found = classify.calibrate([scores(opposite, "ab" * 10 + "ba" * 10)], 0.9)
    assert classify.judge(scores(opposite[:1], "a"), found)["probability"][0] == pytest.approx(0.5, abs=0.02)


def test_one_label_alone_is_not_calibrated(images: pd.DataFrame, tmp_path: Path) -> None:
    write_inputs(tmp_path, images.assign(label="apple"), K)
    output = run_classify(tmp_path)
    assert read(output, "settings").isna().all(axis=None)
    assert metrics_of(output)["images"] == 0


def test_a_label_that_has_only_copies_of_others_is_counted_as_untested(images: pd.DataFrame, tmp_path: Path) -> None:
    copies = images[:5].assign(path=[f"zucchini/{i}.jpg" for i in range(5)], label="zucchini")
    write_inputs(tmp_path, pd.concat([images, copies]), K)
    output = run_classify(tmp_path)
    assert metrics_of(output)["labels_untested"] == 1
    assert "1 of 4 labels could not be tested" in (output / "summary.txt").read_text()


def test_a_copy_of_an_image_is_judged_once(images: pd.DataFrame, tmp_path: Path) -> None:
    copies = images[:5].assign(path=[f"zucchini/{i}.jpg" for i in range(5)], label="zucchini")
    write_inputs(tmp_path, pd.concat([images, copies]), K)
    assert sorted(read(run_classify(tmp_path), "predictions")["path"]) == sorted(images["path"])


def test_of_a_large_collection_about_max_images_are_judged(tmp_path: Path) -> None:
    write_inputs(tmp_path, make_images(2000), K)
    # 500 of 2,000 by chance: 77 are four standard deviations.
    assert metrics_of(run_classify(tmp_path, max_images=500))["images"] == pytest.approx(500, abs=77)


# Where nothing can be calibrated


@pytest.fixture(scope="module")
def apart(images: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output for labels that are each in one fold only."""
    folder = tmp_path_factory.mktemp("apart")
    write_inputs(folder, images.assign(fold=(images["label"] == "apple").astype(int)), K)
    return run_classify(folder)


def test_where_folds_share_no_label_nothing_is_refused_and_no_probability_promised(apart: Path) -> None:
    assert read(apart, "settings").isna().all(axis=None)


def test_where_folds_share_no_label_it_is_said(apart: Path) -> None:
    assert metrics_of(apart) == {"images": 0, "labels": 0, "labels_untested": 3}
    assert "fewer than two labels have images in both folds" in (apart / "summary.txt").read_text()


def test_where_folds_share_no_label_the_head_is_there(apart: Path) -> None:
    assert read(apart, "exemplars")["label"].tolist() == ["apple", "banana", "cherry"]


def test_where_folds_share_no_label_each_plot_has_its_table(apart: Path, output: Path) -> None:
    names = [sorted(path.name for path in each.glob("*.csv")) for each in (apart, output)]
    assert names[0] == names[1]
