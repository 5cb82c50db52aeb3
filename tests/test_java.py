"""java.py: which Java is refused, and the archive of Spark's classes."""

import shlex
from pathlib import Path

import pytest

from bootstrap import java
from tests.helpers import make_archive


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('openjdk version "11.0.2" 2019-01-15', r"Java 17 or 21, and .* is: openjdk version \"11.0.2\""),
        ('java version "1.8.0_392"', r"Java 17 or 21, and .* is: java version \"1.8"),
        ("no java here", "Java 17 or 21"),
    ],
)
def test_another_java_is_refused_by_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, message: str
) -> None:
    binary = tmp_path / "bin" / "java"
    binary.parent.mkdir()
    binary.write_text(f"#!/bin/sh\necho '{said}' >&2\n")
    binary.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=message):
        java.check_java()


def test_no_java_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=r"cannot be run .*Install one"):
        java.check_java()


def test_the_first_run_makes_the_archive_of_classes_that_the_next_ones_share(dvc_root: dict[str, str]) -> None:
    path = make_archive(dvc_root, "17.0.15")
    options = java.class_archive(dvc_root, "17.0.15").options
    assert shlex.split(options)[0] == f"-XX:SharedArchiveFile={path}"


def test_the_archive_of_another_java_is_replaced(dvc_root: dict[str, str]) -> None:
    before = make_archive(dvc_root, "17.0.15")
    make_archive(dvc_root, "17.0.16")
    assert not before.exists()


@pytest.mark.parametrize("status", [1, 130, 137])
def test_what_a_java_that_did_not_end_well_left_of_an_archive_is_dropped(dvc_root: dict[str, str], status: int) -> None:
    archive = java.class_archive(dvc_root, "17.0.15")
    assert archive.partial is not None
    archive.partial.write_bytes(b"half")
    archive.settle(status)
    assert list(archive.path.parent.iterdir()) == []


@pytest.mark.parametrize(("status", "is_kept"), [(0, True), (1, True), (130, True), (134, False), (139, False)])
def test_an_archive_is_dropped_if_java_crashes_and_made_again(dvc_root: dict[str, str], status: int, is_kept: bool) -> None:
    path = make_archive(dvc_root, "17.0.15")
    java.class_archive(dvc_root, "17.0.15").settle(status)
    is_made_again = "ArchiveClassesAtExit" in java.class_archive(dvc_root, "17.0.15").options
    assert (path.exists(), is_made_again) == (is_kept, not is_kept)


@pytest.mark.parametrize("name", ["HADOOP_CONF_DIR", "YARN_CONF_DIR", "SPARK_DIST_CLASSPATH"])
def test_with_folders_in_the_class_path_there_is_no_archive(dvc_root: dict[str, str], name: str) -> None:
    # Java would end with status 1 after all the work is done.
    assert java.class_archive(dvc_root | {name: "/etc/hadoop"}, "17.0.15").options == ""
