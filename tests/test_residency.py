"""residency.py: each thing that would take data out of the EU is refused, in words. moto answers at the hosts of AWS."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest
import yaml
from botocore.exceptions import ClientError

from bootstrap.aws import cloud, residency
from bootstrap.aws.residency import Finding

PARIS, IRELAND, VIRGINIA, ZURICH = "eu-west-3", "eu-west-1", "us-east-1", "eu-central-2"
REMOTE = {"url": "s3://data/dvc", "region": PARIS}


@pytest.fixture(autouse=True)
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account with the bucket data in Paris, and nobody's own configuration."""
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    with moto.mock_aws():
        make("data", PARIS)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # a session reads its configuration once
        yield


def make(bucket: str, region: str) -> None:
    constraint = {} if region == VIRGINIA else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    boto3.client("s3", region).create_bucket(Bucket=bucket, **constraint)


def against(region: str = PARIS, *buckets: str, **remotes: dict[str, Any]) -> list[Finding]:
    return [finding for finding in residency.check(region, buckets, ["s3"], remotes) if not finding.ok]


def replicate(source: str, destination: str) -> None:
    s3 = boto3.client("s3", PARIS)
    for bucket in (source, destination):
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    rule = {"Status": "Enabled", "Priority": 1, "Filter": {}, "DeleteMarkerReplication": {"Status": "Disabled"}}
    rule["Destination"] = {"Bucket": f"arn:aws:s3:::{destination}"}
    s3.put_bucket_replication(
        Bucket=source, ReplicationConfiguration={"Role": "arn:aws:iam::123456789012:role/copy", "Rules": [rule]}
    )


def answer(monkeypatch: pytest.MonkeyPatch, operation: str, code: str) -> None:
    """Let S3 answer every call of the operation by that error."""
    make = cloud.client

    def client(service: str, region: str) -> Any:
        made = make(service, region)
        if service == "s3":

            def refuse(**_: Any) -> None:
                raise ClientError({"Error": {"Code": code, "Message": "so it is"}}, operation)

            setattr(made, operation, refuse)
        return made

    monkeypatch.setattr(cloud, "client", client)


# What is accepted


@pytest.mark.parametrize("region", sorted(residency.EU))
def test_a_region_of_the_eu_is_accepted(region: str) -> None:
    assert against(region) == []


def test_buckets_and_remote_in_paris_are_accepted() -> None:
    assert residency.check(PARIS, ["data"], ["s3", "emr"], {"storage": REMOTE}) == [
        ("region", residency.REGION, "eu-west-3, Europe (Paris)", True),
        ("service s3", residency.HOST, "https://s3.eu-west-3.amazonaws.com", True),
        ("service emr", residency.HOST, "https://elasticmapreduce.eu-west-3.amazonaws.com", True),
        ("bucket data", residency.LOCATION, "eu-west-3, Europe (Paris)", True),
        ("bucket data", residency.ACCELERATION, "none", True),
        ("bucket data", residency.REPLICATION, "none", True),
        ("remote storage", residency.REGION, "eu-west-3, Europe (Paris)", True),
        ("remote storage", residency.HOST, "https://s3.eu-west-3.amazonaws.com", True),
        ("remote storage", residency.LOCATION, "eu-west-3, Europe (Paris)", True),
        ("remote storage", residency.ACCELERATION, "none", True),
        ("remote storage", residency.REPLICATION, "none", True),
    ]


def test_the_old_name_of_ireland_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        meta = cloud.client("s3", PARIS).meta

        def get_bucket_location(self, Bucket: str) -> dict[str, str]:
            return {"LocationConstraint": "EU"}

    assert residency.locate("old", Client()) == ("eu-west-1, Europe (Ireland)", True)


def test_a_copy_within_the_eu_is_accepted() -> None:
    make("irish", IRELAND)
    replicate("data", "irish")
    assert against(PARIS, "data") == []


