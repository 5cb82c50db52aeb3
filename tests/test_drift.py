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
from dvc.repo.metrics.show import _extract_metrics
from sklearn.decomposition import PCA

from stages import drift
from stages.analysis import Basis

NONE = pd.DataFrame({"path": [], "reason": []}, dtype=str)


def table(rows: list[tuple[str, str]], errors: list[float] | None = None) -> pd.DataFrame:
    images = pd.DataFrame(rows, columns=["image_id", "label"])
    return images.assign(path=[f"{label}/{each}.jpg" for each, label in rows], error=errors)


SAME = [("a", "Apple"), ("b", "Apple"), ("c", "Fig"), ("c", "Fig")]
EARLIER = table(SAME)[["image_id", "path", "label"]]


def compare(rows: list[tuple[str, str]], errors: list[float] | None = None) -> dict[str, Any]:
    return drift.compare(table(rows, errors), EARLIER, NONE)[0]


def lines(
    rows: list[tuple[str, str]],
    errors: list[float] | None = None,
    earlier: pd.DataFrame = EARLIER,
    suspects: pd.DataFrame = NONE,
) -> list[str]:
    return drift.compare(table(rows, errors), earlier, suspects)[1]


# Counts


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
    assert compare(rows)["new"] == {"images": images, "share": share, "labels": labels, "suspects": 0}


@pytest.mark.parametrize(
    ("rows", "images", "labels"),
    [(SAME[1:], 1, 0), (SAME[:2], 1, 1), ([("d", "Pear")], 3, 2)],
    ids=["an image", "a label", "all"],
)
def test_what_is_gone_is_counted_once(rows: list[tuple[str, str]], images: int, labels: int) -> None:
    assert compare(rows)["gone"] == {"images": images, "labels": labels}


@pytest.mark.parametrize(
    ("rows", "relabelled", "conflicting"),
    [
        ([("a", "Fig"), *SAME[1:]], 1, 0),
        ([("a", "Fig"), ("b", "Fig"), *SAME[2:]], 2, 0),
        ([*SAME, ("a", "Fig")], 0, 1),
        ([("a", "Fig"), ("a", "Pear"), *SAME[1:]], 1, 1),
        (SAME[:3], 0, 0),
        ([*SAME[1:], ("d", "Fig")], 0, 0),
        ([*SAME, ("d", "Fig"), ("d", "Pear")], 0, 1),
    ],
    ids=["moved", "two moved", "copied", "moved to two", "a copy gone", "one gone, one new", "new under two"],
)
def test_an_image_that_left_a_label_is_relabelled_and_one_that_joined_a_second_conflicting(
    rows: list[tuple[str, str]], relabelled: int, conflicting: int
) -> None:
    found = compare(rows)
    assert (found["relabelled"], found["conflicting"]) == (relabelled, conflicting)


def test_a_conflict_that_was_there_before_is_no_change() -> None:
    rows = [*SAME, ("a", "Fig")]
    assert lines(rows, earlier=table(rows)) == ["nothing changed: the same 3 images under the same labels"]


def test_a_conflict_that_ended_is_said() -> None:
    assert "relabelled: 1 image (left a label): Apple/a.jpg (Fig -> Apple)" in lines(
        SAME, earlier=table([*SAME, ("a", "Fig")])
    )


def test_an_image_to_look_at_for_two_reasons_is_counted_once() -> None:
    assert compare([("a", "Fig"), ("a", "Pear"), *SAME[1:], ("b", "Fig")])["look_at"] == 2


