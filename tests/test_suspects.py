"""Facts about the photographs that are suspect, and about how many are really different; plain loops are the oracle."""

import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reports import report
from stages import analysis, suspects
from tests.helpers import ROOT, digest

N_NEIGHBOURS = 6
NEAR, ACROSS = 0.3, 0.1
FLAGS = {"share": 0.8, "margin": 0.7, "outlier": 4.0}


def unit(sketches: Any) -> np.ndarray:
    wide = np.asarray(sketches, np.float64)
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)


def make(n_labels: int = 4, n_groups: int = 3, size: int = 10, spread: float = 0.02, seed: int = 0) -> pd.DataFrame:
    """Photographs of labels, each of some groups; groups of one label are nearer to one another than to those of others."""
    random = np.random.default_rng(seed)
    label, group = np.divmod(np.repeat(np.arange(n_labels * n_groups), size), n_groups)
    centres = unit(random.normal(size=(n_labels, 16)))
    films = centres[:, None] + 0.4 * unit(random.normal(size=(n_labels * n_groups, 16))).reshape(n_labels, n_groups, 16)
    sketches = unit(films[label, group] + spread * random.normal(size=(len(label), 16)))
    return table(
        (f"label {label[i]}/{i:04}.jpg", f"label {label[i]}", f"{label[i]} {group[i]}", sketches[i])
        for i in range(len(label))
    )


def table(rows: Any) -> pd.DataFrame:
    """Of (path, label, group, sketch); the image_id follows from the sketch, so that equal ones are copies."""
    images = pd.DataFrame(rows, columns=["path", "label", "group", "sketch"])
    images["sketch"] = list(unit(np.stack(images["sketch"]))) if len(images) else []
    return images.assign(image_id=[digest(str(each.tolist())) for each in images["sketch"]])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)))


def neighbours_of(images: pd.DataFrame) -> dict[str, list[tuple[float, str]]]:
    distinct = images.drop_duplicates("image_id")
    pairs = list(zip(distinct["image_id"], distinct["sketch"], strict=True))
    return {
        image_id: sorted((distance(sketch, other), its) for its, other in pairs if its != image_id)[:N_NEIGHBOURS]
        for image_id, sketch in pairs
    }


def write(rows: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.table(rows), folder / "part-00000.parquet")


def run(folder: Path, images: pd.DataFrame, reviewed: str = "path,image_id\n", near: float = NEAR, **flags: float) -> Path:
    """Write the tables of these photographs and run the stage; where it wrote to."""
    found = neighbours_of(images)
    text, ids = pa.string(), sorted(found)
    columns = {name: pa.array(images[name], text) for name in ("image_id", "path", "label", "group")}
    sketches = pa.array([each.tobytes() for each in images["sketch"]], pa.binary())
    write({name: columns[name] for name in ("image_id", "path", "label")} | {"sketch": sketches}, folder / "n/sketches")
    others = pa.array([[other for _, other in found[each]] for each in ids], pa.list_(text))
    distances = pa.array([[far for far, _ in found[each]] for each in ids], pa.list_(pa.float32()))
    write({"image_id": pa.array(ids, text), "neighbours": others, "distances": distances}, folder / "n/neighbours")
    write(columns, folder / "split/images")
    write({"near_distance": [near], "near_distance_across_labels": [min(near, ACROSS)]}, folder / "split/settings")
    (folder / "reviewed.csv").write_text(reviewed)
    words = [word for name, value in (FLAGS | flags).items() for word in (f"--{name}", str(value))]
    places = [str(folder / name) for name in ("n", "split", "reviewed.csv", "out")]
    suspects.main([*places, *words])
    return folder / "out"


def listed(output: Path, reason: str | None = None) -> pd.DataFrame:
    rows = pd.read_csv(output / "suspects.csv", keep_default_na=False)
    return rows if reason is None else rows[rows["reason"] == reason]


def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def relabel(images: pd.DataFrame, rows: Any, label: str) -> pd.DataFrame:
    changed = images.copy()
    changed.loc[rows, "label"] = label
    return changed


# Labels


