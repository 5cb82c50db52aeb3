"""tests/cloud.py, the test in a real account, against AWS as tests/aws.py plays it: it must leave nothing that costs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import NoCredentialsError

from bootstrap.aws import cloud, cost
from tests import cloud as trial
from tests.aws import Aws
from tests.helpers import ROOT, SPARK_STAGES, run

NAME, BUCKET = "fruits-test", "fruits-test-bucket"


@pytest.fixture
def there(played: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Aws:
    """AWS with the stack and the cluster of somebody's own project."""
    played.lend_keys(monkeypatch, empty=tmp_path / "empty")
    played.fresh()
    played.is_paused = False
    monkeypatch.setattr(trial, "SECONDS", 0.1)
    return played


def set_up(there: Aws) -> None:
    """What `infrastructure up` and `wheelhouse` make, as far as is needed here."""
    template = {
        "Resources": {
            "Bucket": {"Type": "AWS::S3::Bucket", "DeletionPolicy": "Retain", "Properties": {"BucketName": BUCKET}}
        },
        "Outputs": {"Bucket": {"Value": BUCKET}},
    }
    there.client("cloudformation").create_stack(StackName=NAME, TemplateBody=json.dumps(template))


def clusters(there: Aws) -> dict[str, str]:
    return {each["Name"]: each["Status"]["State"] for each in there.client("emr").list_clusters()["Clusters"]}


