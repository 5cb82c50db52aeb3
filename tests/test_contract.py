"""dvc.yaml, params.yaml and the stages agree with one another."""

import ast
import hashlib
import importlib
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
LOCK = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
STAGES = sorted(PIPELINE)
SPARK_STAGES = ["ingest", "featurize", "covariance", "reduce"]


def command(stage: str) -> list[str]:
    """The words of a stage's command, from the name of its file on, with its section of params.yaml as one word."""
    words = shlex.split(PIPELINE[stage]["cmd"])
    return words[words.index(f"stages/{stage}.py") :]


def flags(section: dict[str, Any]) -> list[str]:
    """What DVC makes of a section."""
    words = []
    for key, value in section.items():
        words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_takes_its_section_and_nothing_else(stage: str) -> None:
    module = importlib.import_module(f"stages.{stage}")
    _, *places, _ = command(stage)
    args = vars(module.parse_args(places + flags(PARAMS[stage])))
    n_places = len(args) - len(PARAMS[stage])
    assert (set(PARAMS[stage]) <= set(args), n_places) == (True, len(places))


@pytest.mark.parametrize("stage", STAGES)
def test_no_flag_has_a_default(stage: str) -> None:
    module = importlib.import_module(f"stages.{stage}")
    _, *places, _ = command(stage)
    for key in PARAMS[stage]:
        others = {name: value for name, value in PARAMS[stage].items() if name != key}
        with pytest.raises(SystemExit):
            module.parse_args(places + flags(others))


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_ends_with_the_section_of_the_stage(stage: str) -> None:
    assert (command(stage)[-1], PIPELINE[stage]["params"]) == (f"${{{stage}}}", [stage])


@pytest.mark.parametrize("stage", sorted({*STAGES} - {"drift"}))
def test_places_are_deps_and_the_last_is_the_out(stage: str) -> None:
    file, *inputs, output, _ = command(stage)
    assert (sorted(PIPELINE[stage]["deps"]), PIPELINE[stage]["outs"]) == (sorted([file, *inputs]), [output])


def test_drift_depends_on_todays_features_and_writes_for_git() -> None:
    # data/reduced is read as it was in an earlier commit: another k today changes nothing.
    places = command("drift")
    assert (sorted(PIPELINE["drift"]["deps"]), "outs" in PIPELINE["drift"]) == (
        ["data/backbone", "data/features", "stages/drift.py"],
        False,
    )
    assert places[3:5] == ["data/reduced", "reports/drift.json"]


@pytest.mark.parametrize("stage", SPARK_STAGES)
def test_spark_stages_run_through_submit(stage: str) -> None:
    assert PIPELINE[stage]["cmd"].startswith(f"python bootstrap/submit.py stages/{stage}.py ")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_nothing_of_the_repository(stage: str) -> None:
    tree = ast.parse((ROOT / f"stages/{stage}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {path.stem for folder in ("stages", "bootstrap", "tests") for path in (ROOT / folder).glob("*.py")}
    assert {name.split(".")[0] for name in imported} & {*own, "stages", "bootstrap", "tests", ""} == set()


def test_no_parameter_is_null() -> None:
    # DVC would hand it over as the word None.
    assert [key for section in PARAMS.values() if isinstance(section, dict) for key in section if section[key] is None] == []


@pytest.mark.parametrize("stage", STAGES)
def test_the_lock_is_of_this_code_and_these_parameters(stage: str) -> None:
    # A change of a stage goes with the dvc.lock that it leads to.
    code = {dep["path"]: dep["md5"] for dep in LOCK[stage]["deps"]}[f"stages/{stage}.py"]
    parameters = LOCK[stage]["params"]["params.yaml"][stage]
    assert (code, parameters) == (hashlib.md5(Path(ROOT, "stages", f"{stage}.py").read_bytes()).hexdigest(), PARAMS[stage])
