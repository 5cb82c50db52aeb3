"""compare: whether two runs are the same, the same but for rounding, or different, stage by stage.

usage: python -m reports.compare RUN [OTHER]

reads   of both runs: dvc.lock, data/{backbone,ingested,features,split,covariance,reduced,baseline,classifier,model},
        reports/evaluation
prints  of each stage: whether its bytes are the same and, where not, by how much its values differ; in the end a verdict

A run is the name of a git revision (commit, branch, tag, experiment), whose data comes from DVC's cache or remote. Or it is
a folder: another checkout, where somebody else, or another machine, has run the pipeline. OTHER is the workspace unless set.

A processor of another kind adds up in another order, so the last digits of all that follows differ. That is rounding. Each
stage is judged by a measure that such rounding cannot make large: of components, by the space that they span and by the
embeddings when these are turned into one another's axes, for components of like variance mix freely.

Exit status: 0, same bytes or the same but for rounding; 1, different; 2, data of a run is not to be had. Runs without
Spark, in bounded memory but for the names of images.
"""

import argparse
import io
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from dvc.api import DVCFileSystem
from dvc.exceptions import DvcException
from pyarrow import fs
from scipy.linalg import subspace_angles
from sklearn.neighbors import NearestNeighbors

from stages.analysis import hash_below, open_table, read_sums, to_moments

# How far rounding can move a feature vector, as a share of its norm. What the network gives moves by up to a = 1e-4.
# Measured: 5e-6 at most of 1,008 images and the default network, when oneDNN computes as for a processor without AVX and
# each weight is moved by its last bit; 8e-7 at most of eight of Keras's networks. Then features are rounded to a grid, whose
# step is some g = 2**-8 of their size. One that moves by d goes to the next step with probability d / step. So the vector
# moves by the square root of a x g, 6e-4. bfloat16 moves the median vector by 4e-2.
FLOAT32 = 1e-3
# The same of what follows in float64 from equal features. Measured: components move by 1e-13 when OpenBLAS computes as for a
# processor without AVX2. Sums are exact.
FLOAT64 = 1e-10
STORED = 1e-6  # of a float32 in a file: its last digit
# Share of images whose predicted label may change: a near tie falls either way. Measured: none of 1,008, as above; 1 % by
# bfloat16.
FLIPS = 0.005
DIGIT = 1e-4  # the last of a metric

SAMPLE = 2000  # images whose nearest neighbours are compared, about, at most
SLICE = 2**15  # rows at once, where the two runs have other files
TINY = 1e-30  # nothing is divided by less
N_NAMED = 3  # images that are named, at most
KEYS = ["image_id", "path"]
SAME, ROUNDING, DIFFERENT, NOT_THERE = "same bytes", "rounding", "different", "not there"
# Of Parquet's types: less memory than Python's strings, and whole numbers stay whole where a row is missing.
TYPES = {pa.string(): pd.StringDtype("pyarrow"), pa.int32(): pd.Int32Dtype()}

Finding = tuple[bool, str]  # whether it is more than rounding; what was seen, with the values of both
Pair = tuple[pd.DataFrame, np.ndarray, np.ndarray]  # KEYS of some rows, and the vectors that both runs have for them


class Run(NamedTuple):
    """A run: where its files are, and what dvc.lock says of them."""

    name: str
    files: fs.FileSystem  # of paths relative to the repository's root
    lock: dict[str, Any]  # by stage; empty without a dvc.lock
    changed: set[str]  # outputs of which dvc.lock does not say what is there


class Missing(Exception):
    """A run, or data of one, that is not to be had; the message says what to do."""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        a, b = open_run(args.run), open_run(args.other)
    except Missing as error:
        print(f"compare: {error.args[0]}", file=sys.stderr)
        return 2
    print(f"{a.name} | {b.name}")
    levels: dict[str, str] = {}
    missing: list[str] = []
    for stage in STAGES:
        tolerance = FLOAT64 if levels.get("featurize") == SAME else FLOAT32
        try:
            level, findings = compare_stage(a, b, stage, tolerance)
        except Missing as error:
            level, findings = NOT_THERE, []
            missing.append(error.args[0])
        levels[stage] = level
        print(f"{stage:<11} {level}")
        for line in (*findings, *explain(a, b, stage)):
            print(f"            {line}")
    if missing:
        print("compare: " + "; ".join(dict.fromkeys(missing)), file=sys.stderr)
    different = [stage for stage, level in levels.items() if level == DIFFERENT]
    if different:
        print(f"compare: different, from {different[0]} on")
    elif not missing and ROUNDING in levels.values():
        print(f"compare: the same but for rounding (tolerance: {FLOAT32:.0e} of float32, {FLOAT64:.0e} of float64)")
    elif not missing:
        print("compare: same bytes")
    return 1 if different else 2 if missing else 0


