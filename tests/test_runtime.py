"""runtime.py: what a stage took, as reports/runtime.json has it."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import runtime
from job import Job

JOB = Job("stages/reduce.py", ["in"], "out", [])
EMR = {
    "where": "emr",
    "cores": 16,
    "seconds": 60.0,
    "node_hours": 0.05,
    "euros": 0.02,
    "seconds_waited": 500.0,
    "euros_waited": 0.1,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("in/features", image_id=["a", "b"])
    write("out/embeddings", image_id=["a", "b", "c", "d"])
    write("out/model", feature=list(range(1280)))
    return tmp_path


def write(folder: str, **columns: list[Any]) -> None:
    Path(folder).mkdir(parents=True)
    pq.write_table(pa.table(columns), f"{folder}/part-00000.parquet")


def recorded() -> dict[str, Any]:
    return dict(json.loads(Path("reports/runtime.json").read_text()))


def test_images_are_the_rows_of_the_longest_table_of_images() -> None:
    assert runtime.count_images(["in", "out"]) == 4


def test_where_there_is_no_table_images_are_the_files() -> None:
    for name in ("raw/Apple/1.jpg", "raw/Apple/2.jpg", "raw/Plum/1.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert runtime.count_images(["raw"]) == 3


def test_a_run_takes_the_place_of_the_stages_last_and_leaves_the_others() -> None:
    for stage, seconds in (("ingest", 5.0), ("reduce", 7.0), ("reduce", 9.0)):
        runtime.record(JOB._replace(stage=f"stages/{stage}.py"), {"where": "local", "cores": 2, "seconds": seconds})
    assert {took["stage"]: took["seconds"] for took in recorded()["stages"]} == {"ingest": 5.0, "reduce": 9.0}


def test_what_cost_nothing_has_no_price() -> None:
    runtime.record(JOB, {"where": "local", "cores": 2, "seconds": 5.0})
    assert recorded()["run"] == {"seconds": 5.0}


def test_start_up_is_apart_from_the_work() -> None:
    for stage in ("covariance", "reduce"):
        runtime.record(JOB._replace(stage=f"stages/{stage}.py"), EMR)
    assert recorded()["run"] == {
        "seconds": 120.0,
        "node_hours": 0.1,
        "euros": 0.04,
        "euros_per_1000_images": 10.0,  # each stage 0.02 for four images
        "seconds_waited": 1000.0,
        "euros_waited": 0.2,
    }


def test_an_estimate_grows_with_images_and_shrinks_with_cores() -> None:
    runtime.record(JOB, EMR)  # 60 s for 4 images on 16 cores; now 2 images
    assert runtime.estimate(JOB, cores=8) == pytest.approx(60.0)


def test_without_an_earlier_run_there_is_no_estimate() -> None:
    assert runtime.estimate(JOB, cores=8) is None
