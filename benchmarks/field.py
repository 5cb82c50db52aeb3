"""Do the job as published scripts do, for comparison: one PySpark script, with the settings that most of them share.

usage: field.py IMAGES OUTPUT [--k 50] [--materialise]
       field.py --features FEATURES OUTPUT [--k 50]

Images are read as binary files, shuffled into 20 partitions, and go through ResNet50 (pooled, weights broadcast) in an
iterator of pandas series: Arrow batches of 1,024, `predict` in batches of 32, nothing cached. pyspark.ml's PCA is fitted,
applied, and written as Parquet. With --materialise features are written first and read back, as better scripts do. With
--features only the PCA is done, of a table of features.

Weights are random; speed does not depend on them. Prints one line of JSON: images, passes of the network, seconds of each
action.
"""

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from pyspark.ml.feature import PCA
from pyspark.ml.functions import array_to_vector, vector_to_array
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

SIZE = 224
N_PARTITIONS = 20


def main() -> None:
    args = parse_args()
    seconds: dict[str, float] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        started = time.monotonic()
        result = action()
        seconds[name] = round(time.monotonic() - started, 2)
        return result

    spark = timed("start", lambda: SparkSession.builder.appName("field").getOrCreate())
    passes = spark.sparkContext.accumulator(0)
    if args.features:
        features = spark.read.parquet(args.features)
    else:
        features = featurize(spark, args.images, passes)
        if args.materialise:
            timed("featurize", lambda: features.write.parquet(f"{args.output}/features"))
            features = spark.read.parquet(f"{args.output}/features")
    vectors = features.withColumn("vector", array_to_vector(F.col("features")))
    model = timed("fit", lambda: PCA(k=args.k, inputCol="vector", outputCol="reduced").fit(vectors))
    reduced = model.transform(vectors).select("path", "label", vector_to_array(F.col("reduced"), "float32").alias("reduced"))
    timed("write", lambda: reduced.write.parquet(f"{args.output}/reduced"))
    n_images = len(pd.read_parquet(f"{args.output}/reduced", columns=["path"]))
    print(json.dumps({"images": n_images, "passes": passes.value, "seconds": seconds}))


def featurize(spark: SparkSession, folder: Path, passes: Any) -> DataFrame:
    import keras

    def network() -> Any:
        return keras.applications.ResNet50(weights=None, include_top=False, pooling="avg", input_shape=(SIZE, SIZE, 3))

    def pixels(content: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(content)).resize((SIZE, SIZE))
        return keras.applications.resnet50.preprocess_input(keras.utils.img_to_array(image))

    weights = spark.sparkContext.broadcast(network().get_weights())

    @F.pandas_udf("array<float>")  # type: ignore[call-overload]  # its stub asks for what type hints say since Spark 3
    def vectors_of(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        model = network()
        model.set_weights(weights.value)
        for contents in batches:
            passes.add(len(contents))
            yield pd.Series(list(model.predict(np.stack(contents.map(pixels)), batch_size=32, verbose=0)))

    files = spark.read.format("binaryFile").option("pathGlobFilter", "*.jpg").option("recursiveFileLookup", True)
    images = files.load(str(folder)).withColumn("label", F.element_at(F.split("path", "/"), -2))
    return images.repartition(N_PARTITIONS).select("path", "label", vectors_of("content").alias("features"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", nargs="?")
    parser.add_argument("output")
    parser.add_argument("--features")
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--materialise", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
