"""Facts about stages/drift.py: what is new since an earlier commit, and whether it looks like what was there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA

from stages import drift
from stages.analysis import Basis

EARLIER = pd.DataFrame({"image_id": ["a", "b", "c", "c"], "label": ["Apple", "Apple", "Fig", "Fig"]})


def table(rows: list[tuple[str, str]], errors: list[float] | None = None) -> pd.DataFrame:
    images = pd.DataFrame(rows, columns=["image_id", "label"])
    return images.assign(path=[f"{label}/{each}.jpg" for each, label in rows], error=errors)


def compare(rows: list[tuple[str, str]], errors: list[float] | None = None) -> dict[str, Any]:
    return drift.compare(table(rows, errors), EARLIER)[0]


SAME = [("a", "Apple"), ("b", "Apple"), ("c", "Fig"), ("c", "Fig")]


# Counts


def test_the_same_images_are_no_drift() -> None:
    assert compare(SAME) == {
        "new": {"images": 0, "share": 0.0, "labels": 0},
        "gone": {"images": 0, "labels": 0},
        "relabelled": 0,
    }


@pytest.mark.parametrize(
    ("rows", "images", "share", "labels"),
    [
        ([*SAME, ("d", "Apple")], 1, 0.25, 0),
        ([*SAME, ("d", "Pear")], 1, 0.25, 1),
        ([*SAME, ("d", "Pear"), ("d", "Pear")], 1, 0.25, 1),
        ([*SAME, ("a", "Pear")], 0, 0.0, 1),
    ],
    ids=["known label", "new label", "twice", "old image under a new label"],
)
def test_new_images_and_labels_are_counted_once(rows: list[tuple[str, str]], images: int, share: float, labels: int) -> None:
    assert compare(rows)["new"] == {"images": images, "share": share, "labels": labels}


@pytest.mark.parametrize(
    ("rows", "images", "labels"),
    [(SAME[1:], 1, 0), (SAME[:2], 1, 1), ([("d", "Pear")], 3, 2)],
    ids=["an image", "a label", "all"],
)
def test_what_is_gone_is_counted_once(rows: list[tuple[str, str]], images: int, labels: int) -> None:
    assert compare(rows)["gone"] == {"images": images, "labels": labels}


@pytest.mark.parametrize(
    ("rows", "relabelled"),
    [
        ([("a", "Fig"), *SAME[1:]], 1),
        ([*SAME, ("a", "Fig")], 1),
        ([("a", "Fig"), ("b", "Fig"), *SAME[2:]], 2),
        (SAME[:3], 0),
        ([*SAME[1:], ("d", "Fig")], 0),
    ],
    ids=["moved", "under a second label too", "two moved", "a copy gone", "one gone, one new"],
)
def test_images_are_relabelled_when_their_set_of_labels_is_another(rows: list[tuple[str, str]], relabelled: int) -> None:
    assert compare(rows)["relabelled"] == relabelled


# Errors


def test_the_ratio_is_of_mean_errors_of_distinct_images() -> None:
    rows = [*SAME, ("d", "Apple"), ("d", "Apple"), ("e", "Fig")]
    assert compare(rows, [1.0, 2.0, 3.0, 3.0, 4.0, 4.0, 8.0])["error"]["ratio"] == 3.0


def test_unusual_are_those_that_lose_more_than_99_percent_of_the_earlier() -> None:
    old = [(f"old{i}", "Apple") for i in range(101)]
    images = table([*old, ("d", "Fig"), ("e", "Fig")], [*map(float, range(101)), 98.5, 99.5])
    metrics, _ = drift.compare(images, pd.DataFrame(old, columns=["image_id", "label"]))
    assert metrics["error"]["unusual"] == 0.5


def test_the_strangest_are_named_first() -> None:
    images = table([*SAME, ("d", "Apple"), ("e", "Fig")], [1.0, 2.0, 3.0, 3.0, 4.0, 8.0])
    assert drift.compare(images, EARLIER)[1].endswith("First to look at: Fig/e.jpg, Apple/d.jpg")


@pytest.mark.parametrize(
    ("rows", "errors"),
    [
        (SAME, [1.0, 2.0, 3.0, 3.0]),
        ([("x", "Fig"), ("y", "Fig")], [1.0, 2.0]),
        ([*SAME, ("d", "Fig")], None),
        ([*SAME, ("d", "Fig")], [0.0] * 5),
    ],
    ids=["none is new", "all are new", "another backbone", "nothing is lost"],
)
def test_where_nothing_can_be_compared_there_is_no_error(rows: list[tuple[str, str]], errors: list[float] | None) -> None:
    assert "error" not in compare(rows, errors)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_errors_are_those_of_scikit_learn(k: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    earlier, today = rng.normal(3, rng.uniform(1, 5, 8), (200, 8)), rng.normal(2, 4, (70, 8)).astype(np.float32)
    write(tmp_path / "features", {"features": list(today)}, n_files=3)
    oracle = PCA(k).fit(earlier)
    basis = Basis(oracle.mean_, np.ones(8), oracle.components_)
    lost = today - oracle.inverse_transform(oracle.transform(today))
    np.testing.assert_allclose(
        drift.reconstruction_errors(str(tmp_path / "features"), basis), (lost**2).sum(axis=1), rtol=1e-9, atol=1e-9
    )


def test_errors_are_of_scaled_features(tmp_path: Path) -> None:
    rows = np.array([[3.0, 40.0], [1.0, 0.0]], np.float32)
    write(tmp_path / "features", {"features": list(rows)})
    basis = Basis(np.array([1.0, 20.0]), np.array([2.0, 10.0]), np.array([[1.0, 0.0]]))
    assert drift.reconstruction_errors(str(tmp_path / "features"), basis).tolist() == [4.0, 4.0]


# The stage, in a repository


def write(folder: Path, columns: dict[str, Any], n_files: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = pa.table(columns)
    each = -(-len(rows) // n_files)
    for i in range(n_files):
        pq.write_table(rows.slice(i * each, each), folder / f"part-{i:05d}.parquet")


class Repository:
    """A git repository with what drift reads, tracked by DVC."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run("git", "init", "--quiet")
        self.run("dvc", "init", "--quiet")
        self.images([("a", "Apple", [1, 0]), ("b", "Apple", [2, 1]), ("c", "Fig", [3, -1])])
        (folder / "backbone").mkdir()
        (folder / "reports").mkdir()
        (folder / "backbone/backbone.json").write_text(json.dumps({"graph_sha256": "one"}))
        write(folder / "reduced/model/scaling", {"feature": [1, 0], "mean": [0.0, 2.0], "scale": [1.0, 1.0]})
        write(folder / "reduced/model/components", {"component": [1], "weights": [[1.0, 0.0]]})

    def run(self, *command: str) -> None:
        own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(self.folder)}
        own |= {f"GIT_{who}_{what}": "nobody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        subprocess.run(command, cwd=self.folder, env=os.environ | own, check=True, capture_output=True)

    def images(self, rows: list[tuple[str, str, list[float]]]) -> None:
        (self.folder / "features/part-00000.parquet").unlink(missing_ok=True)  # a link into DVC's cache
        ids, labels, features = zip(*rows, strict=True)
        paths = [f"{label}/{each}.jpg" for each, label in zip(ids, labels, strict=True)]
        write(
            self.folder / "features",
            {"image_id": ids, "path": paths, "label": labels, "features": [np.array(each, np.float32) for each in features]},
        )

    def commit(self) -> None:
        self.run("dvc", "add", "--quiet", "features", "backbone", "reduced")
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "Run")

    def drift(self, since: str = "HEAD") -> dict[str, Any]:
        drift.main(["features", "backbone", "reduced", "reports/drift.json", "--since", since])
        return json.loads((self.folder / "reports/drift.json").read_text())


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    monkeypatch.chdir(tmp_path)
    return Repository(tmp_path)


