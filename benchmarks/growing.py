"""Measure what a few new images cost: featurize and covariance on all images anew, against the new images only.

usage: growing.py IMAGES [--backbone data/backbone] [--precision float32] [--n_images 10000] [--n_added 100] [--n_runs 2]

IMAGES is a folder of photographs, a folder for each label, of at least n_images + n_added that differ. The backbone is the
output of the stage of that name; run `make run` first. Runs the stages as DVC does, with the parameters of params.yaml, in
turn on:

start-up   one image and an empty cache: what Spark and TensorFlow take before they work
full       n_images and an empty cache
added      n_images + n_added and the cache that `full` left

Writes to benchmarks/growing.json, under the backbone's name: seconds (median, least and most), passes of the backbone, and
the ratio of medians that counts, (added - start-up) / (full - start-up); and the seconds of covariance.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from bootstrap.parameters import flags

ROOT = Path(__file__).resolve().parent.parent

RUNS = ("start-up", "full", "added")
N_SHORT = 3  # runs of start-up and added for each of full


def main() -> None:
    args = parse_args()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["featurize"]["precision"] = args.precision
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = distinct_images(args.images, args.n_images + args.n_added)
        for run, n in zip(RUNS, (1, args.n_images, args.n_images + args.n_added), strict=True):
            copy_images(images[:n], args.images, folder / run / "images")
            submit(folder / run, "ingest", "images", "ingested", params["ingest"])
        runs: dict[str, list[dict[str, float]]] = {run: [] for run in RUNS}
        for i in range(args.n_runs):
            full, one = folder / f"full-{i}", folder / "one"
            measure("full", folder, args.backbone, full, params, runs)
            for _ in range(N_SHORT):  # several times: here one second matters
                copy = shutil.copytree(full, folder / "copy")
                measure("added", folder, args.backbone, copy, params, runs)
                measure("start-up", folder, args.backbone, one, params, runs)
                shutil.rmtree(copy)
                shutil.rmtree(one)
        seconds = {run: statistics.median(each["seconds"] for each in runs[run]) for run in RUNS}
        results = {
            "machine": machine(),
            "precision": args.precision,
            "featurize": {run: {"passes": runs[run][0]["passes"], **summarize(runs[run], "seconds")} for run in RUNS},
            "ratio": round((seconds["added"] - seconds["start-up"]) / (seconds["full"] - seconds["start-up"]), 4),
            "covariance": {run: summarize(runs[run], "covariance") for run in RUNS},
        }
    file = ROOT / "benchmarks/growing.json"
    name = json.loads((args.backbone / "backbone.json").read_text())["name"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: results}, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def measure(
    run: str, folder: Path, backbone: Path, cache: Path, params: dict[str, Any], runs: dict[str, list[dict[str, float]]]
) -> None:
    """Run featurize and covariance, and add what they took to runs."""
    places = ("ingested", backbone, "features")
    said, seconds = submit(folder / run, "featurize", *places, params["featurize"], FEATURE_CACHE=str(cache))
    submit(folder / run, "neighbours", "features", "neighbours", params["neighbours"])
    submit(folder / run, "split", "neighbours", "split", params["split"])
    _, covariance = submit(folder / run, "covariance", "features", "split", backbone, "covariance", {})
    passes = re.findall(r"([\d,]+) passes of", said)[-1]
    runs[run].append({"seconds": seconds, "passes": int(passes.replace(",", "")), "covariance": covariance})
    print(f"{run:<10}{seconds:6.1f} s  {passes:>7} passes;  covariance {covariance:5.1f} s", flush=True)


def submit(folder: Path, stage: str, *places_and_flags: Any, **environment: str) -> tuple[str, float]:
    """Run a stage through the door, and return what it printed and its seconds from start to end."""
    *places, section = places_and_flags
    on_spark = ["spark-submit", ROOT / f"stages/{stage}.py"]
    program = ["python", f"stages/{stage}.py"] if stage == "split" else on_spark  # found by PYTHONPATH
    command = [sys.executable, "-m", "bootstrap.submit", *program, *places, *flags(section)]
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr)
    return done.stdout, time.monotonic() - started


def distinct_images(folder: Path, n: int) -> list[Path]:
    """Return the first n images that differ, sorted by SHA-256: so those of any prefix are spread over all labels.

    Raises
    ------
    SystemExit
        the folder has fewer
    """
    by_hash = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in folder.rglob("*.*") if path.is_file()}
    images = [path for _, path in sorted(by_hash.items()) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if len(images) < n:
        raise SystemExit(
            f"growing: {folder} has {len(images):,} images that differ, and {n:,} are needed: give a larger folder"
        )
    return images[:n]


def copy_images(images: list[Path], source: Path, target: Path) -> None:
    for image in images:
        place = target / image.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, place)


def summarize(runs: list[dict[str, float]], key: str) -> dict[str, float]:
    values = [run[key] for run in runs]
    return {"median": round(statistics.median(values), 1), "least": round(min(values), 1), "most": round(max(values), 1)}


def machine() -> dict[str, Any]:
    """Return the processor, its cores, and those of its instructions on which a network's speed depends."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    flags = set(text.split())
    return {
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if flag in flags],
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=lambda text: Path(text).resolve())
    parser.add_argument("--backbone", type=lambda text: Path(text).resolve(), default=ROOT / "data/backbone")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--n_images", type=int, default=10_000)
    parser.add_argument("--n_added", type=int, default=100)
    parser.add_argument("--n_runs", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
