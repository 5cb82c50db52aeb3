"""What several test files share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from bootstrap import java

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(sys.executable)
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
PIPELINE: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SPARK_STAGES = ["ingest", "featurize", "covariance", "reduce"]


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command as on a new machine, with nobody's settings, and return what it prints."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ
        | {"PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}", "SPARK_DRIVER_MEMORY": "1g"}
        | {"HOME": str(cwd), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def forget(clone: Path) -> None:
    """Delete what Spark's stages wrote, and every trace of how it was made."""
    for name in (
        ".dvc/cache",
        ".dvc/tmp/feature-cache",
        "data/ingested",
        "data/features",
        "data/covariance",
        "data/reduced",
    ):
        shutil.rmtree(clone / name, ignore_errors=True)  # a run on EMR keeps its features elsewhere


def make_archive(dvc_root: dict[str, str], version: str) -> Path:
    """Let a first run with that version of Java make its archive of classes, of no class."""
    with java.class_archive(dvc_root, version) as options:
        made = Path(options.split()[0].removeprefix("-XX:ArchiveClassesAtExit="))
        made.write_bytes(b"classes")
    (archive,) = made.parent.iterdir()
    return archive
