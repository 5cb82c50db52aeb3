"""export: write the recogniser as one model, which runs without this repository, without TensorFlow and in a browser.

usage: python -m stages.export INGESTED BACKBONE REDUCED CLASSIFIER OUTPUT --photographs 4

reads   INGESTED/images, BACKBONE, REDUCED/model
        CLASSIFIER                  whitening, exemplars, settings and metrics.json
writes  OUTPUT/model.tflite         pixels, uint8 RGB (1, height, width, 3) -> OUTPUTS, float32
        OUTPUT/web                  model.json and weights.bin: the same graph for TensorFlow.js
        OUTPUT/photographs.parquet  PHOTOGRAPHS, by label and path: the photographs of the exemplars
        OUTPUT/model.json           labels, thresholds, how pixels are made, SHA-256s, and what was measured

All numbers in the graph are rounded to float16 once. The rounded graph is the model: both files hold its numbers, half as
large as float32, and differ by the order of sums alone. It is compared with TensorFlow before it is published.

Runs without Spark.
"""

import argparse
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greeting is not this stage's output

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

from stages.analysis import between, read

COMPONENTS = ("component", "weights")
SCALING = ("feature", "mean", "scale")
WHITENING = ("component", "weights")
EXEMPLARS = ("label", "exemplar", "vector", "image_id", "path")
SETTINGS = ("temperature", "min_similarity", "max_strangeness")
PHOTOGRAPHS = pa.schema(
    [
        ("label", pa.string()),
        ("path", pa.string()),
        ("image_id", pa.string()),
        ("embedding", pa.list_(pa.float32())),  # of unit length; by a dot product, the nearest is found
        ("picture", pa.binary()),  # JPEG, PICTURE pixels on its longer side
    ]
)
OUTPUTS = ("probabilities", "similarities", "strangeness", "embedding")  # (1, n_labels) twice, (1,), (1, k)
TEMPERATURE = 0.05  # where nothing could be calibrated
PICTURE, QUALITY = 96, 80
COMPARED = 32  # photographs
MAX_DIFFERENCE = 1e-3  # of a probability


