"""export: write the recogniser as one model, which needs neither this repository nor TensorFlow and also runs in a browser.

usage: python -m stages.export INGESTED BACKBONE REDUCED CLASSIFIER OUTPUT --photographs 4

reads   INGESTED/images, BACKBONE, REDUCED
        CLASSIFIER                  whitening, exemplars, settings, metrics.json
writes  OUTPUT/model.tflite         pixels, uint8 RGB (1, height, width, 3) -> OUTPUTS, float32
        OUTPUT/web                  model.json and weights.bin: the same for TensorFlow.js, from float32 or int32 pixels
        OUTPUT/photographs.parquet  PHOTOGRAPHS, by label and path: those of the exemplars, to be shown as known ones
        OUTPUT/model.json           labels, thresholds, how pixels are made of an image, SHA-256s, what was measured

The graph's constants are rounded to float16 once, and the rounded graph is the model: both files have its very numbers, in
half the bytes of float32. What they compute differs by the order of sums alone. TFLite and TensorFlow are compared before
anything is written.

Runs without Spark, in bounded memory.
"""

import argparse
import collections
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greeting is not this stage's output

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from google.protobuf import json_format
from PIL import Image, ImageOps
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.python.grappler import tf_optimizer

from stages.analysis import between, first_rows, open_table, read, to_matrix

COMPONENTS = ("component", "weights")
SCALING = ("feature", "mean", "scale")
WHITENING = ("component", "weights")
EMBEDDINGS = ("image_id", "embedding")
EXEMPLARS = ("label", "exemplar", "vector", "image_id", "path")
SETTINGS = ("temperature", "min_similarity", "max_strangeness")
PHOTOGRAPHS = pa.schema(
    [
        ("label", pa.string()),
        ("path", pa.string()),
        ("image_id", pa.string()),
        ("embedding", pa.list_(pa.float32())),  # as in OUTPUTS: the nearest has the largest dot product
        ("picture", pa.binary()),  # JPEG, RGB, PICTURE pixels on the longer side
    ]
)
# Of shapes (1, n_labels), (1, n_labels), (1,) and (1, k); the embedding is whitened and of unit length.
OUTPUTS = ("probabilities", "similarities", "strangeness", "embedding")
TEMPERATURE = 0.05  # where none could be calibrated
SMALLEST = 2.0**-24  # that float16 has: what a length is divided by at least
PICTURE, QUALITY = 96, 80
COMPARED = 8  # photographs, by TFLite and by TensorFlow: they differ by the order of sums, which any photograph shows
MAX_DIFFERENCE = 1e-3  # of them, in any number of OUTPUTS
# Operations that TensorFlow.js has, in its reader of graphs and in WebAssembly: what the networks of `backbone` need.
WEB = {
    *("Placeholder", "Const", "Identity", "Cast", "Reshape", "BroadcastTo", "Pad", "Pack", "ConcatV2", "StridedSlice"),
    *("_FusedConv2D", "FusedDepthwiseConv2dNative", "Conv2D", "DepthwiseConv2dNative", "BiasAdd", "MatMul"),
    *("Relu", "Relu6", "Sigmoid", "Softmax", "Erf", "Neg", "Sqrt", "Rsqrt", "AvgPool", "MaxPool", "Mean", "Max", "Sum"),
    *("Add", "AddV2", "AddN", "Sub", "SquaredDifference", "Mul", "RealDiv", "Maximum"),
}
FUSED = {"Conv2D": "_FusedConv2D", "DepthwiseConv2dNative": "FusedDepthwiseConv2dNative"}
ACTIVATIONS = ("Relu", "Relu6")

Model = Callable[[np.ndarray], dict[str, np.ndarray]]  # takes pixels, uint8 (1, height, width, 3); gives OUTPUTS by name


