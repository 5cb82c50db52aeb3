"""recognise: tell the fruits on photographs, with the model that `make run` makes.

usage: python -m app.recognise PHOTO... [--json] [--model data/model]

PHOTO is a file of any format that `ingest` takes, or a folder, which is searched to the bottom. What a file is, its content
tells, whatever its name. Each photograph gets a label with its probability, or one of two refusals: it is a fruit that the
model does not know, or no photograph of this kind. A refusal is a result. The exit status is 1 if a file could not be read;
the others are recognised all the same.

With --json, each photograph is one line of JSON, and so is each file that could not be read (its decision: unreadable).
"""

import argparse
import io
import json
import os
import re
import signal
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pyarrow.parquet as pq
from ai_edge_litert.interpreter import Interpreter

from app.model import describe
from stages.featurize import check_pixels, to_pixels
from stages.ingest import EXTENSIONS, FORMATS, RAW, SYSTEM, Refused, decode, extension_of, quiet_pillow

# The largest that `ingest` takes, by the parameters that it comes with.
MAX_PIXELS = 100_000_000
MAX_FILE_MB = 100

N_TOLD = 3  # labels, and known photographs
N_CORES = min(4, os.cpu_count() or 1)  # that are used; each decodes, and MAX_PIXELS take over 1 GB
N_AHEAD = 64  # photographs that may wait for the network, as pixels
START = 64  # bytes of a file that tell its format

REFUSALS = {"unknown_fruit": "a fruit that I do not know", "no_such_photograph": "no photograph of this kind"}


class Model(NamedTuple):
    """A folder that the stage `export` has written, opened."""

    about: dict[str, Any]  # model.json
    network: Callable[[np.ndarray], dict[str, np.ndarray]]  # pixels, uint8 (height, width, 3) -> outputs by name, float32
    known: list[dict[str, str]]  # path and label of the known photographs
    embeddings: np.ndarray  # theirs, float32 (n, k)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    quiet_pillow()
    model = load(args.model)
    n_unreadable = 0
    for path, pixels in read(list(find(args.photographs)), model.about["pixels"]):
        found: dict[str, Any] = {"path": path}
        if isinstance(pixels, Refused):
            n_unreadable += 1
            found |= {"decision": "unreadable", "reason": pixels.reason, "detail": pixels.detail}
        else:
            found |= recognise(pixels, model)
        if args.json:
            say(json.dumps(found), sys.stdout)
        else:
            say(to_text(found), sys.stderr if isinstance(pixels, Refused) else sys.stdout)
    return int(n_unreadable > 0)


