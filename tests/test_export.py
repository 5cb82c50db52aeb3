"""Facts about the exported model; NumPy in float64, TensorFlow and TensorFlow.js are the oracles."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from PIL import Image
from tensorflow.core.framework.graph_pb2 import GraphDef

from app import page
from stages import backbone, export, featurize
from tests.helpers import ROOT, write

SIZE, K = 16, 5
LABELS = {"apple": 2, "banana": 1, "cherry": 3}  # how many exemplars each has
FLOAT32 = 1e-5  # by sums in another order, of numbers up to 1
FLOAT16 = 3e-2  # by rounding each constant to eleven bits, of probabilities with random exemplars

# Recognises the pixels of a file by a folder's model.json and weights.bin, and prints its outputs and milliseconds.
RECOGNISE = """
const [folder, file, shape, ...names] = process.argv.slice(1);
const [tf, converter, wasm] = ["core", "converter", "backend-wasm"].map((name) => require("@tensorflow/tfjs-" + name));
const { readFileSync } = require("fs");
wasm.setWasmPaths(require("path").dirname(require.resolve("@tensorflow/tfjs-backend-wasm")) + "/");
(async () => {
  await tf.setBackend("wasm");
  const model = await converter.loadGraphModel({ load: async () => {
    const { weightsManifest: [{ weights }], ...artifacts } = JSON.parse(readFileSync(folder + "/model.json"));
    return { ...artifacts, weightSpecs: weights, weightData: new Uint8Array(readFileSync(folder + "/weights.bin")).buffer };
  } });
  const [n, ...size] = shape.split(",").map(Number);
  const pixels = readFileSync(file), length = pixels.length / n, found = [], milliseconds = [];
  for (let i = 0; i < n; i++) {
    const start = performance.now();
    const image = pixels.subarray(i * length, (i + 1) * length);
    const input = tf.tensor((i % 2 ? Float32Array : Int32Array).from(image), [1, ...size]);
    found.push(model.execute({ pixels: input }, names).map((output) => Array.from(output.dataSync())));
    milliseconds.push(performance.now() - start);
  }
  console.log(JSON.stringify({ backend: tf.getBackend(), found, milliseconds }));
})();
"""

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's own, of NumPy

Head = dict[str, Any]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def apply(head: Head, features: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the outputs from features (n, n_features), in float64."""
    deviation = (features.astype(np.float64) - head["mean"]) / head["scale"]
    embedding = deviation @ head["components"].T
    point = unit(unit(embedding) @ head["whitening"])
    cosines = [(point @ np.transpose(vectors)).max(axis=1) for vectors in head["exemplars"].values()]
    similarities = np.stack(cosines, axis=1)
    powers = np.exp((similarities - similarities.max(axis=1, keepdims=True)) / (head["temperature"] or 0.05))
    return {
        "probabilities": powers / powers.sum(axis=1, keepdims=True),
        "similarities": similarities,
        "strangeness": 1 - (embedding**2).sum(axis=1) / (deviation**2).sum(axis=1),
        "embedding": point,
    }


def run(graph: GraphDef, pixels: np.ndarray, outputs: tuple[str, ...] = export.OUTPUTS) -> dict[str, np.ndarray]:
    """Compute outputs of each image by TensorFlow, one after the other."""
    with tf.Graph().as_default() as whole:
        tf.import_graph_def(graph, name="")
    with tf.compat.v1.Session(graph=whole) as session:
        rows = [session.run([f"{name}:0" for name in outputs], {"pixels:0": image[None]}) for image in pixels]
    return {name: np.concatenate(values) for name, values in zip(outputs, zip(*rows, strict=True), strict=True)}


