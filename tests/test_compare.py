"""Facts about reports/compare.py: what it says of two runs that differ in one thing."""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.decomposition import PCA

from reports import compare
from tests.helpers import STEP, on_grid, run, sums_of

N, N_FEATURES = 400, 6
STAGES = list(compare.STAGES)
FEATURES = on_grid(np.random.default_rng(0).normal(5, [4, 3, 2, 1, 0.5, 0.1], (N, N_FEATURES)))
IMAGES = pd.DataFrame({"image_id": [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(N)]}).assign(
    label=lambda images: ["Apple" if each < "8" else "Fig" for each in images["image_id"]],
    path=lambda images: images["label"] + "/" + images["image_id"].str[:6] + ".jpg",
    film=lambda images: [None if each < "4" else "Fig/r" for each in images["image_id"]],
    group=lambda images: images["image_id"],
    fold=np.arange(N) % 2,
)
PREDICTED = ("features_nearest_neighbour", "pixels_nearest_neighbour", "features_linear_probe", "pixels_linear_probe")
MODEL = {"labels": ["Apple", "Fig"], "calibrated": True, "pixels": {"width": 224}, "k": 2, "n_exemplars": 4, "files": {}}
METRICS = {"images": {"images": N}, "variance": {"components": 2, "k95": 3}, "nearest_neighbour": {"embedding": 0.9}}


def write(table: pd.DataFrame, folder: Path, n_files: int = 1) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    columns = {name: pa.array(table[name].tolist(), pa.int32() if name == "fold" else None) for name in table}
    rows = pa.table(columns)
    for i in range(n_files):
        pq.write_table(rows.take(list(range(i, len(rows), n_files))), folder / f"part-{i:05d}.parquet")


def write_run(folder: Path, features: np.ndarray = FEATURES, images: pd.DataFrame = IMAGES, k: int = 2) -> Path:
    """A folder with all that the pipeline writes, of these features."""
    data = folder / "data"
    (data / "backbone").mkdir(parents=True)
    (data / "backbone/backbone.json").write_text(json.dumps({"name": "net", "graph_sha256": "one"}))
    (data / "backbone/graph.pb").write_bytes(b"one")
    pictures = images.assign(width=4, height=4, content_id=images["image_id"], content=b"jpeg", thumbnail=[bytes(768)] * N)
    write(pictures, data / "ingested/images")
    write(pd.DataFrame({"path": ["Fig/x.jpg"], "label": ["Fig"], "reason": ["empty"]}), data / "ingested/quarantine")
    write(pd.DataFrame({"path": ["readme.md"], "reason": ["no_image"], "kind": ["md"]}), data / "ingested/ignored")
    write(images.assign(features=list(features)), data / "features")
    write(images, data / "split/images")
    wide = features.astype(np.float64)
    write(pd.DataFrame([sums_of(features[images["fold"] == fold], fold) for fold in (0, 1)]), data / "covariance")
    pca = PCA(svd_solver="full").fit(wide)
    numbers = range(1, N_FEATURES + 1)
    spectrum = pd.DataFrame({"component": numbers, "explained_variance": pca.explained_variance_})
    write(spectrum, data / "reduced/model/spectrum")
    write(spectrum[:k].assign(weights=list(pca.components_[:k])), data / "reduced/model/components")
    write(pd.DataFrame({"feature": numbers, "mean": pca.mean_, "scale": 1.0}), data / "reduced/model/scaling")
    write(pd.DataFrame({"k": [k], "scale": ["none"]}), data / "reduced/model/settings")
    embeddings = list(pca.transform(wide)[:, :k].astype(np.float32))
    write(images[["image_id", "path", "label"]].assign(embedding=embeddings), data / "reduced/embeddings")
    write(images.assign(**dict.fromkeys(PREDICTED, images["label"])), data / "baseline")
    (folder / "reports/evaluation").mkdir(parents=True)
    (folder / "reports/evaluation/metrics.json").write_text(json.dumps(METRICS))
    predictions = images[["path", "label"]].assign(predicted=images["label"])
    predictions.to_csv(folder / "reports/evaluation/predictions.csv", index=False)
    write(predictions.assign(fold=images["fold"]), data / "classifier/predictions")
    (data / "classifier/metrics.json").write_text(json.dumps({"recognition": {"accuracy": 0.9}}))
    (data / "model").mkdir()
    (data / "model/model.json").write_text(json.dumps(MODEL | {"labels": sorted(set(images["label"]))}))
    return folder


