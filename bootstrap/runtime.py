"""What each stage took when it last ran, and where: reports/runtime.json, which git keeps and `dvc metrics show` lists.

It describes runs, not results, so it is no output of DVC and enters no lock.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from job import Job

RECORD = Path("reports/runtime.json")


def record(job: Job, took: dict[str, Any]) -> None:
    """Set down what a stage took, and the sums of all.

    Parameters
    ----------
    took
        where: local, emr or emr-serverless; cores; seconds of work; and where that costs money node_hours or vcpu_hours,
        euros, and, of what went before the work, such as the cluster's start, seconds_waited and euros_waited
    """
    name = Path(job.stage).stem
    stages = [stage for stage in recorded() if stage["stage"] != name]
    stages.append({"stage": name, "images": count_images([*job.inputs, job.output]), **rounded(took)})
    # DVC shows no list among metrics: a diff of two runs has the sums, not a dozen lines for each stage.
    text = json.dumps({"run": sums(stages), "stages": sorted(stages, key=lambda stage: stage["stage"])}, indent=2)
    partial = RECORD.with_name(f"{RECORD.name}.partial")
    RECORD.parent.mkdir(exist_ok=True)
    partial.write_text(text + "\n")
    partial.rename(RECORD)


def estimate(job: Job, cores: int) -> float | None:
    """Seconds of work that the stage may take on so many cores, by what it took last; None if it never ran."""
    last = next((stage for stage in recorded() if stage["stage"] == Path(job.stage).stem), None)
    if not last or not last["images"]:
        return None
    return float(last["seconds"] * last["cores"] / cores * count_images(job.inputs) / last["images"])


def recorded() -> list[dict[str, Any]]:
    return list(json.loads(RECORD.read_text())["stages"]) if RECORD.exists() else []


def sums(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all stages: seconds of work and what they cost; apart from it, what waiting took, as for a cluster's start."""
    paid = [stage for stage in stages if "euros" in stage]
    total = {"seconds": sum(stage["seconds"] for stage in stages)}
    for hours in ("node_hours", "vcpu_hours"):
        if any(hours in stage for stage in paid):
            total[hours] = sum(stage.get(hours, 0) for stage in paid)
    if paid:
        total["euros"] = sum(stage["euros"] for stage in paid)
        total["euros_per_1000_images"] = sum(1000 * stage["euros"] / max(stage["images"], 1) for stage in paid)
        total["seconds_waited"] = sum(stage["seconds_waited"] for stage in paid)
        total["euros_waited"] = sum(stage["euros_waited"] for stage in paid)
    return rounded(total)


def rounded(took: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in took.items()}


def count_images(places: Iterable[str]) -> int:
    """How many images these folders are about: rows of their longest table of images, or files if there is none."""
    rows: dict[Path, int] = defaultdict(int)
    n_files = 0
    for path in (path for place in places for path in Path(place).rglob("*") if path.is_file()):
        n_files += 1
        if path.suffix == ".parquet" and "image_id" in (metadata := pq.read_metadata(path)).schema.names:
            rows[path.parent] += metadata.num_rows
    return max(rows.values(), default=n_files)
