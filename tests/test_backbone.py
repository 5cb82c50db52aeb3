"""Facts about the frozen network of stages/backbone.py; plain Keras and two photographs are the oracles."""

import collections
import hashlib
import importlib.resources
import io
import json
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_sample_image

from stages import backbone, featurize

ROOT = Path(__file__).resolve().parent.parent
# The frozen graph and eager Keras multiply and add the same float32 in another order: 5 of 7 digits agree, and of numbers
# near zero as much of the largest.
RTOL, ATOL_OF_LARGEST = 1e-4, 1e-5
# Of the default backbone's graph.pb. Another version of TensorFlow or Keras may write another; another processor must not.
LITE0_GRAPH_SHA256 = "cd03bbab5039532a0ac8a216b2fb7e0c8ef3f900df9c3bbf445c74e3cf5ec177"
BUILDERS = {
    "efficientnetb0": keras.applications.EfficientNetB0,
    "mobilenet": keras.applications.MobileNet,
    "mobilenetv2": keras.applications.MobileNetV2,
    "resnet50": keras.applications.ResNet50,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # Keras's own, of NumPy
    pytest.mark.filterwarnings("ignore:`input_shape` is undefined"),  # Keras's, of an image_size other than its own
]

Tensor = tuple[np.ndarray, int, tuple[int, ...], tuple[int, ...]]  # storage, offset, shape and strides, in elements