def change(table: Path, column: str, how: Callable[[np.ndarray], Any]) -> None:
    """Write a table anew with another column, made of an array of the old one."""
    rows = pq.read_table(table).to_pandas()
    write(rows.assign(**{column: list(how(np.array(rows[column].to_list())))}), table)


def replace_first(value: Any) -> Callable[[np.ndarray], list[Any]]:
    return lambda column: [value, *column[1:]]


class Said(NamedTuple):
    """What the command printed, and how it ended."""

    status: int
    text: str
    error: str

    def of(self, stage: str) -> list[str]:
        """How far the stage's outputs are the same, and what was seen."""
        lines = self.text.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{stage} "))
        seen = itertools.takewhile(lambda line: line.startswith(" "), lines[start + 1 :])
        return [lines[start].removeprefix(stage).strip(), *map(str.strip, seen)]

    def levels(self) -> list[str]:
        return [self.of(stage)[0] for stage in STAGES]


Say = Callable[..., Said]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    return lambda *runs: Said(compare.main([str(each) for each in runs]), *capsys.readouterr())


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a")


@pytest.fixture
def b(a: Path) -> Path:
    """The same run in another folder, for a test to change."""
    return Path(shutil.copytree(a, a.with_name("b")))


def test_equal_runs_are_the_same_bytes(a: Path, b: Path, say: Say) -> None:
    said = say(a, b)
    assert (said.status, said.levels()) == (0, ["same bytes"] * len(STAGES))
    assert said.text.endswith("compare: same bytes\n")


# Features


def noise(size: float) -> np.ndarray:
    """FEATURES, each vector moved by a share of its norm."""
    direction = np.random.default_rng(1).normal(size=FEATURES.shape)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return (FEATURES + size * np.linalg.norm(FEATURES, axis=1, keepdims=True) * direction).astype(np.float32)


@pytest.mark.parametrize(("size", "status"), [(1e-6, 0), (1e-2, 1)])
def test_features_that_differ_in_their_last_digits_are_the_same_but_for_rounding(
    tmp_path: Path, a: Path, say: Say, size: float, status: int
) -> None:
    said = say(a, write_run(tmp_path / "b", noise(size)))
    verdict = "different, from featurize on" if status else "the same but for rounding (tolerance: 1e-03 of float32, 1e-10"
    assert said.status == status
    assert f"\ncompare: {verdict}" in said.text


def test_differences_are_told_relative_to_the_norm(a: Path, b: Path, say: Say) -> None:
    change(b / "data/features", "features", lambda rows: rows * np.linspace(1, 0.99, N)[:, None].astype(np.float32))
    assert "relative difference 1.0e-02 at most (rounding: up to 1e-03), 5.0e-03 in the median" in "\n".join(
        say(a, b).of("featurize")
    )


def test_features_of_two_images_swapped_are_different(a: Path, b: Path, say: Say) -> None:
    change(b / "data/features", "features", lambda rows: rows[[1, 0, *range(2, N)]])
    said = say(a, b)
    assert (said.status, said.levels()[:3]) == (1, ["same bytes", "same bytes", "different"])
    assert all(path in said.of("featurize")[2] for path in IMAGES["path"][:2])


def test_a_vector_that_is_not_finite_is_different(a: Path, b: Path, say: Say) -> None:
    change(b / "data/features", "features", lambda rows: [rows[0] * np.nan, *rows[1:]])
    assert "relative difference inf at most" in "\n".join(say(a, b).of("featurize"))


def test_vectors_of_another_length_are_different(a: Path, b: Path, say: Say) -> None:
    change(b / "data/features", "features", lambda rows: rows[:, :5])
    assert "numbers in a vector: 6 | 5" in "\n".join(say(a, b).of("featurize"))


