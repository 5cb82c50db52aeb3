"""The stages under another release of EMR: its Spark and its versions of packages, with results that are equal.

usage: python -m tests.releases [RELEASE]    emr-7.13.0 unless given; `make test-release` calls it

Makes a virtual environment with the release's Spark and what the nodes of its cluster get (wheelhouse.py), some 2 GB. Runs
the Spark stages there and here on the outputs of the last `make run`, and compares all tables: images, features and
covariances to the bit, what LAPACK computes to 1e-6, as another version of it rounds otherwise.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from bootstrap.aws import cloud, wheelhouse
from bootstrap.parameters import flags
from tests.helpers import PARAMS, ROOT, SPARK_STAGES

PLACES = {
    "ingest": ["data/sample", "ingested"],
    "featurize": ["ingested", "data/backbone", "features"],
    "neighbours": ["features", "neighbours"],
    "covariance": ["features", "data/split", "data/backbone", "covariance"],
    "reduce": ["features", "covariance", "reduced"],
}
TOLERANCE = 1e-6


def main(release: str) -> None:
    pins = wheelhouse.pins(cloud.settings(), release)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = folder / "venv/bin/python"
        call(sys.executable, "-m", "venv", folder / "venv")
        (folder / "pins.txt").write_text("".join(f"{package}=={version}\n" for package, version in pins.items()))
        call(python, "-m", "pip", "install", "--quiet", "-c", folder / "pins.txt", "pyspark", "pyyaml", *wheelhouse.IMPORTED)
        for interpreter, output in ((python, folder / "there"), (Path(sys.executable), folder / "here")):
            run_stages(interpreter, output)
        for path in sorted((folder / "here").rglob("*.parquet")):
            compare(path, folder / "there" / path.relative_to(folder / "here"))


def run_stages(python: Path, output: Path) -> None:
    output.mkdir()
    (output / "data").symlink_to(ROOT / "data")
    for stage in SPARK_STAGES:
        submit = [python, "-m", "bootstrap.submit", "spark-submit", ROOT / f"stages/{stage}.py"]
        words = [*PLACES[stage], *flags(PARAMS.get(stage, {}))]
        call(*submit, *words, cwd=output, PYTHONPATH=str(ROOT), FEATURE_CACHE=f"{output}-cache")


def compare(here: Path, there: Path) -> None:
    """Say how equal two tables are.

    Raises
    ------
    SystemExit
        they are not
    """
    name = "/".join(here.parts[here.parts.index("here") + 1 :])
    if here.read_bytes() == there.read_bytes():
        print(f"{name}: the same bytes")
        return
    a, b = pd.read_parquet(here), pd.read_parquet(there)
    numbers = [column for column in a if a[column].map(np.ndim).max() or a[column].dtype.kind == "f"]
    if not a.drop(columns=numbers).equals(b.drop(columns=numbers)):
        raise SystemExit(f"{name}: differs in more than numbers")
    largest = max(
        np.abs(np.stack(a[column]) - np.stack(b[column])).max() / np.abs(np.stack(a[column])).max() for column in numbers
    )
    print(f"{name}: largest difference {largest:.1e} of the largest number")
    if largest > TOLERANCE:
        raise SystemExit(f"{name}: that is more than {TOLERANCE}")


def call(*command: object, cwd: Path = ROOT, **environment: object) -> None:
    own = {name: str(value) for name, value in environment.items()}
    subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | own, check=True)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["emr-7.13.0"]))