def random_pixels(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def plain(name: str, size: int, weights: str | None = None, top: bool = False) -> keras.Model:
    """Build the network by Keras alone; without weights, it has random ones, the same each time."""
    keras.utils.set_random_seed(0)
    shape = (size, size, 3)
    if top:
        return BUILDERS[name](weights=weights, input_shape=shape)
    return BUILDERS[name](weights=weights, input_shape=shape, include_top=False, pooling="avg")


def features_of(graph: bytes, pixels: np.ndarray) -> np.ndarray:
    with tf.Graph().as_default() as frozen:
        tf.import_graph_def(tf.compat.v1.GraphDef.FromString(graph), name="")
    with tf.compat.v1.Session(graph=frozen) as session:
        return session.run("features:0", {"pixels:0": pixels})


def assert_same_features(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.ptp(expected) > 0  # equal constants would prove nothing
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=ATOL_OF_LARGEST * np.abs(expected).max())


def arguments(folder: Path, name: str, weights: str = "imagenet", image_size: int = 32) -> list[str]:
    places = [str(folder / "weights"), str(folder / "backbone")]
    return [*places, "--name", name, "--weights", weights, "--image_size", str(image_size)]


def run_process(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.backbone", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder that has an empty folder `weights`."""
    (tmp_path / "weights").mkdir()
    return tmp_path


def freeze_lite0(size: int) -> bytes:
    network, scaling = backbone.build(backbone.LITE0, size)
    backbone.load_lite0(network)
    return backbone.freeze(network, scaling, size)


@pytest.fixture(scope="module")
def lite0_graph() -> bytes:
    return freeze_lite0(64)


# EfficientNet-Lite0


@pytest.fixture(scope="module")
def recognise() -> Callable[[Image.Image], int]:
    """Tell the ImageNet class of a photograph, by EfficientNet-Lite0 with its classifier."""
    network, scaling = backbone.build(backbone.LITE0, 224, classifier=True)
    backbone.load_lite0(network)

    def predict(photograph: Image.Image) -> int:
        pixels = np.asarray(photograph.resize((224, 224)), np.float32)[None]
        return int(np.argmax(network(scaling(pixels), training=False)))

    return predict


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [("flower.jpg", {985}), ("china.jpg", {442, 663, 698})],  # daisy; bell cote, monastery, palace
    ids=["daisy", "pavilion"],
)
def test_lite0_recognises_a_photograph(photograph: str, classes: set[int], recognise: Callable[[Image.Image], int]) -> None:
    image = Image.fromarray(load_sample_image(photograph))
    assert recognise(image.crop((107, 0, 534, 427))) in classes  # the square in the middle


def test_lite0_has_as_many_weights_as_its_authors_say() -> None:
    network, _ = backbone.build(backbone.LITE0, 32, classifier=True)
    assert sum(np.prod(weights.shape) for weights in network.trainable_weights) == 4_652_008


def test_lite0_cuts_activations_off_at_six() -> None:
    network, _ = backbone.build(backbone.LITE0, 32)
    assert {layer.max_value for layer in network.layers if isinstance(layer, keras.layers.ReLU)} == {6}


def test_lite0_features_are_what_its_classifier_is_fed(lite0_graph: bytes) -> None:
    network, _ = backbone.build(backbone.LITE0, 64, classifier=True)
    backbone.load_lite0(network)
    headless = keras.Model(network.input, network.layers[-1].input)
    pixels = random_pixels(3, 64)
    expected = headless((pixels.astype(np.float32) - 127) / 128, training=False)
    assert_same_features(features_of(lite0_graph, pixels), np.asarray(expected))


def test_a_damaged_weights_package_is_refused_by_its_sha256(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    content = bytearray((importlib.resources.files(backbone.LITE0_PACKAGE) / backbone.LITE0_FILE).read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one weight
    damaged = tmp_path / "damaged_package" / backbone.LITE0_FILE
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(content)
    (tmp_path / "damaged_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backbone, "LITE0_PACKAGE", "damaged_package")
    with pytest.raises(SystemExit, match=f"not {backbone.LITE0_SHA256}. Install its package again"):
        backbone.main(arguments(folder, backbone.LITE0))
    assert not (folder / "backbone").exists()


# Networks of keras.applications


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("mobilenet", ".weights.h5"),
        pytest.param("resnet50", ".weights.h5", marks=pytest.mark.slow),
        pytest.param("resnet50", ".h5", marks=pytest.mark.slow),
    ],
)
def test_features_from_a_weights_file_are_those_of_plain_keras(name: str, suffix: str, folder: Path) -> None:
    network = plain(name, 64)
    save = network.save_weights if suffix == ".weights.h5" else network.save
    save(folder / "weights" / f"mine{suffix}")
    backbone.main(arguments(folder, name, f"mine{suffix}", 64))
    pixels = random_pixels(3, 64)
    preprocess = getattr(keras.applications, name).preprocess_input
    expected = network(preprocess(pixels.astype(np.float32)), training=False)
    assert_same_features(features_of((folder / "backbone" / "graph.pb").read_bytes(), pixels), np.asarray(expected))


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet",
        pytest.param(
            "efficientnetb0",
            marks=pytest.mark.slow,  # Keras gives it a layer more when its weights are ImageNet's
        ),
    ],
)
def test_features_from_imagenet_weights_are_those_of_plain_keras(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded = folder / "weights" / "downloaded.h5"  # random weights in the place of those that Keras would fetch
    plain(name, 32).save(downloaded)
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", lambda *_, **__: str(downloaded))
    backbone.main(arguments(folder, name))
    pixels = random_pixels(3, 32)
    preprocess = {"mobilenet": keras.applications.mobilenet, "efficientnetb0": keras.applications.efficientnet}[name]
    network = plain(name, 32, weights="imagenet")
    expected = network(preprocess.preprocess_input(pixels.astype(np.float32)), training=False)
    assert_same_features(features_of((folder / "backbone" / "graph.pb").read_bytes(), pixels), np.asarray(expected))


def test_every_network_of_keras_has_its_preprocessing() -> None:
    modules = {name: sys.modules[builder.__module__] for name, builder in backbone.KERAS.items()}
    assert {"resnet50", "mobilenetv3small", "efficientnetb0", "vgg16"} <= modules.keys()
    assert [name for name, module in modules.items() if not callable(module.preprocess_input)] == []


@pytest.mark.slow  # a process that imports TensorFlow
def test_a_download_that_fails_ends_in_a_message_that_says_what_to_do(folder: Path) -> None:
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")  # none there
    result = run_process(arguments(folder, "mobilenet"), KERAS_HOME=str(folder), NO_PROXY="", no_proxy="", **proxies)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.index("backbone: ") :]
    for remedy in ("cannot be downloaded", "~/.keras/models", "data/weights", "backbone.weights", backbone.LITE0):
        assert remedy in message
    assert not (folder / "backbone").exists()


# The graph


