"""Measure what a smaller input of the network costs in accuracy, and gains in time.

usage: python -m benchmarks.input_size IMAGES [--networks efficientnet-lite0 resnet50] [--sizes 224 192 160 128]

IMAGES is a folder of photographs, a folder for each label. The stages run by the commands of dvc.yaml, in a clone of the
last commit, once for each network and size, and without any feature cache. The groups and folds are those of the first size
for all sizes of a network: else another fold, and not the size, could make the difference. resnet50 takes Keras's ImageNet
weights, which it downloads, or data/weights has.

Writes benchmarks/input_size.json, a row at a time, and prints it as a table: seconds of featurize, of the clock and of a
processor, and shares of the photographs recognised by the nearest neighbour and the linear probe, by all features and by the
embedding, and by the classifier. Let nothing else run meanwhile.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.growing import machine
from benchmarks.scale import ENVIRONMENT, ROOT, command_of, run, run_watched

RESULTS = ROOT / "benchmarks/input_size.json"
GROUPS = ("neighbours", "split")
STAGES = ("covariance", "reduce", "baseline", "evaluate", "classify")
HEADINGS = {
    "network": "network",
    "image_size": "pixels",
    "seconds": "featurize, s",
    "processor_seconds": "of a processor",
    "nearest_neighbour.embedding": "nearest, embedding",
    "nearest_neighbour.features": "nearest, features",
    "linear_probe.embedding": "probe, embedding",
    "linear_probe.features": "probe, features",
    "recognition.accuracy": "classifier",
    "recognition.macro_f1": "its macro-F1",
}


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "clone"
        run(ROOT, "git", "clone", "-q", ROOT, clone)
        (clone / "dvc.lock").unlink()  # which names features that a shared cache of DVC may have
        shutil.copytree(ROOT / "data/weights", clone / "data/weights", dirs_exist_ok=True)
        set_parameters(clone, images=str(args.images))
        run_watched(command_of("ingest", clone), clone)
        for network in args.networks:
            for i, size in enumerate(args.sizes):
                set_parameters(clone, backbone={"name": network, "weights": "imagenet", "image_size": size})
                keep(measure(clone, network, size, has_groups=i > 0))
    print(format_table(read_rows()))


def measure(clone: Path, network: str, size: int, has_groups: bool) -> dict[str, Any]:
    """Run all stages from backbone to classify; a row of RESULTS."""
    run_watched(command_of("backbone", clone), clone)
    ENVIRONMENT["FEATURE_CACHE"] = str(clone / "cache")
    took = run_watched(command_of("featurize", clone), clone)
    shutil.rmtree(clone / "cache")
    for stage in STAGES if has_groups else (*GROUPS, *STAGES):
        run_watched(command_of(stage, clone), clone)
    metrics = json.loads((clone / "reports/evaluation/metrics.json").read_text())
    metrics |= json.loads((clone / "data/classifier/metrics.json").read_text())
    found = {"network": network, "image_size": size, "images": metrics["images"]["images"], "machine": machine()}
    found |= {name: took[name] for name in ("seconds", "processor_seconds")}
    for name in HEADINGS:
        section, _, value = name.partition(".")
        if value:
            found[name] = metrics[section][value]
    return found


def set_parameters(clone: Path, **sections: Any) -> None:
    place = clone / "params.yaml"
    place.write_text(yaml.safe_dump(yaml.safe_load(place.read_text()) | sections, sort_keys=False))


def read_rows() -> list[dict[str, Any]]:
    return list(json.loads(RESULTS.read_text())) if RESULTS.exists() else []


def keep(row: dict[str, Any]) -> None:
    """Put the row in the place of one of the same network and size."""
    others = [each for each in read_rows() if any(each[key] != row[key] for key in ("network", "image_size"))]
    rows = sorted([*others, row], key=lambda each: (each["network"], -each["image_size"]))
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


def format_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEADINGS.values()) + " |", "|" + "---|" * len(HEADINGS)]
    for row in rows:
        cells = [f"{row[name]:.1%}" if "." in name else str(row[name]) for name in HEADINGS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=lambda text: Path(text).resolve())
    parser.add_argument("--networks", nargs="+", default=["efficientnet-lite0", "resnet50"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 192, 160, 128])
    return parser.parse_args()


if __name__ == "__main__":
    main()
