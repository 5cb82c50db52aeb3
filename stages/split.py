"""split: find groups of near-equal images, and put each whole group into one of two folds.

usage: python -m stages.split NEIGHBOURS OUTPUT --near 0.5

reads   NEIGHBOURS       sketches, neighbours
writes  OUTPUT/images    IMAGES, a row for each row of the sketches, by image_id and path
        OUTPUT/settings  SETTINGS, one row

An accuracy is honest only if no photograph that is tested is nearly equal to one that the model has learnt from. Names of
files seldom tell which are. The photographs themselves do: two of one label are near-equal if their distance is at most
`near` times the distance at which the nearest image of another label usually lies (the median). A group is what such pairs
connect: single linkage (Sibson 1973, "SLINK"). Where a file's name tells its film, the film is the group. Images without a
film join the group that they are near-equal to.

Runs without Spark. Labels are compared within themselves, so that time grows with the square of the largest label.
"""

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

from stages.analysis import between, read

SKETCHES = ("image_id", "path", "label", "film", "sketch")
NEIGHBOURS = ("image_id", "neighbours", "distances")
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
N_QUERIES = 4096  # images, about, whose nearest of their own and of another label are looked for
USUAL_DISTANCE = 0.9  # at most, and where there is one label only; 0.86 in two collections of fruit
NEAR = 0.5  # by which the leak is told, whatever `near` is
ROWS = 1024  # of a matrix of similarities, at once
ROUNDING = 1e-6  # of a similarity in float32
IMBALANCE = 0.2  # of a label: the difference of its two parts, as a share of its images


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = read(f"{args.neighbours}/sketches", SKETCHES).to_pandas().sort_values(["image_id", "path"], ignore_index=True)
    images = rows.drop_duplicates("image_id", ignore_index=True)
    sketches = np.frombuffer(b"".join(images["sketch"]), np.float32).reshape(len(images), -1)
    labels = images["label"].astype("category").cat.codes.to_numpy(np.int64)
    pairs = read_pairs(f"{args.neighbours}/neighbours", images["image_id"])
    with threadpool_limits(1):  # the last bits of a result depend on the number of BLAS's threads
        usual, usual_within = usual_distances(sketches, labels)
        near, across = args.near * usual, min(args.near * usual, usual_within)
        parts = connect_labels(sketches, labels, images["film"].notna().to_numpy(), near)
    is_across = (labels[pairs["a"]] != labels[pairs["b"]]) & (pairs["distance"] <= across)
    groups = join(parts, images["film"], pairs[is_across])
    numbers = pd.Index(images["image_id"]).get_indexer(rows["image_id"])
    folds = assign_folds(groups, images["image_id"].to_numpy(), rows[["label"]].assign(image=numbers))
    leak = share_of_leaks(pairs, labels, folds, NEAR * usual)

    anchors = images["image_id"].to_numpy()[groups]
    write(rows.assign(group=anchors[numbers], fold=folds[numbers]), IMAGES, f"{args.output}/images")
    settings = pd.DataFrame([[usual, near, across, leak]], columns=SETTINGS.names)
    write(settings, SETTINGS, f"{args.output}/settings")
    print(f"split: {len(rows):,} images in {len(set(groups)):,} groups; {leak:.1%} of the images leak into the other fold")


def read_pairs(folder: str, image_ids: pd.Series) -> pd.DataFrame:
    """a, b, distance: the numbers of each image and of each of its neighbours."""
    neighbours = read(folder, NEIGHBOURS).to_pandas().set_index("image_id").loc[image_ids]
    n_each = neighbours["neighbours"].map(len).to_numpy()
    others = np.concatenate([*neighbours["neighbours"], []]).astype(str)
    distances = np.concatenate([*neighbours["distances"], []])
    return pd.DataFrame(
        {
            "a": np.repeat(np.arange(len(image_ids)), n_each),
            "b": pd.Index(image_ids).get_indexer(others),
            "distance": distances,
        }
    )


