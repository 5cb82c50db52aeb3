"""Measure the pipeline against published scripts, the bare network and other PCAs, and as images, rows and executors grow.

usage: python -m benchmarks.bench IMAGES [--n_rounds N] [--only whole limit pca growth executors]

IMAGES is a folder of JPEGs, a folder for each label. Both sides of a comparison run in turn, as many rounds as the section
has (ROUNDS). Let nothing else run meanwhile. Writes benchmarks/results.json, a section at a time, and from it the tables of
docs/performance.md.

whole      a clone of this repository and `dvc`, as a user has them, on all IMAGES with ResNet50 (random weights), then what
           a user runs next; benchmarks/bare.py on the same images; benchmarks/field.py on two parts, whose times differ by a
           minute or more and give its seconds for the start and for each image
limit      benchmarks/bare.py, and the stage featurize on the same number of images, start-up apart
pca        covariance and reduce, benchmarks/field.py and scikit-learn in memory, on 22,688 rows of 2,048 random features
growth     the whole by `dvc` from 1,000 to 20,000 images, ingest of up to 100,000 files, covariance and reduce of up to
           1,000,000 rows of 256 features: seconds, and the memory of the stage, the JVM and the workers
executors  featurize with one executor of one core, and with two; benchmarks/bare.py likewise
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageOps

from benchmarks.growing import copy_images, distinct_images, machine, submit
from benchmarks.scale import ENVIRONMENT, watch
from bootstrap.local import memory_mb

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results.json"
PAGE = ROOT / "docs/performance.md"
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PRECISION = "bfloat16"
PARTS = (200, 2_000)  # images that benchmarks/field.py is timed on: a minute or more apart
N_LIMIT = 9_600  # images of the bare loop; a shorter one says less of a whole run
N_DISTINCT = 2_000  # images that many files are made of
N_EXECUTORS = 8_000  # of the section executors: their JVMs, which start cold, share the cores with the network
GFLOP = 7.74  # of ResNet50 for an image of 224 x 224 pixels: two for each of its 3.87 billion products
N_ROWS, N_FEATURES, K = 22_688, 2_048, 50
GROWTH = {"photographs": (1_000, 20_000), "files": (10_000, 100_000), "rows": (10_000, 100_000, 1_000_000)}
N_FEATURES_OF_ROWS = 256  # a million rows of 1,280 are 5 GB
STEP = 2.0**-12  # of these features: the largest are some 5
ROUNDS = {"whole": 2, "limit": 2, "pca": 1, "growth": 1, "executors": 2}
FIELD = {"field, nothing cached": [], "field, features written first": ["--materialise"]}
DVC = (sys.executable, "-m", "dvc")

Seconds = dict[str, list[float]]


def main() -> None:
    args = parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    run(sys.executable, "-m", "bootstrap.local")  # as `make` does when it installs: else the first run makes the archive
    for name in args.only:
        n_rounds = args.n_rounds or ROUNDS[name]
        with tempfile.TemporaryDirectory() as folder:
            measured = SECTIONS[name](args.images, Path(folder), n_rounds)
        results[name] = {"machine": machine(), "rounds": n_rounds, **measured}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    # The page must not mix figures of two processors.
    results = {name: section for name, section in results.items() if section["machine"] == machine()}
    texts = {name: format_tables(section) for name, section in results.items()} | {"goals": format_goals(results)}
    page = PAGE.read_text()
    for name, text in texts.items():
        before, rest = page.split(f"<!-- {name} -->\n")
        _, after = rest.split("<!-- end -->", 1)
        page = f"{before}<!-- {name} -->\n{text}<!-- end -->{after}"
    PAGE.write_text(page)


def whole(images: Path, folder: Path, n_rounds: int) -> dict[str, Any]:
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    n_more = len(paths) // 100
    n_images = len(paths) - n_more
    for n in PARTS:
        copy_images(paths[:: len(paths) // n][:n], images, folder / f"part-{n}")
    save_resnet50(folder / "resnet50.weights.h5")
    chosen = {
        "images": "data/photos",
        "backbone.name": "resnet50",
        "backbone.weights": "resnet50.weights.h5",
        "featurize.precision": PRECISION,
    }
    seconds: Seconds = {}
    passes: dict[str, dict[int, int]] = {name: {} for name in FIELD}
    for i in range(n_rounds):
        clone = make_clone(folder / f"clone-{i}")
        shutil.copy(folder / "resnet50.weights.h5", clone / "data/weights")
        run(*DVC, "add", "-q", "data/weights/resnet50.weights.h5", cwd=clone)
        copy_images(paths[n_more:], images, clone / "data/photos")
        timed(seconds, "dvc add", *DVC, "add", "-q", "data/photos", cwd=clone)
        timed(seconds, "all", *DVC, "exp", "run", *(f"-S{key}={value}" for key, value in chosen.items()), cwd=clone)
        rate = bare_loop(clone / "data/photos", clone / "data/backbone", n_images)["images_per_second"]
        seconds.setdefault("bare loop on as many, start-up apart", []).append(n_images / rate)
        timed(seconds, "another k, its figures", *DVC, "exp", "run", "-S", "reduce.k=16", "evaluate", cwd=clone)
        timed(seconds, "another k", *DVC, "exp", "run", "-S", "reduce.k=32", cwd=clone)
        timed(seconds, "nothing changed", *DVC, "repro", cwd=clone)
        copy_images(paths[:n_more], images, clone / "data/photos")
        timed(seconds, "1 % more: dvc add", *DVC, "add", "-q", "data/photos", cwd=clone)
        timed(seconds, "1 % more", *DVC, "repro", cwd=clone)
        shutil.rmtree(clone)
        # The script takes far longer: it runs in all rounds but the last, so between two rounds of the pipeline.
        for name, flags in FIELD.items() if i < max(1, n_rounds - 1) else ():
            for n in PARTS:
                command = (*spark_submit(), "benchmarks/field.py", folder / f"part-{n}", folder / "output", *flags)
                said = timed(seconds, f"{name}: {n} images", *command)
                passes[name][n] = json.loads(said.splitlines()[-1])["passes"]
                shutil.rmtree(folder / "output")
    for name in FIELD:
        few, many = (statistics.median(seconds[f"{name}: {n} images"]) for n in PARTS)
        each = (many - few) / (PARTS[1] - PARTS[0])
        seconds[f"{name}: {n_images:,} images, by its seconds for the start and for each"] = [
            few + each * (n_images - PARTS[0])
        ]
    uncached, cached = [*seconds][-2:]
    ratios = {
        "bare": round(ratio(seconds, "all", "bare loop on as many, start-up apart"), 2),
        "uncached": round(ratio(seconds, uncached, "all"), 1),
        "cached": round(ratio(seconds, cached, "all"), 1),
        "more": round(ratio(seconds, "1 % more", "all"), 2),
        **{
            name: round(statistics.median(seconds[name]), 1)
            for name in ("another k, its figures", "another k", "nothing changed")
        },
    }
    return {"images": n_images, "precision": PRECISION, "seconds": seconds, "passes": passes, "ratios": ratios}


def limit(images: Path, folder: Path, n_rounds: int) -> dict[str, Any]:
    featurize = prepare_featurize(images, folder, N_LIMIT)
    seconds: Seconds = {}
    bare: list[dict[str, Any]] = []
    for _ in range(n_rounds):
        bare.append(bare_loop(folder / "some/images", folder / "backbone", N_LIMIT))
        seconds.setdefault("bare loop, start-up apart", []).append(N_LIMIT / bare[-1]["images_per_second"])
        one, some = featurize("one"), featurize("some")
        seconds.setdefault("featurize, start-up apart", []).append(some - one)
        seconds.setdefault("featurize, one image: its start-up", []).append(one)
    reached, products = (
        statistics.median(values)
        for values in zip(
            *((each["images_per_second"], each["gflops_of_a_product"][PRECISION]) for each in bare), strict=True
        )
    )
    ratios = {
        "featurize": round(ratio(seconds, "bare loop, start-up apart", "featurize, start-up apart"), 2),
        "bare": round(reached * GFLOP / products, 2),
    }
    return {"images": N_LIMIT, "precision": PRECISION, "seconds": seconds, "bare": bare, "ratios": ratios}


def executors(images: Path, folder: Path, n_rounds: int) -> dict[str, Any]:
    featurize = prepare_featurize(images, folder, N_EXECUTORS)
    seconds: Seconds = {}
    for _ in range(n_rounds):
        for n in (1, 2):
            took = {which: featurize(which, SPARK_MASTER=f"local-cluster[{n},1,1024]") for which in ("one", "some")}
            name = f"featurize, {n} executor{'s'[: n - 1]} of one core"
            seconds.setdefault(f"{name}: start-up", []).append(took["one"])
            seconds.setdefault(f"{name}: {N_EXECUTORS:,} images, start-up apart", []).append(took["some"] - took["one"])
            name = f"bare loop, {n} core{'s'[: n - 1]}: {N_EXECUTORS:,} images, start-up apart"
            places = (folder / "some/images", folder / "backbone")
            rate = bare_loop(*places, N_EXECUTORS, "--n_cores", n)["images_per_second"]
            seconds.setdefault(name, []).append(N_EXECUTORS / rate)
    _, one, bare_one, _, two, bare_two = seconds
    ratios = {"two": round(ratio(seconds, one, two), 2), "two, bare": round(ratio(seconds, bare_one, bare_two), 2)}
    return {"images": N_EXECUTORS, "precision": PRECISION, "seconds": seconds, "ratios": ratios}


def prepare_featurize(images: Path, folder: Path, n_images: int) -> Callable[..., float]:
    """Return a function that runs featurize with ResNet50 on `one` image or `some` (n_images), uncached, and times it."""
    chosen = distinct_images(images, n_images)
    for which, n in (("one", 1), ("some", n_images)):
        copy_images(chosen[:n], images, folder / which / "images")
        submit(folder / which, "ingest", "images", "ingested", PARAMS["ingest"])
    save_resnet50(folder / "weights/resnet50.weights.h5")
    run(
        *(sys.executable, "stages/backbone.py", folder / "weights", folder / "backbone"),
        *("--name", "resnet50", "--weights", "resnet50.weights.h5", "--image_size", "224"),
    )
    flags = PARAMS["featurize"] | {"precision": PRECISION}

    def featurize(which: str, **environment: str) -> float:
        cache = folder / "cache"
        environment["FEATURE_CACHE"] = str(cache)
        _, took = submit(folder / which, "featurize", "ingested", folder / "backbone", "features", flags, **environment)
        shutil.rmtree(cache)
        print(f"featurize, {which}, {environment.get('SPARK_MASTER', 'all cores')}: {took:.1f} s", flush=True)
        return took

    return featurize


def bare_loop(images: Path, backbone: Path, n_images: int, *flags: object) -> dict[str, Any]:
    """Run benchmarks/bare.py, and return what it prints."""
    places = (images, backbone)
    said = run(sys.executable, "-m", "benchmarks.bare", *places, "--precision", PRECISION, "--n_images", n_images, *flags)
    return json.loads(said.splitlines()[-1])


def growth(images: Path, folder: Path, n_rounds: int) -> dict[str, Any]:
    """Measure runs on ever more data: for each size the seconds, and the most MiB of each kind of process."""
    seconds: Seconds = {}
    memory: dict[str, dict[str, int]] = {}

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        with watch() as seen:
            started = time.monotonic()
            yield
            seconds.setdefault(name, []).append(time.monotonic() - started)
        memory[name] = {kind: max(mib, memory.get(name, {}).get(kind, 0)) for kind, mib in seen.mib.items()}
        print(f"{name}: {seconds[name][-1]:.1f} s, MiB {seen.mib}", flush=True)

    for n in GROWTH["photographs"]:
        grow_images(images, folder / f"photographs-{n}", n)
    grow_files(images, folder / "files")
    for n in GROWTH["rows"]:
        write_features(folder / f"rows-{n}/features", n, N_FEATURES_OF_ROWS)
    for i in range(n_rounds):
        for n in GROWTH["photographs"]:
            clone = make_clone(folder / f"clone-{n}-{i}")
            (folder / f"photographs-{n}").rename(clone / "data/photos")
            run(*DVC, "add", "-q", "data/photos", cwd=clone)
            with measured(f"the whole, {n:,} photographs"):
                run(*DVC, "exp", "run", "-S", "images=data/photos", cwd=clone)
            (clone / "data/photos").rename(folder / f"photographs-{n}")
            shutil.rmtree(clone)
        for n in GROWTH["files"]:
            with measured(f"ingest, {n:,} files"):
                submit(folder / "files", "ingest", f"files-{n}", "ingested", PARAMS["ingest"])
        for n in GROWTH["rows"]:
            rows = folder / f"rows-{n}"
            with measured(f"covariance and reduce, {n:,} rows of {N_FEATURES_OF_ROWS}"):
                submit(rows, "covariance", "features", "split", "backbone", "covariance", {})
                submit(rows, "reduce", "features", "covariance", "reduced", PARAMS["reduce"])
    medians = iter([statistics.median(each) for each in seconds.values()])
    exponents = {}
    for what, sizes in GROWTH.items():
        took = [next(medians) for _ in sizes]
        exponents[what] = round(float(np.polyfit(np.log(sizes), np.log(took), 1)[0]), 2)
    return {"seconds": seconds, "memory": memory, "ratios": exponents}


def pca(images: Path, folder: Path, n_rounds: int) -> dict[str, Any]:
    write_features(folder / "all/features", N_ROWS, N_FEATURES)
    write_features(folder / "few/features", 64, 16)
    seconds: Seconds = {}
    for _ in range(n_rounds):
        for name, k in (("few", 8), ("all", K)):
            reduce = PARAMS["reduce"] | {"k": k}
            for stage, places in (
                ("covariance", ("features", "split", "backbone", "covariance", {})),
                ("reduce", ("features", "covariance", "reduced", reduce)),
            ):
                _, took = submit(folder / name, stage, *places)
                what = stage if name == "all" else f"{stage}, start-up"
                seconds.setdefault(what, []).append(took)
        command = (*spark_submit(), "benchmarks/field.py", "--features", folder / "all/features", folder / "field")
        said = timed(seconds, "pyspark.ml PCA", *command)
        parts = json.loads(said.splitlines()[-1])["seconds"]
        seconds.setdefault("pyspark.ml PCA, start-up apart", []).append(parts["fit"] + parts["write"])
        shutil.rmtree(folder / "field")
        said = run(sys.executable, "-c", SCIKIT_LEARN, folder / "all/features")
        seconds.setdefault("scikit-learn, fit_transform in memory", []).append(float(said.splitlines()[-1]))
    medians = {name: statistics.median(all_) for name, all_ in seconds.items()}
    ours = medians["covariance"] + medians["reduce"]
    work = ours - medians["covariance, start-up"] - medians["reduce, start-up"]
    ratios = {
        "with start": round(medians["pyspark.ml PCA"] / ours, 1),
        "without start": round(medians["pyspark.ml PCA, start-up apart"] / work, 1),
        "scikit-learn": round(work / medians["scikit-learn, fit_transform in memory"], 1),
    }
    return {"rows": N_ROWS, "features": N_FEATURES, "k": K, "seconds": seconds, "ratios": ratios}


SECTIONS: dict[str, Callable[[Path, Path, int], dict[str, Any]]] = {
    "whole": whole,
    "limit": limit,
    "pca": pca,
    "growth": growth,
    "executors": executors,
}
# What is compared, the goal, and where its measured value stands: a section's name and that of the ratio.
GOALS = (
    (
        "the whole, against the bare loop on as many photographs",
        "1.3 times its seconds or fewer; 1.6 with AMX",
        "whole",
        "bare",
    ),
    ("the whole, against the script that writes features first", "2 times as fast or more; 5 with AMX", "whole", "cached"),
    ("featurize, against the bare loop", "0.95 of its speed or more", "limit", "featurize"),
    (f"the bare loop, against large {PRECISION} products", "0.9 of their GFLOP/s or more", "limit", "bare"),
    ("covariance and reduce, against pyspark.ml's PCA, start-up apart", "12 times as fast or more", "pca", "without start"),
    ("the same, each with its start-up (Spark's, twice)", "4 times or more", "pca", "with start"),
    ("covariance and reduce, start-up apart, against scikit-learn", "1.5 times its seconds or fewer", "pca", "scikit-learn"),
    ("another k and its figures, by `dvc exp run … evaluate`, seconds", "10 or fewer", "whole", "another k, its figures"),
    ("another k, with the model for a phone, by `dvc exp run`, seconds", "10 or fewer", "whole", "another k"),
    ("1 % more photographs, of the seconds of the whole", "0.2 of them or fewer", "whole", "more"),
    ("nothing changed, seconds", "3 or fewer", "whole", "nothing changed"),
    ("the whole by photographs", "exponent 1.05 or less", "growth", "photographs"),
    ("ingest by files", "exponent 1.05 or less", "growth", "files"),
    ("covariance and reduce by rows", "exponent 1.05 or less", "growth", "rows"),
    ("featurize, two executors against one", "1.85 times as fast or more", "executors", "two"),
)
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


RESNET50 = """
import sys
import keras, numpy as np
keras.utils.set_random_seed(0)
network = keras.applications.ResNet50(weights=None, include_top=False, pooling="avg")
for layer in network.layers:
    if isinstance(layer, keras.layers.BatchNormalization):
        layer.set_weights([np.random.uniform(0.5, 1, weight.shape) for weight in layer.get_weights()])