@pytest.fixture(scope="module")
def images() -> pd.DataFrame:
    return make()


def test_nobody_is_suspect_where_all_is_right(tmp_path: Path, images: pd.DataFrame) -> None:
    assert len(listed(run(tmp_path, images))) == 0


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_labels_changed_at_random_are_found_and_no_others(share: float, tmp_path: Path) -> None:
    clean = make(n_labels=6, n_groups=2, size=25)
    random = np.random.default_rng(1)
    changed = random.choice(len(clean), round(share * len(clean)), replace=False)
    noisy = clean.copy()
    for i in changed:
        noisy.loc[i, "label"] = random.choice(sorted({*clean["label"]} - {clean["label"][i]}))
    found = listed(run(tmp_path, noisy)).set_index("path")
    assert {*found.index} == {*clean["path"][changed]}
    assert found["looks_like"].to_dict() == clean.set_index("path")["label"][found.index].to_dict()


def test_by_label_are_suspect_those_whose_neighbours_say_so(tmp_path: Path) -> None:
    images = make(spread=0.3)
    random = np.random.default_rng(3)
    images["label"] = np.where(random.random(len(images)) < 0.15, random.permutation(images["label"]), images["label"])
    label = images.drop_duplicates("image_id").set_index("image_id")["label"]
    expected = {}
    for image_id, near in neighbours_of(images).items():
        ((most, n),) = Counter(label[other] for _, other in near).most_common(1)
        if most != label[image_id] and n >= 5:
            expected[image_id] = (most, n)
    found = listed(run(tmp_path, images), "label")
    said = found["evidence"].str.extract(r"^(\d) of 6 neighbours are ")[0].astype(int)
    assert dict(zip(found["image_id"], zip(found["looks_like"], said, strict=True), strict=True)) == expected
    assert len(expected) > 3


def test_the_evidence_is_the_nearest_photograph_of_the_label_that_it_looks_like(
    tmp_path: Path, images: pd.DataFrame
) -> None:
    changed = relabel(images, 3, "label 2")
    (row,) = listed(run(tmp_path, changed)).to_dict("records")
    others = changed[(changed["label"] == "label 0")]
    distances = [distance(changed["sketch"][3], other) for other in others["sketch"]]
    assert row["nearest"] == others["path"].iloc[int(np.argmin(distances))]
    assert row["evidence"].endswith(f"the nearest is at {min(distances):.2f}")


def test_fewer_than_five_neighbours_tell_no_label(tmp_path: Path) -> None:
    images = make(n_labels=1, n_groups=1, size=5)
    assert len(listed(run(tmp_path, relabel(images, 0, "other")), "label")) == 0


# Conflicts


def pair_across(images: pd.DataFrame, far: float) -> pd.DataFrame:
    """One more photograph, of another label, at about this distance of the first, and three of its label at its side."""
    away = np.random.default_rng(5).normal(size=16)
    sketch = images["sketch"][0]
    away = unit([away - away @ sketch * sketch])[0]
    rows = [("other/x.jpg", "other", "o", sketch + far * away)]
    rows += [(f"other/{i}.jpg", "other", "o", sketch + (far + 0.05 + 0.001 * i) * away) for i in range(3)]
    more = table(rows)
    return pd.concat([images, more], ignore_index=True)


def test_near_equal_photographs_of_two_labels_are_in_conflict_as_long_as_they_are_near(tmp_path: Path) -> None:
    images = make(n_labels=2, n_groups=2, size=2, spread=0.02)
    near = listed(run(tmp_path / "near", pair_across(images, 0.05)), "conflict")
    far = listed(run(tmp_path / "far", pair_across(images, 0.25)), "conflict")
    assert (len(near), len(far)) == (1, 0)


def test_of_two_in_conflict_the_suspect_is_the_one_with_fewer_neighbours_of_its_label(tmp_path: Path) -> None:
    images = pair_across(make(n_labels=2, n_groups=2, size=2), 0.05)
    label = images.set_index("image_id")["label"]
    own = {each: sum(label[other] == label[each] for _, other in near) for each, near in neighbours_of(images).items()}
    row = listed(run(tmp_path, images), "conflict").iloc[0]
    (nearest,) = images["image_id"][images["path"] == row["nearest"]]
    assert label[row["image_id"]] != label[nearest]
    assert own[row["image_id"]] < own[nearest]


