"""Measure what the exported model says of pictures that are no fruit, and of fruit on other backgrounds; and how fast it is.

usage: python -m benchmarks.recognise IMAGES [--model data/model] [--n_images 500]

IMAGES is the folder of photographs, on white, that the model has learnt. Pictures of other things are parts of the two
photographs of scikit-learn, a temple and a flower. Fruit is cut out of its white background and laid on the same pictures.
The model has learnt these fruits, so what is lost is lost by the background alone. Prints a table.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from app.recognise import Model, find, load, recognise

WHITE = 235  # of 255: what is lighter, in all three colours, is background
STARTS = 10


def main() -> None:
    args = parse_args()
    model = load(Path(args.model))
    random = np.random.default_rng(0)
    paths = random.permutation(list(find([args.images])))[: args.n_images].tolist()
    scenes = [Image.fromarray(each) for each in load_sample_images().images]
    levels = range(0, 256, 51)
    sets: dict[str, Iterable[Image.Image]] = {
        "parts of a temple and of a flower": parts_of(scenes),
        "plain colours": (Image.new("RGB", (100, 100), colour) for colour in itertools.product(levels, repeat=3)),
        "noise": (Image.fromarray(random.integers(0, 256, (100, 100, 3), np.uint8)) for _ in range(50)),
    }
    for name, images in sets.items():
        said = Counter(answer(image, model)["decision"] for image in images)
        print(f"{name:<36} {said.total():>6,}   accepted {said['recognised'] / said.total():.1%}   {dict(said)}")
    photographs = [(Path(path).parent.name, Image.open(path).convert("RGB")) for path in paths]
    backgrounds = [part.resize((100, 100)) for part in parts_of(scenes)]
    shown = {
        "photographs that it has learnt": photographs,
        "the same before these pictures": [
            (label, lay_on(image, backgrounds[i % len(backgrounds)])) for i, (label, image) in enumerate(photographs)
        ],
    }
    for name, pairs in shown.items():
        answers = [(label, answer(image, model)) for label, image in pairs]
        best = np.mean([found["labels"][0]["label"] == label for label, found in answers])
        kept = np.mean([found["decision"] == "recognised" for _, found in answers])
        print(f"{name:<36} {len(pairs):>6,}   best label right {best:.1%}   not refused {kept:.1%}")
    command = [sys.executable, "-m", "app.recognise", paths[0], "--model", args.model, "--json"]
    print(f"from nothing to the answer: {1000 * statistics.median(seconds_of(command) for _ in range(STARTS)):.0f} ms")
    pixels = to_pixels(photographs[0][1], model)
    runs = [timed(lambda: model.network(pixels)) for _ in range(50)]
    print(f"the network alone: {1000 * statistics.median(runs):.1f} ms")


def parts_of(scenes: list[Image.Image]) -> list[Image.Image]:
    return [
        scene.crop((left, top, left + size, top + size))
        for scene in scenes
        for size in (160, 240, 400)
        for left in range(0, scene.width - size + 1, 60)
        for top in range(0, scene.height - size + 1, 60)
    ]


def lay_on(image: Image.Image, background: Image.Image) -> Image.Image:
    is_fruit = Image.fromarray((np.asarray(image).min(axis=2) < WHITE).astype(np.uint8) * 255)
    return Image.composite(image, background.resize(image.size), is_fruit)


def answer(image: Image.Image, model: Model) -> dict[str, Any]:
    return recognise(to_pixels(image, model), model)


def to_pixels(image: Image.Image, model: Model) -> np.ndarray:
    wanted = model.about["pixels"]
    return np.asarray(image.resize((wanted["width"], wanted["height"]), Image.Resampling[wanted["resampling"].upper()]))


def seconds_of(command: list[str]) -> float:
    return timed(lambda: json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images")
    parser.add_argument("--model", default="data/model")
    parser.add_argument("--n_images", type=int, default=500)
    return parser.parse_args()


if __name__ == "__main__":
    main()