def open_run(name: str) -> Run:
    """Find the run of a folder or of a git revision.

    Raises
    ------
    Missing
        there is no such folder with data, and no such revision with a dvc.lock
    """
    if Path(name, "data").is_dir():
        files: fs.FileSystem = fs.SubTreeFileSystem(name, fs.LocalFileSystem())
        lock = Path(name, "dvc.lock")
        stages = read_lock(lock.read_text()) if lock.exists() else {}
        return Run("workspace" if name == "." else name, files, stages, changed_outputs(name, stages))
    try:
        revision = DVCFileSystem(".", rev=name)
        return Run(name, fs.PyFileSystem(fs.FSSpecHandler(revision)), read_lock(revision.read_text("dvc.lock")), set())
    except (DvcException, OSError) as error:
        raise Missing(f"{name} is no folder with a run in it, and no revision with one: {error}") from None


def read_lock(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)["stages"]


def changed_outputs(folder: str, lock: dict[str, Any]) -> set[str]:
    """List outputs of a checkout that are gone, or not as its dvc.lock says; all of them where DVC cannot tell."""
    outputs = {path for path, _ in STAGES.values()}
    if not lock or not Path(folder, ".dvc").is_dir():
        return outputs
    said = subprocess.run(
        [sys.executable, "-m", "dvc", "data", "status", "--json"], cwd=folder, capture_output=True, text=True
    )
    if said.returncode:
        return outputs
    listed = itertools.chain(*json.loads(said.stdout).get("uncommitted", {}).values())
    names = itertools.chain(
        *(each.values() if isinstance(each, dict) else [each] for each in listed)
    )  # old and new, if renamed
    return {name.rstrip("/") for name in names}


def explain(a: Run, b: Run, stage: str) -> list[str]:
    """List parameters, code and inputs of the stage that are not the same in both dvc.lock."""
    if stage not in a.lock or stage not in b.lock:
        return []
    lines = []
    params, others = (flat(run.lock[stage].get("params", {}).get("params.yaml", {})) for run in (a, b))
    for name in sorted(params.keys() | others.keys()):
        if params.get(name) != others.get(name):
            lines.append(f"parameter {name}: {params.get(name)} | {others.get(name)}")
    deps, others = ({each["path"]: each.get("md5") for each in run.lock[stage].get("deps", [])} for run in (a, b))
    for path in sorted(deps.keys() | others.keys()):
        if path.endswith(".py") and deps.get(path) != others.get(path):
            lines.append(f"other code: {path}")
        elif path not in deps or path not in others:
            lines.append(f"only {a.name if path in deps else b.name} reads {path}")
    return lines


def compare_stage(a: Run, b: Run, stage: str, tolerance: float) -> tuple[str, list[str]]:
    """How far a stage's outputs are the same, and what was seen where they are not.

    Raises
    ------
    Missing
        one of the runs has not got its output
    """
    path, compare = STAGES[stage]
    hashes = [hash_of(run, stage, path) for run in (a, b)]
    if hashes[0] and hashes[0] == hashes[1]:
        return SAME, []
    names = [find(run, path) for run in (a, b)]
    try:
        if not all(hashes) and names[0] == names[1] and all(has_same_bytes(a, b, name) for name in names[0]):
            return SAME, []
        findings = list(compare(a, b, path, tolerance))
    except (OSError, pa.ArrowInvalid) as error:
        raise Missing(f"{path} of {a.name} or of {b.name} cannot be read: {error}") from None
    level = DIFFERENT if any(is_more for is_more, _ in findings) else ROUNDING
    return level, [text for _, text in findings] or ["other bytes, but the same in all that is compared"]


def hash_of(run: Run, stage: str, path: str) -> str | None:
    """DVC's hash of an output; None if it has none, or not that of what is there."""
    outputs = {each["path"]: each.get("md5") for each in run.lock.get(stage, {}).get("outs", [])}
    return None if path in run.changed else outputs.get(path)


