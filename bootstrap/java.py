"""Check the Java that Spark needs, and keep an archive of Spark's classes, with which Spark starts faster.

usage: python -m bootstrap.java    prints nothing if this machine can run Spark, else what to install
"""

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = (17, 21)  # of Java that Spark 4.0 runs on
CRASHES = [128 + number for number in (signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV)]  # exit statuses, by a shell or by us


def check_java() -> str:
    """Check the version of Java, and return what `java -version` prints.

    Raises
    ------
    SystemExit
        there is no Java, or Spark does not run on its version
    """
    java = Path(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
    wanted = f"Spark needs Java {' or '.join(map(str, VERSIONS))}"
    advice = (
        "Install one (Debian, Ubuntu: apt install openjdk-17-jre-headless; macOS: brew install openjdk@17) or set JAVA_HOME."
    )
    try:
        said = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"submit: {wanted}, and `{java}` cannot be run ({error}). {advice}") from error
    version = re.search(r'version "(?:1\.)?(\d+)', said)
    if not version or int(version[1]) not in VERSIONS:
        raise SystemExit(f"submit: {wanted}, and `{java}` is: {said.splitlines()[0]}. {advice}")
    return said


def find_spark(environment: Mapping[str, str]) -> Path:
    """Find the folder of Spark: SPARK_HOME, or the package of this Python.

    Raises
    ------
    SystemExit
        in SPARK_HOME is no Spark
    """
    spec = importlib.util.find_spec("pyspark")
    home = environment.get("SPARK_HOME")
    if home and not Path(home, "bin", "spark-submit").exists():
        raise SystemExit(f"submit: SPARK_HOME is {home}, where there is no Spark: unset it, and the installed one is used.")
    return Path(home or Path(str(spec and spec.origin)).parent)


class ClassArchive(NamedTuple):
    """An archive of Spark's classes, with which a JVM starts faster."""

    options: str = ""  # of the JVM that makes it or reads it; empty where there can be none
    path: Path = Path()
    partial: Path | None = None  # where the JVM writes it; None if it is there already

    def settle(self, status: int) -> None:
        """Keep what a JVM that ended with this status has made; drop what may have made it crash."""
        if self.partial and status == 0 and self.partial.exists():
            for other in self.path.parent.glob("classes-*.jsa"):
                other.unlink()
            self.partial.rename(self.path)
        elif self.partial:
            self.partial.unlink(missing_ok=True)
        elif self.options and status in CRASHES:
            self.path.unlink(missing_ok=True)
            print("submit: Java crashed; the next run makes its archive of Spark's classes again", file=sys.stderr)


def class_archive(environment: Mapping[str, str], java: str) -> ClassArchive:
    """Find the archive of this Spark and this Java, known by what `java -version` prints; the first run makes it.

    The JVM itself checks whether it fits and is whole, and ignores it if not.
    """
    jars = find_spark(environment) / "jars"
    folder = Path(environment.get("DVC_ROOT", ROOT), ".dvc").resolve()
    # The JVM fails to write an archive with a folder in the class path, which these may add, or on a full disk.
    has_folders = any(environment.get(name) for name in ("HADOOP_CONF_DIR", "YARN_CONF_DIR", "SPARK_DIST_CLASSPATH"))
    if has_folders or not jars.is_dir() or not os.access(folder, os.W_OK) or '"' in str(folder):
        return ClassArchive()
    (folder / "tmp").mkdir(exist_ok=True)
    made_for = hashlib.sha256(f"{java} {jars.resolve()} {jars.stat().st_mtime_ns}".encode()).hexdigest()
    path = folder / "tmp" / f"classes-{made_for[:16]}.jsa"
    if path.exists():
        return ClassArchive(f'"-XX:SharedArchiveFile={path}" -XX:+VerifySharedSpaces -Xlog:cds*=off', path)
    if shutil.disk_usage(folder).free < 2**30:
        return ClassArchive()
    partial = path.with_suffix(f".{os.getpid()}")
    return ClassArchive(f'"-XX:ArchiveClassesAtExit={partial}" -Xlog:cds*=off', path, partial)


if __name__ == "__main__":
    check_java()
