"""submit.py: the command line it makes, what it publishes, and how it ends."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import job
import submit
from tests.conftest import ROOT

SUBMIT = [sys.executable, str(ROOT / "bootstrap/submit.py")]
# A root without .dvc: an archive of the few classes that these stages need would be of little use to the real ones.
ENVIRONMENT = os.environ | {"SPARK_DRIVER_MEMORY": "1g", "DVC_ROOT": str(ROOT / "tests")}

# A stage that writes two tables, one of them after what its second argument says.
STAGE = """
import sys, time
from pyspark.sql import SparkSession
spark = SparkSession.builder.getOrCreate()
source, output, _, what = sys.argv[1:]
spark.range(100).repartition(3, "id").sortWithinPartitions("id").write.parquet(f"{output}/first")
print("first is written", flush=True)
if what == "fail":
    raise SystemExit("the stage failed on purpose")
if what == "hang":
    time.sleep(600)
spark.range(5).write.parquet(f"{output}/second")
"""


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    path = tmp_path / "stage.py"
    path.write_text(STAGE)
    return path


def run(stage: Path, what: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SUBMIT, str(stage), "in", str(stage.parent / "out"), "--what", what],
        cwd=stage.parent,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )


def test_the_command_line_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "memory_mb", lambda: 8192)
    monkeypatch.setattr(submit, "BOOTSTRAP", Path("/repository/bootstrap"))
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    reduce = submit.parse(["stages/reduce.py", "data/features", "data/covariance", "data/reduced", "--k", "64"])
    assert submit.spark_submit(reduce, {}) == json.loads((ROOT / "tests/golden/local.json").read_text())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SPARK_MASTER", "local[1]", ["--master", "local[1]"]),
        ("SPARK_DRIVER_MEMORY", "9g", ["--driver-memory", "9g"]),
        ("FEATURE_CACHE", "s3://bucket/cache", ["--conf", "spark.featurize.cache=s3://bucket/cache"]),
        ("DVC_ROOT", "/origin", ["--conf", "spark.featurize.cache=/origin/.dvc/tmp/feature-cache"]),
    ],
)
def test_the_environment_says_where_it_runs(name: str, value: str, words: list[str]) -> None:
    command = submit.spark_submit(submit.parse(["stage.py", "in", "out"]), {name: value})
    assert any(command[i : i + 2] == words for i in range(len(command)))


def test_dry_run_prints_the_command_and_runs_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [*SUBMIT, "--dry_run", "no/such/stage.py", "in", f"{tmp_path}/out"], capture_output=True, text=True
    )
    assert (done.returncode, "spark-submit --master" in done.stdout, list(tmp_path.iterdir())) == (0, True, [])


def test_without_an_output_it_says_how_it_is_used() -> None:
    with pytest.raises(SystemExit, match="usage: submit"):
        submit.parse(["stages/reduce.py", "--k", "3"])


def test_an_unknown_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_TARGET", "moon")
    with pytest.raises(SystemExit, match="'moon'; it can be local"):
        submit.main(["stage.py", "in", "out"])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('openjdk version "11.0.2" 2019-01-15', r"Java 17 or 21, and .* is: openjdk version \"11.0.2\""),
        ('java version "1.8.0_392"', r"Java 17 or 21, and .* is: java version \"1.8"),
        ("no java here", "Java 17 or 21"),
    ],
)
def test_another_java_is_refused_by_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, message: str
) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(f"#!/bin/sh\necho '{said}' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=message):
        submit.check_java()


def test_no_java_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"cannot be run .*Install one"):
        submit.check_java()


@pytest.mark.parametrize(
    ("environment", "locale"),
    [({}, "C.UTF-8"), ({"LANG": "C"}, "C.UTF-8"), ({"LC_ALL": "C", "LANG": "fr_FR.UTF-8"}, "C.UTF-8")],
    ids=["none", "C", "C over French"],
)
def test_names_of_files_are_utf_8_in_any_locale(environment: dict[str, str], locale: str) -> None:
    assert submit.spark_environment(environment)["LC_ALL"] == locale


def test_a_utf_8_locale_is_kept() -> None:
    assert "LC_ALL" not in submit.spark_environment({"LANG": "fr_FR.UTF-8"})


@pytest.fixture
def root(tmp_path: Path) -> dict[str, str]:
    """The environment of a repository of DVC's."""
    (tmp_path / ".dvc").mkdir()
    return {"DVC_ROOT": str(tmp_path)}


def make_archive(root: dict[str, str], java: str) -> Path:
    with submit.class_archive(root, java) as options:
        made = Path(options.split()[0].removeprefix("-XX:ArchiveClassesAtExit="))
        made.write_bytes(b"classes")
    (archive,) = made.parent.iterdir()
    return archive


def test_the_first_run_makes_the_archive_of_classes_that_the_next_ones_share(root: dict[str, str]) -> None:
    archive = make_archive(root, "17.0.15")
    with submit.class_archive(root, "17.0.15") as options:
        assert options.split()[0] == f"-XX:SharedArchiveFile={archive}"


def test_the_archive_of_another_java_is_replaced(root: dict[str, str]) -> None:
    before = make_archive(root, "17.0.15")
    assert make_archive(root, "17.0.16") != before