def usual_distances(sketches: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The median distances to the nearest image of another label, and of the same label, over some N_QUERIES images."""
    queries = np.arange(0, len(sketches), math.ceil(len(sketches) / N_QUERIES))
    other, same = [], []
    for block in np.array_split(queries, math.ceil(len(queries) / ROWS)):
        similarity = sketches[block] @ sketches.T
        similarity[np.arange(len(block)), block] = -np.inf
        is_same = labels[block][:, None] == labels
        other.append(np.where(is_same, -np.inf, similarity).max(axis=1))
        same.append(np.where(is_same, similarity, -np.inf).max(axis=1))
    medians = [
        to_distance(np.median(found[np.isfinite(found)])) if np.isfinite(found).any() else USUAL_DISTANCE
        for found in (np.concatenate(other), np.concatenate(same))
    ]
    return min(medians[0], USUAL_DISTANCE), medians[1]


def to_distance(similarity: Any) -> Any:
    """Of unit vectors, from their scalar product."""
    return np.sqrt(np.maximum(2 - 2 * np.asarray(similarity, np.float64), 0))


def connect_labels(sketches: np.ndarray, labels: np.ndarray, is_named: np.ndarray, near: float) -> np.ndarray:
    """Connect near-equal images of one label: for each image the least number of those that it is connected with.

    Images whose film is known are connected with those whose film is not, but not with one another.
    """
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    parts = np.empty(len(labels), np.int64)

    def connect(some: np.ndarray) -> None:
        parts[some] = some[connect_near(sketches[some], is_named[some], near)]

    with ThreadPoolExecutor() as pool:
        list(pool.map(connect, sorted(members, key=len, reverse=True)))
    return parts


def connect_near(sketches: np.ndarray, is_named: np.ndarray, near: float) -> np.ndarray:
    """Single linkage, cut at a distance: for each row the least number of those that it is connected with, (n,).

    Spreads from row to row through what is near enough. Each row is compared with the others once, so that memory is that of
    a few rows' distances, and time that of all.
    """
    parts = np.arange(len(sketches))
    if is_named.all():
        return parts
    threshold = np.float32(1 - near**2 / 2 - ROUNDING)
    pool, matrix = np.arange(len(sketches)), sketches  # those that are not reached yet, and some that are
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
            block, frontier = frontier[:ROWS], frontier[ROWS:]
            is_near = sketches[block] @ matrix.T >= threshold
            is_near &= ~(is_named[block][:, None] & is_named[pool])
            reached = pool[is_near.any(axis=0) & is_left[pool]]
            is_left[reached] = False
            parts[reached] = first
            frontier = np.concatenate([frontier, reached])
    return parts


def join(parts: np.ndarray, film: pd.Series, links: pd.DataFrame) -> np.ndarray:
    """Join what is connected by parts, by films and by links: for each image the least number of its group, (n_images,)."""
    first_of_film = film.dropna().drop_duplicates()
    known = film.dropna()
    firsts = known.map(pd.Series(first_of_film.index, first_of_film)).to_numpy(np.int64)
    a = np.concatenate([np.arange(len(parts)), known.index.to_numpy(), links["a"]]).astype(np.int64)
    b = np.concatenate([parts, firsts, links["b"]]).astype(np.int64)
    graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(len(parts), len(parts)))
    numbers = connected_components(graph, directed=False)[1]
    firsts = np.unique(numbers, return_index=True)[1]
    return firsts[numbers]


def assign_folds(groups: np.ndarray, image_ids: np.ndarray, rows: pd.DataFrame) -> np.ndarray:
    """Give each group a fold, so that each label has about half of its images in either: int32 array of shape (n_images,).

    A group has the fold that its least image_id tells, as long as each of its labels keeps at least 40 % of its images in
    the other fold, or would have fewer otherwise. So an image keeps its fold when others come, but where its group changes,
    or the balance of its label does.

    Parameters
    ----------
    groups : the number of each image's group, which is its least image
    rows : image, the number of the image, and label: one row for each file
    """
    sizes = rows.assign(group=groups[rows["image"]]).groupby(["group", "label"]).size()
    totals = sizes.groupby("label").sum().to_dict()
    contents: dict[int, list[tuple[str, int]]] = {}
    for (group, label), size in sizes.items():
        contents.setdefault(group, []).append((label, size))
    balance = dict.fromkeys(totals, 0)  # images in fold 1 less those in fold 0
    folds = np.zeros(len(groups), np.int32)
    for group in sorted(contents, key=lambda group: (-sum(size for _, size in contents[group]), group)):
        told = int(image_ids[group][-1], 16) % 2  # its first digits are small, as it is the least
        sign = 1 if told else -1
        as_told = sum(abs(balance[label] + sign * size) for label, size in contents[group])
        otherwise = sum(abs(balance[label] - sign * size) for label, size in contents[group])
        if as_told > max(otherwise, IMBALANCE * sum(totals[label] for label, _ in contents[group])):
            told, sign = 1 - told, -sign
        folds[group] = told
        for label, size in contents[group]:
            balance[label] += sign * size
    return folds[groups]


def share_of_leaks(pairs: pd.DataFrame, labels: np.ndarray, folds: np.ndarray, near: float) -> float:
    """The share of images that have a near-equal neighbour of their label in the other fold."""
    a, b = pairs["a"].to_numpy(), pairs["b"].to_numpy()
    leaks = (pairs["distance"].to_numpy() <= near) & (labels[a] == labels[b]) & (folds[a] != folds[b])
    return len(np.unique(a[leaks])) / max(len(folds), 1)


def write(table: pd.DataFrame, schema: pa.Schema, folder: str) -> None:
    """Write the columns of the schema as a table of one file."""
    Path(folder).mkdir(parents=True)
    rows = pa.Table.from_pandas(table[schema.names], schema, preserve_index=False).replace_schema_metadata()
    pq.write_table(rows, Path(folder, "part-00000.parquet"))


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
