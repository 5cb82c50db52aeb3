"""drift: what changed since an earlier run, and whether the images that are new look like those that were there.

usage: python -m stages.drift FEATURES BACKBONE SUSPECTS REDUCED OUTPUT --since HEAD

reads   FEATURES, BACKBONE/backbone.json, SUSPECTS/suspects.csv
        FEATURES, BACKBONE and REDUCED/model as they were in the git revision --since, from DVC's cache or remote
writes  OUTPUT  numbers for `dvc metrics`; in lists, which DVC passes over, the names behind them and the error by label

Prints a verdict, then a line for each kind of change that there is. New is an image whose bytes no earlier file has,
whatever its name; gone is the reverse. Relabelled is an image that left a label, and conflicting one that joined a label
beside another.

The principal components of the earlier images span what these have in common. An image that is not like them loses more
by being projected (Jackson and Mudholkar 1979, "Control procedures for residuals associated with principal component
analysis"). How much is usual is measured on the earlier images themselves. A fruit that was not there may well lose more, so
new labels have a figure of their own.

Runs without Spark, in bounded memory but for the names of images. What it says depends on git's history, not on its inputs
alone; so its output is no output of DVC and enters no lock. Git keeps it, beside the delivery that it describes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from dvc.api import DVCFileSystem
from scipy.stats import binom

from stages.analysis import Basis, batches, read, rounded, to_frame, to_matrix

IMAGES = ("image_id", "path", "label")
VECTORS = ("features",)
SUSPECTS = ("path", "reason")
SCALING = ("feature", "mean", "scale")
COMPONENTS = ("component", "weights")
LABELLING = ["image_id", "label"]
RARE = 0.01  # share of the earlier images whose reconstruction error is unusual, and what chance may do to a delivery
ROUNDING = 1e-9  # of a sum of squares
N_NAMED = 5  # names in a line, at most
N_LISTED = 1000  # names in a list of OUTPUT, at most: git keeps it


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images = to_frame(read(args.features, IMAGES))
    suspects = pd.read_csv(Path(args.suspects, "suspects.csv"), usecols=list(SUSPECTS), dtype=str, keep_default_na=False)
    graph = graph_of(args.backbone)
    try:
        file_system = DVCFileSystem(".", rev=args.since)
        earlier = to_frame(read(args.features, IMAGES, file_system=file_system))
        is_comparable = graph_of(args.backbone, file_system) == graph
        basis = read_basis(f"{args.reduced}/model", file_system) if is_comparable else None
    except Exception as error:  # git's, DVC's or S3's
        drift: dict[str, Any] = {}
        lines = [
            f"nothing to compare with: the run of {args.since} cannot be read. There is no such commit, or no run in it, or "
            f"DVC has its data neither here nor in a remote ({error})"
        ]
    else:
        is_any_new = not images["image_id"].isin(earlier["image_id"]).all()
        errors = reconstruction_errors(args.features, basis) if basis and is_any_new else None
        drift, lines = compare(images.assign(error=errors), earlier, suspects)
    Path(args.output).write_text(json.dumps(drift, indent=2, ensure_ascii=False) + "\n")
    print("drift: " + "\n  ".join(lines))


def compare(images: pd.DataFrame, earlier: pd.DataFrame, suspects: pd.DataFrame) -> tuple[dict[str, Any], list[str]]:
    """Tell how the run's images (image_id, path, label, error) differ from the earlier ones (image_id, path, label).

    Parameters
    ----------
    suspects : path and reason of today's images that may have a wrong label

    Returns
    -------
    what OUTPUT holds, and lines for people, the verdict first
        Without errors (NaN: another backbone; 0: as many components as there are), or where no image is new or none is
        old, there is no comparison of errors.
    """
    names = find_changes(images, earlier)
    labels = {
        "new": sorted(set(images["label"]) - set(earlier["label"])),
        "gone": sorted(set(earlier["label"]) - set(images["label"])),
    }
    names["suspects"] = find_suspects(suspects, images, names["new"])
    errors, by_label, names["unlike"] = compare_errors(images, earlier, names["new"])
    paths = paths_of(images)
    to_look_at = [names[each].index for each in ("conflicting", "relabelled", "suspects", "unlike")]
    names["look_at"] = paths.loc[to_look_at[0].append(to_look_at[1:]).unique()]
    drift: dict[str, Any] = {
        "look_at": len(names["look_at"]),
        "new": {
            "images": len(names["new"]),
            "share": rounded(len(names["new"]) / len(paths)),
            "labels": len(labels["new"]),
            "suspects": len(names["suspects"]),
        },
        "gone": {"images": len(names["gone"]), "labels": len(labels["gone"])},
        "relabelled": len(names["relabelled"]),
        "conflicting": len(names["conflicting"]),
    }
    if errors:
        drift["reconstruction_error"] = errors  # what DVC finds under "error" is a failure to it
    drift["names"] = {name: found.tolist()[:N_LISTED] for name, found in names.items()}
    drift["names"] |= {f"{name}_labels": found for name, found in labels.items()}
    drift["by_label"] = by_label.to_dict("records")

    lines = [verdict_on(names, len(paths), is_measured=bool(errors))]
    for name in ("new", "gone"):
        parts = [(labels[name], "label"), (names[name].tolist(), "image")]
        if any(found for found, _ in parts):
            lines.append(f"{name}: " + "; ".join(f"{count(found, noun)}, {first(found)}" for found, noun in parts if found))
    for name, said in (
        ("relabelled", "left a label"),
        ("conflicting", "joined a label beside another"),
        ("suspects", "new, and in reports/suspects"),
        ("unlike", "new, not like the earlier ones"),
    ):
        found = names[name].tolist()
        if found:
            lines.append(f"{name}: {count(found, 'image')} ({said}): {first(found)}")
    for name, others in (("known_labels", "earlier ones of their labels"), ("new_labels", "all earlier ones")):
        if name in errors:
            rows = by_label[by_label["is_new"] == (name == "new_labels")]
            worst = [f"{label} {ratio:.2f}" for label, ratio in zip(rows["label"], rows["ratio"], strict=True)]
            lines.append(
                f"error, {name.replace('_', ' ')}: the earlier PCA loses {errors[name]['ratio']:.2f} times as much of new "
                f"images as of {others}; {errors[name]['unusual']:.1%} look unusual; by label: {first(worst)}"
            )
    return drift, lines


def verdict_on(names: dict[str, pd.Series], n_images: int, is_measured: bool) -> str:
    """Say in a sentence whether somebody must look, and at what."""
    said = []
    look_at, n_new, n_gone = names["look_at"].tolist(), len(names["new"]), len(names["gone"])
    if look_at:
        these = "this image" if len(look_at) == 1 else f"these {len(look_at):,}"
        said.append(f"look at {these} before you trust it: {first(look_at)}")
    elif n_new and is_measured:
        said.append(f"{n_new:,} new images look like the rest" if n_new > 1 else "1 new image looks like the rest")
    if n_new and not is_measured:
        why = "the network is another, or no earlier image is left, or the earlier PCA lost nothing"
        said.append(f"{count(names['new'], 'new image')} cannot be measured: {why}")
    if n_gone:
        said.append(f"{count(names['gone'], 'image')} {'are' if n_gone > 1 else 'is'} gone")
    return "; ".join(said) or f"nothing changed: the same {n_images:,} images under the same labels"


# Names


def find_changes(images: pd.DataFrame, earlier: pd.DataFrame) -> dict[str, pd.Series]:
    """Name the images (image_id, path, label) that are new, gone, relabelled or conflicting: by image_id, sorted by path."""
    paths, earlier_paths = paths_of(images), paths_of(earlier)
    today, before = (table[LABELLING].drop_duplicates() for table in (images, earlier))
    both = today.merge(before, how="outer", indicator="side")
    joined, left = (both.loc[both["side"] == side, LABELLING] for side in ("left_only", "right_only"))
    relabelled = left[left["image_id"].isin(paths.index)]
    n_labels = today.groupby("image_id").size()
    conflicting = joined[joined["image_id"].map(n_labels) > 1]
    # Where an image left one of its labels and joined none, it is under the others still.
    under = labels_of(joined, relabelled).reindex(labels_of(relabelled, relabelled).index)
    under = under.fillna(labels_of(today, relabelled))
    names = {
        "new": paths[~paths.index.isin(earlier_paths.index)],
        "gone": earlier_paths[~earlier_paths.index.isin(paths.index)],
        "relabelled": with_remark(paths, labels_of(relabelled, relabelled) + " -> " + under),
        "conflicting": with_remark(paths, labels_of(today, conflicting)),
    }
    return {name: found.sort_values() for name, found in names.items()}


def find_suspects(suspects: pd.DataFrame, images: pd.DataFrame, new: pd.Series) -> pd.Series:
    """Name the suspects (path, reason) among the images that are new: by image_id, in the order of the suspects."""
    found = suspects.merge(images[["image_id", "path"]], on="path").drop_duplicates("image_id").set_index("image_id")
    return with_remark(new, found.loc[found.index.isin(new.index), "reason"])


def paths_of(images: pd.DataFrame) -> pd.Series:
    """Find the first path of each image, by image_id."""
    return images.sort_values("path").drop_duplicates("image_id").set_index("image_id")["path"]


def labels_of(labellings: pd.DataFrame, images: pd.DataFrame) -> pd.Series:
    """Join the labels (image_id, label) of these images into one text for each, by image_id."""
    found = labellings[labellings["image_id"].isin(images["image_id"])].sort_values("label")
    return found.groupby("image_id")["label"].agg(", ".join).astype(object)


def with_remark(paths: pd.Series, remarks: pd.Series) -> pd.Series:
    """Put a remark after each path, by image_id, in the order of the remarks."""
    return paths[remarks.index].astype(object) + " (" + remarks.astype(object) + ")"


def first(names: Sequence[str]) -> str:
    """Join the first names, and say how many more there are."""
    more = f" and {len(names) - N_NAMED:,} more" if len(names) > N_NAMED else ""
    return ", ".join(names[:N_NAMED]) + more


def count(names: Sequence[str] | pd.Series, noun: str) -> str:
    return f"{len(names):,} {noun}{'s' if len(names) != 1 else ''}"


# Errors


def compare_errors(
    images: pd.DataFrame, earlier: pd.DataFrame, new: pd.Series
) -> tuple[dict[str, dict[str, float]], pd.DataFrame, pd.Series]:
    """Compare the errors of the images that are new with those of the others (image_id, path, label, error).

    A ratio is the sum of the errors of new images, divided by the sum of what is usual: for each, the mean error of the
    earlier images of its label, or of all where its label had none. So 1 means that they look alike.

    Returns
    -------
    images, ratio and unusual of known_labels and of new_labels, where there are new images of such
    label, is_new, images and ratio of each label with new images, the largest ratio first
    names of the images that are unlike, by image_id, the largest error first: all that are unusual, if they are too many;
    if not, those that lose what chance has in one delivery of a hundred
    """
    rows = images.drop_duplicates(LABELLING).merge(earlier[LABELLING].drop_duplicates(), how="left", indicator="side")
    is_new = rows["image_id"].isin(new.index)
    old = rows[~is_new].drop_duplicates("image_id")["error"]
    by_label = pd.DataFrame(columns=["label", "is_new", "images", "ratio"])
    if not is_new.any() or rows["error"].isna().any() or not old.mean() > 0:
        return {}, by_label, new[:0]
    usual = rows[rows["side"] == "both"].groupby("label")["error"].mean()
    usual_of_each = rows["label"].map(usual)
    rows = rows.assign(
        usual=usual_of_each.where(usual_of_each > 0, old.mean()),
        is_unusual=rows["error"] > old.quantile(1 - RARE),
        is_new=~rows["label"].isin(earlier["label"]),
    )[is_new]
    sums = rows.groupby(["label", "is_new"]).agg(images=("path", "size"), error=("error", "sum"), usual=("usual", "sum"))
    by_label = sums.assign(ratio=(sums["error"] / sums["usual"]).round(4)).reset_index()[by_label.columns]
    errors, unlike = {}, [rows[:0]]
    for name, part in (("known_labels", rows[~rows["is_new"]]), ("new_labels", rows[rows["is_new"]])):
        distinct = part.drop_duplicates("image_id")
        if len(distinct):
            chances = 1 if are_too_many(int(distinct["is_unusual"].sum()), len(distinct)) else len(distinct)
            unlike.append(distinct[distinct["error"] > old.quantile(1 - RARE / chances)])
            errors[name] = {
                "images": len(distinct),
                "ratio": rounded(distinct["error"].sum() / distinct["usual"].sum()),
                "unusual": rounded(distinct["is_unusual"].mean()),
            }
    found = pd.concat(unlike).sort_values("error", ascending=False).drop_duplicates("image_id")
    return errors, by_label.sort_values(["ratio", "label"], ascending=[False, True]), new[found["image_id"]]


def are_too_many(n_unusual: int, n_new: int) -> bool:
    """Tell whether so many of the new images are unusual in at most one of a hundred deliveries that are like the rest."""
    return n_unusual > 0 and bool(binom.sf(n_unusual - 1, n_new, RARE) <= RARE * (1 + 1e-9))  # rounding


def reconstruction_errors(features: str, basis: Basis) -> np.ndarray:
    """Measure what each row of FEATURES loses by projection on the components, squared: float64, (n_rows,)."""
    errors = []
    for batch in batches(features, VECTORS):
        rows = to_matrix(batch["features"].flatten().to_numpy(), len(batch))
        scaled = (rows - basis.mean) / basis.scale
        whole = (scaled**2).sum(axis=1)
        lost = whole - ((scaled @ basis.components.T) ** 2).sum(axis=1)
        errors.append(np.where(lost > ROUNDING * whole, lost, 0))
    return np.concatenate(errors)


def read_basis(model: str, file_system: DVCFileSystem) -> Basis:
    """Read the principal components of an earlier run."""
    scaling = read(f"{model}/scaling", SCALING, file_system=file_system).to_pandas().sort_values("feature")
    components = read(f"{model}/components", COMPONENTS, file_system=file_system).to_pandas().sort_values("component")
    return Basis(scaling["mean"].to_numpy(), scaling["scale"].to_numpy(), np.stack(components["weights"].to_list()))


def graph_of(backbone: str, file_system: DVCFileSystem | None = None) -> str:
    """Tell which network it was: features of two cannot be compared."""
    path = f"{backbone}/backbone.json"
    text = file_system.read_text(path) if file_system else Path(path).read_text()
    return str(json.loads(text)["graph_sha256"])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features")
    parser.add_argument("backbone")
    parser.add_argument("suspects")
    parser.add_argument("reduced")
    parser.add_argument("output")
    parser.add_argument("--since", required=True, help="git revision of the earlier run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
