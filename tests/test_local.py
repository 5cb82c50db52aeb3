"""local.py: what an earlier run has computed is found in DVC's cache, by DVC's own configuration."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from bootstrap import local
from bootstrap.job import Job
from tests.helpers import run

FEATURIZE = Job("spark-submit", "stages/featurize.py", ["data/ingested", "data/backbone"], "data/features", [])


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of DVC's whose dvc.lock has an output of featurize, which DVC has deleted as before each run."""
    folder = tmp_path_factory.mktemp("team") / "repository"
    folder.mkdir()
    write = (
        "mkdir -p data/features && echo name > data/features/_fingerprint && echo rows > data/features/part-00000.parquet"
    )
    run("dvc", "init", "--quiet", "--no-scm", cwd=folder)
    run("dvc", "config", "--local", "cache.dir", "../elsewhere", cwd=folder)
    run("dvc", "stage", "add", "--quiet", "--run", "--name", "featurize", "--outs", "data/features", write, cwd=folder)
    shutil.rmtree(folder / "data/features")
    return folder


def linked(folder: Path, job: Job = FEATURIZE) -> dict[str, str] | None:
    folder.mkdir()
    return {path.name: path.read_text() for path in folder.iterdir()} if local.link_earlier(job, str(folder)) else None


def test_the_last_output_of_featurize_is_found_in_dvcs_cache(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(earlier)
    assert linked(tmp_path / "links") == {"_fingerprint": "name\n", "part-00000.parquet": "rows\n"}


@pytest.mark.parametrize("other", [{"output": "data/other"}, {"stage": "stages/reduce.py"}], ids=["output", "stage"])
def test_another_output_and_another_stage_have_none(
    other: dict[str, Any], earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(earlier)
    assert linked(tmp_path / "links", FEATURIZE._replace(**other)) is None


@pytest.mark.parametrize("harm", ["no cache", "no listing", "garbage", "no lock"])
def test_what_dvcs_cache_lacks_is_no_earlier_output(
    harm: str, earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("cp", "-a", str(earlier.parent), str(tmp_path / "team"), cwd=tmp_path)
    here = tmp_path / "team/repository"
    monkeypatch.chdir(here)
    (listing,) = (tmp_path / "team/elsewhere").rglob("*.dir")
    match harm:
        case "no cache":
            shutil.rmtree(tmp_path / "team/elsewhere")
        case "no listing":
            listing.unlink()
        case "garbage":
            listing.chmod(0o600)
            listing.write_text("[")
        case "no lock":
            (here / "dvc.lock").unlink()
    assert linked(tmp_path / "links") is None


def test_a_file_that_dvcs_cache_lacks_is_passed_over(earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("cp", "-a", str(earlier.parent), str(tmp_path / "team"), cwd=tmp_path)
    (rows,) = (path for path in (tmp_path / "team/elsewhere").rglob("*") if path.is_file() and path.read_text() == "rows\n")
    rows.unlink()
    monkeypatch.chdir(tmp_path / "team/repository")
    assert linked(tmp_path / "links") == {"_fingerprint": "name\n"}


def test_workers_of_other_machines_are_told_of_no_links(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(earlier)
    monkeypatch.setenv("SPARK_MASTER", "spark://elsewhere:7077")
    assert linked(tmp_path / "links") is None


def test_an_output_whose_versions_a_remote_keeps_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text("stages: {featurize: {outs: [{path: data/features, files: [{relpath: a, md5: b}]}]}}")
    assert linked(tmp_path / "links") is None


def test_the_stage_is_told_of_an_earlier_output_only_where_there_is_one() -> None:
    assert "spark.featurize.earlier=/links" in local.spark_submit(FEATURIZE, {}, "/links")
    assert "spark.featurize.earlier" not in " ".join(local.spark_submit(FEATURIZE, {}))
