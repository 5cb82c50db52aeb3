"""Run a stage on this machine: by spark-submit on its cores, or as a Python module.

usage: python -m bootstrap.local    makes the archive of Spark's classes, if there is none; else the first run makes it
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from bootstrap.environment import python_environment, spark_environment
from bootstrap.java import ClassArchive, check_java, class_archive
from bootstrap.job import Job, Outcome, Runner
from bootstrap.parameters import flags, load

BOOTSTRAP = Path(__file__).resolve().parent
# Start-up messages of Java, TensorFlow and LiteRT that no log level silences, and Spark's warning of large tasks: that of
# reduce, with 64 components of 2,048 features, is 1 MB.
NOISE = re.compile(
    rb"incubator modules|log messages before absl|oneDNN custom operations|cpu_feature_guard|To enable the f"
    rb"|Created TensorFlow Lite XNNPACK|contains a task of very large size"
)
HINTS = {
    b"No space left on device": "the disk is full: free some space, or set SPARK_LOCAL_DIRS (for Spark's files) or "
    "FEATURE_CACHE to a folder on another disk",
    b"java.lang.OutOfMemoryError": "Spark ran out of memory: set SPARK_DRIVER_MEMORY higher, such as 8g",
    b"Python worker exited unexpectedly": "a Python worker was killed, perhaps because memory ran out: "
    "set SPARK_MASTER=local[N], with N less than the number of cores",
    b"failed to map segment from shared object": "Java's folder for temporary files lets no program run (noexec): name "
    "another one, by SPARK_SUBMIT_OPTS=-Djava.io.tmpdir=FOLDER",
} | dict.fromkeys(
    # What pyarrow and parquet-java say of a page, a file's end and its description.
    (b"CRC checksum verification failed", b"magic bytes not found", b"is not a Parquet file", b"deserialize thrift"),
    "a table is not as it was written, perhaps by a fault of the disk: `make verify` deletes what is damaged, and says how "
    "to have it again",
)


def connect() -> Runner:
    return Machine()


class Machine:
    """Run jobs as processes of this machine."""

    def command(self, job: Job, earlier: str | None = None) -> list[str]:
        if job.program == "spark-submit":
            return spark_submit(job, os.environ, earlier)
        module = ".".join(Path(job.stage).with_suffix("").parts)
        return [sys.executable, "-m", module, *job.inputs, job.output, *job.flags]

    def run(self, job: Job, partial: Path, lock: int) -> Outcome:
        started = time.monotonic()
        environment = python_environment(os.environ)
        archive = ClassArchive()
        if job.program == "spark-submit":
            archive = class_archive(os.environ, check_java())
            environment = spark_environment(environment, archive.options)
            check_folder(Path.cwd())
        with tempfile.TemporaryDirectory() as folder:
            earlier = folder if link_earlier(job, folder) else None
            status = call(self.command(job._replace(output=str(partial)), earlier), environment, lock)
        archive.settle(status)
        took = {"where": "local", "cores": os.cpu_count(), "seconds": time.monotonic() - started}
        return Outcome(status, lambda: took)


def check_folder(folder: Path) -> None:
    """Refuse a folder whose name Spark would read as a pattern of names, by SystemExit."""
    if any(letter in str(folder) for letter in "[]{}*?\\"):
        raise SystemExit(f"submit: Spark would read {folder} as a pattern: rename the folder, without [ ] {{ }} * ? \\")


def link_earlier(job: Job, folder: str) -> bool:
    """Put links to the files of the last output of featurize into the folder, if DVC's cache has them; tell if it does.

    DVC deletes an output before the stage runs that makes it anew. The cache keeps the files, as dvc.lock names them.
    """
    outputs = load("dvc.lock").get("stages", {}).get("featurize", {}).get("outs", [])
    digests = [each.get("md5") for each in outputs if (job.name, job.output) == ("featurize", each["path"])]
    # Only workers of this machine see the links. Without a digest, a remote keeps the versions of files, and the cache none.
    if not any(digests) or not master(os.environ).startswith("local"):
        return False
    from dvc.config import Config  # slow to import

    kept = Path(Config(".dvc")["cache"].get("dir") or ".dvc/cache", "files/md5").resolve()
    with suppress(OSError, ValueError):  # not there any more, or damaged
        for each in json.loads((kept / digests[0][:2] / digests[0][2:]).read_text()):
            if (file := kept / each["md5"][:2] / each["md5"][2:]).exists():
                Path(folder, each["relpath"]).symlink_to(file)
        return True
    return False


def master(environment: Mapping[str, str]) -> str:
    return environment.get("SPARK_MASTER") or "local[*]"


def spark_submit(job: Job, environment: Mapping[str, str], earlier: str | None = None) -> list[str]:
    """Return the command line of spark-submit that runs the job on this machine.

    Parameters
    ----------
    earlier : the folder of an earlier output of featurize, if there is one
    """
    root = environment.get("DVC_ROOT", ".")  # DVC's experiments in temporary folders share the cache of their origin
    settings = {
        "spark.featurize.cache": environment.get("FEATURE_CACHE") or f"{root}/.dvc/tmp/feature-cache",
        # Places are of this machine's disks, also where HADOOP_CONF_DIR says that they are of a cluster's.
        "spark.hadoop.fs.defaultFS": "file:///",
        "spark.ui.showConsoleProgress": str(sys.stdout.isatty()).lower(),
    }
    if earlier:
        settings["spark.featurize.earlier"] = earlier
    return [
        str(Path(sys.executable).with_name("spark-submit")),
        *("--master", master(environment)),
        *("--properties-file", str(BOOTSTRAP / "spark-defaults.conf")),
        *("--driver-memory", environment.get("SPARK_DRIVER_MEMORY") or f"{memory_mb() // 4}m"),
        # The JVM only moves rows. Its optimizing compiler takes half of two cores, and pays only after the stage has ended.
        # Its default collector pauses less, for which each store to memory is slower; pauses do not matter here.
        # New rows soon die: a quarter of a large heap for them would only be filled, at no gain.
        *("--driver-java-options", "-XX:TieredStopAtLevel=1 -XX:+UseParallelGC -Xmn128m"),
        *(part for key, value in settings.items() for part in ("--conf", f"{key}={value}")),
        job.stage,
        *job.inputs,
        job.output,
        *job.flags,
    ]


def make_archive() -> None:
    """Let `ingest` read the pictures of docs, so that Java learns Spark's classes; if it cannot, the first run will."""
    archive = class_archive(os.environ, check_java())
    if archive.partial:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree("docs", f"{folder}/images/docs")
            places = [f"{folder}/images"], f"{folder}/ingested"
            job = Job("spark-submit", "stages/ingest.py", *places, flags(load("params.yaml")["ingest"]))
            environment = spark_environment(python_environment(os.environ), archive.options)
            archive.settle(subprocess.run(spark_submit(job, os.environ), env=environment, capture_output=True).returncode)