def test_a_region_without_acceleration_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "get_bucket_accelerate_configuration", "MethodNotAllowed")
    assert against(PARIS, "data") == []


@pytest.mark.parametrize("url", ["/mnt/share", "ssh://localhost/share"])
def test_a_remote_on_this_machine_is_accepted(url: str) -> None:
    assert against(storage={"url": url}) == []


# What is refused


@pytest.mark.parametrize(
    ("region", "place"),
    [
        ("eu-west-2", "Europe (London)"),
        ("eu-central-2", "Europe (Zurich)"),
        ("us-east-1", "US East (N. Virginia)"),
        ("eu-west-99", "which is unknown"),
    ],
)
def test_a_region_that_is_not_in_the_eu_is_refused_by_name_and_not_asked_anything(region: str, place: str) -> None:
    assert residency.check(region, ["data"]) == [("region", residency.REGION, f"{region}, {place}, is not in the EU", False)]


@pytest.mark.parametrize(
    ("bucket", "found"),
    [
        ("virginian", "us-east-1, US East (N. Virginia), is not in the EU"),
        ("swiss", "eu-central-2, Europe (Zurich), is not in the EU"),
        ("arn:aws:s3::123456789012:accesspoint/m.mrap", "an access point, which may lead to many regions, not a bucket"),
    ],
    ids=["an empty location", "Zurich", "access point"],
)
def test_a_bucket_that_may_be_elsewhere_is_refused(bucket: str, found: str) -> None:
    make("virginian", VIRGINIA)
    make("swiss", ZURICH)
    assert against(PARIS, "data", bucket) == [(f"bucket {bucket}", residency.LOCATION, found, False)]


def test_a_bucket_that_is_not_there_is_refused() -> None:
    (finding,) = against(PARIS, "nowhere-at-all")
    assert "cannot be read" in finding.found
    assert "NoSuchBucket" in finding.found


@pytest.mark.parametrize(
    ("operation", "permission"),
    [
        ("get_bucket_location", "s3:GetBucketLocation"),
        ("get_bucket_accelerate_configuration", "s3:GetAccelerateConfiguration"),
        ("get_bucket_replication", "s3:GetReplicationConfiguration"),
    ],
)
def test_what_one_may_not_read_is_refused_with_the_permission(
    operation: str, permission: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(monkeypatch, operation, "AccessDenied")
    (finding,) = against(PARIS, "data")
    assert finding.found == f"cannot be read: you lack the permission {permission}"


def test_a_location_that_the_server_cannot_tell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, "get_bucket_location", "NotImplemented")
    assert [finding.rule for finding in against(PARIS, "data")] == [residency.LOCATION]


def test_a_bucket_that_is_accelerated_is_refused() -> None:
    boto3.client("s3", PARIS).put_bucket_accelerate_configuration(
        Bucket="data", AccelerateConfiguration={"Status": "Enabled"}
    )
    assert against(PARIS, "data") == [("bucket data", residency.ACCELERATION, "Enabled", False)]


def test_acceleration_in_the_configuration_of_aws_is_refused(tmp_path: Path) -> None:
    (tmp_path / "aws-config").write_text("[default]\ns3 =\n  use_accelerate_endpoint = true\n")
    found = "use_accelerate_endpoint is set in the configuration of AWS"
    assert against(storage=REMOTE) == [("service s3", residency.ACCELERATION, found, False)]


def test_a_copy_out_of_the_eu_is_refused() -> None:
    make("virginian", VIRGINIA)
    replicate("data", "virginian")
    assert against(PARIS, "data") == [
        ("bucket data", residency.REPLICATION, "to virginian: us-east-1, US East (N. Virginia), is not in the EU", False)
    ]


