"""How neighbours and split grow: seconds, and the memory of each process, of 10,000 to a million images.

usage: python -m benchmarks.split

Images are synthetic: frames of films, FRAMES of each and N_LABELS labels, in 1,280 features, written as featurize would.
Both stages run on up to 100,000 as DVC runs them. Of a million, one block of rows is searched, from which the time of all
follows. Split runs on sketches and a table of neighbours that are made: of films, and of images that are like no other.

Writes benchmarks/split.json and prints a table. Let nothing else run meanwhile.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from threadpoolctl import threadpool_limits

from benchmarks.bench import watch_memory
from benchmarks.growing import machine, submit
from bootstrap.parameters import flags
from stages import neighbours

ROOT = Path(__file__).resolve().parent.parent
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
SIZES = (10_000, 100_000)
MILLION = 1_000_000
N_FEATURES = 1280
N_LABELS, FRAMES = 60, 36
STEP = 0.2  # between frames, about; things are 1.4 apart
ROWS = 2048  # of a file


def main() -> None:
    measured: dict[str, Any] = {}
    for n in SIZES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_features(folder / "features", n)
            with watch_memory() as most:
                _, seconds = submit(folder, "neighbours", "features", "neighbours", PARAMS["neighbours"])
            report(measured, f"neighbours, {n:,} images", seconds, most)
            report(measured, f"split, {n:,} images", *split(folder))
    sketches = make_rows(MILLION, 64, FRAMES)
    started = time.monotonic()
    with threadpool_limits(1):
        neighbours.nearest(sketches, 0, neighbours.ROWS, PARAMS["neighbours"]["n_neighbours"])
    block = time.monotonic() - started
    report(measured, f"neighbours, one block against {MILLION:,} images", block, {})
    everything = block * MILLION / neighbours.ROWS / (os.cpu_count() or 1)
    report(measured, f"neighbours, {MILLION:,} images, from one block", everything, {})
    for name, frames in (("films", FRAMES), ("no two alike", 1)):
        with tempfile.TemporaryDirectory() as place:
            write_neighbours(Path(place) / "neighbours", sketches if frames > 1 else make_rows(MILLION, 64, 1), frames)
            report(measured, f"split, {MILLION:,} images, {name}", *split(Path(place)))
    results = {"machine": machine(), "measured": measured, "exponents": exponents(measured)}
    (ROOT / "benchmarks/split.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"exponents from each size to the next, start included: {results['exponents']}")


def report(measured: dict[str, Any], name: str, seconds: float, mib: dict[str, int]) -> None:
    measured[name] = {"seconds": round(seconds, 1), "mib": mib}
    print(f"{name:<70}{seconds:>9.1f} s   {', '.join(f'{kind} {most:,} MiB' for kind, most in mib.items())}", flush=True)


def exponents(measured: dict[str, Any]) -> dict[str, list[float]]:
    """Compute the slope of the seconds from each size to the next, both as logarithms."""
    last = {"neighbours": f"neighbours, {MILLION:,} images, from one block", "split": f"split, {MILLION:,} images, films"}
    found = {}
    for stage, name in last.items():
        seconds = [measured[each]["seconds"] for each in (*(f"{stage}, {n:,} images" for n in SIZES), name)]
        found[stage] = np.round(np.diff(np.log(seconds)) / np.diff(np.log([*SIZES, MILLION])), 2).tolist()
    return found


def split(folder: Path) -> tuple[float, dict[str, int]]:
    """Run the stage; seconds, and MiB of its process at its most."""
    places = [str(folder / name) for name in ("neighbours", "split")]
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "stages.split", *places, *flags(PARAMS["split"])], cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"split.py: the stage ended with {status}")
    return time.monotonic() - started, {"process": used.ru_maxrss // 1024}


def make_rows(n: int, n_columns: int, frames: int) -> np.ndarray:
    """Rows of unit length, float32: things of so many frames each, side by side."""
    random = np.random.default_rng(0)
    rows = np.repeat(random.standard_normal((math.ceil(n / frames), n_columns), np.float32), frames, axis=0)[:n]
    rows += random.standard_normal((n, n_columns), np.float32) * np.float32(STEP / 2**0.5)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def describe(n: int, frames: int) -> dict[str, Any]:
    """image_id, path, label and film of n images, whose names tell nothing."""
    ids = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(n)]
    labels = [f"label {i // frames % N_LABELS}" for i in range(n)]
    paths = [f"{label}/IMG_{i:07}.jpg" for i, label in enumerate(labels)]
    return {"image_id": ids, "path": paths, "label": labels, "film": pa.nulls(n, pa.string())}


def write_features(folder: Path, n: int) -> None:
    folder.mkdir()
    table = pa.table(describe(n, FRAMES))
    rows = make_rows(n, N_FEATURES, FRAMES)
    for number, start in enumerate(range(0, n, ROWS)):
        some = rows[start : start + ROWS]
        lists = pa.ListArray.from_arrays(np.arange(len(some) + 1, dtype=np.int32) * N_FEATURES, some.ravel())
        part = table.slice(start, len(some)).append_column("features", lists)
        pq.write_table(part, folder / f"part-{number:05}.parquet", use_dictionary=False)


def write_neighbours(folder: Path, sketches: np.ndarray, frames: int) -> None:
    """Write what the stage neighbours would, but for neighbours that are the next rows: frames of the same film."""
    n, k = len(sketches), PARAMS["neighbours"]["n_neighbours"]
    table = pa.table(describe(n, frames))
    place = np.arange(n)
    length = np.minimum(frames, n - place // frames * frames) if frames > 1 else n  # of the film that a row is in
    first = place // frames * frames if frames > 1 else 0
    found = np.stack([first + (place - first + step) % length for step in range(1, k + 1)], axis=1)
    distances = np.stack([np.linalg.norm(sketches - sketches[found[:, step]], axis=1) for step in range(k)], axis=1)
    order = np.argsort(distances, axis=1)
    found, distances = np.take_along_axis(found, order, 1), np.take_along_axis(distances, order, 1)
    ends = pa.array(np.arange(n + 1, dtype=np.int32) * k)
    names = table["image_id"].combine_chunks().take(pa.array(found.ravel()))
    lists = [pa.ListArray.from_arrays(ends, names), pa.ListArray.from_arrays(ends, pa.array(distances.ravel()))]
    rows = table.append_column("sketch", pa.array([row.tobytes() for row in sketches], pa.binary()))
    for name, each in (
        ("sketches", rows),
        ("neighbours", pa.table([table["image_id"], *lists], ["image_id", "neighbours", "distances"])),
    ):
        (folder / name).mkdir(parents=True)
        pq.write_table(each, folder / name / "part-00000.parquet")


if __name__ == "__main__":
    main()
