"""evaluate: what the reduction costs, told by tests that do not flatter.

usage: python -m stages.evaluate INGESTED FEATURES SPLIT COVARIANCE BASELINE REDUCED OUTPUT --curve 2 4 8 16 --max_loss 0.02

reads   INGESTED/quarantine, INGESTED/ignored, FEATURES, SPLIT, COVARIANCE, BASELINE, REDUCED
writes  OUTPUT/metrics.json     counts, explained variance, accuracies
        OUTPUT/summary.txt      the same for people
        OUTPUT/spectrum.csv     component, explained_variance_ratio, cumulative_explained_variance_ratio
        OUTPUT/accuracy.csv     k, embedding, features, pixels: accuracy of the nearest neighbour;
                                loss, loss_low, loss_high: features minus embedding, with its 95 % interval;
                                is_kept: whether k is the one of REDUCED
        OUTPUT/labels.csv       label, n_images, recall; none of a label that cannot be tested
        OUTPUT/confusion.csv    label, predicted, n_images, share of those of the label; the labels most often confused
        OUTPUT/predictions.csv  path, label, predicted, nearest: each image tested, and its nearest neighbour in the
                                embedding, with that one's label
        OUTPUT/points.csv       path, label, component_1, component_2: some images in the plane of most variance

Photographs of one object from one side are nearly equal, so a random split measures nothing. Here a group of them is in one
fold only; a label that is one group cannot be tested, and is named. All is fitted on one fold, PCA too, and tested on the
other, then the other way round. The accuracies of the full feature space and of 16 x 16 raw pixels, the floor, stand beside
that of the embedding. A bootstrap over groups tells how much of a difference is chance. If it drew the images of a group one
by one, as if each were news, the interval would be far too narrow.

Labels that are siblings tell more: whether the images of a label that is left out are taken for its kind. And the evaluation
checks itself: near-equal images in both folds, or raw pixels that do too well, end in a warning.

Runs without Spark, in bounded memory: counts come from all images, accuracies from those of BASELINE.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from stages.analysis import (
    INTERVAL,
    PREDICTED,
    RECOGNISERS,
    SPACES,
    UNREDUCED,
    Moments,
    between,
    count_confusions,
    fit_basis,
    held_out_error,
    in_both_folds,
    leak_warning,
    losses,
    most_confused,
    nearest,
    of_share,
    open_table,
    project,
    read,
    read_sums,
    read_vectors,
    recalls,
    resample,
    rounded,
    to_frame,
    to_moments,
    train_and_test,
)

SPLIT = ("image_id", "label", "group", "fold")
LEAK = ("leak",)
BASELINE = ("image_id", "path", "label", "group", "fold", *PREDICTED, "kind", "kind_nearest_neighbour")
SPECTRUM = ("component", "explained_variance_ratio", "cumulative_explained_variance_ratio")
SETTINGS = ("k", "scale")
EMBEDDINGS = ("path", "label", "embedding")
THRESHOLDS = (0.80, 0.90, 0.95, 0.99)
ROUNDING = 1e-12  # of a sum of shares
POINTS = 2000  # of a plot; more are a blot
CONFUSED = 20  # labels of a confusion matrix that can be read
CURVED = "nearest_neighbour"  # the recogniser of the curve
GROUPS = 10  # tested, at least, for an interval to mean anything: of one group, it is a point
NAMED = 10  # labels of the summary, at most
WIDTH = 120  # of its lines
LOSS = ("loss", "loss_low", "loss_high")
ACCURACY = ("k", *SPACES, *LOSS, "is_kept")
PREDICTIONS = ("path", "label", "predicted", "nearest")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    spectrum = read(f"{args.reduced}/model/spectrum", SPECTRUM).to_pandas()
    (settings,) = read(f"{args.reduced}/model/settings", SETTINGS).to_pylist()
    k, scale = settings["k"], settings["scale"]
    images = to_frame(read(f"{args.split}/images", SPLIT))
    check_groups(images, args.split)
    (leak,) = read(f"{args.split}/settings", LEAK)["leak"].to_pylist()
    moments = {fold: to_moments(sums) for fold, sums in read_sums(args.covariance).items()}
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
    n_groups = sum(fold["hits"]["group"].nunique() for fold in folds)
    if folds:
        metrics["variance"]["held_out_error"] = rounded(np.mean([fold["held_out_error"] for fold in folds]))
        for name in RECOGNISERS:
            metrics[name] = {space: rounded(np.mean([fold["scores"][name][space] for fold in folds])) for space in SPACES}
        predictions = pd.concat([fold["predictions"] for fold in folds]).sort_values("path")
        curve = pd.concat([fold["curve"] for fold in folds]).groupby("k").mean()
        accuracy = curve.join(losses([fold["hits"] for fold in folds])).round(4).reset_index()
        accuracy["is_kept"] = (accuracy["k"] == k).astype(int)
        for own in accuracy.loc[accuracy["k"] == k, list(LOSS)].dropna().to_dict("records"):
            metrics[CURVED] |= own
        if enough := smallest_k(accuracy, n_groups, args.max_loss):
            metrics["variance"]["k_enough"] = enough
    labels = recalls(predictions, sample, images["label"].unique())
    n_tested = int(labels["recall"].count())
    metrics["tested"] = {"images": len(predictions), "groups": n_groups, "labels": n_tested}
    metrics["tested"]["labels_untested"] = len(labels) - n_tested
    metrics["leak"] = {"near_equal": rounded(leak)}
    metrics["leak"]["is_suspected"] = int(leak_warning(metrics) is not None)
    if metrics["leak"]["is_suspected"]:
        metrics["variance"].pop("k_enough", None)  # few components are enough for what was learnt by heart
    metrics |= unseen(sample)
    tables = {
        "spectrum": spectrum,
        "accuracy": accuracy,
        "labels": labels,
        "confusion": confusion(predictions),
        "predictions": predictions,
        "points": read_points(args.reduced, len(images)),
    }

    output = Path(args.output)
    output.mkdir()
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    said = [*say_images(metrics), *say_accuracies(metrics, labels)]
    if folds and not metrics["leak"]["is_suspected"]:
        said += [say_loss(accuracy, k, metrics["variance"].get("k_enough"), n_groups, args.max_loss)]
    if "unseen" in metrics:
        said += [say_unseen(**metrics["unseen"])]
    said += ["", f"features: {args.features}   model and embeddings: {args.reduced}"]
    (output / "summary.txt").write_text("\n".join(said) + "\n")
    for name, table in tables.items():
        table.to_csv(output / f"{name}.csv", index=False)
    print(f"evaluate: {len(predictions):,} images tested, k={k}")


def check_groups(images: pd.DataFrame, split: str) -> None:
    """End the run if a group is in both folds."""
    n_folds = images.groupby("group")["fold"].nunique()
    if (both := n_folds.index[n_folds > 1]).size:
        raise SystemExit(
            f"evaluate: {len(both):,} of {len(n_folds):,} groups are in both folds, such as {both[0]}: what is tested was "
            f"trained on; run the stage that writes {split} again"
        )


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


def smallest_k(accuracy: pd.DataFrame, n_groups: int, max_loss: float) -> int | None:
    """Find the fewest components that surely lose max_loss at most; None if there are none, or if too few groups tell."""
    enough = accuracy.loc[accuracy["loss_high"] <= max_loss, "k"]
    return int(enough.min()) if len(enough) and n_groups >= GROUPS else None


def unseen(sample: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Measure how often images of a label that is left out are taken for its kind: the mean over such labels.

    The interval is over labels, as images of one say the same. Nothing if no label has a sibling.
    """
    left_out = sample.dropna(subset=["kind_nearest_neighbour"])
    if left_out.empty:
        return {}
    recall = (left_out["kind"] == left_out["kind_nearest_neighbour"]).groupby(left_out["label"]).mean().to_numpy()
    draws = resample(recall[:, None], np.ones(len(recall)), np.random.default_rng(0))
    low, high = np.quantile(draws, INTERVAL)
    shares = {"accuracy": rounded(recall.mean()), "low": rounded(low), "high": rounded(high)}
    return {"unseen": {**shares, "labels": len(recall), "kinds": left_out["kind"].nunique()}}


