"""parameters.py: each number of params.yaml has its bounds, and a wrong one ends a run before it begins."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.parsing import interpolate
from dvc.utils.hydra import apply_overrides

from bootstrap import parameters, submit
from tests.helpers import PARAMS, PIPELINE, ROOT

NUMBERS = [
    (stage, name)
    for stage, section in PARAMS.items()
    if isinstance(section, dict)
    for name, value in section.items()
    if isinstance(value, int | float) or (value and isinstance(value, list) and all(isinstance(each, int) for each in value))
]
# 0 is a seed like others; nothing refused, grouped, lost or shrunk may be what somebody wants.
WRONG = [
    (stage, name, value)
    for stage, name in NUMBERS
    for value in ("0", "-1", "much", "nan", "1" + 30 * "0")
    if value != "0" or name not in ("seed", "max_quarantined", "near", "margin", "max_loss", "shrinkage")
]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pipeline and its stages, whose dvc.lock has accepted params.yaml as it is."""
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())
    lock["stages"]["drift"] = {"params": {"params.yaml": {"drift": PARAMS["drift"]}}}  # which a first run adds
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(repository: Path, stage: str, **values: Any) -> None:
    params = yaml.safe_load((repository / "params.yaml").read_text())
    params[stage] |= values
    (repository / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.mark.parametrize(("stage", "name", "value"), WRONG)
def test_a_number_beyond_its_bounds_is_refused_by_its_name(
    stage: str, name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(PIPELINE[stage]["cmd"])
    places = words[words.index(f"stages/{stage}.py") + 1 : -1]
    with pytest.raises(SystemExit):
        importlib.import_module(f"stages.{stage}").parse_args([*places, *parameters.flags(PARAMS[stage] | {name: value})])
    assert re.fullmatch(rf"\S+: error: argument --{name}: .*\n", capsys.readouterr().err)


def test_a_wrong_number_of_a_later_stage_ends_the_first_stage_before_it_begins(repository: Path) -> None:
    change(repository, "evaluate", curve=[2, 0])
    with pytest.raises(SystemExit, match=r"^params\.yaml: evaluate: argument --curve: 0 is not between 1 and [\d,]+$"):
        submit.main(["python", "stages/sample.py", "data/sample", *parameters.flags(PARAMS["sample"])])
    assert not (repository / "data").exists()


def test_each_wrong_section_has_its_line(repository: Path) -> None:
    change(repository, "split", near=-1)
    change(repository, "reduce", k=1.0)
    with pytest.raises(SystemExit) as ended:
        parameters.check("sample")
    assert [line.split(": ")[1] for line in str(ended.value).splitlines()] == ["split", "reduce"]


def test_a_parameter_that_no_stage_knows_is_refused(repository: Path) -> None:
    change(repository, "drift", until="HEAD")
    with pytest.raises(SystemExit, match="drift: unrecognized arguments: --until HEAD"):
        parameters.check("sample")


def test_what_the_lock_has_accepted_is_not_parsed_again(repository: Path) -> None:
    (repository / "stages").unlink()  # nor could it be
    parameters.check("sample")


def test_what_a_stage_has_accepted_is_not_parsed_again(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(repository, "split", near=0.4)
    change(repository, "reduce", k=16)
    parameters.check("sample")
    monkeypatch.setattr(parameters, "PARSE", "raise SystemExit('parsed')")
    parameters.check("sample")
    change(repository, "reduce", k=17)
    with pytest.raises(SystemExit, match=r"^params\.yaml: reduce: parsed$"):
        parameters.check("sample")


def test_a_stage_whose_file_has_changed_parses_again(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "stages").unlink()
    shutil.copytree(ROOT / "stages", repository / "stages")
    change(repository, "reduce", k=16)
    parameters.check("sample")
    with (repository / "stages/reduce.py").open("a") as file:
        file.write("# its bounds may be others now")
    monkeypatch.setattr(parameters, "PARSE", "raise SystemExit('parsed')")
    with pytest.raises(SystemExit, match=r"^params\.yaml: reduce: parsed$"):
        parameters.check("sample")


def test_what_is_refused_is_refused_again(repository: Path) -> None:
    change(repository, "reduce", k=1.0)
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"^params\.yaml: reduce: "):
            parameters.check("sample")


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (
            "data/mine",
            "images: there is no folder data/mine. In a queue, an experiment has only what git or DVC tracks: see `dvc add`",
        ),
        (
            "data/their's",
            "images: data/their's is not here, but DVC knows it: `source .venv/bin/activate && "
            "dvc pull 'data/their'\"'\"'s'` fetches it from the remote",
        ),
        ("~/photographs", f"images: DVC does not know what ~ is: write {Path.home()}/photographs"),
        (None, "images: None is no folder"),
    ],
)
def test_a_folder_of_images_that_is_not_there_is_said_with_what_to_do(
    images: str | None, said: str, repository: Path
) -> None:
    (repository / "data").mkdir()
    (repository / "data/their's.dvc").touch()
    (repository / "params.yaml").write_text(yaml.safe_dump({"images": images}))
    assert parameters.what_is_wrong_with_images() == [said]


