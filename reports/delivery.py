"""Look at a delivery of photographs as `ingest` would, say what is in it, and take its photographs into a collection.

usage: python -m reports.delivery [--look] [--into COLLECTION] FOLDER

reads   FOLDER      the delivery: a folder for each label, at any depth
        COLLECTION  the photographs that are there already; unless it is said, `images` of params.yaml, or data/mine
writes  COLLECTION  copies of the photographs, each at its path in FOLDER; and `dvc add`

Nothing that is there is written over: if a file has the path of another one with other content, nothing is taken in. What
`ingest` would refuse or ignore is named, and stays where it is. --look takes nothing in. It is no stage of the pipeline.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from stages import ingest

SAMPLE, MINE = "data/sample", "data/mine"
SOME = 5  # examples of each kind that are named
HIDDEN = ("Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir")  # of operating systems, besides names that begin with a dot
SIGNS = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}


class File(NamedTuple):
    """Hold what a look at one file of the delivery found."""

    path: str  # relative to FOLDER
    image_id: str  # SHA-256 of its bytes, hexadecimal
    size: int  # bytes
    kind: str  # for an image its format, such as JPEG
    width: int  # pixels, upright
    height: int
    reason: str = ""  # why it is not taken in
    detail: str = ""

    @property
    def label(self) -> str:
        return Path(self.path).parent.name


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    params = yaml.safe_load(Path("params.yaml").read_text())
    collection = Path(args.into or (MINE if params["images"] == SAMPLE else params["images"]))
    paths, ignored = find_files(args.folder)
    check_places(args.folder, collection)

    settings = params["ingest"]
    limits = {"max_bytes": settings["max_file_mb"] * 2**20, "max_pixels": settings["max_pixels"]}
    with ProcessPoolExecutor() as pool:
        looked = pool.map(partial(look_at, args.folder, **limits), paths, chunksize=16)
        files = list(tqdm(looked, "look", len(paths), unit="file", leave=False, disable=None))  # on a terminal only
    images = [file for file in files if not file.reason]
    refused = [file for file in files if file.reason and file.reason != "ignored"]
    ignored += [file.path for file in files if file.reason == "ignored"]
    known = find_known(collection, {file.size for file in images})
    for line in describe(args.folder, images, refused, ignored, settings["group_pattern"]):
        print(line)
    for line in compare(images, collection, known):
        print(line)

    if collisions := [file.path for file in images if collides(file, collection, known)]:
        raise SystemExit(
            f"Nothing is taken in: {name_some(collisions)} in {collection} already, with other content. Give the new files "
            "other names; or delete the old ones, if the new ones replace them."
        )
    new = [file.path for file in images if file.path not in known]
    if not args.look and new:
        take_in(args.folder, collection, new)
        subprocess.run([sys.executable, "-m", "dvc", "add", "--quiet", str(collection)], check=True)
        print(f"{len(new):,} photographs are in {collection} now, and DVC knows them.")
        print(f"Next:  git add {shlex.quote(str(collection))}.dvc && git commit -m 'A delivery of {len(new):,} photographs'")
        print("       make run" if params["images"] == str(collection) else f"       {experiment(collection)}")


def check_places(folder: Path, collection: Path) -> None:
    """Refuse a collection that a run would write over, and a delivery that lies in it, by SystemExit."""
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"].values()
    if str(collection) in {output for stage in stages for output in stage.get("outs", [])}:
        raise SystemExit(f"{collection} belongs to the pipeline, which writes it again: say INTO={MINE}, or another folder")
    outside, inside = folder.resolve(), collection.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise SystemExit(f"{folder} and {collection} lie one in the other: a delivery comes from outside of the collection")


def find_files(folder: Path) -> tuple[list[str], list[str]]:
    """Find all files below the folder, as paths relative to it: those to look at, and those that are hidden.

    Raises
    ------
    SystemExit
        it is no folder, holds no file, or holds a link or a file that no folder labels
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder} is no folder. Say which one holds the delivery: make add FOLDER=…")
    links, files = [], []
    for parent, names_of_folders, names in os.walk(folder):
        here = [Path(parent, name) for name in (*names_of_folders, *names)]
        links += [str(path.relative_to(folder)) for path in here if path.is_symlink()]
        files += [path.relative_to(folder) for path in here if path.is_file()]
    hidden = [file for file in files if any(part.startswith(".") or part in HIDDEN for part in file.parts)]
    paths = sorted(str(file) for file in {*files} - {*hidden})
    if links:
        raise SystemExit(f"In {folder}, {name_some(links)} a link to elsewhere: put there what it links to")
    if not paths:
        raise SystemExit(f"{folder} holds no file, or only hidden ones")
    bare = [path for path in paths if os.sep not in path]
    if len(bare) == len(paths):
        raise SystemExit(f"{folder} has no folders for the labels. If it is one label, say the folder that holds it")
    return paths, sorted(map(str, hidden))


def look_at(folder: Path, path: str, *, max_bytes: int, max_pixels: int) -> File:
    """Look at one file as `ingest` does."""
    size = (folder / path).stat().st_size
    try:
        if size > max_bytes:
            raise ingest.Refused("too_large", f"{size:,} bytes, more than {max_bytes:,}")
        if os.sep not in path:
            raise ingest.Refused("no_label", "it is in no folder that would be its label")
        content = (folder / path).read_bytes()
        image, *_ = ingest.decode(content, max_pixels)
    except OSError as error:
        return File(path, "", size, "", 0, 0, "unreadable", str(error))
    except ingest.Refused as refused:
        is_named_so = path.lower().rpartition(".")[2] in ingest.EXTENSIONS
        reason = refused.reason if is_named_so or refused.reason != "not_an_image" else "ignored"
        return File(path, "", size, "", 0, 0, reason, refused.detail)
    return File(path, hashlib.sha256(content).hexdigest(), size, format_of(content), image.width, image.height)


