"""evaluate: what the reduction costs, told by tests that do not flatter.

usage: evaluate.py INGESTED FEATURES COVARIANCE BASELINE REDUCED OUTPUT --curve 2 4 8 16

reads   INGESTED/quarantine, FEATURES, COVARIANCE, BASELINE, REDUCED
writes  OUTPUT/metrics.json     counts, explained variance, accuracies
        OUTPUT/summary.txt      the same for people
        OUTPUT/spectrum.csv     component, explained_variance_ratio, cumulative_explained_variance_ratio
        OUTPUT/accuracy.csv     k, embedding, features, pixels: accuracy of the nearest neighbour;
                                loss, loss_low, loss_high: features minus embedding, with its 95 % interval;
                                is_kept: whether k is the one of REDUCED
        OUTPUT/labels.csv       label, n_images, recall
        OUTPUT/confusion.csv    label, predicted, n_images, share of those of the label; the labels most often confused
        OUTPUT/predictions.csv  path, label, predicted, nearest: each image tested, and its nearest neighbour in the
                                embedding, with that one's label
        OUTPUT/points.csv       path, label, component_1, component_2: some images in the plane of most variance

Photographs of one object from one side are nearly equal, so a random split measures nothing. Here a group of them is in one
fold only; all is fitted on one fold, PCA too, and tested on the other, then the other way round. Beside the accuracy of the
embedding stand that of the full feature space and that of 16 x 16 raw pixels, the floor. How much of a difference is chance
is told by a bootstrap over groups (Efron and Tibshirani 1993, "An introduction to the bootstrap", 8.5): were the images of
a group drawn one by one, as if each were news, the interval would be far too narrow.

Runs without Spark, in bounded memory: counts come from all images, accuracies from those of BASELINE.
"""

import argparse
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.dataset as ds
import scipy.linalg
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from tqdm import tqdm

THRESHOLDS = (0.80, 0.90, 0.95, 0.99)
ROUNDING = 1e-12  # of a sum of shares
SPACES = ("embedding", "features", "pixels")
ROWS = 1024  # of a distance matrix, at once
DRAWS = 2000  # of the bootstrap
POINTS = 2000  # of a plot; more are a blot
CONFUSED = 20  # labels of a confusion matrix that can be read
INTERVAL = (0.025, 0.975)
ACCURACY = ("k", *SPACES, "loss", "loss_low", "loss_high", "is_kept")
PREDICTIONS = ("path", "label", "predicted", "nearest")


class Moments(NamedTuple):
    """Of the features of one fold, as the stage covariance has them."""

    n: int
    mean: np.ndarray  # float64, (n_features,)
    scatter: np.ndarray  # float64, (n_features, n_features)


