"""evaluate: what the reduction costs, told by tests that do not flatter.

usage: python -m stages.evaluate INGESTED FEATURES SPLIT COVARIANCE BASELINE REDUCED OUTPUT --curve 2 4 8 16

reads   INGESTED/quarantine, FEATURES, SPLIT, COVARIANCE, BASELINE, REDUCED
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
fold only. All is fitted on one fold, PCA too, and tested on the other, then the other way round. The accuracies of the full
feature space and of 16 x 16 raw pixels, the floor, stand beside that of the embedding. A bootstrap over groups tells how
much of a difference is chance (Efron and Tibshirani 1993, "An introduction to the bootstrap", 8.5). If it drew the images of
a group one by one, as if each were news, the interval would be far too narrow.

Runs without Spark, in bounded memory: counts come from all images, accuracies from those of BASELINE.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.dataset as ds
from tqdm import tqdm

from stages.analysis import (
    PREDICTED,
    RECOGNISERS,
    SPACES,
    UNREDUCED,
    Basis,
    Moments,
    between,
    count_confusions,
    first_rows,
    fit_basis,
    in_both_folds,
    most_confused,
    nearest,
    of_share,
    project,
    read,
    read_moments,
    rounded,
    to_matrix,
    train_and_test,
)

SPLIT = ("image_id", "label", "group", "fold")
VECTORS = ("image_id", "features")
BASELINE = ("image_id", "path", "label", "group", "fold", *PREDICTED)
SPECTRUM = ("component", "explained_variance_ratio", "cumulative_explained_variance_ratio")
SETTINGS = ("k", "scale")
EMBEDDINGS = ("path", "label", "embedding")
THRESHOLDS = (0.80, 0.90, 0.95, 0.99)
ROUNDING = 1e-12  # of a sum of shares
DRAWS = 2000  # of the bootstrap
POINTS = 2000  # of a plot; more are a blot
CONFUSED = 20  # labels of a confusion matrix that can be read
CURVED = "nearest_neighbour"  # the recogniser of the curve
INTERVAL = (0.025, 0.975)
ACCURACY = ("k", *SPACES, "loss", "loss_low", "loss_high", "is_kept")
PREDICTIONS = ("path", "label", "predicted", "nearest")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    spectrum = read(f"{args.reduced}/model/spectrum", SPECTRUM).to_pandas()
    (settings,) = read(f"{args.reduced}/model/settings", SETTINGS).to_pylist()
    k, scale = settings["k"], settings["scale"]
    images = read(f"{args.split}/images", SPLIT).to_pandas()
    moments = read_moments(args.covariance)
    sample, features = read_sample(args.baseline, args.features)

    def measure(fold: int, steps: tqdm) -> dict[str, Any] | None:
        return evaluate_fold(sample, features, moments, fold, k, args.curve, scale, steps)

    folds = [fold for fold in in_both_folds("evaluate", 1 + len(RECOGNISERS), measure) if fold]

    metrics: dict[str, Any] = {
        "images": count_images(images, args.ingested),
        "variance": variance(spectrum["cumulative_explained_variance_ratio"].to_numpy(), k),
    }
    predictions = pd.DataFrame({name: [] for name in PREDICTIONS})
    accuracy = pd.DataFrame({name: [] for name in ACCURACY})
    if folds:
        metrics["variance"]["held_out_error"] = rounded(np.mean([fold["held_out_error"] for fold in folds]))
        for name in RECOGNISERS:
            metrics[name] = {space: rounded(np.mean([fold["scores"][name][space] for fold in folds])) for space in SPACES}
        metrics["tested"] = {"images": sum(len(fold["predictions"]) for fold in folds), "folds": len(folds)}
        predictions = pd.concat([fold["predictions"] for fold in folds]).sort_values("path")
        curve = pd.concat([fold["curve"] for fold in folds]).groupby("k").mean()
        accuracy = curve.join(losses([fold["hits"] for fold in folds])).round(4).reset_index()
        accuracy["is_kept"] = (accuracy["k"] == k).astype(int)
        metrics["variance"]["k_enough"] = smallest_k(accuracy)
    hits = (predictions["label"] == predictions["predicted"]).groupby(predictions["label"])
    tables = {
        "spectrum": spectrum,
        "accuracy": accuracy,
        "labels": hits.agg(n_images="size", recall="mean").round(4).reset_index(),
        "confusion": confusion(predictions),
        "predictions": predictions,
        "points": read_points(args.reduced, len(images)),
    }

    output = Path(args.output)
    output.mkdir()
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (output / "summary.txt").write_text(summary(metrics, args.features, args.reduced))
    for name, table in tables.items():
        table.to_csv(output / f"{name}.csv", index=False)
    print(f"evaluate: {len(predictions):,} images tested, k={k}")


def evaluate_fold(
    sample: pd.DataFrame,
    features: np.ndarray,
    moments: dict[int, Moments],
    test_fold: int,
    k: int,
    curve: list[int],
    scale: str,
    steps: tqdm,
) -> dict[str, Any] | None:
    """Measure on one fold what is fitted on the other; None where no image can be tested."""
    is_train, is_test = train_and_test(sample, test_fold)
    if not is_test.any():
        return None
    basis = fit_basis(moments[1 - test_fold], scale, max(k, *curve))
    k = min(k, len(basis.components))
    ks = sorted({*(each for each in curve if each <= len(basis.components)), k})

    train, test = sample[is_train], sample[is_test]
    labels, truth = train["label"].to_numpy(), test["label"].to_numpy()
    train_rows, test_rows = (project(features[each], basis) for each in (is_train, is_test))
    neighbours = {each: nearest(train_rows[:, :each], test_rows[:, :each]) for each in ks}
    is_hit: dict[int | str, np.ndarray] = {each: labels[rows] == truth for each, rows in neighbours.items()}
    steps.update()
    scores = {}
    for name, recogniser in RECOGNISERS.items():
        predicted = recogniser.predict(recogniser.fit(train_rows[:, :k], labels), test_rows[:, :k])
        unreduced = {space: float(np.mean(test[f"{space}_{name}"] == truth)) for space in UNREDUCED}
        scores[name] = {"embedding": float(np.mean(predicted == truth)), **unreduced}
        steps.update()
    return {
        "held_out_error": held_out_error(moments[test_fold], basis, k),
        "scores": scores,
        "curve": pd.DataFrame([{"k": each, **scores[CURVED], "embedding": np.mean(is_hit[each])} for each in ks]),
        "hits": pd.DataFrame({**is_hit, "features": test[f"features_{CURVED}"].to_numpy() == truth}).assign(
            group=test["group"].to_numpy()
        ),
        "predictions": pd.DataFrame(
            {
                "path": test["path"],
                "label": truth,
                "predicted": labels[neighbours[k]],
                "nearest": train["path"].to_numpy()[neighbours[k]],
            }
        ),
    }


def held_out_error(test: Moments, basis: Basis, k: int) -> float:
    """Compute the share of the test fold's variance about the training fold's mean that k components lose.

    It is exact, and of all images.
    """
    shift = (test.mean - basis.mean) / basis.scale
    about = test.scatter / np.outer(basis.scale, basis.scale) + test.n * np.outer(shift, shift)
    components = basis.components[:k]
    kept = np.einsum("kd,kd->", components @ about, components)
    return float(1 - kept / np.trace(about))


def losses(folds: list[pd.DataFrame]) -> pd.DataFrame:
    """Compute what the first k components lose of the full space's accuracy, the mean of the folds, with its interval.

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
    """Find the fewest components of the curve that cannot be told from the full space; the most, if all can be."""
    enough = accuracy.loc[accuracy["loss_low"] <= 0, "k"]
    return int(enough.min() if len(enough) else accuracy["k"].max())