def call(command: list[str], environment: Mapping[str, str], lock: int) -> int:
    """Run the command and return its exit status; end it with all its children when this process is told to end.

    Its output is passed on without NOISE. If it fails, HINTS are added.

    Parameters
    ----------
    lock : file descriptor that the command inherits
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=[lock],
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM acts like Ctrl-C, also where that is ignored
    hints: set[str] = set()
    try:
        hints = pass_on(cast(BinaryIO, process.stdout))
        status = process.wait()
        if status < 0:
            reason = "; perhaps memory ran out" if -status == signal.SIGKILL else ""
            print(f"submit: the stage was killed by {signal.Signals(-status).name}{reason}", file=sys.stderr)
            status = 128 - status
    except KeyboardInterrupt:
        print("\nsubmit: interrupted; stopping the stage", file=sys.stderr)
        status = 128 + signal.SIGINT
    finally:
        end(process)
    for hint in sorted(hints if status else ()):
        print(f"submit: {hint}", file=sys.stderr)
    return status


def pass_on(output: BinaryIO) -> set[str]:
    """Copy the output to stdout without NOISE, and return the HINTS whose signs are in it."""
    # Into a file by lines; to a terminal by bytes as they come, as a progress bar ends no line.
    read = output.read1 if sys.stdout.isatty() else output.readline  # type: ignore[attr-defined]
    hints = set()
    while chunk := read():
        hints |= {hint for sign, hint in HINTS.items() if sign in chunk}
        sys.stdout.buffer.writelines(line for line in chunk.splitlines(keepends=True) if not NOISE.search(line))
        sys.stdout.flush()
    return hints


def end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, in any state: by SIGTERM, then by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def memory_mb() -> int:
    """Return the memory of this machine, or of the container it runs in, in MiB."""
    n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        n_bytes = min(n_bytes, int(text))
    return n_bytes // 2**20


if __name__ == "__main__":
    make_archive()