class Basis(NamedTuple):
    """Principal components of one fold, as the stage reduce has them."""

    mean: np.ndarray  # (n_features,)
    scale: np.ndarray  # (n_features,)
    components: np.ndarray  # (n_components, n_features), orthonormal rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    spectrum = read(f"{args.reduced}/model/spectrum").drop(columns="explained_variance")
    k = len(read(f"{args.reduced}/model/components", ["component"]))
    is_scaled = bool((read(f"{args.reduced}/model/scaling")["scale"] != 1).any())
    images = read(args.features, ["image_id", "label", "group"])
    moments = read_moments(args.covariance)
    sample, features = read_sample(args.baseline, args.features)

    # One thread for each fold, and one of BLAS in it: the last bits of a result depend on the number of BLAS's threads.
    steps = tqdm(total=2 * 3, desc="evaluate", disable=None)  # on a terminal only
    with threadpool_limits(1), ThreadPoolExecutor() as pool, steps:
        both = pool.map(lambda fold: evaluate_fold(sample, features, moments, fold, k, args.curve, is_scaled, steps), (0, 1))
        folds = [fold for fold in both if fold]

    metrics: dict[str, Any] = {
        "images": count_images(images, args.ingested),
        "variance": variance(spectrum["cumulative_explained_variance_ratio"].to_numpy(), k),
    }
    predictions = pd.DataFrame({name: [] for name in PREDICTIONS})
    accuracy = pd.DataFrame({name: [] for name in ACCURACY})
    if folds:
        metrics["variance"]["held_out_error"] = rounded(np.mean([fold["held_out_error"] for fold in folds]))
        for score in ("nearest_neighbour", "linear_probe"):
            metrics[score] = {space: rounded(np.mean([fold[score][space] for fold in folds])) for space in SPACES}
        metrics["tested"] = {"images": sum(len(fold["predictions"]) for fold in folds), "folds": len(folds)}
        predictions = pd.concat([fold["predictions"] for fold in folds]).sort_values("path")
        curve = pd.concat([fold["curve"] for fold in folds]).groupby("k").mean()
        accuracy = curve.join(losses([fold["hits"] for fold in folds])).round(4).reset_index()
        accuracy["is_kept"] = (accuracy["k"] == k).astype(int)
        metrics["variance"]["k_enough"] = smallest_k(accuracy)
    hits = (predictions["label"] == predictions["predicted"]).groupby(predictions["label"])
    labels = hits.agg(n_images="size", recall="mean").round(4).reset_index()

    partial = Path(f"{args.output}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (partial / "summary.txt").write_text(summary(metrics, args))
    for name, table in (
        ("spectrum", spectrum),
        ("accuracy", accuracy),
        ("labels", labels),
        ("confusion", confusion(predictions)),
        ("predictions", predictions),
        ("points", read_points(args.reduced, len(images))),
    ):
        table.to_csv(partial / f"{name}.csv", index=False)
    shutil.rmtree(args.output, ignore_errors=True)
    partial.rename(args.output)
    print(f"evaluate: {len(predictions):,} images tested, k={k}; see {args.output}/summary.txt")


def evaluate_fold(
    sample: pd.DataFrame,
    features: np.ndarray,
    moments: dict[int, Moments],
    test_fold: int,
    k: int,
    curve: list[int],
    is_scaled: bool,
    steps: tqdm,
) -> dict[str, Any] | None:
    """All that is measured on one fold with what is fitted on the other; None where either has no image.

    Images whose label the other fold does not have cannot be recognised, and are left out.
    """
    is_train = (sample["fold"] != test_fold).to_numpy()
    is_test = ~is_train & sample["label"].isin(sample["label"][is_train]).to_numpy()
    if not is_train.any() or not is_test.any():
        return None
    basis = fit(moments[1 - test_fold], is_scaled, max(k, *curve))
    k = min(k, len(basis.components))
    ks = sorted({*(each for each in curve if each <= len(basis.components)), k})

    train, test = sample[is_train], sample[is_test]
    embedding = (project(features[is_train], basis), project(features[is_test], basis))
    steps.update()
    labels, truth = train["label"].to_numpy(), test["label"].to_numpy()
    by_k = nearest(*embedding, ks)
    steps.update()
    probe = linear_probe(embedding[0][:, :k], embedding[1][:, :k], labels)
    steps.update()
    accuracy, probes = (
        {"embedding": float(np.mean(predicted == truth))}
        | {space: float(np.mean(test[f"{space}_{score}"] == truth)) for space in SPACES[1:]}
        for score, predicted in (("nearest_neighbour", labels[by_k[k]]), ("linear_probe", probe))
    )
    return {
        "held_out_error": held_out_error(moments[test_fold], basis, k),
        "nearest_neighbour": accuracy,
        "linear_probe": probes,
        "curve": pd.DataFrame([{"k": each, **accuracy, "embedding": np.mean(labels[by_k[each]] == truth)} for each in ks]),
        "hits": pd.DataFrame(
            {each: labels[by_k[each]] == truth for each in ks}
            | {"features": test["features_nearest_neighbour"].to_numpy() == truth}
        ).assign(group=test["group"].to_numpy()),
        "predictions": pd.DataFrame(
            {
                "path": test["path"],
                "label": truth,
                "predicted": labels[by_k[k]],
                "nearest": train["path"].to_numpy()[by_k[k]],
            }
        ),
    }


def fit(moments: Moments, is_scaled: bool, max_components: int) -> Basis:
    """The first principal components of one fold: those of the stage reduce, of the fold alone."""
    n, mean, scatter = moments
    deviation = np.sqrt(np.diag(scatter) / max(n - 1, 1))
    scale = np.where(deviation > 0, deviation, 1.0) if is_scaled else np.ones_like(mean)
    wanted = (max(0, mean.size - max_components), mean.size - 1)
    variance, vectors = scipy.linalg.eigh(scatter / np.outer(scale, scale), subset_by_index=wanted)
    rank = max(1, int(np.sum(variance > variance[-1] * mean.size * np.finfo(np.float64).eps)))
    return Basis(mean, scale, vectors.T[::-1][: min(rank, max(n - 1, 1))])


def project(features: np.ndarray, basis: Basis) -> np.ndarray:
    return (((features - basis.mean) / basis.scale) @ basis.components.T).astype(np.float32)


def held_out_error(test: Moments, basis: Basis, k: int) -> float:
    """Share of the variance of the test fold about the training fold's mean that k components lose; exact, of all images."""
    shift = (test.mean - basis.mean) / basis.scale
    about = test.scatter / np.outer(basis.scale, basis.scale) + test.n * np.outer(shift, shift)
    components = basis.components[:k]
    kept = np.einsum("kd,kd->", components @ about, components)
    return float(1 - kept / np.trace(about))


def nearest(train: np.ndarray, test: np.ndarray, ks: list[int]) -> dict[int, np.ndarray]:
    """Number of each test row's nearest training row (Euclidean) by the first k columns, for each k (rising).

    Returns
    -------
    array of shape (n_test,) by k
    """
    rows: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for start in range(0, len(test), ROWS):
        some = test[start : start + ROWS]
        distance = np.zeros((len(some), len(train)), np.float32)
        for done, k in zip([0, *ks], ks, strict=False):  # distances add up over columns
            columns = slice(done, k)
            distance += (train[:, columns] ** 2).sum(axis=1) - 2 * some[:, columns] @ train[:, columns].T
            rows[k].append(distance.argmin(axis=1))
    return {k: np.concatenate(parts) for k, parts in rows.items()}


def losses(folds: list[pd.DataFrame]) -> pd.DataFrame:
    """What the first k components lose of the full space's accuracy, the mean of the folds, with its interval.

    Parameters
    ----------
    folds
        for each fold a row an image tested: its group, and whether it was recognised in the full space (column features)
        and by the first k components (column k, for each k)

    Returns
    -------
    loss, loss_low, loss_high by k, for those k that all folds have
    """
    random = np.random.default_rng(0)
    draws, observed = [], []
    for hits in folds:
        by_group = hits.assign(n=1).groupby("group").sum()
        lost = -by_group.drop(columns=["features", "n"]).sub(by_group["features"], axis=0)
        chosen = random.multinomial(len(lost), np.full(len(lost), 1 / len(lost)), size=DRAWS)
        sizes = by_group["n"].to_numpy()
        draws.append(pd.DataFrame(chosen @ lost.to_numpy() / (chosen @ sizes)[:, None], columns=lost.columns))
        observed.append(lost.sum() / sizes.sum())
    mean = sum(draws) / len(draws)
    low, high = (mean.quantile(each) for each in INTERVAL)
    return pd.DataFrame({"loss": sum(observed) / len(observed), "loss_low": low, "loss_high": high}).dropna()


def smallest_k(accuracy: pd.DataFrame) -> int:
    """The fewest components of the curve that cannot be told from the full space; the most there are, if all can be."""
    enough = accuracy.loc[accuracy["loss_low"] <= 0, "k"]
    return int(enough.min() if len(enough) else accuracy["k"].max())


def confusion(predictions: pd.DataFrame) -> pd.DataFrame:
    """Which labels are taken for which, among the CONFUSED labels that have the most such errors in pairs."""
    cells = predictions.groupby(["label", "predicted"]).size().rename("n_images").reset_index()
    cells["share"] = (cells["n_images"] / cells.groupby("label")["n_images"].transform("sum")).round(4)
    errors = cells[cells["label"] != cells["predicted"]].sort_values(
        ["n_images", "label", "predicted"], ascending=[False, True, True]
    )
    labels = pd.unique(pd.concat([errors[["label", "predicted"]].stack(), cells["label"]]))[:CONFUSED]
    return cells[cells["label"].isin(labels) & cells["predicted"].isin(labels)]


def linear_probe(train: np.ndarray, test: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels of the test rows by logistic regression, scaled so that one penalty suits spaces of any unit."""
    if len(set(labels)) < 2:
        return np.full(len(test), labels[0])
    mean = train.mean(axis=0)
    spread = np.sqrt(((train - mean) ** 2).sum(axis=1).mean()) or 1.0
    probe = LogisticRegression(C=100.0, max_iter=500).fit((train - mean) / spread, labels)
    return probe.predict((test - mean) / spread)


def read_sample(baseline: str, features_folder: str) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows of BASELINE, and their features, a float32 array of shape (n_images, n_features)."""
    sample = read(baseline)
    # The sample is all images up to some SHA-256.
    chosen = pc.field("image_id") <= (sample["image_id"].max() if len(sample) else "")
    table = ds.dataset(features_folder, format="parquet").to_table(["image_id", "features"], filter=chosen)
    features = to_matrix(table["features"].combine_chunks().flatten().to_numpy(), len(table))
    first = pd.Series(range(len(table)), table["image_id"].to_pylist()).groupby(level=0).first()
    return sample, features[first[sample["image_id"]]]


def to_matrix(values: np.ndarray, n_rows: int) -> np.ndarray:
    return values.reshape(n_rows, -1 if n_rows else 0)


def read_points(reduced: str, n_images: int) -> pd.DataFrame:
    """About POINTS images, chosen by SHA-256: path, label and the first two coordinates of their embedding."""
    rows = ds.dataset(f"{reduced}/embeddings", format="parquet").to_table(filter=of_share(POINTS / max(n_images, 1)))
    points = rows.to_pandas().sort_values("path")
    for i in (0, 1):
        points[f"component_{i + 1}"] = [round(float(each[i]), 4) if i < len(each) else 0.0 for each in points["embedding"]]
    return points[["path", "label", "component_1", "component_2"]]


def of_share(share: float) -> pc.Expression:
    """A filter of rows by image_id, a SHA-256 and so uniform: that share of all images begins below some hash."""
    return pc.field("image_id") < f"{int(share * 16**8):08x}" if share < 1 else pc.field("image_id").is_valid()


def read_moments(covariance: str) -> dict[int, Moments]:
    rows = read(covariance).itertuples()
    return {
        row.fold: Moments(row.n, np.frombuffer(row.mean), to_square(np.frombuffer(row.scatter), len(row.mean) // 8))
        for row in rows
    }


def to_square(triangle: np.ndarray, n: int) -> np.ndarray:
    """The symmetric matrix of shape (n, n) with that lower triangle."""
    square = np.zeros((n, n))
    square[np.tri(n, dtype=bool)] = triangle
    return square + np.tril(square, -1).T


def read(folder: str, columns: list[str] | None = None) -> pd.DataFrame:
    return ds.dataset(folder, format="parquet").to_table(columns).to_pandas()


def count_images(images: pd.DataFrame, ingested: str) -> dict[str, int]:
    n_labels = images.groupby("image_id")["label"].nunique()
    return {
        "images": len(images),
        "labels": images["label"].nunique(),
        "groups": images["group"].nunique(),
        "quarantined": ds.dataset(f"{ingested}/quarantine", format="parquet").count_rows(),
        "duplicates": len(images) - len(n_labels),
        "label_conflicts": int((n_labels > 1).sum()),
    }


def variance(cumulative: np.ndarray, k: int) -> dict[str, float]:
    """What k components keep, and how many keep 80, 90, 95 and 99 %."""
    needed = {
        f"k{threshold:.0%}".rstrip("%"): int(np.searchsorted(cumulative, threshold - ROUNDING)) + 1
        for threshold in THRESHOLDS
    }
    return {"components": k, "explained": rounded(cumulative[k - 1]), **needed}


def rounded(value: Any) -> float:
    return round(float(value), 4)


def summary(metrics: dict[str, Any], args: argparse.Namespace) -> str:
    images, kept = metrics["images"], metrics["variance"]
    lines = [
        f"{images['images']:,} images of {images['labels']:,} labels ({images['quarantined']:,} files quarantined, "
        f"{images['duplicates']:,} duplicates, {images['label_conflicts']:,} of them under two labels)",
        f"{kept['components']:,} components keep {kept['explained']:.1%} of the variance "
        f"(80 %: {kept['k80']:,}, 90 %: {kept['k90']:,}, 95 %: {kept['k95']:,}, 99 %: {kept['k99']:,})",
        "",
    ]
    if "nearest_neighbour" not in metrics:
        lines.append("No accuracy: the folds have no label in common, or one is empty; see fold_pattern in params.yaml.")
    else:
        lines += [
            "Accuracy, trained on one fold and tested on the other   embedding   features   raw pixels",
            *(
                f"  {name:<52}" + "".join(f"{metrics[key][space]:>11.1%}" for space in SPACES)
                for name, key in (("nearest neighbour", "nearest_neighbour"), ("linear probe", "linear_probe"))
            ),
            "",
            f"k = {kept['k_enough']:,} is enough: the smallest of those tried whose accuracy may be that of the features",
        ]
    lines += ["", f"features: {args.features}   model and embeddings: {args.reduced}   figures: {args.output}"]
    return "\n".join(lines) + "\n"


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ingested")
    parser.add_argument("features")
    parser.add_argument("covariance")
    parser.add_argument("baseline")
    parser.add_argument("reduced")
    parser.add_argument("output")
    parser.add_argument("--curve", type=positive, nargs="+", required=True, help="k, for the curve of accuracy")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
