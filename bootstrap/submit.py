"""Run one stage with spark-submit and publish what it wrote.

usage: submit.py [--dry_run] STAGE INPUT... OUTPUT [--FLAG VALUE ...]
       submit.py --check

All that follows STAGE is the stage's own command line. The stage writes beside OUTPUT; only when it has ended well does
OUTPUT appear, whole, with nothing in it but part-00000.parquet, part-00001.parquet and so on. Exits as the stage does.

Where it runs is no parameter of a stage and enters no dvc.lock. It is read from the environment:

SPARK_TARGET         local (this machine) unless set; emr (the cluster of cluster.yaml) or emr-serverless: see emr.py
SPARK_MASTER         local[*] unless set; any master that spark-submit takes
SPARK_DRIVER_MEMORY  a quarter of this machine's memory unless set
FEATURE_CACHE        .dvc/tmp/feature-cache unless set; the folder (or s3:// prefix) where features are kept for reuse

--dry_run prints the spark-submit command line; --check only looks whether this machine can run a stage.
"""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from job import Job, beside, place_for, publish

BOOTSTRAP = Path(__file__).resolve().parent
TARGETS = ("local", "emr", "emr-serverless")
LOGGING = (BOOTSTRAP / "log4j2.properties").as_uri()
JAVA_VERSIONS = (17, 21)  # what Spark 4.0 runs on
# Greetings of Java and of TensorFlow that no log level silences; and 64 components of 2,048 features make a task of 1 MB.
NOISE = re.compile(
    rb"incubator modules|log messages before absl|oneDNN custom operations|cpu_feature_guard|To enable the f"
    rb"|contains a task of very large size"
)
HINTS = {
    b"No space left on device": "the disk is full: free some space, or set SPARK_LOCAL_DIRS (for Spark's files) or "
    "FEATURE_CACHE to another",
    b"java.lang.OutOfMemoryError": "Spark ran out of memory: set SPARK_DRIVER_MEMORY higher, such as 8g",
    b"Python worker exited unexpectedly": "a Python worker was killed, perhaps because memory ran out; "
    "SPARK_MASTER=local[N], with N fewer than there are cores, needs less",
}


def main(argv: list[str]) -> int:
    if argv == ["--check"]:
        check_java()
        return 0
    dry_run = argv[:1] == ["--dry_run"]
    job = parse(argv[dry_run:])
    target = os.environ.get("SPARK_TARGET", "local")
    if target not in TARGETS:
        raise SystemExit(f"submit: SPARK_TARGET is {target!r}; it can be {', '.join(TARGETS)}")
    if target == "local":
        return run_local(job, dry_run)
    import emr  # and with it boto3, which a run on this machine does not wait for

    return emr.run(job, target, dry_run)


def run_local(job: Job, dry_run: bool) -> int:
    """Run the stage on this machine's cores."""
    command = spark_submit(job._replace(output=str(beside(job.output, "partial"))), os.environ)
    if dry_run:
        print(shlex.join(command))
        return 0
    java = check_java()
    if any(letter in str(Path.cwd()) for letter in "[]{}*?\\"):
        raise SystemExit(f"submit: Spark takes {Path.cwd()} for a pattern; rename the folder, without [ ] {{ }} * ? \\")
    with place_for(job) as (partial, lock):
        started = time.monotonic()
        with class_archive(os.environ, java) as options:
            status = stream(command, spark_environment(os.environ, options), lock)
        publish(job, partial, is_sound=status == 0)
    if status == 0:
        import runtime  # and with it pyarrow, which may not be there yet for --check

        runtime.record(job, {"where": "local", "cores": os.cpu_count(), "seconds": time.monotonic() - started})
    return status


def parse(argv: list[str]) -> Job:
    n_places = next((i for i, argument in enumerate(argv) if argument.startswith("--")), len(argv))
    if n_places < 2:
        raise SystemExit((__doc__ or "").partition("\n\n")[2].partition("\n\n")[0])
    stage, *inputs, output = argv[:n_places]
    return Job(stage, inputs, output, argv[n_places:])


def spark_submit(job: Job, environment: Mapping[str, str]) -> list[str]:
    """The command line that runs the job on this machine."""
    root = environment.get("DVC_ROOT", ".")  # DVC's experiments in temporary folders share the cache of their origin
    settings = {
        "spark.featurize.cache": environment.get("FEATURE_CACHE", f"{root}/.dvc/tmp/feature-cache"),
        "spark.ui.showConsoleProgress": str(sys.stdout.isatty()).lower(),
    }
    return [
        str(Path(sys.executable).with_name("spark-submit")),
        *("--master", environment.get("SPARK_MASTER", "local[*]")),
        *("--properties-file", str(BOOTSTRAP / "spark-defaults.conf")),
        *("--driver-memory", environment.get("SPARK_DRIVER_MEMORY", f"{memory_mb() // 4}m")),
        # The JVM only moves rows; its optimizing compiler takes half of two cores and pays after the stage has ended. Its
        # usual collector makes every store dearer so as to pause less, which nobody waits for here.
        *("--driver-java-options", "-XX:TieredStopAtLevel=1 -XX:+UseParallelGC"),
        *(part for key, value in settings.items() for part in ("--conf", f"{key}={value}")),
        job.stage,
        *job.inputs,
        job.output,
        *job.flags,
    ]