def test_the_graph_has_no_variables(lite0_graph: bytes) -> None:
    graph = tf.compat.v1.GraphDef.FromString(lite0_graph)
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    assert {node.op for node in nodes}.isdisjoint({"VarHandleOp", "ReadVariableOp", "VariableV2"})


def test_the_graph_takes_bytes_of_pixels_and_gives_float32(lite0_graph: bytes) -> None:
    nodes = {node.name: node for node in tf.compat.v1.GraphDef.FromString(lite0_graph).node}
    assert nodes["pixels"].attr["dtype"].type == tf.uint8.as_datatype_enum
    assert [size.size for size in nodes["pixels"].attr["shape"].shape.dim] == [-1, 64, 64, 3]
    assert nodes["features"].attr["T"].type == tf.float32.as_datatype_enum


def test_features_of_an_image_do_not_depend_on_its_neighbours(lite0_graph: bytes) -> None:
    pixels = random_pixels(4, 64)
    each = np.concatenate([features_of(lite0_graph, pixels[i : i + 1]) for i in range(4)])
    assert_same_features(features_of(lite0_graph, pixels), each)


@pytest.fixture(scope="module")
def small() -> tuple[tf.compat.v1.GraphDef, Callable[[np.ndarray], np.ndarray]]:
    """Freeze a network of random weights with each kind of normalization and sum; plain Keras predicts beside it."""

    def normed(x: Any, name: str, **options: bool) -> Any:
        return keras.layers.BatchNormalization(name=name, **options)(x)

    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    stem = normed(keras.layers.Conv2D(6, 3, padding="same", name="biased")(inputs), "after_a_bias", scale=False)
    deep = keras.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, use_bias=False)(keras.layers.ReLU()(stem))
    deep = keras.layers.ReLU()(normed(deep, "after_a_depthwise", center=False))
    deep = normed(keras.layers.SeparableConv2D(12, 3, padding="same", use_bias=False)(deep), "after_a_separable")
    deep = normed(keras.layers.Conv2D(12, 1, activation="relu")(deep), "after_an_activation")
    shared = keras.layers.Conv2D(6, 1, use_bias=False, name="shared")(deep)
    summed = keras.layers.Add(name="residual")([normed(shared, "after_what_others_need"), shared])
    gate = keras.layers.Reshape((1, 1, 6))(keras.layers.GlobalAveragePooling2D()(summed))
    gated = keras.layers.Multiply()([keras.layers.Conv2D(6, 1, name="gated")(summed), gate])
    operated = keras.layers.Conv2D(6, 1)(keras.layers.Add()([gated, gate]))
    alone = normed(operated, "after_what_an_operation_needs") + operated
    network = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(alone))
    random = np.random.default_rng(0)
    for weight in network.weights:
        weight.assign(random.uniform(0.5 if "variance" in weight.name else -1.5, 1.5, weight.shape))
    graph = backbone.freeze(network, lambda pixels: pixels / 255.0, 8)
    return tf.compat.v1.GraphDef.FromString(graph), lambda pixels: network.predict(pixels / np.float32(255), verbose=0)


def test_fusing_leaves_features_those_of_plain_keras(small: Any) -> None:
    graph, predict = small
    assert_same_features(features_of(graph.SerializeToString(), random_pixels(4, 8)), predict(random_pixels(4, 8)))


def test_a_normalization_is_fused_where_it_alone_follows_a_convolution(small: Any) -> None:
    left = {node.name.split("/")[1].removesuffix("_1") for node in small[0].node if node.op == "Rsqrt"}
    assert left == {"after_an_activation", "after_what_others_need", "after_what_an_operation_needs"}


def test_only_sums_of_feature_maps_are_fused(small: Any) -> None:
    assert [node.name.split("/")[1] for node in small[0].node if node.op == "AddN"] == ["residual_1"]


