"""split: find groups of near-equal images, and put each whole group into one of two folds.

usage: python -m stages.split NEIGHBOURS OUTPUT --near 0.5

reads   NEIGHBOURS       sketches, neighbours
writes  OUTPUT/images    IMAGES, a row for each row of the sketches, by image_id and path
        OUTPUT/settings  SETTINGS, one row

An accuracy is honest only if no photograph that is tested is nearly equal to one that the model has learnt from. Names of
files seldom tell which are. The photographs themselves do: two of one label are near-equal if their distance is at most
`near` times the distance at which the nearest image of another label usually lies (the median). A label may be wrong: an
image whose nearest neighbour has another label does not count for that. A group is what near-equal pairs connect: single
linkage (Sibson 1973, "SLINK"). Where a file's name tells its film, the film is the group. Images without a film join the
group that they are near-equal to.

Runs without Spark. Only images all of whose neighbours are near-equal have others that the table does not list. They are
compared with one another within each label: time grows with the square of their number.
"""

import argparse
import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

from stages.analysis import between, read, read_pairs, read_vectors, to_frame, write

FILES = ("image_id", "path", "label", "film")
IMAGES = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),  # the least image_id of the group
        ("fold", pa.int32()),  # 0 or 1; a group is never in both
    ]
)
SETTINGS = pa.schema(
    [
        ("usual_distance", pa.float64()),  # to the nearest image of another label: the median
        ("near_distance", pa.float64()),  # up to which two images of one label are near-equal
        ("near_distance_across_labels", pa.float64()),  # the same of images of two labels
        ("leak", pa.float64()),  # share of images that have a near-equal neighbour of their label in the other fold
    ]
)
N_QUERIES = 4096  # images, at most, whose nearest of another label is looked for
USUAL_DISTANCE = 0.9  # at most, and where there is one label only; 0.75 and 0.86 in two collections of fruit
NEAR = 0.5  # by which the leak is told, whatever `near` is
CELLS = 2**24  # of a matrix of similarities, at once: 64 MiB
ROUNDING = 1e-6  # of a similarity in float32
IMBALANCE = 0.2  # of a label: the difference of its two parts, as a share of its images


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = to_frame(read(f"{args.neighbours}/sketches", FILES).sort_by([("image_id", "ascending"), ("path", "ascending")]))
    is_first = ~rows["image_id"].duplicated()
    rows["image"] = is_first.cumsum() - 1
    images = rows[is_first].reset_index(drop=True)
    image_ids, is_named = images["image_id"], images["film"].notna().to_numpy()
    labels = images["label"].astype("category").cat.codes.to_numpy(np.int64)
    pairs = read_pairs(f"{args.neighbours}/neighbours", pa.array(image_ids))
    sketches = read_vectors(f"{args.neighbours}/sketches", "sketch", pa.array(image_ids))
    with threadpool_limits(1):  # the last bits of a result depend on the number of BLAS's threads
        usual, usual_within = usual_distances(sketches, labels, pairs)
        near, across = args.near * usual, min(args.near * usual, usual_within)
        near_pairs = choose_near(pairs, labels, is_named, near, across)
        links = [near_pairs, connect_labels(sketches, labels, is_named, pairs, near), connect_films(rows)]
    del sketches
    groups = join(len(images), links)
    folds = assign_folds(groups, image_ids.to_numpy(), rows)
    leak = share_of_leaks(pairs, labels, folds, NEAR * usual)

    numbers = rows["image"].to_numpy()
    write(rows.assign(group=image_ids.take(groups[numbers]).array, fold=folds[numbers]), IMAGES, f"{args.output}/images")
    settings = pd.DataFrame([[usual, near, across, leak]], columns=SETTINGS.names)
    write(settings, SETTINGS, f"{args.output}/settings")
    print(f"split: {len(rows):,} images in {len(set(groups)):,} groups; {leak:.1%} of the images leak into the other fold")