def test_the_share_of_images_with_the_same_nearest_neighbour() -> None:
    keys = pd.DataFrame({"image_id": ["a", "b", "c"], "path": ["a", "b", "c"]})
    x, y = np.array([[0.0], [1.0], [3.0]]), np.array([[0.0], [1.0], [1.5]])  # nearest: 1, 0, 1 and 1, 2, 1
    said = list(compare.compare_vectors("features", [(keys, x, y)], 3, 1.0))
    assert said[-1] == (False, "same nearest neighbour: 2 of 3 images")


def test_rows_in_other_files_are_compared_all_the_same(a: Path, b: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SLICE", 64)
    rows = pq.read_table(b / "data/features").to_pandas()
    write(rows.iloc[::-1], b / "data/features", n_files=3)
    said = say(a, b)
    assert "features of 400 images: relative difference 0.0e+00" in "\n".join(said.of("featurize"))
    assert (said.status, said.levels()[2]) == (0, "rounding")


# Rows


def test_another_label_is_different_from_ingest_on_and_names_the_file(tmp_path: Path, a: Path, say: Say) -> None:
    images = IMAGES.assign(label=replace_first("Pear")(IMAGES["label"].to_numpy()))
    said = say(a, write_run(tmp_path / "b", images=images))
    before = IMAGES.iloc[0]
    assert f"other label: 1 of 400 ({before.path}: {before.label} | Pear)" in "\n".join(said.of("ingest"))
    assert (said.status, said.levels()) == (1, ["same bytes", *["different"] * 3, "same bytes", *["different"] * 5])
    assert said.text.endswith("compare: different, from ingest on\n")


@pytest.mark.parametrize(("column", "value"), [("film", "Fig/r2"), ("label", "Pear"), ("width", 5)])
def test_another_value_of_an_image_is_different(a: Path, b: Path, say: Say, column: str, value: object) -> None:
    change(b / "data/ingested/images", column, replace_first(value))
    assert f"other {column}: 1 of 400 ({IMAGES['path'][0]}: " in "\n".join(say(a, b).of("ingest"))


def test_a_moved_file_is_in_one_run_here_and_in_the_other_there(a: Path, b: Path, say: Say) -> None:
    change(b / "data/ingested/images", "path", replace_first("Fig/moved.jpg"))
    said = say(a, b)
    assert said.of("ingest") == ["different", f"only in {a}: 1 ({IMAGES['path'][0]})", f"only in {b}: 1 (Fig/moved.jpg)"]


def test_of_many_images_that_are_gone_three_are_named(a: Path, b: Path, say: Say) -> None:
    write(pq.read_table(b / "data/features").to_pandas()[10:], b / "data/features")
    gone = IMAGES[:10].sort_values(["image_id", "path"])["path"]
    assert f"only in {a}: 10 ({', '.join(gone[:3])})" in "\n".join(say(a, b).of("featurize"))


def test_a_file_refused_for_another_reason_is_different(a: Path, b: Path, say: Say) -> None:
    change(b / "data/ingested/quarantine", "reason", replace_first("truncated"))
    assert "quarantine: other reason: 1 of 1 (Fig/x.jpg: empty | truncated)" in "\n".join(say(a, b).of("ingest"))


def test_a_file_ignored_as_another_kind_is_different(a: Path, b: Path, say: Say) -> None:
    change(b / "data/ingested/ignored", "kind", lambda kinds: ["txt" for _ in kinds])
    assert "ignored: other kind: 1 of 1 (readme.md: md | txt)" in "\n".join(say(a, b).of("ingest"))


def test_a_run_of_a_version_without_ignored_files_can_be_compared(a: Path, b: Path, say: Say) -> None:
    shutil.rmtree(b / "data/ingested/ignored")
    assert f"ignored: no table in {b}, as in version 0.1.0" in "\n".join(say(a, b).of("ingest"))


def test_the_same_picture_packed_anew_is_rounding(a: Path, b: Path, say: Say) -> None:
    change(b / "data/ingested/images", "content_id", replace_first("another"))
    said = say(a, b)
    assert (said.status, said.of("ingest")) == (0, ["rounding", "other content: 1 of 400"])


def test_another_picture_is_different(a: Path, b: Path, say: Say) -> None:
    change(b / "data/ingested/images", "thumbnail", lambda all_of: [bytes(767) + b"\1", *[bytes(768)] * (N - 1)])
    assert say(a, b).of("ingest") == ["different", "other pixels in the thumbnail: 1 of 400"]


# Backbone and moments


@pytest.mark.parametrize(("key", "level"), [("graph_sha256", "rounding"), ("name", "different")])
def test_another_network_is_different_and_another_graph_of_it_is_not(
    a: Path, b: Path, say: Say, key: str, level: str
) -> None:
    file = b / "data/backbone/backbone.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {key: "two"}))
    assert say(a, b).of("backbone") == [level, f"{key}: {before[key]} | two"]


def test_from_the_same_features_one_step_more_in_a_sum_is_different(a: Path, b: Path, say: Say) -> None:
    moved = FEATURES + np.float32(STEP) * (np.arange(N) == 0)[:, None]
    write(pd.DataFrame([sums_of(moved[IMAGES["fold"] == fold], fold) for fold in (0, 1)]), b / "data/covariance")
    said = say(a, b)
    assert said.of("covariance")[0] == "different"
    assert re.search(r"mean of fold 0: relative difference \S+ \(rounding: up to 1e-10\)", "\n".join(said.of("covariance")))


def test_features_that_differ_before_they_are_rounded_to_the_grid_are_the_same_but_for_rounding() -> None:
    # As of a network: its step is some 2**-8 of a feature's size, and another processor moves features by 5e-6 of it.
    random = np.random.default_rng(0)
    features = np.abs(random.normal(size=(500, 1280)))
    there = features + 5e-6 * random.normal(size=features.shape)
    x, y = (np.rint(each * 2**8) / 2**8 for each in (features, there))
    keys = pd.DataFrame({"image_id": ["a"] * 500, "path": map(str, range(500))})
    assert [is_more for is_more, _ in compare.compare_vectors("features", [(keys, x, y)], 500, compare.FLOAT32)] == [False]


# Components


def turn(folder: Path, rotation: np.ndarray) -> None:
    """Turn the two components, and the embeddings with them."""
    change(folder / "data/reduced/model/components", "weights", lambda rows: rotation @ rows)
    change(folder / "data/reduced/embeddings", "embedding", lambda rows: (rows @ rotation.T).astype(np.float32))


def rotation_by(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def angle_in(said: Said) -> float:
    (line,) = (line for line in said.of("reduce") if line.startswith("largest angle"))
    return float(line.split(": ")[1].split()[0])


def test_components_turned_within_their_space_are_the_same_but_for_rounding(a: Path, b: Path, say: Say) -> None:
    turn(b, rotation_by(0.5))
    said = say(a, b)
    assert angle_in(said) < 1e-12
    assert (said.status, said.of("reduce")[0]) == (0, "rounding")


def test_components_turned_without_their_embeddings_are_different(a: Path, b: Path, say: Say) -> None:
    change(b / "data/reduced/model/components", "weights", lambda rows: rotation_by(0.5) @ rows)
    said = say(a, b)
    assert angle_in(said) < 1e-12
    assert said.status == 1


def test_the_angle_between_two_spaces(a: Path, b: Path, say: Say) -> None:
    outside = PCA().fit(FEATURES.astype(np.float64)).components_[2]
    change(
        b / "data/reduced/model/components", "weights", lambda rows: [rows[0], np.cos(0.3) * rows[1] + np.sin(0.3) * outside]
    )
    said = say(a, b)
    assert angle_in(said) == pytest.approx(0.3)
    assert (said.status, said.of("reduce")[0]) == (1, "different")


def test_another_k_is_different_though_one_space_holds_the_other(tmp_path: Path, a: Path, say: Say) -> None:
    said = say(a, write_run(tmp_path / "b", k=3))
    assert angle_in(said) < 1e-12
    assert "k: 2 | 3" in said.of("reduce")
    assert said.text.endswith("compare: different, from reduce on\n")


@pytest.mark.parametrize("column", ["mean", "scale"])
def test_another_scaling_is_different(a: Path, b: Path, say: Say, column: str) -> None:
    change(b / "data/reduced/model/scaling", column, lambda values: values * 1.001)
    assert f"{column} of the features: relative difference 1.0e-03 (rounding: up to 1e-10)" in "\n".join(
        say(a, b).of("reduce")
    )


# Predictions and metrics


@pytest.mark.parametrize(("n_other", "level"), [(2, "rounding"), (3, "different")])
def test_one_prediction_in_two_hundred_may_change(a: Path, b: Path, say: Say, n_other: int, level: str) -> None:
    change(b / "data/baseline", PREDICTED[0], lambda labels: ["Pear"] * n_other + list(labels[n_other:]))
    said = say(a, b)
    assert said.of("baseline") == [level, f"other {PREDICTED[0]}: {n_other} of 400 (rounding: up to 0.5%)"]


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"nearest_neighbour": {"embedding": 0.9001}}, ["rounding", "other bytes, but the same in all that is compared"]),
        ({"nearest_neighbour": {"embedding": 0.904}}, ["rounding", "nearest_neighbour.embedding: 0.9 | 0.904"]),
        ({"nearest_neighbour": {"embedding": 0.906}}, ["different", "nearest_neighbour.embedding: 0.9 | 0.906"]),
        ({"images": {"images": 401}}, ["different", "images.images: 400 | 401"]),
        ({"variance": {"components": 2, "k95": 4}}, ["rounding", "variance.k95: 3 | 4"]),
        ({"variance": {"components": 2}}, ["different", "variance.k95: 3 | None"]),
    ],
    ids=["last digit", "a few predictions", "many", "a count", "where a curve crosses a line", "gone"],
)
def test_metrics_that_differ_are_told_with_both_values(
    a: Path, b: Path, say: Say, changed: dict[str, Any], lines: list[str]
) -> None:
    (b / "reports/evaluation/metrics.json").write_text(json.dumps(METRICS | changed))
    assert say(a, b).of("evaluate") == lines


