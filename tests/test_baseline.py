"""Facts about what stages/baseline.py recognises without the reduction; scikit-learn is the oracle."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from stages import baseline
from tests.helpers import make_images, spaces, split, write


def sampled(images: pd.DataFrame, folder: Path, max_images: int) -> pd.DataFrame:
    """The sample, with its rows of both spaces as columns."""
    write(images.drop(columns="features"), folder / "ingested" / "images")
    write(images.drop(columns="thumbnail"), folder / "features")
    sample, spaces = baseline.read_sample(str(folder / "ingested"), str(folder / "features"), max_images)
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
    write(images.drop(columns="features"), folder / "ingested" / "images")
    write(images.drop(columns="thumbnail"), folder / "features")
    places = [str(folder / name) for name in ("ingested", "features", "baseline")]
    baseline.main([*places, "--max_images", str(max_images)])
    return pq.read_table(places[-1]).to_pandas()


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


def test_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(make_images(), tmp_path / name)
    one, two = (tmp_path / name / "baseline/part-00000.parquet" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_collection_without_images_has_a_table_without_rows(tmp_path: Path) -> None:
    run(make_images(), tmp_path)
    for part in (tmp_path / "ingested/images/part-00000.parquet", tmp_path / "features/part-00000.parquet"):
        pq.write_table(pq.read_table(part)[:0], part)
    places = [str(tmp_path / name) for name in ("ingested", "features", "empty")]
    baseline.main([*places, "--max_images", "1000"])
    assert pq.read_table(places[-1]).schema == pq.read_table(tmp_path / "baseline").schema
    assert pq.read_table(places[-1]).num_rows == 0


@pytest.mark.parametrize("n", ["0", "-1", "10000001", "1.5", "nan", "many"])
def test_a_number_of_images_that_can_be_none_is_refused(n: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        baseline.parse_args(["ingested", "features", "baseline", "--max_images", n])
    assert "argument --max_images: " in capsys.readouterr().err
