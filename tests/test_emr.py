"""emr.py against AWS as tests/aws.py plays it: what is sent, what comes back, and how each way to fail ends."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import EndpointConnectionError
from moto.emr.exceptions import ValidationException
from moto.emr.responses import ElasticMapReduceResponse

from bootstrap import remote, submit
from bootstrap.aws import bucket, cloud, emr, serverless
from tests import iam
from tests.aws import BUCKET, KEY_OF_AWS, REGION, ROLE, SECRET, Aws, keys
from tests.helpers import ROOT, SPARK_STAGES, forget, run

SERVICES: dict[str, Any] = {"emr": emr.Cluster, "emr-serverless": serverless.Application}
TARGETS = tuple(SERVICES)

# A stage without Spark: it writes a table as Spark does, then does what its flag says.
STAGE = """
import os, sys, time
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
source, output, _, what = sys.argv[1:]
source, output = (Path(os.environ["S3"], place.removeprefix("s3://")) for place in (source, output))
rows = sorted(path.read_text() for path in source.glob("*.txt")) or pq.read_table(source / "first")["image_id"].to_pylist()
(output / "first").mkdir(parents=True)
pq.write_table(pa.table({"image_id": rows}), output / "first/part-00000-5c4b.c000.snappy.parquet")
(output / "first/_SUCCESS").touch()
print(f"stage: {len(rows)} rows", flush=True)
if what == "fail":
    print("26/11/25 03:51:04 WARN Client: chatter of Spark", file=sys.stderr)
    raise ValueError("3 of 7 are not finite")
