"""Facts about groups of near-equal images and their folds, of stages/split.py."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.cluster import AgglomerativeClustering
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from stages import split

N_COMPONENTS = 64
STEP = 0.1  # about, between two frames of a film; two things are 1.4 apart


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def collect(*films: tuple[str, int, str | None], step: float = STEP, seed: int = 0) -> pd.DataFrame:
    """Rows of SKETCHES: for each film (label, number of frames, name or None) frames, a step from one another."""
    random, rows = np.random.default_rng(seed), []
    for number, (label, n_frames, name) in enumerate(films):
        frames = random.normal(size=N_COMPONENTS) + step * random.normal(size=(n_frames, N_COMPONENTS)) / 2**0.5
        rows += [(number, label, name, sketch) for sketch in normalize(frames).astype(np.float32)]
    images = pd.DataFrame(rows, columns=["thing", "label", "film", "sketch"])
    images["image_id"] = [digest(1000 * seed + i) for i in range(len(images))]
    images["path"] = [f"{label}/{i:06}.jpg" for i, label in enumerate(images["label"])]
    return images


def run(folder: Path, images: pd.DataFrame, near: float = 0.5) -> tuple[pd.DataFrame, dict[str, float]]:
    """Write what the stage neighbours would, run the stage, and return its rows, by path, and its settings."""
    (folder / "neighbours" / "sketches").mkdir(parents=True)
    (folder / "neighbours" / "neighbours").mkdir()
    columns = {name: pa.array(images[name].tolist(), pa.string()) for name in ("image_id", "path", "label", "film")}
    columns["sketch"] = pa.array([row.tobytes() for row in images["sketch"]], pa.binary())
    pq.write_table(pa.table(columns), folder / "neighbours" / "sketches" / "part-00000.parquet")
    distinct = images.sort_values("image_id").drop_duplicates("image_id")
    ids, points = distinct["image_id"].to_numpy(), np.stack(distinct["sketch"]).astype(np.float64)
    k = min(6, len(ids) - 1)
    found, distances = np.zeros((len(ids), 0), int), np.zeros((len(ids), 0))
    if k:
        distances, found = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points).kneighbors()
        distances = np.linalg.norm(points[:, None] - points[found], axis=2)  # of copies exactly 0
    columns = {
        "image_id": pa.array(ids, pa.string()),
        "neighbours": pa.array(ids[found].tolist(), pa.list_(pa.string())),
        "distances": pa.array(distances.tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), folder / "neighbours" / "neighbours" / "part-00000.parquet")
    split.main([str(folder / "neighbours"), str(folder / "split"), "--near", str(near)])
    rows = pq.read_table(folder / "split" / "images").to_pandas()
    (settings,) = pq.read_table(folder / "split" / "settings").to_pylist()
    return rows.set_index("path").loc[images["path"]], settings


def partition(numbers: np.ndarray | pd.Series) -> set[frozenset[int]]:
    """The sets of row numbers that have one value."""
    return {frozenset(rows) for rows in pd.Series(range(len(numbers))).groupby(np.asarray(numbers)).agg(list)}


def shares(rows: pd.DataFrame) -> pd.Series:
    """The share of each label's images that is in fold 1."""
    return rows.groupby("label")["fold"].mean()


# Single linkage


def random_points(n: int, n_components: int = 4, seed: int = 0) -> np.ndarray:
    return normalize(np.random.default_rng(seed).normal(size=(n, n_components))).astype(np.float32)


def neighbour_pairs(points: np.ndarray, n_neighbours: int) -> pd.DataFrame:
    distances, found = NearestNeighbors(n_neighbors=n_neighbours, algorithm="brute").fit(points).kneighbors()
    a = np.repeat(np.arange(len(points)), n_neighbours)
    return pd.DataFrame({"a": a, "b": found.ravel(), "distance": distances.ravel()})