@pytest.mark.parametrize("seed", range(5))
def test_changes_are_those_that_sets_of_labels_tell(seed: int) -> None:
    rng = np.random.default_rng(seed)
    today, earlier = ([(f"{i:02}", f"L{j}") for i, j in rng.integers(0, (30, 4), (40, 2))] for _ in range(2))
    now, then = ({each: {label for other, label in rows if other == each} for each, _ in rows} for rows in (today, earlier))
    found = drift.compare(table(today), table(earlier), NONE)[0]
    assert (found["new"]["images"], found["gone"]["images"], found["relabelled"], found["conflicting"]) == (
        len(now.keys() - then.keys()),
        len(then.keys() - now.keys()),
        sum(bool(then[each] - now[each]) for each in now.keys() & then.keys()),
        sum(len(now[each]) > 1 and bool(now[each] - then.get(each, set())) for each in now),
    )


# Suspects


def test_suspects_are_counted_among_new_images_only() -> None:
    suspects = pd.DataFrame(
        {"path": ["Apple/a.jpg", "Fig/d.jpg", "Fig/d.jpg"], "reason": ["other label", "other label", "near a duplicate"]}
    )
    found, said = drift.compare(table([*SAME, ("d", "Fig"), ("e", "Fig")]), EARLIER, suspects)
    assert found["new"]["suspects"] == 1
    assert "suspects: 1 image (new, and in reports/suspects): Fig/d.jpg (other label)" in said


# Lines for people


def test_a_deleted_label_and_moved_and_copied_images_are_said_by_name() -> None:
    # What one figure, the number of new images, hides: a label deleted with its 130 images, five moved, three copied.
    earlier = [(f"{label}{i:03}", label) for label, n in (("Apple", 20), ("Banana", 130), ("Fig", 20)) for i in range(n)]
    moved = {f"Apple{i:03}" for i in range(5)}
    today = [(each, "Fig" if each in moved else label) for each, label in earlier if label != "Banana"]
    today += [(f"Fig{i:03}", "Apple") for i in range(3)]
    assert lines(today, earlier=table(earlier)) == [
        "look at these 8 before you trust it: Apple/Fig000.jpg, Apple/Fig001.jpg, Apple/Fig002.jpg, Fig/Apple000.jpg, "
        "Fig/Apple001.jpg and 3 more; 130 images are gone",
        "gone: 1 label, Banana; 130 images, Banana/Banana000.jpg, Banana/Banana001.jpg, Banana/Banana002.jpg, "
        "Banana/Banana003.jpg, Banana/Banana004.jpg and 125 more",
        "relabelled: 5 images (left a label): Fig/Apple000.jpg (Apple -> Fig), Fig/Apple001.jpg (Apple -> Fig), "
        "Fig/Apple002.jpg (Apple -> Fig), Fig/Apple003.jpg (Apple -> Fig), Fig/Apple004.jpg (Apple -> Fig)",
        "conflicting: 3 images (joined a label beside another): Apple/Fig000.jpg (Apple, Fig), "
        "Apple/Fig001.jpg (Apple, Fig), Apple/Fig002.jpg (Apple, Fig)",
    ]


OLD = [(f"old{i}", "Apple") for i in range(101)]
ERRORS = [*map(float, range(101))]  # so that more than 99 is unusual


@pytest.mark.parametrize(
    ("rows", "errors", "verdict"),
    [
        (OLD, ERRORS, "nothing changed: the same 101 images under the same labels"),
        (OLD[:-1], ERRORS[:-1], "1 image is gone"),
        ([*OLD, ("d", "Apple")], [*ERRORS, 50.0], "1 new image looks like the rest"),
        ([*OLD, ("d", "Apple"), ("e", "Fig")], [*ERRORS, 50.0, 50.0], "2 new images look like the rest"),
        ([*OLD[:-2], ("d", "Apple")], [*ERRORS[:-2], 50.0], "1 new image looks like the rest; 2 images are gone"),
        ([*OLD, ("d", "Apple")], [*ERRORS, 99.5], "look at this image before you trust it: Apple/d.jpg"),
        (
            [*OLD, ("d", "Apple"), ("e", "Fig"), ("f", "Fig")],
            [*ERRORS, 200.0, 300.0, 50.0],
            "look at these 2 before you trust it: Fig/e.jpg, Apple/d.jpg",
        ),
        (
            [*OLD, ("d", "Apple")],
            None,
            "1 new image cannot be measured: "
            "the network is another, or no earlier image is left, or the earlier PCA lost nothing",
        ),
    ],
    ids=["same", "gone", "alike", "two alike", "alike and gone", "unlike", "the strangest first", "another network"],
)
def test_the_first_line_is_a_verdict(rows: list[tuple[str, str]], errors: list[float] | None, verdict: str) -> None:
    assert lines(rows, errors, table(OLD))[0] == verdict


