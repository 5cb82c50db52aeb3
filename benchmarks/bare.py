"""Measure what this machine can do without Spark: one process with the frozen graph, and the arithmetic alone.

usage: python -m benchmarks.bare IMAGES BACKBONE [--precision bfloat16] [--batch_size 8] [--n_images 1000] [--n_cores N]

Each core has a network of its own. It decodes and resizes photographs for it with the functions of the stage featurize. The
arithmetic is large products of matrices in each precision, on all cores. Prints one line of JSON: images a second (start-up
apart), and GFLOP/s.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from stages.featurize import settings, to_pixels

SIDE = 4096  # of the matrices
SECONDS = 5  # that each product is repeated for


def main() -> None:
    args = parse_args()
    backbone = json.loads((args.backbone / "backbone.json").read_text())
    wanted = backbone["pixels"]
    shape = (args.batch_size, wanted["height"], wanted["width"], 3)
    graph = (args.backbone / "graph.pb").read_bytes()
    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    contents = [path.read_bytes() for path in islice(paths, args.n_images)]
    batches = [contents[i : i + args.batch_size] for i in range(0, len(contents), args.batch_size)]
    networks = threading.local()
    ready = threading.Barrier(args.n_cores + 1)

    def start() -> None:
        networks.forward = load(graph, backbone, args.precision)
        networks.forward(np.zeros(shape, np.uint8))
        ready.wait()

    def forward(batch: list[bytes]) -> np.ndarray:
        pixels = np.zeros(shape, np.uint8)
        for i, content in enumerate(batch):
            pixels[i] = to_pixels(content, wanted)
        return networks.forward(pixels)

    with ThreadPoolExecutor(args.n_cores, initializer=start) as pool:
        first = [pool.submit(int) for _ in range(args.n_cores)]  # each starts a thread
        ready.wait()
        wait(first)
        started = time.monotonic()
        for _ in pool.map(forward, batches):
            pass
    rate = len(contents) / (time.monotonic() - started)
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:  # as this process has one thread for an operation
        limits = {dtype: round(apart.submit(gflops, dtype).result()) for dtype in ("float32", "bfloat16")}
    print(json.dumps({"images": len(contents), "images_per_second": round(rate, 2), "gflops_of_a_product": limits}))


def load(graph: bytes, backbone: dict[str, Any], precision: str) -> Callable[[np.ndarray], np.ndarray]:
    """Load the network as featurize does, but with threads of its own, which sessions of one process share by default."""
    import tensorflow as tf

    config = settings(precision, 1, ())
    config.use_per_session_threads = True
    with tf.Graph().as_default() as frozen:
        tf.import_graph_def(tf.compat.v1.GraphDef.FromString(graph), name="")
    return tf.compat.v1.Session(graph=frozen, config=config).make_callable(backbone["output"], [backbone["input"]])


def gflops(dtype: str) -> float:
    """Measure GFLOP/s of products of square matrices, on all cores."""
    import tensorflow as tf

    a = tf.cast(tf.random.normal((SIDE, SIDE)), dtype)
    tf.matmul(a, a)
    n, started = 0, time.monotonic()
    while time.monotonic() - started < SECONDS:
        tf.matmul(a, a)
        n += 1
    return n * 2 * SIDE**3 / (time.monotonic() - started) / 1e9


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("backbone", type=Path)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--n_images", type=int, default=1000)
    parser.add_argument("--n_cores", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