@pytest.mark.parametrize(
    ("variable", "service"), [("AWS_ENDPOINT_URL_S3", "s3"), ("AWS_ENDPOINT_URL_CLOUDFORMATION", "cloudformation")]
)
@pytest.mark.parametrize(
    "url",
    [
        "https://s3.example.com",
        "https://s3.amazonaws.com",
        "https://s3.us-east-1.amazonaws.com",
        "https://s3.eu-west-3.amazonaws.com.example.com",
        "https://s3xeu-west-3.amazonaws.com",
        "http://s3.eu-west-3.amazonaws.com",
        "https://localhost.example.com",
    ],
)
def test_another_host_is_refused_and_not_asked_anything(
    variable: str, service: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, url)
    findings = residency.check(PARIS, ["data"], remotes={"storage": REMOTE})
    assert [finding for finding in findings if not finding.ok] == [(f"service {service}", residency.HOST, url, False)]
    assert "bucket data" not in {finding.subject for finding in findings}


def test_a_host_of_the_users_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "aws-config").write_text("[default]\nendpoint_url = https://s3.example.com\n")
    assert {finding.found for finding in against()} == {"https://s3.example.com"}


@pytest.mark.parametrize(
    ("remote", "rule", "found"),
    [
        ({"url": "gs://data"}, residency.REMOTE, "gs://data"),
        ({"url": "azure://data/dvc"}, residency.REMOTE, "azure://data/dvc"),
        ({"url": "https://example.com/dvc"}, residency.REMOTE, "https://example.com/dvc"),
        ({"url": "s3://virginian/dvc"}, residency.LOCATION, "us-east-1, US East (N. Virginia), is not in the EU"),
        ({"region": "eu-west-2"}, residency.REGION, "eu-west-2, Europe (London), is not in the EU"),
        ({"endpointurl": "https://s3.example.com"}, residency.HOST, "https://s3.example.com"),
        ({"use_ssl": False}, residency.HOST, "http://s3.eu-west-3.amazonaws.com"),
        ({"profile": "other"}, residency.HOST, "https://s3.example.com"),
    ],
    ids=["gs", "azure", "https", "bucket", "region", "endpointurl", "use_ssl", "profile"],
)
def test_a_remote_that_leads_elsewhere_is_refused(remote: dict[str, Any], rule: str, found: str, tmp_path: Path) -> None:
    make("virginian", VIRGINIA)
    (tmp_path / "aws-config").write_text("[profile other]\nendpoint_url = https://s3.example.com\n")
    (tmp_path / "aws-credentials").write_text("[other]\naws_access_key_id = A\naws_secret_access_key = S\n")
    assert ("remote storage", rule, found, False) in against(storage={**REMOTE, **remote})


def test_a_remote_without_a_region_is_refused() -> None:
    assert {finding.rule for finding in against(storage={"url": "s3://data/dvc"})} == {residency.REGION, residency.HOST}


def test_remotes_are_those_of_dvc_in_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/config").write_text("['remote \"storage\"']\nurl = s3://data/dvc\n")
    (tmp_path / ".dvc/config.local").write_text(
        "['remote \"storage\"']\nregion = eu-west-3\n['remote \"mine\"']\nurl = gs://mine\n"
        "['remote \"below\"']\nurl = remote://storage/below\nendpointurl = https://s3.example.com\n"
    )
    monkeypatch.chdir(tmp_path)
    findings = residency.check(PARIS, [])
    assert [(finding.subject, finding.found) for finding in findings if not finding.ok] == [
        ("remote mine", "gs://mine"),
        ("remote below", "https://s3.example.com"),
    ]
    assert ("remote storage", residency.LOCATION, "eu-west-3, Europe (Paris)", True) in findings


# A server on this machine