def test_a_convolution_of_each_channel_apart_becomes_depthwise_and_a_gelu_an_error_function() -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 3, strides=2, groups=6)(keras.layers.Conv2D(6, 1)(inputs))
    outputs = keras.layers.GlobalAveragePooling2D()(keras.layers.Activation("gelu")(x))
    network = keras.Model(inputs, outputs)
    for weight in network.weights:
        weight.assign(np.random.default_rng(0).normal(0, 1, weight.shape))
    graph = backbone.freeze(network, lambda pixels: pixels / 255.0, 8)
    operations = collections.Counter(node.op for node in tf.compat.v1.GraphDef.FromString(graph).node)
    found = {
        name: operations[name] for name in ("Conv2D", "DepthwiseConv2dNative", "StatefulPartitionedCall", "Erf", "Erfc")
    }
    assert found == {"Conv2D": 1, "DepthwiseConv2dNative": 1, "StatefulPartitionedCall": 0, "Erf": 1, "Erfc": 0}
    pixels = random_pixels(4, 8)
    assert_same_features(features_of(graph, pixels), network.predict(pixels / np.float32(255), verbose=0))


@pytest.mark.slow  # networks of 34 to 121 normalizations
@pytest.mark.parametrize(
    ("name", "n_left"),
    [
        ("mobilenetv3small", 0),
        ("xception", 0),
        ("resnet50v2", 17),  # those before the convolutions that begin a block, and the last one
        ("densenet121", 62),  # those after a concatenation or a pooling, and the first of each
    ],
)
def test_every_normalization_after_a_convolution_is_fused(name: str, n_left: int) -> None:
    network, scaling = backbone.build(name, 96)
    graph = tf.compat.v1.GraphDef.FromString(backbone.freeze(network, scaling, 96))
    assert collections.Counter(node.op for node in graph.node)["Rsqrt"] == n_left


@pytest.mark.slow  # a network of 53 convolutions
def test_all_of_resnet50_but_its_scaling_is_in_its_convolutions() -> None:
    network, scaling = backbone.build("resnet50", 32)
    graph = tf.compat.v1.GraphDef.FromString(backbone.freeze(network, scaling, 32))
    counts = collections.Counter(node.op for node in graph.node)
    assert [counts[op] for op in ("Conv2D", "BiasAdd", "AddN", "Mul", "AddV2")] == [53, 53, 16, 0, 1]


def test_the_default_graph_is_one_file_on_every_processor() -> None:
    assert hashlib.sha256(freeze_lite0(224)).hexdigest() == LITE0_GRAPH_SHA256


def test_the_graph_names_no_device(lite0_graph: bytes) -> None:
    assert {node.device for node in tf.compat.v1.GraphDef.FromString(lite0_graph).node} == {""}


def test_the_graph_is_the_same_to_the_byte_whatever_was_built_before(lite0_graph: bytes) -> None:
    plain("mobilenet", 32)
    assert freeze_lite0(64) == lite0_graph


@pytest.mark.slow  # two processes that import TensorFlow
def test_two_processes_write_the_same_bytes_whatever_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "keras.json").write_text(
        json.dumps({"floatx": "float16", "epsilon": 0.1, "backend": "jax", "image_data_format": "channels_first"})
    )
    unlike = {
        "NPY_DISABLE_CPU_FEATURES": " ".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])),
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "OMP_NUM_THREADS": "1",
        "KERAS_HOME": str(tmp_path),
    }
    written = []
    for seed, environment in (("1", {}), ("2", unlike)):
        folder = tmp_path / seed
        folder.mkdir()
        result = run_process(arguments(folder, backbone.LITE0), PYTHONHASHSEED=seed, **environment)
        assert result.returncode == 0, result.stderr
        written.append([(folder / "backbone" / name).read_bytes() for name in ("graph.pb", "backbone.json")])
    assert written[0] == written[1]


# The stage's output and its errors


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    backbone.main(arguments(folder, backbone.LITE0))
    return folder / "backbone"


def test_main_describes_the_graph_that_it_writes(written: Path) -> None:
    graph = (written / "graph.pb").read_bytes()
    description = json.loads((written / "backbone.json").read_text())
    assert len(description.pop("weights_sha256")) == 64
    assert description == {
        "name": backbone.LITE0,
        "weights": "imagenet",
        "graph_sha256": hashlib.sha256(graph).hexdigest(),
        "input": "pixels:0",
        "output": "features:0",
        "n_features": features_of(graph, random_pixels(2, 32)).shape[1],
        "step": 2.0**-10,
        "pixels": {
            "orientation": "upright",
            "mode": "RGB",
            "width": 32,
            "height": 32,
            "fit": "stretch",
            "resampler": "Pillow",
            "resampling": "bicubic",
            "dtype": "uint8",
        },
    }


