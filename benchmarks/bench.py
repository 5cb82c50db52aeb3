"""The pipeline against published scripts, against the bare network, and against other PCAs, on the machine that it runs on.

usage: bench.py IMAGES [--n_rounds 2] [--only whole limit pca]

IMAGES is a folder of JPEGs, a folder for each label. Both sides of a comparison run in turn, n_rounds times; let nothing
else run meanwhile. Writes benchmarks/results.json, a section at a time, and from it the tables of docs/performance.md.

whole  a clone of this repository and `dvc`, as a user has them, on all IMAGES with ResNet50 (random weights), and what the
       user may wish next; benchmarks/field.py on two small parts, which give its seconds for the start and for each image
limit  benchmarks/bare.py, and the stage featurize on the same number of images, start-up apart
pca    covariance and reduce, benchmarks/field.py and scikit-learn in memory, on 22,688 rows of 2,048 random features
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bootstrap")]

from benchmarks.growing import copy_images, distinct_images, machine, submit  # noqa: E402
from submit import memory_mb  # noqa: E402

RESULTS = ROOT / "benchmarks/results.json"
PAGE = ROOT / "docs/performance.md"
PRECISION = "bfloat16"
PARTS = (160, 640)  # images that the field's script is timed on
N_LIMIT = 1000  # images of the bare loop
N_ROWS, N_FEATURES, K = 22_688, 2_048, 50
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    **{f"GIT_{who}_{what}": "bench@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}

Seconds = dict[str, list[float]]


def main() -> None:
    args = parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            measured = SECTIONS[name](args.images, Path(folder), args.n_rounds)
        results[name] = {"machine": machine(), "rounds": args.n_rounds, **measured}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    text = PAGE.read_text()
    for name, section in results.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        _, after = rest.split("<!-- end -->", 1)
        text = f"{before}<!-- {name} -->\n{table(section['seconds'])}<!-- end -->{after}"
    PAGE.write_text(text)


def whole(images: Path, folder: Path, n_rounds: int) -> dict[str, Any]:
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    n_more = len(paths) // 100
    for n in PARTS:
        copy_images(paths[:: len(paths) // n][:n], images, folder / f"part-{n}")
    save_resnet50(folder / "resnet50.weights.h5")
    seconds: Seconds = {}
    passes: dict[str, list[int]] = {}
    for i in range(n_rounds):
        clone = folder / f"clone-{i}"
        run("git", "clone", "-q", ROOT, clone)
        shutil.copy(folder / "resnet50.weights.h5", clone / "data/weights")
        copy_images(paths[n_more:], images, clone / "data/photos")
        chosen = {
            "images": "data/photos",
            "backbone.name": "resnet50",
            "backbone.weights": "resnet50.weights.h5",
            "featurize.precision": PRECISION,
        }
        dvc = [sys.executable, "-m", "dvc"]
        timed(seconds, "dvc add", *dvc, "add", "-q", "data/photos", cwd=clone)
        timed(seconds, "all", *dvc, "exp", "run", *(f"-S{key}={value}" for key, value in chosen.items()), cwd=clone)
        timed(seconds, "another k", *dvc, "exp", "run", "-S", "reduce.k=32", cwd=clone)
        timed(seconds, "nothing changed", *dvc, "repro", cwd=clone)
        copy_images(paths[:n_more], images, clone / "data/photos")
        timed(seconds, "1 % more: dvc add", *dvc, "add", "-q", "data/photos", cwd=clone)
        timed(seconds, "1 % more", *dvc, "repro", cwd=clone)
        shutil.rmtree(clone)
        for name, flags in (("field, nothing cached", []), ("field, features written first", ["--materialise"])):
            for n in PARTS:
                output = folder / "output"
                said = timed(
                    seconds,
                    f"{name}: {n} images",
                    *spark_submit(),
                    "benchmarks/field.py",
                    folder / f"part-{n}",
                    output,
                    *flags,
                )
                passes.setdefault(name, []).append(json.loads(said.splitlines()[-1])["passes"])
                shutil.rmtree(output)
    n_images = len(paths) - n_more
    for name in passes:
        few, many = (statistics.median(seconds[f"{name}: {n} images"]) for n in PARTS)
        each = (many - few) / (PARTS[1] - PARTS[0])
        seconds[f"{name}: {n_images:,} images, by its seconds for the start and for each"] = [
            few + each * (n_images - PARTS[0])
        ]
    return {"images": n_images, "precision": PRECISION, "seconds": seconds, "passes": passes}


def limit(images: Path, folder: Path, n_rounds: int) -> dict[str, Any]:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    flags = {**params["featurize"], "precision": PRECISION}
    chosen = distinct_images(images, N_LIMIT)
    for run_name, n in (("one", 1), ("some", N_LIMIT)):
        copy_images(chosen[:n], images, folder / run_name / "images")
        submit(folder / run_name, "ingest", "images", "ingested", params["ingest"])
    save_resnet50(folder / "weights/resnet50.weights.h5")
    run(
        *(sys.executable, "stages/backbone.py", folder / "weights", folder / "backbone"),
        *("--name", "resnet50", "--weights", "resnet50.weights.h5", "--image_size", "224"),
    )
    seconds: Seconds = {}
    bare: list[dict[str, Any]] = []
    for i in range(n_rounds):
        command = ("benchmarks/bare.py", folder / "some/images", folder / "backbone", "--precision", PRECISION)
        bare.append(json.loads(run(sys.executable, *command).splitlines()[-1]))
        seconds.setdefault("bare loop, start-up apart", []).append(N_LIMIT / bare[-1]["images_per_second"])
        took = {}
        for run_name in ("one", "some"):
            cache = folder / f"cache-{run_name}-{i}"
            places = ("ingested", folder / "backbone", "features")
            _, took[run_name] = submit(folder / run_name, "featurize", *places, flags, cache=cache)
        seconds.setdefault("featurize, start-up apart", []).append(took["some"] - took["one"])
        seconds.setdefault("featurize, one image: its start-up", []).append(took["one"])
    return {"images": N_LIMIT, "precision": PRECISION, "seconds": seconds, "bare": bare}


def pca(images: Path, folder: Path, n_rounds: int) -> dict[str, Any]:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    write_features(folder / "all/features", N_ROWS, N_FEATURES)
    write_features(folder / "few/features", 64, 16)
    seconds: Seconds = {}
    for _ in range(n_rounds):
        for name, k in (("few", 8), ("all", K)):
            reduce = {**params["reduce"], "k": k}
            for stage, places in (
                ("covariance", ("features", "covariance", params["covariance"])),
                ("reduce", ("features", "covariance", "reduced", reduce)),
            ):
                _, took = submit(folder / name, stage, *places)
                what = stage if name == "all" else f"{stage}, start-up"
                seconds.setdefault(what, []).append(took)
        said = timed(
            seconds,
            "pyspark.ml PCA",
            *spark_submit(),
            "benchmarks/field.py",
            "--features",
            folder / "all/features",
            folder / "field",
        )
        parts = json.loads(said.splitlines()[-1])["seconds"]
        seconds.setdefault("pyspark.ml PCA, start-up apart", []).append(parts["fit"] + parts["write"])
        shutil.rmtree(folder / "field")
        said = run(sys.executable, "-c", SCIKIT_LEARN, folder / "all/features")
        seconds.setdefault("scikit-learn, fit_transform in memory", []).append(float(said.splitlines()[-1]))
    return {"rows": N_ROWS, "features": N_FEATURES, "k": K, "seconds": seconds}


SECTIONS: dict[str, Callable[[Path, Path, int], dict[str, Any]]] = {"whole": whole, "limit": limit, "pca": pca}
SCIKIT_LEARN = f"""
import sys, time
import numpy as np, pyarrow.dataset as ds
from sklearn.decomposition import PCA
column = ds.dataset(sys.argv[1], format="parquet").to_table(["features"])["features"]
features = column.combine_chunks().flatten().to_numpy().reshape(len(column), -1).astype(np.float64)
started = time.monotonic()
PCA({K}, svd_solver="covariance_eigh").fit_transform(features)
print(time.monotonic() - started)
"""


def spark_submit() -> list[str]:
    """All cores, and the memory that the pipeline's driver has."""
    return [
        str(Path(sys.executable).with_name("spark-submit")),
        *("--master", "local[*]"),
        *("--driver-memory", f"{memory_mb() // 4}m"),
        *("--conf", "spark.sql.execution.arrow.maxRecordsPerBatch=1024"),
        *("--conf", "spark.ui.enabled=false"),
        *("--conf", "spark.log.level=ERROR"),
    ]