def find(run: Run, path: str) -> list[str]:
    """List the names of all files of an output.

    Raises
    ------
    Missing
        there are none; the message says what to do
    """
    try:
        found = run.files.get_file_info(fs.FileSelector(path, recursive=True))
        names = sorted(each.path for each in found if each.is_file)
        run.files.open_input_stream(names[0]).close()
        return names
    except Exception:  # no file, or neither cache nor remote has it: Arrow's, DVC's, S3's, the network's
        pass
    if isinstance(run.files, fs.SubTreeFileSystem):
        raise Missing(f"{run.name} has not all data; run `dvc pull` or `dvc repro` there")
    if not any(path == each["path"] for stage in run.lock.values() for each in stage.get("outs", [])):
        raise Missing(f"the dvc.lock of {run.name} has no {path}; run `dvc repro` there and commit")
    raise Missing(
        f"the data of {run.name} is neither in DVC's cache nor in its remote; "
        "run `dvc push` where it was computed, or name that folder instead"
    )


def has_same_bytes(a: Run, b: Run, name: str) -> bool:
    with a.files.open_input_stream(name) as one, b.files.open_input_stream(name) as other:
        while (some := one.read(2**20)) == other.read(2**20):
            if not some:
                return True
    return False


def compare_backbone(a: Run, b: Run, path: str, _: float) -> Iterator[Finding]:
    about, others = (json.loads(read_bytes(run, f"{path}/backbone.json")) for run in (a, b))
    for name in sorted(about.keys() & others.keys()):
        if about[name] != others[name]:
            # Some constants of the graph are computed when it is frozen, and so rounded; what that does, the features tell.
            yield name != "graph_sha256", f"{name}: {about[name]} | {others[name]}"


def compare_ingested(a: Run, b: Run, path: str, _: float) -> Iterator[Finding]:
    columns = ["label", "film", "width", "height"]
    rows = join(a, b, f"{path}/images", [*columns, "content_id"])
    yield from compare_rows(a, b, rows, columns)
    n_other = sum(int((x != y).any(axis=1).sum()) for _, x, y in pairs(a, b, f"{path}/images", "thumbnail", rows))
    if n_other:
        yield True, f"other pixels in the thumbnail: {n_other:,} of {n_shared(rows):,}"
    # The same file, which ingest had to encode anew: another compressor packs the same pixels into other bytes.
    if n_other := int((~equal(rows, "content_id")).sum()):
        yield False, f"other content: {n_other:,} of {n_shared(rows):,}"
    refused = join(a, b, f"{path}/quarantine", ["label", "reason"], keys=["path"])
    yield from ((is_more, f"quarantine: {text}") for is_more, text in compare_rows(a, b, refused, ["label", "reason"]))
    if without := [run.name for run in (a, b) if not any("/ignored/" in name for name in find(run, path))]:
        yield False, f"ignored: no table in {' and '.join(without)}, as in version 0.1.0"
    else:
        ignored = join(a, b, f"{path}/ignored", ["reason", "kind"], keys=["path"])
        yield from ((is_more, f"ignored: {text}") for is_more, text in compare_rows(a, b, ignored, ["reason", "kind"]))


def compare_features(a: Run, b: Run, path: str, _: float) -> Iterator[Finding]:
    columns = ["label", "film"]
    rows = join(a, b, path, columns)
    yield from compare_rows(a, b, rows, columns)
    yield from compare_vectors("features", pairs(a, b, path, "features", rows), n_shared(rows), FLOAT32)


def compare_split(a: Run, b: Run, path: str, _: float) -> Iterator[Finding]:
    columns = ["label", "group", "fold"]
    yield from compare_rows(a, b, join(a, b, f"{path}/images", columns), columns)


def compare_covariance(a: Run, b: Run, path: str, tolerance: float) -> Iterator[Finding]:
    folds, others = ({fold: to_moments(sums) for fold, sums in read_sums(path, run.files).items()} for run in (a, b))
    if folds.keys() != others.keys():
        yield True, f"folds: {sorted(folds)} | {sorted(others)}"
    for fold in sorted(folds.keys() & others.keys()):
        one, other = folds[fold], others[fold]
        if one.n != other.n:
            yield True, f"images of fold {fold}: {one.n:,} | {other.n:,}"
        for name in ("mean", "scatter"):
            x, y = getattr(one, name), getattr(other, name)
            if x.size != y.size:
                yield True, f"numbers in {name} of fold {fold}: {x.size:,} | {y.size:,}"
            elif difference := relative(x, y):
                text = f"{name} of fold {fold}: relative difference {difference:.1e} (rounding: up to {tolerance:.0e})"
                yield exceeds(difference, tolerance), text