# Parameters and code


def lock(folder: Path, k: int, code: str, images: str) -> None:
    deps = [{"path": "stages/reduce.py", "md5": code}, {"path": images, "md5": "x"}]
    entry = {"deps": deps, "params": {"params.yaml": {"reduce": {"k": k, "scale": "none"}}}}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": {"reduce": entry}}))


def test_what_explains_a_difference_is_named(a: Path, b: Path, say: Say) -> None:
    lock(a, 2, "one", "data/sample")
    lock(b, 3, "two", "data/mine")
    assert say(a, b).of("reduce") == [
        "same bytes",
        "parameter reduce.k: 2 | 3",
        f"only {b} reads data/mine",
        f"only {a} reads data/sample",
        "other code: stages/reduce.py",
    ]


@pytest.mark.parametrize(("n_other", "level"), [(2, "rounding"), (3, "different")])
def test_a_few_other_answers_of_the_classifier_are_rounding(n_other: int, level: str, a: Path, b: Path, say: Say) -> None:
    change(b / "data/classifier/predictions", "predicted", lambda rows: ["Pear"] * n_other + list(rows[n_other:]))
    assert say(a, b).of("classify") == [level, f"other predicted: {n_other} of 400 (rounding: up to 0.5%)"]


def test_another_accuracy_of_the_classifier_is_told(a: Path, b: Path, say: Say) -> None:
    (b / "data/classifier/metrics.json").write_text(json.dumps({"recognition": {"accuracy": 0.8}}))
    assert say(a, b).of("classify") == ["different", "recognition.accuracy: 0.9 | 0.8"]


