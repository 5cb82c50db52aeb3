"""check.py against AWS as tests/aws.py plays it, with the stack of infrastructure.yaml: all well, then each thing wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from moto.backends import get_backend

from bootstrap.aws import check, cloud, cluster, cost, infrastructure, wheelhouse
from tests.aws import REGION, Aws

SETTINGS = cloud.settings()
RELEASE = SETTINGS["cluster"]["ReleaseLabel"]
NAMES = ["region", "credentials", "stack", "quotas", "roles", "bucket", "network", "wheelhouse", "remote", "prices"]
BUCKET = f"fruits-123456789012-{REGION}"
FOLDER = wheelhouse.folder(wheelhouse.pins(SETTINGS, RELEASE))

pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS..S3..BucketPolicy")


@pytest.fixture
def there(played: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Aws:
    """AWS after `make cloud-setup wheelhouse`, and here a repository of DVC's after `make remote`."""
    played.lend_keys(monkeypatch, empty=tmp_path / "empty")
    played.fresh()
    for service in ("cloudformation", "s3", "ec2", "iam"):
        get_backend(service).reset()
    parameters = [{"ParameterKey": key, "ParameterValue": value} for key, value in SETTINGS["parameters"].items()]
    played.client("cloudformation").create_stack(
        StackName=SETTINGS["stack"], TemplateBody=infrastructure.TEMPLATE.read_text(), Parameters=parameters
    )
    for service, name in infrastructure.linked_roles(is_serverless=True).items():
        played.client("iam").create_role(RoleName=name, Path=f"/aws-service-role/{service}/", AssumeRolePolicyDocument="{}")
    for name in (wheelhouse.INDEX, wheelhouse.ARCHIVE):
        played.client("s3").put_object(Bucket=BUCKET, Key=f"{FOLDER}/{name}", Body=b"")
    admit(played, 443, 9443)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()
    remember(f"s3://{BUCKET}/dvc")
    return played


def admit(there: Aws, *ports: int) -> None:
    """Let the group for service access admit these ports and no others."""
    ec2, group = there.client("ec2"), cloud.outputs(SETTINGS)["ServiceAccessSecurityGroup"]
    (found,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    if found["IpPermissions"]:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=found["IpPermissions"])
    for port in ports:
        ec2.authorize_security_group_ingress(
            GroupId=group, IpProtocol="tcp", FromPort=port, ToPort=port, CidrIp="10.20.0.0/16"
        )


def remember(url: str) -> None:
    Path(".dvc/config").write_text(
        f"[core]\n    remote = storage\n['remote \"storage\"']\n    url = {url}\n    region = {REGION}\n"
    )


