"""runtime.py: what a stage took, as reports/runtime.json has it."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from bootstrap import runtime
from bootstrap.job import Job

JOB = Job("spark-submit", "stages/reduce.py", ["in"], "out", ["--k", "64"])
HERE = {"where": "local", "cores": 2, "seconds": 5.0}
EMR = {
    "where": "emr",
    "cores": 16,
    "seconds": 60.0,
    "node_hours": 0.05,
    "euros": 0.02,
    "seconds_waited": 500.0,
    "euros_waited": 0.1,
}

EVALUATION = {
    "images": {"images": 1008},
    "variance": {"components": 64},
    "nearest_neighbour": {"embedding": 0.932, "features": 0.933},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    write("in/features", image_id=["a", "b"])
    write("out/embeddings", image_id=["a", "b", "c", "d"])
    write("out/model", feature=list(range(1280)))
    (tmp_path / "params.yaml").write_text("reduce:\n  k: 64\n")
    for name, figures in (("evaluation", EVALUATION), ("classifier", {"recognition": {"accuracy": 0.9}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(figures))
    return tmp_path


def write(folder: str, **columns: list[Any]) -> None:
    Path(folder).mkdir(parents=True)
    pq.write_table(pa.table(columns), f"{folder}/part-00000.parquet")


def lock(**commands: str) -> dict[str, Any]:
    """What dvc.lock says of stages with these command lines, and write it."""
    stages = {name: {"cmd": f"python -m bootstrap.submit {command}"} for name, command in commands.items()}
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": {**stages, "runtime": {"cmd": "python -m bootstrap.runtime"}}}))
    return stages


def end_run(**commands: str) -> dict[str, Any]:
    """Let a run end that has these stages in its dvc.lock; its record, the stages by name."""
    lock(**commands)
    runtime.main(PLACES)
    record = json.loads(Path("reports/runtime.json").read_text())
    return record | {"stages": {stage["stage"]: stage for stage in record["stages"]}}


PLACES = ["dvc.lock", "evaluation", "classifier", "report.html", "reports/runtime.json"]
REDUCE = "spark-submit stages/reduce.py in out --k"


def test_images_are_the_rows_of_the_longest_table_of_images() -> None:
    assert runtime.count_images(["in", "out"]) == 4


def test_where_there_is_no_table_images_are_the_files() -> None:
    for name in ("raw/Apple/1.jpg", "raw/Apple/2.jpg", "raw/Plum/1.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert runtime.count_images(["raw"]) == 3


def test_a_stage_that_has_run_is_set_down_as_computed() -> None:
    runtime.record(JOB, HERE)
    (took,) = end_run(reduce=f"{REDUCE} 64")["stages"].values()
    assert (took["is_cached"], took["where"], took["seconds"], took["images"]) == (False, "local", 5.0, 4)


def test_a_stage_that_did_not_run_again_says_so_and_what_it_took() -> None:
    runtime.record(JOB, HERE)
    end_run(reduce=f"{REDUCE} 64")
    took = end_run(reduce=f"{REDUCE} 64")["stages"]["reduce"]
    assert (took["is_cached"], took["seconds"]) == (True, 5.0)


def test_a_stage_taken_from_the_cache_has_what_it_took_when_it_was_computed() -> None:
    runtime.record(JOB, HERE)
    end_run(reduce=f"{REDUCE} 64")
    runtime.record(JOB._replace(flags=["--k", "8"]), HERE | {"seconds": 3.0})
    end_run(reduce=f"{REDUCE} 8")
    took = end_run(reduce=f"{REDUCE} 64")["stages"]["reduce"]
    assert (took["is_cached"], took["seconds"]) == (True, 5.0)


def test_the_note_of_a_run_that_was_cut_off_is_not_taken_for_another_command() -> None:
    runtime.record(JOB._replace(flags=["--k", "8"]), HERE)  # and then the run was killed
    took = end_run(reduce=f"{REDUCE} 64")["stages"]["reduce"]
    assert (took["is_cached"], "seconds" in took) == (True, False)


def test_in_a_clone_the_committed_record_tells_what_a_stage_took(folder: Path) -> None:
    runtime.record(JOB, HERE)
    end_run(reduce=f"{REDUCE} 64")
    shutil.rmtree(folder / ".dvc/tmp")  # which no clone has
    assert end_run(reduce=f"{REDUCE} 64")["stages"]["reduce"]["seconds"] == 5.0


def test_the_committed_record_of_another_result_tells_nothing(folder: Path) -> None:
    runtime.record(JOB, HERE)
    end_run(reduce=f"{REDUCE} 64")
    shutil.rmtree(folder / ".dvc/tmp")
    assert "seconds" not in end_run(reduce=f"{REDUCE} 8")["stages"]["reduce"]


def test_the_sums_are_of_all_stages_computed_or_not() -> None:
    for name in ("covariance", "reduce"):
        runtime.record(JOB._replace(stage=f"stages/{name}.py"), HERE)
    commands = {name: f"spark-submit stages/{name}.py in out --k 64" for name in ("covariance", "reduce")}
    end_run(**commands)
    runtime.record(JOB, HERE | {"seconds": 7.0})
    assert end_run(**commands)["run"] == {"stages": 2, "stages_cached": 1, "seconds": 12.0}


def test_outside_of_a_repository_nothing_is_set_down(folder: Path) -> None:
    (folder / ".dvc").rmdir()
    runtime.record(JOB, HERE)
    assert not (folder / ".dvc").exists()


def test_start_up_is_apart_from_the_work() -> None:
    for name in ("covariance", "reduce"):
        runtime.record(JOB._replace(stage=f"stages/{name}.py"), EMR)
    commands = {name: f"spark-submit stages/{name}.py in out --k 64" for name in ("covariance", "reduce")}
    assert end_run(**commands)["run"] == {
        "stages": 2,
        "stages_cached": 0,
        "seconds": 120.0,
        "node_hours": 0.1,
        "euros": 0.04,
        "euros_per_1000_images": 10.0,  # each stage 0.02 for four images
        "seconds_waited": 1000.0,
        "euros_waited": 0.2,
    }


def test_an_estimate_grows_with_images_and_shrinks_with_cores() -> None:
    runtime.record(JOB, EMR)  # 60 s for 4 images on 16 cores; now 2 images
    end_run(reduce=f"{REDUCE} 64")
    assert runtime.estimate(JOB, cores=8) == pytest.approx(60.0)


def test_without_an_earlier_run_there_is_no_estimate() -> None:
    assert runtime.estimate(JOB, cores=8) is None


def test_a_run_ends_with_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    end_run(reduce=f"{REDUCE} 64")
    said = "1,008 images, k = 64, nearest neighbour 93.2% (all features 93.3%), recognised 90.0%"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PAR1 no table PAR1"])
def test_a_file_that_is_named_as_a_table_and_is_none_is_counted_as_a_file(content: bytes) -> None:
    Path("photographs/Kiwi").mkdir(parents=True)
    Path("photographs/labels.parquet").write_bytes(content)
    Path("photographs/Kiwi/1.jpg").touch()
    assert runtime.count_images(["photographs"]) == 2


@pytest.mark.parametrize(
    "damaged", ["", '{"run": {"sta', "[]", '{"stages": 3}', "null", '{"stages": [{"stbge": "reduce"}]}']
)
def test_a_damaged_record_is_as_none(damaged: str) -> None:
    Path("reports").mkdir()
    Path("reports/runtime.json").write_text(damaged)
    assert runtime.read_record() == {}


@pytest.mark.parametrize("damaged", [b"", b'{"words": ["spa', b"null", b"3", b"\xff", b'{"worts": ["spark-submit"]}'])
@pytest.mark.parametrize("place", [".dvc/tmp/took/reduce.json", ".dvc/tmp/runtime/reduce-*.json"])
def test_a_damaged_note_is_as_none(place: str, damaged: bytes, folder: Path) -> None:
    runtime.record(JOB, HERE)
    if "runtime" in place:
        end_run(reduce=f"{REDUCE} 64")
        Path("reports/runtime.json").unlink()
    (note,) = folder.glob(place)
    note.write_bytes(damaged)
    assert "seconds" not in end_run(reduce=f"{REDUCE} 64")["stages"]["reduce"]


def fail_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_text(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_text)


def test_a_note_that_cannot_be_written_fails_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_write(monkeypatch)
    runtime.record(JOB, HERE)


def test_a_record_that_cannot_be_written_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.record(JOB, HERE)
    lock(reduce=f"{REDUCE} 64")
    fail_to_write(monkeypatch)
    with pytest.raises(SystemExit, match=r"runtime\.json cannot be written: .*No space left on device\. If the disk"):
        runtime.main(PLACES)
    assert list(Path("reports").glob("*")) == []


def test_a_run_without_accuracies_ends_with_the_figures_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    Path("evaluation/metrics.json").write_text(json.dumps(EVALUATION | {"nearest_neighbour": None}))
    Path("classifier/metrics.json").write_text(json.dumps({"recognition": {"images": 0, "labels": 0}}))
    end_run(reduce=f"{REDUCE} 64")
    assert "1,008 images, k = 64; more in evaluation/summary.txt" in capsys.readouterr().out


def test_a_page_of_another_run_is_said_to_be_so(capsys: pytest.CaptureFixture[str]) -> None:
    Path("report.html").write_text(f'<meta name="run" content="{runtime.identify(lock(reduce=f"{REDUCE} 64"))}">')
    end_run(reduce=f"{REDUCE} 64")
    before = capsys.readouterr().out
    end_run(reduce=f"{REDUCE} 8")
    assert ("another run" in before, "report.html, which is of another run now" in capsys.readouterr().out) == (False, True)


def test_parameters_that_were_changed_while_the_run_was_at_work_end_it_in_one_sentence() -> None:
    stages = {"reduce": {"cmd": f"{REDUCE} 8", "params": {"params.yaml": {"reduce": {"k": 8}}}}}
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    with pytest.raises(SystemExit, match=r"params\.yaml was changed while this run was at work: reduce\."):
        runtime.main(PLACES)
    assert not Path("reports").exists()