@pytest.mark.parametrize("name", ["labels", "calibrated", "pixels", "k", "n_exemplars"])
def test_a_model_that_answers_in_other_words_is_different(name: str, a: Path, b: Path, say: Say) -> None:
    (b / "data/model/model.json").write_text(json.dumps(MODEL | {name: None}))
    assert say(a, b).of("export") == ["different", f"{name}: {MODEL[name]} | None"]


def test_a_model_of_other_bytes_that_answers_in_the_same_words_is_rounding(a: Path, b: Path, say: Say) -> None:
    (b / "data/model/model.json").write_text(json.dumps(MODEL | {"files": {"model.tflite": "other"}}))
    assert say(a, b).of("export")[0] == "rounding"


# What is not there


def test_a_run_that_nobody_knows_is_said_in_one_line(repository: Path, a: Path, say: Say) -> None:
    said = say("nobodys-name", a)
    assert (said.status, said.text) == (2, "")
    assert said.error.splitlines() == [
        "compare: nobodys-name is no folder with a run in it, and no revision with one: unknown Git revision 'nobodys-name'"
    ]


def test_data_that_a_folder_lacks_is_said_in_one_line(a: Path, b: Path, say: Say) -> None:
    for name in ("baseline", "features"):
        shutil.rmtree(b / "data" / name)
    said = say(a, b)
    assert (said.status, said.levels().count("not there"), said.levels().count("same bytes")) == (2, 2, len(STAGES) - 2)
    assert said.error == f"compare: {b} has not all data; run `dvc pull` or `dvc repro` there\n"


