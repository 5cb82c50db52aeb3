"""Say what the feature cache holds: a line for each network, size of images, batch size and precision.

usage: python -m reports.cache FOLDER
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HEADINGS = ("network", "pixels", "batch", "precision", "images", "MB", "folder")


def main(argv: list[str]) -> None:
    (cache,) = map(Path, argv)
    lines = [describe(about.parent) for about in sorted(cache.glob("*/about.json"))]
    if not lines:
        print(f"cache: {cache} holds no features")
        return
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
