"""classify: learn to tell the label of a photograph from its embedding, how sure that is, and when to say nothing.

usage: python -m stages.classify FEATURES SPLIT COVARIANCE REDUCED OUTPUT --exemplars 4 --shrinkage 0.2 --keep 0.975
           --max_images 12000

reads   FEATURES, SPLIT/images, COVARIANCE, REDUCED
writes  OUTPUT/whitening        WHITENING, one row a component
        OUTPUT/exemplars        EXEMPLARS, sorted by label and exemplar
        OUTPUT/settings         SETTINGS, one row
        OUTPUT/predictions      PREDICTIONS, one row for each image tested, by path
        OUTPUT/metrics.json     how good it is
        OUTPUT/summary.txt      the same for people
        OUTPUT/labels.csv       label, n_images, recall, kept; none of a label that cannot be tested
        OUTPUT/reliability.csv  bin, n_images, confidence, accuracy: how often the images of a probability are recognised
        OUTPUT/coverage.csv     coverage, accuracy, probability: of that share of the images, the surest ones

An embedding of unit length is whitened within labels: what differs among images of one label counts less. Its similarity to
a label is the largest cosine to one of the label's exemplars. A softmax makes probabilities of them, with one temperature.
Two thresholds say nothing instead: an image whose largest similarity is small is of no label that is known, and one of which
the components explain little is no such photograph at all. That is its strangeness.

What ships is fitted on all images. What the figures say is of others: all is fitted on one fold, PCA too, and tested on the
other, then the other way round. A label may have one group only in each fold, so temperature and thresholds have no third
one. They come from the test of one direction, and are judged in the other. What is said of unknown labels is of labels that
neither PCA nor whitening nor exemplars have seen.

Runs without Spark. Of more than max_images, about so many are judged; of more than N_LEARNT, what the figures say is learnt
from about so many. SHA-256 chooses. What ships is fitted on all images.
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.linalg
from scipy.cluster.vq import kmeans2
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.covariance import shrunk_covariance
from sklearn.metrics import f1_score, roc_auc_score
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from stages.analysis import (
    INTERVAL,
    ROWS,
    Basis,
    Sums,
    between,
    fit_basis,
    hash_below,
    in_both_folds,
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
    write,
)

SPLIT = ("image_id", "path", "label", "group", "fold")
LABELLED = ("label",)
REDUCTION = ("k", "scale")
WHITENING = pa.schema(
    [
        ("component", pa.int32()),  # from 1
        ("weights", pa.list_(pa.float64())),  # k of them: the rows are a symmetric matrix
    ]
)
EXEMPLARS = pa.schema(
    [
        ("label", pa.string()),
        ("exemplar", pa.int32()),  # from 1, within its label
        ("vector", pa.list_(pa.float64())),  # k of them, of unit length, whitened
        ("image_id", pa.string()),  # of the label's image that is nearest to it
        ("path", pa.string()),
    ]
)
SETTINGS = pa.schema(  # null where no label has images in both folds
    [
        ("temperature", pa.float64()),
        ("min_similarity", pa.float64()),  # below, a photograph is of no label that is known
        ("max_strangeness", pa.float64()),  # above, it is no photograph of this kind
    ]
)
PREDICTIONS = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.string()),
        ("fold", pa.int32()),
        ("predicted", pa.string()),
        ("probability", pa.float64()),  # of predicted
        ("rank", pa.int32()),  # of label, by similarity; 1 is predicted
        ("squared_error", pa.float64()),  # of all labels' probabilities: 0 to 2
        ("similarity", pa.float64()),  # of predicted, -1 to 1
        ("strangeness", pa.float64()),  # 0 to 1
        ("is_kept", pa.bool_()),  # neither threshold refuses it
    ]
)
RELIABILITY = ("bin", "confidence", "accuracy", "n_images")
COVERAGE = ("coverage", "accuracy", "probability")
TEMPERATURES = (0.01, 100.0)  # of cosines: from nearly always sure to never
LEAST_STRANGENESS = 1e-3  # that is refused: where k keeps nearly all, it is only rounding
BINS = 15  # of probabilities, equally wide (Guo et al. 2017, "On calibration of modern neural networks")
COVERAGES = np.linspace(0.05, 1, 20)
SUREST = 0.8
N_LEARNT = 2**16  # images whose features are held, to learn from and to judge; max_images if that is more
PARTS = 5  # of the labels, each left out in turn
LABELS = 2  # tested, at least, for a probability to mean anything
TRUE_POSITIVES = 0.95  # at which false ones are counted
LEAST_VARIANCE = 1e-6  # of the largest
ITERATIONS = 20  # of k-means; it has long ended


class Head(NamedTuple):
    """What tells labels from an embedding."""

    labels: np.ndarray  # str, (n_labels,), sorted
    whitening: np.ndarray  # float64, (k, k), symmetric
    exemplars: np.ndarray  # float64, (n_exemplars, k), of unit length, by label
    n_exemplars: np.ndarray  # int, (n_labels,): of each label, one at least


class LeftOut(NamedTuple):
    """Of the images of one fold, by what was fitted on the other without some labels."""

    similarity: np.ndarray  # float64, (n_images,), the largest
    strangeness: np.ndarray  # float64, (n_images,)
    is_unknown: np.ndarray  # bool, (n_images,): its label was left out


class Scores(NamedTuple):
    """Of the images of one fold, by what was fitted on the other."""

    images: pd.DataFrame  # path, label, group, fold
    labels: np.ndarray  # str, (n_labels,), those of the other fold
    similarities: np.ndarray  # float64, (n_images, n_labels)
    strangeness: np.ndarray  # float64, (n_images,)
    left_out: list[LeftOut]


class Calibration(NamedTuple):
    """What makes similarities a probability, or a refusal."""

    temperature: float
    min_similarity: float
    max_strangeness: float


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore", "One of the clusters is empty")  # of equal images: see find_exemplars
    images = read_images(args.split)
    share = max(args.max_images, N_LEARNT) / len(images)
    sample = images[(images["image_id"] < hash_below(share)).to_numpy(bool)].reset_index(drop=True)
    sample = sample.astype(dict.fromkeys(SPLIT[:4], object))
    features = read_vectors(args.features, "features", pa.array(sample["image_id"], pa.string()))
    (reduction,) = read(f"{args.reduced}/model/settings", REDUCTION).to_pylist()
    sums = read_sums(args.covariance)

    def test(fold: int, steps: tqdm) -> Scores | None:
        return score_fold(sample, features, len(images), args, sums, fold, **reduction, steps=steps)

    scores = [each for each in in_both_folds("classify", 1 + PARTS, test) if each]
    tables = {"reliability": pd.DataFrame(columns=RELIABILITY), "coverage": pd.DataFrame(columns=COVERAGE)}
    metrics: dict[str, Any] = {"images": 0, "labels": 0}
    shipped = None
    predictions = PREDICTIONS.empty_table().to_pandas()
    if sum(each.images["label"].nunique() for each in scores) >= 2 * LABELS:
        calibrations = [calibrate([other], args.keep) for other in reversed(scores)]
        judged = [judge(*each) for each in zip(scores, calibrations, strict=True)]
        predictions = pd.concat(judged).sort_values("path", ignore_index=True)
        shipped = calibrate(scores, args.keep)
        metrics = measure(predictions) | unknown(scores, calibrations)
        tables |= {"reliability": reliability(predictions), "coverage": coverage(predictions)}
    labels = read(f"{args.split}/images", LABELLED)["label"].unique().to_pylist()
    tables["labels"] = recalls(predictions, predictions, labels).merge(
        predictions.groupby("label")["is_kept"].mean().round(4).rename("kept"), on="label", how="left"
    )
    metrics["labels_untested"] = len(labels) - metrics["labels"]

    with threadpool_limits(1):
        embedding = read_vectors(f"{args.reduced}/embeddings", "embedding", pa.array(images["image_id"], pa.string()))
        head = fit(embedding, images["label"].to_numpy(object), args.exemplars, args.shrinkage)
        exemplars = name_exemplars(head, embedding, images)

    output = Path(args.output)
    output.mkdir()
    components = range(1, len(head.whitening) + 1)
    write(pd.DataFrame({"component": components, "weights": list(head.whitening)}), WHITENING, output / "whitening")
    write(exemplars, EXEMPLARS, output / "exemplars")
    settings = shipped._asdict() if shipped else dict.fromkeys(SETTINGS.names)
    write(pd.DataFrame([settings]), SETTINGS, output / "settings")
    write(predictions, PREDICTIONS, output / "predictions")
    (output / "metrics.json").write_text(json.dumps({"recognition": metrics}, indent=2) + "\n")
    (output / "summary.txt").write_text("\n".join(say(metrics)) + "\n")
    for name, rows in tables.items():
        rows.to_csv(output / f"{name}.csv", index=False)
    print(f"classify: {len(exemplars):,} exemplars of {len(head.labels):,} labels; {len(predictions):,} images judged")


def read_images(split: str) -> pd.DataFrame:
    """Read SPLIT of each distinct image, by image_id; a copy of it would prove nothing."""
    images = to_frame(read(f"{split}/images", SPLIT).sort_by([("image_id", "ascending"), ("path", "ascending")]))
    return images.drop_duplicates("image_id", ignore_index=True)


def score_fold(
    images: pd.DataFrame,
    features: np.ndarray,
    n_images: int,
    args: argparse.Namespace,
    sums: dict[int, Sums],
    test_fold: int,
    k: int,
    scale: str,
    steps: tqdm,
) -> Scores | None:
    """Fit PCA and head on one fold, and score some images of the other; None if there are none of the same labels.

    Parameters
    ----------
    images, features : image_id, path, label, group and fold of some images of n_images, and their features
    """
    is_train, is_test = train_and_test(images, test_fold)
    is_test &= (images["image_id"] < hash_below(args.max_images / n_images)).to_numpy(bool)
    if not is_test.any():
        return None
    embedding, strangeness = embed(features, fit_basis(to_moments(sums[1 - test_fold]), scale, k))
    labels = images["label"].to_numpy()
    head = fit(embedding[is_train], labels[is_train], args.exemplars, args.shrinkage)
    similarities = compare(embedding[is_test], head)
    steps.update()
    part_of = np.searchsorted(head.labels, labels) % PARTS
    step = sums[1 - test_fold].step
    parts = [sum_up(features[is_train & (part_of == part)], step) for part in range(PARTS)]
    left_out = []
    for part in range(PARTS):
        is_unknown = (part_of == part) & np.isin(labels, head.labels)
        if is_unknown[is_test].any() and not is_unknown[is_test].all():
            learnt = is_train & ~is_unknown
            rest = to_moments(add_up([each for other, each in enumerate(parts) if other != part]))
            reduced, unexplained = embed(features, fit_basis(rest, scale, k))
            nearest = compare(reduced[is_test], fit(reduced[learnt], labels[learnt], args.exemplars, args.shrinkage))
            left_out.append(LeftOut(nearest.max(axis=1), unexplained[is_test], is_unknown[is_test]))
        steps.update()
    tested = images.loc[is_test, ["path", "label", "group", "fold"]].reset_index(drop=True)
    return Scores(tested, head.labels, similarities, strangeness[is_test], left_out)


def blocks(n_rows: int) -> list[slice]:
    """Cut rows into blocks of ROWS, of which float64 takes little memory."""
    return [slice(start, start + ROWS) for start in range(0, n_rows, ROWS)]


def sum_up(features: np.ndarray, step: float) -> Sums:
    """Sum up rows, float32 multiples of step of shape (n, n_features), as the stage covariance does."""
    n_features = features.shape[1]
    total, products = np.zeros(n_features, np.int64), np.zeros((n_features, n_features), np.int64)
    for block in blocks(len(features)):
        rows = features[block] / np.float64(step)
        total += rows.sum(axis=0).astype(np.int64)
        products += (rows.T @ rows).astype(np.int64)
    return Sums(len(features), step, total, products)


def add_up(parts: Sequence[Sums]) -> Sums:
    """Add the sums of some rows to those of others."""
    n, (step, *_), total, products = (of_all for of_all in zip(*parts, strict=True))
    return Sums(sum(n), step, np.sum(total, axis=0), np.sum(products, axis=0))


def embed(features: np.ndarray, basis: Basis) -> tuple[np.ndarray, np.ndarray]:
    """Project features (n_images, n_features).

    Returns
    -------
    their embedding, float32, (n_images, k), and their strangeness, float64, (n_images,): of the squared distance from the
    mean, the share that is not in the components
    """
    embedding = np.zeros((len(features), len(basis.components)), np.float32)
    strangeness = np.zeros(len(features))
    for block in blocks(len(features)):
        embedding[block] = project(features[block], basis)
        length = (((features[block] - basis.mean) / basis.scale) ** 2).sum(axis=1)
        explained = (embedding[block].astype(np.float64) ** 2).sum(axis=1)
        strangeness[block] = 1 - explained / np.maximum(length, np.finfo(np.float32).tiny)
    return embedding, strangeness


def to_unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to unit length; float64 of the same shape."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def to_points(embedding: np.ndarray, whitening: np.ndarray) -> np.ndarray:
    """Whiten embeddings (n_images, k) to points on the unit sphere, float64 of the same shape."""
    return to_unit(to_unit(embedding.astype(np.float64)) @ whitening)


def fit(embedding: np.ndarray, labels: np.ndarray, n_exemplars: int, shrinkage: float) -> Head:
    """Fit the head to embeddings (n_images, k) and their labels, str (n_images,).

    The whitening is that of linear discriminant analysis, for rows of unit length. It has one free factor: its largest entry
    is 1. No direction counts more than 1 / sqrt(LEAST_VARIANCE) times that in which the images of a label vary most.
    """
    number, names = pd.factorize(labels, sort=True)
    counts = np.bincount(number)
    by_label = np.split(np.argsort(number, kind="stable"), np.cumsum(counts)[:-1])
    scatter = np.zeros((embedding.shape[1], embedding.shape[1]))
    for each in by_label:
        rows = to_unit(embedding[each].astype(np.float64))
        rows -= rows.mean(axis=0)
        scatter += rows.T @ rows
    variance, axes = scipy.linalg.eigh(shrunk_covariance(scatter / len(embedding), shrinkage))
    whitening = (axes / np.sqrt(np.maximum(variance, LEAST_VARIANCE * variance[-1] or 1.0))) @ axes.T
    whitening /= np.abs(whitening).max()
    exemplars = [find_exemplars(to_points(embedding[each], whitening), n_exemplars) for each in by_label]
    return Head(names, whitening, np.concatenate(exemplars), np.array([len(each) for each in exemplars]))


def find_exemplars(points: np.ndarray, n_exemplars: int) -> np.ndarray:
    """Find the centres of k-means, of unit length, in the points (n_points, k) of a label: (n_exemplars, k), or fewer.

    It starts from equal parts along the axis of most variance, which no stray point moves. Equal points give equal centres,
    which is no harm: the largest cosine counts.
    """
    deviation = points - points.mean(axis=0)
    _, axes = scipy.linalg.eigh(deviation.T @ deviation)
    parts = np.array_split(np.argsort(deviation @ axes[:, -1], kind="stable"), min(n_exemplars, len(points)))
    start = np.stack([points[each].mean(axis=0) for each in parts])
    centres, _ = kmeans2(points, start, iter=ITERATIONS, minit="matrix")
    return to_unit(centres)


def compare(embedding: np.ndarray, head: Head) -> np.ndarray:
    """Compute the similarity of embeddings (n_images, k) to each label, -1 to 1: float64, (n_images, n_labels)."""
    starts = np.cumsum(head.n_exemplars) - head.n_exemplars
    cosines = (to_points(embedding[block], head.whitening) @ head.exemplars.T for block in blocks(len(embedding)))
    return np.concatenate([np.maximum.reduceat(each, starts, axis=1) for each in cosines])


def name_exemplars(head: Head, embedding: np.ndarray, images: pd.DataFrame) -> pd.DataFrame:
    """Make EXEMPLARS of a head that was fitted to these images."""
    rows, nearest = images.groupby("label").indices, []
    of_label = np.split(head.exemplars, np.cumsum(head.n_exemplars)[:-1])
    for label, vectors in zip(head.labels, of_label, strict=True):
        points = to_points(embedding[rows[label]], head.whitening)
        nearest += [rows[label][(points @ vector).argmax()] for vector in vectors]
    named = images.loc[nearest, ["label", "image_id", "path"]].reset_index(drop=True)
    return named.assign(exemplar=named.groupby("label").cumcount() + 1, vector=list(head.exemplars))


def calibrate(scores: Sequence[Scores], keep: float) -> Calibration:
    """Fit the temperature of least negative log-likelihood, and the thresholds that each keep that share of the images."""
    truth = [np.searchsorted(each.labels, each.images["label"]) for each in scores]

    def loss(log_temperature: float) -> float:
        logs = (log_softmax(each.similarities / np.exp(log_temperature), axis=1) for each in scores)
        return -np.concatenate([each[np.arange(len(each)), own] for each, own in zip(logs, truth, strict=True)]).mean()

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded")
    largest = np.concatenate([each.similarities.max(axis=1) for each in scores])
    strangeness = np.concatenate([each.strangeness for each in scores])
    max_strangeness = max(np.quantile(strangeness, keep), LEAST_STRANGENESS)
    return Calibration(float(np.exp(found.x)), float(np.quantile(largest, 1 - keep)), float(max_strangeness))


def judge(scores: Scores, calibration: Calibration) -> pd.DataFrame:
    """Make PREDICTIONS, and the group, of the images of one fold by a calibration that has not seen them."""
    similarities, rows = scores.similarities, np.arange(len(scores.images))
    truth = np.searchsorted(scores.labels, scores.images["label"])
    predicted = similarities.argmax(axis=1)
    probabilities = np.exp(log_softmax(similarities / calibration.temperature, axis=1))
    own, largest = similarities[rows, truth], similarities[rows, predicted]
    is_before = (similarities == own[:, None]) & (np.arange(len(scores.labels)) < truth[:, None])  # of equals, the first
    return scores.images.assign(
        predicted=scores.labels[predicted],
        probability=probabilities[rows, predicted],
        rank=1 + (is_before | (similarities > own[:, None])).sum(axis=1),
        squared_error=(probabilities**2).sum(axis=1) - 2 * probabilities[rows, truth] + 1,
        similarity=largest,
        strangeness=scores.strangeness,
        is_kept=accept(largest, scores.strangeness, calibration),
    )


def accept(similarity: np.ndarray, strangeness: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Tell which images neither threshold refuses: bool, (n_images,)."""
    return (similarity >= calibration.min_similarity) & (strangeness <= calibration.max_strangeness)