def confusion(predictions: pd.DataFrame) -> pd.DataFrame:
    """Tell which labels are taken for which, among the CONFUSED labels that have the most such errors in pairs."""
    cells = count_confusions(predictions)
    labels = pd.unique(pd.concat([most_confused(cells)[["label", "predicted"]].stack(), cells["label"]]))[:CONFUSED]
    return cells[cells["label"].isin(labels) & cells["predicted"].isin(labels)].round({"share": 4})


def read_sample(baseline: str, features_folder: str) -> tuple[pd.DataFrame, np.ndarray]:
    """Read the rows of BASELINE, and their features, a float32 array of shape (n_images, n_features)."""
    sample = read(baseline, BASELINE).to_pandas()
    return sample, read_vectors(features_folder, "features", pa.array(sample["image_id"], pa.string()))


def read_points(reduced: str, n_images: int) -> pd.DataFrame:
    """Read about POINTS images, chosen by SHA-256: path, label and the first two coordinates of their embedding."""
    points = read(f"{reduced}/embeddings", EMBEDDINGS, of_share(POINTS / max(n_images, 1))).to_pandas().sort_values("path")
    for i in (0, 1):
        points[f"component_{i + 1}"] = [round(float(each[i]), 4) if i < len(each) else 0.0 for each in points["embedding"]]
    return points[["path", "label", "component_1", "component_2"]]


