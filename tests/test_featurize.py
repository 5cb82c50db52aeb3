"""Facts about stages/featurize.py: one pass of the backbone for each distinct image, and never again."""

import copy
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from PIL import Image, ImageOps
from pyspark.sql import DataFrame, DataFrameReader, SparkSession
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from bootstrap import parameters
from stages import featurize
from tests import webhdfs
from tests.helpers import PARAMS

ROOT = Path(__file__).resolve().parent.parent
SIZE = 8  # of the backbone's input, pixels
N_FEATURES = 3
STEP = 2.0**-6  # means of 64 whole numbers are whole multiples of it
PIXELS = {
    "orientation": "upright",
    "mode": "RGB",
    "width": SIZE,
    "height": SIZE,
    "fit": "stretch",
    "resampler": "Pillow",
    "resampling": "bicubic",
    "dtype": "uint8",
}
BACKBONE = {"input": "pixels:0", "output": "features:0", "n_features": N_FEATURES, "step": STEP, "pixels": PIXELS}

ImageBytes = Callable[..., bytes]


@pytest.fixture(scope="session")
def graph() -> bytes:
    """Make a backbone whose features are the means of red, green and blue: of 64 whole numbers, so float32 is exact."""

    @tf.function(input_signature=[tf.TensorSpec((None, SIZE, SIZE, 3), tf.uint8, name="pixels")])
    def means(pixels: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(tf.cast(pixels, tf.float32), axis=[1, 2], name="features")

    frozen = convert_variables_to_constants_v2(means.get_concrete_function())
    return frozen.graph.as_graph_def().SerializeToString(deterministic=True)


@pytest.fixture(scope="session")
def slow_graph() -> bytes:
    """Make the same backbone, but one that takes a twentieth of a second for a batch."""

    @tf.function(input_signature=[tf.TensorSpec((None, SIZE, SIZE, 3), tf.uint8, name="pixels")])
    def means(pixels: tf.Tensor) -> tf.Tensor:
        exact = tf.reduce_mean(tf.cast(pixels, tf.float32), axis=[1, 2])
        work = tf.fill((700, 700), tf.reduce_mean(exact) / 2**20)
        for _ in range(5):
            work = work @ work
        return tf.add(exact, tf.minimum(tf.reduce_sum(tf.abs(work)), 0.0), name="features")

    frozen = convert_variables_to_constants_v2(means.get_concrete_function())
    return frozen.graph.as_graph_def().SerializeToString(deterministic=True)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def means_of(content: bytes) -> list[float]:
    """Compute the features of an image by Pillow and NumPy alone."""
    image = Image.open(io.BytesIO(content)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image).mean(axis=(0, 1)).tolist()


@pytest.fixture(scope="module")
def contents(image_bytes: ImageBytes) -> list[bytes]:
    """Make nineteen distinct images: no multiple of a batch."""
    return [image_bytes("PNG" if i % 2 else "JPEG", size=(10 + i, 9), seed=i) for i in range(19)]


def images_of(spark: SparkSession, contents: list[bytes]) -> DataFrame:
    rows = [(sha256(content), f"Apple/{i}.jpg", content) for i, content in enumerate(contents)]
    return spark.createDataFrame(rows, "content_id string, path string, content binary")


# Pixels


def test_an_image_of_the_networks_size_keeps_its_pixels(image_bytes: ImageBytes) -> None:
    content = image_bytes("PNG", size=(SIZE, SIZE))
    np.testing.assert_array_equal(featurize.to_pixels(content, PIXELS), np.asarray(Image.open(io.BytesIO(content))))


def test_pixels_are_red_green_blue_in_whole_numbers() -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 30), (200, 100, 0)).save(file, "PNG")
    pixels = featurize.to_pixels(file.getvalue(), PIXELS)
    assert (pixels.shape, pixels.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert (pixels == [200, 100, 0]).all()


def test_the_whole_image_is_stretched_to_the_square() -> None:
    file, image = io.BytesIO(), Image.new("RGB", (80, 20), "white")
    image.paste("black", (40, 0, 80, 20))
    image.save(file, "PNG")
    pixels = featurize.to_pixels(file.getvalue(), PIXELS)
    assert (pixels[:, :3] == 255).all()
    assert (pixels[:, 5:] == 0).all()


@pytest.mark.parametrize("size", [(30, 20), (5, 6), (100, 100)], ids=["to_smaller", "to_larger", "to_much_smaller"])
def test_resizing_is_the_bicubic_one_of_tensorflow(size: tuple[int, int]) -> None:
    file = io.BytesIO()
    grey = np.random.default_rng(0).integers(64, 192, (*size, 3), np.uint8)  # nothing overshoots 0 or 255
    Image.fromarray(grey).save(file, "PNG")
    exact = tf.image.resize(grey, (SIZE, SIZE), method="bicubic", antialias=True)
    # Pillow rounds to whole numbers twice, after the rows and after the columns; TensorFlow does not at all.
    np.testing.assert_allclose(featurize.to_pixels(file.getvalue(), PIXELS), exact, atol=1.5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_pixels_are_upright_whatever_the_orientation_that_exif_says(
    format: str, orientation: int, image_bytes: ImageBytes
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = image_bytes(format, exif=exif)
    upright = io.BytesIO()
    ImageOps.exif_transpose(Image.open(io.BytesIO(turned))).save(upright, "PNG")
    np.testing.assert_array_equal(featurize.to_pixels(turned, PIXELS), featurize.to_pixels(upright.getvalue(), PIXELS))


@pytest.mark.parametrize("resampling", ["nearest", "lanczos"])
def test_pixels_are_of_the_size_and_the_resampling_that_are_asked_for(resampling: str, image_bytes: ImageBytes) -> None:
    content = image_bytes("PNG", size=(30, 20))
    expected = Image.open(io.BytesIO(content)).resize((7, 5), getattr(Image.Resampling, resampling.upper()))
    wanted = PIXELS | {"width": 7, "height": 5, "resampling": resampling}
    np.testing.assert_array_equal(featurize.to_pixels(content, wanted), np.asarray(expected))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fit": "crop"}, "fit is 'crop'; this stage knows stretch."),
        ({"resampling": "area"}, "resampling is 'area'; this stage knows nearest, .*bicubic"),
        ({"dtype": "float32"}, "dtype is 'float32'; this stage knows uint8."),
        ({"mode": None}, "mode is None; this stage knows RGB."),
        ({"crop": 0.875}, "crop is 0.875; this stage knows no such key."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pixels_that_it_cannot_make_end_the_run_in_one_line(change: dict[str, object], reason: str) -> None:
    with pytest.raises(SystemExit, match=f"^featurize: backbone.json asks for pixels whose {reason}[^\n]*$"):
        featurize.check_pixels(PIXELS | change)


def test_a_description_without_pixels_ends_the_run() -> None:
    with pytest.raises(SystemExit, match=r"pixels whose dtype is None; .* Run `dvc repro -f backbone`\."):
        featurize.check_pixels({})


# Where it runs


def test_a_task_sees_the_gpu_that_it_was_given_and_takes_its_memory_as_needed() -> None:
    config = featurize.settings("float32", 2, ["1"])
    assert (config.device_count["GPU"], config.gpu_options.visible_device_list) == (1, "1")
    assert config.gpu_options.allow_growth


def test_a_task_that_was_given_no_gpu_sees_none() -> None:
    assert featurize.settings("float32", 1, []).device_count["GPU"] == 0


@pytest.mark.parametrize(
    ("precision", "gpus", "expected"),
    [("float32", [], (0, 0)), ("float32", ["0"], (0, 0)), ("bfloat16", [], (0, 1)), ("bfloat16", ["0"], (1, 0))],
)
def test_half_precision_is_that_of_the_device(precision: str, gpus: list[str], expected: tuple[int, int]) -> None:
    options = featurize.settings(precision, 1, gpus).graph_options.rewrite_options
    assert (options.auto_mixed_precision, options.auto_mixed_precision_onednn_bfloat16) == expected


# Features


def to_numbers(steps: bytes) -> list[float]:
    return (np.frombuffer(steps, "<i2") * STEP).tolist()


def compute(spark: SparkSession, images: DataFrame, graph: bytes, batch_size: int = 4) -> tuple[dict[str, list[float]], int]:
    """Compute the features by content_id, and count the passes."""
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", batch_size)  # as main does
    passes = spark.sparkContext.accumulator(0)
    network = spark.sparkContext.broadcast({"graph": graph})
    rows = featurize.forward(images, network, BACKBONE, batch_size, "float32", passes).collect()
    features = {row.content_id: to_numbers(row.features) for row in rows}
    assert len(features) == len(rows)
    return features, passes.value


@pytest.mark.parametrize(("batch_size", "n_partitions"), [(1, 2), (3, 7), (8, 1)])
def test_features_are_those_of_the_image_whatever_the_batches_and_the_partitions(
    batch_size: int, n_partitions: int, spark: SparkSession, graph: bytes, contents: list[bytes]
) -> None:
    images = images_of(spark, contents).repartition(n_partitions)
    features, _ = compute(spark, images, graph, batch_size)
    assert features == {sha256(content): means_of(content) for content in contents}


def test_features_are_the_same_though_large_files_come_one_by_one(
    spark: SparkSession, graph: bytes, contents: list[bytes]
) -> None:
    spark.conf.set("spark.sql.execution.arrow.maxBytesPerBatch", 1)  # the least that there is
    try:
        features, passes = compute(spark, images_of(spark, contents), graph, batch_size=3)
    finally:
        spark.conf.unset("spark.sql.execution.arrow.maxBytesPerBatch")
    assert features == {sha256(content): means_of(content) for content in contents}
    assert passes == len(contents)


@pytest.mark.parametrize("n_images", [1, 5])
def test_a_pass_is_counted_for_each_image_and_none_for_padding(
    n_images: int, spark: SparkSession, graph: bytes, contents: list[bytes]
) -> None:
    features, passes = compute(spark, images_of(spark, contents[:n_images]), graph)
    assert passes == len(features) == n_images


@pytest.mark.parametrize("numerator", [0.0, 1.0], ids=["not_a_number", "infinite"])
def test_an_image_with_a_feature_that_is_not_finite_ends_the_stage_and_is_named(
    numerator: float, spark: SparkSession, contents: list[bytes], tmp_path: Path
) -> None:
    @tf.function(input_signature=[tf.TensorSpec((None, SIZE, SIZE, 3), tf.uint8, name="pixels")])
    def odd(pixels: tf.Tensor) -> tf.Tensor:
        return tf.divide(numerator, tf.reduce_mean(tf.cast(pixels, tf.float32), axis=[1, 2]), name="features")

    graph = convert_variables_to_constants_v2(odd.get_concrete_function()).graph.as_graph_def().SerializeToString()
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (0, 9, 0)).save(file, "PNG")
    network = spark.sparkContext.broadcast({"graph": graph})
    passes = spark.sparkContext.accumulator(0)
    images = images_of(spark, [contents[0], file.getvalue(), contents[2]]).coalesce(1)
    computed = featurize.forward(images, network, BACKBONE, 4, "float32", passes)
    with pytest.raises(Exception, match=r"2 of 3 features of Apple/1.jpg are not finite in float32\. In params.yaml"):
        featurize.append(computed, str(tmp_path / "cache"))
    assert not list(tmp_path.rglob("part-*.parquet"))


def test_features_are_float32(spark: SparkSession, graph: bytes, contents: list[bytes]) -> None:
    features = featurize.load(graph, BACKBONE, "float32", n_threads=1)(np.zeros((2, SIZE, SIZE, 3), np.uint8))
    assert (features.dtype, features.shape) == (np.float32, (2, N_FEATURES))


@pytest.mark.parametrize(
    ("feature", "steps"),
    [(0.0, 0), (0.3, 0), (0.7, 1), (-0.7, -1), (32_767.4, 32_767), (32_768.0, 32_767), (-1e9, -32_767), (3e38, 32_767)],
)
def test_a_feature_is_rounded_to_the_nearest_step_that_16_bits_hold(feature: float, steps: int) -> None:
    found = featurize.to_steps(np.array([[feature]], np.float32) * np.float32(STEP), STEP)
    assert (found.tolist(), found.dtype.str) == ([[steps]], "<i2")


def to_lists(spark: SparkSession, steps: list[list[int]]) -> tuple[list[list[float]], list[int]]:
    """Make the numbers that people read, and count the features and images beyond what 16 bits hold."""
    rows = [(f"{i:02}", f"Apple/{i}.jpg", "Apple", None, "c", np.array(row, "<i2").tobytes()) for i, row in enumerate(steps)]
    schema = "image_id string, path string, label string, film string, content_id string, features binary"
    beyond = [spark.sparkContext.accumulator(0) for _ in range(2)]
    table = featurize.to_numbers(spark.createDataFrame(rows, schema), STEP, *beyond)
    assert table.schema == featurize.FEATURES
    return [row.features for row in sorted(table.collect())], [each.value for each in beyond]


def test_numbers_are_the_steps_times_their_size(spark: SparkSession) -> None:
    steps = np.random.default_rng(0).integers(-32_766, 32_767, (50, N_FEATURES))
    assert to_lists(spark, steps.tolist()) == ((steps * STEP).tolist(), [0, 0])


def test_features_beyond_what_16_bits_hold_are_counted_with_their_images(spark: SparkSession) -> None:
    _, beyond = to_lists(spark, [[32_767, -32_767, 0], [0, 1, 2], [32_766, 0, 32_767]])
    assert beyond == [3, 2]


# Work


def test_equal_images_are_one_piece_of_work(spark: SparkSession, contents: list[bytes]) -> None:
    work = featurize.spread(images_of(spark, [*contents, *contents[:5], contents[0]]), len(contents))
    rows = work.collect()
    assert {row.content_id: bytes(row.content) for row in rows} == {sha256(content): content for content in contents}
    assert len(rows) == len(contents)


@pytest.mark.parametrize(("n_distinct", "n_tasks"), [(1, 2), (1024, 2), (1025, 4), (2049, 6)])
def test_tasks_are_as_many_as_cores_or_a_multiple(
    n_distinct: int, n_tasks: int, spark: SparkSession, contents: list[bytes]
) -> None:
    assert spark.sparkContext.defaultParallelism == 2
    work = featurize.spread(images_of(spark, contents), n_distinct)
    assert work.rdd.getNumPartitions() == n_tasks


def test_only_what_is_not_computed_is_missing_and_only_once(spark: SparkSession) -> None:
    images = spark.createDataFrame([("a",), ("b",), ("b",), ("c",), ("c",)], "content_id string")
    computed = spark.createDataFrame([(each, b"1") for each in "aacz"], featurize.COMPUTED)
    assert [row.content_id for row in featurize.missing_ids(images, computed).collect()] == ["b"]


# Names of caches


DESCRIPTION = BACKBONE | {"graph_sha256": "ab" * 32}


def fingerprint(batch_size: int = 8, precision: str = "float32", **change: object) -> str:
    return featurize.fingerprint(DESCRIPTION | change, batch_size, precision)


@pytest.mark.parametrize(
    "change",
    [
        {"graph_sha256": "cd" * 32},
        {"pixels": PIXELS | {"resampling": "lanczos"}},
        {"output": "others:0"},
        {"batch_size": 9},
        {"precision": "bfloat16"},
        {"step": STEP / 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_what_determines_features_changes_the_caches_name(change: dict[str, Any]) -> None:
    assert fingerprint(**change) != fingerprint()


def test_a_change_of_what_a_row_has_changes_the_caches_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    monkeypatch.setattr(featurize, "CACHED", featurize.COMPUTED)
    assert fingerprint() != before


def test_the_caches_name_is_the_same_in_another_process() -> None:
    code = f"from stages.featurize import fingerprint; print(fingerprint({DESCRIPTION}, 8, 'float32'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint()


def test_the_package_that_brings_tensorflow_does_not_change_the_caches_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for packages in (
        {"pillow", "tensorflow"},
        {"pillow", "tensorflow-cpu"},
        {"pillow", "tensorflow", "tensorflow-cpu"},
        {"pillow"},
    ):
        versions = {name: [types.SimpleNamespace(version="2.21.0")] for name in packages}
        monkeypatch.setattr(featurize, "distributions", lambda name, versions=versions: versions.get(name, []))
        found.append(fingerprint())
    assert found[0] == found[1] == found[2] != found[3]


def test_what_the_backbone_is_called_does_not_change_the_caches_name() -> None:
    assert fingerprint(name="other") == fingerprint()


# The cache


ABOUT = {"backbone": {"name": "means"}, "batch_size": 8}


def open_cache(spark: SparkSession, folder: Path) -> Path:
    spark.conf.set("spark.featurize.cache", str(folder))
    return Path(featurize.open_cache(spark, "name", ABOUT))


def steps_of(content_id: str) -> bytes:
    return np.array([320, 0, ord(content_id[-1])], "<i2").tobytes()


def computed(spark: SparkSession, ids: Iterable[str]) -> DataFrame:
    rows = [(each, steps := steps_of(each), featurize.checksum(each, steps)) for each in ids]
    return spark.createDataFrame(rows, featurize.CACHED).coalesce(1)


def ids_in(spark: SparkSession, cache: Path) -> str:
    return "".join(sorted(row.content_id for row in featurize.read_cache(spark, str(cache)).collect()))


def test_a_new_cache_is_empty(spark: SparkSession, tmp_path: Path) -> None:
    cache = open_cache(spark, tmp_path / "not" / "yet")
    featurize.heal(spark, str(cache), N_FEATURES)
    assert cache.is_dir()
    assert ids_in(spark, cache) == ""


def test_a_cache_says_what_it_is_about(spark: SparkSession, tmp_path: Path) -> None:
    cache = open_cache(spark, tmp_path)
    assert json.loads((cache / "about.json").read_text()) == ABOUT


def test_what_is_appended_is_read_with_what_was_there(spark: SparkSession, tmp_path: Path) -> None:
    cache = open_cache(spark, tmp_path)
    for ids in ("ab", "c"):
        featurize.append(computed(spark, ids), str(cache))
    read = featurize.read_cache(spark, str(cache)).orderBy("content_id").collect()
    assert [(row.content_id, bytes(row.features)) for row in read] == [(each, steps_of(each)) for each in "abc"]


def test_a_cache_that_cannot_be_made_ends_the_run(spark: SparkSession) -> None:
    with pytest.raises(SystemExit, match="cannot write to the feature cache /proc/nowhere/name"):
        open_cache(spark, Path("/proc/nowhere"))


def test_a_file_in_the_place_of_the_cache_ends_the_run(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit, match=r"cannot write to the feature cache .*/file/name"):
        open_cache(spark, tmp_path / "file")


def write_row(file: Path, content_id: str | None, features: pa.Array, checksum: int = 0) -> None:
    pq.write_table(pa.table({"content_id": [content_id], "features": features, "checksum": [checksum]}), file)


def flip(file: Path) -> None:
    assert b"\x40\x01\0\0" in file.read_bytes()  # 320 and 0
    file.write_bytes(file.read_bytes().replace(b"\x40\x01\0\0", b"\x41\x01\0\0", 1))


def swap(file: Path) -> None:
    table = pq.read_table(file)
    pq.write_table(table.set_column(1, table.field(1), pa.chunked_array([table["features"].to_pylist()[::-1]])), file)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "garbage": lambda file: file.write_bytes(b"garbage" * 50),
    "without_a_byte": lambda file: file.write_bytes(b""),
    "a_bit_flipped": flip,
    "vectors_swapped": swap,
    "features_are_text": lambda file: write_row(file, "x", pa.array(["1 2 3"])),
    "features_are_numbers": lambda file: write_row(file, "x", pa.array([[1, 2, 3]], pa.list_(pa.int16()))),
    "features_are_missing": lambda file: write_row(file, "x", pa.array([None], pa.binary())),
    "an_image_has_no_name": lambda file: write_row(file, None, pa.array([b"123456"])),
    "other_columns": lambda file: pq.write_table(pa.table({"id": [1]}), file),
    "other_n_features": lambda file: write_row(file, "x", pa.array([b"1234"]), featurize.checksum("x", b"1234")),
}


class Dropped(NamedTuple):
    """A cache of sound and damaged files, after heal."""

    files: dict[str, Path]
    sound: list[Path]
    said: str
    ids: str


@pytest.fixture(scope="module")
def dropped(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Dropped:
    cache = open_cache(spark, tmp_path_factory.mktemp("cache"))
    featurize.append(computed(spark, "abc"), str(cache))
    sound = list(cache.rglob("*.parquet"))
    files = {}
    for i, (name, harm) in enumerate(DAMAGE.items()):
        before = set(cache.rglob("*.parquet"))
        featurize.append(computed(spark, [f"{i}p", f"{i}q"]), str(cache))
        (files[name],) = set(cache.rglob("*.parquet")) - before
        if i % 2:  # Hadoop's own checksum may be there or not
            files[name].with_name(f".{files[name].name}.crc").unlink()
        harm(files[name])
    said = io.StringIO()
    with redirect_stderr(said):
        featurize.heal(spark, str(cache), N_FEATURES)
    return Dropped(files, sound, said.getvalue(), ids_in(spark, cache))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_removed(name: str, dropped: Dropped) -> None:
    assert not dropped.files[name].exists()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_on_stderr(name: str, dropped: Dropped) -> None:
    said = rf"featurize: {re.escape(str(dropped.files[name]))} is damaged \([^\n]+\); its features are computed again"
    assert len(re.findall(said, dropped.said)) == 1


@pytest.mark.parametrize("seed", range(3))
def test_whatever_bit_flips_a_file_has_its_own_rows_or_is_damaged(seed: int, spark: SparkSession, tmp_path: Path) -> None:
    featurize.append(computed(spark, "abc"), str(tmp_path))
    (file,) = tmp_path.rglob("*.parquet")
    sound = file.read_bytes()

    def rows(content: bytes) -> set[tuple[str, bytes]]:
        ids, features = featurize.parse(pa.py_buffer(content), N_FEATURES)
        return {*zip(ids, features, strict=True)}

    n_damaged, expected = 0, rows(sound)
    for i, bit in enumerate(np.random.default_rng(seed).integers(0, 8, len(sound))):
        flipped = bytearray(sound)
        flipped[i] ^= 1 << bit
        try:
            assert rows(bytes(flipped)) <= expected
        except ValueError:
            n_damaged += 1
    assert n_damaged > 100  # others are of statistics and names


@pytest.mark.parametrize("harm", ["garbage", "without_a_byte"])
def test_a_damaged_file_that_another_run_deletes_at_the_same_time_is_passed_over(
    harm: str, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(spark, tmp_path)
    featurize.append(computed(spark, "abc"), str(cache))
    damaged = cache / "part.parquet"
    DAMAGE[harm](damaged)

    def load(*given: Any) -> DataFrame:
        files = listed(*given)
        damaged.unlink()
        return files

    listed = DataFrameReader.load
    monkeypatch.setattr(DataFrameReader, "load", load)
    assert {row.content_id for row in featurize.heal(spark, str(cache), N_FEATURES).collect()} == {*"abc"}
    rows = featurize.read_cache(spark, str(cache))
    for file in cache.rglob("*.parquet"):
        file.unlink()
    assert rows.collect() == []


@pytest.mark.parametrize("harm", ["garbage", "a_bit_flipped"])
def test_a_file_that_is_damaged_after_it_was_seen_to_be_sound_ends_the_stage_and_is_named(
    harm: str, spark: SparkSession, tmp_path: Path
) -> None:
    cache = open_cache(spark, tmp_path)
    featurize.append(computed(spark, "abc"), str(cache))
    featurize.heal(spark, str(cache), N_FEATURES)
    (file,) = cache.rglob("*.parquet")
    DAMAGE[harm](file)
    with pytest.raises(Exception, match=re.escape(file.name)):
        featurize.read_cache(spark, str(cache)).collect()


def test_a_sound_file_is_read_though_hadoops_checksum_is_damaged(spark: SparkSession, tmp_path: Path) -> None:
    cache = open_cache(spark, tmp_path)
    featurize.append(computed(spark, "abc"), str(cache))
    (crc,) = cache.rglob(".part*.crc")
    crc.write_bytes(crc.read_bytes()[:-1] + bytes([crc.read_bytes()[-1] ^ 1]))
    assert featurize.heal(spark, str(cache), N_FEATURES).count() == 3
    assert ids_in(spark, cache) == "abc"


# The output of an earlier run


def write_earlier(folder: Path, *files: str, name: str = "name") -> list[Path]:
    """Write an earlier output: each file has the images of those letters."""
    folder.mkdir(exist_ok=True)
    (folder / "_fingerprint").write_text(f"{name}\n")
    parts = [folder / f"part-{number:05}.parquet" for number in range(len(files))]
    for part, ids in zip(parts, files, strict=True):
        features = pa.array([to_numbers(steps_of(each)) for each in ids], pa.list_(pa.float32()))
        table = pa.table({"image_id": [*ids], "content_id": [*ids], "features": features})
        pq.write_table(table, part, use_dictionary=False, write_statistics=False, write_page_checksum=True)
    return parts


def take_over(spark: SparkSession, cache: Path, folder: Path, missing: str) -> str:
    """Let a run take over what it can, and give the images whose features it took."""
    files = [str(file) for file in sorted(folder.glob("*.parquet"))]
    rows = spark.createDataFrame([(each,) for each in missing], "content_id string")
    taken = featurize.take_over(spark, files, rows, STEP, str(cache)).collect()
    return "".join(sorted(row.content_id for row in taken))


@pytest.mark.parametrize(("name", "n_files"), [("name", 2), ("another", 0)])
def test_an_earlier_output_counts_only_if_its_fingerprint_is_that_of_the_cache(
    name: str, n_files: int, spark: SparkSession, tmp_path: Path
) -> None:
    write_earlier(tmp_path / "earlier", "ab", "c", name=name)
    spark.conf.set("spark.featurize.earlier", str(tmp_path / "earlier"))
    assert len(featurize.earlier_files(spark, "name")) == n_files


@pytest.mark.parametrize("place", [None, "nowhere", "without_a_fingerprint"], ids=str)
def test_without_an_earlier_output_nothing_is_taken_over(place: str | None, spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "without_a_fingerprint").mkdir()
    if place:
        spark.conf.set("spark.featurize.earlier", str(tmp_path / place))
    else:
        spark.conf.unset("spark.featurize.earlier")
    assert featurize.earlier_files(spark, "name") == []


def test_what_is_missing_is_taken_over_and_nothing_else(spark: SparkSession, tmp_path: Path) -> None:
    cache = open_cache(spark, tmp_path / "cache")
    write_earlier(tmp_path / "earlier", "ab", "bcd")
    assert take_over(spark, cache, tmp_path / "earlier", "bdx") == "bd"
    assert ids_in(spark, cache) == "bd"


def test_a_file_without_rows_is_no_damage(spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = open_cache(spark, tmp_path / "cache")
    write_earlier(tmp_path / "earlier", "", "ab")
    assert take_over(spark, cache, tmp_path / "earlier", "ab") == "ab"
    assert "damaged" not in capsys.readouterr().err


def test_what_is_taken_over_is_a_sound_row_of_the_cache(spark: SparkSession, tmp_path: Path) -> None:
    cache = open_cache(spark, tmp_path / "cache")
    write_earlier(tmp_path / "earlier", "ab")
    take_over(spark, cache, tmp_path / "earlier", "ab")
    assert {row.content_id for row in featurize.heal(spark, str(cache), N_FEATURES).collect()} == {*"ab"}
    read = featurize.read_cache(spark, str(cache)).collect()
    assert {row.content_id: bytes(row.features) for row in read} == {each: steps_of(each) for each in "ab"}


EARLIER = {
    "truncated": DAMAGE["truncated"],
    "garbage": DAMAGE["garbage"],
    "without_a_byte": DAMAGE["without_a_byte"],
    "gone": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "a_bit_flipped": lambda file: file.write_bytes(file.read_bytes().replace(b"\0\0\xa0\x40", b"\0\0\xa0\x41", 1)),  # 5.0
    "other_columns": DAMAGE["other_columns"],
    "not_on_the_grid": lambda file: pq.write_table(pa.table({"content_id": ["a"], "features": [[0.1, 0.2, 0.3]]}), file),
}


@pytest.mark.parametrize("harm", EARLIER)
def test_a_damaged_file_of_an_earlier_output_is_named_and_passed_over(
    harm: str, spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = open_cache(spark, tmp_path / "cache")
    file, _ = write_earlier(tmp_path / "earlier", "ab", "c")
    before = file.read_bytes()
    EARLIER[harm](file)
    assert harm == "gone" or file.read_bytes() != before
    assert take_over(spark, cache, tmp_path / "earlier", "abc") == "c"
    path = re.escape(os.path.realpath(file))
    assert re.fullmatch(
        rf"featurize: {path} is damaged \([^\n]+\); its features are computed again\n", capsys.readouterr().err
    )


# A cache that is elsewhere, where reading fails now and then


@pytest.mark.parametrize("way", ["busy", "cut", "short"])
def test_a_file_that_cannot_be_read_ends_the_stage_and_is_named_and_kept(
    way: str, spark: SparkSession, tmp_path: Path
) -> None:
    with webhdfs.serve(tmp_path) as server:
        spark.conf.set("spark.featurize.cache", server.url)
        cache = featurize.open_cache(spark, "name", ABOUT)
        featurize.append(computed(spark, "abc"), cache)
        (file,) = tmp_path.rglob("*.parquet")
        path = str(file.relative_to(tmp_path))
        server.fails[path] = (99, way)
        with pytest.raises(Exception, match=re.escape(f"{server.url}/{path}")):
            featurize.heal(spark, cache, N_FEATURES)
        with pytest.raises(Exception, match=re.escape(f"{server.url}/{path}")):
            featurize.read_cache(spark, cache).collect()
        assert file.exists()
        server.fails.clear()
        assert {row.content_id for row in featurize.heal(spark, cache, N_FEATURES).collect()} == {*"abc"}


def test_a_damaged_file_elsewhere_is_removed_and_named(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with webhdfs.serve(tmp_path) as server:
        for name in ("garbage", "without_a_byte"):
            (tmp_path / "cache [1]").mkdir(exist_ok=True)
            DAMAGE[name](tmp_path / "cache [1]" / f"{name}.parquet")
        featurize.heal(spark, f"{server.url}/cache [1]", N_FEATURES)
    assert not list(tmp_path.rglob("*.parquet"))
    said = capsys.readouterr().err
    for name in ("garbage", "without_a_byte"):
        assert f"featurize: {server.url}/cache [1]/{name}.parquet is damaged (" in said


def test_a_sound_file_is_kept(dropped: Dropped) -> None:
    assert all(file.exists() for file in dropped.sound)
    assert dropped.ids == "abc"


@pytest.mark.parametrize("name", ["with spaces", "a%20b+c#ü", "of run [1]", "{a,b}*?", "back\\slash"])
def test_a_cache_is_kept_and_healed_whatever_the_letters_of_its_folder(
    name: str, spark: SparkSession, tmp_path: Path
) -> None:
    cache = open_cache(spark, tmp_path / name)
    featurize.append(computed(spark, "abc"), str(cache))
    damaged = [cache / f"{name}.parquet" for name in ("garbage", "without_a_byte")]
    for file in damaged:
        DAMAGE[file.stem](file)
    featurize.heal(spark, str(cache), N_FEATURES)
    assert not any(file.exists() for file in damaged)
    assert ids_in(spark, cache) == "abc"


def test_what_a_killed_run_was_just_writing_is_passed_over(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = open_cache(spark, tmp_path)
    half = cache / "run" / "_temporary" / "0" / "task" / "part-00000.parquet"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"PAR1")
    featurize.heal(spark, str(cache), N_FEATURES)
    assert ids_in(spark, cache) == ""
    assert capsys.readouterr().err == ""


def test_the_file_of_a_task_without_images_is_removed_but_not_called_damaged(
    spark: SparkSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = open_cache(spark, tmp_path)
    featurize.append(computed(spark, "a").where("content_id = 'b'"), str(cache))
    assert list(cache.rglob("part-*.parquet"))  # it has a schema
    featurize.heal(spark, str(cache), N_FEATURES)
    assert not list(cache.rglob("part-*.parquet"))
    assert capsys.readouterr().err == ""


def test_progress_says_how_far_and_how_long(spark: SparkSession, capsys: pytest.CaptureFixture[str]) -> None:
    with featurize.progress(spark.sparkContext.accumulator(25), 100, every=0.5):
        time.sleep(0.7)
    first = capsys.readouterr().out.splitlines()[0]
    said = re.fullmatch(r"featurize: 25 of 100 images, ([\d.]+) a second, (\d+) s left", first)
    assert said
    assert float(said[1]) <= 25 / 0.5
    assert float(said[2]) == pytest.approx(75 / float(said[1]), abs=0.6)


def test_progress_is_quiet_before_its_time(spark: SparkSession, capsys: pytest.CaptureFixture[str]) -> None:
    with featurize.progress(spark.sparkContext.accumulator(25), 100, every=60):
        time.sleep(0.05)
    assert capsys.readouterr().out == ""


# The whole stage, as it is run


class Workplace:
    """A folder of images, and the outputs of the stages that run on it."""

    def __init__(self, folder: Path, graph: bytes) -> None:
        self.folder, self.images = folder, folder / "images"
        (folder / "backbone").mkdir()
        (folder / "backbone" / "graph.pb").write_bytes(graph)
        description = {"name": "means", "graph_sha256": sha256(graph), **BACKBONE}
        (folder / "backbone" / "backbone.json").write_text(json.dumps(description))

    def add(self, path: str, content: bytes) -> None:
        (self.images / path).parent.mkdir(parents=True, exist_ok=True)
        (self.images / path).write_bytes(content)

    def start(self, stage: str, *arguments: str, cache: str = "cache") -> subprocess.Popen[str]:
        place = cache if "://" in cache else str(self.folder / cache)
        master = "local[2,4]" if "://" in cache else "local[2]"  # elsewhere, four tries of a task, as on a cluster
        settings = {"FEATURE_CACHE": place, "SPARK_DRIVER_MEMORY": "1g", "SPARK_MASTER": master}
        settings["PYTHONPATH"] = str(ROOT)
        door = [sys.executable, "-m", "bootstrap.submit", "spark-submit"]
        return subprocess.Popen(
            [*door, ROOT / "stages" / stage, *arguments],
            cwd=self.folder,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ingest(self) -> None:
        flags = parameters.flags(PARAMS["ingest"])
        process = self.start("ingest.py", "images", "ingested", *flags)
        assert (process.communicate()[1], process.returncode) == ("", 0)

    def start_featurize(self, cache: str = "cache", batch_size: int = 8, images_per_file: int = 8) -> subprocess.Popen[str]:
        flags = f"--batch_size {batch_size} --precision float32 --images_per_file {images_per_file}"
        return self.start("featurize.py", "ingested", "backbone", "features", *flags.split(), cache=cache)

    def featurize(self, **settings: Any) -> subprocess.CompletedProcess[str]:
        process = self.start_featurize(**settings)
        stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def features(self, **settings: Any) -> "Run":
        done = self.featurize(**settings)
        assert done.returncode == 0, done.stderr[-2000:]
        return Run({file.name: file.read_bytes() for file in (self.folder / "features").iterdir()}, done.stdout, done.stderr)


class Run(NamedTuple):
    """The files that a run of featurize wrote, and its messages."""

    files: dict[str, bytes]
    stdout: str
    stderr: str

    def rows(self) -> list[dict[str, Any]]:
        return [row for part in self.parts() for row in part]

    def parts(self) -> list[list[dict[str, Any]]]:
        tables = [content for name, content in sorted(self.files.items()) if name.endswith(".parquet")]
        return [pq.read_table(io.BytesIO(content)).to_pylist() for content in tables]


@pytest.fixture(scope="module")
def runs(graph: bytes, contents: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Run the stage several times, on a delivery that changes."""
    place = Workplace(tmp_path_factory.mktemp("place"), graph)
    for i, content in enumerate(contents[:18]):
        place.add(f"{'Apple' if i % 3 else 'Pear'}/{i}.img.{'png' if i % 2 else 'jpg'}", content)
    place.add("Pear/twin.jpg", contents[0])
    place.ingest()
    runs = {"first": place.features(), "another batch size": place.features(batch_size=4), "back again": place.features()}
    place.add("Pear/new.jpg", contents[18])
    (place.images / "Apple" / "1.img.png").unlink()
    shutil.move(place.images / "Apple" / "2.img.jpg", place.images / "Pear" / "2.img.jpg")
    Image.new("RGB", (9, 9), "red").save(place.images / "Apple" / "4.img.jpg")
    place.ingest()
    runs |= {"one new, one changed, one moved, one gone": place.features(), "empty cache": place.features(cache="other")}
    for file, harm in zip(sorted((place.folder / "other").rglob("*.parquet")), ("truncated", "garbage"), strict=True):
        DAMAGE[harm](file)
    runs["damaged cache"] = place.features(cache="other")
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "passes"),
    [
        ("first", 18),
        ("another batch size", 18),
        ("back again", 0),
        ("one new, one changed, one moved, one gone", 2),
        ("empty cache", 18),
        ("damaged cache", 18),
    ],
)
def test_only_images_never_seen_go_through_the_backbone(run: str, passes: int, runs: dict[str, Run]) -> None:
    assert f" {passes} passes of means" in runs[run].stdout


@pytest.mark.slow
def test_a_second_run_writes_the_same_bytes(runs: dict[str, Run]) -> None:
    assert runs["back again"].files == runs["first"].files


@pytest.mark.slow
@pytest.mark.parametrize("run", ["one new, one changed, one moved, one gone", "damaged cache"])
def test_features_are_the_bytes_that_an_empty_cache_gives(run: str, runs: dict[str, Run]) -> None:
    assert runs[run].files == runs["empty cache"].files


@pytest.mark.slow
def test_only_damaged_files_are_called_damaged(runs: dict[str, Run]) -> None:
    said = {
        name: len(re.findall(r"is damaged \(.+\); its features are computed again", run.stdout + run.stderr))
        for name, run in runs.items()
    }
    assert {name: times for name, times in said.items() if times} == {"damaged cache": 2}


@pytest.mark.slow
def test_there_is_a_row_of_its_own_features_for_each_file(runs: dict[str, Run], contents: list[bytes]) -> None:
    rows = runs["first"].rows()
    assert len({row["path"] for row in rows}) == len(rows) == 19
    content_of = {sha256(content): content for content in contents}
    assert all(row["features"] == means_of(content_of[row["image_id"]]) for row in rows)


@pytest.mark.slow
def test_rows_of_a_file_are_sorted_by_image_and_path(runs: dict[str, Run]) -> None:
    for part in runs["first"].parts():
        keys = [(row["image_id"], row["path"]) for row in part]
        assert keys == sorted(keys)


@pytest.mark.slow
def test_an_image_that_is_moved_has_its_new_label(runs: dict[str, Run]) -> None:
    labels = {row["path"]: row["label"] for row in runs["one new, one changed, one moved, one gone"].rows()}
    assert labels["Pear/2.img.jpg"] == "Pear"
    assert "Apple/2.img.jpg" not in labels


@pytest.mark.slow
def test_a_graph_that_is_not_the_described_one_ends_the_run(graph: bytes, contents: list[bytes], tmp_path: Path) -> None:
    place = Workplace(tmp_path, graph)
    place.add("Apple/0.png", contents[0])
    place.ingest()
    (tmp_path / "backbone" / "graph.pb").write_bytes(graph + b"\0")
    done = place.featurize()
    assert done.returncode == 1
    said = done.stdout + done.stderr  # spark-submit puts both of a Python program's on stdout
    assert "backbone/graph.pb is not what backbone.json says. Run `dvc repro -f backbone`." in said
    assert "Traceback" not in said
    assert not (tmp_path / "features").exists()


@pytest.mark.slow
def test_two_runs_that_share_a_cache_with_damaged_files_both_end_well(
    graph: bytes, contents: list[bytes], tmp_path: Path
) -> None:
    places = [tmp_path / name for name in ("one", "two")]
    places[0].mkdir()
    place = Workplace(places[0], graph)
    for i, content in enumerate(contents):
        place.add(f"Apple/{i}.{'png' if i % 2 else 'jpg'}", content)
    place.ingest()
    cache = str(tmp_path / "cache")
    expected = place.features(cache=cache).files
    shutil.copytree(places[0], places[1], ignore=shutil.ignore_patterns("features"))
    for i, file in enumerate(sorted(tmp_path.glob("cache/**/part-*.parquet"))):
        for n in range(60):  # while one run deletes them, the other reads what it has listed
            harm = ("garbage", "truncated", "without_a_byte")[n % 3]
            DAMAGE[harm](Path(shutil.copy(file, file.with_name(f"part-{i}-{n}.parquet"))))
    runs = [place, copy.copy(place)]
    runs[1].folder = places[1]
    started = [run.start_featurize(cache=cache) for run in runs]
    for run, process in zip(runs, started, strict=True):
        said = process.communicate()
        assert process.returncode == 0, said
        assert {file.name: file.read_bytes() for file in (run.folder / "features").iterdir()} == expected


@pytest.mark.slow
def test_a_cache_elsewhere_that_fails_now_and_then_is_asked_again(
    graph: bytes, contents: list[bytes], tmp_path: Path
) -> None:
    place = Workplace(tmp_path, graph)
    for i, content in enumerate(contents):
        place.add(f"Apple/{i}.{'png' if i % 2 else 'jpg'}", content)
    place.ingest()
    (tmp_path / "there").mkdir()
    with webhdfs.serve(tmp_path / "there") as server:
        first = place.features(cache=server.url)
        files = [str(file.relative_to(server.folder)) for file in server.folder.rglob("part-*.parquet")]
        server.asked.clear()
        server.fails = dict(zip(files, [(1, "short"), (2, "cut")], strict=True))
        again = place.features(cache=server.url)
    assert " 0 passes of means" in again.stdout
    assert again.files == first.files
    assert all(server.asked[file] > times for file, (times, _) in server.fails.items())


# Killed in the middle

N_KILLED = 4800  # images, ten tasks: each of four killed runs ends two of them, or, on a busy machine, some more


def victims(submit: psutil.Process) -> dict[str, psutil.Process]:
    """Find the processes of a run of featurize: submit, jvm, driver and one worker."""
    named = {"submit": submit}
    for process in submit.children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            words = process.cmdline()
            if words[0].endswith("java"):
                named["jvm"] = process
            elif any(word.endswith("/featurize.py") for word in words[:3]):
                named["driver"] = process
            elif "pyspark.daemon" in words and "pyspark.daemon" in process.parent().cmdline():
                named["worker"] = process
    return named


class Killed(NamedTuple):
    """Runs of one delivery, each of which lost a process, and the last one, which was left alone."""

    statuses: dict[str, int]
    kept: list[str]  # content_id of each row of the cache
    last: Run


@pytest.fixture(scope="module")
def killed(slow_graph: bytes, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    place = Workplace(tmp_path_factory.mktemp("place"), slow_graph)
    for i in range(N_KILLED):
        file = io.BytesIO()
        Image.new("RGB", (SIZE, SIZE), (i % 256, i // 256, 7)).save(file, "PNG")
        place.add(f"Apple/{i}.png", file.getvalue())
    place.ingest()

    def kept() -> list[Path]:
        return list((place.folder / "cache").glob("*/*/part-*.parquet"))

    statuses = {}
    for victim in ("jvm", "driver", "worker", "submit"):
        before, deadline = len(kept()), time.monotonic() + 120
        process = place.start_featurize(images_per_file=N_KILLED)
        while len(kept()) == before:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)  # the other task of the first two ends, and the next two are under way
        victims(psutil.Process(process.pid))[victim].kill()
        statuses[victim] = process.wait(timeout=60)
    last = place.features(images_per_file=N_KILLED)
    return Killed(statuses, ds.dataset(kept(), format="parquet").to_table()["content_id"].to_pylist(), last)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "status"), [("jvm", 137), ("driver", 137), ("worker", 1), ("submit", -9)])
def test_a_killed_run_fails(victim: str, status: int, killed: Killed) -> None:
    assert killed.statuses[victim] == status


@pytest.mark.slow
def test_runs_that_are_killed_compute_nothing_again_that_had_ended(killed: Killed) -> None:
    assert (len(killed.kept), len(set(killed.kept))) == (N_KILLED, N_KILLED)


@pytest.mark.slow
def test_the_run_after_a_killed_submit_waits_for_the_spark_that_it_left(killed: Killed) -> None:
    assert "another run is still at work in" in killed.last.stderr
    assert " 0 passes of means" in killed.last.stdout


@pytest.mark.slow
def test_the_features_after_killed_runs_are_those_of_the_images(killed: Killed) -> None:
    expected = {f"Apple/{i}.png": [float(i % 256), float(i // 256), 7.0] for i in range(N_KILLED)}
    assert {row["path"]: row["features"] for row in killed.last.rows()} == expected