if what == "hang":
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever starts stages: each call of theirs is one that LauncherPolicy allows, but for other buckets than ours."""
    made: list[iam.Call] = []
    iam.record(monkeypatch, made, but_by=KEY_OF_AWS)
    yield
    policy = iam.policy("LauncherPolicy", iam.values(BUCKET, ServerlessRole=ROLE))
    wanted = {each for call in made for each in iam.needed(call, roles={})}
    ours = [each for each in wanted if not each.action.startswith("s3:") or f":::{BUCKET}" in each.resource]
    assert [str(each) for each in ours if not iam.is_allowed(each, policy)] == []


@pytest.fixture
def there(played: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Aws:
    """AWS with the stack and a cluster, an empty bucket, and here a folder with a stage and three files for it."""
    played.lend_keys(monkeypatch)
    for module in (remote, bucket, serverless):
        monkeypatch.setattr(module, "SECONDS", 0.05)
    monkeypatch.setattr(remote, "LOG_SECONDS", 0.2)
    monkeypatch.setattr(serverless, "BILL_SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)
    played.fresh()
    played.is_plain, played.is_paused = True, False
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "in").mkdir()
    (tmp_path / ".dvc").mkdir()
    for name in ("a", "b", "c é#%"):
        (tmp_path / f"in/{name}.txt").write_text(name)
    return played


def refusal(code: str, message: str) -> ValidationException:
    error = ValidationException(message)
    error.code = code
    return error


def call(target: str = "emr", what: str = "well", source: str = "in", output: str = "out", dry_run: bool = False) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_TARGET", target)
        return submit.main(["--dry_run"] * dry_run + ["spark-submit", "stage.py", source, output, "--what", what])


def while_it_waits(monkeypatch: pytest.MonkeyPatch, happens: Callable[..., None]) -> None:
    """Let that happen whenever the wait for a run, and no other thread of this process, would sleep."""
    own = SimpleNamespace(monotonic=time.monotonic, strftime=time.strftime, sleep=happens)
    monkeypatch.setattr(remote, "time", own)


@pytest.mark.parametrize("target", TARGETS)
def test_a_stage_that_ends_well_is_published_as_if_it_had_run_here(target: str, there: Aws) -> None:
    assert call(target) == 0
    assert [path.name for path in Path("out/first").iterdir()] == ["part-00000.parquet"]
    assert pq.read_table("out/first")["image_id"].to_pylist() == ["a", "b", "c é#%"]


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_stage_said_is_said_here(target: str, there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    call(target)
    assert "stage: 3 rows\n" in capsys.readouterr().out


def test_each_state_is_told_once(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    call()
    told = [line.partition(" is ")[2] for line in capsys.readouterr().out.splitlines() if " is " in line]
    assert (told[-1], len(told)) == ("COMPLETED", len(set(told)))


def test_an_input_is_sent_once(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    call()
    assert "sending 3 of 3 files of in" in capsys.readouterr().out
    call(output="other")
    assert "sending" not in capsys.readouterr().out


def test_of_a_folder_of_which_some_files_are_there_the_others_are_sent(
    there: Aws, capsys: pytest.CaptureFixture[str]
) -> None:
    call()
    (lost,) = (key for key in keys(there.client("s3"), BUCKET) if key.endswith("/b.txt"))
    there.client("s3").delete_object(Bucket=BUCKET, Key=lost)
    call(output="other")
    assert "sending 1 of 3 files of in" in capsys.readouterr().out


def test_an_output_is_an_input_of_the_next_stage_without_being_sent(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    call()
    capsys.readouterr()
    call(source="out", output="next")
    assert "sending" not in capsys.readouterr().out
    assert pq.read_table("next/first").equals(pq.read_table("out/first"))


def test_nothing_of_a_run_stays_once_it_is_fetched(there: Aws) -> None:
    call()
    assert [key for key in keys(there.client("s3"), BUCKET) if key.startswith("staging/runs/")] == []


def test_the_same_command_after_it_was_fetched_runs_again(there: Aws) -> None:
    call()
    call()
    assert len(there.commands) == 2


def test_a_dry_run_prints_the_command_and_sends_nothing(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    call(dry_run=True)
    said = capsys.readouterr().out
    assert (said.startswith("spark-submit --conf="), "s3://fruits-bucket/staging/stages/" in said) == (True, True)
    assert (keys(there.client("s3"), BUCKET), there.commands) == ([], [])


def test_a_step_is_spark_submit_in_client_mode_with_the_settings_of_every_run(there: Aws) -> None:
    call()
    (step,) = there.clusters()[-1].steps
    settings = remote.spark_defaults() | {"spark.featurize.cache": f"s3://{BUCKET}/feature-cache"}
    conf = [word for item in settings.items() for word in ("--conf", "=".join(item))]
    assert (step.jar, step.args[: 3 + len(conf)]) == (
        "command-runner.jar",
        ["spark-submit", "--deploy-mode", "client", *conf],
    )
    code, source, output, *flags = step.args[3 + len(conf) :]
    assert [
        each.startswith(f"s3://{BUCKET}/staging/{kind}/")
        for each, kind in ((code, "stages"), (source, "inputs"), (output, "runs"))
    ]
    assert flags == ["--what", "well"]


def test_the_feature_cache_can_be_another_prefix_on_s3(there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATURE_CACHE", f"s3://{BUCKET}/cache-of-mine")
    call()
    assert f"spark.featurize.cache=s3://{BUCKET}/cache-of-mine" in there.commands[0]


def test_a_place_on_s3_is_read_where_it_is(there: Aws) -> None:
    there.client("s3").put_object(Bucket=BUCKET, Key="staging/mine/z.txt", Body=b"z")
    call(source=f"s3://{BUCKET}/staging/mine")
    assert pq.read_table("out/first")["image_id"].to_pylist() == ["z"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_stage_that_fails_ends_with_its_traceback_and_where_its_logs_are(
    target: str, there: Aws, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"submit: stage: \S+ is FAILED\. .*\nIts logs: s3://fruits-bucket/logs/\S+/"):
        call(target, "fail")
    said = capsys.readouterr().err
    assert ("Traceback (most" in said, "ValueError: 3 of 7 are not finite" in said, "chatter" in said) == (True, True, False)


def test_a_stage_that_fails_leaves_no_output_but_its_whole_tables_apart(there: Aws) -> None:
    with pytest.raises(SystemExit):
        call(what="fail")
    assert pq.read_table("out.failed/first").num_rows == 3
    assert [name for name in ("out", "out.partial") if Path(name).exists()] == []


def test_a_run_that_failed_is_run_again_on_a_clean_place(there: Aws) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit, match="FAILED"):
            call(what="fail")
    assert len(there.commands) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_a_call_that_was_cut_off_is_taken_up_by_the_same_command(
    target: str, there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut_off(*_: Any) -> None:
        raise EndpointConnectionError(endpoint_url="https://elasticmapreduce.eu-west-3.amazonaws.com")

    with monkeypatch.context() as patch:
        patch.setattr(SERVICES[target], "look", cut_off)
        with pytest.raises(SystemExit, match="Could not connect to the endpoint"):
            call(target)
    assert "goes on; the same command takes it up again" in capsys.readouterr().out
    assert call(target) == 0
    assert ("of an earlier call is" in capsys.readouterr().out, len(there.commands)) == (True, 1)


def test_of_a_step_that_was_added_twice_one_is_cancelled(there: Aws) -> None:
    there.is_paused = True
    service = emr.Cluster(cloud.settings(), {})
    first, second = (service.start("stage 1", {}, ["s3://b/s.py"]) for _ in range(2))
    assert {step.id: step.state for step in there.clusters()[-1].steps} == {first: "CANCELLED", second: "PENDING"}


def test_a_job_run_whose_start_was_not_answered_is_not_started_twice(there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    there.is_paused = True
    service = serverless.Application(cloud.settings(), cloud.outputs(cloud.settings()))
    monkeypatch.setattr(service, "_runs", lambda name: [])  # as asked before the first start was done
    assert service.start("stage 1", {}, ["s3://b/s.py"]) == service.start("stage 1", {}, ["s3://b/s.py"])


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_that_takes_too_long_is_cancelled(target: str, there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMR_HOURS", "0.0003")
    with pytest.raises(SystemExit, match=r"took more than EMR_HOURS=0\.0003 and was cancelled; set EMR_HOURS higher"):
        call(target, "hang")
    runs = [step for cluster in there.clusters() for step in cluster.steps] + there.job_runs()
    assert ([each.state for each in runs], Path("out").exists()) == (["CANCELLED"], False)


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_that_somebody_else_cancels_is_a_failure(target: str, there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(*_: Any) -> None:
        for step in there.clusters()[-1].steps:
            step.state = "CANCELLED"
            there.kill(step.id)
        for job in there.job_runs():
            job.state = "CANCELLED"
            there.kill(job.id)

    while_it_waits(monkeypatch, cancel)
    with pytest.raises(SystemExit, match="is CANCELLED"):
        call(target, "hang")


def test_a_step_lost_with_its_cluster_is_told_with_the_clusters_reason(there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = there.clusters()[-1]

    def lose(*_: Any) -> None:
        cluster.state, cluster.last_state_change_reason = (
            "TERMINATED_WITH_ERRORS",
            "All spot nodes were lost (NO_SLAVE_LEFT)",
        )

    while_it_waits(monkeypatch, lose)
    with pytest.raises(SystemExit, match=r"is lost\. cluster j-\w+ is TERMINATED_WITH_ERRORS All spot nodes were lost"):
        call(what="hang")
    for step in cluster.steps:
        there.kill(step.id)


def test_a_bootstrap_action_that_fails_is_told_with_the_address_of_its_log(
    there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there.is_paused = True
    cluster = there.clusters()[-1]
    cluster.state = "BOOTSTRAPPING"
    log = f"{cluster.id}/node/i-0abc/bootstrap-actions/1/stderr.gz"

    def fail(*_: Any) -> None:
        cluster.state = "TERMINATED_WITH_ERRORS"
        cluster.last_state_change_reason = (
            "On the master instance (i-0abc), bootstrap action 1 returned a non-zero return code"
        )

    there.client("s3").put_object(Bucket=BUCKET, Key=f"logs/{log}", Body=gzip.compress(b"ERROR: no matching hash"))
    while_it_waits(monkeypatch, fail)
    with pytest.raises(SystemExit, match=r"bootstrap action 1 returned .*\nIts logs: \S+/i-0abc/bootstrap-actions/1/"):
        call()
    said = capsys.readouterr()
    assert (f"PENDING; cluster {cluster.id} is BOOTSTRAPPING" in said.out, "ERROR: no matching hash" in said.err) == (
        True,
        True,
    )


def test_a_throttled_request_is_made_again(there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    add = ElasticMapReduceResponse.add_job_flow_steps
    refused: list[int] = []

    def throttled(self: Any) -> Any:
        if len(refused) < 2:
            refused.append(1)
            raise refusal("ThrottlingException", "Rate exceeded")
        return add(self)

    monkeypatch.setattr(ElasticMapReduceResponse, "add_job_flow_steps", throttled)
    assert (call(), len(refused), len(there.commands)) == (0, 2, 1)


def test_expired_credentials_end_it_with_what_to_do(there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    def expired(self: Any) -> Any:
        raise refusal("ExpiredTokenException", "The security token included in the request is expired")

    monkeypatch.setattr(ElasticMapReduceResponse, "describe_step", expired)
    with pytest.raises(SystemExit, match=r"DescribeStep: ExpiredTokenException: .*Log in again .* and repeat the command"):
        call()


def test_a_bucket_that_is_gone_ends_it_before_anything_is_sent(there: Aws) -> None:
    there.client("s3").delete_bucket(Bucket=BUCKET)
    with pytest.raises(
        SystemExit, match=r"residency: refused, and nothing was sent:\n  bucket fruits-bucket .*NoSuchBucket"
    ):
        call()
    assert there.commands == []


def test_logs_that_would_leave_the_eu_end_it_before_anything_is_sent(there: Aws) -> None:
    place = {"LocationConstraint": "eu-west-2"}
    there.client("s3", "eu-west-2").create_bucket(Bucket="logs-in-london", CreateBucketConfiguration=place)
    there.clusters()[-1].log_uri = "s3://logs-in-london/"
    with pytest.raises(SystemExit, match=r"bucket logs-in-london .*eu-west-2, Europe \(London\)"):
        call()
    assert keys(there.client("s3"), BUCKET) == []


def test_an_upload_that_is_refused_ends_it_in_a_line(there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise S3UploadFailedError("Failed to upload a.txt: AccessDenied")

    monkeypatch.setattr(bucket.Bucket, "put", refused)
    with pytest.raises(SystemExit, match=r"^submit: Failed to upload a\.txt: AccessDenied$"):
        call()


def test_without_a_cluster_it_says_how_to_start_one(there: Aws) -> None:
    there.clusters()[-1].state = "TERMINATED"
    with pytest.raises(SystemExit, match=r"no cluster 'fruits' is up in eu-west-3: `make cloud-up`"):
        call()


def test_without_an_application_it_says_how_to_add_one() -> None:
    with pytest.raises(
        SystemExit, match=r'no EMR Serverless application\. Set `Serverless: "true"` .* `make cloud-setup wheelhouse`'
    ):
        serverless.Application({"region": REGION, "serverless": {}}, {"Bucket": BUCKET})


def test_a_folder_without_files_is_not_sent(there: Aws) -> None:
    with pytest.raises(SystemExit, match="nothing has no files to send"):
        call(source="nothing")


@pytest.mark.parametrize("target", TARGETS)
def test_what_it_took_is_set_down(target: str, there: Aws) -> None:
    call(target)
    took = json.loads(Path(".dvc/tmp/took/stage.json").read_text())
    assert (took["where"], took["images"], took["euros"] > 0) == (target, 3, True)


def test_a_bill_that_comes_late_is_waited_for(there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serverless, "BILL_SECONDS", 30)
    there.bill_seconds = 0.5
    call("emr-serverless")
    took = json.loads(Path(".dvc/tmp/took/stage.json").read_text())
    (job,) = there.job_runs()
    assert took["vcpu_hours"] == pytest.approx(job.billed_resource_utilization["vCPUHour"], abs=1e-6)


def test_until_there_is_a_bill_the_cost_is_that_of_what_was_used(there: Aws) -> None:
    there.bill_seconds = 600
    assert call("emr-serverless") == 0
    (job,) = there.job_runs()
    assert not job.billed_resource_utilization
    assert json.loads(Path(".dvc/tmp/took/stage.json").read_text())["euros"] > 0


def test_without_bill_and_use_a_stage_ends_well_with_no_euros(there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    look = serverless.Application._job
    unknown = ("billedResourceUtilization", "totalResourceUtilization")
    monkeypatch.setattr(
        serverless.Application, "_job", lambda self, run: {k: v for k, v in look(self, run).items() if k not in unknown}
    )
    assert call("emr-serverless") == 0
    took = json.loads(Path(".dvc/tmp/took/stage.json").read_text())
    assert ("euros" in took, took["cores"]) == (False, 64)


@pytest.mark.parametrize("target", TARGETS)
def test_a_bill_that_cannot_be_had_fails_no_stage(
    target: str, there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise KeyError("EndDateTime")

    monkeypatch.setattr(SERVICES[target], "bill", refuse)
    assert (call(target), Path("out/first").exists()) == (0, True)
    assert "what it took and cost is not known: KeyError('EndDateTime')" in capsys.readouterr().out


def test_the_log_of_a_step_that_ended_well_is_not_waited_for(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    there.log_seconds = 600
    began = time.monotonic()
    assert call() == 0
    assert time.monotonic() - began < 30
    assert (
        "the log of stage is on its way; within five minutes it will be in s3://fruits-bucket/logs/"
        in capsys.readouterr().out
    )


def test_the_log_of_a_step_that_failed_is_waited_for(
    there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "LOG_SECONDS", 30)
    there.log_seconds = 0.5
    with pytest.raises(SystemExit, match="is FAILED"):
        call(what="fail")
    assert "ValueError: 3 of 7 are not finite" in capsys.readouterr().err


def test_a_job_run_beyond_the_quota_is_refused_with_a_size_that_fits(there: Aws) -> None:
    there.quotas["L-D05C8A75"] = 16
    with pytest.raises(
        SystemExit, match=r"Max concurrent vCPUs per account: 68 needed, 16 allowed[\s\S]*`executors: 3` fits"
    ):
        call("emr-serverless")
    assert there.job_runs() == []


def test_a_job_run_gets_its_settings_without_quotes(there: Aws) -> None:
    there.is_paused = True
    service = serverless.Application(cloud.settings(), cloud.outputs(cloud.settings()))
    service.start("stage 1", remote.spark_defaults(), ["s3://b/s.py"])
    (job,) = there.job_runs()
    assert job.job_driver is not None
    conf = str(job.job_driver["sparkSubmit"]["sparkSubmitParameters"])
    assert re.search(r"--conf spark\.archives=s3://\S+/packages\.tar\.gz#packages ", conf)
    words = [part for item in (service.conf | remote.spark_defaults()).items() for part in ("--conf", "=".join(item))]
    assert conf.split() == words  # so no value has a blank


def test_a_setting_that_would_need_quotes_is_refused(there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATURE_CACHE", f"s3://{BUCKET}/my cache")
    with pytest.raises(
        SystemExit, match=r"no setting with a blank or a quote in it: spark\.featurize\.cache=s3://fruits-bucket/my"
    ):
        call("emr-serverless")


def test_no_key_is_on_a_command_line_or_in_the_bucket(there: Aws) -> None:
    with pytest.raises(SystemExit):
        call(what="fail")
    s3 = there.client("s3")
    contents = [s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys(s3, BUCKET)]
    assert [each for each in contents if SECRET.encode() in each] == []
    assert SECRET not in str(there.commands)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_told_to_end_it_cancels_the_step_and_ends(number: signal.Signals, there: Aws, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bootstrap.submit", "spark-submit", "stage.py", "in", "out", "--what", "hang"],
        env=os.environ | {"SPARK_TARGET": "emr", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert any("is RUNNING" in line for line in process.stdout)
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    assert ([step.state for step in there.clusters()[-1].steps], (tmp_path / "out").exists()) == (["CANCELLED"], False)


@pytest.mark.slow
def test_the_pipeline_gives_the_same_lock_as_here(there: Aws, clone: Path) -> None:
    """On EMR Serverless; test_cloud.py runs it on a cluster."""
    there.is_plain = False
    before = yaml.safe_load((clone / "dvc.lock").read_text())
    forget(clone)
    said = run("dvc", "repro", "reduce", cwd=clone, SPARK_TARGET="emr-serverless")
    assert (len(there.commands), yaml.safe_load((clone / "dvc.lock").read_text())) == (len(SPARK_STAGES), before)
    assert "of data/ingested" not in said  # nor is any other output of one stage sent for the next
