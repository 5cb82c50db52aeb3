"""Facts about app/recognise.py: what it answers, what it refuses, and that it reads a photograph as the pipeline does."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from app import recognise
from stages import featurize, ingest
from tests.helpers import PARAMS, ROOT, run
from tests.test_ingest import HEIC

# A model that knows three fruits by the colours of the quarters of a photograph, and finds rows of unlike colours strange.
COLOURS = {"apple": (200, 20, 20), "banana": (220, 200, 30), "lime": (60, 180, 40)}
BLUE = (10, 20, 220)
WIDTH, HEIGHT, TEMPERATURE = 12, 8, 0.1
THRESHOLDS = {"min_similarity": 0.6, "max_strangeness": 0.2}
PIXELS = {"width": WIDTH, "height": HEIGHT, "resampling": "bicubic", "resampler": "Pillow", "fit": "stretch"}
PIXELS |= {"orientation": "upright", "mode": "RGB", "dtype": "uint8"}
KNOWN = np.random.default_rng(0).normal(size=(7, 12))

Answers = Callable[..., tuple[int, list[dict[str, Any]]]]


def point(pixels: np.ndarray) -> np.ndarray:
    quarters = pixels.reshape(2, HEIGHT // 2, 2, WIDTH // 2, 3).mean(axis=(1, 3)).ravel() / 255 - 0.5
    return quarters / np.linalg.norm(quarters)


def expected(image: Image.Image) -> dict[str, Any]:
    """What the model must find on an image of mode RGB, by Pillow and by NumPy in float64."""
    pixels = np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.float64)
    similarities = exemplars() @ point(pixels)
    odds = np.exp(similarities / TEMPERATURE)
    return {
        "similarities": similarities,
        "probabilities": odds / odds.sum(),
        "strangeness": np.abs(np.diff(pixels, axis=0)).mean() / 255,
        "embedding": point(pixels),
    }


def exemplars() -> np.ndarray:
    return np.stack([point(np.broadcast_to(np.array(colour), (HEIGHT, WIDTH, 3))) for colour in COLOURS.values()])


def tflite() -> bytes:
    """The model, by TensorFlow's own converter."""
    import tensorflow as tf

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        pixels = tf.compat.v1.placeholder(tf.uint8, (1, HEIGHT, WIDTH, 3), "pixels")
        shares = tf.cast(pixels, tf.float32) / 255
        quarters = tf.reduce_mean(tf.reshape(shares, (1, 2, HEIGHT // 2, 2, WIDTH // 2, 3)), (2, 4))
        embedding = tf.math.l2_normalize(tf.reshape(quarters, (1, 12)) - 0.5, 1, name="embedding")
        similarities = tf.matmul(embedding, exemplars().T.astype(np.float32), name="similarities")
        probabilities = tf.nn.softmax(similarities / TEMPERATURE, name="probabilities")
        strangeness = tf.reduce_mean(tf.abs(shares[:, 1:] - shares[:, :-1]), (1, 2, 3), name="strangeness")
        outputs = [probabilities, similarities, strangeness, embedding]
        return bytes(tf.compat.v1.lite.TFLiteConverter.from_session(session, [pixels], outputs).convert())


@pytest.fixture(scope="module")
def network() -> bytes:
    return tflite()


@pytest.fixture
def model(tmp_path: Path, network: bytes) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.tflite").write_bytes(network)
    known = pa.table(
        {
            "label": [[*COLOURS][i % 3] for i in range(len(KNOWN))],
            "path": [f"{[*COLOURS][i % 3]}/{i}.jpg" for i in range(len(KNOWN))],
            "embedding": pa.array(KNOWN.tolist(), pa.list_(pa.float32())),
            "picture": [b"jpeg"] * len(KNOWN),
        }
    )
    pq.write_table(known, folder / "photographs.parquet")
    describe(folder)
    return folder


def describe(folder: Path, **others: object) -> None:
    files = [folder / name for name in ("model.tflite", "photographs.parquet")]
    about = {
        "labels": [*COLOURS],
        "calibrated": True,
        "temperature": TEMPERATURE,
        "thresholds": THRESHOLDS,
        "pixels": PIXELS,
        "measured": {"images": 0},
        "trained_on": {"images": 9, "labels": 3},
        "backbone": {"name": "colours"},
        "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    (folder / "model.json").write_text(json.dumps(about | others))


@pytest.fixture
def answers(model: Path, capsys: pytest.CaptureFixture[str]) -> Answers:
    """The exit status and the objects that the command prints for these photographs."""

    def ask(*photographs: Path) -> tuple[int, list[dict[str, Any]]]:
        status = recognise.main(["--json", "--model", str(model), *map(str, photographs)])
        out, err = capsys.readouterr()
        assert err == ""
        return status, [json.loads(line) for line in out.splitlines()]

    return ask


@pytest.fixture
def text(model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """What a person reads on stdout and on stderr."""

    def ask(*photographs: Path) -> tuple[str, str]:
        recognise.main(["--model", str(model), *map(str, photographs)])
        return capsys.readouterr()

    return ask


def photograph(path: Path, left: str | tuple[int, ...] = "apple", right: str | tuple[int, ...] | None = None) -> Path:
    """A file whose left half has the colour of one fruit and whose right half that of another, or of the same."""
    right = left if right is None else right
    colours = [COLOURS[each] if isinstance(each, str) else each for each in (left, right)]
    image = Image.new("RGB", (31, 17), colours[0])
    image.paste(colours[1], (15, 0, 31, 17))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def noise(path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(path)
    return path


# What it answers


@pytest.mark.parametrize("label", COLOURS)
def test_a_photograph_gets_the_label_of_the_nearest_exemplar(label: str, answers: Answers, tmp_path: Path) -> None:
    status, (found,) = answers(photograph(tmp_path / "one.jpg", label))
    assert (status, found["decision"], found["label"]) == (0, "recognised", label)


def test_the_figures_are_those_of_the_model(answers: Answers, tmp_path: Path) -> None:
    path = photograph(tmp_path / "one.png", "banana", "lime")
    _, (found,) = answers(path)
    wanted = expected(Image.open(path))
    order = np.argsort(-wanted["probabilities"])
    assert [each["label"] for each in found["labels"]] == [[*COLOURS][i] for i in order]
    for name, key in (("probability", "probabilities"), ("similarity", "similarities")):
        # float32, and six digits are told
        np.testing.assert_allclose([each[name] for each in found["labels"]], wanted[key][order], atol=2e-6)
    np.testing.assert_allclose(found["similarity"], wanted["similarities"].max(), atol=2e-6)
    np.testing.assert_allclose(found["strangeness"], wanted["strangeness"], atol=2e-6)


def test_the_nearest_known_photographs_have_the_largest_dot_products(answers: Answers, tmp_path: Path) -> None:
    path = photograph(tmp_path / "one.png", "banana", "lime")
    _, (found,) = answers(path)
    products = KNOWN @ expected(Image.open(path))["embedding"]
    nearest = np.argsort(-products)[:3]
    assert [each["path"] for each in found["nearest"]] == [f"{[*COLOURS][i % 3]}/{i}.jpg" for i in nearest]
    np.testing.assert_allclose([each["similarity"] for each in found["nearest"]], products[nearest], atol=1e-5)


def test_a_person_reads_the_label_the_next_two_and_the_figures(text: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    path = photograph(tmp_path / "one.png", "banana", "lime")
    wanted = expected(Image.open(path))
    shares = [f"{each:.1%}" for each in sorted(wanted["probabilities"], reverse=True)]
    out, _ = text(path)
    assert out.splitlines()[:3] == [
        f"{path}: banana {shares[0]}",
        f"  then lime {shares[1]}, apple {shares[2]}",
        f"  similarity {wanted['similarities'].max():.3f} (at least 0.600), strangeness 0.000 (at most 0.200)",
    ]


def test_a_probability_that_is_not_calibrated_is_said_to_be_so(
    model: Path, text: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    path = photograph(tmp_path / "one.png")
    assert "not calibrated" not in text(path)[0]
    describe(model, calibrated=False)
    assert "not calibrated" in text(path)[0].splitlines()[0]


@pytest.mark.parametrize(
    ("probability", "said"),
    [(1.0, "> 99.9%"), (0.9991, "> 99.9%"), (0.999, "99.9%"), (0.5, "50.0%"), (0.001, "0.1%"), (0.0009, "< 0.1%")],
)
def test_a_person_never_reads_that_it_is_certain(probability: float, said: str) -> None:
    assert recognise.chance(probability) == said


def test_a_person_reads_what_would_steer_the_terminal_escaped(text: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    path = photograph(tmp_path / "a\nb\x1b[31m\u202eé\u202f1.png")
    (tmp_path / "c\n.png").write_bytes(b"")
    out, err = text(path, tmp_path / "c\n.png")
    assert out.startswith(str(tmp_path) + "/a\\nb\\x1b[31m\\u202eé\u202f1.png: apple")
    assert err == f"{tmp_path}/c\\n.png: empty, 0 bytes\n"


# What it refuses to name


def test_a_fruit_that_is_like_no_exemplar_is_unknown(answers: Answers, tmp_path: Path) -> None:
    path = photograph(tmp_path / "one.png", BLUE)
    assert expected(Image.open(path))["similarities"].max() < THRESHOLDS["min_similarity"]
    status, (found,) = answers(path)
    assert (status, found["decision"], found["label"]) == (0, "unknown_fruit", None)


def test_what_is_strange_is_no_photograph_of_this_kind_whatever_it_is_like(answers: Answers, tmp_path: Path) -> None:
    wanted = expected(Image.open(noise(tmp_path / "one.png")))
    assert wanted["strangeness"] > THRESHOLDS["max_strangeness"]
    assert wanted["similarities"].max() < THRESHOLDS["min_similarity"]
    status, (found,) = answers(tmp_path / "one.png")
    assert (status, found["decision"], found["label"]) == (0, "no_such_photograph", None)


def test_a_person_reads_both_refusals_in_words(text: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    blue, strange = photograph(tmp_path / "blue.png", BLUE), noise(tmp_path / "noise.png")
    out, err = text(blue, strange)
    assert f"{blue}: a fruit that I do not know\n" in out
    assert f"{strange}: no photograph of this kind\n" in out
    assert err == ""


def test_without_thresholds_nothing_is_refused(model: Path, answers: Answers, tmp_path: Path) -> None:
    describe(model, thresholds={"min_similarity": None, "max_strangeness": None})
    _, found = answers(photograph(tmp_path / "blue.png", BLUE), noise(tmp_path / "noise.png"))
    assert [each["decision"] for each in found] == ["recognised", "recognised"]


@pytest.mark.parametrize(
    ("similarity", "strangeness", "decision"),
    [(0.6, 0.2, "recognised"), (0.59, 0.2, "unknown_fruit"), (0.6, 0.21, "no_such_photograph")],
)
def test_a_photograph_at_both_thresholds_is_accepted(similarity: float, strangeness: float, decision: str) -> None:
    assert recognise.decide(similarity, strangeness, **THRESHOLDS) == decision


# What it reads


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_pixels_are_those_that_ingest_keeps_and_featurize_makes(
    mode: str, orientation: int, image_bytes: Callable[..., bytes], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = image_bytes("JPEG", mode=mode, size=(61, 43), exif=exif)
    (tmp_path / "one.jpg").write_bytes(content)
    wanted = PIXELS | {"resampling": "lanczos"}
    image, is_kept = ingest.decode(content, 10_000)
    kept = content if is_kept else ingest.to_png(image)
    pixels = recognise.read_one(str(tmp_path / "one.jpg"), wanted)
    np.testing.assert_array_equal(pixels, featurize.to_pixels(kept, wanted))


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_a_photograph_that_is_stored_turned_gets_the_answer_of_the_upright_one(
    orientation: int, stored: Image.Transpose, answers: Answers, tmp_path: Path
) -> None:
    upright = Image.open(photograph(tmp_path / "upright.png", "banana", "lime"))
    upright.paste(COLOURS["apple"], (0, 0, 15, 8))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(stored).save(tmp_path / "turned.png", exif=exif)
    _, (one, other) = answers(tmp_path / "upright.png", tmp_path / "turned.png")
    assert one | {"path": ""} == other | {"path": ""}


def test_transparent_pixels_are_white(answers: Answers, tmp_path: Path) -> None:
    photograph(tmp_path / "white.png", "banana", (255, 255, 255))
    image = Image.open(tmp_path / "white.png").convert("RGBA")
    image.paste((0, 0, 0, 0), (15, 0, 31, 17))
    image.save(tmp_path / "clear.png")
    _, (one, other) = answers(tmp_path / "white.png", tmp_path / "clear.png")
    assert one | {"path": ""} == other | {"path": ""}


@pytest.mark.parametrize("format", sorted(ingest.FORMATS.keys() - {"HEIF"}))  # which Pillow does not write
def test_a_file_is_known_by_its_content_whatever_its_name(format: str, answers: Answers, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), COLOURS["lime"]).save(tmp_path / "photograph", format)
    assert answers(tmp_path / "photograph")[1][0]["label"] == "lime"


def test_a_heic_is_known_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "photograph").write_bytes(HEIC)
    kept = ingest.to_png(ingest.decode(HEIC, 10_000)[0])
    pixels = recognise.read_one(str(tmp_path / "photograph"), PIXELS)
    np.testing.assert_array_equal(pixels, featurize.to_pixels(kept, PIXELS))


def test_of_a_folder_all_images_at_any_depth_are_read_by_path(answers: Answers, tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    names = ["b.JPG", "a/z.png", "a/b/c.webp", "c.tiff", "_d.png"]
    for name in [*names, ".hidden.jpg", ".cache/d.jpg", "@eaDir/e.jpg", "__MACOSX/f.jpg"]:
        photograph(folder / name)
    assert [each["path"] for each in answers(folder)[1]] == sorted(str(folder / name) for name in names)


def test_of_a_folder_a_file_is_read_if_its_content_or_its_name_says_that_it_is_an_image(
    answers: Answers, tmp_path: Path
) -> None:
    folder = tmp_path / "photographs"
    content = photograph(folder / "one.jpg").read_bytes()
    for name in ("two", "three.txt", "raw.dng"):
        (folder / name).write_bytes(content)
    for name in ("notes.txt", "four.png", "empty"):
        (folder / name).write_text("Dear customer" if name != "empty" else "")
    _, found = answers(folder)
    assert {Path(each["path"]).name: each["decision"] for each in found} == {
        "four.png": "unreadable",
        "one.jpg": "recognised",
        "three.txt": "recognised",
        "two": "recognised",
    }


def test_a_raw_file_of_a_camera_is_refused_as_ingest_refuses_it(answers: Answers, tmp_path: Path) -> None:
    os.rename(photograph(tmp_path / "one.tiff"), tmp_path / "one.NEF")
    assert answers(tmp_path / "one.NEF")[1][0]["reason"] == "not_an_image"


def test_a_loop_of_links_ends(answers: Answers, tmp_path: Path) -> None:
    photograph(tmp_path / "photographs" / "one.jpg")
    (tmp_path / "photographs" / "up").symlink_to("..")
    assert len(answers(tmp_path / "photographs")[1]) == 1


def test_answers_come_in_the_order_of_the_arguments(
    answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognise, "N_AHEAD", 2)
    labels = ["lime", "apple", "banana", "apple", "lime"]
    paths = [photograph(tmp_path / f"{9 - i}.png", label) for i, label in enumerate(labels)]
    assert [each["label"] for each in answers(*paths)[1]] == labels


# What cannot be read


def test_a_bad_file_is_said_and_the_others_are_recognised(answers: Answers, tmp_path: Path) -> None:
    good = photograph(tmp_path / "good.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(good.read_bytes()[:-200])
    status, (first, second) = answers(cut, good)
    assert (status, first["decision"], first["reason"]) == (1, "unreadable", "truncated")
    assert second["label"] == "apple"


def test_text_that_is_named_as_an_image_is_refused_as_ingest_refuses_it(answers: Answers, tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_text("Dear customer")
    with pytest.raises(ingest.Refused) as refused:
        ingest.decode(b"Dear customer", 100)
    status, (found,) = answers(tmp_path / "one.jpg")
    assert (status, found["reason"], found["detail"]) == (1, "not_an_image", refused.value.detail)


def test_a_person_reads_of_bad_files_on_stderr(text: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(b"")
    assert text(tmp_path / "one.jpg") == ("", f"{tmp_path / 'one.jpg'}: empty, 0 bytes\n")


def test_a_file_that_is_not_there_is_said_to_be_so(answers: Answers, tmp_path: Path) -> None:
    status, (found,) = answers(tmp_path / "none.jpg")
    assert (status, found["reason"]) == (1, "unreadable")
    assert found["detail"].endswith("No such file or directory")


def test_a_folder_without_an_image_is_said_to_be_so(answers: Answers, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, (found,) = answers(tmp_path / "empty")
    assert (status, found["path"], found["reason"]) == (1, str(tmp_path / "empty"), "unreadable")
    assert found["detail"] == "a folder without an image"


@pytest.mark.parametrize("name", ["pipe", "pipe.jpg"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "photographs").mkdir()
    os.mkfifo(tmp_path / "photographs" / name)
    for place in ("photographs", f"photographs/{name}"):
        done = program("-m", "app.recognise", "--model", model, tmp_path / place, timeout=30)
        assert done.stderr == f"{tmp_path / 'photographs' / name}: unreadable, not a regular file\n"
        assert done.returncode == 1


def test_a_device_without_an_end_is_refused(answers: Answers) -> None:
    assert answers(Path("/dev/zero"))[1][0]["detail"] == "not a regular file"


def test_the_limits_are_those_that_ingest_comes_with() -> None:
    limits = (recognise.MAX_PIXELS, recognise.MAX_FILE_MB)
    assert limits == (PARAMS["ingest"]["max_pixels"], PARAMS["ingest"]["max_file_mb"])


def test_a_file_beyond_the_limit_is_not_even_read(answers: Answers, tmp_path: Path) -> None:
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(recognise.MAX_FILE_MB * 2**20 + 1)
    assert answers(tmp_path / "large.jpg")[1][0]["reason"] == "too_large"


def test_an_image_of_too_many_pixels_is_refused_before_they_take_memory(answers: Answers, tmp_path: Path) -> None:
    Image.new("1", (20_000, 5_001)).save(tmp_path / "bomb.png")
    assert answers(tmp_path / "bomb.png")[1][0]["reason"] == "too_many_pixels"


# The model


def test_where_there_is_no_model_the_command_that_makes_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="`make run`"):
        recognise.main(["--model", str(tmp_path / "none"), "one.jpg"])


@pytest.mark.parametrize("name", ["model.tflite", "photographs.parquet"])
def test_a_file_of_the_model_that_is_not_whole_or_not_there_is_refused(name: str, model: Path) -> None:
    (model / name).write_bytes((model / name).read_bytes()[:-1])
    with pytest.raises(SystemExit, match=f"{name} has SHA-256 .* and model.json says"):
        recognise.main(["--model", str(model), "one.jpg"])
    (model / name).unlink()
    with pytest.raises(SystemExit, match=f"{name} cannot be read: No such file"):
        recognise.main(["--model", str(model), "one.jpg"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"labels": 3}', b"\xff\xfe{", b"\xe9"])
def test_a_damaged_description_of_the_model_is_refused(content: bytes, model: Path) -> None:
    (model / "model.json").write_bytes(content)
    with pytest.raises(SystemExit, match=r"model\.json is damaged: .*`make run`"):
        recognise.main(["--model", str(model), "one.jpg"])


def test_pixels_that_nobody_here_can_make_are_refused(model: Path) -> None:
    describe(model, pixels=PIXELS | {"mode": "BGR"})
    with pytest.raises(SystemExit, match="BGR"):
        recognise.main(["--model", str(model), "one.jpg"])


# The program


def program(*words: str | bytes | Path, timeout: int | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_it_starts_neither_tensorflow_nor_java_nor_pandas(model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(model), str(photograph(tmp_path / "one.png"))]
    slow = "{'tensorflow', 'keras', 'pandas', 'scipy', 'sklearn'}"
    code = f"""
import sys
from app import recognise
recognise.main({arguments})
from pyspark import SparkContext
sys.exit(str({slow} & {{*sys.modules}} or SparkContext._gateway or ""))
"""
    assert program("-c", code).stderr == "\n"


def test_the_program_says_nothing_on_stderr(model: Path, tmp_path: Path) -> None:
    done = program("-m", "app.recognise", "--model", model, photograph(tmp_path / "one.png"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.filterwarnings("error")
def test_metadata_that_is_not_as_it_should_be_is_no_matter(answers: Answers, tmp_path: Path) -> None:
    damaged = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    Image.new("RGB", (20, 20), COLOURS["lime"]).save(tmp_path / "one.jpg", exif=damaged)
    with pytest.raises(UserWarning, match="EXIF"):
        Image.open(tmp_path / "one.jpg").getexif()
    assert answers(tmp_path / "one.jpg")[1][0]["label"] == "lime"


def test_a_name_may_be_any_bytes(model: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    os.rename(photograph(tmp_path / "one.png"), path)
    done = program("-m", "app.recognise", "--model", model, path)
    assert (done.returncode, r"/caf\udce9.png: apple" in done.stdout) == (0, True)


def test_who_reads_only_the_head_gets_no_traceback(model: Path, tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m app.recognise --model '{model}' '{photograph(tmp_path / 'one.png')}' | true"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("stdout", "why"), [(">&-", "stdout or stderr is closed"), (">/dev/full", "No space left on device")]
)
def test_an_answer_that_cannot_be_written_is_said_in_a_line(stdout: str, why: str, model: Path, tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m app.recognise --model '{model}' '{photograph(tmp_path / 'one.png')}' {stdout}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"recognise: the answer cannot be written: {why}.\n")


@pytest.mark.slow
def test_photographs_of_the_collection_are_recognised_by_the_model_that_the_pipeline_made(run_once: Path) -> None:
    out = run("python", "-m", "app.recognise", "--json", "data/sample", cwd=run_once)
    found = [json.loads(line) for line in out.splitlines()]
    right = [each["label"] == Path(each["path"]).parent.name for each in found if each["label"]]
    assert np.mean(right) > 0.9  # it has learnt these
    assert len(right) > 0.8 * len(found)
    products = [[each["similarity"] for each in one["nearest"]] for one in found]
    assert products == [sorted(each, reverse=True) for each in products]
