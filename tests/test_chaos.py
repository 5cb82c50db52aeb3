"""chaos.py: what it takes for a good end, and a few rounds of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import chaos
from tests.helpers import PIPELINE, ROOT

LAST = "Running stage 'reduce':\n> python -m bootstrap.submit spark-submit stages/reduce.py\n"
FAILED = "ERROR: failed to reproduce 'reduce': failed to run: python -m bootstrap.submit, exited with 1\n"


def project(folder: Path) -> Path:
    """A project as it is after a run: a file in each output, and a lock."""
    for out in chaos.OUTS.values():
        (folder / out).mkdir(parents=True)
        (folder / out / "part").write_text(out)
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": {name: {"cmd": name} for name in PIPELINE}}))
    return folder


def test_a_project_that_was_disturbed_is_compared_file_by_file(tmp_path: Path) -> None:
    here, there = project(tmp_path / "here"), project(tmp_path / "there")
    assert chaos.what_differs(here, there) == ""
    (here / "data/reduced/part").write_text("data/redused")
    assert chaos.what_differs(here, there) == "data/reduced has 1 files that are different, such as part"
    shutil.rmtree(here / "data/reduced")
    assert chaos.what_differs(here, there) == "data/reduced has 1 files that are different, such as part"


def test_a_lock_that_differs_is_told_by_its_stages(tmp_path: Path) -> None:
    here, there = project(tmp_path / "here"), project(tmp_path / "there")
    (here / "dvc.lock").write_text(yaml.safe_dump({"stages": {name: {"cmd": name} for name in PIPELINE if name != "drift"}}))
    assert chaos.what_differs(here, there) == "dvc.lock differs in drift"


@pytest.mark.parametrize(
    "line",
    [
        "submit: the disk is full: free some space, or set SPARK_LOCAL_DIRS",
        "reduce: n_components is 50 but there are only 24 images",
        "params.yaml: reduce: argument --k: 0 is not between 1 and 4,096",
    ],
)
def test_an_error_is_a_line_of_the_stage_that_failed(line: str) -> None:
    assert chaos.find_error(f"{LAST}{line}\n{FAILED}") == line


@pytest.mark.parametrize(
    "said",
    [
        f"ingest: 25 images of 3 labels; 0 files quarantined\n{LAST}{FAILED}",
        f"{LAST}Traceback (most recent call last):\nsubmit: the disk is full: free some space\n{FAILED}",
        f"{LAST}submit: the disk is full: free some space\n\tat java.base/java.lang.Thread.run(Thread.java:840)\n{FAILED}",
    ],
    ids=["of another stage", "with a trace of Python", "with a trace of Java"],
)
def test_a_run_that_ends_without_a_clear_word_is_wrong(said: str) -> None:
    with pytest.raises(chaos.Wrong):
        chaos.find_error(said)


def test_a_seed_plays_each_kind_of_fault_once_in_as_many_rounds() -> None:
    n = len(chaos.FAULTS)
    first, again, second = ([chaos.fault_of(seed, number) for number in range(n)] for seed in (1, 1, 2))
    assert (first == again, first == second, sorted(first)) == (True, False, sorted(chaos.FAULTS))


@pytest.mark.slow
def test_after_a_round_of_chaos_all_is_well(tmp_path: Path) -> None:
    flags = ["--seed", "1", "--rounds", "1", "--fault", "damage", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "tests.chaos", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
