"""verify.py, and the checksums of tables: what a disk has changed is neither used nor kept."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import PIPELINE, ROOT, run

# Each stage that reads features or photographs, and a table that it reads.
READERS = {
    "featurize": "data/ingested/images",
    "neighbours": "data/features",
    "covariance": "data/features",
    "reduce": "data/features",
    "baseline": "data/features",
    "classify": "data/features",
}


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file, as a disk does: neither its size nor its times change."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(status.st_mode)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def verify(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reports.verify"]
    return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that has two photographs, and knows them."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "mine").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / "mine" / name).write_text(f"the photograph {name}")
    run("dvc", "init", "--quiet", "--no-scm", cwd=folder)
    run("dvc", "config", "cache.type", "copy", cwd=folder)
    run("dvc", "add", "--quiet", "mine", cwd=folder)
    return folder


def cached(folder: Path) -> dict[str, Path]:
    """The files of DVC's cache by what they are: a.jpg, b.jpg, and the list of both."""
    names = {"the photograph a.jpg": "a.jpg", "the photograph b.jpg": "b.jpg"}
    return {names.get(path.read_text(), "list"): path for path in folder.glob(".dvc/cache/files/md5/*/*")}


def test_of_what_is_whole_it_says_so(photographs: Path) -> None:
    done = verify(photographs)
    said = "verify: 3 files of DVC's cache and 2 in the workspace; 0 damaged, deleted\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr


@pytest.mark.parametrize("name", ["a.jpg", "list"])
def test_a_damaged_file_of_the_cache_is_made_again_from_the_workspace(photographs: Path, name: str) -> None:
    path = cached(photographs)[name]
    before = path.read_bytes()
    flip(path)
    done = verify(photographs)
    assert (done.returncode, path.read_bytes()) == (1, before)
    assert f"{path.relative_to(photographs)}, and made again" in done.stdout


def test_a_damaged_file_of_the_workspace_is_deleted_and_comes_back_from_the_cache(photographs: Path) -> None:
    path = photographs / "mine/a.jpg"
    flip(path)
    assert "mine/a.jpg" not in run("dvc", "status", cwd=photographs)  # DVC does not see it
    done = verify(photographs)
    assert (done.returncode, path.exists(), "  mine/a.jpg\n" in done.stdout) == (1, False, True)
    run("dvc", "checkout", cwd=photographs)
    assert path.read_text() == "the photograph a.jpg"


def test_a_file_that_is_damaged_in_both_places_is_kept_in_neither(photographs: Path) -> None:
    files = [cached(photographs)["b.jpg"], cached(photographs)["list"], photographs / "mine/b.jpg"]
    for path in files:
        flip(path)
    verify(photographs)
    assert not any(path.exists() for path in files)
    (photographs / "mine/b.jpg").write_text("the photograph b.jpg")
    run("dvc", "commit", "--force", cwd=photographs)


def test_what_a_person_has_changed_is_left_alone(photographs: Path) -> None:
    path = photographs / "mine/a.jpg"
    path.write_text("the photograph a.jpg, sharper")
    assert (verify(photographs).returncode, path.read_text()) == (0, "the photograph a.jpg, sharper")
    path.write_text("the photograph a.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("stage", READERS)
def test_a_stage_that_reads_a_flipped_bit_ends_with_what_to_do(clone: Path, stage: str, tmp_path: Path) -> None:
    table = next((clone / READERS[stage]).glob("*.parquet"))
    words = shlex.split(yaml.safe_load((clone / "dvc.lock").read_text())["stages"][stage]["cmd"])
    (output,) = PIPELINE[stage]["outs"]
    before = table.read_bytes()
    flip(table)
    done = subprocess.run(
        [sys.executable, *(f"{tmp_path}/output" if word == output else word for word in words[1:])],
        cwd=clone,
        env=os.environ | {"FEATURE_CACHE": f"{tmp_path}/cache", "SPARK_DRIVER_MEMORY": "1g"},
        capture_output=True,
        text=True,
    )
    table.write_bytes(before)
    assert (done.returncode, Path(tmp_path, "output").exists()) == (1, False)
    assert "a table is not as it was written" in done.stderr