def compare_reduced(a: Run, b: Run, path: str, tolerance: float) -> Iterator[Finding]:
    (settings,), (others,) = (read(run, f"{path}/model/settings").to_pylist() for run in (a, b))
    yield from (
        (True, f"{name}: {settings[name]} | {others[name]}") for name in ("k", "scale") if settings[name] != others[name]
    )
    spans = [np.stack(read(run, f"{path}/model/components").sort_by("component")["weights"].to_numpy()) for run in (a, b)]
    variances = [read(run, f"{path}/model/spectrum").sort_by("component")["explained_variance"].to_numpy() for run in (a, b)]
    if variances[0].size != variances[1].size:
        yield True, f"features: {variances[0].size:,} | {variances[1].size:,}"
        return
    scalings = [read(run, f"{path}/model/scaling").sort_by("feature") for run in (a, b)]
    for name in ("mean", "scale"):
        difference = relative(*(scaling[name].to_numpy() for scaling in scalings))
        if exceeds(difference, tolerance):
            yield True, f"{name} of the features: relative difference {difference:.1e} (rounding: up to {tolerance:.0e})"
    largest = float(variances[0][0])
    moved = float(np.abs(variances[0] - variances[1]).max()) / largest
    text = f"explained variance: up to {moved:.1e} of the largest apart (rounding: up to {tolerance:.0e})"
    yield exceeds(moved, tolerance), text
    # By so much a change of the covariance can turn the space, the more the less variance tells what is in it from what is
    # not (Davis and Kahan 1970, "The rotation of eigenvectors by a perturbation").
    k, most = sorted(map(len, spans))
    gap = variances[0][k - 1] - np.append(variances[0], 0.0)[most]
    turned, bound = float(subspace_angles(*(span.T for span in spans)).max()), tolerance * largest / max(gap, TINY)
    text = f"largest angle between the principal subspaces: {turned:.1e} rad (rounding: up to {min(bound, math.pi / 2):.0e})"
    yield exceeds(turned, bound), text
    rows = join(a, b, f"{path}/embeddings", ["label"])
    yield from compare_rows(a, b, rows, ["label"])
    if k == most:
        turn, spread = spans[1] @ spans[0].T, math.sqrt(variances[0][:k].sum())
        embeddings = ((keys, x, y @ turn) for keys, x, y in pairs(a, b, f"{path}/embeddings", "embedding", rows))
        yield from compare_vectors("embeddings", embeddings, n_shared(rows), max(tolerance, STORED) + turned, spread)


def compare_baseline(a: Run, b: Run, path: str, _: float) -> Iterator[Finding]:
    predictions = [f"{space}_{score}" for space in ("features", "pixels") for score in ("nearest_neighbour", "linear_probe")]
    columns = ["label", "group", "fold"]
    rows = join(a, b, path, [*columns, *predictions])
    yield from compare_rows(a, b, rows, columns)
    yield from compare_predictions(rows, predictions)


def compare_evaluation(a: Run, b: Run, path: str, _: float) -> Iterator[Finding]:
    tables = [pd.read_csv(io.BytesIO(read_bytes(run, f"{path}/predictions.csv")), keep_default_na=False) for run in (a, b)]
    rows = tables[0].merge(tables[1], on="path", how="outer", suffixes=("_a", "_b"), indicator=True)
    yield from compare_rows(a, b, rows, ["label"])
    yield from compare_predictions(rows, ["predicted"])
    yield from compare_metrics(a, b, f"{path}/metrics.json")


def compare_classifier(a: Run, b: Run, path: str, _: float) -> Iterator[Finding]:
    rows = join(a, b, f"{path}/predictions", ["label", "fold", "predicted"], keys=["path"])
    yield from compare_rows(a, b, rows, ["label", "fold"])
    yield from compare_predictions(rows, ["predicted"])
    yield from compare_metrics(a, b, f"{path}/metrics.json")


def compare_model(a: Run, b: Run, path: str, _: float) -> Iterator[Finding]:
    # What its numbers do, the classifier's predictions tell.
    about, others = (json.loads(read_bytes(run, f"{path}/model.json")) for run in (a, b))
    for name in ("labels", "calibrated", "pixels", "k", "n_exemplars"):
        if about[name] != others[name]:
            yield True, f"{name}: {about[name]} | {others[name]}"


