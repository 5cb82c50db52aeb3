"""baseline: what the full features and raw pixels recognise, for the reduction to be measured against.

usage: baseline.py INGESTED FEATURES OUTPUT --max_images 12000

reads   INGESTED/images, FEATURES
writes  OUTPUT  PREDICTIONS, one row for each image of the sample, by image_id

All is trained on one fold and tested on the other, then the other way round; 16 x 16 raw pixels are the floor. Nothing of it
depends on the reduction, so another k computes none of it again.

Runs without Spark, in bounded memory: of more than max_images, as many are chosen by SHA-256.
"""

import argparse
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from tqdm import tqdm

PREDICTIONS = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("fold", pa.int32()),
        # The label that each space gives the image; null where the other fold has no image of its label.
        ("features_nearest_neighbour", pa.string()),
        ("pixels_nearest_neighbour", pa.string()),
        ("features_linear_probe", pa.string()),
        ("pixels_linear_probe", pa.string()),
    ]
)
ROWS = 1024  # of a distance matrix, at once


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    sample, spaces = read_sample(args.ingested, args.features, args.max_images)
    # One thread for each fold, and one of BLAS in it: the last bits of a result depend on the number of BLAS's threads.
    steps = tqdm(total=2 * 2 * len(spaces), desc="baseline", disable=None)  # on a terminal only
    with threadpool_limits(1), ThreadPoolExecutor() as pool, steps:
        folds = list(pool.map(lambda fold: predict_fold(sample, spaces, fold, steps), (0, 1)))
    predictions = sample.join(pd.concat(folds))
    partial = Path(f"{args.output}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    table = pa.Table.from_pandas(predictions.reindex(columns=PREDICTIONS.names), PREDICTIONS, preserve_index=False)
    pq.write_table(table.replace_schema_metadata(), partial / "part-00000.parquet")
    shutil.rmtree(args.output, ignore_errors=True)
    partial.rename(args.output)
    n_tested = int(predictions["features_linear_probe"].notna().sum()) if len(predictions) else 0
    print(f"baseline: {n_tested:,} images tested in {len(spaces)} spaces")


def predict_fold(sample: pd.DataFrame, spaces: dict[str, np.ndarray], test_fold: int, steps: tqdm) -> pd.DataFrame:
    """The predicted labels of one fold's images by what is trained on the other, a row for each image tested.

    Images whose label the other fold does not have cannot be recognised, and are left out.
    """
    is_train = (sample["fold"] != test_fold).to_numpy()
    is_test = ~is_train & sample["label"].isin(sample["label"][is_train]).to_numpy()
    predicted = pd.DataFrame(index=sample.index[is_test], columns=PREDICTIONS.names[5:], dtype=object)
    if not is_train.any() or not is_test.any():
        return predicted
    labels = sample["label"][is_train].to_numpy()
    for space, rows in spaces.items():
        train, test = rows[is_train], rows[is_test]
        predicted[f"{space}_nearest_neighbour"] = labels[nearest(train, test)]
        steps.update()
        predicted[f"{space}_linear_probe"] = linear_probe(train, test, labels)
        steps.update()
    return predicted


def nearest(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Number of each test row's nearest training row (Euclidean), array of shape (n_test,)."""
    squares = (train**2).sum(axis=1)
    parts = [test[start : start + ROWS] for start in range(0, len(test), ROWS)]
    return np.concatenate([(squares - 2 * some @ train.T).argmin(axis=1) for some in parts])


def linear_probe(train: np.ndarray, test: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels of the test rows by logistic regression, scaled so that one penalty suits spaces of any unit."""
    if len(set(labels)) < 2:
        return np.full(len(test), labels[0])
    mean = train.mean(axis=0)
    spread = np.sqrt(((train - mean) ** 2).sum(axis=1).mean()) or 1.0
    probe = LogisticRegression(C=100.0, max_iter=500).fit((train - mean) / spread, labels)
    return probe.predict((test - mean) / spread)


def read_sample(ingested: str, features_folder: str, max_images: int) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """About max_images distinct images, chosen by SHA-256.

    Returns
    -------
    image_id, path, label, group, fold, a row an image; and its rows in the spaces features and pixels, float32 arrays of
    shapes (n_images, n_features) and (n_images, 768)
    """
    rows_of_features = ds.dataset(features_folder, format="parquet")
    chosen = of_share(max_images / max(rows_of_features.count_rows(), 1))
    table = rows_of_features.to_table(["image_id", "path", "label", "group", "fold", "features"], filter=chosen)
    # One row for each distinct image: with a copy of it in the other fold, a nearest neighbour proves nothing.
    rows = table.drop_columns("features").to_pandas().sort_values(["image_id", "path"]).drop_duplicates("image_id")
    thumbnails = ds.dataset(f"{ingested}/images", format="parquet").to_table(["image_id", "thumbnail"], filter=chosen)
    first = pd.Series(range(len(thumbnails)), thumbnails["image_id"].to_pylist()).groupby(level=0).first()
    features = to_matrix(table["features"].combine_chunks().flatten().to_numpy(), len(table))
    pixels = to_matrix(np.frombuffer(b"".join(thumbnails["thumbnail"].to_pylist()), np.uint8), len(thumbnails))
    spaces = {"features": features[rows.index], "pixels": pixels[first[rows["image_id"]]].astype(np.float32)}
    return rows.reset_index(drop=True), spaces


def to_matrix(values: np.ndarray, n_rows: int) -> np.ndarray:
    return values.reshape(n_rows, -1 if n_rows else 0)


def of_share(share: float) -> pc.Expression:
    """A filter of rows by image_id, a SHA-256 and so uniform: that share of all images begins below some hash."""
    return pc.field("image_id") < f"{int(share * 16**8):08x}" if share < 1 else pc.field("image_id").is_valid()


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ingested")
    parser.add_argument("features")
    parser.add_argument("output")
    parser.add_argument("--max_images", type=positive, required=True, help="images tested, about, at most")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
