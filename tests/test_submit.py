"""submit.py and local.py: the command line, what is published, and how a stage ends."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bootstrap import java, job, local, submit
from bootstrap.environment import python_environment
from tests.helpers import ROOT, make_archive

SUBMIT = [sys.executable, "-m", "bootstrap.submit", "spark-submit"]
# A root without .dvc: an archive of the few classes that these stages need would be of little use to the real ones.
ENVIRONMENT = os.environ | {"SPARK_DRIVER_MEMORY": "1g", "DVC_ROOT": str(ROOT / "tests"), "PYTHONPATH": str(ROOT)}

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


@pytest.mark.slow
def test_a_place_is_on_this_machine_also_where_a_cluster_is_configured(stage: Path) -> None:
    site = "<configuration><property><name>fs.defaultFS</name><value>hdfs://127.0.0.1:9</value></property></configuration>"
    (stage.parent / "core-site.xml").write_text(site)
    done = run(stage, "end", HADOOP_CONF_DIR=str(stage.parent))
    assert (done.returncode, (stage.parent / "out/second").is_dir()) == (0, True), done.stdout


def test_a_spark_home_without_spark_is_told(stage: Path) -> None:
    done = run(stage, "end", SPARK_HOME="/nonexistent/spark")
    assert (done.returncode, done.stderr) == (
        1,
        "submit: SPARK_HOME is /nonexistent/spark, where there is no Spark: unset it, and the installed one is used.\n",
    )


def test_a_locale_that_is_not_utf_8_is_told_and_how_to_go_on(stage: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # any system has this one
    done = run(stage, "end", **plain)
    assert done.returncode == 1
    assert "text is ascii" in done.stderr
    assert "Set PYTHONUTF8=1" in done.stderr


def test_a_folder_for_temporary_files_that_lets_nothing_run_is_told() -> None:
    # As Java says it where /tmp is mounted noexec.
    said = b"UnsatisfiedLinkError: /tmp/libsnappyjava.so: failed to map segment from shared object\n"
    (hint,) = local.pass_on(io.BytesIO(said))
    assert "java.io.tmpdir" in hint


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    empty = dict.fromkeys(["FEATURE_CACHE", "SPARK_MASTER", "SPARK_DRIVER_MEMORY"], "")
    one = job.Job("spark-submit", "stage.py", ["in"], "out", [])
    assert local.spark_submit(one, empty) == local.spark_submit(one, {})
    assert isinstance(submit.find_runner(one, {"SPARK_TARGET": ""}), local.Machine)


def test_the_command_line_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "memory_mb", lambda: 8192)
    monkeypatch.setattr(local, "BOOTSTRAP", Path("/repository/bootstrap"))
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    words = "spark-submit stages/reduce.py data/features data/covariance data/reduced --k 64"
    assert local.spark_submit(submit.parse(words.split()), {}) == json.loads((ROOT / "tests/golden/local.json").read_text())


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
    command = local.spark_submit(submit.parse(["spark-submit", "stage.py", "in", "out"]), {name: value})
    assert any(command[i : i + 2] == words for i in range(len(command)))


def test_dry_run_prints_the_command_and_runs_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [*SUBMIT[:3], "--dry_run", "spark-submit", "no/such/stage.py", "in", f"{tmp_path}/out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, "spark-submit --master" in done.stdout, list(tmp_path.iterdir())) == (0, True, [])


def test_without_an_output_it_says_how_it_is_used() -> None:
    with pytest.raises(SystemExit, match=r"usage: python -m bootstrap\.submit"):
        submit.parse(["spark-submit", "stages/reduce.py", "--k", "3"])


def test_an_unknown_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_TARGET", "moon")
    with pytest.raises(SystemExit, match="'moon'; set it to one of local, emr, emr-serverless"):
        submit.main(["spark-submit", "stage.py", "in", "out"])


def test_an_output_is_not_published_if_an_input_changed_while_the_stage_was_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_text("earlier")
    (tmp_path / "stage.py").write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[2]).write_text('new')\npathlib.Path('in/late.jpg').touch()"
    )
    with pytest.raises(SystemExit, match=r"files of in came, went or changed while stage .* such as in/late\.jpg"):
        submit.main(["python", "stage.py", "in", "out"])
    assert (tmp_path / "out").read_text() == "earlier"


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


@pytest.mark.slow
@pytest.mark.parametrize("state", ["made", "shared", "flipped", "damaged"])
def test_an_archive_of_classes_in_any_state_changes_no_result(stage: Path, dvc_root: dict[str, str], state: str) -> None:
    if state != "made":
        archive = make_archive(dvc_root, java.check_java())
        if state != "damaged":
            archive.unlink()
        if state == "flipped":
            run(stage, "well", **dvc_root)
        if state == "shared":  # from the installation on
            subprocess.run([sys.executable, "-m", "bootstrap.local"], cwd=ROOT, env=os.environ | dvc_root, check=True)
            assert archive.stat().st_size > 10**7
        if state == "flipped":
            content = bytearray(archive.read_bytes())
            middle = slice(len(content) // 2, len(content) // 2 + 200_000)
            content[middle] = bytes(each ^ 0x5A for each in content[middle])
            archive.chmod(0o600)
            archive.write_bytes(content)
    done = run(stage, "well", **dvc_root)
    (archive,) = stage.parent.glob(".dvc/tmp/*.jsa")
    said = [line for line in done.stdout.splitlines() if "is written" not in line]
    size = archive.stat().st_size
    assert (done.returncode, said, done.stderr, size > 10**7) == (0, [], "", state != "damaged")


@pytest.mark.slow
def test_a_project_below_a_folder_with_a_blank_runs_and_shares_its_archive_of_classes(tmp_path: Path) -> None:
    project = tmp_path / "my project (1)"
    (project / ".dvc").mkdir(parents=True)
    (project / "stage.py").write_text(STAGE)
    python = install_spark(project / ".venv")
    command = [str(python), *SUBMIT[1:], "stage.py", "in", "out", "--what", "well"]
    for _ in ("makes the archive", "shares it"):
        done = subprocess.run(
            command, cwd=project, env=ENVIRONMENT | {"DVC_ROOT": str(project)}, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "first is written\n", "")
    assert [path.stat().st_size > 10**7 for path in project.glob(".dvc/tmp/*.jsa")] == [True]


def install_spark(folder: Path) -> Path:
    """Make a virtual environment that has Spark in its own folder, as pip installs it; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    pyspark = Path(str(java.find_spark({})))
    (packages / "pyspark").symlink_to(pyspark)
    (packages / "others.pth").write_text(str(pyspark.parent))
    for script in ("spark-submit", "find-spark-home", "find_spark_home.py"):
        (folder / "bin" / script).symlink_to(Path(sys.executable).parent / script)
    return folder / "bin" / "python"


def test_what_tensorflow_says_at_its_start_is_no_output_of_a_stage(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with job.lock_folder(tmp_path) as lock:
        command = [sys.executable, "-c", "import tensorflow; print('done')"]
        local.call(command, python_environment(os.environ), lock)
    assert capfdbinary.readouterr() == (b"done\n", b"")


def test_a_progress_bar_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    for is_terminal in (True, False):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        command = [sys.executable, "-c", "from tqdm import tqdm; list(tqdm([1]))"]
        done = subprocess.run(command, env=python_environment(os.environ), capture_output=True)
        drawn[is_terminal] = b"1/1" in done.stderr
    assert drawn == {True: True, False: False}


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("import os; os.kill(os.getpid(), 9)", 137, "the stage was killed by SIGKILL; perhaps memory ran out"),
        ("print('Python worker exited unexpectedly (crashed)'); raise SystemExit(1)", 1, "a Python worker was killed"),
    ],
    ids=["fails", "killed", "worker killed"],
)
def test_the_status_and_the_reason_of_what_ended_badly(
    code: str, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with job.lock_folder(tmp_path) as lock:
        assert local.call([sys.executable, "-c", code], os.environ, lock) == status
    assert said in capsys.readouterr().err