def write_features(folder: Path, n_rows: int, n_features: int) -> None:
    """A table as featurize writes it, of random features whose variance falls."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    scale = (1 / np.arange(1, n_features + 1)).astype(np.float32)
    for part, start in enumerate(range(0, n_rows, 2048)):
        n = min(2048, n_rows - start)
        features = random.standard_normal((n, n_features), np.float32) * scale
        names = [f"{start + i:064x}" for i in range(n)]
        columns = {
            "image_id": names,
            "path": names,
            "label": ["label"] * n,
            "group": names,
            "fold": pa.array(np.arange(n) % 2, pa.int32()),
            "features": pa.array(list(features), pa.list_(pa.float32())),
        }
        pq.write_table(pa.table(columns), folder / f"part-{part:05}.parquet", use_dictionary=False, row_group_size=2048)


def save_resnet50(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    code = (
        "import keras, sys; keras.utils.set_random_seed(0);"
        "keras.applications.ResNet50(weights=None, include_top=False, pooling='avg').save_weights(sys.argv[1])"
    )
    run(sys.executable, "-c", code, path)


def run(*command: Any, cwd: Path = ROOT) -> str:
    """What the command prints.

    Raises
    ------
    SystemExit
        its exit status is not zero
    """
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def timed(seconds: Seconds, name: str, *command: Any, cwd: Path = ROOT) -> str:
    started = time.monotonic()
    said = run(*command, cwd=cwd)
    seconds.setdefault(name, []).append(round(time.monotonic() - started, 2))
    print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    return said


def table(seconds: Seconds) -> str:
    lines = ["| | seconds, median | least | most |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {statistics.median(all_):.1f} | {min(all_):.1f} | {max(all_):.1f} |" for name, all_ in seconds.items()
    ]
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", type=lambda text: Path(text).resolve())
    parser.add_argument("--n_rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