class Head(NamedTuple):
    """What makes OUTPUTS of features, in float64."""

    mean: np.ndarray  # (n_features,)
    scale: np.ndarray  # (n_features,)
    components: np.ndarray  # (k, n_features)
    whitening: np.ndarray  # (k, k), symmetric
    exemplars: np.ndarray  # (n_labels, n_exemplars, k), of unit length
    temperature: float


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    backbone = json.loads(Path(args.backbone, "backbone.json").read_text())
    network = Path(args.backbone, "graph.pb").read_bytes()
    if sha256(network) != backbone["graph_sha256"]:
        raise SystemExit(f"export: {args.backbone}/graph.pb is not what backbone.json says. Run `dvc repro -f backbone`.")
    exemplars = read(f"{args.classifier}/exemplars", EXEMPLARS).to_pandas()
    (settings,) = read(f"{args.classifier}/settings", SETTINGS).to_pylist()
    metrics = json.loads(Path(args.classifier, "metrics.json").read_text())
    head = read_head(args.reduced, args.classifier, exemplars, settings["temperature"] or TEMPERATURE)
    graph = rounded(simplified(joined(network, head)))
    topology, weights = to_tfjs(graph)
    lite = to_tflite(graph)
    chosen = choose(exemplars, args.photographs)
    compared = set(chosen["path"].iloc[np.linspace(0, len(chosen) - 1, COMPARED).astype(int)])
    pictures, pixels = {}, []
    for path, content in read_contents(args.ingested, chosen["path"].tolist()):
        pictures[path] = to_picture(content)
        if path in compared:
            pixels.append(to_pixels(content, backbone["pixels"])[None])
    check_same(pixels, load_tflite(lite), load_tensorflow(graph))
    photographs = chosen.assign(
        embedding=list(read_points(args.reduced, chosen["image_id"], head.whitening)),
        picture=[pictures[path] for path in chosen["path"]],
    )

    output = Path(args.output)
    (output / "web").mkdir(parents=True)
    (output / "model.tflite").write_bytes(lite)
    (output / "web" / "model.json").write_text(topology)
    (output / "web" / "weights.bin").write_bytes(weights)
    table = pa.Table.from_pandas(photographs, PHOTOGRAPHS, preserve_index=False).replace_schema_metadata()
    pq.write_table(table, output / "photographs.parquet", write_page_checksum=True)
    n_images = pc.count_distinct(read(f"{args.ingested}/images", ("image_id",))["image_id"]).as_py()
    files = sorted(path for path in output.rglob("*") if path.is_file())
    about = {
        **describe(backbone, exemplars, settings, metrics["recognition"]),
        "files": {path.relative_to(output).as_posix(): sha256(path.read_bytes()) for path in files},
        "trained_on": {"images": n_images, "labels": len(head.exemplars)},
    }
    (output / "model.json").write_text(json.dumps(about, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    print(f"export: {len(head.exemplars):,} labels, {len(photographs):,} photographs; {len(lite) / 1e6:.1f} MB of model")


def describe(
    backbone: dict[str, Any], exemplars: pd.DataFrame, settings: dict[str, Any], recognition: dict[str, Any]
) -> dict[str, Any]:
    """Tell what who uses the model must know: all of model.json but what describes its files and the images."""
    n_judged = recognition.get("images", 0)
    on = (
        f"{n_judged:,} photographs, each by a model that has seen nothing of its fold"
        if n_judged
        else "no photograph: no label is in both folds"
    )
    return {
        "labels": exemplars["label"].unique().tolist(),
        "calibrated": settings["temperature"] is not None,
        "temperature": settings["temperature"] or TEMPERATURE,
        "thresholds": {name: settings[name] for name in ("min_similarity", "max_strangeness")},
        "pixels": backbone["pixels"],
        "backbone": {key: backbone[key] for key in ("name", "weights", "graph_sha256")},
        "k": len(exemplars["vector"].iloc[0]),
        "n_exemplars": len(exemplars),
        "versions": {"tensorflow": tf.__version__},
        "measured": {**recognition, "on": on},
    }


def read_head(reduced: str, classifier: str, exemplars: pd.DataFrame, temperature: float) -> Head:
    """Read the head's numbers; a label that has fewer exemplars than others repeats them, which changes no largest cosine.

    Raises
    ------
    SystemExit
        there is no exemplar, or the classifier was fitted to another PCA
    """
    components = read(f"{reduced}/model/components", COMPONENTS).sort_by("component")["weights"].to_pylist()
    scaling = read(f"{reduced}/model/scaling", SCALING).sort_by("feature").to_pandas()
    whitening = read(f"{classifier}/whitening", WHITENING).sort_by("component")["weights"].to_pylist()
    if exemplars.empty:
        raise SystemExit(f"export: {classifier}/exemplars has no row: there is no label to recognise.")
    if len(whitening) != len(components):
        raise SystemExit(
            f"export: {reduced} has {len(components):,} components, and {classifier} is for {len(whitening):,}. "
            "Run `dvc repro`."
        )
    by_label = [np.stack(vectors) for _, vectors in exemplars.groupby("label", sort=False)["vector"]]
    n_exemplars = max(map(len, by_label))
    repeated = np.stack([vectors[np.arange(n_exemplars) % len(vectors)] for vectors in by_label])
    scales = scaling["mean"].to_numpy(), scaling["scale"].to_numpy()
    return Head(*scales, np.array(components), np.array(whitening), repeated, temperature)


# The graph


def joined(network: bytes, head: Head) -> GraphDef:
    """Write the head behind the backbone, for one image.

    Float16 ends at 65,504, and has few digits below 6e-5. Neither the length of an embedding nor that of features matters to
    any output, so both are divided by what brings the constants near 1: powers of two, which round nothing.
    """
    n_labels, n_exemplars, k = head.exemplars.shape
    to_scale = 1 / head.scale
    to_scale /= power_of_two(np.sqrt(to_scale.min() * to_scale.max()))
    whitening = head.whitening / power_of_two(np.abs(head.whitening).max())

    def constant(value: np.ndarray | float) -> tf.Tensor:
        return tf.constant(np.asarray(value, np.float32))

    def squares(rows: tf.Tensor, **options: bool) -> tf.Tensor:
        return tf.reduce_sum(rows * rows, axis=1, **options)

    backbone = GraphDef.FromString(network)
    (pixels,) = (node for node in backbone.node if node.op == "Placeholder")
    pixels.attr["shape"].shape.dim[0].size = 1
    with tf.Graph().as_default() as graph:
        (features,) = tf.import_graph_def(backbone, return_elements=["features:0"], name="")
        deviation = (features - constant(head.mean)) * constant(to_scale)
        embedding = deviation @ constant(head.components.T)
        whitened = embedding @ constant(whitening)  # which need not be of unit length before, as it becomes so after
        point = tf.divide(whitened, tf.maximum(tf.sqrt(squares(whitened, keepdims=True)), SMALLEST), "embedding")
        cosines = point @ constant(head.exemplars.reshape(-1, k).T)
        similarities = tf.reduce_max(tf.reshape(cosines, (1, n_labels, n_exemplars)), axis=2, name="similarities")
        tf.nn.softmax(similarities * constant(1 / head.temperature), name="probabilities")
        explained = squares(embedding) / tf.maximum(squares(deviation), SMALLEST)
        tf.maximum(1 - explained, 0, name="strangeness")
    return graph.as_graph_def()


def power_of_two(number: float) -> float:
    """Find the power of two that is nearest to a positive number."""
    return float(2.0 ** np.round(np.log2(number)))


def simplified(graph: GraphDef) -> GraphDef:
    """Compute what depends on no pixel, and drop what computes nothing; a division by a constant becomes a product."""
    result = GraphDef.FromString(graph.SerializeToString())
    with tf.Graph().as_default() as whole:
        tf.import_graph_def(graph, name="")
    for node in result.node:
        if node.op == "Shape":  # known, as there is one image; Grappler does not find all of them
            sizes = whole.get_operation_by_name(node.name).inputs[0].shape.as_list()
            node.CopyFrom(NodeDef(name=node.name, op="Const"))
            node.attr["dtype"].type = tf.int32.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(sizes, tf.int32))
    wanted = tf.compat.v1.train.export_meta_graph(graph_def=result, graph=whole)
    wanted.collection_def["train_op"].node_list.value.extend(OUTPUTS)
    config = tf.compat.v1.ConfigProto()
    rewrite = config.graph_options.rewrite_options
    rewrite.optimizers.extend(["pruning", "constfold", "dependency"])
    rewrite.meta_optimizer_iterations = rewrite.TWO
    rewrite.min_graph_nodes = -1  # however small it is
    return tf_optimizer.OptimizeGraph(config, wanted)


def rounded(graph: GraphDef) -> GraphDef:
    """Round the constants to float16; they stay float32 in type.

    What scales the argument of an error function stays as it is: by that number, TFLite tells a GELU, which it has.

    Raises
    ------
    SystemExit
        one is larger than float16 can be
    """
    result = GraphDef.FromString(graph.SerializeToString())
    nodes = {node.name: node for node in result.node}
    exact = {name for node in result.node if node.op == "Erf" for name in nodes[node.input[0]].input}
    for node in result.node:
        if node.op == "Const" and node.name not in exact and node.attr["dtype"].type == tf.float32.as_datatype_enum:
            value = tf.make_ndarray(node.attr["value"].tensor)
            with np.errstate(over="ignore"):
                half = value.astype(np.float16)
            if np.isinf(half).any():
                raise SystemExit(
                    f"export: the constant {node.name} reaches {np.abs(value).max():g}, and float16 ends at 65,504. "
                    "This model cannot be exported; that of another backbone may be."
                )
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(half.astype(np.float32)))
    return result