@pytest.mark.parametrize(
    ("n_unusual", "error", "n_unlike"),
    [(4, 99.5, 0), (5, 99.5, 5), (1, 200.0, 1)],
    ids=["as many as chance has", "more than chance has", "one that is beyond all"],
)
def test_unusual_images_are_unlike_where_chance_does_not_explain_them(n_unusual: int, error: float, n_unlike: int) -> None:
    # Among 100 that are like the rest, 4 or more lose over 99 in 1.8 % of deliveries, 5 or more in 0.3 %.
    new = [(f"new{i}", "Apple") for i in range(100)]
    images = table([*OLD, *new], [*ERRORS, *[error] * n_unusual, *[50.0] * (100 - n_unusual)])
    assert len(drift.compare(images, table(OLD), NONE)[0]["names"]["unlike"]) == n_unlike


# Errors


def error(rows: list[tuple[str, str]], errors: list[float]) -> dict[str, Any]:
    return compare(rows, errors)["reconstruction_error"]


def test_a_known_label_is_compared_with_the_distinct_earlier_images_of_that_label() -> None:
    # Usual are 1.5 for Apple and 3 for Fig. So (3 + 9) / (1.5 + 3).
    rows = [*SAME, ("d", "Apple"), ("d", "Apple"), ("e", "Fig")]
    found = error(rows, [1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 9.0])
    assert (found["known_labels"]["images"], found["known_labels"]["ratio"]) == (2, 2.6667)


def test_a_new_label_is_compared_with_all_earlier_images() -> None:
    found = error([*SAME, ("d", "Pear"), ("e", "Plum")], [1.0, 2.0, 3.0, 3.0, 4.0, 8.0])
    assert (found["new_labels"]["images"], found["new_labels"]["ratio"]) == (2, 3.0)


def test_an_image_that_was_moved_is_not_usual_for_its_new_label() -> None:
    # Were it, Fig's usual error would be 51.5.
    found = error([("a", "Apple"), ("b", "Fig"), ("c", "Fig"), ("d", "Fig")], [1.0, 100.0, 3.0, 6.0])
    assert found["known_labels"]["ratio"] == 2.0


def test_known_and_new_labels_are_two_figures() -> None:
    found = error([*SAME, ("d", "Apple"), ("e", "Pear")], [1.0, 2.0, 3.0, 3.0, 1.5, 8.0])
    assert {name: each["ratio"] for name, each in found.items()} == {"known_labels": 1.0, "new_labels": 4.0}


def test_each_label_with_new_images_has_a_ratio_the_worst_first() -> None:
    rows = [*SAME, ("d", "Apple"), ("e", "Pear"), ("f", "Pear"), ("f", "Pear"), ("g", "Fig")]
    assert compare(rows, [1.0, 2.0, 3.0, 3.0, 3.0, 8.0, 4.0, 4.0, 3.0])["by_label"] == [
        {"label": "Pear", "is_new": True, "images": 2, "ratio": 3.0},
        {"label": "Apple", "is_new": False, "images": 1, "ratio": 2.0},
        {"label": "Fig", "is_new": False, "images": 1, "ratio": 1.0},
    ]


def test_the_worst_labels_are_said() -> None:
    rows = [*SAME, *((f"new{i}", f"New {i}") for i in range(7))]
    said = lines(rows, [1.0, 2.0, 3.0, 3.0, *(2.0 * i for i in range(7))])
    assert said[-1].endswith("by label: New 6 6.00, New 5 5.00, New 4 4.00, New 3 3.00, New 2 2.00 and 2 more")


