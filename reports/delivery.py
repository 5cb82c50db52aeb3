"""Look at a delivery of photographs as `ingest` would, say what is in it, and take its photographs into a collection.

usage: python -m reports.delivery [--look] [--into COLLECTION] FOLDER

reads   FOLDER      the delivery: a folder for each label, at any depth
        COLLECTION  the photographs that are there already; unless it is said, `images` of params.yaml, or data/mine
writes  COLLECTION  copies of the photographs, each at its path in FOLDER; and `dvc add`

Nothing that is there is written over: if a file has the path of another one with other content, nothing is taken in. What
`ingest` would refuse or ignore is named, and stays where it is. Only its `share` is of a run, and not of a collection. An
archive that holds a photograph is taken in whole, with all that is in it.
--look takes nothing in. It is no stage of the pipeline.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from bootstrap import parameters
from bootstrap.job import sha256
from stages import ingest

SAMPLE, MINE = "data/sample", "data/mine"
SOME = 5  # examples of each kind that are named


class File(NamedTuple):
    """Hold what a look at one file of the delivery found."""

    path: str  # relative to FOLDER; of a file in an archive, it goes on within
    size: int  # bytes
    reason: str = ""  # why it is not taken in: one of ingest.REASONS or ingest.PASSED_OVER
    detail: str = ""  # of PASSED_OVER, the kind
    label: str = ""  # this and the rest of an image only
    image_id: str = ""  # SHA-256 of its bytes, hexadecimal
    format: str = ""  # such as JPEG
    width: int = 0  # pixels, upright
    height: int = 0
    archive: str = ""  # the path of the archive that it is in


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    params = yaml.safe_load(Path("params.yaml").read_text())
    collection = Path(args.into or (MINE if params["images"] == SAMPLE else params["images"]))
    settings = ingest.parse_args(["", "", *parameters.flags(params["ingest"])])
    check_places(args.folder, collection)

    files = look(args.folder, settings)
    images = [file for file in files if not file.reason]
    in_folder = take_whole(args.folder, images)
    sizes = {file.size for file in [*images, *in_folder]}
    there, known = look_there(collection, settings, sizes) if collection.is_dir() else ({}, {})
    for line in describe(args.folder, files, settings.group_pattern):
        print(line)
    for line in compare(images, collection, there, known, settings):
        print(line)

    if collisions := [file.path for file in in_folder if collides(file, collection, known)]:
        raise SystemExit(
            f"Nothing is taken in: {name_some(collisions)} in {collection} already, with other content. Give the new files "
            "other names; or delete the old ones, if the new ones replace them."
        )
    new = [file.path for file in in_folder if file.path not in known]
    n_new = sum((file.archive or file.path) in new for file in images)
    if not args.look and new:
        place(collection, new, lambda path, target: shutil.copyfile(args.folder / path, target))
        subprocess.run([sys.executable, "-m", "dvc", "add", "--quiet", str(collection)], check=True)
        print(f"{n_new:,} photographs are in {collection} now, and DVC knows them.")
        print(f"Next:  git add {shlex.quote(str(collection))}.dvc && git commit -m 'A delivery of {n_new:,} photographs'")
        print("       make run" if params["images"] == str(collection) else f"       {experiment(collection)}")


def check_places(folder: Path, collection: Path) -> None:
    """Refuse by SystemExit a delivery that is no folder or lies in the collection, and a collection that runs write."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} is no folder. Say which one holds the delivery: make add FOLDER=…")
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"].values()
    if str(collection) in {output for stage in stages for output in stage.get("outs", [])}:
        raise SystemExit(f"{collection} belongs to the pipeline, which writes it again: say INTO={MINE}, or another folder")
    outside, inside = folder.resolve(), collection.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise SystemExit(f"{folder} and {collection} lie one in the other: a delivery comes from outside of the collection")


def look(folder: Path, settings: argparse.Namespace) -> list[File]:
    """Look at each file below the folder, with the parameters of `ingest`.

    Raises
    ------
    SystemExit
        the folder has no file that `ingest` would read, a link to a folder, or no folder that would be a label
    """
    candidates, passed_over = find_files(folder, settings)
    if not candidates:
        raise SystemExit(f"{folder} holds no file, or only such as `ingest` does not read")
    if not any("/" in path or ingest.is_archive_name(path) for path, _ in candidates):
        raise SystemExit(f"{folder} has no folders for the labels. If it is one label, say the folder that holds it")
    with ProcessPoolExecutor(initializer=ingest.quiet_pillow) as pool:
        looked = pool.map(partial(look_at, folder, settings), candidates, chunksize=16)
        # A bar on a terminal only.
        bar = tqdm(looked, "look", len(candidates), unit="file", leave=False, disable=None)
        return passed_over + [file for files in bar for file in files]