def test_the_same_file_under_two_labels_is_suspect_where_its_neighbours_are_not(
    tmp_path: Path, images: pd.DataFrame
) -> None:
    copy = images.iloc[[0]].assign(path="label 3/copy.jpg", label="label 3")
    (row,) = listed(run(tmp_path, pd.concat([images, copy]))).to_dict("records")
    assert (row["path"], row["looks_like"], row["nearest"]) == ("label 3/copy.jpg", "label 0", images["path"][0])


def test_the_same_file_under_two_labels_is_in_conflict_also_where_no_neighbour_decides(tmp_path: Path) -> None:
    images = make(n_labels=1, n_groups=1, size=3)
    copy = images.iloc[[0]].assign(path="other/copy.jpg", label="other")
    (row,) = listed(run(tmp_path, pd.concat([images, copy]), near=0)).to_dict("records")
    assert (row["path"], row["reason"], row["evidence"]) == (
        "other/copy.jpg",
        "conflict",
        "the same file lies under label 0",
    )


def test_of_two_alike_in_conflict_one_is_suspect(tmp_path: Path) -> None:
    images = make(n_labels=1, n_groups=1, size=2, spread=0.01)
    images["label"] = ["one", "two"]
    (row,) = listed(run(tmp_path, images)).to_dict("records")
    assert (row["reason"], row["image_id"]) == ("conflict", images["image_id"].max())


def test_a_copy_that_is_far_from_all_is_suspect_once(tmp_path: Path, images: pd.DataFrame) -> None:
    far = table([(f"label {i}/far.jpg", f"label {i}", f"far {i}", -images["sketch"].sum()) for i in range(2)])
    found = listed(run(tmp_path, pd.concat([images, far])))
    assert sorted(zip(found["path"], found["reason"], strict=True)) == [
        ("label 0/far.jpg", "outlier"),
        ("label 1/far.jpg", "conflict"),
    ]


def test_who_is_near_equal_to_a_suspect_by_label_is_no_suspect_for_that(tmp_path: Path) -> None:
    images = make(spread=0.005)  # all of a group are near-equal
    found = listed(run(tmp_path, relabel(images, 3, "label 2")))
    assert found["path"].tolist() == [images["path"][3]]


# Groups


def move_group(images: pd.DataFrame, group: str, label: str) -> pd.DataFrame:
    return relabel(images, images["group"] == group, label)


def test_a_whole_group_under_another_label_is_one_suspect(tmp_path: Path, images: pd.DataFrame) -> None:
    moved = move_group(images, "1 0", "label 3")
    (row,) = listed(run(tmp_path, moved)).to_dict("records")
    assert (row["reason"], row["label"], row["looks_like"]) == ("group", "label 3", "label 1")
    assert row["image_id"] in {*moved["image_id"][moved["group"] == "1 0"]}


def test_a_single_image_is_no_group(tmp_path: Path, images: pd.DataFrame) -> None:
    alone = images.drop(index=images.index[images["group"] == "1 0"][1:])
    assert len(listed(run(tmp_path, move_group(alone, "1 0", "label 3")), "group")) == 0


def test_a_label_of_one_group_does_not_tell_whether_that_is_right(tmp_path: Path, images: pd.DataFrame) -> None:
    assert len(listed(run(tmp_path, move_group(images, "1 0", "new")), "group")) == 0


