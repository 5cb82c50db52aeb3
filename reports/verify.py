"""Hash every file of DVC's cache and every output anew, delete those that are damaged, and say how to have them again.

usage: python -m reports.verify

DVC knows a file's MD5 by its size and by when it was changed, and does not read it again: a flipped bit, or a disk that lost
power, changes neither. Files that people have changed since are none of this command's business: DVC sees them.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dvc.output import Output
from dvc.repo import Repo
from tqdm import tqdm

THREADS = 2 * (os.cpu_count() or 1)  # hashing waits for the disk, too


def main() -> int:
    with Repo() as repo:
        cache, outs = repo.cache.local, [out for out in repo.index.outs if out.use_cache]
        kept = {Path(cache.oid_to_path(oid)): oid.removesuffix(".dir") for oid in cache.all()}
        there = {path: md5 for out in outs for path, md5 in files_of(out)}
        lost = [*delete_damaged(kept), *delete_damaged(there)]
        if lost:
            for out in outs:
                if out.exists and not out.changed_checksum():
                    out.commit()  # what is whole in the workspace goes into the cache again
    print(f"verify: {len(kept):,} files of DVC's cache and {len(there):,} in the workspace; {len(lost):,} damaged, deleted")
    for path in lost:
        print(f"  {os.path.relpath(path)}{', and made again' * path.exists()}")
    if not all(path.exists() for path in lost):
        print(
            "Next:  dvc checkout   takes what is whole in DVC's cache\n"
            "       dvc pull       takes what the remote has\n"
            "       dvc repro      computes again what neither has; a photograph must come from where you had it"
        )
    return bool(lost)


def delete_damaged(files: dict[Path, str]) -> list[Path]:
    """Delete each file whose MD5, hexadecimal, is not this one, and return their paths, sorted."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = tqdm(pool.map(md5_of, files), "hashing", total=len(files), unit=" files", disable=None, leave=False)
        damaged = sorted(path for path, md5 in zip(files, found, strict=True) if md5 != files[path])
    for path in damaged:
        path.unlink()
    return damaged


def files_of(out: Output) -> Iterator[tuple[Path, str]]:
    """Yield each file of an output that DVC takes for unchanged since it was hashed, with that MD5."""
    for path in out.fs.find(out.fs_path):
        _, known = out.repo.state.get(path, out.fs)
        if known:
            yield Path(path), known.value


def md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