def count_images(images: pd.DataFrame, ingested: str) -> dict[str, float]:
    n_labels = images.groupby("image_id")["label"].nunique()
    n_quarantined = open_table(f"{ingested}/quarantine").count_rows()
    ignored = open_table(f"{ingested}/ignored")
    n_taken = len(images) + n_quarantined
    return {
        "images": len(images),
        "labels": images["label"].nunique(),
        "groups": images["group"].nunique(),
        "quarantined": n_quarantined,
        "ignored": ignored.count_rows(),
        "share": rounded(n_taken / (n_taken + ignored.count_rows(filter=pc.field("reason") == "not_in_share"))),
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


def say_images(metrics: dict[str, Any]) -> list[str]:
    images, kept = metrics["images"], metrics["variance"]
    return [
        f"{images['images']:,} images of {images['labels']:,} labels ({images['quarantined']:,} files quarantined, "
        f"{images['duplicates']:,} duplicates, {images['label_conflicts']:,} of them under two labels)",
        *([f"{images['ignored']:,} other files are ignored; data/ingested/ignored tells why"] if images["ignored"] else []),
        *([f"This is a first look: {images['share']:.2%} of the files (ingest.share)"] if images["share"] < 1 else []),
        f"{kept['components']:,} components keep {kept['explained']:.1%} of the variance "
        f"(80 %: {kept['k80']:,}, 90 %: {kept['k90']:,}, 95 %: {kept['k95']:,}, 99 %: {kept['k99']:,})",
        "",
    ]


def say_accuracies(metrics: dict[str, Any], labels: pd.DataFrame) -> list[str]:
    counts = metrics["tested"]
    if counts["labels"]:
        lines = [wrap(f"Warning: {warning}"), ""] if (warning := leak_warning(metrics)) else []
        lines += [
            "Accuracy, trained on one fold and tested on the other   embedding   features   raw pixels",
            *(
                f"  {recogniser.title:<52}" + "".join(f"{metrics[name][space]:>11.1%}" for space in SPACES)
                for name, recogniser in RECOGNISERS.items()
            ),
            f"tested: {counts['images']:,} images of {counts['labels']:,} of {len(labels):,} labels",
        ]
    else:
        lines = ["No accuracy: no label has images in both folds; see docs/figures.md."]
    if names := labels.loc[labels["recall"].isna(), "label"].tolist():
        more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        lines.append(wrap(f"not tested, as a label needs images of two groups: {', '.join(names[:NAMED])}{more}"))
    return [*lines, ""]


def wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def say_loss(accuracy: pd.DataFrame, k: int, k_enough: int | None, n_groups: int, max_loss: float) -> str:
    rows = accuracy.set_index("k")[list(LOSS)]
    loss, low, high = (round(100 * each, 1) + 0.0 for each in rows.reindex([k_enough or k]).iloc[0])  # + 0.0: not -0.0
    lost = f"{loss} points of the features' accuracy (95 % interval {low} to {high}; {100 * max_loss:g} are allowed)"
    if k_enough:
        return f"k = {k_enough:,} is enough: its loss is {lost}"
    own = f"k = {k:,} has no loss, as a fold has fewer components" if np.isnan(loss) else f"the loss of k = {k:,} is {lost}"
    if n_groups >= GROUPS and (rows["loss_low"].dropna() > max_loss).all():
        return f"No k tried is enough: {own}"
    return f"{n_groups:,} groups are too few to tell which k is enough: {own}"


def say_unseen(accuracy: float, low: float, high: float, labels: int, kinds: int) -> str:
    return (
        f"Of a label that is left out, {accuracy:.1%} of the images are taken for its kind "
        f"(95 % interval {low:.1%} to {high:.1%}; {labels:,} labels of {kinds:,} kinds)"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for place in ("ingested", "features", "split", "covariance", "baseline", "reduced", "output"):
        parser.add_argument(place)
    parser.add_argument(
        "--curve", type=between(int, 1, 100_000), nargs="+", required=True, help="k, for the curve of accuracy"
    )
    parser.add_argument("--max_loss", type=between(float, 0, 1), required=True, help="accuracy that an enough k may lose")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