def fused(graph: GraphDef) -> GraphDef:
    """Merge each convolution with the bias and the activation that alone follow it: TensorFlow.js computes them in one."""
    result = GraphDef.FromString(graph.SerializeToString())
    takers = collections.defaultdict(list)
    for node in result.node:
        for name in node.input:
            takers[name].append(node)
    merged = set()
    for convolution in [node for node in result.node if node.op in FUSED]:
        chain = [convolution]
        for wanted in (("BiasAdd",), ACTIVATIONS):
            after = takers[chain[-1].name]
            if len(after) != 1 or after[0].op not in wanted:
                break
            chain.append(after[0])
        *earlier, last = chain
        if earlier:
            one = NodeDef()
            one.CopyFrom(convolution)
            one.name, one.op = last.name, FUSED[convolution.op]
            one.input.append(chain[1].input[1])
            one.attr["fused_ops"].list.s.extend(node.op.encode() for node in chain[1:])
            one.attr["num_args"].i = 1
            last.CopyFrom(one)
            merged |= {node.name for node in earlier}
    return GraphDef(node=[node for node in result.node if node.name not in merged], versions=result.versions)


# Files


def to_tflite(graph: GraphDef) -> bytes:
    """Convert a graph to TFLite, its constants as float16."""
    with tf.Graph().as_default() as whole:
        tf.import_graph_def(graph, name="")
    inputs, outputs = ([whole.get_tensor_by_name(f"{name}:0") for name in names] for names in (("pixels",), OUTPUTS))
    converter = tf.compat.v1.lite.TFLiteConverter(graph, inputs, outputs)  # the one that keeps names
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    return bytes(converter.convert())


