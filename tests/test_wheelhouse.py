"""wheelhouse.py and install.sh: what a node's Python is made of, from pip's download to the import at the node."""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import mock_aws

from bootstrap.aws import cloud, residency, wheelhouse
from tests.helpers import ROOT

SETTINGS = cloud.settings()
RELEASE = SETTINGS["cluster"]["ReleaseLabel"]


@pytest.fixture
def s3(keys_of_nobody: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with mock_aws():
        client = boto3.client("s3", region_name=SETTINGS["region"])
        client.create_bucket(Bucket="fruits-1", CreateBucketConfiguration={"LocationConstraint": SETTINGS["region"]})
        monkeypatch.setattr(cloud, "outputs", lambda settings: {"Bucket": "fruits-1"})
        monkeypatch.setattr(residency, "require", lambda region, buckets: None)
        yield client


def wheel(folder: Path, name: str = "orchard", version: str = "1.0") -> Path:
    """A package that pip can install: one module."""
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "ripe = True\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{about}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def keys(s3: Any) -> list[str]:
    return [item["Key"] for item in s3.list_objects_v2(Bucket="fruits-1").get("Contents", [])]


def test_a_package_has_the_version_that_the_requirements_pin() -> None:
    pinned = wheelhouse.pins(SETTINGS, RELEASE)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    (numpy,) = [line.removeprefix("numpy==") for line in lines if line.startswith("numpy==")]
    assert pinned["numpy"] == numpy
    assert pinned["tensorflow-cpu"]
    assert pinned["ml-dtypes"], "which only constraints.txt names"


def test_spark_3_gets_a_numpy_before_2() -> None:
    assert wheelhouse.pins(SETTINGS, "emr-7.13.0")["numpy"].startswith("1.")


def test_a_release_that_nobody_has_looked_at_is_refused() -> None:
    with pytest.raises(
        SystemExit, match=r"unknown release 'emr-8\.0\.0'; cluster\.yaml knows emr-spark-8\.0\.0, emr-7\.13\.0"
    ):
        wheelhouse.pins(SETTINGS, "emr-8.0.0")


def test_emrs_own_spark_is_left_alone() -> None:
    assert not any("spark" in name for name in wheelhouse.IMPORTED)


def test_other_versions_are_another_folder() -> None:
    versions = wheelhouse.pins(SETTINGS, RELEASE)
    assert wheelhouse.folder(versions) == wheelhouse.folder(dict(reversed(versions.items())))
    assert wheelhouse.folder(versions) != wheelhouse.folder(versions | {"numpy": "2.0.0"})


def test_another_install_is_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = wheelhouse.folder(wheelhouse.pins(SETTINGS, RELEASE))
    monkeypatch.setattr(wheelhouse, "INSTALL", tmp_path / "install.sh")
    wheelhouse.INSTALL.write_text("true")
    assert wheelhouse.folder(wheelhouse.pins(SETTINGS, RELEASE)) != before


def test_pip_is_asked_for_the_nodes_python_and_for_wheels_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    limits: list[str] = []

    def pip(command: list[str]) -> Any:
        asked.extend(command)
        limits.extend(Path(command[command.index("--constraint") + 1]).read_text().splitlines())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    wheelhouse.download(wheelhouse.pins(SETTINGS, "emr-7.13.0"), tmp_path)
    assert asked[:4] == [sys.executable, "-m", "pip", "download"]
    assert asked[asked.index("--python-version") + 1] == "3.11"
    assert {"--only-binary=:all:", "manylinux_2_28_x86_64", "manylinux2014_x86_64", "numpy==1.26.4"} <= set(asked)
    assert "numpy==1.26.4" in limits
    assert len(limits) > 100
    assert not list(tmp_path.iterdir()), "the constraints are not for upload"


def test_when_pip_fails_nothing_is_uploaded(monkeypatch: pytest.MonkeyPatch, s3: Any) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match="nothing was uploaded"):
        wheelhouse.main([])
    assert keys(s3) == []


