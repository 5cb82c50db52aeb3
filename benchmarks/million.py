"""Measure `ingest` with many files, and with the same files in archives: seconds, and memory of each process.

usage: million.py PHOTOGRAPHS FOLDER [--n_files 1000000]

PHOTOGRAPHS is a folder of JPEG files, a folder for each label. Writes to FOLDER/files as many copies as are wanted, each
with a comment that makes it another file. Packs them into FOLDER/archives. Runs `ingest` on both, through the door as DVC
does. What is there already is not made again. Prints a table, and writes benchmarks/million.json.

Memory is what the processes of one kind have together, at most, read twice a second. Shared pages count once (Linux: PSS),
and the page cache does not count. Seconds of the processors tell more than seconds where other work goes on beside.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import yaml

from benchmarks.growing import ROOT, machine
from bootstrap.parameters import flags
from reports import pack

# What a process is, by a part of its command line; the first that fits.
KINDS = {
    "JVM": "java",
    "workers": "pyspark.daemon",
    "door": "bootstrap.submit",
    "driver": "ingest.py",
}


def main() -> None:
    args = parse_args()
    files, archives = args.folder / "files", args.folder / "archives"
    if not files.exists():
        copy(args.photographs, files, args.n_files)
    if not archives.exists():
        pack.main([str(files), str(archives)])
    if not (args.folder / ".dvc").exists():  # so that the door looks whether DVC hashes all
        subprocess.run(["dvc", "init", "-q", "--no-scm"], cwd=args.folder, check=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())["ingest"]
    runs = {source.name: ingest(args.folder, source, params) for source in (files, archives)}
    for name, run in runs.items():
        print(f"{name:<10}{run['seconds']:8,.0f} s")
        for kind, mib in run["mib"].items():
            print(f"  {kind:<8}{run['cpu_seconds'][kind]:8,} s of the processors {mib:8,} MiB")
    results = {"machine": machine(), "files": args.n_files, "archives": sum(1 for _ in archives.iterdir()), "runs": runs}
    (ROOT / "benchmarks/million.json").write_text(json.dumps(results, indent=2) + "\n")


def copy(photographs: Path, files: Path, n: int) -> None:
    """Write n files that differ: files/COPY/LABEL/NAME, with the number of the copy as a comment of the JPEG."""
    originals = sorted(path for path in photographs.rglob("*.jp*g") if path.is_file())
    contents = [path.read_bytes() for path in originals]
    partial = files.with_name("files.partial")
    shutil.rmtree(partial, ignore_errors=True)
    every = ((copy, path, content) for copy in count() for path, content in zip(originals, contents, strict=True))
    for copy_, path, content in islice(every, n):
        comment = f"copy {copy_:06}".encode()
        place = partial / f"{copy_:06}" / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2) + comment + content[2:])
    partial.rename(files)


def ingest(folder: Path, source: Path, params: dict[str, Any]) -> dict[str, Any]:
    """Run ingest as DVC does, and return what it took."""
    stage = ["spark-submit", str(ROOT / "stages/ingest.py"), str(source), "ingested", *flags(params)]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "bootstrap.submit", *stage],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    most: Counter[str] = Counter()
    seconds: dict[int, tuple[str, float]] = {}  # of the processors, by the id of a process
    while process.poll() is None:
        now: Counter[str] = Counter()
        for pid, kind, kib, cpu_seconds in processes(process.pid):
            now += Counter({kind: kib, "all": kib})
            seconds[pid] = kind, cpu_seconds
        most |= now
        time.sleep(0.5)
    said, _ = process.communicate()
    took = time.monotonic() - started
    if process.returncode:
        raise SystemExit(said[-3000:])
    print(said.splitlines()[-1])
    return {
        "seconds": round(took, 1),
        "load": round(os.getloadavg()[2], 1),  # processes that wanted a processor, in the last quarter of an hour
        "cpu_seconds": {kind: round(sum(n for each, n in seconds.values() if kind in (each, "all"))) for kind in most},
        "mib": {kind: kib // 2**10 for kind, kib in most.items()},
    }


def processes(pid: int) -> Iterator[tuple[int, str, int, float]]:
    """Yield of a process and of all that it has started: id, kind, memory in KiB, and seconds of the processors."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        kind = next((kind for kind, part in KINDS.items() if part in words), "other")
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        yield pid, kind, int(rollup.partition("Pss:")[2].split()[0]), sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from processes(int(child))
    except (OSError, IndexError):
        pass  # it has ended


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photographs", type=lambda text: Path(text).resolve())
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--n_files", type=int, default=1_000_000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