@pytest.mark.parametrize("cells", [2**24, 1000, 1], ids=lambda cells: f"{cells} cells at once")
@pytest.mark.parametrize("near", [0.05, 0.15, 0.25, 0.6])
@pytest.mark.parametrize("n_neighbours", [1, 6])
def test_within_a_label_groups_are_those_of_scikit_learns_single_linkage(
    n_neighbours: int, near: float, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "CELLS", cells)
    points, labels, is_named = random_points(400), np.arange(400) % 3, np.zeros(400, bool)
    pairs = neighbour_pairs(points, n_neighbours)
    links = [
        split.choose_near(pairs, labels, is_named, near, across=-1.0),
        split.connect_labels(points, labels, is_named, pairs, near),
    ]
    expected = np.zeros(400, int)
    for label in range(3):
        clusters = AgglomerativeClustering(None, linkage="single", distance_threshold=near).fit(points[labels == label])
        expected[labels == label] = clusters.labels_ * 3 + label
    assert partition(split.join(400, links)) == partition(expected)


def test_a_group_is_named_by_its_least_image_id(tmp_path: Path) -> None:
    rows, _ = run(tmp_path, collect(("kiwi", 9, None), ("kiwi", 4, None)))
    least = rows.groupby("group")["image_id"].min()
    assert least.tolist() == least.index.tolist()


def test_frames_of_a_film_without_a_name_are_a_group(tmp_path: Path) -> None:
    images = collect(*[(label, 36, None) for label in ("kiwi", "fig", "pear") for _ in range(3)])
    rows, settings = run(tmp_path, images)
    assert partition(rows["group"]) == partition(images["thing"])
    assert settings["leak"] == 0


def test_a_chain_of_near_frames_is_one_group_however_far_its_ends_are(tmp_path: Path) -> None:
    angle = np.arange(30) * 0.1  # to the other side of the thing
    images = collect(("kiwi", 30, None), ("fig", 5, None))
    for i in range(30):
        images.at[i, "sketch"] = np.pad([np.cos(angle[i]), np.sin(angle[i])], (0, 62)).astype(np.float32)
    rows, _ = run(tmp_path, images)
    assert rows["group"][:30].nunique() == 1


def test_near_0_makes_each_image_its_own_group_but_exact_copies(tmp_path: Path) -> None:
    images = collect(("kiwi", 36, None), ("fig", 36, None))
    for copy in range(1, 10):  # more than there are neighbours
        images.at[copy, "sketch"] = images.at[0, "sketch"]
    rows, settings = run(tmp_path, images, near=0)
    assert partition(rows["group"]) == {frozenset(range(10)), *(frozenset({i}) for i in range(10, 72))}
    assert (settings["near_distance"], settings["near_distance_across_labels"]) == (0, 0)


# Films


def test_films_win_over_content(tmp_path: Path) -> None:
    images = collect(("kiwi", 12, "kiwi/r"), ("fig", 12, "fig/r"))
    images.loc[6:11, "film"] = "kiwi/r2"  # of the same thing
    rows, _ = run(tmp_path, images)
    assert partition(rows["group"]) == {frozenset(range(6)), frozenset(range(6, 12)), frozenset(range(12, 24))}


def test_films_of_more_frames_than_there_are_neighbours_win_over_content(tmp_path: Path) -> None:
    images = collect(("kiwi", 40, "kiwi/r"), ("kiwi", 20, None), ("fig", 9, None))
    images.loc[20:39, "film"] = "kiwi/r2"  # of the same thing
    rows, _ = run(tmp_path, images)
    assert rows["group"][:40].nunique() == 2


def test_a_film_is_one_group_however_different_its_frames_are(tmp_path: Path) -> None:
    rows, _ = run(tmp_path, collect(("kiwi", 3, "kiwi/r"), ("kiwi", 3, "kiwi/r"), ("kiwi", 3, None)))
    assert partition(rows["group"]) == {frozenset(range(6)), frozenset(range(6, 9))}


@pytest.mark.parametrize("n_frames", [4, 30], ids=["few", "more than there are neighbours"])
def test_an_image_without_a_film_joins_the_film_that_it_is_near_equal_to(n_frames: int, tmp_path: Path) -> None:
    images = collect(("kiwi", n_frames, "kiwi/r"), ("kiwi", n_frames, "kiwi/r2"), ("kiwi", 1, None), ("fig", 9, None))
    images.at[n_frames - 1, "film"] = None
    rows, _ = run(tmp_path, images)
    assert partition(rows["group"]) == partition(images["thing"])