def test_a_wheelhouse_is_uploaded_once(monkeypatch: pytest.MonkeyPatch, s3: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(wheelhouse, "download", lambda versions, wheels: wheel(wheels))
    wheelhouse.main([])
    folder = wheelhouse.folder(wheelhouse.pins(SETTINGS, RELEASE))
    names = ["install.sh", "orchard-1.0-py3-none-any.whl", "requirements.txt"]
    assert keys(s3) == [f"{folder}/{name}" for name in names]
    assert "Uploading 2 files" in capsys.readouterr().out

    monkeypatch.setattr(wheelhouse, "download", lambda versions, wheels: pytest.fail("downloaded again"))
    wheelhouse.main([])
    assert capsys.readouterr().out == f"s3://fruits-1/{folder} exists already: Python for {RELEASE}\n"


def test_an_upload_that_was_broken_off_goes_on(
    monkeypatch: pytest.MonkeyPatch, s3: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wheelhouse, "download", lambda versions, wheels: wheel(wheels))
    wheelhouse.main([])
    folder = wheelhouse.folder(wheelhouse.pins(SETTINGS, RELEASE))
    for name in ("requirements.txt", "install.sh"):
        s3.delete_object(Bucket="fruits-1", Key=f"{folder}/{name}")
    capsys.readouterr()
    wheelhouse.main([])
    assert "Uploading 1 files" in capsys.readouterr().out
    assert wheelhouse.exists(s3, "fruits-1", folder)


def test_for_serverless_the_same_packages_are_there_laid_out(
    monkeypatch: pytest.MonkeyPatch, s3: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(wheelhouse, "download", lambda versions, wheels: wheel(wheels))
    wheelhouse.main([])
    monkeypatch.setattr(cloud, "settings", lambda: SETTINGS | {"parameters": {"Serverless": "true"}})
    wheelhouse.main([])
    key = f"{wheelhouse.folder(wheelhouse.pins(SETTINGS, RELEASE))}/{wheelhouse.ARCHIVE}"
    s3.download_file("fruits-1", key, str(tmp_path / "packages.tar.gz"))
    with tarfile.open(tmp_path / "packages.tar.gz") as archive:
        assert "./orchard.py" in archive.getnames()


def test_the_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    path = wheel(tmp_path, "ripe_fruit", "2.1")
    expected = f"ripe-fruit==2.1 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"
    assert wheelhouse.with_hashes(tmp_path) == expected


# --- install.sh, with a command `aws` that copies from a folder, and a `sudo` that changes nothing.


@pytest.fixture
def node(tmp_path: Path) -> dict[str, str]:
    """What a node's environment is, in a folder."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (tmp_path / "wheels").mkdir()
    asked = 'test "$1 $2 $3 $5 $6" = "s3 cp --recursive --region eu-west-3" || exit 64'
    aws = f'#!/bin/sh\n{asked}\nfor last; do :; done\ncp "$WHEELS"/* "$last"\n'
    for name, text in {"aws": aws, "sudo": '#!/bin/sh\nexec "$@"\n'}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "WHEELS": str(tmp_path / "wheels"),
        "FRUITS_HOME": str(tmp_path / "fruits"),
        "FRUITS_IMPORTS": "orchard",
        "PYTHON": sys.executable,
    }


def install(node: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(wheelhouse.INSTALL), "s3://fruits-1/bootstrap/0123", "eu-west-3"]
    return subprocess.run(command, env=node, capture_output=True, text=True)


def test_a_node_has_the_wheels_and_no_index(node: dict[str, str]) -> None:
    wheels = Path(node["WHEELS"])
    wheel(wheels)
    (wheels / "requirements.txt").write_text(wheelhouse.with_hashes(wheels))
    # A setting of the machine that names an index which is not there.
    done = install(node | {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": "false"})
    assert done.returncode == 0, done.stderr
    python = Path(node["FRUITS_HOME"]) / "venv/bin/python"
    assert subprocess.check_output([python, "-c", "import orchard; print(orchard.ripe)"], text=True) == "True\n"


def test_a_release_without_the_nodes_python_gets_it_from_the_repository_in_the_region(
    node: dict[str, str], tmp_path: Path
) -> None:
    wheels, commands = Path(node["WHEELS"]), tmp_path / "bin"
    wheel(wheels)
    (wheels / "requirements.txt").write_text(wheelhouse.with_hashes(wheels))
    python = (
        f'printf "#!/bin/sh\\nexec {sys.executable} \\"\\$@\\"\\n" > {commands}/python3.xx; chmod +x {commands}/python3.xx'
    )
    (commands / "dnf").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{python}\n')
    (commands / "dnf").chmod(0o755)
    done = install(node | {"PYTHON": "python3.xx"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "asked").read_text() == "install --assumeyes --quiet python3.xx python3.xx-pip\n"


@pytest.mark.slow
def test_a_wheel_that_is_not_the_one_that_was_uploaded_ends_the_cluster(node: dict[str, str]) -> None:
    wheels = Path(node["WHEELS"])
    path = wheel(wheels)
    (wheels / "requirements.txt").write_text(wheelhouse.with_hashes(wheels))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("orchard_spy.py", "")
    done = install(node)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


@pytest.mark.slow
def test_no_index_is_asked_even_if_the_machine_knows_one(node: dict[str, str], tmp_path: Path) -> None:
    wheels, index, venv = Path(node["WHEELS"]), tmp_path / "index/orchard", Path(node["FRUITS_HOME"]) / "venv"
    for folder in (index, venv):
        folder.mkdir(parents=True)
    path = wheel(index)
    (index / "index.html").write_text(f'<a href="{path.name}">{path.name}</a>')
    (wheels / "requirements.txt").write_text(wheelhouse.with_hashes(index))
    (venv / "pip.conf").write_text(f"[global]\nindex-url = {index.parent.as_uri()}\n")
    done = install(node)
    assert done.returncode != 0
    assert "No matching distribution found for orchard" in done.stderr


@pytest.mark.slow
def test_a_wheel_without_a_hash_is_refused(node: dict[str, str]) -> None:
    wheel(Path(node["WHEELS"]))
    (Path(node["WHEELS"]) / "requirements.txt").write_text("orchard==1.0\n")
    done = install(node)
    assert done.returncode != 0
    assert "Hashes are required" in done.stderr


@pytest.mark.slow
def test_what_cannot_be_imported_ends_the_cluster(node: dict[str, str]) -> None:
    wheels = Path(node["WHEELS"])
    wheel(wheels)
    (wheels / "requirements.txt").write_text(wheelhouse.with_hashes(wheels))
    done = install(node | {"FRUITS_IMPORTS": "orchard, pear"})
    assert done.returncode != 0
    assert "No module named 'pear'" in done.stderr


def test_a_node_imports_all_that_the_wheelhouse_is_for() -> None:
    modules = {"pi-heif": "pi_heif", "pillow": "PIL", "tensorflow-cpu": "tensorflow"}
    expected = ", ".join(modules.get(name, name) for name in wheelhouse.IMPORTED)
    assert f"{{FRUITS_IMPORTS:-{expected}}}" in wheelhouse.INSTALL.read_text()


@pytest.mark.parametrize("words", [[], ["s3://fruits-1/bootstrap/0123"]])
def test_without_the_place_of_the_wheels_or_the_region_it_says_how_to_call_it(
    node: dict[str, str], words: list[str]
) -> None:
    done = subprocess.run(["bash", str(wheelhouse.INSTALL), *words], env=node, capture_output=True, text=True)
    assert done.returncode != 0
    assert "usage: install.sh s3://" in done.stderr