def measure(predictions: pd.DataFrame) -> dict[str, Any]:
    """Compute the metrics of PREDICTIONS: shares, 0 to 1, but for the Brier score, 0 to 2."""
    is_hit = predictions["label"] == predictions["predicted"]
    by_group = is_hit.groupby(predictions["group"]).agg(["sum", "size"])
    draws = resample(by_group[["sum"]].to_numpy(), by_group["size"].to_numpy(), np.random.default_rng(0))
    low, high = np.quantile(draws, INTERVAL)
    curve = coverage(predictions).set_index("coverage")
    by_fold = predictions.groupby("fold")
    is_kept = predictions["is_kept"]
    return {
        "images": len(predictions),
        "labels": predictions["label"].nunique(),
        "accuracy": rounded(is_hit.mean()),
        "accuracy_low": rounded(low),
        "accuracy_high": rounded(high),
        "macro_f1": rounded(
            f1_score(predictions["label"], predictions["predicted"], average="macro", labels=predictions["label"].unique())
        ),
        "top_3": rounded((predictions["rank"] <= 3).mean()),
        "ece": rounded(calibration_error(predictions)),
        "ece_in_worse_fold": rounded(max(calibration_error(own) for _, own in by_fold)),
        "brier": rounded(predictions["squared_error"].mean()),
        f"accuracy_of_surest_{SUREST:.0%}".rstrip("%"): rounded(curve.loc[SUREST, "accuracy"]),
        "kept": rounded(is_kept.mean()),
        "kept_in_worse_fold": rounded(by_fold["is_kept"].mean().min()),
        "right": rounded((is_kept & is_hit).mean()),
        "wrong": rounded((is_kept & ~is_hit).mean()),
    }