def find_files(folder: Path, settings: argparse.Namespace) -> tuple[list[tuple[str, int]], list[File]]:
    """List all files below the folder: path and length of those that `ingest` would read, and those that it would not."""
    why = ingest.reader_of_names(settings.take, settings.leave_out, share=1)
    candidates, passed_over = [], []
    for path, length in sorted(ingest.list_local(str(folder))):
        if not (reason := why(path, ingest.is_archive_name(path))):
            candidates.append((path, length))
        else:
            passed_over.append(File(ingest.show(path), length, *reason))
    return candidates, passed_over


def look_at(folder: Path, settings: argparse.Namespace, candidate: tuple[str, int]) -> list[File]:
    """Look at a file, or at each file of an archive."""
    path, length = candidate
    why = ingest.reader_of_names(settings.take, settings.leave_out, share=1)
    seen: list[File] = []
    try:
        for file in ingest.files_in(os.fsencode(folder), os.fsencode(path), length, None):
            seen.append(look_into(file, path, settings, why))
    except ingest.Refused as refused:
        seen.append(File(ingest.show(path), length, refused.reason, refused.detail))
    except OSError as error:
        raise SystemExit(f"add: {error}") from None
    return seen


def look_into(file: ingest.File, outer: str, settings: argparse.Namespace, why: ingest.Why) -> File:
    path = os.fsdecode(file.path)
    archive, shown = outer if path != outer else "", ingest.show(file.path)
    if archive and (passed_over := why(path, False)):
        return File(shown, file.length, *passed_over, archive=archive)
    limits = {"max_bytes": settings.max_file_mb * 2**20, "max_pixels": settings.max_pixels, "min_side": settings.min_side}
    try:
        content, looks = ingest.open_file(file, **limits)
    except ingest.Refused as refused:
        return File(shown, file.length, refused.reason, refused.detail, archive=archive)
    label = ingest.label_of(file.labelled, settings.label_depth) or ""
    image_id, format = hashlib.sha256(content).hexdigest(), ingest.format_of(content) or ""
    return File(path, file.length, "", "", label, image_id, format, looks.width, looks.height, archive)


def take_whole(folder: Path, images: list[File]) -> list[File]:
    """List the files to be taken in: photographs, and archives that hold some."""
    archives = sorted({file.archive for file in images if file.archive})
    whole = [File(path, (folder / path).stat().st_size, image_id=sha256(folder / path)) for path in archives]
    return [*(file for file in images if not file.archive), *whole]


def look_there(collection: Path, settings: argparse.Namespace, sizes: set[int]) -> tuple[dict[str, str], dict[str, str]]:
    """List the photographs of the collection, which are not decoded again.

    Returns
    -------
    label of each, by path; the SHA-256 of those of these sizes, and of the archives of these sizes, by path
    """
    labels: dict[str, str] = {}
    known: dict[str, str] = {}
    for path, file in walk(collection, settings):
        if file is None:
            known |= {path: sha256(collection / path)} if (collection / path).stat().st_size in sizes else {}
            continue
        labels[path] = ingest.label_of(file.labelled, settings.label_depth) or ""
        if file.length in sizes and not file.refused:
            try:
                known[path] = hashlib.sha256(file.read()).hexdigest()
            except ingest.Refused:
                del labels[path]
    return labels, known


def walk(collection: Path, settings: argparse.Namespace) -> Iterator[tuple[str, ingest.File | None]]:
    """Yield path and file of each photograph of the collection, and the path of each archive."""
    why = ingest.reader_of_names(settings.take, settings.leave_out, share=1)
    for path, length in find_files(collection, settings)[0]:
        try:
            for file in ingest.files_in(os.fsencode(collection), os.fsencode(path), length, None):
                inner = os.fsdecode(file.path)
                if inner == path or not why(inner, False):
                    yield inner, file
        except ingest.Refused:
            pass  # `ingest` says so
        if ingest.is_archive_name(path):
            yield path, None


