"""Measure every stage after featurize on a million images: seconds, processor seconds, and the memory of each process.

usage: python -m benchmarks.scale FOLDER [--images 100000 1000000] [--only split suspects]

FOLDER gets a clone of the last commit for each number of images, with tables as `ingest` and `featurize` write them, and
keeps them; a million images take 6 GB. The images are synthetic: frames of things, which have labels. 1,280 features follow
from 64 directions; as a network's, they are not negative, and multiples of 2^-9. Thumbnails have their real size; contents,
which only a few are read of, do not. One label in a thousand is wrong, and the last hundredth of the images is new: `drift`
compares with a commit of the others. Stages run by the commands of dvc.yaml.

data/backbone must be there (`make run`), of 1,280 features. Writes benchmarks/scale.json, from which
`python -m benchmarks.extrapolate` makes the tables of docs/scale.md. Let nothing else run meanwhile.
"""

import argparse
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from benchmarks.growing import machine
from bootstrap.parameters import flags

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/scale.json"
STAGES = ("neighbours", "split", "suspects", "covariance", "reduce", "baseline", "evaluate", "classify", "export", "drift")
REPORTS = {
    "report": "reports.report --suspects reports/suspects data/ingested data/split data/reduced data/classifier "
    "reports/evaluation reports/report.html",
    "compare": "reports.compare HEAD",
}
DIFFERENT = 1  # the exit status of compare: there are new images
N_FEATURES, N_DIRECTIONS = 1280, 64
STEP = 2.0**-9
N_LABELS, FRAMES = 300, 40
OF_THING, OF_FRAME = 0.7, 0.1  # how far things of a label, and frames of a thing, are from one another; labels: 1
WRONG = 0.001  # share of the labels
NEW = 0.01  # share of the images
ROWS = 2048  # of a file of features, and of a row group
ROWS_OF_INGESTED = 2**15
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    **{f"GIT_{who}_{what}": "bench@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


class Collection(NamedTuple):
    """Hold what tells the features of each image."""

    rows: pa.Table  # image_id, path, label, film; frames of a thing are side by side
    things: np.ndarray  # float32, (n_things, N_DIRECTIONS)
    directions: np.ndarray  # float32, (N_DIRECTIONS, N_FEATURES)


def main() -> None:
    args = parse_args()
    for n in args.images:
        clone = args.folder / f"images-{n}"
        if not clone.exists():
            run(ROOT, "git", "clone", "-q", ROOT, clone)
            write_tables(clone / "data", make_collection(n))
        run(clone, "git", "fetch", "-q", ROOT, "HEAD")
        run(clone, "git", "reset", "-q", "--hard", "FETCH_HEAD")
        shutil.copytree(ROOT / "data/backbone", clone / "data/backbone", dirs_exist_ok=True)
        for name in args.only:
            measured = measure(name, clone)
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results = {"machine": machine()} | (results if results.get("machine") == machine() else {})
            results.setdefault("images", {}).setdefault(str(n), {})[name] = measured
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            print(f"{n:,} images, {name}: {measured}", flush=True)


def measure(name: str, clone: Path) -> dict[str, Any]:
    """Run a stage, or a program of REPORTS, and measure it."""
    new = clone / "data/features/part-new.parquet"
    if name == "drift":
        commit_run(clone, new)
    words = [sys.executable, "-m", *REPORTS[name].split()] if name in REPORTS else command_of(name, clone)
    return run_watched(words, clone, accepted=(0, DIFFERENT) if name == "compare" else (0,))


def command_of(stage: str, clone: Path) -> list[str]:
    """Return the command of a stage in dvc.yaml, with its parameters in params.yaml."""
    pipeline, params = (yaml.safe_load((clone / name).read_text()) for name in ("dvc.yaml", "params.yaml"))
    words = shlex.split(pipeline["stages"][stage]["cmd"])
    return [word for each in words for word in (flags(params[stage]) if each == f"${{{stage}}}" else [each])]


def run_watched(words: list[str], clone: Path, accepted: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run a command; seconds, processor seconds, and MiB of each kind of process at its most.

    Raises
    ------
    SystemExit
        its exit status is none of those accepted
    """
    with watch() as seen:
        started = time.monotonic()
        done = subprocess.run(words, cwd=clone, env=ENVIRONMENT, capture_output=True, text=True)
        seconds = time.monotonic() - started
    if done.returncode not in accepted:
        raise SystemExit(f"scale: {' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return {"seconds": round(seconds, 1), "processor_seconds": round(sum(seen.seconds.values()), 1), "mib": seen.mib}


def commit_run(clone: Path, new: Path) -> None:
    """Commit the run without the images that are new, and put these beside the others."""
    shutil.move(new, clone / "new.parquet")
    run(clone, sys.executable, "-m", "dvc", "config", "--local", "cache.type", "hardlink")
    run(clone, sys.executable, "-m", "dvc", "commit", "-q", "-f", "backbone", "featurize", "reduce")
    run(clone, "git", "commit", "-q", "--allow-empty", "-am", "Earlier images")
    shutil.move(clone / "new.parquet", new)


class Seen(NamedTuple):
    """Hold what was seen of processes while they lived."""

    seconds: dict[int, float]  # of a processor, by the number of the process
    mib: dict[str, int]  # of the largest process of a kind, at its most


@contextmanager
def watch() -> Iterator[Seen]:
    """Watch all processes that this one starts, five times a second."""
    seen = Seen({}, {})
    kinds = {"java": "JVM", "pyspark.daemon": "worker", "bootstrap.submit": "door", "stages": "stage", "reports": "stage"}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    words, times = " ".join(process.cmdline()), process.cpu_times()
                    mib = process.memory_info().rss // 2**20
                except psutil.Error:
                    continue  # it has ended
                seen.seconds[process.pid] = times.user + times.system
                kind = next((kind for sign, kind in kinds.items() if sign in words), "other")
                seen.mib[kind] = max(mib, seen.mib.get(kind, 0))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def make_collection(n: int) -> Collection:
    random = np.random.default_rng(0)
    n_things = math.ceil(n / FRAMES)
    of_thing = np.arange(n_things) % N_LABELS
    things = random.standard_normal((N_LABELS, N_DIRECTIONS), np.float32)[of_thing]
    things += np.float32(OF_THING) * random.standard_normal(things.shape, np.float32)
    directions = random.standard_normal((N_DIRECTIONS, N_FEATURES), np.float32)
    directions *= np.linspace(0.12, 0.02, N_DIRECTIONS, dtype=np.float32)[:, None]
    label = np.where(random.random(n) < WRONG, random.integers(0, N_LABELS, n), np.repeat(of_thing, FRAMES)[:n])
    view = np.repeat(np.arange(n_things) // N_LABELS % 10, FRAMES)[:n]  # names of files tell it of a third of the labels
    rows = {
        "image_id": [hashlib.sha256(b"%d" % i).hexdigest() for i in range(n)],
        "path": [f"label {each:03}/IMG_{i:08}.jpg" for i, each in enumerate(label)],
        "label": [f"label {each:03}" for each in label],
        "film": [f"label {each:03}/r{v}" if each % 3 == 0 else None for each, v in zip(label, view, strict=True)],
    }
    return Collection(pa.table(rows), things, directions)


def write_tables(data: Path, collection: Collection) -> None:
    """Write data/ingested and data/features."""
    n = len(collection.rows)
    n_new = int(NEW * n)
    order = np.random.default_rng(1).permutation(n)
    places = [f"part-{part:05}.parquet" for part in range(math.ceil((n - n_new) / ROWS))] + ["part-new.parquet"]
    parts = [*np.split(order[: n - n_new], range(ROWS, n - n_new, ROWS)), order[n - n_new :]]
    for place, part in zip(places, parts, strict=True):
        rows = collection.rows.take(pa.array(part)).append_column("number", pa.array(part)).sort_by("image_id")
        features = features_of(collection, rows["number"].to_numpy())
        write(rows.drop_columns("number").append_column("features", to_lists(features)), data / "features" / place)
    write_ingested(data / "ingested", collection.rows.take(pa.array(order)))


def features_of(collection: Collection, numbers: np.ndarray) -> np.ndarray:
    """Make the features of some images: float32, (n_images, N_FEATURES), multiples of STEP."""
    frames = np.random.default_rng(int(numbers[0])).standard_normal((len(numbers), N_DIRECTIONS), np.float32)
    places = collection.things[numbers // FRAMES] + np.float32(OF_FRAME) * frames
    return np.maximum(np.round(places @ collection.directions / STEP) * STEP, 0).astype(np.float32)


def write_ingested(folder: Path, rows: pa.Table) -> None:
    random = np.random.default_rng(2)
    stream = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(stream, "JPEG")
    for part, start in enumerate(range(0, len(rows), ROWS_OF_INGESTED)):
        some = rows.slice(start, ROWS_OF_INGESTED).sort_by("image_id")
        pixels = random.integers(0, 255, (len(some), 768), np.uint8)
        columns = {
            **{name: some[name] for name in some.column_names},
            "width": pa.array(np.full(len(some), 16, np.int32)),
            "height": pa.array(np.full(len(some), 16, np.int32)),
            "thumbnail": pa.array([each.tobytes() for each in pixels], pa.binary()),
            "content_id": some["image_id"],
            "content": pa.array([stream.getvalue()] * len(some), pa.binary()),
        }
        write(pa.table(columns), folder / "images" / f"part-{part:05}.parquet")
    for name, names in (
        ("quarantine", ("path", "label", "length", "reason", "detail")),
        ("ignored", ("path", "length", "reason", "kind")),
    ):
        types = [(each, pa.int64() if each == "length" else pa.string()) for each in names]
        write(pa.schema(types).empty_table(), folder / name / "part-00000.parquet")


def to_lists(matrix: np.ndarray) -> pa.ListArray:
    """Make a list of the numbers of each row."""
    offsets = pa.array(np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(matrix.ravel()))


def write(table: pa.Table, place: Path) -> None:
    """Write a part as the door does."""
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, place, compression="snappy", use_dictionary=False, row_group_size=ROWS, write_page_checksum=True)


def run(place: Path, *command: Any) -> None:
    subprocess.run(list(map(str, command)), cwd=place, env=ENVIRONMENT, check=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    names = [*STAGES, *REPORTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    return parser.parse_args()


if __name__ == "__main__":
    main()