def confusion(predictions: pd.DataFrame) -> pd.DataFrame:
    """Tell which labels are taken for which, among the CONFUSED labels that have the most such errors in pairs."""
    cells = count_confusions(predictions)
    labels = pd.unique(pd.concat([most_confused(cells)[["label", "predicted"]].stack(), cells["label"]]))[:CONFUSED]
    return cells[cells["label"].isin(labels) & cells["predicted"].isin(labels)].round({"share": 4})


def read_sample(baseline: str, features_folder: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Read the rows of BASELINE, and their features, a float32 array of shape (n_images, n_features)."""
    sample = read(baseline, BASELINE).to_pandas()
    # The sample is all images up to some SHA-256.
    chosen = pc.field("image_id") <= (sample["image_id"].max() if len(sample) else "")
    table = read(features_folder, VECTORS, chosen)
    features = to_matrix(table["features"].combine_chunks().flatten().to_numpy(), len(table))
    return sample, features[first_rows(table, sample["image_id"])]


def read_points(reduced: str, n_images: int) -> pd.DataFrame:
    """Read about POINTS images, chosen by SHA-256: path, label and the first two coordinates of their embedding."""
    points = read(f"{reduced}/embeddings", EMBEDDINGS, of_share(POINTS / max(n_images, 1))).to_pandas().sort_values("path")
    for i in (0, 1):
        points[f"component_{i + 1}"] = [round(float(each[i]), 4) if i < len(each) else 0.0 for each in points["embedding"]]
    return points[["path", "label", "component_1", "component_2"]]


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
    """Tell what k components keep, and how many keep 80, 90, 95 and 99 %."""
    needed = {
        f"k{threshold:.0%}".rstrip("%"): int(np.searchsorted(cumulative, threshold - ROUNDING)) + 1
        for threshold in THRESHOLDS
    }
    return {"components": k, "explained": rounded(cumulative[k - 1]), **needed}


def summary(metrics: dict[str, Any], features: str, reduced: str) -> str:
    """Say the metrics in words."""
    images, kept = metrics["images"], metrics["variance"]
    lines = [
        f"{images['images']:,} images of {images['labels']:,} labels ({images['quarantined']:,} files quarantined, "
        f"{images['duplicates']:,} duplicates, {images['label_conflicts']:,} of them under two labels)",
        f"{kept['components']:,} components keep {kept['explained']:.1%} of the variance "
        f"(80 %: {kept['k80']:,}, 90 %: {kept['k90']:,}, 95 %: {kept['k95']:,}, 99 %: {kept['k99']:,})",
        "",
    ]
    if "tested" not in metrics:
        lines.append("No accuracy: the folds have no label in common, or one is empty; see docs/figures.md.")
    else:
        lines += [
            "Accuracy, trained on one fold and tested on the other   embedding   features   raw pixels",
            *(
                f"  {recogniser.title:<52}" + "".join(f"{metrics[name][space]:>11.1%}" for space in SPACES)
                for name, recogniser in RECOGNISERS.items()
            ),
            "",
            f"k = {kept['k_enough']:,} is enough: the smallest of those tried whose accuracy may be that of the features",
        ]
    lines += ["", f"features: {features}   model and embeddings: {reduced}"]
    return "\n".join(lines) + "\n"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ingested")
    parser.add_argument("features")
    parser.add_argument("split")
    parser.add_argument("covariance")
    parser.add_argument("baseline")
    parser.add_argument("reduced")
    parser.add_argument("output")
    parser.add_argument(
        "--curve", type=between(int, 1, 100_000), nargs="+", required=True, help="k, for the curve of accuracy"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
