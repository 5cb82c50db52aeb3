"""suspects: name the photographs that are probably wrong, and count those that are really different.

usage: python -m stages.suspects NEIGHBOURS SPLIT REVIEWED OUTPUT --share 0.8 --margin 0.7 --outlier 4

reads   NEIGHBOURS           sketches, neighbours
        SPLIT                images, settings
        REVIEWED             CSV of REVIEWED: what a person found right; a line that begins with # is a comment
writes  OUTPUT/suspects.csv  SUSPECTS, the strongest first
        OUTPUT/labels.csv    LABELS, by label
        OUTPUT/metrics.json  suspects by reason, and the sums over all labels

A photograph is suspect once, for the strongest of these reasons:

label     at least `share` of its neighbours have one other label, and it is no outlier
conflict  it is near-equal to a photograph of another label, or the same file. Of the two, the suspect is the one whose label
          fewer of its own neighbours have
group     at least `share` of the images of its group are nearer to one other label than to the other groups of their own: at
          most `margin` times as far. Perhaps a whole film is in the wrong folder. It is listed once; data/split/images has
          its files
outlier   its nearest neighbour is farther than is usual, by more than `outlier` robust standard deviations (of the logarithm
          of the distance). All groups tell alike what is usual, whatever their size

To work the list off, look at each suspect beside what it looks like: reports/report.html shows both. If it is wrong, move or
delete the file. If it is right, copy its path and image_id to REVIEWED: it is not listed again, nor is its group. A line
without a path holds for all copies of the image.

An image counts as 1 / (1 + the number of its near-equal images), within a label and a group. The sum is the effective number
of images: a film whose frames are all near-equal counts as one. Near-equal is what `split` takes for it.

Runs without Spark. No image is compared with all: N_SEEN and N_COUNTED are the most. Up to these numbers figures are exact.
"""

import argparse
import io
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from threadpoolctl import threadpool_limits

from stages.analysis import between, read, read_pairs, read_vectors, rounded, to_frame

IMAGES = ("image_id", "path", "label", "group")
SETTINGS = ("near_distance", "near_distance_across_labels")
REVIEWED = ("path", "image_id", "reason", "note")  # path, reason and note may be missing or empty
SUSPECTS = ("path", "image_id", "label", "reason", "looks_like", "nearest", "evidence")
LABELS = ("label", "n_images", "effective_images", "n_groups", "n_suspects")
REASONS = ("label", "conflict", "group", "outlier")
MIN_NEIGHBOURS = 5  # fewer do not tell a label
N_LOOKED = 16  # images of a group, at most, that tell what it looks like
N_ASKED = 2**16  # of them in all; those of the largest groups
N_SEEN = 2**18  # images that these are compared with; the first of each group, then the second of each
N_COUNTED = 2**13  # images of one group and label, about, that are compared with all others of it
ROWS = 64  # of a matrix of similarities, at once: 64 MiB with N_SEEN
N_THREADS = 4  # each with such a matrix
ROUNDING = 1e-6  # of a similarity in float32
TINY = 1e-3  # a distance that has a logarithm, and is as good as none