def format_of(content: bytes) -> str:
    """Name the format of an image by its first bytes, as people call it."""
    return next((name for sign, name in SIGNS.items() if content.startswith(sign)), "other")


def find_known(collection: Path, sizes: set[int]) -> dict[str, str]:
    """Find the files of the collection that have one of these sizes, in bytes: the SHA-256 of each by its path there."""
    files = [path for path in collection.rglob("*") if path.is_file() and path.stat().st_size in sizes]
    return {str(path.relative_to(collection)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def collides(file: File, collection: Path, known: Mapping[str, str]) -> bool:
    """Tell whether the collection has something else where this file would go."""
    return os.path.lexists(collection / file.path) and known.get(file.path) != file.image_id


def describe(folder: Path, images: list[File], refused: list[File], ignored: list[str], group_pattern: str) -> list[str]:
    """Say in a few lines what the delivery holds."""
    labels, kinds = Counter(file.label for file in images), Counter(file.kind for file in images)
    size = sum(file.size for file in images)
    lines = [f"{folder}: {len(images):,} photographs of {len(labels):,} labels, {size / 1e6:,.1f} MB"]
    if images:
        least, most = (pick(images, key=lambda file: file.width * file.height) for pick in (min, max))
        sizes = " to ".join(dict.fromkeys(f"{file.width:,} x {file.height:,}" for file in (least, most)))
        lines += [f"  formats   {count_each(kinds)}; {sizes} pixels", f"  labels    {count_each(labels)}"]
        twins = len(images) - len({file.image_id for file in images})
        lines += [f"  copies    {twins:,} have the same bytes as another one of the delivery"] * bool(twins)
        unnamed = sum(not re.search(group_pattern, Path(file.path).name) for file in images)
        said = "names tell no film; the photographs themselves tell which are nearly equal"
        lines += [f"  films     {unnamed:,} {said}"] * bool(unnamed)
    for reason, n in Counter(file.reason for file in refused).most_common():
        some = [file for file in refused if file.reason == reason]
        lines += [f"  refused   {n:,} {reason}:"]
        lines += [f"            {file.path}: {file.detail}" for file in some[:SOME]] + ["            …"] * (n > SOME)
    if ignored:
        kinds = Counter(Path(path).suffix.lower() or Path(path).name for path in ignored)
        lines += [f"  ignored   {len(ignored):,} that are no photographs: {count_each(kinds)}"]
    return lines


def compare(images: list[File], collection: Path, known: Mapping[str, str]) -> list[str]:
    """Say in a few lines what of the delivery the collection has already."""
    there = [file for file in images if known.get(file.path) == file.image_id]
    paths_of: dict[str, list[str]] = {}
    for path, image_id in known.items():
        paths_of.setdefault(image_id, []).append(path)
    twins = [(file.path, paths_of[file.image_id][0]) for file in images if file not in there and file.image_id in paths_of]
    others = [pair for pair in twins if Path(pair[0]).parent.name != Path(pair[1]).parent.name]
    labels = {path.name for path in collection.rglob("*") if path.is_dir()}
    new = sorted({file.label for file in images} - labels) if labels else []
    lines = [f"  new       labels that {collection} does not have: {', '.join(new)}"] * bool(new)
    lines += [f"  known     {len(there):,} are in {collection} already"] * bool(there)
    for pairs, what in ((twins, "under another name"), (others, "under another label: one of the two is wrong")):
        lines += [f"  known     {len(pairs):,} are in {collection} {what}"] * bool(pairs)
        lines += [f"            {path} = {twin}" for path, twin in pairs[:SOME]]
        lines += ["            …"] * (len(pairs) > SOME)
    return lines


def take_in(folder: Path, collection: Path, paths: list[str]) -> None:
    """Copy files into the collection: all of them, or none.

    All are copied beside the collection first, and then renamed to their places, which cost no space and little time.
    """
    beside = collection.with_name(f"{collection.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    placed: list[Path] = []
    try:
        for path in paths:
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / path, beside / path)
        for path in paths:
            target = collection / path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(beside / path, target)  # fails if somebody has put a file there meanwhile, as rename does not
            placed.append(target)
    except BaseException:
        for target in placed:
            target.unlink()
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def experiment(collection: Path) -> str:
    """Return the command that runs the pipeline on the collection; Hydra reads the value, and a shell the whole."""
    name = str(collection)
    is_plain = all(letter.isalnum() or letter in "/_-." for letter in name)
    value = name if is_plain else "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return f"dvc exp run -S {shlex.quote(f'images={value}')}"


def count_each(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items(), key=lambda each: (-each[1], each[0])))


def name_some(names: Iterable[str]) -> str:
    """Name the first SOME, and end with is or are."""
    first, *rest = sorted(names)
    shown = ", ".join([first, *rest[: SOME - 1]])
    return f"{shown} {f'and {len(rest) - SOME + 1:,} others are' if len(rest) >= SOME else 'are' if rest else 'is'}"


def parse_args(argv: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Not every shell reads ~ in FOLDER=~/photographs.
    parser.add_argument("folder", type=lambda text: Path(text).expanduser())
    parser.add_argument("--into", help="the folder of the collection")
    parser.add_argument("--look", action="store_true", help="take nothing in")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
