"""What the tests share: a Spark session, and images made on the spot."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyspark import cloudpickle
from pyspark.sql import SparkSession

from stages import covariance, featurize, ingest, reduce

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    # A stage runs as __main__, whose functions travel to the workers by value; imported here, they would by name.
    for stage in (ingest, featurize, covariance, reduce):
        cloudpickle.register_pickle_by_value(stage)
    os.environ |= {
        "PYSPARK_PYTHON": sys.executable,
        "LC_ALL": "C.UTF-8",
        "SPARK_LOCAL_IP": "127.0.0.1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    session = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", False)
        .config("spark.ui.showConsoleProgress", False)
        .config("spark.sql.shuffle.partitions", 2)  # of 200, most would be empty
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 8)
        .config("spark.sql.execution.arrow.pyspark.enabled", True)
        .config("spark.sql.ansi.enabled", True)
        .config("spark.sql.warehouse.dir", str(tmp_path_factory.mktemp("warehouse")))
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def image_bytes() -> Callable[..., bytes]:
    """An encoded image of random pixels, the same for the same seed."""

    def make(
        format: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (30, 20), seed: int = 0, **save: object
    ) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, format, **save)
        return file.getvalue()

    return make
