"""What several test files share: the repository and its commands, images made on the spot, tables of them, oracles."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from bootstrap import java
from stages import baseline, classify, evaluate, reduce

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(sys.executable)
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
PIPELINE: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SPARK_STAGES = ["ingest", "featurize", "neighbours", "covariance", "reduce"]


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run a command as on a new machine, with nobody's settings, and return what it prints."""
    done = subprocess.run(
        command, cwd=cwd, env=environment_of(cwd, **environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def environment_of(home: Path, **environment: str) -> dict[str, str]:
    """Make the environment of a command as on a new machine, with nobody's settings."""
    return (
        os.environ
        | {"PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}", "SPARK_DRIVER_MEMORY": "1g"}
        | {"HOME": str(home), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        | environment
    )


def copy_repository(folder: Path, changes: dict[str, str]) -> None:
    """Copy the repository's files into a repository of its own, with changes to the text of params.yaml."""
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    params = (folder / "params.yaml").read_text()
    for old, new in changes.items():
        assert old in params
        params = params.replace(old, new)
    (folder / "params.yaml").write_text(params)
    run("git", "init", "--quiet", cwd=folder)
    run("make", "identity", cwd=folder)


def forget(clone: Path) -> None:
    """Delete what Spark's stages wrote, and every trace of how it was made."""
    for name in (
        ".dvc/cache",
        ".dvc/tmp/feature-cache",
        "data/ingested",
        "data/features",
        "data/neighbours",
        "data/split",
        "data/covariance",
        "data/reduced",
    ):
        shutil.rmtree(clone / name, ignore_errors=True)  # a run on EMR keeps its features elsewhere


N_FEATURES = 6
LABELS = ("apple", "banana", "cherry")
INT32 = {"fold", "feature", "component", "k"}  # all other columns have the type that their values have


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_images(n: int = 80, spread: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Images of three labels in two folds; the smaller the spread, the easier they are to tell apart."""
    random = np.random.default_rng(seed)
    label = np.arange(n) % len(LABELS)
    centres = random.normal(size=(len(LABELS), N_FEATURES)) * 2
    features = centres[label] + random.normal(size=(n, N_FEATURES)) * spread * [3, 2, 1, 1, 0.5, 0.2]
    pixels = np.clip(80 * label[:, None] + random.normal(size=(n, 768)) * 80 * spread, 0, 255).astype(np.uint8)
    return pd.DataFrame(
        {
            "image_id": [digest(str(i)) for i in range(n)],
            "path": [f"{LABELS[each]}/{i:03}.jpg" for i, each in enumerate(label)],
            "label": [LABELS[each] for each in label],
            "group": [f"film {i // 6}" for i in range(n)],
            "fold": np.arange(n) // 6 % 2,
            "features": list(on_grid(features)),
            "thumbnail": [row.tobytes() for row in pixels],
        }
    )


def write(table: pd.DataFrame, folder: Path) -> None:
    folder.mkdir(parents=True)
    columns = {name: pa.array(table[name].tolist(), pa.int32() if name in INT32 else None) for name in table}
    pq.write_table(pa.table(columns), folder / "part-00000.parquet")


STEP = 2.0**-10


def on_grid(features: np.ndarray) -> np.ndarray:
    """Round to multiples of STEP, as features are."""
    return (np.rint(features / STEP) * STEP).astype(np.float32)


def sums_of(features: np.ndarray, fold: int = 0) -> dict[str, Any]:
    """A row of what the stage covariance writes, of features on the grid."""
    steps = (features / STEP).astype(np.int64)
    triangle = (steps.T @ steps)[np.tril_indices(steps.shape[1])]
    columns = {"sum": steps.sum(axis=0), "products": triangle}
    return {"fold": fold, "n": len(steps), "step": STEP} | {name: each.tobytes() for name, each in columns.items()}


def moments_of(features: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    wide = features.astype(np.float64)
    return len(wide), wide.mean(axis=0), np.cov(wide, rowvar=False, ddof=0) * len(wide)


def write_split(folder: Path, images: pd.DataFrame, leak: float = 0.0) -> None:
    """What ingest, featurize and split write for these images, but for the files that are no images."""
    write(images.drop(columns=["features", "group", "fold"]), folder / "ingested" / "images")
    write(images.drop(columns=["thumbnail", "group", "fold"]), folder / "features")
    write(images.drop(columns=["features", "thumbnail"]), folder / "split" / "images")
    write(pd.DataFrame({"leak": [leak]}), folder / "split" / "settings")


def run_baseline(folder: Path, max_images: int = 1000, output: str = "baseline") -> pd.DataFrame:
    """Run the stage in a folder that write_split has written, and read its table."""
    places = [str(folder / name) for name in ("ingested", "features", "split", output)]
    baseline.main([*places, "--max_images", str(max_images), "--kind_pattern", PARAMS["baseline"]["kind_pattern"]])
    return pq.read_table(places[-1]).to_pandas()


def write_inputs(
    folder: Path,
    images: pd.DataFrame,
    k: int,
    scale: str = "none",
    n_quarantined: int = 0,
    n_ignored: int = 0,
    n_not_in_share: int = 0,
    leak: float = 0.0,
) -> list[str]:
    """What the stages before write for these images; the places that evaluate takes."""
    write_split(folder, images, leak)
    quarantine = pd.DataFrame({"path": [f"bad/{i}.jpg" for i in range(n_quarantined)]}, dtype=object)
    write(quarantine, folder / "ingested" / "quarantine")
    reasons = ["hidden"] * n_ignored + ["not_in_share"] * n_not_in_share
    paths = [f"other/{i}" for i in range(len(reasons))]
    write(pd.DataFrame({"path": paths, "reason": reasons, "kind": reasons}, dtype=object), folder / "ingested" / "ignored")
    sums = [sums_of(np.stack(rows["features"]), fold) for fold, rows in images.groupby("fold")]
    write(pd.DataFrame(sums), folder / "covariance")
    pca = reduce.fit(*moments_of(np.stack(images["features"])), scale)
    model = folder / "reduced" / "model"
    spectrum = reduce.spectrum_of(pca.explained_variance)
    write(spectrum, model / "spectrum")
    write(spectrum[:k].assign(weights=list(pca.components[:k])), model / "components")
    write(pd.DataFrame({"feature": range(N_FEATURES), "mean": pca.mean, "scale": pca.scale}), model / "scaling")
    write(pd.DataFrame({"k": [k], "scale": [scale]}), model / "settings")
    embeddings = reduce.project(np.stack(images["features"]), pca.mean, pca.scale, pca.components[:k])
    write(images[["image_id", "path", "label"]].assign(embedding=embeddings.tolist()), folder / "reduced" / "embeddings")
    run_baseline(folder)
    return [str(folder / name) for name in ("ingested", "features", "split", "covariance", "baseline", "reduced")]


def run_evaluate(
    inputs: list[str], output: Path, curve: tuple[int, ...] = (1, 2, 4, 64), max_loss: float = 0.02
) -> dict[str, Any]:
    """Run the stage and return metrics.json."""
    evaluate.main([*inputs, str(output), "--curve", *map(str, curve), "--max_loss", str(max_loss)])
    return json.loads((output / "metrics.json").read_text())


def run_classify(folder: Path, output: str = "classifier", **flags: Any) -> Path:
    """Run the stage in a folder that write_inputs has written, and return its output."""
    given = {"exemplars": 1, "shrinkage": 0.2, "keep": 0.9, "max_images": 1000} | flags
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    places = [str(folder / name) for name in ("features", "split", "covariance", "reduced", output)]
    classify.main([*places, *words])
    return folder / output


def split(images: pd.DataFrame, test_fold: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test images; no copies, and none in the test whose label is not in training."""
    distinct = images.sort_values(["image_id", "path"]).drop_duplicates("image_id")
    train, test = distinct[distinct["fold"] != test_fold], distinct[distinct["fold"] == test_fold]
    return train, test[test["label"].isin(train["label"])]


def spaces(images: pd.DataFrame, test_fold: int, k: int, scale: str = "none") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Training and test rows in each space, by scikit-learn. (A PCA fits all rows of training, copies too.)"""
    train, test = split(images, test_fold)
    fitted = np.stack(images[images["fold"] != test_fold]["features"]).astype(np.float64)
    scaler = StandardScaler(with_std=scale == "standard").fit(fitted)
    pca = PCA(k, svd_solver="full").fit(scaler.transform(fitted))

    def pixels(rows: pd.DataFrame) -> np.ndarray:
        return np.stack([np.frombuffer(each, np.uint8) for each in rows["thumbnail"]]).astype(np.float64)

    features = [np.stack(rows["features"]).astype(np.float64) for rows in (train, test)]
    return {
        "embedding": tuple(pca.transform(scaler.transform(rows)) for rows in features),
        "features": tuple(features),
        "pixels": (pixels(train), pixels(test)),
    }


def make_archive(dvc_root: dict[str, str], version: str) -> Path:
    """Let a first run with that version of Java make its archive of classes, of no class."""
    archive = java.class_archive(dvc_root, version)
    assert archive.partial is not None
    archive.partial.write_bytes(b"classes")
    archive.settle(0)
    return archive.path
