"""What a release consists of says the same in each place: requirements and locks, version and changelog."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.helpers import PYTHON, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = {f"requirements{part}.txt": f"constraints{part}.txt" for part in ("", "-app", "-dev")}


def entries(name: str) -> list[str]:
    """The requirements of a file, each on one line, without comments."""
    lines = (ROOT / name).read_text().replace("\\\n", "").splitlines()
    return [text for line in lines if (text := re.sub(r"(^|\s)#.*", "", line).strip())]


def pin(entry: str) -> str:
    """An entry's name and version, as in `ruamel-yaml==0.19.1`."""
    found = re.match(r"([\w.-]+)(?:\[\w+\])?==([^\s;]+)", entry)
    assert found is not None, entry
    name, version = found.groups()
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"


@pytest.mark.parametrize(("requirement", "lock"), [(each, LOCK[name]) for name in LOCK for each in entries(name)])
def test_a_requirement_is_locked_at_its_version(requirement: str, lock: str) -> None:
    assert pin(requirement) in map(pin, entries(lock)), "run `make lock`"


@pytest.mark.parametrize("lock", LOCK.values())
def test_each_locked_package_has_a_hash(lock: str) -> None:
    assert [entry for entry in entries(lock) if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)] == []


def test_a_package_has_one_version_in_both_locks_and_on_every_machine() -> None:
    pins = {pin(entry) for lock in LOCK.values() for entry in entries(lock)}
    names = [each.partition("==")[0] for each in pins]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", [*LOCK, *LOCK.values()])
def test_no_registry_is_named(name: str) -> None:
    assert not re.search(r"://|--(extra-)?index-url|--find-links", (ROOT / name).read_text())


@pytest.mark.parametrize("target", [".venv/run", ".venv/dev"])
@pytest.mark.parametrize(
    ("hashes", "said"),
    [(f"--hash=sha256:{0:064}", "DO NOT MATCH THE HASHES"), ("", "Hashes are required")],
    ids=["of another file", "none"],
)
def test_make_installs_nothing_but_what_the_lock_has_the_hash_of(
    hashes: str, said: str, target: str, tmp_path: Path
) -> None:
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (tmp_path / "orchard-1.0-py3-none-any.whl").write_text("not what was locked")
    for lock in LOCK.values():
        (tmp_path / lock).write_text(f"orchard==1.0 {hashes}\n")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(PYTHON)
    if target == ".venv/dev":
        (tmp_path / ".venv/run").touch()
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_DRY_RUN": "1"}
    path = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "--assume-old=check", target]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | settings | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / target).exists()


def test_the_newest_release_of_the_changelog_is_the_projects_version() -> None:
    released = re.findall(r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == PROJECT["version"]


def test_the_citation_says_what_the_project_says() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == PROJECT["license"]
    assert "version" not in citation, "which has its place in pyproject.toml"