@pytest.mark.parametrize(("share", "margin"), [(0.8, 0.7), (0.8, 1.0), (0.5, 0.9), (1.0, 0.9)])
def test_suspect_groups_are_those_of_plain_loops(share: float, margin: float, tmp_path: Path) -> None:
    images = move_group(make(n_groups=4, size=6, spread=0.15), "1 0", "label 3")
    expected = {}
    for (group, label), some in images.groupby(["group", "label"]):
        others = images[images["group"] != group]
        nearer: Counter[str] = Counter()
        for sketch in some["sketch"]:
            far = {each: min(distance(sketch, x) for x in rows["sketch"]) for each, rows in others.groupby("label")}
            own = far.pop(label)
            nearest = min(far, key=lambda each: far[each])
            nearer[nearest] += far[nearest] <= margin * own
        (most, n), *_ = nearer.most_common(1)
        if n >= share * len(some):
            expected[group] = most
    # One that is suspect for a stronger reason does not tell a label: there is none here.
    output = run(tmp_path, images, share=share, margin=margin)
    found = listed(output, "group").merge(images[["path", "group"]], on="path")
    if not len(listed(output, "label")):
        assert dict(zip(found["group"], found["looks_like"], strict=True)) == expected
    assert "1 0" in {*found["group"]}


def test_a_photograph_under_a_wrong_label_makes_no_group_suspect(tmp_path: Path) -> None:
    images = make(spread=0.005)
    wrong = relabel(images, 3, "label 2")
    wrong.loc[3, "group"] = "its own"  # as split, which groups within labels
    assert {*listed(run(tmp_path, wrong))["reason"]} == {"label"}


# Outliers


def test_who_is_far_from_all_is_an_outlier(tmp_path: Path, images: pd.DataFrame) -> None:
    far = table([("label 0/far.jpg", "label 0", "far", -images["sketch"].sum())])  # all near it, if anything, is of label 3
    (row,) = listed(run(tmp_path, pd.concat([images, far]))).to_dict("records")
    assert (row["path"], row["reason"]) == ("label 0/far.jpg", "outlier")


