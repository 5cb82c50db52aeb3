"""What running a stage has in common wherever it runs: its command line, and how its output is published."""

import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PART = re.compile(r"(?:^|/)part-\d+[^/]*\.parquet$")  # as Spark names it


class Job(NamedTuple):
    """One stage's command line: places, then parameters."""

    stage: str
    inputs: list[str]
    output: str
    flags: list[str]


@contextmanager
def place_for(job: Job) -> Iterator[tuple[Path, int]]:
    """The folder beside the job's output that it writes to, not there yet, and the lock that keeps others away from it."""
    partial = beside(job.output, "partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with alone(partial.parent) as lock:
        for leftover in (partial, beside(job.output, "failed")):
            shutil.rmtree(leftover, ignore_errors=True)
        yield partial, lock


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Wait until nobody else is at work in the folder, and keep others waiting.

    Yields the lock's file descriptor. Who inherits it holds the lock too: when this process is killed, the Spark that it
    started goes on, and must not be joined by another that writes the same files.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"submit: another run is still at work in {folder}; waiting for it to end", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system that cannot lock a folder, such as NFS
        yield lock
    finally:
        os.close(lock)


def publish(job: Job, partial: Path, is_sound: bool) -> None:
    """Give what a stage wrote its name, if it ended well; keep the tables that were whole apart, if not."""
    failed = beside(job.output, "failed")
    tables = [marker.parent for marker in partial.rglob("_SUCCESS")]
    for table in tables:
        tidy(table)
    if is_sound:
        shutil.rmtree(job.output, ignore_errors=True)
        partial.rename(job.output)
    elif tables:
        for table in tables:
            (failed / table.relative_to(partial)).parent.mkdir(parents=True, exist_ok=True)
            table.rename(failed / table.relative_to(partial))
        print(f"submit: the tables that were whole when it failed are in {failed}", file=sys.stderr)
    shutil.rmtree(partial, ignore_errors=True)


def beside(output: str, suffix: str) -> Path:
    path = Path(output)
    return path.with_name(f"{path.name}.{suffix}")


def published(part: str) -> str:
    """The name of a part without Spark's random one, such as part-00000.parquet."""
    return re.sub(r"(part-\d+)[^/]*$", r"\1.parquet", part)


def tidy(table: Path) -> None:
    """Leave nothing in a table's folder but its parts, with bytes and names that follow from their rows alone.

    parquet-java writes some lists of a footer in the order of identity hashes, so that equal tables differ by a few bytes
    (apache/parquet-java 3215), and names its version. Written again by pyarrow, a table is the same file whatever Spark
    it came from.
    """
    import pyarrow.parquet as pq  # not needed, and perhaps not there yet, for --check

    def write_again(part: Path) -> None:
        rows = pq.read_table(part, use_threads=False).replace_schema_metadata()
        pq.write_table(rows, table / published(part.name), compression="snappy", use_dictionary=False, row_group_size=2048)
        part.unlink()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write_again, table.glob("part-*.parquet")))
    for other in [*table.glob("_*"), *table.glob(".*")]:
        other.unlink()
