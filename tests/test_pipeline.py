"""The whole pipeline on few images, as a stranger runs it: dvc in a fresh clone, without a git identity."""

import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from reports.delivery import experiment
from tests.helpers import PIPELINE, SPARK_STAGES, environment_of, forget, run

pytestmark = pytest.mark.slow


def test_a_second_run_has_nothing_to_do(clone: Path) -> None:
    assert run("dvc", "repro", cwd=clone).count("didn't change, skipping") == len(PIPELINE)


def test_another_k_runs_reduce_and_what_depends_on_it_only(clone: Path) -> None:
    said = run("dvc", "exp", "run", "-S", "reduce.k=4", cwd=clone)
    ran = [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]
    assert ran == ["reduce", "evaluate", "classify", "export", "runtime"]


def test_what_comes_from_dvcs_cache_is_recorded_with_what_it_took_when_it_was_computed(clone: Path) -> None:
    took = []
    for k in (3, 5, 3):
        run("dvc", "exp", "run", "-S", f"reduce.k={k}", cwd=clone)
        stages = json.loads((clone / "reports/runtime.json").read_text())["stages"]
        (reduce,) = (stage for stage in stages if stage["stage"] == "reduce")
        took.append((reduce["is_cached"], reduce["seconds"]))
    assert [is_cached for is_cached, _ in took] == [False, False, True]
    assert took[2][1] == took[0][1]


def test_metrics_diff_shows_what_another_k_costs(clone: Path) -> None:
    run("dvc", "exp", "run", "-S", "reduce.k=2", cwd=clone)
    lines = [line.split() for line in run("dvc", "metrics", "diff", cwd=clone).splitlines()]
    assert ["reports/evaluation/metrics.json", "variance.components", "8", "2", "-6"] in lines


def test_two_runs_at_once_share_a_cache_and_write_the_same_bytes(clone: Path, tmp_path: Path) -> None:
    folders = (tmp_path / "one", tmp_path / "two")
    for folder in folders:
        run("cp", "-a", str(clone), str(folder), cwd=tmp_path)
    command = ("dvc", "exp", "run", "-S", "featurize.batch_size=5", "featurize")
    with ThreadPoolExecutor() as together:  # from a cache that has nothing yet
        one, two = together.map(lambda folder: run(*command, cwd=folder, FEATURE_CACHE=f"{tmp_path}/cache"), folders)
    assert "Running stage 'featurize'" in one
    assert "Running stage 'featurize'" in two
    one, two = (yaml.safe_load((folder / "dvc.lock").read_text())["stages"]["featurize"] for folder in folders)
    assert one == two


@pytest.mark.parametrize("master", ["local[1]", "local-cluster[2,1,1024]"])
def test_the_same_bytes_on_any_number_of_cores_and_executors(clone: Path, master: str) -> None:
    before = (clone / "dvc.lock").read_text()
    forget(clone)
    said = run("dvc", "repro", "reduce", cwd=clone, SPARK_MASTER=master)
    assert [stage for stage in SPARK_STAGES if f"Running stage '{stage}'" not in said] == []
    assert yaml.safe_load((clone / "dvc.lock").read_text()) == yaml.safe_load(before)


def test_the_images_may_be_in_a_folder_of_any_name(clone: Path) -> None:
    folder = Path("data", "R&D (1) l'été $HOME")
    shutil.copytree(clone / "data/sample", clone / folder)
    run("dvc", "add", str(folder), cwd=clone)
    said = run("sh", "-c", f"{experiment(folder)} ingest", cwd=clone)
    assert "Running stage 'ingest'" in said
    (dep,) = (
        dep
        for dep in yaml.safe_load((clone / "dvc.lock").read_text())["stages"]["ingest"]["deps"]
        if dep["path"] != "stages/ingest.py"
    )
    assert (dep["path"], dep["nfiles"]) == (str(folder), len(list((clone / folder).rglob("*.jpg"))))


def test_a_run_after_a_killed_one_waits_for_the_stage_that_it_has_left(clone: Path) -> None:
    parameters = clone / "params.yaml"
    before = parameters.read_text()
    parameters.write_text(before.replace("frames: 4", "frames: 12"))
    killed = subprocess.Popen(["dvc", "repro", "sample"], cwd=clone, env=environment_of(clone), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (clone / "data/sample.partial").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    parameters.write_text(before.replace("frames: 4", "frames: 3"))
    said = run("dvc", "repro", "sample", cwd=clone)
    assert "another run is still at work in data; waiting for it to end" in said
    assert {len(list(label.iterdir())) for label in (clone / "data/sample").iterdir()} == {2 * 3}
