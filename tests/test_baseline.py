"""Facts about what stages/baseline.py recognises without the reduction; scikit-learn is the oracle."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from stages import baseline
from tests.helpers import PARAMS, make_images, run_baseline, spaces, split, write_split


def sampled(images: pd.DataFrame, folder: Path, max_images: int) -> pd.DataFrame:
    """The sample, with its rows of both spaces as columns."""
    write_split(folder, images)
    ingested, features, split = (str(folder / name) for name in ("ingested", "features", "split"))
    sample, spaces = baseline.read_sample(ingested, features, split, max_images)
    return sample.assign(**{space: list(rows) for space, rows in spaces.items()})


@pytest.mark.parametrize("max_images", [30, 1000], ids=["just as many", "more"])
def test_a_small_collection_is_tested_whole(max_images: int, tmp_path: Path) -> None:
    images = make_images(30)
    assert sorted(sampled(images, tmp_path, max_images)["path"]) == sorted(images["path"])


def test_of_a_large_collection_about_max_images_are_tested(tmp_path: Path) -> None:
    # 1,000 of 4,000 by chance: 109 are four standard deviations.
    assert len(sampled(make_images(4000), tmp_path, 1000)) == pytest.approx(1000, abs=109)


def test_only_the_image_id_decides_which_images_are_tested(tmp_path: Path) -> None:
    images = make_images(400)
    other = images.sample(frac=1, random_state=0).assign(
        path=images["path"] + "x", label="pear", fold=0, features=images["features"] * 2
    )
    chosen, chosen_other = sampled(images, tmp_path / "a", 100), sampled(other, tmp_path / "b", 100)
    assert chosen["image_id"].tolist() == chosen_other["image_id"].tolist()


def test_a_smaller_sample_is_part_of_a_larger_one(tmp_path: Path) -> None:
    small, large = (set(sampled(make_images(400), tmp_path / str(n), n)["image_id"]) for n in (100, 200))
    assert small < large


def test_copies_are_tested_once_by_the_first_path(tmp_path: Path) -> None:
    images = make_images(12)
    copies = images[:5].assign(path=[f"zucchini/{i}.jpg" for i in range(5)], label="zucchini")
    sample = sampled(pd.concat([copies, images]), tmp_path, 1000)
    assert sorted(sample["path"]) == sorted(images["path"])


def test_each_image_keeps_its_own_features_and_pixels(tmp_path: Path) -> None:
    images = make_images(20).set_index("image_id")
    for row in sampled(make_images(20)[::-1], tmp_path, 1000).itertuples():
        np.testing.assert_array_equal(row.features, images.loc[row.image_id, "features"])
        np.testing.assert_array_equal(row.pixels, list(images.loc[row.image_id, "thumbnail"]))


def run(images: pd.DataFrame, folder: Path, max_images: int = 1000) -> pd.DataFrame:
    write_split(folder, images)
    return run_baseline(folder, max_images)


@pytest.mark.parametrize("space", ["features", "pixels"])
def test_each_image_has_the_labels_that_scikit_learn_predicts(space: str, tmp_path: Path) -> None:
    images = make_images()
    found = run(images, tmp_path).set_index("image_id")
    for fold in (0, 1):
        train, test = split(images, fold)
        rows, test_rows = spaces(images, fold, 2)[space]
        total_deviation = np.sqrt(rows.var(axis=0).sum())
        for column, model, unit in (
            ("nearest_neighbour", KNeighborsClassifier(1), 1.0),
            ("linear_probe", LogisticRegression(C=100, max_iter=5000), total_deviation),
        ):
            expected = model.fit((rows - rows.mean(axis=0)) / unit, train["label"]).predict(
                (test_rows - rows.mean(axis=0)) / unit
            )
            assert found.loc[test["image_id"], f"{space}_{column}"].tolist() == expected.tolist()


def test_an_image_whose_label_the_other_fold_has_not_has_no_prediction(tmp_path: Path) -> None:
    images = make_images()
    images.loc[images["fold"] == 1, "label"] = images["label"].replace("cherry", "date")
    found = run(images, tmp_path)
    untested = found[found["features_linear_probe"].isna()]
    assert sorted(untested["path"]) == sorted(images.loc[images["label"].isin(["cherry", "date"]), "path"])


KIND = PARAMS["baseline"]["kind_pattern"]


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("Apple Golden 2", "Apple Golden"),
        ("Pear 2", "Pear"),
        ("Pear", "Pear"),
        ("pear_10", "pear"),
        ("Corn Husk", "Corn Husk"),
        ("12", "12"),
        ("A4", "A4"),
        ("red/apple-3", "red/apple"),
    ],
)
def test_the_kind_of_a_label_is_all_but_a_number_at_its_end(label: str, kind: str) -> None:
    assert baseline.kind_of(label, KIND) == kind


@pytest.mark.parametrize("pattern", ["^(x)", "^(x)?", "(y*)"], ids=["no match", "no part", "an empty part"])
def test_a_label_whose_kind_the_pattern_does_not_tell_is_its_own_kind(pattern: str) -> None:
    assert baseline.kind_of("Pear 2", pattern) == "Pear 2"


def with_labels(**names: list[str]) -> pd.DataFrame:
    """Images of three fruits, each fruit with some labels, in both folds."""
    images = make_images(90)
    images["label"] = [names[each][i // 3 % len(names[each])] for i, each in enumerate(images["label"])]
    return images


def test_each_image_has_the_kind_of_its_nearest_neighbour_under_another_label(tmp_path: Path) -> None:
    images = with_labels(apple=["Apple 1", "Apple 2"], banana=["Banana", "Banana 2"], cherry=["Cherry"])
    found = run(images, tmp_path).set_index("image_id").loc[images["image_id"]]
    features, kinds = np.stack(images["features"]), images["label"].str.rstrip(" 12").to_numpy()
    assert found["kind"].tolist() == kinds.tolist()
    for label in ("Apple 1", "Apple 2", "Banana", "Banana 2"):
        out = (images["label"] == label).to_numpy()
        expected = KNeighborsClassifier(1).fit(features[~out], kinds[~out]).predict(features[out])
        assert found.loc[out, "kind_nearest_neighbour"].tolist() == expected.tolist()


def test_an_image_whose_label_has_no_sibling_has_no_kind_of_a_neighbour(tmp_path: Path) -> None:
    found = run(with_labels(apple=["Apple 1", "Apple 2"], banana=["Banana"], cherry=["Cherry"]), tmp_path)
    assert sorted(set(found.loc[found["kind_nearest_neighbour"].isna(), "label"])) == ["Banana", "Cherry"]


def test_a_collection_of_one_kind_has_no_kind_to_be_told(tmp_path: Path) -> None:
    found = run(with_labels(apple=["class 1"], banana=["class 2"], cherry=["class 3"]), tmp_path)
    assert found["kind_nearest_neighbour"].isna().all()


def test_a_label_of_one_fold_only_is_told_its_kind_too(tmp_path: Path) -> None:
    images = with_labels(apple=["Apple 1", "Apple 2"], banana=["Banana"], cherry=["Cherry"])
    is_left = (images["label"] != "Apple 2") | (images["fold"] == 0)
    found = run(images[is_left].reset_index(drop=True), tmp_path)
    found = found[found["label"] == "Apple 2"]
    assert (found["features_nearest_neighbour"].isna().all(), found["kind_nearest_neighbour"].notna().all()) == (True, True)


@pytest.mark.parametrize(("pattern", "why"), [("(", "no regular expression"), ("x+", "no group")])
def test_a_pattern_that_can_tell_no_kind_is_refused(pattern: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        baseline.parse_args(["a", "b", "c", "d", "--max_images", "9", "--kind_pattern", pattern])
    said = capsys.readouterr().err
    assert "argument --kind_pattern: " in said
    assert why in said


def test_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(make_images(), tmp_path / name)
    one, two = (tmp_path / name / "baseline/part-00000.parquet" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_collection_without_images_has_a_table_without_rows(tmp_path: Path) -> None:
    run(make_images(), tmp_path)
    for folder in ("ingested/images", "features", "split/images"):
        part = tmp_path / folder / "part-00000.parquet"
        pq.write_table(pq.read_table(part)[:0], part)
    assert run_baseline(tmp_path, output="empty").empty
    assert pq.read_table(tmp_path / "empty").schema == pq.read_table(tmp_path / "baseline").schema


@pytest.mark.parametrize("n", ["0", "-1", "10000001", "1.5", "nan", "many"])
def test_a_number_of_images_that_can_be_none_is_refused(n: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        baseline.parse_args(["ingested", "features", "split", "baseline", "--max_images", n, "--kind_pattern", "(.*)"])
    assert "argument --max_images: " in capsys.readouterr().err