def to_tfjs(graph: GraphDef) -> tuple[str, bytes]:
    """Write a graph as TensorFlow.js 4.22 reads it: model.json, and the numbers of its constants one after the other.

    Raises
    ------
    SystemExit
        it has an operation that TensorFlow.js has not
    """
    result = fused(graph)
    if unknown := {node.op for node in result.node} - WEB:
        raise SystemExit(
            f"export: TensorFlow.js cannot compute {', '.join(sorted(unknown))}. "
            "This model cannot be exported; that of another backbone may be."
        )
    weights, manifest = [], []
    for node in result.node:
        if node.op == "Placeholder":
            del node.attr["dtype"]  # TensorFlow.js has no uint8; without a type it takes float32 and int32
            sizes = [{"size": str(each.size)} for each in node.attr["shape"].shape.dim]
        elif node.op == "Const":
            value = tf.make_ndarray(node.attr["value"].tensor)
            weight = {"name": node.name, "shape": value.shape, "dtype": value.dtype.name}
            if value.dtype == np.float32 and (value == value.astype(np.float16)).all():
                weight["quantization"] = {"dtype": "float16", "original_dtype": "float32"}
                value = value.astype(np.float16)
            manifest.append(weight)
            weights.append(value.tobytes())
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.zeros(0, weight["dtype"])))
    model = {
        "format": "graph-model",
        "modelTopology": json_format.MessageToDict(result),
        "signature": {
            "inputs": {"pixels": {"name": "pixels:0", "dtype": "DT_INT32", "tensorShape": {"dim": sizes}}},
            "outputs": {name: {"name": f"{name}:0", "dtype": "DT_FLOAT"} for name in OUTPUTS},
        },
        "weightsManifest": [{"paths": ["weights.bin"], "weights": manifest}],
    }
    return json.dumps(model, sort_keys=True, separators=(",", ":")), b"".join(weights)