@pytest.mark.parametrize(
    ("size", "exponent"), [(1.0, -8), (1.4, -8), (1.42, -7), (0.72, -8), (0.7, -9), (1000.0, 2), (1e-6, -28)], ids=str
)
def test_the_step_is_the_power_of_two_that_gives_features_of_usual_size_8_bits(size: float, exponent: int) -> None:
    features = np.array([[0, size], [-size, np.sqrt(2) * size]], np.float32)  # the root of the mean square is the size
    assert backbone.step_of(features, "a network") == 2.0**exponent


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf], ids=str)
def test_a_network_whose_features_tell_nothing_ends_the_stage(value: float) -> None:
    with pytest.raises(SystemExit, match=rf"root mean square of {value}, so a network tells nothing about an image"):
        backbone.step_of(np.full((4, 3), value, np.float32), "a network")


def test_the_features_of_the_probe_are_about_as_large_as_those_of_photographs(lite0_graph: bytes) -> None:
    photographs = [Image.fromarray(load_sample_image(name)).resize((64, 64)) for name in ("china.jpg", "flower.jpg")]
    steps = [
        backbone.step_of(features_of(lite0_graph, pixels), backbone.LITE0)
        for pixels in (np.stack([np.asarray(each) for each in photographs]), backbone.probe(64))
    ]
    assert 0.5 <= steps[0] / steps[1] <= 2


def test_the_probe_is_the_same_everywhere() -> None:
    assert hashlib.sha256(backbone.probe(224).tobytes()).hexdigest() == (
        "7686fa81773f88bda4ee8e3a47748497eb504903eea72605908f903b38a9221a"
    )


def test_featurize_knows_the_pixels_that_main_describes(written: Path) -> None:
    featurize.check_pixels(json.loads((written / "backbone.json").read_text())["pixels"])


def test_main_writes_nothing_else(written: Path) -> None:
    assert [path.name for path in written.parent.iterdir()] == ["backbone"]
    assert sorted(path.name for path in written.iterdir()) == ["backbone.json", "graph.pb"]


def test_a_failure_leaves_nothing(folder: Path) -> None:
    with pytest.raises(SystemExit):
        backbone.main(arguments(folder, "mobilenet", "missing.h5"))
    assert not (folder / "backbone").exists()


def test_weights_that_are_not_there_are_named(folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"no weights file .*/weights/missing\.h5; backbone\.weights is imagenet or"):
        backbone.main(arguments(folder, "mobilenet", "missing.h5"))


def make_weights(path: Path, kind: str) -> None:
    """Write a file that does not hold the weights of MobileNet without its classifier."""
    match kind:
        case "another network":
            save(plain("mobilenetv2", 32), path)
        case "with the classifier":
            save(plain("mobilenet", 32, top=True), path)
        case "cut off":
            save(plain("mobilenet", 32), path)
            path.write_bytes(path.read_bytes()[:100_000])
        case "no weights":
            path.write_text("<html>404</html>")


def save(network: keras.Model, path: Path) -> None:
    (network.save_weights if path.name.endswith(".weights.h5") else network.save)(path)


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("another network", "mine.weights.h5"),
        ("another network", "mine.h5"),
        ("with the classifier", "mine.h5"),
        ("cut off", "mine.weights.h5"),
        ("no weights", "mine.weights.h5"),
        ("no weights", "mine.h5"),
        ("no weights", "mine.txt"),
        ("no weights", "mine.keras"),
    ],
)
@pytest.mark.filterwarnings("ignore:Skipping nested container")  # Keras's, before its error
def test_a_file_that_does_not_hold_the_weights_is_refused(kind: str, file: str, folder: Path) -> None:
    make_weights(folder / "weights" / file, kind)
    with pytest.raises(SystemExit, match=f"weights/{file} does not hold the weights of mobilenet without its classifier: "):
        backbone.main(arguments(folder, "mobilenet", file))