def test_an_image_between_two_films_makes_them_one_group(tmp_path: Path) -> None:
    images = collect(("kiwi", 20, "kiwi/r"), ("fig", 20, None))
    images.loc[10:18, "film"], images.loc[19, "film"] = "kiwi/r2", None
    rows, _ = run(tmp_path, images)
    assert rows["group"][:20].nunique() == 1


def test_copies_of_one_image_in_two_films_make_them_one_group(tmp_path: Path) -> None:
    images = collect(("kiwi", 5, "kiwi/r"), ("kiwi", 5, "kiwi/r2"), ("kiwi", 5, None))
    images.loc[[0, 5], "image_id"] = digest(0)
    images.at[5, "sketch"] = images.at[0, "sketch"]
    rows, _ = run(tmp_path, images)
    assert partition(rows["group"]) == {frozenset(range(10)), frozenset(range(10, 15))}


def test_a_film_that_only_the_second_copy_of_an_image_tells_counts(tmp_path: Path) -> None:
    images = collect(("kiwi", 4, "kiwi/r"), ("kiwi", 4, None))
    images.loc[4] = images.loc[0]  # a copy far from its film's other frames, were there no film
    images.at[0, "sketch"] = images.at[4, "sketch"] = images.at[7, "sketch"] * -1
    images.loc[0, ["film", "path"]], images.loc[4, ["film", "path"]] = (None, "kiwi/a.jpg"), ("kiwi/r", "kiwi/b.jpg")
    rows, _ = run(tmp_path, images)
    assert partition(rows["group"]) == {frozenset(range(5)), frozenset({5, 6, 7})}


# Across labels


def test_what_is_nearer_than_frames_usually_are_is_a_group_across_two_labels(tmp_path: Path) -> None:
    images = collect(*[(label, 12, None) for label in ("kiwi", "fig", "pear", "plum")])
    images.loc[6:11, "label"] = "fig"  # half a film in a wrong folder, cut where two frames are one picture
    images.at[6, "sketch"] = images.at[5, "sketch"]
    rows, _ = run(tmp_path, images)
    assert partition(rows["group"]) == partition(images["thing"])


def test_what_is_less_near_than_frames_usually_are_is_a_group_only_within_a_label(tmp_path: Path) -> None:
    images = collect(*[(label, 12, None) for label in ("kiwi", "fig", "pear", "plum")])
    kiwi, aside = images.at[0, "sketch"], images.at[36, "sketch"]
    aside = normalize([aside - aside @ kiwi * kiwi])[0]
    for i, sign, label in ((48, 1, "kiwi"), (49, -1, "pear")):
        sketch = (np.cos(0.3) * kiwi + sign * np.sin(0.3) * aside).astype(np.float32)  # at a distance of 0.3, and 0.6
        images.loc[i] = {"thing": i, "label": label, "film": None, "sketch": sketch, "image_id": digest(i), "path": f"{i}"}
    rows, settings = run(tmp_path, images)
    assert settings["near_distance_across_labels"] < 0.29 < 0.31 < settings["near_distance"]
    others = {frozenset(range(start, start + 12)) for start in (12, 24, 36)}
    assert partition(rows["group"]) == {frozenset([*range(12), 48]), frozenset([49]), *others}


def test_where_no_image_has_its_nearest_in_its_label_only_copies_are_groups_across_labels(tmp_path: Path) -> None:
    images = collect(("kiwi", 2, None), ("fig", 2, None), ("plum", 1, None))
    images["label"] = [f"label {i}" for i in range(5)]
    images.at[3, "sketch"] = images.at[2, "sketch"]
    rows, _ = run(tmp_path, images)
    assert partition(rows["group"]) == {frozenset({0}), frozenset({1}), frozenset({2, 3}), frozenset({4})}