@pytest.mark.parametrize("outlier", [1.0, 1.5])
def test_outliers_are_beyond_the_weighted_median_by_so_many_deviations(outlier: float, tmp_path: Path) -> None:
    images = make(n_groups=4, size=6, spread=0.1)
    images = images[images["group"].str.endswith("0") | (images.index % 3 == 0)]  # groups of two sizes
    near, sizes = neighbours_of(images), images.groupby("group").size()
    common = math.lcm(*sizes)

    def median(values: dict[str, float]) -> float:
        """Of values repeated, so that each group has as many."""
        group = images.set_index("image_id")["group"]
        return statistics.median_low(x for each, x in values.items() for _ in range(common // sizes[group[each]]))

    logs = {each: math.log(others[0][0]) for each, others in near.items()}
    usual = median(logs)
    spread = 1.4826 * median({each: abs(value - usual) for each, value in logs.items()})
    expected = {each for each, value in logs.items() if value > usual + outlier * spread}
    found = suspects.find_outliers(*read_tables(tmp_path, images), outlier)
    ids = images.sort_values("image_id")["image_id"].to_numpy()
    assert {*ids[found["photograph"]]} == expected
    assert expected


def read_tables(folder: Path, images: pd.DataFrame) -> tuple[suspects.Photographs, pd.DataFrame]:
    run(folder, images)
    files = images[["image_id", "path", "label", "group"]].sort_values(["image_id", "label", "path"], ignore_index=True)
    photographs, image_ids = suspects.to_photographs(files, str(folder / "n/sketches"))
    return photographs, suspects.to_pairs(analysis.read_pairs(str(folder / "n/neighbours"), image_ids), photographs)[0]


def test_a_suspect_is_named_once_for_its_strongest_reason(tmp_path: Path) -> None:
    images = make(spread=0.4, n_groups=4)
    found = listed(run(tmp_path, images, outlier=1))
    assert found["path"].is_unique
    order = found["reason"].map(suspects.REASONS.index)
    assert order.is_monotonic_increasing
    assert order.nunique() > 1


# Reviewed


def test_what_a_person_found_right_is_not_listed_again_but_counted(tmp_path: Path, images: pd.DataFrame) -> None:
    noisy = relabel(images, [3, 70], "label 3")
    first = run(tmp_path / "first", noisy)
    row = listed(first).iloc[0]
    reviewed = f"# a comment, with commas\npath,image_id,reason,note\n{row['path']},{row['image_id']},label,a rare one\n"
    again = run(tmp_path / "again", noisy, reviewed)
    assert listed(again).to_dict("records") == listed(first).iloc[1:].to_dict("records")
    assert (metrics(first)["reviewed"], metrics(again)["reviewed"]) == (0, 1)


@pytest.mark.parametrize(
    "reviewed", ["image_id\n{}\n", "path,image_id,reason,note\n,{},label,\n"], ids=["no column", "empty"]
)
def test_without_a_path_an_image_is_right_wherever_it_lies(reviewed: str, tmp_path: Path, images: pd.DataFrame) -> None:
    noisy = relabel(images, 3, "label 3")
    assert len(listed(run(tmp_path, noisy, reviewed.format(noisy["image_id"][3])))) == 0


def test_with_a_path_an_image_is_right_there_only(tmp_path: Path, images: pd.DataFrame) -> None:
    noisy = relabel(images, 3, "label 3")
    reviewed = f"path,image_id\n{noisy['path'][4]},{noisy['image_id'][3]}\n"
    assert len(listed(run(tmp_path, noisy, reviewed))) == 1


def test_a_group_is_right_if_one_of_its_images_is(tmp_path: Path, images: pd.DataFrame) -> None:
    moved = move_group(images, "1 0", "label 3")
    output = run(tmp_path, moved, "image_id\n" + moved["image_id"][moved["group"] == "1 0"].max() + "\n")
    assert (len(listed(output)), metrics(output)["reviewed"]) == (0, 1)


def test_a_review_of_an_image_that_is_gone_changes_nothing(tmp_path: Path, images: pd.DataFrame) -> None:
    output = run(tmp_path, relabel(images, 3, "label 3"), f"image_id\n{digest('gone')}\n")
    assert (len(listed(output)), metrics(output)["reviewed"]) == (1, 0)


@pytest.mark.parametrize(
    ("reviewed", "said"),
    [
        ("path,note\na.jpg,good\n", "no column image_id, but path, note"),
        ("image_id\n12ab\n", "image_id '12ab'; copy the 64"),
    ],
    ids=["column", "digits"],
)
def test_a_list_that_cannot_be_meant_is_refused(reviewed: str, said: str, tmp_path: Path, images: pd.DataFrame) -> None:
    with pytest.raises(SystemExit, match=said):
        run(tmp_path, images, reviewed)
    assert not (tmp_path / "out").exists()


def test_the_list_in_git_is_empty_and_has_its_columns() -> None:
    rows = suspects.read_reviewed(str(ROOT / "data/reviewed.csv"))
    assert (len(rows), rows.columns.tolist()) == (0, ["path", "image_id"])
    assert (ROOT / "data/reviewed.csv").read_text().splitlines()[-1] == ",".join(suspects.REVIEWED)


# Really different images


def effective(images: pd.DataFrame, near: float = NEAR) -> float:
    """By plain loops."""
    distinct = images.drop_duplicates(["image_id", "label"])
    total = 0.0
    for _, some in distinct.groupby(["group", "label"]):
        total += sum(1 / sum(distance(a, b) <= near for b in some["sketch"]) for a in some["sketch"])
    return total


def test_a_film_of_near_equal_frames_counts_as_one(tmp_path: Path) -> None:
    assert metrics(run(tmp_path, make(spread=0.005)))["effective_images"] == 12.0


def test_images_that_differ_count_each(tmp_path: Path) -> None:
    images = make(spread=0.5)
    assert metrics(run(tmp_path, images, near=0))["effective_images"] == len(images)


def test_copies_count_as_one_and_are_near_duplicates(tmp_path: Path) -> None:
    images = make(spread=0.5)
    copies = pd.concat(
        [images, images.iloc[[0]].assign(path="label 0/a.jpg"), images.iloc[[0]].assign(path="label 0/b.jpg")]
    )
    found = metrics(run(tmp_path, copies, near=0))
    assert (found["images"], found["effective_images"], found["near_duplicates"]) == (len(images) + 2, len(images), 3)


def test_by_label_the_effective_number_is_that_of_plain_loops(tmp_path: Path) -> None:
    images = make(spread=0.06)
    rows = pd.read_csv(run(tmp_path, images) / "labels.csv").set_index("label")
    assert {*rows["n_images"]} == {30}
    assert {*rows["n_groups"]} == {3}
    for label, some in images.groupby("label"):
        assert 3 < rows["effective_images"][label] < 30
        assert rows["effective_images"][label] == pytest.approx(effective(some), abs=1e-4)  # rounded


def test_of_a_large_group_a_part_tells_the_effective_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make(n_labels=1, n_groups=1, size=150, spread=0.06)
    monkeypatch.setattr(suspects, "N_COUNTED", 50)
    assert metrics(run(tmp_path, images))["effective_images"] == pytest.approx(effective(images), rel=0.2)


def test_suspects_are_counted_by_label_and_by_reason(tmp_path: Path) -> None:
    output = run(tmp_path, make(spread=0.4, n_groups=4), outlier=1)
    found = listed(output)
    by_label = pd.read_csv(output / "labels.csv").set_index("label")["n_suspects"]
    assert by_label[by_label > 0].to_dict() == found["label"].value_counts().to_dict()
    counts = metrics(output)["suspects"]
    assert {reason: n for reason, n in counts.items() if n} == found["reason"].value_counts().to_dict()


# Edges


def test_of_one_label_there_are_no_suspects_by_label(tmp_path: Path) -> None:
    output = run(tmp_path, make(n_labels=1))
    assert (len(listed(output)), metrics(output)["groups"]) == (0, 3)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_of_hardly_any_photographs_there_are_no_suspects(n: int, tmp_path: Path, images: pd.DataFrame) -> None:
    output = run(tmp_path, images.head(n))
    assert (len(listed(output)), metrics(output)["images"]) == (0, n)
    assert (output / "suspects.csv").read_text() == ",".join(suspects.SUSPECTS) + "\n"


def test_a_label_called_na_is_one_like_any_other(tmp_path: Path, images: pd.DataFrame) -> None:
    renamed = images.assign(label=images["label"].replace("label 0", "NA"))
    output = run(tmp_path, relabel(renamed, 3, "label 2"))
    assert listed(output)["looks_like"].tolist() == ["NA"]
    assert "NA" in {each["label"] for each in report.pick_suspects(str(output))["labels"]}


def test_the_order_of_the_rows_changes_no_byte(tmp_path: Path) -> None:
    images = make(spread=0.4, n_groups=4)
    outputs = [run(tmp_path / "a", images, outlier=1), run(tmp_path / "b", images.sample(frac=1, random_state=0), outlier=1)]
    assert len(listed(outputs[0])) > 5
    for name in ("suspects.csv", "labels.csv", "metrics.json"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()


@pytest.mark.parametrize(("flag", "value"), [("share", 0.49), ("share", 1.01), ("margin", -0.1), ("outlier", 0.5)])
def test_a_number_out_of_its_bounds_is_refused(flag: str, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for name, each in (FLAGS | {flag: value}).items() for word in (f"--{name}", str(each))]
    with pytest.raises(SystemExit):
        suspects.parse_args(["n", "split", "reviewed.csv", "out", *words])
    assert f"argument --{flag}: {value} is not between" in capsys.readouterr().err


# The report


def test_the_report_shows_the_first_and_counts_all(tmp_path: Path) -> None:
    output = run(tmp_path, make(spread=0.5, n_groups=4, size=20), outlier=1)
    shown = report.pick_suspects(str(output))
    assert [each["path"] for each in shown["suspects"]] == listed(output)["path"].head(report.SUSPECTS).tolist()
    assert sum(shown["counts"]["suspects"].values()) == len(listed(output)) > report.SUSPECTS


@pytest.mark.parametrize("folder", [None, "nowhere"])
def test_where_nobody_looked_for_suspects_the_report_names_none(folder: str | None, tmp_path: Path) -> None:
    assert report.pick_suspects(folder and str(tmp_path / folder)) == {}