def test_a_difference_is_told_though_other_data_is_not_there(a: Path, b: Path, say: Say) -> None:
    shutil.rmtree(b / "data/baseline")
    change(b / "data/features", "features", lambda rows: rows + 1)
    assert say(a, b).status == 1


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose dvc.lock has a run that was computed elsewhere; none of its data is here."""
    folder = tmp_path / "repository"
    folder.mkdir()
    outputs = {stage: path for stage, (path, _) in compare.STAGES.items()}
    pipeline = {stage: {"cmd": "true", "outs": [path]} for stage, path in outputs.items()}
    locked = {
        stage: {"cmd": "true", "outs": [{"path": path, "hash": "md5", "md5": f"{i:032x}.dir"}]}
        for i, (stage, path) in enumerate(outputs.items())
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": pipeline}))
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": locked}))
    for command in (
        "git init -q",
        "git config user.name tester",
        "git config user.email tester@localhost",
        "dvc init -q",
        "git add .",
        "git commit -q -m run",
    ):
        run(*command.split(), cwd=folder)
    monkeypatch.chdir(folder)
    return folder


def test_a_revision_whose_data_is_nowhere_is_said_in_one_line(repository: Path, a: Path, say: Say) -> None:
    said = say("HEAD", a)
    assert (said.status, said.levels()) == (2, ["not there"] * len(STAGES))
    assert said.error == (
        "compare: the data of HEAD is neither in DVC's cache nor in its remote; "
        "run `dvc push` where it was computed, or name that folder instead\n"
    )


def test_a_revision_from_before_a_stage_is_told_apart(repository: Path, a: Path, say: Say) -> None:
    for name in ("dvc.yaml", "dvc.lock"):
        stages = yaml.safe_load(Path(name).read_text())
        del stages["stages"]["baseline"]
        Path(name).write_text(yaml.safe_dump(stages))
    run("git", "commit", "-q", "-a", "-m", "earlier", cwd=repository)
    assert "the dvc.lock of HEAD has no data/baseline; run `dvc repro` there and commit" in say("HEAD", a).error


def test_hashes_of_two_revisions_are_enough(repository: Path, say: Say) -> None:
    said = say("HEAD", "HEAD")
    assert (said.status, said.levels()) == (0, ["same bytes"] * len(STAGES))


def test_a_lock_whose_data_is_not_there_is_not_believed_of_the_workspace(repository: Path, a: Path, say: Say) -> None:
    shutil.copytree(a / "data/features", "data/features")
    said = say("HEAD")
    assert (said.status, said.levels()) == (2, ["not there"] * len(STAGES))


# A real run


@pytest.mark.slow
def test_an_experiment_is_found_by_its_name(clone: Path, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    run("dvc", "exp", "run", "--name", "fewer", "-S", "reduce.k=4", cwd=clone)
    monkeypatch.chdir(clone)
    said = say("HEAD", "fewer")
    assert (said.status, said.levels()) == (1, [*["same bytes"] * 5, "different", "same bytes", *["different"] * 3])
    assert {"k: 8 | 4", "parameter reduce.k: 8 | 4"} < set(said.of("reduce"))
    assert say("fewer").text.endswith("compare: same bytes\n")


@pytest.mark.slow
def test_the_workspace_is_what_is_there_and_not_what_its_lock_says(
    clone: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    monkeypatch.chdir(clone)
    run("git", "checkout", "--force", "HEAD", cwd=clone)
    run("dvc", "checkout", "--force", cwd=clone)
    assert say("HEAD").status == 0
    change(clone / "data/features", "features", lambda rows: rows + np.float32(1))
    said = say("HEAD")
    assert (said.status, said.levels()[2]) == (1, "different")