def collides(file: File, collection: Path, known: Mapping[str, str]) -> bool:
    """Tell whether the collection has something else where this file would go."""
    return os.path.lexists(collection / file.path) and known.get(file.path) != file.image_id


def describe(folder: Path, files: list[File], group_pattern: str) -> list[str]:
    """Say in a few lines what the delivery holds."""
    images = [file for file in files if not file.reason]
    ignored = [file for file in files if file.reason in ingest.PASSED_OVER]
    labels = Counter(file.label for file in images)
    size = sum(file.size for file in images)
    lines = [f"{folder}: {len(images):,} photographs of {len(labels):,} labels, {size / 1e6:,.1f} MB"]
    if images:
        least, most = (pick(images, key=lambda file: file.width * file.height) for pick in (min, max))
        sizes = " to ".join(dict.fromkeys(f"{file.width:,} x {file.height:,}" for file in (least, most)))
        lines += [f"  formats   {count_each(Counter(file.format for file in images))}; {sizes} pixels"]
        lines += [f"  labels    {count_each(labels)}"]
        twins = len(images) - len({file.image_id for file in images})
        lines += [f"  copies    {twins:,} have the same bytes as another one of the delivery"] * bool(twins)
        films = [ingest.film_of(file.label, Path(file.path).name, group_pattern) for file in images]
        said = "names tell no film; the photographs themselves tell which are nearly equal"
        lines += [f"  films     {films.count(None):,} {said}"] * (None in films)
    for reason, n in Counter(file.reason for file in files if file.reason in ingest.REASONS).most_common():
        some = [file for file in files if file.reason == reason]
        lines += [f"  refused   {n:,} {reason}:"]
        lines += [f"            {file.path}: {file.detail}" for file in some[:SOME]] + ["            …"] * (n > SOME)
    if ignored:
        lines += [f"  ignored   {len(ignored):,} files: {count_each(Counter(file.detail for file in ignored))}"]
    return lines


def compare(
    images: list[File],
    collection: Path,
    there: Mapping[str, str],
    known: Mapping[str, str],
    settings: argparse.Namespace,
) -> list[str]:
    """Say in a few lines what of the delivery the collection has already, and what `ingest` would say of both together.

    Parameters
    ----------
    there : labels of the photographs of the collection, by path
    known : the SHA-256 of some of them, by path
    """
    paths_of: dict[str, list[str]] = {}
    for path in known.keys() & there.keys():
        paths_of.setdefault(known[path], []).append(path)
    others = [file for file in images if known.get(file.path) != file.image_id]
    known_as = [(file, min(paths_of[file.image_id])) for file in others if file.image_id in paths_of]
    twins = [(file.path, path) for file, path in known_as]
    astray = [(file.path, path) for file, path in known_as if file.label != there[path]]
    labels = {label for label in there.values() if label}
    new = sorted({file.label for file in images} - labels) if labels else []
    lines = [f"  new       labels that {collection} does not have: {', '.join(new)}"] * bool(new)
    n_same = len(images) - len(others)
    lines += [f"  known     {n_same:,} are in {collection} already"] * bool(n_same)
    for pairs, what in ((twins, "under another name"), (astray, "under another label: one of the two is wrong")):
        lines += [f"  known     {len(pairs):,} are in {collection} {what}"] * bool(pairs)
        lines += [f"            {path} = {ingest.show(twin)}" for path, twin in pairs[:SOME]]
        lines += ["            …"] * (len(pairs) > SOME)

    together = {**there, **{file.path: file.label for file in images}}
    counts = Counter((label, ingest.show(path).rpartition("/")[0]) for path, label in together.items() if label)
    folders = sorted((label, folder, n) for (label, folder), n in counts.items())
    lines += [f"  together  {line}" for line in ingest.say_labels(folders, settings.label_depth)]
    end = "; `ingest` would end there" if settings.on_breach == "end" else ""
    return lines + [
        f"  together  {line}{end}" for line in ingest.breaches(folders, settings.labels, settings.min_images_per_label)
    ]


def place(into: Path, paths: Collection[str], make: Callable[[str, Path], object]) -> None:
    """Make files below a folder, all of them or none, and write over nothing.

    All are made beside the folder first, and then linked to their places, which costs no space and little time.

    Parameters
    ----------
    paths : relative to the folder
    make : takes a path, and where to make the file
    """
    beside = into.with_name(f"{into.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    placed: list[Path] = []
    try:
        for path in paths:
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            make(path, beside / path)
        for path in paths:
            target = into / path
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
