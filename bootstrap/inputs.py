"""Check that a stage would read the same files of its inputs that DVC hashes."""

import os
from collections.abc import Iterable
from pathlib import Path

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
