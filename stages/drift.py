"""drift: whether the images that are new since an earlier run look like those that were there.

usage: python -m stages.drift FEATURES BACKBONE REDUCED OUTPUT --since HEAD

reads   FEATURES, BACKBONE/backbone.json
        the same and REDUCED/model as they were in the git revision --since, from DVC's cache or remote
writes  OUTPUT  counts of images and labels that came and went; how well the earlier PCA describes the images that came

The principal components of the earlier images span what these have in common. An image that is not like them loses more
by being projected (Jackson and Mudholkar 1979, "Control procedures for residuals associated with principal component
analysis"). How much is usual is measured on the earlier images themselves.

Runs without Spark, in bounded memory but for the names of images. What it says depends on git's history, not on its inputs
alone; so its output is no output of DVC and enters no lock. Git keeps it, beside the delivery that it describes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as ds
from dvc.api import DVCFileSystem

from stages.analysis import Basis, read, rounded, to_matrix

EARLIER = ("image_id", "label")
IMAGES = (*EARLIER, "path")
VECTORS = ("features",)
SCALING = ("feature", "mean", "scale")
COMPONENTS = ("component", "weights")
USUAL = 0.99  # share of the earlier images whose reconstruction error is usual
ROWS = 4096  # of features, at once
N_NAMED = 5  # images that are named, at most


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images = read(args.features, IMAGES).to_pandas()
    drift: dict[str, Any] = {}
    try:
        earlier = DVCFileSystem(".", rev=args.since)
        earlier_images = read(args.features, EARLIER, file_system=earlier).to_pandas()
        is_comparable = graph_of(args.backbone, earlier) == graph_of(args.backbone)
        basis = read_basis(f"{args.reduced}/model", earlier) if is_comparable else None
    except Exception as error:  # no commit, no run in it, no copy of its data here, no key to the remote: git's, DVC's, S3's
        said = f"nothing to compare with: the run of {args.since} is not to be had ({error})"
    else:
        is_any_new = not images["image_id"].isin(earlier_images["image_id"]).all()
        errors = reconstruction_errors(args.features, basis) if basis and is_any_new else None
        drift, said = compare(images.assign(error=errors), earlier_images)
    Path(args.output).write_text(json.dumps(drift, indent=2) + "\n")
    print(f"drift: {said}")


def compare(images: pd.DataFrame, earlier: pd.DataFrame) -> tuple[dict[str, Any], str]:
    """Tell what the run's images (image_id, path, label, error) have that the earlier ones (image_id, label) had not.

    Returns
    -------
    metrics, and a sentence for people
        Without errors (NaN: another backbone; 0: as many components as there are), or where no image is new or none is
        old, the metrics have no comparison of errors.
    """
    distinct = images.drop_duplicates("image_id")
    is_new = ~distinct["image_id"].isin(earlier["image_id"])
    new, old = distinct[is_new], distinct[~is_new]
    drift: dict[str, Any] = {
        "new": {
            "images": len(new),
            "share": rounded(len(new) / len(distinct)),
            "labels": len(set(images["label"]) - set(earlier["label"])),
        },
        "gone": {
            "images": int((~earlier["image_id"].drop_duplicates().isin(distinct["image_id"])).sum()),
            "labels": len(set(earlier["label"]) - set(images["label"])),
        },
        "relabelled": count_relabelled(images, earlier),
    }
    said = f"{len(new):,} of {len(distinct):,} images are new"
    if len(new) and len(old) and distinct["error"].notna().all() and old["error"].mean() > 0:
        usual = old["error"].quantile(USUAL)
        drift["error"] = {
            "ratio": rounded(new["error"].mean() / old["error"].mean()),  # 1: they look alike
            "unusual": rounded((new["error"] > usual).mean()),  # 0.01: they look alike
        }
        first = new.nlargest(N_NAMED, "error")["path"]
        said += (
            f"; the earlier PCA loses {drift['error']['ratio']:.2f} times as much of them as of the others, and "
            f"{drift['error']['unusual']:.0%} of them look unusual. First to look at: {', '.join(first)}"
        )
    return drift, said


def count_relabelled(images: pd.DataFrame, earlier: pd.DataFrame) -> int:
    """Count the images that both have, but not under the same labels."""
    pairs = [table[[*EARLIER]].drop_duplicates() for table in (images, earlier)]
    both = pairs[0].merge(pairs[1], how="outer", indicator=True)
    changed = both.loc[both["_merge"] != "both", "image_id"]
    return int((changed.isin(images["image_id"]) & changed.isin(earlier["image_id"])).groupby(changed).any().sum())


def reconstruction_errors(features: str, basis: Basis) -> np.ndarray:
    """Measure what each row of FEATURES loses by projection on the components, squared: float64, (n_rows,)."""
    errors = []
    for batch in ds.dataset(features, format="parquet").to_batches(list(VECTORS), batch_size=ROWS):
        rows = to_matrix(batch["features"].flatten().to_numpy(), len(batch))
        scaled = (rows - basis.mean) / basis.scale
        lost = (scaled**2).sum(axis=1) - ((scaled @ basis.components.T) ** 2).sum(axis=1)
        errors.append(lost.clip(0))  # rounding
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
    parser.add_argument("reduced")
    parser.add_argument("output")
    parser.add_argument("--since", required=True, help="git revision of the earlier run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
