"""Write reports/runtime.json, which git keeps and `dvc metrics show` lists: what each stage took.

usage: python -m bootstrap.runtime LOCK EVALUATION CLASSIFIER PAGE OUTPUT

reads   LOCK        dvc.lock of the run that ends
        EVALUATION, CLASSIFIER  of which it prints the figures; in EVALUATION/summary.txt are more
        PAGE        reports/report.html, if it is there: it may be the page of another run
writes  OUTPUT  for each stage what it took and where; whether it was computed in this run or taken from the cache; the sums

What a run took describes the run, not its results: so it is no output of DVC and never enters dvc.lock. Each stage that runs
leaves a note of what it took (see record). At the end of the run, each note is kept in an archive, by what dvc.lock says of
the stage. When an experiment later takes the result from DVC's cache, the archive tells what it took to compute.
"""

import json
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from bootstrap.job import Job, digest_of

RECORD = Path("reports/runtime.json")
NOTES = Path(".dvc/tmp/took")  # this workspace's: a note for each stage that has run since the last record
OWN = "runtime"  # this stage's name


def main(argv: list[str]) -> None:
    lock, evaluation, classifier, page, output = map(Path, argv)
    archive = Path(os.environ.get("DVC_ROOT", "."), ".dvc/tmp/runtime")  # of all experiments
    before = read_record()
    entries = read_lock(lock.read_text())
    check_parameters(entries)
    partial = output.with_name(f"{output.name}.partial")
    try:
        archive.mkdir(parents=True, exist_ok=True)
        stages = [find_note(name, entry, archive, before.get(name)) for name, entry in entries.items()]
        # DVC shows no list among metrics: a diff of two runs has the sums, not a dozen lines for each stage.
        text = json.dumps({"run": add_up(stages), "stages": stages}, indent=2) + "\n"
        output.parent.mkdir(exist_ok=True)
        partial.write_text(text)
        partial.rename(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SystemExit(
            f"runtime: {output} cannot be written: {error}. If the disk is full, free some space, and run again."
        ) from error
    n_cached = sum(stage["is_cached"] for stage in stages)
    print(f"runtime: {len(stages) - n_cached} stages computed, {n_cached} taken from an earlier run")
    print(f"runtime: {figures(evaluation, classifier)}; more in {evaluation}/summary.txt")
    if not page.exists() or identify(entries) not in page.read_text():
        print(f"runtime: `make report` writes {page}" + page.exists() * ", which is of another run now")


def read_lock(text: str) -> dict[str, Any]:
    """Return what a dvc.lock says of each stage, without this one's, which is set down after its end."""
    stages = (yaml.safe_load(text) or {}).get("stages", {})
    return {name: entry for name, entry in stages.items() if name != OWN}


def identify(entries: Mapping[str, Any]) -> str:
    """Name a run by all that determines it: 12 hexadecimal digits. Two runs that are the same have the same name."""
    return digest_of([json.dumps(entries, sort_keys=True)])[:12]


def parameters_of(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a run, as params.yaml has them: the section of each stage."""
    return {name: entry["params"]["params.yaml"].get(name) for name, entry in entries.items() if "params" in entry}


def check_parameters(entries: Mapping[str, Any]) -> None:
    """Check that the run has the parameters of params.yaml; another `dvc exp run` in this folder changes them meanwhile.

    Raises
    ------
    SystemExit
        it has others; with the names of the sections
    """
    now = yaml.safe_load(Path("params.yaml").read_text())
    changed = [name for name, section in parameters_of(entries).items() if section != now.get(name)]
    if changed:
        raise SystemExit(
            f"runtime: params.yaml was changed while this run was at work: {', '.join(changed)}. Perhaps somebody has "
            "started another `dvc exp run` in this folder; beside a run, use `dvc exp run --queue`. Write the parameters "
            "that you want, and run again."
        )


def figures(evaluation: Path, classifier: Path) -> str:
    """Say in a line how good the run is."""
    found = json.loads((evaluation / "metrics.json").read_text())
    words = [f"{found['images']['images']:,} images, k = {found['variance']['components']}"]
    if nearest := found.get("nearest_neighbour"):
        words += [f"nearest neighbour {nearest['embedding']:.1%} (all features {nearest['features']:.1%})"]
    recognition = json.loads((classifier / "metrics.json").read_text())["recognition"]
    if "accuracy" in recognition:  # it has none where nothing can be tested
        words += [f"recognised {recognition['accuracy']:.1%}"]
    return ", ".join(words)


def find_note(name: str, entry: Mapping[str, Any], archive: Path, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Find what a stage took: in its note, in the archive of earlier runs here, or in the last record.

    Parameters
    ----------
    entry : what dvc.lock says of the stage, by whose digest the archive and the record know it
    """
    key = digest_of([json.dumps(entry, sort_keys=True)])[:16]
    note, kept = NOTES / f"{name}.json", archive / f"{name}-{key}.json"
    if found := read_note(note):
        words = found.pop("words", None)
        if words and shlex.split(entry["cmd"])[-len(words) :] == words:
            kept.write_text(json.dumps(found))
            note.unlink()
            return {"stage": name, "is_cached": False, "lock": key, **found}
    note.unlink(missing_ok=True)
    if found := read_note(kept):
        return {"stage": name, "is_cached": True, "lock": key, **found}
    if before and before.get("lock") == key:
        return {**before, "is_cached": True}
    return {"stage": name, "is_cached": True, "lock": key}  # computed elsewhere, and not recorded


def read_note(path: Path) -> dict[str, Any]:
    """Read a note; empty if it is not there, or damaged, as by a crash: it describes a run only."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def record(job: Job, took: Mapping[str, Any]) -> None:
    """Leave a note of what a stage took, for the record at the end of the run; none where it cannot be written.

    Parameters
    ----------
    took
        where (local, emr or emr-serverless), cores, and seconds of work. What costs money also has node_hours or
        vcpu_hours, and euros; of the time before the work, such as a cluster's start, seconds_waited and euros_waited
    """
    if not NOTES.parent.parent.is_dir():
        return  # a single stage, not one of a pipeline
    note = {"words": job.words, "images": count_images([*job.inputs, job.output])}
    with suppress(OSError):  # as on a full disk; the stage's output is published already
        NOTES.mkdir(parents=True, exist_ok=True)
        (NOTES / f"{job.name}.json").write_text(json.dumps(note | round_floats(took)))


def estimate(job: Job, cores: int) -> float | None:
    """Estimate the seconds of work of the stage on so many cores, from what it took last; None if it never ran."""
    last = read_record().get(job.name, {})
    if not last.get("images") or "seconds" not in last:
        return None
    return float(last["seconds"] * last["cores"] / cores * count_images(job.inputs) / last["images"])


def read_record() -> dict[str, dict[str, Any]]:
    """Read what each stage of the last record took; nothing if it is not there, or damaged: it describes a run only."""
    try:
        return {stage["stage"]: dict(stage) for stage in json.loads(RECORD.read_text())["stages"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def add_up(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the seconds of work and the cost of all stages and, apart, what waiting took, as for a cluster's start.

    A stage that was taken from the cache counts with what it took when it was computed: so two runs can be compared.
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
    return round_floats(total)


def round_floats(took: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in took.items()}


def count_images(places: Iterable[str]) -> int:
    """Count the images of these folders: the rows of their longest table with an image_id, or the files if there is none."""
    import pyarrow as pa  # slow to import, and not needed to start a stage
    import pyarrow.parquet as pq

    rows: dict[Path, int] = defaultdict(int)
    n_files = 0
    walked = (os.path.join(folder, name) for place in places for folder, _, names in os.walk(place) for name in names)
    for path in map(Path, filter(os.path.isfile, walked)):  # rglob would keep a million paths
        n_files += 1
        if path.suffix == ".parquet":
            with suppress(pa.ArrowException, OSError):  # it may be no table of ours, among photographs
                metadata = pq.read_metadata(path)
                rows[path.parent] += metadata.num_rows * ("image_id" in metadata.schema.names)
    return max(rows.values(), default=0) or n_files


if __name__ == "__main__":
    main(sys.argv[1:])
