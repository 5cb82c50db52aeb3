"""The fixtures of several test files: a Spark session, images made on the spot, and one run of the pipeline."""

import functools
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.loaders
import numpy as np
import pytest
from PIL import Image
from pyspark import cloudpickle
from pyspark.sql import SparkSession

from stages import covariance, featurize, ingest, neighbours, reduce
from tests.helpers import copy_repository, run


@pytest.fixture(scope="session", autouse=True)
def descriptions_of_aws() -> Iterator[None]:
    """Read each description of a service of AWS once: every client reads it anew, in half of the time of these tests."""
    load = botocore.loaders.JSONFileLoader.load_file
    once = functools.cache(lambda path: load(botocore.loaders.JSONFileLoader(), path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.loaders.JSONFileLoader, "load_file", lambda self, path: once(path))
        yield


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    # A stage runs as __main__, whose functions travel to the workers by value; imported here, they would by name.
    for stage in (ingest, featurize, neighbours, covariance, reduce):
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


@pytest.fixture(scope="session")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with four photographs of each film, committed, the pipeline run once. Not to be changed: see clone."""
    folder = tmp_path_factory.mktemp("once") / "repository"
    copy_repository(folder, {"frames: 36": "frames: 4", "  k: 64": "  k: 8"})
    run("dvc", "repro", cwd=folder, SPARK_MASTER="local[2]")
    run("git", "add", "--all", cwd=folder)
    run("git", "commit", "--quiet", "-m", "First", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def clone(run_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository after a run, with all its data, for the tests of one file to change at will."""
    folder = tmp_path_factory.mktemp("clone")
    run("cp", "-a", str(run_once), str(folder), cwd=folder)  # keeps the links between cache and workspace
    return folder / run_once.name


@pytest.fixture
def dvc_root(tmp_path: Path) -> dict[str, str]:
    """The environment of a repository of DVC's."""
    (tmp_path / ".dvc").mkdir()
    return {"DVC_ROOT": str(tmp_path)}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """AWS as far as it can be played here: an Aws of tests/aws.py, which is slow to import."""
    from tests.aws import aws

    with aws(tmp_path_factory.mktemp("aws")) as played:
        yield played


@pytest.fixture
def keys_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys for moto within this process, which open nothing."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless Chromium without a network."""
    webdriver = pytest.importorskip("selenium.webdriver")
    browser, service = shutil.which("google-chrome") or shutil.which("chromium"), shutil.which("chromedriver")
    if not (browser and service):
        pytest.skip("needs Chrome or Chromium, and its driver (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--proxy-server=127.0.0.1:9",  # nobody there: whatever the page asks of a network fails, and is an error in the log
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(service))
    yield driver
    driver.quit()