def test_a_run_that_was_killed_leaves_no_part_of_an_archive(root: dict[str, str], tmp_path: Path) -> None:
    def killed() -> None:
        with submit.class_archive(root, "17.0.15") as options:
            Path(options.split()[0].removeprefix("-XX:ArchiveClassesAtExit=")).write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert list((tmp_path / ".dvc/tmp").iterdir()) == []


@pytest.mark.parametrize("name", ["HADOOP_CONF_DIR", "YARN_CONF_DIR", "SPARK_DIST_CLASSPATH"])
def test_with_folders_in_the_class_path_there_is_no_archive(root: dict[str, str], name: str) -> None:
    # Java would end with status 1 after all the work is done.
    with submit.class_archive(root | {name: "/etc/hadoop"}, "17.0.15") as options:
        assert options == ""


def test_tidy_makes_equal_tables_equal_files(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2, 3], "values": [[1.0], [2.0], [3.0]]})
    for name, metadata in (("a", {b"writer": b"Spark 4.0.2"}), ("b", {b"writer": b"Spark 3.5.6"})):
        (tmp_path / name).mkdir()
        pq.write_table(rows.replace_schema_metadata(metadata), tmp_path / name / f"part-00000-{name}.c000.parquet")
        (tmp_path / name / "_SUCCESS").touch()
        (tmp_path / name / f".part-00000-{name}.c000.parquet.crc").touch()
        job.tidy(tmp_path / name)
    (a,) = (tmp_path / "a").iterdir()
    (b,) = (tmp_path / "b").iterdir()
    assert (a.name, a.read_bytes()) == ("part-00000.parquet", b.read_bytes())


def test_tidy_keeps_rows_and_their_order(tmp_path: Path) -> None:
    rows = pa.table({"id": list(range(5000, 0, -1)), "content": [b"x"] * 5000})
    pq.write_table(rows, tmp_path / "part-00007-uuid.snappy.parquet")
    job.tidy(tmp_path)
    assert pq.read_table(tmp_path / "part-00007.parquet").equals(rows)


@pytest.mark.slow
def test_a_stage_that_ends_well_is_published_whole(stage: Path) -> None:
    done = run(stage, "well")
    files = sorted(str(path.relative_to(stage.parent / "out")) for path in (stage.parent / "out").rglob("*.parquet"))
    everything = [path for path in (stage.parent / "out").rglob("*") if path.is_file()]
    assert (done.returncode, files[:3], len(everything) - len(files), "first is written" in done.stdout) == (
        0,
        ["first/part-00000.parquet", "first/part-00001.parquet", "first/part-00002.parquet"],
        0,
        True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("state", ["made", "shared", "damaged"])
def test_an_archive_of_classes_in_any_state_changes_no_result(stage: Path, root: dict[str, str], state: str) -> None:
    if state != "made":
        archive = make_archive(root, submit.check_java())
        if state == "shared":
            archive.unlink()
            run(stage, "well", **root)
    done = run(stage, "well", **root)
    (archive,) = stage.parent.glob(".dvc/tmp/*")
    said = [line for line in done.stdout.splitlines() if "is written" not in line]
    size = archive.stat().st_size
    assert (done.returncode, said, done.stderr, size > 10**7) == (0, [], "", state != "damaged")


@pytest.mark.slow
def test_a_stage_that_fails_leaves_its_whole_tables_under_another_name(stage: Path) -> None:
    done = run(stage, "fail")
    left = sorted(path.name for path in stage.parent.iterdir())
    assert (done.returncode, left, "on purpose" in done.stdout) == (1, ["out.failed", "stage.py"], True)
    assert pq.read_table(stage.parent / "out.failed/first").num_rows == 100


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_stage_ends_with_all_its_processes_and_leaves_no_output(stage: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*SUBMIT, str(stage), "in", str(stage.parent / "out"), "--what", "hang"],
        cwd=stage.parent,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a job that runs in the background
    )
    assert process.stdout is not None
    assert any("first is written" in line for line in process.stdout)
    process.send_signal(number)
    assert process.wait(timeout=30) == 130
    time.sleep(1)
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert (str(stage) in running, (stage.parent / "out").exists(), (stage.parent / "out.partial").exists()) == (False,) * 3


def test_two_runs_do_not_write_to_one_folder_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = []

    def second() -> None:
        with job.alone(tmp_path):
            order.append("second")

    with job.alone(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert f"another run is still at work in {tmp_path}; waiting for it to end" in capsys.readouterr().err


def test_two_runs_write_to_two_folders_at_once(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with job.alone(tmp_path), job.alone(tmp_path / "other"):
        pass


def test_a_folder_that_cannot_be_locked_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # as of NFS

    monkeypatch.setattr(job.fcntl, "flock", flock)
    with job.alone(tmp_path) as lock:
        assert os.fstat(lock).st_ino == tmp_path.stat().st_ino


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("import os; os.kill(os.getpid(), 9)", 137, "Spark was killed by SIGKILL; perhaps memory ran out"),
        ("print('Python worker exited unexpectedly (crashed)'); raise SystemExit(1)", 1, "a Python worker was killed"),
    ],
    ids=["fails", "killed", "worker killed"],
)
def test_the_status_and_the_reason_of_what_ended_badly(
    code: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with job.alone(tmp_path) as lock:
        assert submit.stream([sys.executable, "-c", code], os.environ, lock) == status
    assert said in capsys.readouterr().err
