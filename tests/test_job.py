"""job.py: how an output is published, and how a folder is locked."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bootstrap import job
from bootstrap.job import Job
from tests.helpers import ROOT


def test_canonicalize_makes_equal_tables_equal_files(tmp_path: Path) -> None:
    rows = pa.table({"id": [1, 2, 3], "values": [[1.0], [2.0], [3.0]]})
    for name, metadata in (("a", {b"writer": b"Spark 4.0.2"}), ("b", {b"writer": b"Spark 3.5.6"})):
        (tmp_path / name).mkdir()
        pq.write_table(rows.replace_schema_metadata(metadata), tmp_path / name / f"part-00000-{name}.c000.parquet")
        (tmp_path / name / "_SUCCESS").touch()
        (tmp_path / name / f".part-00000-{name}.c000.parquet.crc").touch()
        job.canonicalize(tmp_path / name)
    (a,) = (tmp_path / "a").iterdir()
    (b,) = (tmp_path / "b").iterdir()
    assert (a.name, a.read_bytes()) == ("part-00000.parquet", b.read_bytes())


def test_canonicalize_keeps_what_a_stage_wrote_beside_the_parts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1]}), tmp_path / "part-00000-uuid.parquet")
    for name in ("_fingerprint", "_SUCCESS", "._fingerprint.crc"):
        (tmp_path / name).touch()
    job.canonicalize(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"_fingerprint", "part-00000.parquet"}


def test_canonicalize_keeps_rows_and_their_order(tmp_path: Path) -> None:
    rows = pa.table({"id": list(range(5000, 0, -1)), "content": [b"x"] * 5000})
    pq.write_table(rows, tmp_path / "part-00007-uuid.snappy.parquet")
    job.canonicalize(tmp_path)
    assert pq.read_table(tmp_path / "part-00007.parquet").equals(rows)


def test_a_table_written_again_is_as_if_written_at_once(tmp_path: Path) -> None:
    for n in (0, 1, 2048, 5000):
        rows = pa.table({"id": range(n), "content": [b"x"] * n}, pa.schema({"id": pa.int64(), "content": pa.binary()}))
        (tmp_path / str(n)).mkdir()
        pq.write_table(rows, tmp_path / str(n) / "part-00000-uuid.parquet", row_group_size=3000)
        job.canonicalize(tmp_path / str(n))
        pq.write_table(
            rows,
            tmp_path / "at_once",
            row_group_size=2048,
            compression="snappy",
            use_dictionary=False,
            write_page_checksum=True,
        )
        assert (tmp_path / str(n) / "part-00000.parquet").read_bytes() == (tmp_path / "at_once").read_bytes()


def test_to_write_a_table_again_takes_the_memory_of_some_rows(tmp_path: Path) -> None:
    rows = pa.table({"content": [os.urandom(2**12)] * 2**14})
    pq.write_table(rows, tmp_path / "part-00000-uuid.parquet", use_dictionary=False, row_group_size=2**14)
    size = rows.nbytes
    del rows
    code = f"""
from pathlib import Path
from bootstrap import job
job.canonicalize(Path({str(tmp_path)!r}))
import pyarrow
print(pyarrow.default_memory_pool().max_memory())
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(said) < size / 2


def test_parts_that_would_get_one_name_are_refused_and_kept(tmp_path: Path) -> None:
    for part in ("part-00000-uuid-c000.parquet", "part-00000-uuid-c001.parquet"):
        pq.write_table(pa.table({"id": [1]}), tmp_path / part)
    with pytest.raises(SystemExit, match=r"2 files of .* would have 1 names; part-00000\.parquet is that of several"):
        job.canonicalize(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_two_runs_do_not_write_to_one_folder_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = []

    def second() -> None:
        with job.lock_folder(tmp_path):
            order.append("second")

    with job.lock_folder(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert f"another run is still at work in {tmp_path}; waiting for it to end" in capsys.readouterr().err


def test_two_runs_write_to_two_folders_at_once(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with job.lock_folder(tmp_path), job.lock_folder(tmp_path / "other"):
        pass


def test_a_folder_that_cannot_be_locked_is_used_without_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # as of NFS

    monkeypatch.setattr(job.fcntl, "flock", flock)
    with job.lock_folder(tmp_path) as lock:
        assert os.fstat(lock).st_ino == tmp_path.stat().st_ino
    said = f"submit: {tmp_path} cannot be locked (Bad file descriptor): start no second run there\n"
    assert capsys.readouterr().err == said


def place(tmp_path: Path) -> tuple[Job, Path]:
    """A job whose output is there from an earlier run, and the path that it writes to."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/earlier").touch()
    return Job("python", "stages/x.py", [], str(tmp_path / "out"), []), tmp_path / "out.partial"


def test_what_a_job_wrote_takes_the_place_of_its_earlier_output(tmp_path: Path) -> None:
    job_, partial = place(tmp_path)
    partial.mkdir()
    (partial / "new").touch()
    job.publish(job_, partial, is_sound=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_an_output_may_be_a_file(tmp_path: Path) -> None:
    partial = tmp_path / "drift.json.partial"
    partial.write_text("{}")
    job.publish(Job("python", "stages/x.py", [], str(tmp_path / "drift.json"), []), partial, is_sound=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("drift.json", "{}")]


def test_a_job_that_failed_leaves_the_earlier_output_as_it_was(tmp_path: Path) -> None:
    job_, partial = place(tmp_path)
    partial.mkdir()
    job.publish(job_, partial, is_sound=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "earlier"]


def test_a_job_that_wrote_nothing_is_refused_and_the_earlier_output_stays(tmp_path: Path) -> None:
    job_, partial = place(tmp_path)
    with pytest.raises(
        SystemExit,
        match=r"x ended with status 0 but wrote no .*out; the earlier one is left as it was\. The stage must write to",
    ):
        job.publish(job_, partial, is_sound=True)
    assert (tmp_path / "out/earlier").exists()


def test_on_a_full_disk_the_earlier_output_stays_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job_, partial = place(tmp_path)
    (partial / "images").mkdir(parents=True)
    (partial / "images/_SUCCESS").touch()
    pq.write_table(pa.table({"id": [1]}), partial / "images/part-00000-uuid.parquet")

    def write_batch(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", write_batch)
    with pytest.raises(SystemExit, match=r"out cannot be written: .*No space left on device.* free some space"):
        job.publish(job_, partial, is_sound=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/earlier").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_left_is_gone_before_the_next_begins(kind: str, tmp_path: Path) -> None:
    job_, partial = place(tmp_path)
    partial.touch() if kind == "file" else (partial / "half").mkdir(parents=True)
    with job.workplace(job_) as (fresh, _):
        assert (fresh, fresh.exists()) == (partial, False)


PEAK = """
import resource, sys
from pathlib import Path
from bootstrap import job
job.canonicalize(Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_publishing_a_hundred_parts_takes_no_more_memory_than_ten(tmp_path: Path) -> None:
    n_rows = 64
    rows = pa.table(
        {"image_id": [f"{i:064x}" for i in range(n_rows)], "content": [os.urandom(2**17) for _ in range(n_rows)]}
    )
    pq.write_table(rows, tmp_path / "one", compression="none", use_dictionary=False)  # 8 MiB, which no codec makes smaller
    peaks = []
    for n_parts in (10, 100):
        table = tmp_path / str(n_parts)
        table.mkdir()
        for i in range(n_parts):
            (table / f"part-{i:05}-x.parquet").hardlink_to(tmp_path / "one")
        done = subprocess.run([sys.executable, "-c", PEAK, table], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.2 * peaks[0]