class Photographs(NamedTuple):
    """Each image once under each of its labels, by image_id and label."""

    rows: pd.DataFrame  # image_id, path, label, group
    images: np.ndarray  # int32, (n,): the number of the image, rising
    sketches: np.ndarray  # float32, (n, n_components), of unit length
    labels: np.ndarray  # int64, (n,): the number of the label
    groups: np.ndarray  # int64, (n,): the number of the group
    parts: np.ndarray  # int64, (n,): the number of group and label; few groups have more than one label


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    reviewed = read_reviewed(args.reviewed)
    order = [(column, "ascending") for column in ("image_id", "label", "path")]
    files = to_frame(read(f"{args.split}/images", IMAGES).sort_by(order))
    settings = read(f"{args.split}/settings", SETTINGS).to_pandas().iloc[0]
    photographs, images = to_photographs(files, f"{args.neighbours}/sketches")
    links = read_pairs(f"{args.neighbours}/neighbours", images)
    n_neighbours = len(links) // max(len(images), 1)  # the same for each
    pairs, copies = to_pairs(links, photographs)
    del links
    by_distance = find_outliers(photographs, pairs, args.outlier)
    own, by_label = find_labels(photographs, pairs, copies, n_neighbours, args.share)
    by_label = by_label[~by_label["photograph"].isin(by_distance["photograph"])]  # what is far tells no label
    across = settings["near_distance_across_labels"]
    by_conflict = find_conflicts(photographs, pd.concat([copies, pairs]), own, across, by_label["photograph"])
    known = pd.concat([by_label["photograph"], by_conflict["photograph"]])
    with threadpool_limits(1):  # the last bits of a result depend on the number of BLAS's threads
        by_group = find_groups(photographs, args.share, args.margin, known)
        effective = weigh(photographs, settings["near_distance"])
    found = pd.concat([by_label, by_conflict, by_group, by_distance]).drop_duplicates("photograph")
    is_right = is_reviewed(files, reviewed, photographs, found)
    suspects = describe(found[~is_right], photographs)
    labels = count_labels(files, photographs, effective, suspects)
    metrics = {
        "suspects": {reason: int((suspects["reason"] == reason).sum()) for reason in REASONS},
        "reviewed": int(is_right.sum()),
        "images": len(files),
        "effective_images": rounded(effective.sum()),
        "groups": files["group"].nunique(),
        "near_duplicates": count_near_duplicates(files, photographs, effective),
    }

    output = Path(args.output)
    output.mkdir()
    suspects.to_csv(output / "suspects.csv", columns=list(SUSPECTS), index=False, lineterminator="\n")
    labels.to_csv(output / "labels.csv", columns=list(LABELS), index=False, lineterminator="\n")
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    counts = ", ".join(f"{n:,} {reason}" for reason, n in metrics["suspects"].items())
    print(
        f"suspects: {len(suspects):,} ({counts}), and {is_right.sum():,} that a person found right; "
        f"{len(files):,} images are as good as {effective.sum():,.0f} different ones"
    )


# Tables


def read_reviewed(file: str) -> pd.DataFrame:
    """Read path, empty where it is missing, and image_id of what a person found right.

    Raises
    ------
    SystemExit
        no column image_id, or an image_id that is no SHA-256
    """
    lines = [line for line in Path(file).read_text().splitlines(keepends=True) if not line.startswith("#")]
    rows = pd.read_csv(io.StringIO("".join(lines) or ",".join(REVIEWED)), dtype=str, keep_default_na=False)
    if "image_id" not in rows:
        raise SystemExit(
            f"suspects: {file} has no column image_id, but {', '.join(rows)}; begin it with {','.join(REVIEWED)}"
        )
    wrong = [image_id for image_id in rows["image_id"] if not re.fullmatch("[0-9a-f]{64}", image_id)]
    if wrong:
        raise SystemExit(f"suspects: {file} has the image_id {wrong[0]!r}; copy the 64 digits from suspects.csv")
    return rows.reindex(columns=["path", "image_id"], fill_value="")


def to_photographs(files: pd.DataFrame, sketches: str) -> tuple[Photographs, pa.Array]:
    """Make the photographs of files that are sorted by image_id and label, and the image_id of each image."""
    rows = files.drop_duplicates(["image_id", "label"], ignore_index=True)
    image_ids = pa.array(rows["image_id"].drop_duplicates(), pa.string())
    images = pc.index_in(pa.array(rows["image_id"], pa.string()), image_ids).to_numpy()
    labels = rows["label"].astype("category").cat.codes.to_numpy(np.int64)
    groups = rows["group"].astype("category").cat.codes.to_numpy(np.int64)
    parts = np.unique(groups * (labels.max(initial=0) + 1) + labels, return_inverse=True)[1]
    matrix = read_vectors(sketches, "sketch", image_ids)
    if len(rows) > len(image_ids):
        matrix = matrix[images]
    return Photographs(rows, images, matrix, labels, groups, parts), image_ids


def to_pairs(links: pd.DataFrame, photographs: Photographs) -> tuple[pd.DataFrame, pd.DataFrame]:
    """List a, b, distance: each photograph with its neighbours, and with itself under other labels; by a, distance and b.

    Parameters
    ----------
    links : a, b, distance: numbers of images
    """
    counts = np.bincount(photographs.images).astype(np.int32)
    firsts = np.cumsum(counts, dtype=np.int32) - counts

    def of_photographs(a: np.ndarray, b: np.ndarray, distances: np.ndarray) -> pd.DataFrame:
        n_each = counts[a] * counts[b]
        link = np.repeat(np.arange(len(a), dtype=np.int32), n_each)
        place = np.arange(len(link), dtype=np.int32) - np.repeat(np.cumsum(n_each, dtype=np.int32) - n_each, n_each)
        ahead, beside = np.divmod(place, counts[b][link])
        pairs = pd.DataFrame({"a": firsts[a][link] + ahead, "b": firsts[b][link] + beside, "distance": distances[link]})
        pairs = pairs[pairs["a"] != pairs["b"]]
        return pairs.take(np.lexsort((pairs["b"], pairs["distance"], pairs["a"]))).reset_index(drop=True)

    copied = np.flatnonzero(counts > 1)
    copies = of_photographs(copied, copied, np.zeros(len(copied), np.float32))
    return of_photographs(*(links[name].to_numpy() for name in ("a", "b", "distance"))), copies


