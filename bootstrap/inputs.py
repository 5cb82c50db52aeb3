"""Check that what a stage reads of its inputs is what DVC hashes: all of it, and the same when the stage has ended."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from bootstrap.job import Job
from bootstrap.parameters import load


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
            there = {path for path in localfs.find(root) if f"{os.sep}." not in path[len(root) :]}
            left_out = sorted(there - {*DvcIgnoreFilter(localfs, os.getcwd()).find(localfs, root)})
            if left_out:
                raise SystemExit(
                    f"submit: .dvcignore makes DVC leave out {len(left_out):,} of {len(there):,} files of {place}, such as "
                    f"{os.path.relpath(left_out[0], root)}, but the stage would read them. Change .dvcignore, or move the "
                    "files elsewhere; to leave out photographs, use ingest.leave_out in params.yaml."
                )


def read_by(job: Job) -> list[str]:
    """List what the job reads: its file, its inputs, and what else DVC hashes for it, such as a module that stages share."""
    entry = load("dvc.yaml").get("stages", {}).get(job.name, {})
    return [*dict.fromkeys([job.stage, *job.inputs, *entry.get("deps", [])])]


def look(places: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """Note what tells DVC that a file has changed: of each file of these places the size, bytes; when changed, ns; inode."""
    seen = {}
    for place in places:
        below = (os.path.join(folder, name) for folder, _, names in os.walk(place) for name in names)
        for path in (place, *below):
            if os.path.isfile(path):
                status = os.stat(path)
                seen[path] = status.st_size, status.st_mtime_ns, status.st_ino
    return seen


def check_unchanged(stage: str, places: Iterable[str], before: Mapping[str, tuple[int, int, int]]) -> None:
    """Check that the files of these places are as `look` has noted them: DVC hashes them only when the stage has ended.

    Raises
    ------
    SystemExit
        a file came, went or changed meanwhile; with one of them, and what to do
    """
    now = look(places)
    changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
    if changed:
        raise SystemExit(
            f"submit: {len(changed):,} of the files that {stage} reads came, went or changed while it was at work, such as "
            f"{changed[0]}. So its output may be of other files than DVC would note, and is not kept. Run again."
        )
