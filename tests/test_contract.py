"""dvc.yaml, params.yaml and the stages agree with one another."""

import ast
import hashlib
import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bootstrap.parameters import flags
from tests.helpers import PARAMS, PIPELINE, ROOT, SPARK_STAGES

LOCK = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
STAGES = sorted({*PIPELINE} - {"runtime"})  # which describes a run, and is no file of stages/
WITH_PARAMETERS = [stage for stage in STAGES if stage in PARAMS]


def command(stage: str) -> list[str]:
    """The words of a stage's command, from the name of its file on, with its section of params.yaml, if any, as one word."""
    words = shlex.split(PIPELINE[stage]["cmd"])
    return ["${images}" if word == "@images" else word for word in words[words.index(f"stages/{stage}.py") :]]


def places_of(stage: str) -> list[str]:
    return [word for word in command(stage)[1:] if word != f"${{{stage}}}"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_its_section_and_nothing_else(stage: str) -> None:
    module = importlib.import_module(f"stages.{stage}")
    places, section = places_of(stage), PARAMS.get(stage, {})
    args = vars(module.parse_args(places + flags(section)))
    assert (set(section) <= set(args), len(args) - len(section)) == (True, len(places))


@pytest.mark.parametrize("stage", WITH_PARAMETERS)
def test_no_flag_has_a_default(stage: str) -> None:
    module = importlib.import_module(f"stages.{stage}")
    places = places_of(stage)
    for key in (key for key, value in PARAMS[stage].items() if value != []):  # of an empty list, DVC makes no flag
        others = {name: value for name, value in PARAMS[stage].items() if name != key}
        with pytest.raises(SystemExit):
            module.parse_args(places + flags(others))


@pytest.mark.parametrize("stage", WITH_PARAMETERS)
def test_the_command_ends_with_the_section_of_the_stage(stage: str) -> None:
    assert (command(stage)[-1], PIPELINE[stage]["params"]) == (f"${{{stage}}}", [stage])


def test_a_stage_without_a_section_takes_no_parameter() -> None:
    stages = {*STAGES} - {*WITH_PARAMETERS}
    assert (stages, [stage for stage in stages if "params" in PIPELINE[stage]]) == ({"covariance"}, [])


@pytest.mark.parametrize("stage", sorted({*STAGES} - {"drift"}))
def test_places_are_deps_and_the_last_is_the_out(stage: str) -> None:
    file, (*inputs, output) = command(stage)[0], places_of(stage)
    shared = own_imports(ROOT / file)
    assert (sorted(PIPELINE[stage]["deps"]), PIPELINE[stage]["outs"]) == (sorted([file, *inputs, *shared]), [output])


def test_drift_depends_on_todays_features_and_writes_for_git() -> None:
    # data/reduced is read as it was in an earlier commit: another k today changes nothing.
    places = command("drift")
    assert (sorted(PIPELINE["drift"]["deps"]), "outs" in PIPELINE["drift"]) == (
        ["data/backbone", "data/features", "reports/suspects", "stages/analysis.py", "stages/drift.py"],
        False,
    )
    assert places[4:6] == ["data/reduced", "reports/drift.json"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_goes_through_the_door_and_says_what_runs_it(stage: str) -> None:
    program = "spark-submit" if stage in SPARK_STAGES else "python"
    assert PIPELINE[stage]["cmd"].startswith(f"python -m bootstrap.submit {program} stages/{stage}.py ")


def own_imports(file: Path) -> set[str]:
    """The files of the repository that a file imports."""
    tree = ast.parse(file.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        assert node.level == 0, f"{file} imports by a relative name"
        names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    paths = {f"{name.replace('.', '/')}.py" for name in names}
    own = {path.stem for folder in ("stages", "bootstrap") for path in (ROOT / folder).glob("*.py")}
    assert names & own == set(), f"{file} imports by a bare name"
    return {path for path in paths if (ROOT / path).exists()}


@pytest.mark.parametrize("stage", SPARK_STAGES)
def test_a_stage_that_ships_imports_nothing_of_the_repository(stage: str) -> None:
    assert own_imports(ROOT / f"stages/{stage}.py") == set()


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_imports_of_the_repository_is_among_its_deps(stage: str) -> None:
    assert own_imports(ROOT / f"stages/{stage}.py") <= {*PIPELINE[stage]["deps"]}


def test_the_rooms_of_bootstrap_import_from_the_top_down_only() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_record_of_a_run_depends_on_all_that_can_change() -> None:
    # So that it runs last in each run that computes anything, or takes anything from the cache.
    outs = {out for stage in STAGES for out in PIPELINE[stage].get("outs", [])} - {"data/sample"}
    assert {*PIPELINE["runtime"]["deps"]} == {"stages", *outs}
    assert PIPELINE["runtime"]["params"] == ["images", *(stage for stage in PIPELINE if stage in PARAMS)]


def test_no_parameter_is_null() -> None:
    # DVC would hand it over as the word None.
    assert [key for section in PARAMS.values() if isinstance(section, dict) for key in section if section[key] is None] == []


def test_the_lock_has_no_stage_that_describes_a_run() -> None:
    # DVC would skip it in a fresh clone on the same kind of processor, and the run would leave no record.
    assert {*PIPELINE} - {*LOCK} == {stage for stage in PIPELINE if "outs" not in PIPELINE[stage]}


@pytest.mark.parametrize("stage", sorted(LOCK))
def test_the_lock_is_of_this_code_and_these_parameters(stage: str) -> None:
    # A change of a stage goes with the dvc.lock that it leads to.
    code = {dep["path"]: dep["md5"] for dep in LOCK[stage]["deps"]}[f"stages/{stage}.py"]
    parameters = LOCK[stage].get("params", {}).get("params.yaml", {}).get(stage)
    now = hashlib.md5(Path(ROOT, "stages", f"{stage}.py").read_bytes()).hexdigest(), PARAMS.get(stage)
    assert (code, parameters) == now