def run_tflite(file: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    interpreter = Interpreter(str(file))
    interpreter.allocate_tensors()
    rows = []
    for image in pixels:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        rows.append({each["name"]: interpreter.get_tensor(each["index"]) for each in interpreter.get_output_details()})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def run_tfjs(folder: Path, pixels: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """Compute outputs of each image by TensorFlow.js in WebAssembly; also the median of milliseconds."""
    (folder / "pixels").write_bytes(pixels.tobytes())
    shape = ",".join(map(str, pixels.shape))
    command = ["node", "-e", RECOGNISE, str(folder / "web"), str(folder / "pixels"), shape, *export.OUTPUTS]
    page.fetch_runtime()
    environment = os.environ | {"NODE_PATH": str(page.MODULES)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["backend"] == "wasm"
    columns = zip(*said["found"], strict=True)
    found = {name: np.array(column) for name, column in zip(export.OUTPUTS, columns, strict=True)}
    return found | {"strangeness": found["strangeness"][:, 0]}, float(np.median(said["milliseconds"]))


def assert_near(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, rtol=0, atol=tolerance, err_msg=name)


# A small backbone, and a head that fits its features


def photograph(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Make a picture of a few colours, unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PICTURES = [photograph(seed) for seed in range(24)]
PIXELS = np.stack([np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in PICTURES])


def freeze(build: Callable[[Any], Any] | None = None) -> bytes:
    """Freeze a network of random weights: convolutions of each kind, a residual, and what `build` adds before the mean."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.ReLU(6.0)(layers.Conv2D(8, 3, 2, padding="same", name="stem")(inputs))
    inner = layers.ReLU()(layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x))
    x = layers.Add(name="residual")([x, layers.Conv2D(8, 1, name="project")(inner)])
    x = build(x) if build else x
    network = keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(12, 1, use_bias=False)(x)))
    random = np.random.default_rng(0)
    for weight in network.weights:
        weight.assign(random.normal(0, 0.5, weight.shape))
    return backbone.freeze(network, lambda pixels: (pixels - 127.0) / 128.0, SIZE)


@pytest.fixture(scope="module")
def network() -> bytes:
    return freeze()


def features_of(network: bytes, pixels: np.ndarray) -> np.ndarray:
    return run(GraphDef.FromString(network), pixels, ("features",))["features"].astype(np.float64)


def fit(features: np.ndarray, k: int = K, scale: str = "none", temperature: float | None = 0.07) -> Head:
    """Fit a head to features, with random exemplars and a random whitening."""
    random = np.random.default_rng(1)
    scales = features.std(axis=0) if scale == "standard" else np.ones(features.shape[1])
    mean = features.mean(axis=0)
    components = np.linalg.svd((features - mean) / scales)[2][:k]
    square = random.normal(size=(k, k))
    return {
        "mean": mean,
        "scale": scales,
        "components": components,
        "whitening": square @ square.T + 3 * np.eye(k),
        "exemplars": {label: unit(random.normal(size=(n, k))) for label, n in LABELS.items()},
        "temperature": temperature,
    }


def to_head(head: Head) -> export.Head:
    """Repeat exemplars as read_head must."""
    n = max(len(vectors) for vectors in head["exemplars"].values())
    padded = [np.resize(vectors, (n, vectors.shape[1])) for vectors in head["exemplars"].values()]
    return export.Head(**head | {"exemplars": np.stack(padded), "temperature": head["temperature"] or 0.05})


@pytest.fixture(scope="module")
def head(network: bytes) -> Head:
    return fit(features_of(network, PIXELS))


def rounded_graph(network: bytes, head: Head) -> GraphDef:
    return export.rounded(export.simplified(export.joined(network, to_head(head))))


@pytest.fixture(scope="module")
def graph(network: bytes, head: Head) -> GraphDef:
    return rounded_graph(network, head)


def constants(graph: GraphDef) -> dict[str, np.ndarray]:
    return {node.name: tf.make_ndarray(node.attr["value"].tensor) for node in graph.node if node.op == "Const"}


# The graph


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_the_graph_computes_what_the_head_says(scale: str, network: bytes) -> None:
    features = features_of(network, PIXELS)
    head = fit(features, scale=scale)
    assert_near(run(export.joined(network, to_head(head)), PIXELS), apply(head, features), FLOAT32)


def test_simplifying_changes_no_output(network: bytes, head: Head) -> None:
    whole = export.joined(network, to_head(head))
    assert_near(run(export.simplified(whole), PIXELS), run(whole, PIXELS), FLOAT32)


def test_a_simple_graph_divides_by_no_constant_and_has_no_identity(graph: GraphDef) -> None:
    known = constants(graph)
    assert not [node.name for node in graph.node if node.op == "RealDiv" and node.input[1] in known]
    assert "Identity" not in {node.op for node in graph.node}


def test_rounding_leaves_only_numbers_of_float16(graph: GraphDef) -> None:
    values = [value for value in constants(graph).values() if value.dtype == np.float32]
    assert len(values) > 10
    assert all((value == value.astype(np.float16)).all() for value in values)


def test_rounding_costs_three_digits_of_an_output(network: bytes, head: Head, graph: GraphDef) -> None:
    assert_near(run(graph, PIXELS), apply(head, features_of(network, PIXELS)), FLOAT16)


@pytest.mark.parametrize("factor", [1e-9, 1e-5, 1e5, 1e9])
def test_no_unit_of_features_or_of_whitening_leaves_the_range_of_float16(factor: float, network: bytes) -> None:
    features = features_of(network, PIXELS)
    head = fit(features, scale="standard")
    expected = apply(head, features)
    head |= {"scale": head["scale"] * factor, "whitening": head["whitening"] * factor}
    assert_near(run(rounded_graph(network, head), PIXELS), expected, FLOAT16)


def test_features_of_a_small_and_of_a_large_scale_count_alike(network: bytes) -> None:
    features = features_of(network, PIXELS)
    head = fit(features, scale="standard")
    spread = np.geomspace(1e-4, 1e4, features.shape[1])
    head |= {"scale": head["scale"] * spread, "components": fit(features / spread, scale="standard")["components"]}
    assert_near(run(rounded_graph(network, head), PIXELS), apply(head, features), FLOAT16)


def test_an_image_that_is_the_mean_of_all_has_numbers_for_outputs(network: bytes, head: Head) -> None:
    mean = features_of(network, PIXELS[:1])[0]
    found = run(export.joined(network, to_head(head | {"mean": mean})), PIXELS[:1])
    assert all(np.isfinite(values).all() for values in found.values())


def test_a_constant_that_float16_cannot_hold_is_refused(network: bytes, head: Head) -> None:
    whole = export.joined(network, to_head(head | {"mean": head["mean"] + 7e4}))
    with pytest.raises(SystemExit, match=r"export: the constant \S+ reaches 7\d+(\.\d)?, and float16 ends at 65,504\. This"):
        export.rounded(export.simplified(whole))


def test_each_convolution_takes_its_bias_and_activation_along(graph: GraphDef) -> None:
    nodes = export.fused(graph).node
    assert {node.op for node in nodes}.isdisjoint({"BiasAdd", "Relu", "Relu6"})
    found = [
        (node.op, [each.decode() for each in node.attr["fused_ops"].list.s]) for node in nodes if "fused_ops" in node.attr
    ]
    assert sorted(found) == [
        ("FusedDepthwiseConv2dNative", ["BiasAdd", "Relu"]),
        ("_FusedConv2D", ["BiasAdd"]),  # a residual is added after it
        ("_FusedConv2D", ["BiasAdd", "Relu6"]),
    ]


def test_what_others_need_is_not_fused(head: Head) -> None:
    def build(x: Any) -> Any:
        x = keras.layers.Conv2D(8, 1)(x)
        return keras.layers.Add()([x, keras.layers.ReLU()(x)])

    nodes = export.fused(rounded_graph(freeze(build), head)).node
    assert [node.op for node in nodes].count("Relu") == 1


def test_tflite_computes_a_gelu_in_one(head: Head, tmp_path: Path) -> None:
    graph = rounded_graph(freeze(keras.layers.Activation("gelu")), head)
    (tmp_path / "model.tflite").write_bytes(export.to_tflite(graph))
    operations = Interpreter(str(tmp_path / "model.tflite"))._get_ops_details()
    assert "GELU" in {operation["op_name"] for operation in operations}
    assert_near(run_tflite(tmp_path / "model.tflite", PIXELS), run(graph, PIXELS), FLOAT32)


def test_an_operation_that_tensorflow_js_has_not_is_named(head: Head) -> None:
    strange = rounded_graph(freeze(keras.layers.Activation("softsign")), head)
    with pytest.raises(SystemExit, match=r"export: TensorFlow\.js cannot compute Softsign\. This model cannot be exported;"):
        export.to_tfjs(strange)


# The stage


def write_inputs(folder: Path, network: bytes, head: Head, size: int, pictures: list[Image.Image]) -> list[str]:
    """Write what the stages before write; exemplar number j of the label number i has the photograph number 3 i + j."""
    (folder / "backbone").mkdir(parents=True)
    (folder / "backbone" / "graph.pb").write_bytes(network)
    pixels = {"width": size, "height": size, "mode": "RGB", "resampling": "bicubic"}
    about = {
        "name": "small",
        "weights": "mine.h5",
        "n_features": len(head["mean"]),
        "pixels": pixels,
        "output": "features:0",
    }
    about["graph_sha256"] = hashlib.sha256(network).hexdigest()
    (folder / "backbone" / "backbone.json").write_text(json.dumps(about))
    contents = [png(image) for image in pictures]
    images = pd.DataFrame(
        {
            "image_id": [hashlib.sha256(content).hexdigest() for content in contents],
            "path": [f"{i:03}.png" for i in range(len(contents))],
            "content": contents,
        }
    )
    write(images, folder / "ingested" / "images")
    k, n_features = head["components"].shape
    component = range(1, k + 1)
    scaling = {"feature": range(n_features), "mean": head["mean"], "scale": head["scale"]}
    rows = [
        (label, j + 1, vector, *images.loc[3 * i + j, ["image_id", "path"]])
        for i, (label, vectors) in enumerate(head["exemplars"].items())
        for j, vector in enumerate(vectors)
    ]
    resized = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in pictures]
    deviation = (features_of(network, np.stack(resized)).astype(np.float64) - head["mean"]) / head["scale"]
    embedding = (deviation @ head["components"].T).astype(np.float32)
    tables = {
        "reduced/embeddings": pd.DataFrame({"image_id": images["image_id"], "embedding": list(embedding)})[::-1],
        "reduced/model/components": pd.DataFrame({"component": component, "weights": list(head["components"])}),
        "reduced/model/scaling": pd.DataFrame(scaling),
        "classifier/whitening": pd.DataFrame({"component": component, "weights": list(head["whitening"])}),
        "classifier/exemplars": pd.DataFrame(rows, columns=list(export.EXEMPLARS)),
    }
    for place, table in tables.items():
        write(table, folder / place)
    is_calibrated = head["temperature"] is not None
    settings = dict(zip(export.SETTINGS, (head["temperature"], 0.4, 0.3) if is_calibrated else (None,) * 3, strict=True))
    (folder / "classifier" / "settings").mkdir()
    columns = {name: pa.array([value], pa.float64()) for name, value in settings.items()}
    pq.write_table(pa.table(columns), folder / "classifier" / "settings" / "part-00000.parquet")
    metrics = {"recognition": {"images": 1200, "accuracy": 0.9} if is_calibrated else {"images": 0}}
    (folder / "classifier" / "metrics.json").write_text(json.dumps(metrics))
    return [str(folder / name) for name in ("ingested", "backbone", "reduced", "classifier")]


def run_stage(folder: Path, places: list[str], n_photographs: int = 2) -> Path:
    output = folder / "model"
    export.main([*places, str(output), "--photographs", str(n_photographs)])
    return output


@pytest.fixture(scope="module")
def inputs(network: bytes, head: Head, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"), network, head, SIZE, PICTURES)


@pytest.fixture(scope="module")
def written(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stage(tmp_path_factory.mktemp("written"), inputs)


@pytest.fixture
def own(network: bytes, head: Head, tmp_path: Path) -> list[str]:
    """Write inputs for one test alone, to be changed."""
    return write_inputs(tmp_path / "own", network, head, SIZE, PICTURES)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tflite_takes_one_image_as_bytes_and_names_what_it_gives(written: Path) -> None:
    interpreter = Interpreter(str(written / "model.tflite"))
    (pixels,) = interpreter.get_input_details()
    assert (pixels["name"], pixels["dtype"], pixels["shape"].tolist()) == ("pixels", np.uint8, [1, SIZE, SIZE, 3])
    found = {each["name"]: (each["dtype"], each["shape"].tolist()) for each in interpreter.get_output_details()}
    n = len(LABELS)
    shapes = {"probabilities": [1, n], "similarities": [1, n], "strangeness": [1], "embedding": [1, K]}
    assert found == {name: (np.float32, shape) for name, shape in shapes.items()}


def test_tflite_computes_what_tensorflow_does(written: Path, graph: GraphDef) -> None:
    assert_near(run_tflite(written / "model.tflite", PIXELS), run(graph, PIXELS), FLOAT32)


def test_tflite_keeps_each_constant_in_two_bytes(written: Path) -> None:
    interpreter = Interpreter(str(written / "model.tflite"))
    stored = [each for each in interpreter.get_tensor_details() if each["dtype"] == np.float16]
    assert sum(int(np.prod(each["shape"])) for each in stored) > 500


def test_the_page_gets_the_constants_of_the_graph(written: Path, graph: GraphDef) -> None:
    model = json.loads((written / "web" / "model.json").read_text())
    content, start = (written / "web" / "weights.bin").read_bytes(), 0
    (shard,) = model["weightsManifest"]
    assert shard["paths"] == ["weights.bin"]
    expected = constants(graph)
    for weight in shard["weights"]:
        stored = np.dtype(weight.get("quantization", weight)["dtype"])
        n = int(np.prod(weight["shape"], dtype=int))
        value = np.frombuffer(content, stored, n, start).astype(weight["dtype"]).reshape(weight["shape"])
        np.testing.assert_array_equal(value, expected.pop(weight["name"]), strict=True)
        start += n * stored.itemsize
    assert (start, expected) == (len(content), {})


def test_model_json_tells_what_the_model_is(written: Path, inputs: list[str]) -> None:
    about = json.loads((written / "model.json").read_text())
    files = {
        name: hashlib.sha256(content).hexdigest() for name, content in bytes_of(written).items() if name != "model.json"
    }
    described = json.loads(Path(inputs[1], "backbone.json").read_text())
    assert sorted(files) == ["model.tflite", "photographs.parquet", "web/model.json", "web/weights.bin"]
    assert about == {
        "labels": ["apple", "banana", "cherry"],
        "calibrated": True,
        "temperature": 0.07,
        "thresholds": {"min_similarity": 0.4, "max_strangeness": 0.3},
        "pixels": described["pixels"],
        "backbone": {"name": "small", "weights": "mine.h5", "graph_sha256": described["graph_sha256"]},
        "k": K,
        "n_exemplars": 6,
        "files": files,
        "versions": {"tensorflow": tf.__version__},
        "measured": {
            "images": 1200,
            "accuracy": 0.9,
            "on": "1,200 photographs, each by a model that has seen nothing of its fold",
        },
        "trained_on": {"images": len(PICTURES), "labels": 3},
    }


def test_without_calibration_the_temperature_is_the_default_and_nothing_is_refused(
    tmp_path: Path, network: bytes, head: Head
) -> None:
    plain = head | {"temperature": None}
    output = run_stage(tmp_path, write_inputs(tmp_path / "inputs", network, plain, SIZE, PICTURES))
    about = json.loads((output / "model.json").read_text())
    told = {key: about[key] for key in ("calibrated", "temperature", "thresholds", "measured")}
    assert told == {
        "calibrated": False,
        "temperature": 0.05,
        "thresholds": {"min_similarity": None, "max_strangeness": None},
        "measured": {"images": 0, "on": "no photograph: no label is in both folds"},
    }
    found = run_tflite(output / "model.tflite", PIXELS)
    assert_near(found, apply(plain, features_of(network, PIXELS)), FLOAT16)


# Photographs


def test_the_photographs_of_each_labels_first_exemplars_are_kept(written: Path) -> None:
    table = pq.read_table(written / "photographs.parquet")
    assert table.schema.equals(export.PHOTOGRAPHS)
    rows = table.to_pandas()
    assert list(zip(rows["label"], rows["path"], strict=True)) == [
        ("apple", "000.png"),
        ("apple", "001.png"),
        ("banana", "003.png"),
        ("cherry", "006.png"),
        ("cherry", "007.png"),
    ]
    assert rows["image_id"].tolist() == [hashlib.sha256(png(PICTURES[i])).hexdigest() for i in (0, 1, 3, 6, 7)]


def test_a_photograph_that_stands_for_two_exemplars_is_kept_once() -> None:
    exemplars = pd.DataFrame(
        {"label": list("aaab"), "path": list("zzyx"), "image_id": list("2213"), "exemplar": [1, 2, 3, 1]}
    )
    assert export.choose(exemplars, 2)["path"].tolist() == ["y", "z", "x"]


def test_a_photograph_has_the_embedding_that_the_model_gives_it(written: Path) -> None:
    found = np.stack(pq.read_table(written / "photographs.parquet")["embedding"].to_numpy())
    expected = run_tflite(written / "model.tflite", PIXELS[[0, 1, 3, 6, 7]])["embedding"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT16)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(("size", "expected"), [((640, 320), (96, 48)), ((50, 400), (12, 96)), ((40, 30), (40, 30))])
def test_a_picture_is_a_small_jpeg_of_the_same_proportions(size: tuple[int, int], expected: tuple[int, int]) -> None:
    content = export.to_picture(png(photograph(0, *size)))
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", expected, "RGB")
        original = photograph(0, *size).resize(expected, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(image, int) - np.asarray(original, int)).mean() < 12  # of 255: what JPEG loses
    assert len(content) < 4000


@pytest.mark.parametrize("resampling", featurize.PIXELS["resampling"])
def test_pixels_are_those_of_featurize(resampling: str) -> None:
    content, wanted = png(photograph(0, 97, 61)), {"width": 24, "height": 16, "resampling": resampling}
    np.testing.assert_array_equal(export.to_pixels(content, wanted), featurize.to_pixels(content, wanted), strict=True)


def test_pixels_of_a_turned_photograph_are_upright() -> None:
    colours = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]]], np.uint8)
    wide = colours.repeat(8, axis=0).repeat(8, axis=1)  # 24 x 8 pixels
    exif = Image.Exif()
    exif[0x0112] = 6  # it is upright once turned by 90 degrees, clockwise
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "PNG", exif=exif)
    pixels = export.to_pixels(file.getvalue(), {"width": 8, "height": 24, "resampling": "bilinear"})
    np.testing.assert_array_equal(pixels, np.rot90(wide, k=-1))


def test_only_the_row_groups_that_hold_a_wanted_photograph_are_read(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = tmp_path / "images" / "part-00000.parquet"
    contents = [bytes([65 + i]) * 1000 for i in range(6)]
    names = [f"{i}.jpg" for i in (0, 9, 2, 3, 4, 5)]  # by its first and last, each row group might hold what is wanted
    table = pa.table({"path": names, "content": contents})
    pq.write_table(table, file, row_group_size=2, compression="none", use_dictionary=False)
    damaged = file.read_bytes()
    at = damaged.index(b"A" * 1000)
    file.write_bytes(damaged[: at - 40] + b"\xff" * 40 + damaged[at:])  # the header of the first row group's page
    with pytest.raises(OSError, match=r".+"):
        list(export.read_contents(str(tmp_path), ["0.jpg"]))
    found = export.read_contents(str(tmp_path), ["2.jpg", "5.jpg"])
    assert list(found) == [("2.jpg", contents[2]), ("5.jpg", contents[5])]


# Errors


def assert_refused(folder: Path, places: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run_stage(folder, places)
    assert not (folder / "model").exists()


def test_a_graph_that_is_not_the_described_one_is_refused(own: list[str], tmp_path: Path) -> None:
    with Path(own[1], "graph.pb").open("ab") as file:
        file.write(b"\0")
    assert_refused(tmp_path, own, r"backbone/graph\.pb is not what backbone\.json says\. Run `dvc repro -f backbone`")


def replace(table: pd.DataFrame, folder: Path) -> None:
    (folder / "part-00000.parquet").unlink()
    folder.rmdir()
    write(table, folder)


def test_a_classifier_without_labels_is_refused(own: list[str], tmp_path: Path) -> None:
    exemplars = Path(own[3], "exemplars")
    table = pq.read_table(exemplars)
    pq.write_table(table.slice(0, 0), exemplars / "part-00000.parquet")
    assert_refused(tmp_path, own, "classifier/exemplars has no row: there is no label to recognise")


def test_a_classifier_of_another_reduction_is_refused_with_both_numbers(own: list[str], tmp_path: Path) -> None:
    components = Path(own[2], "model", "components")
    replace(pq.read_table(components).to_pandas()[:3], components)
    assert_refused(tmp_path, own, "reduced has 3 components, and .*classifier is for 5. Run `dvc repro`")


def test_photographs_that_are_not_there_are_counted(own: list[str], tmp_path: Path) -> None:
    images = Path(own[0], "images")
    replace(pq.read_table(images).to_pandas().drop(index=[1, 6]), images)
    assert_refused(tmp_path, own, "ingested has 3 of 5 photographs of exemplars. Run `dvc repro`")


@pytest.mark.parametrize("by", [0.01, np.nan])
def test_a_model_that_differs_from_tensorflow_is_refused_with_both_numbers(
    by: float, own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = export.load_tflite

    def load_damaged(content: bytes) -> export.Model:
        model = load(content)
        return lambda image: (found := model(image)) | {"probabilities": found["probabilities"][:, ::-1] + by}

    monkeypatch.setattr(export, "load_tflite", load_damaged)
    told = r"differ by \S+ where 0\.001 is allowed, and in the label of \d of 5 photographs\."
    assert_refused(tmp_path, own, told)


@pytest.mark.parametrize("n", ["0", "65", "many"])
def test_a_number_of_photographs_out_of_bounds_is_refused(n: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.parse_args(["ingested", "backbone", "reduced", "classifier", "model", "--photographs", n])
    assert "argument --photographs" in capsys.readouterr().err


# The same bytes, and real networks


def test_a_second_run_writes_the_same_bytes(written: Path, inputs: list[str], tmp_path: Path) -> None:
    assert bytes_of(run_stage(tmp_path, inputs)) == bytes_of(written)


@pytest.mark.slow  # two processes that import TensorFlow
def test_two_processes_write_the_same_bytes(written: Path, inputs: list[str], tmp_path: Path) -> None:
    unlike = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_ENABLE_ONEDNN_OPTS": "0"}
    for seed, environment in (("1", {}), ("2", unlike)):
        output = tmp_path / seed
        command = [sys.executable, "-m", "stages.export", *inputs, str(output), "--photographs", "2"]
        environment = os.environ | {"PYTHONHASHSEED": seed} | environment
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "export: 3 labels, 5 photographs; 0.0 MB of model\n"
        assert bytes_of(output) == bytes_of(written)


def freeze_real(name: str, size: int) -> bytes:
    """Freeze a network of the pipeline: with its real weights if they are installed, else with random ones."""
    network, scaling = backbone.build(name, size)
    if name == backbone.LITE0:
        backbone.load_lite0(network)
    return backbone.freeze(network, scaling, size)


@pytest.fixture(
    scope="module", params=[(backbone.LITE0, 224), ("resnet50", 96), ("convnexttiny", 64)], ids=lambda each: each[0]
)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, GraphDef, np.ndarray]:
    """Export a real network with a head of 64 components: its name, the folder, the rounded graph and some pixels."""
    name, size = request.param
    keras.utils.set_random_seed(0)
    network = freeze_real(name, size)
    pictures = [photograph(seed, 100, 100) for seed in range(80)]
    pixels = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in pictures])
    head = fit(features_of(network, pixels), k=64)
    head["exemplars"] = {f"label {i:02}": head["exemplars"]["cherry"][[i % 3]] for i in range(26)}
    folder = tmp_path_factory.mktemp(name)
    output = run_stage(folder, write_inputs(folder, network, head, size, pictures), n_photographs=4)
    return name, output, rounded_graph(network, head), pixels[:20]


@pytest.mark.slow
def test_tflite_of_a_real_network_computes_what_tensorflow_does(real: Any) -> None:
    _, output, graph, pixels = real
    assert_near(run_tflite(output / "model.tflite", pixels), run(graph, pixels), 1e-4)


@pytest.mark.slow
def test_tensorflow_js_computes_what_tensorflow_does(real: Any) -> None:
    _, output, graph, pixels = real
    found, milliseconds = run_tfjs(output, pixels)
    assert_near(found, run(graph, pixels), FLOAT32)
    assert milliseconds < 1000  # fused, in WebAssembly; this machine may be busy


@pytest.mark.slow
def test_a_real_network_takes_two_bytes_a_weight(real: Any) -> None:
    name, output, graph, _ = real
    n_weights = sum(value.size for value in constants(graph).values())
    for file in ("model.tflite", "web/weights.bin"):
        assert (output / file).stat().st_size == pytest.approx(2 * n_weights, rel=0.02)
    if name == backbone.LITE0:
        assert (output / "model.tflite").stat().st_size < 7.5e6
