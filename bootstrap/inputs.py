"""Check that what a stage reads of its inputs is what DVC hashes: all of it, and the same when the stage has ended."""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from bootstrap.job import Job
from bootstrap.parameters import load

MARK = 8  # bytes that stand for a file


def check(places: Iterable[str]) -> None:
    """Refuse a folder of raw data of which DVC leaves out files by .dvcignore.

    A stage would read them. When they change, DVC would not see it, and would call old results up to date. Hidden files are
    no input of any stage. The outputs of stages are not looked at.

    Raises
    ------
    SystemExit
        DVC leaves out some; with one of them, and what to do
    """
    made = {out for stage in load("dvc.yaml").get("stages", {}).values() for out in stage.get("outs", [])}
    for place in places:
        if Path(".dvc").is_dir() and Path(place).is_dir() and place not in made:
            # Slow to import, and most stages have no such input.
            from dvc.fs import localfs
            from dvc.ignore import DvcIgnoreFilter

            root = os.path.abspath(place)
            there = partial(localfs.find, root)
            kept = partial(DvcIgnoreFilter(localfs, os.getcwd()).find, localfs, root)
            # Counted, not kept: the paths of a million files take a GiB.
            n_there, n_kept = (sum(1 for _ in visible(find(), root)) for find in (there, kept))
            if n_there != n_kept and (left_out := sorted({*visible(there(), root)} - {*visible(kept(), root)})):
                raise SystemExit(
                    f"submit: .dvcignore makes DVC leave out {len(left_out):,} of {n_there:,} files of {place}, such as "
                    f"{os.path.relpath(left_out[0], root)}, but the stage would read them. Change .dvcignore, or move the "
                    "files elsewhere; to leave out photographs, use ingest.leave_out in params.yaml."
                )


def visible(paths: Iterable[str], root: str) -> Iterator[str]:
    """Yield those of the paths below root that are not hidden."""
    return (path for path in paths if f"{os.sep}." not in path[len(root) :])


def read_by(job: Job) -> list[str]:
    """List what the job reads: its file, its inputs, and what else DVC hashes for it, such as a module that stages share."""
    entry = load("dvc.yaml").get("stages", {}).get(job.name, {})
    return [*dict.fromkeys([job.stage, *job.inputs, *entry.get("deps", [])])]


def look(places: Iterable[str]) -> dict[str, bytes]:
    """Note what tells DVC that a file has changed: for each folder at these places, the marks of its files, sorted."""
    return {folder: b"".join(sorted(map(mark, paths))) for place in places for folder, paths in folders_of(place)}


def folders_of(place: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder at a place, with the paths in it that are no folders; of a file, itself."""
    if os.path.isfile(place):
        yield place, [place]
    for folder, _, names in os.walk(place):
        yield folder, [os.path.join(folder, name) for name in names]


def mark(path: str) -> bytes:
    """Hash a file's path, size, time of change and inode to MARK bytes; none if it is no regular file."""
    try:
        status = os.stat(path)
    except OSError:  # it is gone, or a link that leads nowhere
        return b""
    if not stat.S_ISREG(status.st_mode):
        return b""
    told = b"%b\0%d %d %d" % (os.fsencode(path), status.st_size, status.st_mtime_ns, status.st_ino)
    return hashlib.blake2b(told, digest_size=MARK).digest()


def check_unchanged(stage: str, places: Sequence[str], before: Mapping[str, bytes]) -> None:
    """Check that the files of these places are as `look` has noted them: DVC hashes them only when the stage has ended.

    Raises
    ------
    SystemExit
        a file came, went or changed meanwhile; with its folder, its name if it is still there, and what to do
    """
    now = look(places)
    changed = sorted(folder for folder in before.keys() | now.keys() if before.get(folder, b"") != now.get(folder, b""))
    if changed:
        marks = before.get(changed[0], b"")
        known = {marks[i : i + MARK] for i in range(0, len(marks), MARK)}
        there = [path for _, paths in islice(folders_of(changed[0]), 1) for path in paths if mark(path) not in {b"", *known}]
        raise SystemExit(
            f"submit: files of {changed[0]} came, went or changed while {stage} was at work"
            + (f", such as {min(there)}" if there else "")
            + ". So its output may be of other files than DVC would note, and is not kept. Run again."
        )