def calibration_error(predictions: pd.DataFrame) -> float:
    """Compute the mean distance of a bin's probability from how often its images are recognised."""
    bins = reliability(predictions)
    return float(np.average((bins["confidence"] - bins["accuracy"]).abs(), weights=bins["n_images"]))


def reliability(predictions: pd.DataFrame) -> pd.DataFrame:
    """Tell how often images of about one probability are recognised: a row for each of BINS that has any."""
    bins = np.minimum(predictions["probability"] * BINS, BINS - 1).astype(int) + 1
    is_hit = predictions["label"] == predictions["predicted"]
    rows = pd.DataFrame({"bin": bins, "confidence": predictions["probability"], "accuracy": is_hit})
    grouped = rows.groupby("bin")
    return grouped.mean().round(4).assign(n_images=grouped.size()).reset_index()


def coverage(predictions: pd.DataFrame) -> pd.DataFrame:
    """Tell the accuracy on the surest images, for each of COVERAGES, and the least probability among them."""
    surest = predictions.sort_values(["probability", "path"], ascending=[False, True])
    n_images = np.ceil(COVERAGES * len(surest)).astype(int)
    hits = (surest["label"] == surest["predicted"]).cumsum().to_numpy()
    least = surest["probability"].to_numpy()[n_images - 1]
    return pd.DataFrame({"coverage": COVERAGES, "accuracy": hits[n_images - 1] / n_images, "probability": least}).round(4)