def spark_environment(environment: Mapping[str, str], options: str = "") -> dict[str, str]:
    """What spark-submit and its children see: options of the JVM, our logging, this Python, names of files in UTF-8."""
    given = environment.get("SPARK_SUBMIT_OPTS", "")
    own = {
        "SPARK_CONF_DIR": "/nonexistent",  # it heads the class path; an archive of classes bears no folder there
        "SPARK_SUBMIT_OPTS": f"{given} -Dlog4j2.configurationFile={LOGGING} {options}".strip(),
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "PYTHONUNBUFFERED": "1",
        "SPARK_LOCAL_IP": "127.0.0.1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    # Java reads the names of files by the locale; in the plain C locale it cannot open one that has an accent.
    if "UTF" not in (environment.get("LC_ALL") or environment.get("LC_CTYPE") or environment.get("LANG") or "").upper():
        own["LC_ALL"] = "C.UTF-8"
    return {**environment, **own}


@contextmanager
def class_archive(environment: Mapping[str, str], java: str) -> Iterator[str]:
    """JVM options that share an archive of Spark's classes, which load in seconds less; the first run makes it.

    It is for one Java (what it says of its version) and one Spark. The JVM itself looks whether the archive fits,
    and does without where not.
    """
    spec = importlib.util.find_spec("pyspark")
    home = environment.get("SPARK_HOME") or Path(str(spec and spec.origin)).parent
    jars = Path(home, "jars")
    folder = Path(environment.get("DVC_ROOT", BOOTSTRAP.parent), ".dvc").resolve()
    # The JVM that writes it would fail with a folder in the class path, which these may add, or on a full disk.
    refused = any(environment.get(name) for name in ("HADOOP_CONF_DIR", "YARN_CONF_DIR", "SPARK_DIST_CLASSPATH"))
    if refused or not jars.is_dir() or not os.access(folder, os.W_OK) or " " in str(folder):
        yield ""
        return
    (folder / "tmp").mkdir(exist_ok=True)
    made_for = hashlib.sha256(f"{java} {jars.resolve()} {jars.stat().st_mtime_ns}".encode()).hexdigest()
    archive = folder / "tmp" / f"classes-{made_for[:16]}.jsa"
    partial = archive.with_suffix(f".{os.getpid()}")
    if archive.exists():
        yield f"-XX:SharedArchiveFile={archive} -Xlog:cds*=off"
    elif shutil.disk_usage(folder).free < 2**30:
        yield ""
    else:
        try:
            yield f"-XX:ArchiveClassesAtExit={partial} -Xlog:cds*=off"
            if partial.exists():
                for other in archive.parent.glob("classes-*.jsa"):
                    other.unlink()
                partial.rename(archive)
        finally:
            partial.unlink(missing_ok=True)


def stream(command: list[str], environment: Mapping[str, str], lock: int) -> int:
    """Run the command, pass its output on as it comes, and end it with all its children when we are told to end."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=[lock],
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be told to end is Ctrl-C, also where that is ignored
    output = cast(BinaryIO, process.stdout)
    # Whole lines where they are kept; on a terminal as they come, for Spark's progress bar ends none.
    read = output.read1 if sys.stdout.isatty() else output.readline  # type: ignore[attr-defined]
    hints = set()
    try:
        while chunk := read():
            hints |= {hint for sign, hint in HINTS.items() if sign in chunk}
            if not NOISE.search(chunk):
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()
        status = process.wait()
        if status < 0:
            reason = "; perhaps memory ran out" if -status == signal.SIGKILL else ""
            print(f"submit: Spark was killed by {signal.Signals(-status).name}{reason}", file=sys.stderr)
            status = 128 - status
    except KeyboardInterrupt:
        print("\nsubmit: interrupted; stopping Spark", file=sys.stderr)
        status = 128 + signal.SIGINT
    finally:
        end(process)
    for hint in sorted(hints if status else ()):
        print(f"submit: {hint}", file=sys.stderr)
    return status


def end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children, whatever state they are in."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def check_java() -> str:
    """What Java says of its version.

    Raises
    ------
    SystemExit
        there is none, or Spark does not run on it
    """
    java = Path(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
    wanted = f"Spark needs Java {' or '.join(map(str, JAVA_VERSIONS))}"
    advice = (
        "Install one (Debian, Ubuntu: apt install openjdk-17-jre-headless; macOS: brew install openjdk@17) or set JAVA_HOME."
    )
    try:
        said = subprocess.run([java, "-version"], capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"submit: {wanted}, and `{java}` cannot be run ({error}). {advice}") from error
    version = re.search(r'version "(?:1\.)?(\d+)', said)
    if not version or int(version[1]) not in JAVA_VERSIONS:
        raise SystemExit(f"submit: {wanted}, and `{java}` is: {said.splitlines()[0]}. {advice}")
    return said


def memory_mb() -> int:
    """MiB of memory of this machine, or of the container it runs in."""
    n_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        n_bytes = min(n_bytes, int(text))
    return n_bytes // 2**20


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