def load_tflite(content: bytes) -> Model:
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    (pixels,) = interpreter.get_input_details()
    places = {output["name"]: output["index"] for output in interpreter.get_output_details()}

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        interpreter.set_tensor(pixels["index"], image)
        interpreter.invoke()
        return {name: interpreter.get_tensor(places[name]) for name in OUTPUTS}

    return run


def load_tensorflow(graph: GraphDef) -> Model:
    with tf.Graph().as_default() as whole:
        tf.import_graph_def(graph, name="")
    call = tf.compat.v1.Session(graph=whole).make_callable([f"{name}:0" for name in OUTPUTS], ["pixels:0"])
    return lambda image: dict(zip(OUTPUTS, call(image), strict=True))


# Photographs


def choose(exemplars: pd.DataFrame, n_photographs: int) -> pd.DataFrame:
    """Choose the photographs of each label's first exemplars, each once: label, path, image_id, by label and path."""
    first = exemplars.drop_duplicates(["label", "image_id"]).groupby("label").head(n_photographs)
    return first[["label", "path", "image_id"]].sort_values(["label", "path"], ignore_index=True)


def read_points(reduced: str, image_ids: pd.Series, whitening: np.ndarray) -> np.ndarray:
    """Read the embeddings of these images, whitened and of unit length as in OUTPUTS: float64, (n_images, k).

    They come from the features of the pipeline. The model's constants are rounded to float16, so its own differ in the third
    digit. To compute these would take a pass of the network for each image.
    """
    table = read(f"{reduced}/embeddings", EMBEDDINGS, pc.field("image_id").isin(image_ids.tolist()))
    embedding = to_matrix(table["embedding"].combine_chunks().flatten().to_numpy(), len(table))
    points = embedding[first_rows(table, image_ids)] @ whitening
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), SMALLEST)


def check_same(images: Sequence[np.ndarray], model: Model, reference: Model) -> None:
    """Compare the model with the reference on these pixels.

    Raises
    ------
    SystemExit
        they differ by more than MAX_DIFFERENCE
    """
    pairs = [(model(pixels), reference(pixels)) for pixels in images]
    difference = np.max([np.abs(found[name] - expected[name]).max() for found, expected in pairs for name in OUTPUTS])
    if not difference <= MAX_DIFFERENCE:  # also where one is not a number
        labels = [tuple(each["probabilities"].argmax() for each in pair) for pair in pairs]
        raise SystemExit(
            f"export: TFLite and TensorFlow differ by {difference:.2g} where {MAX_DIFFERENCE:g} is allowed, "
            f"and in the label of {sum(found != expected for found, expected in labels)} of {len(pairs)} photographs. "
            "This model cannot be exported; that of another backbone may be."
        )


def read_contents(ingested: str, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of each of these photographs, in the order of the files. No more than a row group is in memory.

    Raises
    ------
    SystemExit
        one is not there
    """
    n_found = 0
    wanted = pc.field("path").isin(paths)
    for file in open_table(f"{ingested}/images").get_fragments():
        for row_group in file.split_by_row_group():
            if row_group.count_rows(filter=wanted):
                for row in row_group.to_table(columns=["path", "content"], filter=wanted).to_pylist():
                    n_found += 1
                    yield row["path"], row["content"]
    if n_found < len(paths):
        raise SystemExit(f"export: {ingested} has {n_found:,} of {len(paths):,} photographs of exemplars. Run `dvc repro`.")


def to_pixels(content: bytes, wanted: dict[str, Any]) -> np.ndarray:
    """Make the pixels that backbone.json asks for, as the stage featurize does: uint8 RGB of shape (height, width, 3)."""
    with Image.open(io.BytesIO(content)) as image:
        ImageOps.exif_transpose(image, in_place=True)
        resampling = Image.Resampling[wanted["resampling"].upper()]
        return np.asarray(image.resize((wanted["width"], wanted["height"]), resampling))


def to_picture(content: bytes) -> bytes:
    """Make a small JPEG of a photograph."""
    with Image.open(io.BytesIO(content)) as image:
        ImageOps.exif_transpose(image, in_place=True)
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
    parser.add_argument(
        "--photographs", type=between(int, 1, 64), required=True, help="photographs of each label to show, at most"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