def usual_distances(sketches: np.ndarray, labels: np.ndarray, pairs: pd.DataFrame) -> tuple[float, float]:
    """Compute the median distances to the nearest image of another label, and of the same label.

    Those of images whose nearest neighbour has their label, and to such images. If some labels are wrong, the median stays:
    otherwise one wrong frame would make a whole film near to another label.
    """
    nearest = pairs.drop_duplicates("a")
    nearest = nearest[labels[nearest["a"]] == labels[nearest["b"]]]
    if not len(nearest):
        return USUAL_DISTANCE, 0.0
    sure = np.sort(nearest["a"])
    labels = np.where(np.isin(np.arange(len(labels)), sure), labels, -1)
    found = []
    for block in blocks(sure[:N_QUERIES], len(labels)):  # image_id is a hash: the first are like any
        similarity = sketches[block] @ sketches.T
        similarity[(labels[block][:, None] == labels) | (labels == -1)] = -np.inf
        found.append(similarity.max(axis=1))
    usual = math.sqrt(max(0.0, 2 - 2 * float(np.median(np.concatenate(found)))))  # of unit vectors
    return min(usual, USUAL_DISTANCE), float(nearest["distance"].median())


def choose_near(pairs: pd.DataFrame, labels: np.ndarray, is_named: np.ndarray, near: float, across: float) -> pd.DataFrame:
    """Keep the pairs that are near-equal. Of one label, two images whose films are known are not: the films tell."""
    a, b = pairs["a"], pairs["b"]
    is_within = labels[a] == labels[b]
    is_near = (pairs["distance"] <= np.where(is_within, near, across)) & ~(is_within & is_named[a] & is_named[b])
    return pairs.loc[is_near, ["a", "b"]]


def connect_films(rows: pd.DataFrame) -> pd.DataFrame:
    """List a, b: each image that is a frame of a film, and the first of that film."""
    frames = rows[rows["film"].notna()]
    return pd.DataFrame({"a": frames["image"], "b": frames.groupby("film")["image"].transform("first")})