def test_an_unknown_name_is_refused_with_those_that_are_known(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        backbone.main(arguments(folder, "resnet51"))
    assert error.value.code == 2
    message = capsys.readouterr().err
    known = message.replace("'", "").partition("argument --name: invalid choice: resnet51 (choose from ")[2]
    assert known.startswith("efficientnet-lite0, convnextbase, ")
    assert " resnet50, " in known


def test_an_image_size_that_is_too_small_for_the_network_is_refused(folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"inceptionv3 cannot be built for image_size 74: .* at least 75x75"):
        backbone.main(arguments(folder, "inceptionv3", image_size=74))


# PyTorch's file format without PyTorch


def legacy_file(monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Tensor]) -> bytes:
    """Write a file as torch.save did before version 1.6. Arrays that are one object share one storage."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    vars(torch).update({name: type(name, (), {"__module__": "torch"}) for name in ("FloatStorage", "LongStorage")})
    rebuild = types.FunctionType((lambda *_: None).__code__, {}, "_rebuild_tensor_v2")
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    vars(utils)["_rebuild_tensor_v2"] = rebuild
    arrays = {str(id(array)): array for array, *_ in tensors.values()}

    class Stored:
        def __init__(self, storage: np.ndarray, *place: Any) -> None:
            self.storage, self.place = storage, place

        def __reduce__(self) -> tuple[Any, ...]:
            return utils._rebuild_tensor_v2, (self.storage, *self.place, False, collections.OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> tuple[Any, ...] | None:
            if not isinstance(thing, np.ndarray):
                return None
            storage = torch.FloatStorage if thing.dtype == np.float32 else torch.LongStorage
            return "storage", storage, str(id(thing)), "cpu", thing.size, None

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        file = io.BytesIO()
        stored = collections.OrderedDict((name, Stored(*tensor)) for name, tensor in tensors.items())
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, stored, list(arrays)):
            Pickler(file, protocol=2).dump(part)
    for array in arrays.values():
        file.write(array.size.to_bytes(8, "little") + array.tobytes())
    return file.getvalue()


def test_tensors_of_both_types_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, steps = np.linspace(0, 1, 6, dtype=np.float32), np.array([2**40], np.int64)
    content = legacy_file(monkeypatch, {"weights": (weights, 0, (2, 3), (3, 1)), "steps": (steps, 0, (), ())})
    tensors = backbone.read_pytorch(content)
    assert list(tensors) == ["weights", "steps"]
    np.testing.assert_array_equal(tensors["weights"], weights.reshape(2, 3), strict=True)
    np.testing.assert_array_equal(tensors["steps"], steps.reshape(()), strict=True)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((0, (2, 3), (3, 1)), [[0, 1, 2], [3, 4, 5]]),
        ((0, (3, 2), (1, 3)), [[0, 3], [1, 4], [2, 5]]),
        ((4, (2, 2), (2, 1)), [[4, 5], [6, 7]]),
        ((1, (3,), (4,)), [1, 5, 9]),
        ((2, (2, 3), (0, 1)), [[2, 3, 4], [2, 3, 4]]),
        ((7, (), ()), 7),
    ],
    ids=["rows", "transposed", "offset", "every fourth", "repeated", "one number"],
)
def test_a_tensor_is_a_view_of_its_storage(place: tuple[Any, ...], expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = np.arange(12, dtype=np.float32)
    np.testing.assert_array_equal(backbone.read_pytorch(legacy_file(monkeypatch, {"w": (storage, *place)}))["w"], expected)


def test_tensors_can_share_a_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = np.arange(4, dtype=np.float32)
    file = legacy_file(monkeypatch, {"a": (storage, 0, (2,), (1,)), "b": (storage, 2, (2,), (1,))})
    tensors = backbone.read_pytorch(file)
    assert [tensors["a"].tolist(), tensors["b"].tolist()] == [[0, 1], [2, 3]]


class Call:
    """An object that calls the function when plain pickle reads it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, open], ids=["os.system", "eval", "open"])
@pytest.mark.parametrize("place", range(5), ids=["magic number", "version", "system", "tensors", "keys"])
def test_a_pickle_that_asks_for_anything_else_is_refused(function: Callable[..., Any], place: int) -> None:
    parts = [0x1950A86A20F9469CFC6C, 1001, {}, collections.OrderedDict(), []]
    parts[place] = Call(function, "nothing-of-this-name")
    with pytest.raises(pickle.UnpicklingError, match="has no place in a file of weights"):
        backbone.read_pytorch(b"".join(pickle.dumps(part, protocol=2) for part in parts))