def say(text: str, file: TextIO) -> None:
    """Print at once; exit if nobody can take it, such as a full disk."""
    try:
        print(text, file=file, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # Python writes what is left when it ends
        raise SystemExit(f"recognise: the answer cannot be written: {error.strerror}.") from None


def load(folder: Path) -> Model:
    """Open a model.

    Raises
    ------
    SystemExit
        there is no model in the folder, it is not whole, or it asks for pixels that we cannot make.
    """
    files = [folder / name for name in ("model.tflite", "photographs.parquet")]
    try:
        about = describe(folder, [file.name for file in files])
    except ValueError as error:
        raise SystemExit(f"recognise: {error}") from None
    check_pixels(about["pixels"])
    known = pq.ParquetFile(files[1]).read(columns=["path", "label", "embedding"])
    interpreter = Interpreter(str(files[0]), num_threads=N_CORES)
    with quiet():
        interpreter.allocate_tensors()
    (pixels,) = (each["index"] for each in interpreter.get_input_details())
    outputs = {each["name"]: each["index"] for each in interpreter.get_output_details()}

    def network(image: np.ndarray) -> dict[str, np.ndarray]:
        interpreter.set_tensor(pixels, image[None])
        interpreter.invoke()
        return {name: interpreter.get_tensor(index)[0] for name, index in outputs.items()}

    return Model(
        about,
        network,
        known.drop_columns("embedding").to_pylist(),
        # `to_numpy` would import pandas, which takes longer than all the rest.
        np.from_dlpack(known["embedding"].combine_chunks().flatten()).reshape(len(known), -1),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Discard what C++ writes to stderr: no setting keeps LiteRT from telling what it computes with."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def find(places: Iterable[str]) -> Iterator[str]:
    """List the files, and in place of a folder the files below it that `ingest` would take or refuse, by path.

    A folder that has none, or cannot be opened, stands for itself.
    """
    for place in places:
        found: list[str] = []
        closed: list[OSError] = []
        for folder, folders, names in os.walk(place, onerror=closed.append):
            folders[:] = [name for name in folders if is_shown(name)]
            paths = [os.path.join(folder, name) for name in names if is_shown(name)]
            found += [path for path in paths if may_be_image(path)]
        found += [error.filename for error in closed if os.path.isdir(place)]
        yield from sorted(found) or [place]


def is_shown(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in SYSTEM


def may_be_image(path: str) -> bool:
    """Tell whether a file claims to be an image, by its name or by how it starts, or cannot say."""
    extension = extension_of(path)
    if extension in RAW:
        return False
    if extension in EXTENSIONS or not os.path.isfile(path):
        return True
    try:
        with open(path, "rb") as file:
            start = file.read(START)
    except OSError:
        return True
    return any(re.match(each, start, re.DOTALL) for each in FORMATS.values())


def read(paths: list[str], wanted: dict[str, Any]) -> Iterator[tuple[str, np.ndarray | Refused]]:
    """Make the pixels of each file, or say why not, in the order of the paths and a little ahead of who takes them."""
    with ThreadPoolExecutor(N_CORES) as pool:
        for start in range(0, len(paths), N_AHEAD):
            some = paths[start : start + N_AHEAD]
            yield from zip(some, pool.map(read_one, some, repeat(wanted)), strict=True)


def read_one(path: str, wanted: dict[str, Any]) -> np.ndarray | Refused:
    """Make the pixels of a file as `ingest` and `featurize` do, uint8 RGB (height, width, 3), or say why not."""
    try:
        status = os.stat(path)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # which may have no end
            return Refused("unreadable", "not a regular file")
        if extension_of(path) in RAW:
            return Refused("not_an_image", "a camera's raw file")
        if (length := status.st_size) > MAX_FILE_MB * 2**20:
            return Refused("too_large", f"{length:,} bytes, more than {MAX_FILE_MB * 2**20:,}")
        image, _ = decode(Path(path).read_bytes(), MAX_PIXELS)
    except Refused as refused:
        return refused
    except IsADirectoryError:
        return Refused("unreadable", "a folder without an image")
    except OSError as error:
        return Refused("unreadable", f"cannot be opened: {error.strerror}")
    file = io.BytesIO()
    image.save(file, "PPM")  # which is the pixels and little else: PNG would take seconds
    return to_pixels(file.getvalue(), wanted)


def recognise(pixels: np.ndarray, model: Model) -> dict[str, Any]:
    """Say what a photograph shows: the decision, its figures, the best labels and the nearest known photographs.

    Parameters
    ----------
    pixels : uint8 array of shape (height, width, 3)
    """
    labels, thresholds = model.about["labels"], model.about["thresholds"]
    outputs = model.network(pixels)
    probabilities, similarities = outputs["probabilities"], outputs["similarities"]
    similarity, strangeness = figure(similarities.max()), figure(outputs["strangeness"])
    best = np.argsort(-probabilities, kind="stable")[:N_TOLD]
    products = model.embeddings @ outputs["embedding"]
    nearest = np.argsort(-products, kind="stable")[:N_TOLD]
    decision = decide(similarity, strangeness, **thresholds)
    return {
        "decision": decision,
        "label": labels[best[0]] if decision == "recognised" else None,
        "calibrated": model.about["calibrated"],
        "similarity": similarity,
        "strangeness": strangeness,
        **thresholds,
        "labels": [
            {"label": labels[i], "probability": figure(probabilities[i]), "similarity": figure(similarities[i])}
            for i in best
        ],
        "nearest": [{**model.known[i], "similarity": figure(products[i])} for i in nearest],
    }


def decide(similarity: float, strangeness: float, min_similarity: float | None, max_strangeness: float | None) -> str:
    """Accept or refuse a photograph; a threshold of None refuses nothing."""
    if max_strangeness is not None and strangeness > max_strangeness:
        return "no_such_photograph"
    if min_similarity is not None and similarity < min_similarity:
        return "unknown_fruit"
    return "recognised"


def figure(value: Any) -> float:
    """Keep what float32 knows of a number around 1."""
    return round(float(value), 6)


def to_text(found: dict[str, Any]) -> str:
    """Write for a person what `recognise` has found, or why a file could not be read."""
    if found["decision"] == "unreadable":
        return escape(f"{found['path']}: {found['reason']}, {found['detail']}")
    first, *others = [f"{each['label']} {chance(each['probability'])}" for each in found["labels"]]
    lines = [f"{found['path']}: {REFUSALS.get(found['decision'], first)}"]
    if found["decision"] == "recognised":
        lines[0] += "" if found["calibrated"] else " (this probability is not calibrated)"
        lines += [f"  then {', '.join(others)}"] if others else []
    limits = (("similarity", "at least", "min_similarity"), ("strangeness", "at most", "max_strangeness"))
    figures = [
        f"{name} {found[name]:.3f}" + ("" if found[limit] is None else f" ({word} {found[limit]:.3f})")
        for name, word, limit in limits
    ]
    lines += [f"  {', '.join(figures)}", "  nearest known photographs:"]
    lines += [f"    {each['similarity']:.3f} {each['label']}: {each['path']}" for each in found["nearest"]]
    return "\n".join(map(escape, lines))


def chance(probability: float) -> str:
    """Write a probability, never as 100 % nor 0 %: it is never that sure."""
    if probability > 0.999:
        return "> 99.9%"
    return "< 0.1%" if probability < 0.001 else f"{probability:.1%}"


def escape(line: str) -> str:
    """Write as Python does what would steer the terminal: a name can have any character."""
    return "".join(
        each if each.isprintable() or unicodedata.category(each) == "Zs" else each.encode("unicode_escape").decode()
        for each in line
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", nargs="+", metavar="PHOTO", help="an image, or a folder of images")
    parser.add_argument("--json", action="store_true", help="one object a line, for programs")
    parser.add_argument("--model", type=Path, default="data/model", help="default: %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    if sys.stdout is None or sys.stderr is None:
        sys.exit("recognise: the answer cannot be written: stdout or stderr is closed.")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a file's name can be any bytes
    sys.exit(main())