def test_5_percent_of_wrong_labels_change_neither_the_usual_distance_nor_the_groups(tmp_path: Path) -> None:
    labels = [f"label {i}" for i in range(20)]
    images = collect(*[(label, 36, None) for label in labels for _ in range(2)], step=0.3)
    images["sketch"] = list(normalize(np.stack(images["sketch"]) + 0.2).astype(np.float32))  # things are less than 0.9 apart
    _, usual = run(tmp_path / "right", images)
    wrong = np.random.default_rng(0).permutation(len(images))[: len(images) // 20]
    images.loc[wrong, "label"] = [labels[i % 20] for i in range(len(wrong))]
    rows, found = run(tmp_path / "wrong", images)
    assert usual["usual_distance"] < split.USUAL_DISTANCE
    assert found["usual_distance"] == pytest.approx(usual["usual_distance"], rel=0.02)
    right = images.drop(index=wrong)
    assert partition(rows["group"].drop(index=images["path"][wrong])) == partition(right["thing"])


# Folds

COLLECTIONS: dict[str, Callable[[], pd.DataFrame]] = {
    "no two alike": lambda: collect(*[(f"label {i % 5}", 1, None) for i in range(500)]),
    "bursts of 3": lambda: collect(*[(f"label {i % 5}", 3, None) for i in range(150)]),
    "films": lambda: collect(*[(f"label {i % 5}", 36, None) for i in range(10)]),
    "films with names": lambda: collect(*[(f"label {i % 5}", 36, f"{i}") for i in range(10)]),
    "one huge label": lambda: collect(*[("label", 30, None)] * 50, *[(f"label {i}", 4, None) for i in range(10)]),
    "1,000 labels of 5": lambda: collect(*[(f"label {i % 1000}", 1, None) for i in range(5000)]),
    "one label only": lambda: collect(*[("label", 3, None)] * 40),
    "labels of one image": lambda: collect(*[(f"label {i}", 1, None) for i in range(40)]),
    "two images": lambda: collect(("kiwi", 1, None), ("kiwi", 1, None)),
    "one image": lambda: collect(("kiwi", 1, None)),
}


@pytest.fixture(scope="module", params=COLLECTIONS.values(), ids=[*COLLECTIONS])
def collection(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, float]]:
    """Images, and what the stage makes of them."""
    images = request.param()
    return images, *run(tmp_path_factory.mktemp("collection"), images)


Collection = tuple[pd.DataFrame, pd.DataFrame, dict[str, float]]


def test_things_are_groups(collection: Collection) -> None:
    images, rows, _ = collection
    assert partition(rows["group"]) == partition(images["thing"])


def test_a_group_is_in_one_fold(collection: Collection) -> None:
    _, rows, _ = collection
    assert (rows.groupby("group")["fold"].nunique() == 1).all()


def test_each_label_of_two_groups_or_more_is_in_both_folds(collection: Collection) -> None:
    _, rows, _ = collection
    has_choice = rows.groupby("label")["group"].nunique() > 1
    assert shares(rows)[has_choice].between(0, 1, inclusive="neither").all()


def test_the_halves_of_each_label_are_60_to_40_or_better(collection: Collection) -> None:
    _, rows, _ = collection
    has_choice = rows.groupby("label")["group"].nunique() > 1
    assert shares(rows)[has_choice].between(0.4, 0.6).all()


def test_nothing_leaks_where_content_tells_the_groups(collection: Collection) -> None:
    _, _, settings = collection
    assert settings["leak"] == 0


def test_films_that_are_taken_apart_leak(tmp_path: Path) -> None:
    _, settings = run(tmp_path, COLLECTIONS["films"](), near=0)
    assert settings["leak"] > 0.95


def test_films_of_one_thing_with_two_names_leak(tmp_path: Path) -> None:
    images = collect(*[(f"label {i % 5}", 1, f"{i}") for i in range(40)])
    images["sketch"] = images["sketch"][:20].tolist() * 2  # each thing in two films of its label
    rows, settings = run(tmp_path, images)
    pairs = rows["fold"].to_numpy().reshape(2, 20)
    assert settings["leak"] == np.mean(pairs[0] != pairs[1]) > 0


@pytest.mark.parametrize(
    ("distance", "labels", "folds", "leak"),
    [
        (0.5, [0, 0, 1, 1], [0, 1, 0, 0], 0.5),
        (0.501, [0, 0, 1, 1], [0, 1, 0, 0], 0),
        (0.5, [0, 1, 1, 1], [0, 1, 0, 0], 0),
        (0.5, [0, 0, 1, 1], [1, 1, 0, 0], 0),
    ],
    ids=["a leak", "not near", "two labels", "one fold"],
)
def test_a_leak_is_an_image_that_has_a_near_neighbour_of_its_label_in_the_other_fold(
    distance: float, labels: list[int], folds: list[int], leak: float
) -> None:
    pairs = pd.DataFrame({"a": [0, 1, 2, 2], "b": [1, 0, 3, 0], "distance": [distance, distance, 1.0, 1.0]})
    assert split.share_of_leaks(pairs, np.array(labels), np.array(folds), near=0.5) == leak


