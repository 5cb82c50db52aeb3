"""Say what the feature cache holds, a line for each network, size of images, batch size and precision; or empty it.

To empty it deletes as well what `ingest` keeps there of large images.

usage: python -m reports.cache [--clear] FOLDER
"""

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HEADINGS = ("network", "pixels", "batch", "precision", "images", "MB", "folder")


def main(argv: list[str]) -> None:
    is_to_clear = argv[:1] == ["--clear"]
    (place,) = argv[is_to_clear:]
    if "://" in place:
        raise SystemExit(f"cache: {place} is not on this machine; look at it there, or delete it there")
    for path in Path(place).glob("ingest-*.sqlite") if is_to_clear else ():
        path.unlink(missing_ok=True)
    folders = sorted(path.parent for path in Path(place).glob("*/about.json") if "backbone" in json.loads(path.read_text()))
    if not folders:
        print(f"cache: {place} holds no features")
        return
    if is_to_clear:
        for folder in folders:  # and nothing else: FEATURE_CACHE may be a folder that holds other things too
            shutil.rmtree(folder)
        print(f"cache: {len(folders):,} kinds of features are deleted from {place}")
        return
    lines = [describe(folder) for folder in folders]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *lines, strict=True)]
    for line in (HEADINGS, *lines):
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def describe(folder: Path) -> tuple[str, ...]:
    """Describe the features of one folder of the cache, in the order of HEADINGS, without what is being written."""
    about = json.loads((folder / "about.json").read_text())
    backbone, files = about["backbone"], [path for path in folder.rglob("*.parquet") if not path.name.startswith((".", "_"))]
    n_images = 0
    for path in files:
        with suppress(pa.ArrowException, OSError):  # damaged, or deleted just now: the stage says so, and deletes it
            n_images += pq.read_metadata(path).num_rows
    return (
        backbone["name"] if backbone["weights"] == "imagenet" else f"{backbone['name']}, {backbone['weights']}",
        f"{backbone['pixels']['width']} x {backbone['pixels']['height']}",
        str(about["batch_size"]),
        about["precision"],
        f"{n_images:,}",
        f"{sum(path.stat().st_size for path in files) / 1e6:,.1f}",
        folder.name[:8],
    )


if __name__ == "__main__":
    main(sys.argv[1:])