@pytest.fixture
def commands(there: Aws, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands, of which only those are carried out that make something, and delete it."""
    made: list[str] = []

    def call(*command: str, cwd: Path, **environment: str) -> None:
        target = [f"SPARK_TARGET={each}" for each in environment.values()]
        words = " ".join([*target, *(command[2:] if command[1] == "-m" else command)])
        made.append(words)
        if words == "bootstrap.aws.infrastructure up":
            set_up(there)
        elif words == "bootstrap.aws.cluster up":
            there.client("emr").run_job_flow(Name=NAME, Instances={"KeepJobFlowAliveWhenNoSteps": True})
            there.client("s3").put_object(Bucket=BUCKET, Key="staging/x", Body=b"x")
        elif words == "bootstrap.aws.cluster down --yes":
            emr = there.client("emr")
            emr.terminate_job_flows(JobFlowIds=[one for one in [cloud.find_cluster(emr, NAME)] if one])
        elif words == "bootstrap.aws.infrastructure down --yes":
            there.client("cloudformation").delete_stack(StackName=NAME)

    monkeypatch.setattr(trial, "call", call)
    monkeypatch.setattr(trial, "prepare", lambda clone, settings: clone.mkdir() or (clone / "dvc.lock").write_text("a: 1"))
    return made


def assert_only_the_projects_own_is_left(there: Aws) -> None:
    assert [each["StackName"] for each in there.client("cloudformation").describe_stacks()["Stacks"]] == ["fruits"]
    assert [each["Name"] for each in there.client("s3").list_buckets()["Buckets"]] == ["fruits-bucket"]
    assert [name for name, state in clusters(there).items() if state in cloud.UP] == ["fruits"]


def test_it_says_what_it_costs_and_makes_nothing_unless_told(
    commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda question: "")
    with pytest.raises(SystemExit, match="nothing made"):
        trial.main([])
    prices = cost.load()
    # A primary node, of which EMR may take the larger type, and one executor.
    dearest = cost.of_node("m6i.2xlarge", "ON_DEMAND", prices) + cost.of_node("m6i.xlarge", "ON_DEMAND", prices)
    assert f"costs {dearest:.2f} EUR an hour at most" in capsys.readouterr().out
    assert commands == []


def test_without_credentials_it_asks_nothing_and_runs_nothing(
    commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    with pytest.raises(NoCredentialsError):
        trial.main(["--yes"])
    assert (commands, capsys.readouterr().out) == ([], "")


def test_a_quota_that_is_too_small_is_told_before_anything_is_made(there: Aws, commands: list[str]) -> None:
    there.quotas["L-34B43A08"] = 0
    with pytest.raises(SystemExit, match="All Standard Spot Instance Requests: 4 needed, 0 allowed"):
        trial.main(["--yes"])
    assert commands == []


def test_it_goes_the_whole_path_and_deletes_all(there: Aws, commands: list[str]) -> None:
    assert trial.main(["--yes"]) == 0
    path = [f"bootstrap.aws.{each}" for each in ("infrastructure up", "wheelhouse", "check", "cluster up")]
    assert [each for each in commands if each in path] == path
    assert "SPARK_TARGET=emr dvc repro" in commands
    assert_only_the_projects_own_is_left(there)


@pytest.mark.parametrize(
    "failing",
    ["bootstrap.aws.infrastructure up", "bootstrap.aws.check", "bootstrap.aws.cluster up", "SPARK_TARGET=emr dvc repro"],
)
@pytest.mark.parametrize("error", [SystemExit("refused"), KeyboardInterrupt()], ids=["refused", "Ctrl-C"])
def test_after_a_failure_it_deletes_all(
    failing: str, error: BaseException, there: Aws, commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out: Any = trial.call

    def call(*command: str, cwd: Path, **environment: str) -> None:
        carry_out(*command, cwd=cwd, **environment)
        if commands[-1] == failing:
            raise error

    monkeypatch.setattr(trial, "call", call)
    with pytest.raises(type(error)):
        trial.main(["--yes"])
    assert_only_the_projects_own_is_left(there)


def test_what_cannot_be_deleted_is_named_and_the_rest_is_deleted(
    there: Aws, commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise SystemExit("no permission")

    monkeypatch.setattr(trial, "end_cluster", refuse)
    assert trial.main(["--yes"]) == 1
    assert "NOT DELETED, and perhaps paid for: cluster fruits-test: no permission" in capsys.readouterr().out
    assert [each["Name"] for each in there.client("s3").list_buckets()["Buckets"]] == ["fruits-bucket"]


def test_another_lock_than_here_is_a_failure(there: Aws, commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    carry_out: Any = trial.call

    def call(*command: str, cwd: Path, **environment: str) -> None:
        carry_out(*command, cwd=cwd, **environment)
        if commands[-1].startswith("SPARK_TARGET=emr"):
            (cwd / "dvc.lock").write_text("a: 2")

    monkeypatch.setattr(trial, "call", call)
    assert trial.main(["--yes"]) == 1
    assert "reports.compare HEAD" in commands
    assert_only_the_projects_own_is_left(there)


@pytest.mark.slow
def test_with_real_stages_it_ends_with_the_lock_of_the_run_here(
    there: Aws, run_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the stack, the wheelhouse and the check is done as in a real account; these have tests of their own.

    The run here comes from the cache of the one that many tests share.
    """
    monkeypatch.setattr(trial, "FRAMES", 4)
    commit = tmp_path / "commit"
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (commit / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, commit / name)
    run("git", "init", "--quiet", cwd=commit)
    run("make", "identity", cwd=commit)
    run("git", "add", "--all", cwd=commit)
    run("git", "commit", "--quiet", "-m", "First", cwd=commit)
    monkeypatch.setattr(trial, "ROOT", commit)
    carry_out = trial.call

    def call(*command: str, cwd: Path, **environment: str) -> None:
        if command[2:] == ("bootstrap.aws.infrastructure", "up"):
            set_up(there)
        elif command[2:] == ("bootstrap.aws.infrastructure", "down", "--yes"):
            there.client("cloudformation").delete_stack(StackName=NAME)
        elif command[2:] == ("bootstrap.aws.cluster", "up"):
            instances = {"KeepJobFlowAliveWhenNoSteps": True}
            there.client("emr").run_job_flow(Name=NAME, LogUri=f"s3://{BUCKET}/logs/", Instances=instances)
        elif command[2:] not in {("bootstrap.aws.wheelhouse",), ("bootstrap.aws.check",)}:
            if environment == {"SPARK_TARGET": "local"}:
                shutil.copytree(run_once / ".dvc/cache", cwd / ".dvc/cache")
            carry_out(*command, cwd=cwd, **environment)

    monkeypatch.setattr(trial, "call", call)
    monkeypatch.setenv("SPARK_MASTER", "local[2]")
    monkeypatch.setenv("SPARK_DRIVER_MEMORY", "1g")
    assert trial.main(["--yes"]) == 0
    assert len(there.commands) == len(SPARK_STAGES)
    assert_only_the_projects_own_is_left(there)