def wrong(name: str, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Check, and return what the last line says is wrong, which must be of that name; those before it are right."""
    assert check.main(list(words)) == 1
    said = capsys.readouterr().out
    assert re.findall(r"^(ok|WRONG) +(\w+)", said, re.M) == [
        *(("ok", before) for before in NAMES[: NAMES.index(name)]),
        ("WRONG", name),
    ]
    return said.partition("WRONG")[2]


def with_settings(monkeypatch: pytest.MonkeyPatch, **other: Any) -> None:
    monkeypatch.setattr(cloud, "settings", lambda: SETTINGS | other)


def with_serverless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moto makes no application from a template."""
    outputs = cloud.outputs(SETTINGS) | {"ServerlessApplication": "00f"}
    monkeypatch.setattr(cloud, "outputs", lambda settings: outputs)


def test_all_is_well(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(ok|WRONG) +(\w+)", said, re.M) == [("ok", name) for name in NAMES]
    assert said.endswith("\nNext:  make cloud-up\n")


def test_nothing_is_left_behind_in_the_bucket(there: Aws) -> None:
    check.main([])
    found = there.client("s3").list_objects_v2(Bucket=BUCKET)["Contents"]
    assert {item["Key"].partition("/")[0] for item in found} == {"bootstrap"}


def test_a_region_outside_the_eu(there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with_settings(monkeypatch, region="eu-west-2")
    assert "is not in the EU" in wrong("region", capsys)


def test_no_credentials(there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    assert "Unable to locate credentials. `aws sso login`" in wrong("credentials", capsys)


def test_a_profile_that_does_not_exist(
    there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "orchard")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    said = wrong("region", capsys)
    assert said.startswith(
        "  region       The config profile (orchard) could not be found. `aws sso login`, or AWS_PROFILE="
    )


@pytest.mark.parametrize("main", [cluster.main, infrastructure.main])
def test_who_has_no_credentials_is_told_where_they_come_from(main: Any, there: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    with pytest.raises(SystemExit, match=r"x: Unable to locate credentials\. `aws sso login`"), cloud.errors_in_words("x"):
        main(["down"])


def test_that_the_bucket_of_a_remote_is_gone_hinders_no_setup(there: Aws) -> None:
    remember("s3://deleted-with-the-command-of-cloud-delete/dvc")
    infrastructure.main(["up"])


def test_a_stack_that_was_taken_back(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    get_backend("cloudformation").reset()
    template = json.dumps({"Resources": {"Group": {"Type": "AWS::Logs::LogGroup", "Properties": {"LogGroupName": "x"}}}})
    there.client("cloudformation").create_stack(StackName=SETTINGS["stack"], TemplateBody=template)
    assert "and not whole. `make cloud-setup` makes it" in wrong("stack", capsys)


def test_no_stack(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    get_backend("cloudformation").reset()
    assert "`make cloud-setup` makes it" in wrong("stack", capsys)


def test_an_unknown_release(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown release 'emr-6.15.0'; cluster.yaml knows " in wrong("stack", capsys, "--release", "emr-6.15.0")


def test_a_stack_without_an_output_that_is_taken_from_it(
    there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = {name: value for name, value in cloud.outputs(SETTINGS).items() if name != "SecurityConfiguration"}
    monkeypatch.setattr(cloud, "outputs", lambda settings: outputs)
    assert "${SecurityConfiguration} in cluster.yaml is none of Bucket" in wrong("stack", capsys)


@pytest.mark.parametrize(("code", "fits"), [("L-1216C47A", 1), ("L-34B43A08", 3)])
def test_a_small_quota(code: str, fits: int, there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    there.quotas[code] = 5
    said = wrong("quotas", capsys)
    assert said.startswith("  quotas       `executors: 16` of bootstrap/aws/cluster.yaml needs more vCPUs")
    assert f"`executors: {fits}` fits now" in said


def test_a_small_quota_of_emr_serverless(
    there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_serverless(monkeypatch)
    assert check.main([]) == 0
    capsys.readouterr()
    there.quotas["L-D05C8A75"] = 16
    assert "`executors: 3` fits now" in wrong("quotas", capsys)


@pytest.mark.parametrize("service", infrastructure.LINKED)
def test_no_role_of_aws_s_own(service: str, there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    there.client("iam").delete_role(RoleName=infrastructure.LINKED[service])
    said = wrong("roles", capsys)
    assert infrastructure.LINKED[service] in said
    assert f"aws iam create-service-linked-role --aws-service-name {service}" in said


def test_a_role_of_the_stack_is_gone(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    iam, outputs = there.client("iam"), cloud.outputs(SETTINGS)
    profile = iam.get_instance_profile(InstanceProfileName=outputs["InstanceProfile"])["InstanceProfile"]
    iam.remove_role_from_instance_profile(
        InstanceProfileName=outputs["InstanceProfile"], RoleName=profile["Roles"][0]["RoleName"]
    )
    assert "has no role: `make cloud-setup`, or" in wrong("roles", capsys)


def test_the_bucket_is_gone(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    s3 = there.client("s3")
    for item in s3.list_object_versions(Bucket=BUCKET)["Versions"]:
        s3.delete_object(Bucket=BUCKET, Key=item["Key"], VersionId=item["VersionId"])
    s3.delete_bucket(Bucket=BUCKET)
    assert f"bucket {BUCKET}" in wrong("bucket", capsys)


@pytest.mark.parametrize(("release", "port"), [("emr-spark-8.0.0", 443), ("emr-7.13.0", 9443)])
def test_a_closed_port(release: str, port: int, there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    admit(there, 443 + 9443 - port)
    said = wrong("network", capsys, "--release", release)
    assert f"does not admit port {port}, which {release} needs" in said
    # CloudFormation does not compare what there is with the template.
    assert "`make cloud-setup`, or, if that has nothing to change, `make cloud-delete cloud-setup`" in said


def test_a_group_that_admits_all(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    admit(there)
    group = cloud.outputs(SETTINGS)["ServiceAccessSecurityGroup"]
    everything = [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "10.20.0.0/16"}]}]
    there.client("ec2").authorize_security_group_ingress(GroupId=group, IpPermissions=everything)
    assert check.main([]) == 0


def test_no_endpoint_of_s3(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    ec2 = there.client("ec2")
    ec2.delete_vpc_endpoints(VpcEndpointIds=[each["VpcEndpointId"] for each in ec2.describe_vpc_endpoints()["VpcEndpoints"]])
    assert "no endpoint of com.amazonaws.eu-west-3.s3 is available" in wrong("network", capsys)


def test_no_addresses(there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    there.quotas["L-34B43A08"] = 10**6
    with_settings(monkeypatch, executors=5000)
    assert "free addresses, and 5001 nodes need one each" in wrong("network", capsys)


def test_no_wheelhouse_for_the_other_release(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    assert wrong("wheelhouse", capsys, "--release", "emr-7.13.0").endswith("`make wheelhouse RELEASE=emr-7.13.0`\n")


def test_no_archive_for_emr_serverless(
    there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_serverless(monkeypatch)
    there.client("s3").delete_object(Bucket=BUCKET, Key=f"{FOLDER}/{wheelhouse.ARCHIVE}")
    assert wrong("wheelhouse", capsys).endswith(f"/{wheelhouse.ARCHIVE}: `make wheelhouse`\n")


def test_no_remote(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    Path(".dvc/config").write_text("")
    assert wrong("remote", capsys).endswith(f"DVC has no default remote: `make remote BUCKET={BUCKET}`\n")


def test_a_remote_that_cannot_be_looked_up(there: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    remember("s3://a-bucket-that-is-not-there/dvc")
    assert "remote storage must lie in the EU: cannot be read" in wrong("remote", capsys)


def test_a_type_without_a_price(there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = cost.load()
    monkeypatch.setattr(cost, "load", lambda: known | {"ec2": {"m6i.xlarge": 0.2}})
    assert "no price of 'm6i.2xlarge'" in wrong("prices", capsys)


def test_prices_of_long_ago(there: Aws, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = cost.load()
    monkeypatch.setattr(cost, "load", lambda: known | {"read": known["read"].replace(year=2020)})
    assert "days ago: look its prices up again" in wrong("prices", capsys)