network.save_weights(sys.argv[1])
"""


def spark_submit() -> list[str]:
    """Return the command of spark-submit, with all cores and the memory of the pipeline's driver."""
    return [
        str(Path(sys.executable).with_name("spark-submit")),
        *("--master", "local[*]"),
        *("--driver-memory", f"{memory_mb() // 4}m"),
        *("--conf", "spark.sql.execution.arrow.maxRecordsPerBatch=1024"),
        *("--conf", "spark.ui.enabled=false"),
        *("--conf", "spark.log.level=ERROR"),
    ]


def make_clone(place: Path) -> Path:
    run("git", "clone", "-q", ROOT, place)
    run(sys.executable, "-m", "bootstrap.local", cwd=place)
    return place


def grow_images(images: Path, target: Path, n: int) -> None:
    """Copy n photographs, spread over all labels; if there are too few, add mirrored ones with labels of their own."""
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    copy_images(paths[:: max(1, len(paths) // n)][:n], images, target)
    for path in paths[: max(0, n - len(paths))]:
        place = target / f"{path.parent.name} mirrored" / path.name
        place.parent.mkdir(exist_ok=True)
        with Image.open(path) as image:
            ImageOps.mirror(image).save(place, quality=90)


def grow_files(images: Path, folder: Path) -> None:
    """Make folders files-N, each of N hard links to photographs, ten thousand to a label."""
    for n in GROWTH["files"]:
        few = distinct_images(images, min(n, N_DISTINCT))
        for i in range(n):
            place = folder / f"files-{n}" / f"label-{i // 10_000}"
            if i % 10_000 == 0:
                place.mkdir(parents=True)
            source = few[i % len(few)]
            if i < len(few):
                shutil.copy(source, place / f"{i}.jpg")
            else:
                os.link(folder / f"files-{n}/label-0/{i % len(few)}.jpg", place / f"{i}.jpg")


def write_features(folder: Path, n_rows: int, n_features: int) -> None:
    """Write a table as featurize does, of random features whose variance falls, and beside it their folds and their step."""
    folder.mkdir(parents=True)
    (folder.parent / "backbone").mkdir()
    (folder.parent / "backbone/backbone.json").write_text(json.dumps({"step": STEP}))
    folds = folder.parent / "split/images"
    folds.mkdir(parents=True)
    random = np.random.default_rng(0)
    scale = (1 / np.arange(1, n_features + 1)).astype(np.float32)
    for part, start in enumerate(range(0, n_rows, 2048)):
        n = min(2048, n_rows - start)
        features = np.rint(random.standard_normal((n, n_features), np.float32) * scale / STEP) * np.float32(STEP)
        names = [f"{start + i:064x}" for i in range(n)]
        columns = {
            "image_id": names,
            "path": names,
            "label": ["label"] * n,
            "film": pa.nulls(n, pa.string()),
            "features": pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32) * n_features, features.ravel()),
        }
        pq.write_table(pa.table(columns), folder / f"part-{part:05}.parquet", use_dictionary=False, row_group_size=2048)
        split = pa.table({"image_id": names, "fold": pa.array(np.arange(n) % 2, pa.int32())})
        pq.write_table(split, folds / f"part-{part:05}.parquet")


def save_resnet50(path: Path) -> None:
    """Save random weights, of normalizations too: TensorFlow leaves out a bias of 0, and then has nothing to fuse."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run(sys.executable, "-c", RESNET50, path)


def run(*command: Any, cwd: Path = ROOT) -> str:
    """Run the command, and return what it prints.

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


def ratio(seconds: Seconds, one: str, other: str) -> float:
    return statistics.median(seconds[one]) / statistics.median(seconds[other])


def format_tables(section: dict[str, Any]) -> str:
    lines = ["| | seconds, median | least | most |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {statistics.median(all_):.1f} | {min(all_):.1f} | {max(all_):.1f} |"
        for name, all_ in section["seconds"].items()
    ]
    if "memory" in section:
        kinds = ("stage", "JVM", "worker")
        lines += ["", "| MiB of the largest process at its most | " + " | ".join(kinds) + " |", "|---|---|---|---|"]
        lines += [
            f"| {name} | " + " | ".join(f"{most.get(kind, 0):,}" for kind in kinds) + " |"
            for name, most in section["memory"].items()
        ]
    return "\n".join(lines) + "\n"


def format_goals(results: dict[str, Any]) -> str:
    here = machine()
    lines = [f"On {here['cores']} cores of {here['processor']} ({', '.join(here['instructions'])}):", ""]
    lines += ["| | goal | measured |", "|---|---|---|"]
    lines += [
        f"| {what} | {goal} | {results[section]['ratios'][name] if section in results else 'not on this machine'} |"
        for what, goal, section, name in GOALS
    ]
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=lambda text: Path(text).resolve())
    parser.add_argument("--n_rounds", type=int, help="of each section; unless given, as many as ROUNDS says")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
