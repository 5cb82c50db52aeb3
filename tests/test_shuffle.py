"""cluster.yaml's encryption and YARN's shuffle service, played by Spark's own ExternalShuffleService.

In YARN that service runs in the node managers and reads yarn-site, not the settings of applications. Here it is a process of
its own, which gets from cluster.yaml what yarn-site gets, and the secret, which YARN would give it.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyspark
import pytest

from bootstrap.aws import cloud
from tests.helpers import PYTHON

JOB = """
from pyspark.sql import SparkSession
spark = SparkSession.builder.getOrCreate()
sums = spark.sparkContext.parallelize(range(100), 4).map(lambda i: (i % 3, i)).reduceByKey(lambda a, b: a + b)
print("sums", sorted(sums.collect()))
"""


def configuration(name: str) -> dict[str, str]:
    found = cloud.settings()["cluster"]["Configurations"]
    return next((each["Properties"] for each in found if each["Classification"] == name), {})


@contextmanager
def shuffle_service(settings: dict[str, str], environment: dict[str, str]) -> Iterator[None]:
    options = " ".join(f"-D{name}={value}" for name, value in settings.items())
    command = [
        str(Path(pyspark.__file__).with_name("bin") / "spark-class"),
        "org.apache.spark.deploy.ExternalShuffleService",
    ]
    with subprocess.Popen(command, env=environment | {"SPARK_SHUFFLE_OPTS": options}, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


@pytest.mark.slow
def test_yarns_shuffle_service_takes_executors_that_authenticate_themselves(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "job.py").write_text(JOB)
    shared = {"spark.authenticate.secret": secrets.token_hex(16), "spark.shuffle.service.port": str(port)}
    shared |= {"spark.shuffle.service.enabled": "true"}  # as EMR sets it, with dynamic allocation
    yarn = {name: value for name, value in configuration("yarn-site").items() if name.startswith("spark.")}
    own = ("spark.authenticate", "spark.network.", "spark.io.")
    application = {name: value for name, value in configuration("spark-defaults").items() if name.startswith(own)}
    assert application["spark.authenticate"] == "true"
    environment = os.environ | {
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(tmp_path),
        "PYSPARK_PYTHON": sys.executable,
    }
    conf = [f"--conf={name}={value}" for name, value in (application | shared).items()]
    command = [
        str(PYTHON.with_name("spark-submit")),
        "--master",
        "local-cluster[1,1,512]",
        "--conf=spark.executor.memory=512m",
        *conf,
    ]
    with shuffle_service(yarn | shared, environment), (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*command, str(tmp_path / "job.py")],
            cwd=tmp_path,
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            status: Any = process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            status = "executors die and are started again, without end"
            os.killpg(process.pid, signal.SIGKILL)  # with its executors
            process.wait()
    text = (tmp_path / "said").read_text()
    assert (status, "sums [(0, 1683), (1, 1617), (2, 1650)]" in text) == (0, True), text[-3000:]


def test_executors_that_cannot_start_end_the_stage(spark: Any) -> None:
    """By Spark's own reading, with EMR's dynamic allocation, for which its own limit is about the largest number."""
    jvm = spark.sparkContext._jvm
    conf = jvm.org.apache.spark.SparkConf(False)
    conf.set("spark.dynamicAllocation.enabled", "true").set("spark.shuffle.service.enabled", "true")
    failures = jvm.org.apache.spark.deploy.ExecutorFailureTracker.maxNumExecutorFailures
    assert failures(conf) > 10**9
    for name, value in configuration("spark-defaults").items():
        conf.set(name, value)
    assert failures(conf) == 32