def is_reviewed(files: pd.DataFrame, reviewed: pd.DataFrame, photographs: Photographs, found: pd.DataFrame) -> np.ndarray:
    """Tell which of the suspects found a person found right: bool array of shape (n_found,)."""
    some = files[files["image_id"].isin(reviewed["image_id"])].merge(reviewed, on="image_id", suffixes=("", "_reviewed"))
    right = some[(some["path_reviewed"] == some["path"]) | (some["path_reviewed"] == "")]
    rows = photographs.rows[["image_id", "label"]].reset_index(names="photograph")
    rows = rows[rows["image_id"].isin(right["image_id"])].merge(right, on=["image_id", "label"])
    is_right = np.isin(np.arange(len(photographs.rows)), rows["photograph"])
    of_group = np.isin(photographs.parts, photographs.parts[is_right])  # who finds one of a film right, finds the film right
    numbers = found["photograph"].to_numpy(np.int64)
    return np.where(found["reason"] == "group", of_group[numbers], is_right[numbers])


def count_labels(
    files: pd.DataFrame, photographs: Photographs, effective: np.ndarray, suspects: pd.DataFrame
) -> pd.DataFrame:
    """LABELS, by label."""
    by_label = files.groupby("label")
    labels = pd.DataFrame({"n_images": by_label.size(), "n_groups": by_label["group"].nunique()})
    labels["effective_images"] = pd.Series(effective).groupby(photographs.rows["label"]).sum().map(rounded)
    labels["n_suspects"] = suspects["label"].value_counts().reindex(labels.index, fill_value=0)
    return labels.rename_axis("label").reset_index()


def count_near_duplicates(files: pd.DataFrame, photographs: Photographs, effective: np.ndarray) -> int:
    """Count the files that are near-equal to another of their label, or have the content of another."""
    n_files = files.groupby(["image_id", "label"]).size().to_numpy()  # in the order of the photographs
    return int(n_files[(effective < 1) | (n_files > 1)].sum())


# Suspects: photograph and nearest, numbers of photographs, reason, evidence; the strongest first


