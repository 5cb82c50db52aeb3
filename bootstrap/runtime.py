"""Write reports/runtime.json: what each stage took, which git keeps and `dvc metrics show` lists.

usage: python -m bootstrap.runtime LOCK OUTPUT

reads   LOCK    dvc.lock, of the run that is ending
writes  OUTPUT  for each stage what it took and where; whether it was computed in this run or taken from the cache; the sums

What a run took describes the run, not its results, so it is no output of DVC and enters no lock. Each stage that runs leaves
a note of what it took (see record). At the end of the run these notes are set down under what dvc.lock says of the stage, so
that a result that comes from DVC's cache later, in this or another experiment, comes with what it took when it was computed.
"""

import json
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from bootstrap.job import Job, digest_of

RECORD = Path("reports/runtime.json")
NOTES = Path(".dvc/tmp/took")  # of this workspace: a note for each stage that has run since the last record
OWN = "runtime"  # the name of this stage


def main(argv: list[str]) -> None:
    lock, output = map(Path, argv)
    archive = Path(os.environ.get("DVC_ROOT", "."), ".dvc/tmp/runtime")  # of all experiments
    archive.mkdir(parents=True, exist_ok=True)
    before = {stage["stage"]: stage for stage in recorded()}
    entries = yaml.safe_load(lock.read_text())["stages"]
    stages = [took(name, entry, archive, before.get(name)) for name, entry in entries.items() if name != OWN]
    # DVC shows no list among metrics: a diff of two runs has the sums, not a dozen lines for each stage.
    text = json.dumps({"run": sums(stages), "stages": stages}, indent=2) + "\n"
    output.parent.mkdir(exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    partial.write_text(text)
    partial.rename(output)
    n_cached = sum(stage["is_cached"] for stage in stages)
    print(f"runtime: {len(stages) - n_cached} stages computed, {n_cached} taken from an earlier run")


def took(name: str, entry: Mapping[str, Any], archive: Path, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Find what a stage took: in its note, in the archive of earlier runs here, or in the last record.

    Parameters
    ----------
    entry : what dvc.lock says of the stage, by which the archive and the record know it
    """
    key = digest_of([json.dumps(entry, sort_keys=True)])[:16]
    note, kept = NOTES / f"{name}.json", archive / f"{name}-{key}.json"
    if note.exists():
        found = json.loads(note.read_text())
        note.unlink()
        words = found.pop("words")
        if shlex.split(entry["cmd"])[-len(words) :] == words:
            kept.write_text(json.dumps(found))
            return {"stage": name, "is_cached": False, "lock": key, **found}
    if kept.exists():
        return {"stage": name, "is_cached": True, "lock": key, **json.loads(kept.read_text())}
    if before and before.get("lock") == key:
        return {**before, "is_cached": True}
    return {"stage": name, "is_cached": True, "lock": key}  # computed by somebody who did not say


def record(job: Job, took: Mapping[str, Any]) -> None:
    """Leave a note of what a stage took, for the record at the end of the run.

    Parameters
    ----------
    took
        where: local, emr or emr-serverless; cores; seconds of work; and where that costs money node_hours or vcpu_hours,
        euros, and, of what went before the work, such as the cluster's start, seconds_waited and euros_waited
    """
    if not NOTES.parent.parent.is_dir():
        return  # a stage by itself, not one of a pipeline
    NOTES.mkdir(parents=True, exist_ok=True)
    note = {"words": job.words, "images": count_images([*job.inputs, job.output])}
    (NOTES / f"{job.name}.json").write_text(json.dumps(note | rounded(took)))


def estimate(job: Job, cores: int) -> float | None:
    """Seconds of work that the stage may take on so many cores, by what it took last; None if it never ran."""
    last = next((stage for stage in recorded() if stage["stage"] == job.name), {})
    if not last.get("images"):
        return None
    return float(last["seconds"] * last["cores"] / cores * count_images(job.inputs) / last["images"])


def recorded() -> list[dict[str, Any]]:
    return list(json.loads(RECORD.read_text())["stages"]) if RECORD.exists() else []


def sums(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up all stages: seconds of work and what they cost; apart from it, what waiting took, as for a cluster's start.

    A stage that was taken from the cache counts with what it took when it was computed: so two runs compare like with like.
    """
    known = [stage for stage in stages if "seconds" in stage]
    paid = [stage for stage in known if "euros" in stage]
    total: dict[str, Any] = {
        "stages": len(known),
        "stages_cached": sum(stage["is_cached"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in known),
    }
    for hours in ("node_hours", "vcpu_hours"):
        if any(hours in stage for stage in paid):
            total[hours] = sum(stage.get(hours, 0) for stage in paid)
    if paid:
        total["euros"] = sum(stage["euros"] for stage in paid)
        total["euros_per_1000_images"] = sum(1000 * stage["euros"] / max(stage["images"], 1) for stage in paid)
        total["seconds_waited"] = sum(stage["seconds_waited"] for stage in paid)
        total["euros_waited"] = sum(stage["euros_waited"] for stage in paid)
    return rounded(total)


def rounded(took: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in took.items()}


def count_images(places: Iterable[str]) -> int:
    """Count the images that these folders are about: rows of their longest table of images, or files if there is none."""
    import pyarrow.parquet as pq  # slow to import, and not needed to begin a stage

    rows: dict[Path, int] = defaultdict(int)
    n_files = 0
    for path in (path for place in places for path in Path(place).rglob("*") if path.is_file()):
        n_files += 1
        if path.suffix == ".parquet" and "image_id" in (metadata := pq.read_metadata(path)).schema.names:
            rows[path.parent] += metadata.num_rows
    return max(rows.values(), default=n_files)


if __name__ == "__main__":
    main(sys.argv[1:])