def test_unusual_are_those_that_lose_more_than_99_percent_of_the_earlier() -> None:
    images = table([*OLD, ("d", "Fig"), ("e", "Fig")], [*ERRORS, 98.5, 99.5])
    assert drift.compare(images, table(OLD), NONE)[0]["reconstruction_error"]["new_labels"]["unusual"] == 0.5


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
    assert "reconstruction_error" not in compare(rows, errors)


# Output


def test_dvc_shows_numbers_only() -> None:
    found = compare([*SAME[1:], ("d", "Pear"), ("c", "Apple")], [2.0, 3.0, 3.0, 4.0, 3.0])
    assert {"names", "by_label"} == {each for each in found if numbers_of(found[each]) in (None, {})}


def numbers_of(value: Any) -> Any:
    """What DVC makes of a value of a metrics file."""
    return _extract_metrics(value, "drift.json")


def test_lists_of_names_are_whole_up_to_a_thousand() -> None:
    found = compare([*SAME, *((f"{i:04}", "Pear") for i in range(1001))])
    assert found["names"]["new"] == [f"Pear/{i:04}.jpg" for i in range(1000)]


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


def test_what_is_left_by_rounding_is_no_error(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(100, 1, (50, 40)).astype(np.float32)
    write(tmp_path / "features", {"features": list(rows)})
    oracle = PCA(40).fit(rows.astype(np.float64))
    basis = Basis(oracle.mean_, np.ones(40), oracle.components_)
    assert not drift.reconstruction_errors(str(tmp_path / "features"), basis).any()


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
        (folder / "reports/suspects").mkdir(parents=True)
        (folder / "reports/suspects/suspects.csv").write_text("path,label,reason,looks_like,nearest,evidence\n")
        (folder / "backbone/backbone.json").write_text(json.dumps({"graph_sha256": "one"}))
        write(folder / "reduced/model/scaling", {"feature": [1, 0], "mean": [0.0, 2.0], "scale": [1.0, 1.0]})
        write(folder / "reduced/model/components", {"component": [1], "weights": [[1.0, 0.0]]})

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(self.folder)}
        own |= {f"GIT_{who}_{what}": "nobody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        return subprocess.run(command, cwd=self.folder, env=os.environ | own, check=True, capture_output=True, text=True)

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
        drift.main(["features", "backbone", "reports/suspects", "reduced", "reports/drift.json", "--since", since])
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
    errors = {"new_labels": {"images": 1, "ratio": 6.0, "unusual": 1.0}}
    assert (found["new"]["images"], found["reconstruction_error"]) == (1, errors)


def test_dvc_shows_the_output_and_sees_no_failure_in_it(repository: Repository) -> None:
    repository.commit()
    repository.images(MORE)
    repository.drift()
    shown = repository.run("dvc", "metrics", "show", "reports/drift.json")
    assert ("reconstruction_error.new_labels.ratio" in shown.stdout, shown.stderr) == (True, "")


def test_the_suspects_are_todays(repository: Repository) -> None:
    repository.commit()
    repository.images(MORE)
    (repository.folder / "reports/suspects/suspects.csv").write_text("path,reason,evidence\nPear/d.jpg,other label,6\n")
    assert repository.drift()["names"]["suspects"] == ["Pear/d.jpg (other label)"]


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
    assert (found["new"]["images"], "reconstruction_error" in found) == (1, False)


def test_without_an_earlier_run_nothing_is_compared_and_nothing_fails(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repository.drift() == {}
    assert capsys.readouterr().out.startswith("drift: nothing to compare with: the run of HEAD cannot be read. There is no")


def test_a_run_that_dvc_has_not_got_is_not_compared(repository: Repository) -> None:
    repository.commit()
    repository.run("rm", "-rf", ".dvc/cache")
    repository.images(MORE)
    assert repository.drift() == {}