def unknown(scores: Sequence[Scores], calibrations: Sequence[Calibration]) -> dict[str, Any]:
    """Measure whether images of labels that are left out are told from others.

    auroc is the mean over what was left out, by the largest similarity; false_positives is the share of unknown images above
    the similarity that TRUE_POSITIVES of the known ones reach; accepted, that which neither threshold refuses. Nothing if
    nothing can be left out.
    """
    areas, false, accepted = [], [], []
    for each, calibration in zip(scores, calibrations, strict=True):
        for similarity, strangeness, is_unknown in each.left_out:
            areas.append(roc_auc_score(~is_unknown, similarity))
            false.append(similarity[is_unknown] >= np.quantile(similarity[~is_unknown], 1 - TRUE_POSITIVES))
            accepted.append(accept(similarity, strangeness, calibration)[is_unknown])
    if not areas:
        return {}
    return {
        "unknown": {
            "images": sum(map(len, accepted)),
            "auroc": rounded(np.mean(areas)),
            "false_positives": rounded(np.concatenate(false).mean()),
            "accepted": rounded(np.concatenate(accepted).mean()),
        }
    }


def say(metrics: dict[str, Any]) -> list[str]:
    if not metrics["images"]:
        return [
            "Recognition: how sure it is cannot be measured, as fewer than two labels have images in both folds; "
            "nothing is refused"
        ]
    n_untested = metrics["labels_untested"]
    untested = f"; {n_untested:,} of {metrics['labels'] + n_untested:,} labels could not be tested" if n_untested else ""
    lines = [
        f"Recognition of photographs of groups that it has not seen: {metrics['accuracy']:.1%} "
        f"(95 % interval {metrics['accuracy_low']:.1%} to {metrics['accuracy_high']:.1%}{untested})",
        f"  the label is among the first three: {metrics['top_3']:.1%}; of the surest 80 %, right are "
        f"{metrics['accuracy_of_surest_80']:.1%}",
        f"  its probabilities are {100 * metrics['ece']:.1f} points off, on average "
        f"({100 * metrics['ece_in_worse_fold']:.1f} in the worse fold)",
        f"  of known photographs, {metrics['right']:.1%} get their label, {metrics['wrong']:.1%} another one, and "
        f"{1 - metrics['kept']:.1%} are refused",
    ]
    if "unknown" in metrics:
        accepted = metrics["unknown"]["accepted"]
        lines.append(f"  of labels that it was not shown, {accepted:.1%} are taken for one that it knows")
    return lines


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for place in ("features", "split", "covariance", "reduced", "output"):
        parser.add_argument(place)
    parser.add_argument("--exemplars", type=between(int, 1, 1000), required=True, help="of each label, at most")
    parser.add_argument("--shrinkage", type=between(float, 0, 1), required=True, help="of the covariance within labels")
    parser.add_argument("--keep", type=between(float, 0.5, 1), required=True, help="known images that a threshold keeps")
    parser.add_argument(
        "--max_images", type=between(int, 1, 10_000_000), required=True, help="images judged, about, at most"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
