"""baseline: what the full features and raw pixels recognise, for the reduction to be measured against.

usage: python -m stages.baseline INGESTED FEATURES SPLIT OUTPUT --max_images 12000 --kind_pattern REGEX

reads   INGESTED/images, FEATURES, SPLIT/images
writes  OUTPUT  PREDICTIONS, one row for each image of the sample, by image_id

All is trained on one fold and tested on the other, then the other way round; 16 x 16 raw pixels are the floor. Nothing of it
depends on the reduction, so another k computes none of it again.

That tests other images of things that were trained on. Labels that are siblings, such as Cherry 1 and Cherry 2, can test
more: each is left out in turn, in both folds, and its images get the kind of the nearest image that is left.

Runs without Spark, in bounded memory: of more than max_images, as many are chosen by SHA-256.
"""

import argparse
import re

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm import tqdm

from stages.analysis import (
    PREDICTED,
    RECOGNISERS,
    between,
    first_rows,
    in_both_folds,
    nearest,
    of_share,
    open_table,
    read,
    to_matrix,
    train_and_test,
    write,
)

IMAGES = ("image_id", "thumbnail")
FEATURES = ("image_id", "features")
SPLIT = ("image_id", "path", "label", "group", "fold")
PREDICTIONS = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("fold", pa.int32()),
        # The label that each recogniser gives the image in each space, such as features_nearest_neighbour; null where the
        # other fold has no image of its label.
        *((name, pa.string()) for name in PREDICTED),
        ("kind", pa.string()),  # of the label: what kind_pattern matches
        # The kind of the nearest image of another label, in either fold; null where no other label is of the image's kind.
        ("kind_nearest_neighbour", pa.string()),
    ]
)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sample, spaces = read_sample(args.ingested, args.features, args.split, args.max_images)
    sample["kind"] = [kind_of(label, args.kind_pattern) for label in sample["label"]]
    n_steps = len(spaces) * len(RECOGNISERS) + 1
    folds = in_both_folds("baseline", n_steps, lambda fold, steps: predict_fold(sample, spaces, fold, steps))
    predictions = sample.join(pd.concat(folds))
    write(predictions, PREDICTIONS, args.output)
    print(f"baseline: {predictions[PREDICTED[0]].count():,} images tested in {len(spaces)} spaces")


def predict_fold(sample: pd.DataFrame, spaces: dict[str, np.ndarray], test_fold: int, steps: tqdm) -> pd.DataFrame:
    """Predict the labels of one fold's images by what is trained on the other: PREDICTED and the kind, a row an image."""
    is_train, is_test = train_and_test(sample, test_fold)
    columns = [*PREDICTED, "kind_nearest_neighbour"]
    predicted = pd.DataFrame(index=sample.index[~is_train], columns=columns, dtype=object)
    predicted["kind_nearest_neighbour"] = kinds_of_nearest(sample, spaces["features"], ~is_train)
    steps.update()
    if not is_test.any():
        return predicted
    labels = sample["label"][is_train].to_numpy()
    for space, rows in spaces.items():
        train, test = rows[is_train], rows[is_test]
        for name, recogniser in RECOGNISERS.items():
            predicted.loc[is_test[~is_train], f"{space}_{name}"] = recogniser.predict(recogniser.fit(train, labels), test)
            steps.update()
    return predicted


def kind_of(label: str, pattern: str) -> str:
    """Name the kind of a label: what the pattern's first group matches, or the label itself."""
    match = re.search(pattern, label)
    return (match and match[1]) or label


def kinds_of_nearest(sample: pd.DataFrame, features: np.ndarray, is_asked: np.ndarray) -> pd.Series:
    """Find the kind of the image that is nearest to each image, of those of another label.

    Parameters
    ----------
    sample : label, kind
    features : of the same rows, float32, (n_images, n_features)
    is_asked : the images to find it for, bool, (n_images,)

    Returns
    -------
    of the images asked for, None where no other label has the image's kind, or where there is one kind only
    """
    kinds = sample["kind"].to_numpy()
    has_sibling = (sample.groupby("kind")["label"].transform("nunique") > 1).to_numpy() & (sample["kind"].nunique() > 1)
    found = pd.Series(None, sample.index, object)
    chosen = is_asked & has_sibling
    if chosen.any():
        labels = pd.factorize(sample["label"])[0]
        found[chosen] = kinds[nearest(features, features[chosen], unlike=(labels, labels[chosen]))]
    return found[is_asked]


def read_sample(
    ingested: str, features_folder: str, split: str, max_images: int
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Read about max_images distinct images, chosen by SHA-256.

    Returns
    -------
    image_id, path, label, group, fold, a row an image; and its rows in the spaces features and pixels, float32 arrays of
    shapes (n_images, n_features) and (n_images, 768)
    """
    n_rows = open_table(features_folder).count_rows()
    chosen = of_share(max_images / max(n_rows, 1))
    table = read(features_folder, FEATURES, chosen)
    # One row for each distinct image: with a copy of it in the other fold, a nearest neighbour proves nothing.
    rows = read(f"{split}/images", SPLIT, chosen).to_pandas().sort_values(["image_id", "path"])
    rows = rows.drop_duplicates("image_id", ignore_index=True)
    features = to_matrix(table["features"].combine_chunks().flatten().to_numpy(), len(table))
    thumbnails = read(f"{ingested}/images", IMAGES, chosen)
    pixels = to_matrix(np.frombuffer(b"".join(thumbnails["thumbnail"].to_pylist()), np.uint8), len(thumbnails))
    spaces = {
        "features": features[first_rows(table, rows["image_id"])],
        "pixels": pixels[first_rows(thumbnails, rows["image_id"])].astype(np.float32),
    }
    return rows, spaces


def kind_pattern(text: str) -> str:
    try:
        n_groups = re.compile(text).groups
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    if not n_groups:
        raise argparse.ArgumentTypeError(f"{text!r} has no group in brackets: the first one is the kind")
    return text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ingested")
    parser.add_argument("features")
    parser.add_argument("split")
    parser.add_argument("output")
    parser.add_argument(
        "--max_images", type=between(int, 1, 10_000_000), required=True, help="images tested, about, at most"
    )
    parser.add_argument("--kind_pattern", type=kind_pattern, required=True, help="regular expression for a label")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