def compare_metrics(a: Run, b: Run, path: str) -> Iterator[Finding]:
    metrics, others = (flat(json.loads(read_bytes(run, path))) for run in (a, b))
    for name in sorted(metrics.keys() | others.keys()):
        one, other = metrics.get(name), others.get(name)
        if one is None or other is None:
            yield True, f"{name}: {one} | {other}"
        elif abs(one - other) > (1.5 * DIGIT if isinstance(one, float) else 0):
            is_share = name.startswith(("nearest_neighbour.", "linear_probe.", "recognition."))
            # How many components are enough is where a curve crosses a line: it jumps, and the curve is judged already.
            is_more = abs(one - other) > FLIPS if is_share else not name.startswith("variance.k")
            yield is_more, f"{name}: {one} | {other}"


def compare_rows(a: Run, b: Run, rows: pd.DataFrame, columns: list[str]) -> Iterator[Finding]:
    """Rows that one of the two has not, and rows whose columns differ."""
    for side, run in (("left_only", a), ("right_only", b)):
        paths = rows.loc[rows["_merge"] == side, "path"]
        if len(paths):
            yield True, f"only in {run.name}: {len(paths):,} ({', '.join(paths.head(N_NAMED))})"
    for column in columns:
        changed = rows[~equal(rows, column)]
        if len(changed):
            some = changed[["path", f"{column}_a", f"{column}_b"]].head(N_NAMED).itertuples(index=False)
            examples = "; ".join(f"{path}: {one} | {other}" for path, one, other in some)
            yield True, f"other {column}: {len(changed):,} of {n_shared(rows):,} ({examples})"


def compare_predictions(rows: pd.DataFrame, columns: list[str]) -> Iterator[Finding]:
    for column in columns:
        if n_other := int((~equal(rows, column)).sum()):
            text = f"other {column}: {n_other:,} of {n_shared(rows):,} (rounding: up to {FLIPS:.1%})"
            yield n_other > FLIPS * n_shared(rows), text


def compare_vectors(
    name: str, pairs: Iterable[Pair], n_rows: int, tolerance: float, unit: float | None = None
) -> Iterator[Finding]:
    """Differences of the vectors of two runs, and whether the nearest neighbours are the same.

    Parameters
    ----------
    n_rows : of all pairs together
    unit : what a difference is measured by; unless set, the norm of the longer of the two
    """
    paths, differences, cosines, sample = [], [], [], []
    for keys, x, y in pairs:
        if x.shape[1] != y.shape[1]:
            yield True, f"numbers in a vector: {x.shape[1]:,} | {y.shape[1]:,}"
            return
        norms = [np.linalg.norm(each, axis=1) for each in (x, y)]
        longer = np.maximum(np.maximum(*norms), TINY)
        difference = np.nan_to_num(np.linalg.norm(x - y, axis=1) / (unit or longer), nan=np.inf)
        paths.append(keys["path"])
        differences.append(difference)
        cosines.append(np.einsum("nd,nd->n", x, y, dtype=np.float64) / np.maximum(norms[0] * norms[1], TINY))
        is_chosen = (keys["image_id"] < hash_below(SAMPLE / n_rows)).to_numpy(bool) & np.isfinite(difference)
        sample.append((keys["image_id"][is_chosen], x[is_chosen], y[is_chosen]))
    if not paths:
        return
    found = pd.Series(np.concatenate(differences), index=pd.concat(paths))
    is_more = exceeds(found.max(), tolerance)
    text = (
        f"{name} of {len(found):,} images: relative difference {found.max():.1e} at most (rounding: up to {tolerance:.0e}), "
        f"{found.median():.1e} in the median; cosine {np.concatenate(cosines).min():.6f} at least"
    )
    yield is_more, text
    if is_more:
        yield True, f"most in: {', '.join(found.nlargest(N_NAMED).index)}"
    is_first = ~pd.concat([ids for ids, _, _ in sample]).duplicated().to_numpy()
    if is_first.sum() > 1:
        x, y = (np.concatenate([part[i] for part in sample])[is_first] for i in (1, 2))
        nearest = [NearestNeighbors(n_neighbors=1, algorithm="brute").fit(each).kneighbors()[1] for each in (x, y)]
        yield False, f"same nearest neighbour: {int((nearest[0] == nearest[1]).sum()):,} of {len(x):,} images"