MORE = [("a", "Apple", [1.0, 0.0]), ("b", "Apple", [2.0, 1.0]), ("c", "Fig", [3.0, -1.0]), ("d", "Pear", [9.0, 2.0])]


def test_todays_images_are_compared_with_the_last_commits(repository: Repository) -> None:
    repository.commit()
    repository.images(MORE)
    found = repository.drift()
    # Lost by projection on the first axis: 0, 1 and 1 of the earlier, 4 of the new one.
    assert (found["new"], found["error"]) == (
        {"images": 1, "share": 0.25, "labels": 1},
        {"ratio": 6.0, "unusual": 1.0},
    )


def test_an_earlier_commit_can_be_named(repository: Repository) -> None:
    repository.commit()
    repository.images(MORE)
    repository.commit()
    assert [repository.drift(since)["new"]["images"] for since in ("HEAD", "HEAD~1")] == [0, 1]


def test_features_of_another_backbone_are_not_compared(repository: Repository) -> None:
    repository.commit()
    repository.images(MORE)
    (repository.folder / "backbone/backbone.json").unlink()
    (repository.folder / "backbone/backbone.json").write_text(json.dumps({"graph_sha256": "two"}))
    found = repository.drift()
    assert (found["new"]["images"], "error" in found) == (1, False)


def test_without_an_earlier_run_nothing_is_compared_and_nothing_fails(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repository.drift() == {}
    assert "nothing to compare with: the run of HEAD is not to be had" in capsys.readouterr().out


def test_a_run_that_dvc_has_not_got_is_not_compared(repository: Repository) -> None:
    repository.commit()
    repository.run("rm", "-rf", ".dvc/cache")
    repository.images(MORE)
    assert repository.drift() == {}