@pytest.mark.parametrize(
    ("location", "expected"),
    [(None, ("this machine", True)), ("us-west-2", ("us-west-2, US West (Oregon), is not in the EU", False))],
    ids=["none", "stated"],
)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_server_of_this_machine_may_be_without_a_location_but_not_elsewhere(
    host: str, location: str | None, expected: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:8333")
    client = cloud.client("s3", PARIS)
    (finding,) = residency.check_endpoint("service s3", client)
    assert finding == ("service s3", residency.HOST, f"{host}:8333, this machine: nothing leaves", True)
    monkeypatch.setattr(client, "get_bucket_location", lambda Bucket: {"LocationConstraint": location})
    assert residency.locate("data", client) == expected


# What is said


def test_a_refusal_says_what_is_wrong_what_to_do_and_that_nothing_was_sent() -> None:
    make("virginian", VIRGINIA)
    with pytest.raises(SystemExit) as refusal:
        residency.require(PARIS, ["data", "virginian"], remotes={"storage": {"url": "gs://data"}})
    assert str(refusal.value).splitlines() == [
        "residency: refused, and nothing was sent:",
        "  bucket virginian must lie in the EU: us-east-1, US East (N. Virginia), is not in the EU. "
        + residency.ADVICE[residency.LOCATION],
        "  remote storage must be S3, or on this machine: gs://data. " + residency.ADVICE[residency.REMOTE],
    ]


def test_what_is_in_the_eu_goes_on() -> None:
    residency.require(PARIS, ["data"], remotes={"storage": REMOTE})


def test_a_cluster_in_another_region_is_refused() -> None:
    residency.require_arn(f"arn:aws:elasticmapreduce:{PARIS}:123456789012:cluster/j-1", PARIS)
    with pytest.raises(
        SystemExit, match=r"nothing was sent: .*/j-1 is in us-east-1, and cluster\.yaml says eu-west-3\. End it"
    ):
        residency.require_arn(f"arn:aws:elasticmapreduce:{VIRGINIA}:123456789012:cluster/j-1", PARIS)


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack whose output Bucket is data, and a cluster that is up, whose logs go to a bucket in Virginia."""
    make("virginian", VIRGINIA)
    settings = {"region": PARIS, "stack": "fruits", "cluster": {"Name": "fruits"}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(cloud, "SETTINGS", tmp_path / "cluster.yaml")
    monkeypatch.chdir(tmp_path)  # where DVC knows of no remote
    template = {"Resources": {"Topic": {"Type": "AWS::SNS::Topic"}}, "Outputs": {"Bucket": {"Value": "data"}}}
    boto3.client("cloudformation", PARIS).create_stack(StackName="fruits", TemplateBody=json.dumps(template))
    instances = {"MasterInstanceType": "m6i.xlarge", "InstanceCount": 1, "KeepJobFlowAliveWhenNoSteps": True}
    boto3.client("emr", PARIS).run_job_flow(
        Name="fruits", ReleaseLabel="emr-spark-8.0.0", Instances=instances, LogUri="s3://virginian/logs/"
    )


@pytest.mark.usefixtures("stack")
def test_the_table_has_the_stack_the_cluster_and_its_logs_and_ends_with_the_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = residency.main([])
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert status == 1
    assert "account 123456789012" in lines
    assert "checked by arn:aws:sts::123456789012:user/moto" in lines
    assert "bucket data must lie in the EU eu-west-3, Europe (Paris) ok" in lines
    assert "bucket virginian must lie in the EU us-east-1, US East (N. Virginia), is not in the EU REFUSED" in lines
    assert any(line.startswith("cluster/j-") and line.endswith("ok") for line in lines)
    assert lines[-1].startswith("REFUSED: 1 of ")


@pytest.mark.usefixtures("stack")
def test_the_table_of_one_bucket_that_is_in_the_eu(capsys: pytest.CaptureFixture[str]) -> None:
    assert residency.main(["data"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "All stays in the European Union"


@pytest.mark.usefixtures("stack")
def test_no_key_is_in_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOFTHETEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    residency.main([])
    said = capsys.readouterr().out
    assert "AKIAOFTHETEST" not in said
    assert "secret-of-the-test" not in said