def test_the_folder_of_images_is_checked_before_a_stage_begins(repository: Path) -> None:
    (repository / "params.yaml").write_text("images: data/mine")
    with pytest.raises(SystemExit, match=r"^params\.yaml: images: there is no folder data/mine\."):
        parameters.check("sample")


def test_a_stage_that_does_not_read_the_folder_of_images_goes_on_without_it_where_dvc_knows_it(repository: Path) -> None:
    # As in a clone where `dvc exp run --pull --allow-missing` has brought what `reduce` reads.
    params = yaml.safe_load((repository / "params.yaml").read_text())
    (repository / "params.yaml").write_text(yaml.safe_dump(params | {"images": "data/mine"}))
    (repository / "data").mkdir()
    (repository / "data/mine.dvc").touch()
    parameters.check("reduce", ["data/features", "data/covariance"])
    with pytest.raises(SystemExit, match="data/mine is not here, but DVC knows it"):
        parameters.check("ingest", ["@images"])


@pytest.mark.parametrize("name", ["my photos", "R&D", "fruits (1)", "l'été", '"best"', "$HOME", "~", "a;b", "100 %"])
def test_a_folder_of_images_of_any_name_reaches_the_stage(name: str, repository: Path) -> None:
    (repository / "params.yaml").write_text(yaml.safe_dump({"images": f"data/{name}"}))
    assert parameters.look_up(["@images", "data/ingested"]) == [f"data/{name}", "data/ingested"]
    assert PIPELINE["ingest"]["deps"][1] == "${images}"  # which no shell reads
    assert [stage for stage in PIPELINE if "${images}" in str(PIPELINE[stage]["cmd"])] == []


def test_parameters_that_were_changed_while_a_stage_was_at_work_end_it_in_one_sentence(repository: Path) -> None:
    job = submit.parse(["python", "stages/sample.py", "in", "data/sample", *parameters.flags(PARAMS["sample"])])
    parameters.check_unchanged(job, {"DVC_STAGE": "sample"})
    change(repository, "sample", frames=7)
    parameters.check_unchanged(job, {})  # started by hand, with whatever parameters
    with pytest.raises(SystemExit, match=r"sample has `--frames 36 .*`, and now `--frames 7 .*` is there"):
        parameters.check_unchanged(job, {"DVC_STAGE": "sample"})


def test_an_experiment_changes_the_line_of_its_parameter_and_loses_no_comment(repository: Path) -> None:
    # DVC writes the file again, in its own style, and loses a comment that follows a list.
    before = (repository / "params.yaml").read_text()
    apply_overrides(repository / "params.yaml", ["reduce.k=32"])
    assert (repository / "params.yaml").read_text() == before.replace("\n  k: 64\n", "\n  k: 32\n")


def test_flags_are_what_dvc_makes_of_a_section() -> None:
    section = {"k": 0.95, "names": [2, 4], "pattern": "^a b$", "is_on": True, "is_off": False, "none": []}
    assert parameters.flags(section) == shlex.split(interpolate.to_str(section))


@pytest.mark.parametrize(("images", "status"), [("data/sample", 0), ("data/nowhere", 1)])
def test_make_run_goes_on_only_if_the_folder_of_images_can_be_had(images: str, status: int, repository: Path) -> None:
    params = yaml.safe_load((repository / "params.yaml").read_text())
    (repository / "params.yaml").write_text(yaml.safe_dump(params | {"images": images}))
    done = subprocess.run(
        [sys.executable, "-m", "bootstrap.parameters"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, bool(done.stderr)) == (status, "", bool(status))
