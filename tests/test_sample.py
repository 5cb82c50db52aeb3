"""Facts about the synthetic sample of stages/sample.py."""

import inspect
import io
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stages import analysis, sample

Files = dict[str, bytes]  # the bytes of each file, by its path in the output


def render(output: Path, frames: int, size: int, seed: int = 0) -> Files:
    """Run the stage and return what it wrote."""
    flags = ["--frames", str(frames), "--size", str(size), "--seed", str(seed)]
    sample.main([str(output), *flags])
    files = (path for path in output.rglob("*") if path.is_file())
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def pixels(jpeg: bytes) -> NDArray[np.float64]:
    """Return the (size, size, 3) values of an image, 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(jpeg)), np.float64)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """One frame an axis, as large as those of Fruits-360."""
    return render(tmp_path_factory.mktemp("full") / "sample", frames=1, size=100)


@pytest.fixture(scope="module")
def two_frames(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Two small frames an axis."""
    return render(tmp_path_factory.mktemp("two") / "sample", frames=2, size=16)


@pytest.fixture(scope="module")
def full_turn(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """As many frames as the pipeline renders, but small."""
    return render(tmp_path_factory.mktemp("turn") / "sample", frames=36, size=16)


def test_a_second_run_writes_the_same_bytes(tmp_path: Path, two_frames: Files) -> None:
    assert render(tmp_path / "again", frames=2, size=16) == two_frames


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(
    workers: int, tmp_path: Path, two_frames: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = partial(ProcessPoolExecutor, max_workers=workers)
    monkeypatch.setattr(sample, "ProcessPoolExecutor", pool)
    assert render(tmp_path / "sample", frames=2, size=16) == two_frames


def test_another_seed_writes_other_bytes(tmp_path: Path, two_frames: Files) -> None:
    other = render(tmp_path / "other", frames=2, size=16, seed=1)
    assert other.keys() == two_frames.keys()
    assert all(other[name] != two_frames[name] for name in other)


def test_names_are_those_of_fruits_360(full_turn: Files) -> None:
    numbers = [
        0, 9, 18, 27, 36, 46, 55, 64, 73, 82, 91, 100, 109, 118, 128, 137, 146, 155,
        164, 173, 182, 191, 200, 210, 219, 228, 237, 246, 255, 264, 273, 282, 292, 301, 310, 319,
    ]  # fmt: skip
    axes = [f"{prefix}{number}_100.jpg" for prefix in ("", "r_") for number in numbers]
    assert full_turn.keys() == {f"{label}/{name}" for label in sample.CATALOGUE for name in axes}
    assert len(full_turn) == 1008


def test_every_file_is_a_100_by_100_rgb_jpeg(full_size: Files) -> None:
    images = [Image.open(io.BytesIO(jpeg)) for jpeg in full_size.values()]
    assert {(image.format, image.mode, image.size) for image in images} == {("JPEG", "RGB", (100, 100))}


def test_every_corner_is_white(full_size: Files) -> None:
    corners = [pixels(jpeg)[[0, 0, -1, -1], [0, -1, 0, -1]] for jpeg in full_size.values()]
    assert np.min(corners) > 245


def test_every_fruit_fills_the_frame(full_size: Files) -> None:
    for name, jpeg in full_size.items():
        rows, columns = np.nonzero(pixels(jpeg).min(axis=2) < 200)
        assert max(np.ptp(rows), np.ptp(columns)) >= 90, name


def test_any_two_labels_look_different(full_size: Files) -> None:
    for frame in ("0_100.jpg", "r_0_100.jpg"):
        looks = {label: pixels(full_size[f"{label}/{frame}"]) for label in sample.CATALOGUE}
        for one, other in combinations(looks, 2):
            assert np.abs(looks[one] - looks[other]).mean() > 10, (one, other)


def test_the_two_axes_look_different(full_size: Files) -> None:
    for label in sample.CATALOGUE:
        upright, lying = (pixels(full_size[f"{label}/{axis}0_100.jpg"]) for axis in ("", "r_"))
        assert np.abs(upright - lying).mean() > 8, label


def test_consecutive_frames_differ(full_turn: Files) -> None:
    for one, other in pairwise(full_turn.values()):
        assert one != other


def test_the_last_line_sums_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render(tmp_path / "sample", frames=1, size=16)
    assert capsys.readouterr().out == "sample: 28 images of 14 labels\n"


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("frames", 0, "1 and 328"),
        ("frames", 329, "1 and 328"),
        ("size", 15, "16 and 4,096"),
        ("size", 4097, "16 and 4,096"),
        ("seed", -1, "0 and 4,294,967,295"),
        ("seed", 2**32, "0 and 4,294,967,295"),
    ],
)
def test_a_bad_flag_is_told_what_is_allowed(
    flag: str, value: int, allowed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"frames": 1, "size": 16, "seed": 0} | {flag: value}
    with pytest.raises(SystemExit, match="2"):
        render(tmp_path / "sample", **flags)
    assert f"argument --{flag}: {value} is not between {allowed}" in capsys.readouterr().err


def test_bounds_are_read_as_in_the_other_stages() -> None:
    assert inspect.getsource(sample.between) == inspect.getsource(analysis.between)
