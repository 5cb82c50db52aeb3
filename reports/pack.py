"""Pack a folder of labelled photographs into a few ZIP archives, which `ingest` reads as it reads folders.

usage: python -m reports.pack [--by_label] [--mb MB] FOLDER INTO

reads   FOLDER  photographs, a folder for each label, at any depth; all files in folders are packed, but no hidden ones
writes  INTO    FOLDER.part-XXXXXXXXXXXX.zip, some MB each; with --by_label, LABEL.part-XXXXXXXXXXXX.zip where LABEL was

The same files give the same bytes. Paths are packed in order, and the names of files alone tell where one archive ends and
the next starts. So one more photograph changes one archive, or two. Nothing is written over, and FOLDER stays as it is. It
is no stage of the pipeline.
"""

import argparse
import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reports.delivery import place
from stages import ingest

# Stored, not deflated: photographs do not shrink. A ZIP archive has a checksum of each file and a directory, a tar neither.
HEADER = {"date_time": (1980, 1, 1, 0, 0, 0)}  # the first that there is
MOST = 2  # times as large as wanted, at most; and the least is half of it


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder, into = args.folder.resolve(), args.into.resolve()
    if not folder.is_dir():
        raise SystemExit(f"pack: {args.folder} is no folder. Say which one holds the photographs: make pack FOLDER=…")
    if into.is_relative_to(folder) or folder.is_relative_to(into):
        raise SystemExit(f"pack: {args.folder} and {args.into} lie one in the other: pack into another folder")
    files = find(folder)
    if not files:
        raise SystemExit(f"pack: {args.folder} holds no file, or only hidden ones")
    archives = dict(group(folder.name, files, args.mb * 10**6, args.by_label))
    assert sum(map(len, archives.values())) == len(files)  # else two had one name
    if there := [into / name for name in archives if os.path.lexists(into / name)]:
        raise SystemExit(f"pack: {len(there):,} of {len(archives):,} archives are there already, such as {there[0]}")

    bar = tqdm(desc="pack", total=len(archives), unit="archive", leave=False, disable=None)

    def make(name: str, target: Path) -> None:
        write(target, folder, archives[name])
        bar.update()

    with bar:
        place(into, archives, make)
    size = sum((into / name).stat().st_size for name in archives)
    print(f"{len(files):,} files are in {len(archives):,} archives of {args.into} now, {size / 1e6:,.1f} MB")


def find(folder: Path) -> list[tuple[str, int]]:
    """List path and length of the files to be packed, in order.

    Raises
    ------
    SystemExit
        an image lies in no folder; one is no regular file, is an archive itself, or has a name that is not in UTF-8
    """
    why = ingest.reader_of_names([], [], share=1)
    there = sorted((path, length) for path, length in ingest.list_local(str(folder)) if not why(path, False))
    if loose := [path for path, _ in there if "/" not in path and ingest.extension_of(path) in ingest.EXTENSIONS]:
        raise SystemExit(f"pack: {loose[0]} lies in no folder, so it has no label: move it into one")
    files = [(path, length) for path, length in there if "/" in path]
    for path, length in files:
        if length < 0:
            raise SystemExit(f"pack: {path} is no regular file, nor a link to one")
        if ingest.is_archive_name(path):
            raise SystemExit(f"pack: {path} is an archive, and `ingest` reads none in another: move it away")
        if ingest.show(path) != path or "\\" in path:
            raise SystemExit(
                f"pack: {ingest.show(path)} has a name that not every program reads in a ZIP archive: rename it"
            )
    return files


def group(name: str, files: Iterable[tuple[str, int]], size: int, by_label: bool) -> Iterator[tuple[str, list[str]]]:
    """Share files out to archives.

    Parameters
    ----------
    name : of the archives, if they are not named by labels
    files : path and length of each, in order of the paths
    size : bytes of an archive, about

    Yields
    ------
    name of the archive and the paths in it. An archive ends after a file whose name's hash says so, about once in `size`
    bytes: a file more or less changes no end far from it.
    """
    members: list[str] = []
    n_bytes, kept = 0, ""
    for path, length in files:
        label = path.rpartition("/")[0] if by_label else name
        if members and (label != kept or n_bytes >= MOST * size):
            yield named(kept, members), members
            members, n_bytes = [], 0
        kept = label
        members.append(path)
        n_bytes += length
        if n_bytes > size / 2 and int(digest(path), 16) < 2 * length / size * 2**256:
            yield named(kept, members), members
            members, n_bytes = [], 0
    if members:
        yield named(kept, members), members


def named(name: str, members: list[str]) -> str:
    """Name an archive by its first file, so that one more archive gives no other one a new name."""
    return f"{name}.part-{digest(members[0])[:12]}.zip"


def digest(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()


def write(archive: Path, folder: Path, members: list[str]) -> None:
    """Write an archive of files below the folder; its bytes follow from their paths and contents alone."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as packed:
        for path in members:
            header = zipfile.ZipInfo(path, **HEADER)
            header.create_system, header.external_attr = 3, 0o100644 << 16  # of Unix, readable by all
            packed.writestr(header, (folder / path).read_bytes())


def parse_args(argv: list[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=lambda text: Path(text).expanduser())
    parser.add_argument("into", type=lambda text: Path(text).expanduser())
    parser.add_argument("--by_label", action="store_true", help="archives of one label each")
    parser.add_argument("--mb", type=ingest.between(int, 1, 1000), default=64, help="MB of an archive, about")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