def connect_labels(
    sketches: np.ndarray, labels: np.ndarray, is_named: np.ndarray, pairs: pd.DataFrame, near: float
) -> pd.DataFrame:
    """List a, b: images of one label whose near-equal ones are not all listed, each with the first of its connection."""
    is_full = np.ones(len(labels), bool)  # each that is listed is near, and there may be more
    is_full[pairs["a"][pairs["distance"] > near]] = False
    full = np.flatnonzero(is_full)
    full = full[np.argsort(labels[full], kind="stable")]
    of_label = np.split(full, np.flatnonzero(np.diff(labels[full])) + 1)

    def connect(some: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame({"a": some, "b": some[connect_near(sketches[some], is_named[some], near)]})

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return pd.concat(pool.map(connect, sorted(of_label, key=len, reverse=True)))


def connect_near(sketches: np.ndarray, is_named: np.ndarray, near: float) -> np.ndarray:
    """Single linkage, cut at a distance: for each row the least number of those that it is connected with, (n,).

    Two rows that are named are not connected. Spreads from row to row through what is near enough. Each row is compared with
    the others once, so that memory is that of a few rows' distances, and time that of all.
    """
    parts = np.arange(len(sketches))
    if is_named.all():
        return parts
    threshold = np.float32(1 - near**2 / 2 - ROUNDING)
    pool, matrix = parts, sketches  # those that are not reached yet, and some that are
    is_left = np.ones(len(sketches), bool)
    for first in range(len(sketches)):
        if not is_left[first]:
            continue
        is_left[first] = False
        frontier = np.array([first])
        while len(frontier):
            if 2 * is_left[pool].sum() < len(pool):
                pool = pool[is_left[pool]]
                matrix = sketches[pool]
            block, *rest = blocks(frontier, len(pool))
            is_near = sketches[block] @ matrix.T >= threshold
            is_near &= ~(is_named[block][:, None] & is_named[pool])
            reached = pool[is_near.any(axis=0) & is_left[pool]]
            is_left[reached] = False
            parts[reached] = first
            frontier = np.concatenate([*rest, reached])
    return parts


def blocks(numbers: np.ndarray, n_columns: int) -> list[np.ndarray]:
    """Cut rows of a matrix of so many columns into blocks of CELLS or fewer, but of one row at least."""
    n_rows = max(1, CELLS // max(1, n_columns))
    return [numbers[start : start + n_rows] for start in range(0, len(numbers), n_rows)]


def join(n_images: int, links: list[pd.DataFrame]) -> np.ndarray:
    """For each image the least number of those that the links (a, b) connect it with, (n_images,)."""
    pairs = pd.concat(links)
    graph = coo_array((np.ones(len(pairs), bool), (pairs["a"], pairs["b"])), shape=(n_images, n_images))
    numbers = connected_components(graph, directed=False)[1]
    firsts = np.unique(numbers, return_index=True)[1]
    return firsts[numbers]


def assign_folds(groups: np.ndarray, image_ids: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """Give each group a fold, so that each label has about half of its images in either: int32 array of shape (n_images,).

    A group has the fold that its least image_id tells. A film has the one that its view tells, so that films of one view
    (axis, side) are together: those of the view with most images in fold 0, the others in fold 1. Where a label then has
    less than 40 % of its images in one of them, groups move, as few as are needed, and none if that helps nobody. So an
    image keeps its fold when others come, but where one of these is the least of its group or where they change which
    groups must move.

    Parameters
    ----------
    groups : the number of each image's group, which is its least image
    rows : image, the number of the image, label and film (may be null): one row for each file
    """
    anchors, group = np.unique(groups[rows["image"]], return_inverse=True)
    label = rows["label"].astype("category").cat.codes.to_numpy()
    sizes = csr_array((np.ones(len(rows), np.int64), (group, label)))  # sums up what is of one group and label
    members, totals = sizes.tocsc(), sizes.sum(axis=0)
    sign = np.array([2 * (int(image_id[-1], 16) % 2) - 1 for image_id in image_ids[anchors]])  # the first digits are small
    films = rows["film"].dropna()  # each named LABEL/VIEW
    if len(films):
        views = films.str.partition("/")[2]
        of_group = views.groupby(group[views.index]).first()
        most = views.value_counts().sort_index().idxmax()
        sign[of_group.index] = np.where(of_group == most, -1, 1)
    balance = sign @ sizes  # images in fold 1 less those in fold 0
    for each in [*range(len(totals))] * 2:  # twice: a group that moves for one label may be of an earlier one
        own = members.indices[members.indptr[each] : members.indptr[each + 1]]
        some = sizes[own]
        owner = np.repeat(np.arange(len(own)), np.diff(some.indptr))
        while lopsided(balance[each], totals[each]):
            there, total = balance[some.indices], totals[some.indices]
            moved = there - 2 * sign[own][owner] * some.data
            change = np.bincount(owner, lopsided(moved, total) - lopsided(there, total))
            best = int(change.argmin())  # of equals the first: sizes that change a little do not change who moves
            if change[best] > -ROUNDING:
                break
            is_best = owner == best
            balance[some.indices[is_best]] = moved[is_best]
            sign[own[best]] *= -1
    return ((sign[np.searchsorted(anchors, groups)] + 1) // 2).astype(np.int32)


def lopsided(balance: np.ndarray, total: np.ndarray) -> np.ndarray:
    """How far a label is from what IMBALANCE allows, 0 if it is not; more than 1 if it is in one fold only."""
    share = np.abs(balance) / total
    return np.maximum(share - IMBALANCE, 0) + (share == 1)


def share_of_leaks(pairs: pd.DataFrame, labels: np.ndarray, folds: np.ndarray, near: float) -> float:
    """Compute the share of images that have a near-equal neighbour of their label in the other fold."""
    a, b = pairs["a"].to_numpy(), pairs["b"].to_numpy()
    leaks = (pairs["distance"].to_numpy() <= near) & (labels[a] == labels[b]) & (folds[a] != folds[b])
    return len(np.unique(a[leaks])) / max(len(folds), 1)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("neighbours")
    parser.add_argument("output")
    parser.add_argument("--near", type=between(float, 0, 1), required=True, help="share of the usual distance that is near")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