class Head(NamedTuple):
    """What makes OUTPUTS of the features, all float64."""

    mean: np.ndarray  # (n_features,)
    scale: np.ndarray  # (n_features,)
    components: np.ndarray  # (k, n_features)
    whitening: np.ndarray  # (k, k)
    exemplars: np.ndarray  # (n_labels, n_exemplars, k), of unit length
    temperature: float


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    backbone = json.loads(Path(args.backbone, "backbone.json").read_text())
    content = Path(args.backbone, "graph.pb").read_bytes()
    if sha256(content) != backbone["graph_sha256"]:
        raise SystemExit(f"export: {args.backbone}/graph.pb is not what backbone.json says. Run `dvc repro -f backbone`.")
    exemplars = read(f"{args.classifier}/exemplars", EXEMPLARS).to_pandas()
    settings = read(f"{args.classifier}/settings", SETTINGS).to_pylist()[0]
    head = read_head(args.reduced, args.classifier, exemplars, settings["temperature"] or TEMPERATURE)
    graph = rounded(folded(joined(content, backbone, head)))
    tflite = to_tflite(graph)

    photographs = exemplars.drop_duplicates(["label", "image_id"]).groupby("label").head(args.photographs)
    photographs = photographs[["label", "path", "image_id"]].sort_values(["label", "path"]).reset_index(drop=True)
    contents = read_contents(args.ingested, photographs["path"])
    pixels = [to_pixels(each, backbone["pixels"]) for each in contents]
    found = run_tflite(tflite, pixels)
    expected = run_tensorflow(graph, pixels[:COMPARED])
    difference = compare(found["probabilities"][:COMPARED], expected["probabilities"])

    output = Path(args.output)
    (output / "web").mkdir(parents=True)
    (output / "model.tflite").write_bytes(tflite)
    topology, weights = to_tfjs(fused(graph))
    (output / "web" / "model.json").write_text(topology)
    (output / "web" / "weights.bin").write_bytes(weights)
    rows = photographs.assign(embedding=list(found["embedding"]), picture=[to_picture(each) for each in contents])
    pq.write_table(pa.Table.from_pandas(rows, PHOTOGRAPHS, preserve_index=False), output / "photographs.parquet")
    labels = exemplars["label"].unique().tolist()
    n_images = ds.dataset(f"{args.ingested}/images").count_rows()
    files = sorted(each for each in output.rglob("*") if each.is_file())
    measured = json.loads(Path(args.classifier, "metrics.json").read_text())["recognition"]
    about = {
        "labels": labels,
        "calibrated": settings["temperature"] is not None,
        "temperature": head.temperature,
        "thresholds": {name: settings[name] for name in SETTINGS[1:]},
        "pixels": backbone["pixels"],
        "backbone": {key: backbone[key] for key in ("name", "weights", "graph_sha256")},
        "k": len(head.components),
        "n_exemplars": len(exemplars),
        "files": {str(each.relative_to(output)): sha256(each.read_bytes()) for each in files},
        "versions": {"tensorflow": tf.__version__},
        "measured": {**measured, "on": "photographs of the other fold, which the judged model has not seen"},
        "trained_on": {"images": n_images, "labels": len(labels)},
    }
    (output / "model.json").write_text(json.dumps(about, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    print(f"export: {len(labels):,} labels, {len(tflite) / 1e6:.1f} MB; from TensorFlow {difference:.1e} at most")


def read_head(reduced, classifier, exemplars, temperature):
    components = np.stack(read(f"{reduced}/model/components", COMPONENTS).sort_by("component")["weights"].to_numpy())
    scaling = read(f"{reduced}/model/scaling", SCALING).sort_by("feature").to_pandas()
    whitening = np.stack(read(f"{classifier}/whitening", WHITENING).sort_by("component")["weights"].to_numpy())
    vectors = [np.stack(each) for _, each in exemplars.groupby("label", sort=False)["vector"]]
    most = max(len(each) for each in vectors)
    padded = np.stack([each[np.arange(most) % len(each)] for each in vectors])
    return Head(scaling["mean"].to_numpy(), scaling["scale"].to_numpy(), components, whitening, padded, temperature)


def joined(content, backbone, head):
    wanted = backbone["pixels"]
    n_labels, n_each, k = head.exemplars.shape
    inverse = 1 / head.scale
    inverse /= power_of_two(np.sqrt(inverse.min() * inverse.max()))
    whitening = head.whitening / power_of_two(np.abs(head.whitening).max())

    def unit(v):
        return v / tf.maximum(tf.sqrt(tf.reduce_sum(v * v, axis=1, keepdims=True)), 2.0**-14)

    with tf.Graph().as_default() as graph:
        pixels = tf.compat.v1.placeholder(tf.uint8, (1, wanted["height"], wanted["width"], 3), "pixels")
        (features,) = tf.import_graph_def(
            tf.compat.v1.GraphDef.FromString(content), {backbone["input"]: pixels}, [backbone["output"]], name="backbone"
        )
        high = head.mean.astype(np.float16)
        low = head.mean - high
        deviation = (features - f32(high)) - f32(low)
        scaled = deviation * f32(inverse)
        z = scaled @ f32(head.components.T)
        point = tf.identity(unit(unit(z) @ f32(whitening)), "embedding")
        cosines = tf.reshape(point @ f32(head.exemplars.reshape(-1, k).T), (1, n_labels, n_each))
        similarities = tf.reduce_max(cosines, axis=2, name="similarities")
        tf.nn.softmax(similarities / f32(head.temperature), name="probabilities")
        lost = 1 - tf.reduce_sum(z * z, axis=1) / tf.maximum(tf.reduce_sum(scaled * scaled, axis=1), 2.0**-14)
        tf.maximum(lost, 0, name="strangeness")
    return graph.as_graph_def()


def f32(array):
    return tf.constant(np.asarray(array, np.float32))


def power_of_two(number):
    return 2.0 ** np.round(np.log2(number))


def folded(graph):
    """Drop what only passes on, and calculate what depends on no pixel."""
    with tf.Graph().as_default() as whole:
        tf.import_graph_def(graph, name="")
    nodes = {node.name: node for node in graph.node}
    constant = {}
    order = []

    def resolve(name):
        op, index = (name.split(":") + ["0"])[:2]
        while nodes[op].op in ("Identity", "IdentityN", "StopGradient") and op not in OUTPUTS:
            op, index = (nodes[op].input[int(index)].split(":") + ["0"])[:2]
        return op if index == "0" else f"{op}:{index}"

    def visit(name):
        if name in constant:
            return
        node = nodes[name]
        inputs = [resolve(each) for each in node.input if not each.startswith("^")]
        for each in inputs:
            visit(each.split(":")[0])
        constant[name] = node.op == "Const" or (
            bool(inputs) and all(constant[each.split(":")[0]] for each in inputs)
        ) or (node.op == "Shape" and whole.get_tensor_by_name(node.input[0] + ":0").shape.is_fully_defined())
        order.append((name, inputs))

    for name in OUTPUTS:
        visit(name)
    kept = {}
    for name, inputs in order:
        if not constant[name]:
            kept[name] = inputs
    leaves = sorted({each for inputs in kept.values() for each in inputs if constant[each.split(":")[0]]})
    with tf.compat.v1.Session(graph=whole) as session:
        values = dict(zip(leaves, session.run([l if ":" in l else l + ":0" for l in leaves])))
    result = tf.compat.v1.GraphDef(versions=graph.versions)
    for name, value in values.items():
        node = result.node.add(name=name.replace(":", "_"), op="Const")
        node.attr["dtype"].type = tf.as_dtype(value.dtype).as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
    for name, inputs in kept.items():
        node = result.node.add()
        node.CopyFrom(nodes[name])
        node.ClearField("device")
        del node.input[:]
        node.input.extend(each.replace(":", "_") if each in values else each for each in inputs)
        for attr in [a for a in node.attr if a.startswith("_")]:
            del node.attr[attr]
    return result


def rounded(graph):
    for node in graph.node:
        if node.op == "Const" and node.attr["dtype"].type == tf.float32.as_datatype_enum:
            value = tf.make_ndarray(node.attr["value"].tensor)
            with np.errstate(over="ignore"):
                half = value.astype(np.float16)
            if not np.isfinite(half).all():
                raise SystemExit(f"export: {node.name} has {np.abs(value).max():g}, float16 ends at 65,504.")
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(half.astype(np.float32)))
    return graph


def to_tflite(graph):
    with tf.Graph().as_default() as g:
        tf.import_graph_def(graph, name="")
    converter = tf.compat.v1.lite.TFLiteConverter(
        graph, [g.get_tensor_by_name("pixels:0")], [g.get_tensor_by_name(f"{each}:0") for each in OUTPUTS]
    )
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    return converter.convert()


def run_tflite(content, pixels):
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    (taken,) = interpreter.get_input_details()
    places = {each["name"]: each["index"] for each in interpreter.get_output_details()}
    rows = []
    for each in pixels:
        interpreter.set_tensor(taken["index"], each[None])
        interpreter.invoke()
        rows.append([interpreter.get_tensor(places[name])[0] for name in OUTPUTS])
    return {name: np.stack(column) for name, column in zip(OUTPUTS, zip(*rows))}


def run_tensorflow(graph, pixels):
    with tf.Graph().as_default() as g:
        tf.import_graph_def(graph, name="")
    with tf.compat.v1.Session(graph=g) as session:
        rows = [session.run([f"{name}:0" for name in OUTPUTS], {"pixels:0": each[None]}) for each in pixels]
    return {name: np.concatenate(column) for name, column in zip(OUTPUTS, zip(*rows))}


def compare(found, expected):
    difference = float(np.abs(found - expected).max())
    unlike = int((found.argmax(axis=1) != expected.argmax(axis=1)).sum())
    if not difference <= MAX_DIFFERENCE or unlike:
        raise SystemExit(f"export: TFLite differs {difference} {unlike}")
    return difference


def fused(graph):
    """Merge each convolution with the bias and the activation after it."""
    takers = {}
    for node in graph.node:
        for each in node.input:
            takers.setdefault(each, []).append(node)
    gone = set()
    renamed = {}
    result = tf.compat.v1.GraphDef(versions=graph.versions)
    by_name = {}
    for node in graph.node:
        if node.name in gone:
            continue
        new = result.node.add()
        new.CopyFrom(node)
        for i, each in enumerate(new.input):
            new.input[i] = renamed.get(each, each)
        by_name[node.name] = new
        if node.op in ("Conv2D", "DepthwiseConv2dNative"):
            ops, last = [], node
            while len(after := takers.get(last.name, [])) == 1 and after[0].op in ("BiasAdd", "Relu", "Relu6") and (after[0].op == "BiasAdd") == (not ops) and len(ops) < 2:
                last = after[0]
                ops.append(last.op)
                if last.op == "BiasAdd":
                    new.input.append(last.input[1])
                gone.add(last.name)
            if ops:
                new.op = {"Conv2D": "_FusedConv2D", "DepthwiseConv2dNative": "FusedDepthwiseConv2dNative"}[node.op]
                new.attr["fused_ops"].list.s.extend(op.encode() for op in ops)
                new.attr["num_args"].i = 1
                renamed[last.name] = new.name
    return result


def to_tfjs(graph):
    weights, entries = [], []
    from google.protobuf import json_format
    for node in graph.node:
        if node.op == "Const":
            value = tf.make_ndarray(node.attr["value"].tensor)
            entry = {"name": node.name, "shape": list(value.shape), "dtype": value.dtype.name}
            if value.dtype == np.float32:
                entry["quantization"] = {"dtype": "float16", "original_dtype": "float32"}
                value = value.astype("<f2")
            entries.append(entry)
            weights.append(value.tobytes())
            node.attr["value"].tensor.ClearField("tensor_content")
            for f in ("float_val", "int_val"):
                node.attr["value"].tensor.ClearField(f)
        if node.op == "Placeholder":
            del node.attr["dtype"]
    bind = lambda name, dtype, shape: {"name": f"{name}:0", "dtype": dtype, "tensorShape": {"dim": [{"size": str(s)} for s in shape]}}
    size = [d.size for d in next(n for n in graph.node if n.op == "Placeholder").attr["shape"].shape.dim]
    model = {
        "format": "graph-model",
        "generatedBy": f"TensorFlow {tf.__version__}",
        "convertedBy": None,
        "signature": {
            "inputs": {"pixels": bind("pixels", "DT_FLOAT", size)},
            "outputs": {name: {"name": f"{name}:0"} for name in OUTPUTS},
        },
        "modelTopology": json_format.MessageToDict(graph),
        "weightsManifest": [{"paths": ["weights.bin"], "weights": entries}],
    }
    return json.dumps(model, sort_keys=True, separators=(",", ":")), b"".join(weights)


def read_contents(ingested, paths):
    contents = {}
    for file in sorted(Path(ingested, "images").glob("*.parquet")):
        table = pq.ParquetFile(file)
        for group in range(table.num_row_groups):
            names = table.read_row_group(group, ["path"])["path"]
            at = [i for i, name in enumerate(names.to_pylist()) if name in set(paths)]
            if at:
                rows = table.read_row_group(group, ["path", "content"]).take(at)
                contents |= dict(zip(rows["path"].to_pylist(), rows["content"].to_pylist()))
    return [contents[path] for path in paths]


def to_pixels(content, wanted):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.resize((wanted["width"], wanted["height"]), Image.Resampling[wanted["resampling"].upper()]))


def to_picture(content):
    with Image.open(io.BytesIO(content)) as image:
        image = image.convert("RGB")
        image.thumbnail((PICTURE, PICTURE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY, optimize=True)
        return file.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for place in ("ingested", "backbone", "reduced", "classifier", "output"):
        parser.add_argument(place)
    parser.add_argument("--photographs", type=between(int, 1, 64), required=True, help="known photographs to show, a label")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