def find_labels(
    photographs: Photographs, pairs: pd.DataFrame, copies: pd.DataFrame, n_neighbours: int, share: float
) -> tuple[np.ndarray, pd.DataFrame]:
    """Count the neighbours that have the own label, (n,); find those whose neighbours nearly all have one other."""
    rows, labels = photographs.rows, photographs.labels
    n_labels = labels.max(initial=0) + 1
    keys, counts = np.unique(pairs["a"].to_numpy(np.int64) * n_labels + labels[pairs["b"]], return_counts=True)
    votes = pd.DataFrame({"a": keys // n_labels, "looks_like": keys % n_labels, "n": counts})
    is_own = votes["looks_like"].to_numpy() == labels[votes["a"]]
    own = np.zeros(len(rows), np.int64)
    own[votes["a"][is_own]] = votes["n"][is_own]
    others = votes[~is_own & (votes["n"] >= share * n_neighbours) & (n_neighbours >= MIN_NEIGHBOURS)]
    others = others.sort_values(["a", "n", "looks_like"], ascending=[True, False, True]).drop_duplicates("a")

    links = pd.concat([copies, pairs])  # a copy under that label is nearer than any neighbour
    links = links[links["a"].isin(others["a"])]
    links = links.assign(looks_like=labels[links["b"]]).drop_duplicates(["a", "looks_like"])
    found = others.merge(links, on=["a", "looks_like"]).sort_values(["n", "distance", "a"], ascending=[False, True, True])
    label = rows["label"]
    evidence = [
        f"{each.n} of {n_neighbours} neighbours are {label[each.b]}, {own[each.a]} are {label[each.a]}; "
        f"the nearest is at {each.distance:.2f}"
        for each in found.itertuples()
    ]
    return own, to_found("label", found["a"], found["b"], evidence)


def find_conflicts(
    photographs: Photographs, links: pd.DataFrame, own: np.ndarray, across: float, known: pd.Series
) -> pd.DataFrame:
    """Find the less likely one of each two that are near-equal under two labels, where none of the two is known already."""
    rows, labels = photographs.rows, photographs.labels
    a, b = links["a"].to_numpy(), links["b"].to_numpy()
    is_conflict = (labels[a] != labels[b]) & (links["distance"].to_numpy() <= across)
    is_conflict &= ~(np.isin(a, known) | np.isin(b, known))
    a, b, distances = a[is_conflict], b[is_conflict], links["distance"].to_numpy()[is_conflict]
    is_a = (own[a] < own[b]) | ((own[a] == own[b]) & (a > b))
    found = pd.DataFrame({"a": np.where(is_a, a, b), "b": np.where(is_a, b, a), "distance": distances})
    found = found.sort_values(["distance", "a", "b"]).drop_duplicates("a")
    label, image_id = rows["label"], rows["image_id"]
    evidence = [
        f"the same file lies under {label[b]}"
        if image_id[a] == image_id[b]
        else f"{label[b]} has a near-equal photograph, at {distance:.2f}; up to {across:.2f} is near-equal across labels"
        for a, b, distance in found.itertuples(index=False)
    ]
    return to_found("conflict", found["a"], found["b"], evidence)


def find_groups(photographs: Photographs, share: float, margin: float, known: pd.Series) -> pd.DataFrame:
    """Find the groups that are nearer to one other label than to the rest of their own; each by its nearest image."""
    rows, _, sketches, labels, groups, parts = photographs
    is_known = np.isin(np.arange(len(rows)), known)  # whose label is in doubt does not tell another's
    asked, seen = choose(photographs, is_known)
    looks_like, own, other = nearest_labels(photographs, asked, seen)
    n_asked = np.bincount(parts[asked], minlength=len(rows))

    answers = pd.DataFrame({"a": asked, "part": parts[asked], "looks_like": looks_like, "own": own, "other": other})
    answers = answers[(other <= margin * own) & np.isfinite(own)]
    of_part = answers.groupby(["part", "looks_like"])
    answers = answers.assign(n=of_part["a"].transform("size"))
    answers = answers.assign(ratio=of_part["other"].transform("median") / of_part["own"].transform("median"))
    answers = answers[(answers["n"] >= share * n_asked[answers["part"]]) & ~is_known[answers["a"]]]
    answers = answers.sort_values(["part", "n", "looks_like", "other", "a"], ascending=[True, False, True, True, True])
    found = answers.drop_duplicates("part").sort_values(["ratio", "part"])

    label, sizes = rows["label"], np.bincount(parts)
    nearest, evidence = [], []
    for each in found.itertuples():
        others = seen[(labels[seen] == each.looks_like) & (groups[seen] != groups[each.a])]
        nearest.append(others[np.argmax(sketches[others] @ sketches[each.a])])
        evidence.append(
            f"a group of {sizes[each.part]:,}: {each.n} of {n_asked[each.part]} are nearer to {label[nearest[-1]]} than to "
            f"other groups of {label[each.a]}, {each.ratio:.2f} times as far; the nearest is at {each.other:.2f}"
        )
    return to_found("group", found["a"], nearest, evidence)


def choose(photographs: Photographs, is_known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose images of the groups of two or more, and images to compare them with, by label: two int arrays.

    The SHA-256 chooses among the images of one group: they are sorted by it.
    """
    labels, parts = photographs.labels, photographs.parts
    rank = pd.Series(parts).groupby(parts).cumcount().to_numpy()
    looked = np.flatnonzero(rank < N_LOOKED)
    sizes = np.bincount(parts)
    largest = np.argsort(-sizes, kind="stable")
    n_looked = np.minimum(sizes[largest], N_LOOKED)
    largest = largest[(n_looked > 1) & (np.cumsum(n_looked) <= N_ASKED)]
    seen = looked[~is_known[looked]]
    seen = np.sort(seen[np.argsort(rank[seen], kind="stable")][:N_SEEN])
    asked = looked[np.isin(parts[looked], largest) & (len(seen) > 0)]
    return asked, seen[np.argsort(labels[seen], kind="stable")]


def nearest_labels(
    photographs: Photographs, asked: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the other label that is nearest to each photograph that is asked, not counting its own group.

    Parameters
    ----------
    asked, seen : numbers of photographs, (n_asked,) and (n_seen,), the latter by label

    Returns
    -------
    that label's number, and the distances to the own label and to that one, (n_asked,) each; infinite where there is none
    """
    _, _, sketches, labels, groups, _ = photographs
    present, starts = np.unique(labels[seen], return_index=True)
    by_group = np.argsort(groups[seen], kind="stable")
    first, last = (np.searchsorted(groups[seen][by_group], groups[asked], side) for side in ("left", "right"))
    candidates = sketches[seen].T

    def measure(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        block = asked[start : start + ROWS]
        similarity = sketches[block] @ candidates
        for i in range(len(block)):
            similarity[i, by_group[first[start + i] : last[start + i]]] = -np.inf
        best = np.maximum.reduceat(similarity, starts, axis=1)
        is_own = labels[block][:, None] == present
        own = np.where(is_own, best, -np.inf).max(axis=1)
        best[is_own] = -np.inf
        return present[best.argmax(axis=1)], to_distance(own), to_distance(best.max(axis=1))

    with ThreadPoolExecutor(N_THREADS) as pool:
        found = list(pool.map(measure, range(0, len(asked), ROWS)))
    empty = (np.empty(0, np.int64), np.empty(0), np.empty(0))
    looks_like, own, other = (np.concatenate(each) for each in zip(empty, *found, strict=True))
    return looks_like, own, other


def find_outliers(photographs: Photographs, pairs: pd.DataFrame, outlier: float) -> pd.DataFrame:
    """Find the photographs whose nearest image is farther than is usual."""
    nearest = pairs.drop_duplicates("a")
    logs = np.log(np.maximum(nearest["distance"].to_numpy(np.float64), TINY))
    weights = 1 / np.bincount(photographs.parts)[photographs.parts[nearest["a"]]]
    usual = weighted_median(logs, weights)
    spread = 1.4826 * weighted_median(np.abs(logs - usual), weights)  # as a standard deviation, if they are normal
    limit = usual + outlier * spread
    found = nearest[(logs > limit) & (spread > 0)].sort_values(["distance", "a"], ascending=[False, True])
    evidence = [
        f"its nearest image is at {distance:.2f}; usual is {np.exp(usual):.2f}, and up to {np.exp(limit):.2f}"
        for distance in found["distance"]
    ]
    return to_found("outlier", found["a"], found["b"], evidence)


def to_found(reason: str, photographs: Any, nearest: Any, evidence: list[str]) -> pd.DataFrame:
    numbers = {"photograph": np.asarray(photographs, np.int64), "nearest": np.asarray(nearest, np.int64)}
    return pd.DataFrame({**numbers, "reason": reason, "evidence": evidence})


def describe(found: pd.DataFrame, photographs: Photographs) -> pd.DataFrame:
    """SUSPECTS, in the same order."""
    suspects = photographs.rows.iloc[found["photograph"]].reset_index(drop=True)
    nearest = photographs.rows.iloc[found["nearest"]].reset_index(drop=True)
    reasons = found[["reason", "evidence"]].reset_index(drop=True)
    return suspects.join(reasons).assign(looks_like=nearest["label"], nearest=nearest["path"])


# Pure functions


def weigh(photographs: Photographs, near: float) -> np.ndarray:
    """1 / (1 + the number of near-equal photographs) of each, (n,); of large groups the mean of about N_COUNTED."""
    sketches, parts = photographs.sketches, photographs.parts
    weights = np.ones(len(parts))
    threshold = np.float32(1 - near**2 / 2 - ROUNDING)
    by_part = np.argsort(parts, kind="stable")
    sizes = np.bincount(parts)
    stops = np.cumsum(sizes)
    for stop, size in zip(stops[sizes > 1], sizes[sizes > 1], strict=True):
        members = by_part[stop - size : stop]
        some = members[:: math.ceil(size / N_COUNTED)]
        blocks, candidates = np.array_split(some, math.ceil(len(some) / ROWS)), sketches[members].T
        counts = np.concatenate([(sketches[block] @ candidates >= threshold).sum(axis=1) for block in blocks])
        weights[members] = (1 / counts).mean()
        weights[some] = 1 / counts
    return weights


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """Find the least value with at least half of the weight at or below it; 0 of none."""
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(below, below[-1] / 2)]) if len(values) else 0.0


def to_distance(similarity: np.ndarray) -> np.ndarray:
    """Of unit vectors, from their scalar product; infinite from none."""
    return np.sqrt(np.maximum(2 - 2 * similarity.astype(np.float64), 0))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("neighbours")
    parser.add_argument("split")
    parser.add_argument("reviewed")
    parser.add_argument("output")
    parser.add_argument("--share", type=between(float, 0.5, 1), required=True, help="that is nearly all")
    parser.add_argument("--margin", type=between(float, 0.01, 1), required=True, help="share of a distance that is nearer")
    parser.add_argument("--outlier", type=between(float, 1, 1000), required=True, help="robust standard deviations")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