def join(a: Run, b: Run, path: str, columns: list[str], keys: list[str] = KEYS) -> pd.DataFrame:
    """Lay the rows of a table in both runs side by side.

    Returns
    -------
    keys; of each column and of `file`, where the row is, what one run has (`column_a`) and what the other (`column_b`);
    `_merge`, which says whether a row is in both
    """
    tables = (
        read(run, path, [*keys, *columns, "__filename"])
        .to_pandas(types_mapper=TYPES.get)
        .rename(columns={"__filename": "file"})
        for run in (a, b)
    )
    one, other = tables
    return one.merge(other, on=keys, how="outer", suffixes=("_a", "_b"), indicator=True)


def n_shared(rows: pd.DataFrame) -> int:
    return int((rows["_merge"] == "both").sum())


def equal(rows: pd.DataFrame, column: str) -> pd.Series:
    """Whether a column is the same in both runs; so is, here, a row that only one of them has."""
    one, other = rows[f"{column}_a"], rows[f"{column}_b"]
    is_same = (one == other).fillna(False) | (one.isna() & other.isna())
    return is_same.astype(bool) | (rows["_merge"] != "both")


def pairs(a: Run, b: Run, path: str, column: str, rows: pd.DataFrame) -> Iterator[Pair]:
    """Yield the vectors of the rows that both runs have, some rows at a time.

    File by file where each row is in the same file in both; else slice by slice of image_id, which is a SHA-256 and so
    uniform. Then all files are read for each slice: slow, but in the same memory.
    """
    shared = rows[rows["_merge"] == "both"]
    parts: list[tuple[str, pc.Expression | None]]
    if (shared["file_a"] == shared["file_b"]).all():
        parts = [(name, None) for name in sorted(shared["file_a"].unique())]
    else:
        n_parts = math.ceil(len(shared) / SLICE)
        bounds = [f"{i * 16**8 // n_parts:08x}" for i in range(n_parts)] + ["g"]  # which comes after all hexadecimal digits
        image_id = pc.field("image_id")
        parts = [(path, (image_id >= low) & (image_id < high)) for low, high in itertools.pairwise(bounds)]
    for part, chosen in parts:
        one, other = (read(run, part, [*KEYS, column], chosen) for run in (a, b))
        keys, others = (each.select(KEYS).to_pandas().assign(row=range(len(each))) for each in (one, other))
        both = keys.merge(others, on=KEYS)
        if len(both):
            yield both[KEYS], to_matrix(one[column])[both["row_x"]], to_matrix(other[column])[both["row_y"]]


def read_bytes(run: Run, path: str) -> bytes:
    with run.files.open_input_stream(path) as stream:
        return stream.read()


def read(run: Run, path: str, columns: list[str] | None = None, chosen: pc.Expression | None = None) -> pa.Table:
    return open_table(path, run.files).to_table(columns, filter=chosen)


def to_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Turn a column of equally long lists of numbers, or strings of bytes, into an array of shape (n_rows, length)."""
    values = column.combine_chunks()
    is_binary = pa.types.is_binary(values.type)
    flattened = np.frombuffer(b"".join(values.to_pylist()), np.uint8) if is_binary else values.flatten().to_numpy()
    return flattened.reshape(len(column), -1)


def relative(x: np.ndarray, y: np.ndarray) -> float:
    """Divide the norm of the difference of two vectors by that of the longer one."""
    return float(np.linalg.norm(x - y) / (max(np.linalg.norm(x), np.linalg.norm(y)) or 1.0))


def exceeds(value: float, bound: float) -> bool:
    return not value <= bound  # NaN does


def flat(nested: dict[str, Any]) -> dict[str, Any]:
    """Values by the names of all levels, with a dot between two."""
    return pd.json_normalize(nested).to_dict("records")[0] if nested else {}


# In the pipeline's order, each with its output.
STAGES: dict[str, tuple[str, Callable[[Run, Run, str, float], Iterator[Finding]]]] = {
    "backbone": ("data/backbone", compare_backbone),
    "ingest": ("data/ingested", compare_ingested),
    "featurize": ("data/features", compare_features),
    "split": ("data/split", compare_split),
    "covariance": ("data/covariance", compare_covariance),
    "reduce": ("data/reduced", compare_reduced),
    "baseline": ("data/baseline", compare_baseline),
    "evaluate": ("reports/evaluation", compare_evaluation),
    "classify": ("data/classifier", compare_classifier),
    "export": ("data/model", compare_model),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="git revision (commit, branch, tag, experiment), or folder of another checkout")
    parser.add_argument("other", nargs="?", default=".", help="what it is compared with; the workspace unless set")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
