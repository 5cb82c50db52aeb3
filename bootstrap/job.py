"""Define what every run of a stage shares, wherever it runs: its command line, its lock, its output, digests of files."""

import fcntl
import hashlib
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

PROGRAMS = ("spark-submit", "python")
# What is published of a table: its parts, as Spark names them, and what a stage wrote beside them.
PUBLISHED = re.compile(r"(?:^|/)(?:part-\d+[^/]*\.parquet|_fingerprint)$")


class Job(NamedTuple):
    """Hold the parts of a stage's command line: program, file, inputs, output, flags."""

    program: str  # one of PROGRAMS
    stage: str
    inputs: list[str]
    output: str
    flags: list[str]

    @property
    def name(self) -> str:
        """Return the stage's name, which is that of its file."""
        return Path(self.stage).stem

    @property
    def words(self) -> list[str]:
        """Return the command line as it stands in dvc.yaml."""
        return [self.program, self.stage, *self.inputs, self.output, *self.flags]


class Outcome(NamedTuple):
    """Say how a job ended."""

    status: int  # the exit status; 0 if the job ended well
    # Called once the output is published; returns what the run took (see runtime.record).
    settle: Callable[[], Mapping[str, Any]]
    message: str = ""  # why the job failed, for people


class Runner(Protocol):
    """Run jobs, on this machine or by a service elsewhere."""

    def command(self, job: Job) -> list[str]:
        """Return the command that would run the job."""

    def run(self, job: Job, partial: Path, lock: int) -> Outcome:
        """Run the job, which writes to `partial` instead of its output, and return how it ended.

        Parameters
        ----------
        lock : file descriptor; a process that inherits it keeps other runs out of the folder as long as it lives
        """


@contextmanager
def workplace(job: Job) -> Iterator[tuple[Path, int]]:
    """Yield the path that the job writes to, beside its output and not existing yet, and the lock of the folder."""
    partial = sibling(job.output, "partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with lock_folder(partial.parent) as lock:
        for leftover in (partial, sibling(job.output, "failed")):
            remove(leftover)
        yield partial, lock


@contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Wait until no other run works in the folder, then keep others waiting.

    Yields the lock's file descriptor. A process that inherits it holds the lock too. When this process is killed, the
    stage that it started goes on, and until it ends no other run may write the same files.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"submit: another run is still at work in {folder}; waiting for it to end", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # as on some network disks
            print(f"submit: {folder} cannot be locked ({error.strerror}): start no second run there", file=sys.stderr)
        yield lock
    finally:
        os.close(lock)


def publish(job: Job, partial: Path, is_sound: bool) -> None:
    """Rename what the job wrote to its output. If the job failed, keep those tables that are whole in OUTPUT.failed.

    Raises
    ------
    SystemExit
        the job ended well, but wrote nothing, or it cannot be published, as on a full disk
    """
    failed = sibling(job.output, "failed")
    tables = [marker.parent for marker in partial.rglob("_SUCCESS")]
    try:
        for table in tables:
            canonicalize(table)
    except OSError as error:
        remove(partial)
        raise SystemExit(
            f"submit: {job.output} cannot be written: {error}. The earlier one is left as it was. If the disk is full, free "
            "some space, and run again."
        ) from error
    if is_sound:
        if not partial.exists():
            raise SystemExit(
                f"submit: {job.name} ended with status 0 but wrote no {job.output}; the earlier one is left as it was. "
                "The stage must write to its last positional argument."
            )
        remove(Path(job.output))
        partial.rename(job.output)
    elif tables:
        for table in tables:
            (failed / table.relative_to(partial)).parent.mkdir(parents=True, exist_ok=True)
            table.rename(failed / table.relative_to(partial))
        print(f"submit: {job.name} failed; its tables that are whole are in {failed}", file=sys.stderr)
    remove(partial)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sibling(output: str, suffix: str) -> Path:
    """Add a suffix to the name of an output."""
    path = Path(output)
    return path.with_name(f"{path.name}.{suffix}")


def published_name(part: str) -> str:
    """Strip the random part of the name that Spark gives a file: what is left is like part-00000.parquet."""
    return re.sub(r"(part-\d+)[^/]*$", r"\1.parquet", part)


def canonicalize(table: Path) -> None:
    """Write a table's parts again, with bytes and names that follow from their rows alone, and delete what else Spark left.

    parquet-java names its version in a footer, and orders some lists there by identity hashes. So equal tables differ by
    a few bytes (apache/parquet-java 3215). Written again by pyarrow, a table is the same file for every Spark.

    Raises
    ------
    SystemExit
        two parts would get one name, and one of them would be lost
    """
    # Arrow's usual allocator keeps some 40 MiB of each part that is written again; jemalloc returns them. Arrow reads this
    # variable when it is imported. The import is slow, and stages without Spark do not need it.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "jemalloc")
    import pyarrow.parquet as pq

    def write_again(part: Path) -> None:
        with (
            pq.ParquetFile(part, buffer_size=2**16, pre_buffer=False) as rows,
            pq.ParquetWriter(
                table / published_name(part.name),
                rows.schema_arrow.remove_metadata(),
                compression="snappy",
                use_dictionary=False,
                write_page_checksum=True,
            ) as written,
        ):
            for batch in rows.iter_batches(2048, use_threads=False):  # each becomes a row group: memory stays flat
                written.write_batch(batch.replace_schema_metadata())
            if not rows.metadata.num_rows:
                written.write_table(written.schema.empty_table())
        part.unlink()

    parts = list(table.glob("part-*.parquet"))
    names = Counter(published_name(part.name) for part in parts)
    if twice := [name for name, n in names.items() if n > 1]:
        raise SystemExit(
            f"submit: {len(parts):,} files of {table.name} would have {len(names):,} names; {min(twice)} is that of "
            "several. Spark was told to divide a task's rows, as by spark.sql.files.maxRecordsPerFile: unset it."
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write_again, parts))
    for other in [*table.glob("_SUCCESS"), *table.glob(".*")]:
        other.unlink()


def files_of(folder: Path) -> dict[str, Path]:
    """Find the files below the folder: each path by the same path relative to the folder, sorted."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def digest_of_files(files: Mapping[str, Path]) -> str:
    """Hash the names and the contents of files, as files_of returns them: SHA-256, hexadecimal."""
    with ThreadPoolExecutor() as pool:
        return digest_of(f"{name} {content}" for name, content in zip(files, pool.map(sha256, files.values()), strict=True))


def digest_of(lines: Iterable[str]) -> str:
    """Hash lines of text: SHA-256, hexadecimal."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hash a file's bytes: SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