def test_all_copies_of_one_picture_are_one_group(tmp_path: Path) -> None:
    images = collect(*[("kiwi", 1, None)] * 30, *[("fig", 1, None)] * 30)
    images["sketch"] = [images.at[0, "sketch"]] * 60
    rows, settings = run(tmp_path, images)
    assert (rows["group"].nunique(), rows["fold"].nunique(), settings["leak"]) == (1, 1, 0)


# Of one label, each number is the size of a group; and whether 60:40 can be had.
SIZES = [[10, 1], [4, 5, 7], [5, 4, 3], [8, 7, 6, 5, 4], [164, 164], [100, 60, 3, 3, 2], [300, *[1] * 300], [9, 3, 3, 3]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_halves_of_a_label_are_as_equal_as_60_to_40_or_as_its_groups_allow(sizes: list[int], seed: int) -> None:
    groups = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    ids = np.array(sorted(digest(1000 * seed + i) for i in range(len(groups))))
    ids = np.array([each[:-1] + digest(i + seed)[0] for i, each in enumerate(ids)])
    rows = pd.DataFrame({"image": range(len(groups)), "label": "kiwi", "film": None})
    share = split.assign_folds(groups, ids, rows).mean()
    largest = max(sizes) / sum(sizes)  # no better than this
    assert max(share, 1 - share) <= max(0.6, largest)


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_in_both_folds_also_where_groups_are_of_two_labels(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = np.sort(random.integers(0, 60, 400))
    groups = np.unique(groups, return_index=True)[1][np.unique(groups, return_inverse=True)[1]]
    label = groups * 7919 % 15
    is_other = random.random(400) < 0.1
    label[is_other] = random.integers(0, 15, is_other.sum())
    rows = pd.DataFrame({"image": range(400), "label": label.astype(str), "film": None})
    folds = split.assign_folds(groups, np.array(sorted(digest(1000 * seed + i) for i in range(400))), rows)
    has_choice = pd.Series(groups).groupby(label).nunique() > 1
    assert (pd.Series(folds).groupby(label).nunique() == 2)[has_choice].all()


def shares_of(last_digits: str, contents: list[str]) -> pd.Series:
    """The shares of fold 1, of groups of images of these labels, a letter for each, whose least image_ids end in these."""
    sizes = [len(each) for each in contents]
    groups = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    ids = np.repeat([digest(0)[:-1] + each for each in last_digits], sizes)
    rows = pd.DataFrame({"image": range(len(groups)), "label": [*"".join(contents)], "film": None})
    return shares(rows.assign(fold=split.assign_folds(groups, ids, rows)))


def test_a_label_is_put_in_both_folds_even_if_that_makes_others_less_equal() -> None:
    assert shares_of("011", ["aabc", "bbccc", "abc"]).between(0, 1, inclusive="neither").all()


def test_a_label_is_mended_that_a_move_for_a_later_one_makes_lopsided() -> None:
    assert shares_of("0110", ["ab", "a", "aa", "aab"]).between(0.4, 0.6).all()


# Growth


def grow(images: pd.DataFrame, n: int, seed: int = 9) -> pd.DataFrame:
    """The images and n more frames of the same things."""
    random = np.random.default_rng(seed)
    more = images.iloc[random.integers(0, len(images), n)].copy()
    frames = np.stack(more["sketch"]) + STEP * random.normal(size=(n, N_COMPONENTS)) / N_COMPONENTS**0.5
    more["sketch"] = list(normalize(frames).astype(np.float32))
    more["image_id"], more["path"] = ([form(10**6 * seed + i) for i in range(n)] for form in (digest, "new/{}.jpg".format))
    return pd.concat([images, more], ignore_index=True)


def changes(folder: Path, images: pd.DataFrame, grown: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """The rows before, and which of them are in another fold after."""
    before, _ = run(folder / "before", images)
    after, _ = run(folder / "after", grown)
    return before, before["fold"] != after["fold"].loc[before.index]


def test_one_percent_more_images_that_are_like_no_other_change_no_fold(tmp_path: Path) -> None:
    images = collect(*[(f"label {i % 5}", 1, None) for i in range(2000)])
    new = collect(*[(f"label {i % 5}", 1, None) for i in range(20)], seed=1).assign(path=[f"new/{i}.jpg" for i in range(20)])
    _, is_changed = changes(tmp_path, images, pd.concat([images, new], ignore_index=True))
    assert not is_changed.any()


def test_one_percent_more_frames_change_the_fold_of_groups_only_whose_least_image_is_new(tmp_path: Path) -> None:
    images = collect(*[(f"label {i % 5}", 6, None) for i in range(300)])
    grown = grow(images, len(images) // 100)
    _, is_changed = changes(tmp_path, images, grown)
    new = grown[len(images) :]
    least_new = new.groupby("thing")["image_id"].min()
    least_old = images.groupby("thing")["image_id"].min()
    renamed = {thing for thing, image_id in least_new.items() if image_id < least_old[thing]}
    assert {*images["thing"][is_changed.to_numpy()]} <= renamed
    assert renamed  # so that there is something to see


def test_two_films_of_nearly_equal_length_keep_their_folds_when_the_shorter_becomes_the_longer(tmp_path: Path) -> None:
    for seed in range(1, 5):
        images = collect(("kiwi", 30, None), ("kiwi", 29, None), ("fig", 9, None), ("fig", 9, None), seed=seed)
        more = grow(images[images["thing"] == 1], 2, seed)[29:]
        more["image_id"] = [f"f{image_id[1:]}" for image_id in more["image_id"]]  # not the least of its film
        _, is_changed = changes(tmp_path / str(seed), images, pd.concat([images, more], ignore_index=True))
        assert not is_changed.any()


def test_films_of_one_view_are_in_one_fold_and_those_of_the_others_in_the_other() -> None:
    # As in Fruits-360: the main axis of rotation, which has most images, against the others.
    films = [(label, view) for label in ("fig", "kiwi", "plum") for view in ("", "r", "r2") for _ in range(5 - len(view))]
    names = pd.Series([f"{label}/{view}" for label, view in films])
    groups = names.map({name: i for i, name in reversed([*enumerate(names)])}).to_numpy()
    rows = pd.DataFrame({"image": range(len(films)), "label": [label for label, _ in films], "film": names})
    folds = split.assign_folds(groups, np.array(sorted(digest(i) for i in range(len(films)))), rows)
    assert dict(zip((view for _, view in films), folds.tolist(), strict=True)) == {"": 0, "r": 1, "r2": 1}


def test_a_group_that_moved_goes_back_when_its_label_is_balanced_without_it() -> None:
    ids = [f"{i}{digest(i)[1:-1]}{last}" for i, last in enumerate("0000001111")]  # the last tells the fold
    before, after = (
        split.assign_folds(np.arange(n), np.array(ids[:n]), pd.DataFrame({"image": range(n), "label": "kiwi", "film": None}))
        for n in (9, 10)
    )
    assert (before.tolist(), after.tolist()) == ([1, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1])


# Tables


def test_rows_are_by_image_id_and_path_and_copies_share_group_and_fold(tmp_path: Path) -> None:
    images = collect(("kiwi", 4, None), ("fig", 4, None))
    images.loc[8] = images.loc[2]
    images.loc[8, ["path", "label"]] = "fig/copy.jpg", "fig"
    rows, _ = run(tmp_path, images)
    written = pq.read_table(tmp_path / "split" / "images").to_pandas()
    assert written[["image_id", "path"]].values.tolist() == sorted(written[["image_id", "path"]].values.tolist())
    copies = rows[rows["image_id"] == images.at[2, "image_id"]]
    assert (len(copies), copies["group"].nunique(), copies["fold"].nunique()) == (2, 1, 1)
    assert copies["label"].tolist() == ["kiwi", "fig"]


def test_the_order_of_rows_changes_no_byte(tmp_path: Path) -> None:
    images = collect(*[(f"label {i % 3}", 9, None) for i in range(12)])
    for name, some in (("a", images), ("b", images.sample(frac=1, random_state=0))):
        run(tmp_path / name, some)
    one, other = ({file.name: file.read_bytes() for file in (tmp_path / name).rglob("split/*/*")} for name in "ab")
    assert one == other
