"""The policies against what is really asked of AWS: each call of each `make` target, S3 by jobs, EC2 by EMR itself."""

import os
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import Any

import pytest
from dvc.config import Config

from bootstrap import remote
from bootstrap.aws import bucket, check, cloud, cluster, endpoint, infrastructure, residency, wheelhouse
from tests import iam
from tests.aws import KEY_OF_AWS, Aws, aws
from tests.iam import ACCOUNT, REGION, Request, as_list, is_allowed
from tests.test_emr import STAGE, call
from tests.test_wheelhouse import wheel

SETTINGS = cloud.settings()
LABEL = {"for-use-with-amazon-emr-managed-policies": "true"}


class Life:
    """From `make cloud-setup` to `make cloud-delete`: what was needed for each, and what jobs read and wrote."""

    def __init__(self) -> None:
        self.needed: dict[str, set[Request]] = {}
        self.values: dict[str, str] = {}
        self.outputs: dict[str, str] = {}
        self.read: set[tuple[str, str]] = set()
        self.written: set[tuple[str, str]] = set()


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    with aws(tmp_path_factory.mktemp("aws")) as played, pytest.MonkeyPatch.context() as patch:
        yield live(played, tmp_path_factory.mktemp("here"), patch)


def live(played: Aws, here: Path, patch: pytest.MonkeyPatch) -> Life:
    life, made = Life(), list[iam.Call]()
    roles: dict[str, str] = {}
    played.lend_keys(patch)
    for module, name in ((remote, "SECONDS"), (bucket, "SECONDS"), (endpoint, "WAIT"), (infrastructure, "WAIT")):
        patch.setattr(module, name, 0.05)
    patch.setattr(remote, "LOG_SECONDS", 0.2)
    settings = SETTINGS | {"parameters": SETTINGS["parameters"] | {"Serverless": "true"}}
    patch.setattr(cloud, "settings", lambda: settings)
    patch.setattr(wheelhouse, "download", lambda versions, wheels: large_wheel(wheels))
    patch.chdir(here)
    (here / "stage.py").write_text(STAGE)
    (here / "in").mkdir()
    (here / ".dvc").mkdir()
    for name in ("a", "b"):
        (here / f"in/{name}.txt").write_text(name)
    played.is_plain = True
    iam.record(patch, made, but_by=KEY_OF_AWS)

    def noted(target: str) -> None:
        life.needed[target] = {request for each in made for request in iam.needed(each, roles)}
        made.clear()

    infrastructure.main(["up"])
    made.clear()
    life.outputs = outputs = cloud.outputs(settings)
    of_iam, ec2 = played.client("iam"), played.client("ec2")
    profile = outputs["InstanceProfile"]
    found = of_iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]
    roles[profile] = found["Roles"][0]["Arn"]
    life.values = iam.values(
        outputs["Bucket"],
        ServiceRole=outputs["ServiceRole"],
        NodeRole=roles[profile],
        ServerlessRole=outputs["ServerlessRole"],
        InstanceProfile=found["Arn"],
    )
    made.clear()
    wheelhouse.main([])
    noted("wheelhouse")
    with patch.context() as remotes:
        remote_here = {"storage": {"url": f"s3://{outputs['Bucket']}/dvc"}}
        remotes.setattr(residency, "dvc_remotes", lambda: remote_here)
        remotes.setattr(Config, "from_cwd", lambda: {"core": {"remote": "storage"}})
        played.lend_keys(remotes, empty=here / "empty")
        assert check.main([]) == 0
    noted("cloud-check")
    cluster.main(["up"])
    noted("cloud-up")
    for target in ("emr", "emr-serverless"):
        assert call(target, output=target) == 0
        assert call(target, source=target, output=f"{target}-next") == 0
        with pytest.raises(SystemExit, match="FAILED"):
            call(target, "fail", output=f"{target}-bad")
        patch.setenv("EMR_HOURS", "0.0003")
        with pytest.raises(SystemExit, match="was cancelled"):
            call(target, "hang", output=f"{target}-long")
        patch.delenv("EMR_HOURS")
        noted(f"repro on {target}")
    assert residency.main([]) == 0
    noted("residency")
    tags = [{"Key": key, "Value": value} for key, value in (LABEL | {"Name": endpoint.NAME}).items()]
    ec2.create_vpc_endpoint(
        VpcId=outputs["Vpc"],
        VpcEndpointType="Interface",
        ServiceName=f"com.amazonaws.{REGION}.elasticmapreduce",
        SubnetIds=outputs["Subnets"].split(","),
        TagSpecifications=[{"ResourceType": "vpc-endpoint", "Tags": tags}],
    )
    cluster.main(["status"])
    noted("cloud-status")
    cluster.main(["down", "--yes"])
    noted("cloud-down")
    life.read, life.written = played.read, played.written
    infrastructure.main(["down", "--yes"])
    return life


def large_wheel(wheels: Path) -> None:
    """So large that it is sent in parts."""
    with zipfile.ZipFile(wheel(wheels), "a") as archive:
        archive.writestr("orchard.bin", os.urandom(9 * 2**20))


TARGETS = (
    *("wheelhouse", "cloud-check", "cloud-up", "repro on emr", "repro on emr-serverless"),
    *("residency", "cloud-status", "cloud-down"),
)


@pytest.mark.parametrize("target", TARGETS)
def test_whoever_has_the_launchers_policy_may_make_each_call(target: str, life: Life) -> None:
    policy = iam.policy("LauncherPolicy", life.values)
    assert life.needed[target]
    assert [str(each) for each in life.needed[target] if not is_allowed(each, policy)] == []


@pytest.mark.parametrize("target", TARGETS)
def test_without_a_permission_the_calls_that_need_it_are_refused(target: str, life: Life) -> None:
    policy = iam.policy("LauncherPolicy", life.values)
    for each in life.needed[target]:
        less = [
            statement | {"Action": [action for action in as_list(statement["Action"]) if not fnmatch(each.action, action)]}
            for statement in policy["Statement"]
        ]
        left = policy | {"Statement": [statement for statement in less if statement["Action"]]}
        assert not is_allowed(each, left), each


def test_a_cluster_is_made_with_the_projects_tag_and_only_one_with_it_can_be_ended() -> None:
    policy, here = iam.policy("LauncherPolicy", iam.values("b")), ("aws:RequestedRegion", REGION)
    arn = f"arn:aws:elasticmapreduce:{REGION}:{ACCOUNT}:cluster/j-1"
    for action, resource, key in (
        ("RunJobFlow", "*", "aws:RequestTag/project"),
        ("TerminateJobFlows", arn, "aws:ResourceTag/project"),
    ):
        for project, allowed in (("fruits", True), ("other", False)):
            request = Request(f"elasticmapreduce:{action}", resource, (here, (key, project)))
            assert is_allowed(request, policy) is allowed, request


@pytest.mark.parametrize("action", ["AddTags", "PutAutoTerminationPolicy", "PutManagedScalingPolicy"])
@pytest.mark.parametrize(("project", "allowed"), [("fruits", True), ("other", False), (None, True)])
def test_a_cluster_of_another_project_cannot_be_made_ours_or_limited(
    action: str, project: str | None, allowed: bool
) -> None:
    """One without the tag can, as a new one has none yet."""
    context = {"aws:RequestedRegion": REGION} | ({"aws:RequestTag/project": "fruits"} if action == "AddTags" else {})
    context |= {"aws:ResourceTag/project": project} if project else {}
    arn = f"arn:aws:elasticmapreduce:{REGION}:{ACCOUNT}:cluster/j-1"
    request = Request(f"elasticmapreduce:{action}", arn, tuple(sorted(context.items())))
    assert is_allowed(request, iam.policy("LauncherPolicy", iam.values("b"))) is allowed


# What people do by hand: Spark's pages after the end, the limits of a cluster. What AWS needs beyond the calls: parts of
# large files, the start of an application by its first job run. And what is asked for a quota that nobody ever changed.
BEYOND = {
    *("elasticmapreduce:CreatePersistentAppUI", "elasticmapreduce:GetPersistentAppUIPresignedURL"),
    *("elasticmapreduce:GetAutoTerminationPolicy", "elasticmapreduce:GetManagedScalingPolicy"),
    *("emr-serverless:GetDashboardForJobRun", "emr-serverless:StartApplication"),
    *("s3:AbortMultipartUpload", "s3:ListMultipartUploadParts", "s3:ListBucketMultipartUploads"),
    "servicequotas:GetAWSDefaultServiceQuota",
}


def test_the_launchers_policy_allows_nothing_that_no_call_needs(life: Life) -> None:
    allowed = {
        action
        for statement in iam.policy("LauncherPolicy", life.values)["Statement"]
        for action in as_list(statement["Action"])
        if "*" not in action
    }
    needed = {request.action for requests in life.needed.values() for request in requests}
    assert allowed - needed - BEYOND == set()


@pytest.mark.parametrize(
    ("tags", "allowed"),
    [
        (LABEL | {"Name": endpoint.NAME}, True),
        ({"Name": endpoint.NAME}, False),
        (LABEL | {"Name": "ours"}, False),
        ({}, False),
    ],
)
def test_of_all_endpoints_the_launcher_may_delete_emrs(tags: dict[str, str], allowed: bool) -> None:
    context = tuple((f"aws:ResourceTag/{key}", value) for key, value in tags.items())
    request = Request("ec2:DeleteVpcEndpoints", f"arn:aws:ec2:{REGION}:{ACCOUNT}:vpc-endpoint/vpce-1", context)
    assert is_allowed(request, iam.policy("LauncherPolicy", iam.values("b"))) is allowed


def test_the_launcher_makes_no_role() -> None:
    role = f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot"
    request = Request("iam:CreateServiceLinkedRole", role, (("iam:AWSServiceName", "spot.amazonaws.com"),))
    assert not is_allowed(request, iam.policy("LauncherPolicy", iam.values("b")))


# --- What a job does, from inside: its own policy and that of the network's endpoint must both allow it.

# What S3A asks of S3 to read a file and to write one: Hadoop's documentation of S3A, "Working with IAM Assumed Roles". To
# rename a file is to read, write and delete it.
TO_READ = {"key": ["GetObject"], "bucket": ["ListBucket", "GetBucketLocation"]}
TO_WRITE = {
    "key": ["GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListMultipartUploadParts"],
    "bucket": ["ListBucket", "GetBucketLocation", "ListBucketMultipartUploads"],
}


def may(action: str, bucket: str, key: str = "") -> bool:
    """Whether a job may do that to our bucket, named b, from a node."""
    values = iam.values("b")
    request = Request(f"s3:{action}", f"arn:aws:s3:::{bucket}/{key}" if key else f"arn:aws:s3:::{bucket}")
    return is_allowed(request, iam.policy("JobPolicy", values), endpoint=policy_of_endpoint(values))


def policy_of_endpoint(values: dict[str, str]) -> dict[str, Any]:
    return dict(iam.fill(iam.resources()["S3Endpoint"]["Properties"]["PolicyDocument"], values))


@pytest.mark.parametrize(("done", "needs"), [("read", TO_READ), ("written", TO_WRITE)])
def test_a_job_may_do_what_it_does(done: str, needs: dict[str, list[str]], life: Life) -> None:
    keys = {key for _, key in getattr(life, done)}
    assert {key.split("/")[0] for key in keys} == {"staging"}
    refused = [(action, key) for key in keys for action in needs["key"] if not may(action, "b", key)]
    assert refused + [action for action in needs["bucket"] if not may(action, "b")] == []


@pytest.mark.parametrize(
    ("needs", "key", "allowed"),
    [
        (TO_READ, "bootstrap/0123/install.sh", True),
        (TO_READ, "dvc/files/md5/ab/cd", True),
        (TO_WRITE, "feature-cache/x", True),
        (TO_WRITE, "logs/j-1/steps/s-1/stderr.gz", True),
        (TO_READ, "elsewhere", False),
    ],
)
def test_a_job_may_read_or_write_where_it_has_to(needs: dict[str, list[str]], key: str, allowed: bool) -> None:
    assert {may(action, "b", key) for action in needs["key"]} == {allowed}


@pytest.mark.parametrize("key", ["bootstrap/0123/install.sh", "dvc/files/md5/ab/cd", "elsewhere"])
def test_a_job_can_neither_change_nor_delete_data(key: str) -> None:
    assert [action for action in ("PutObject", "DeleteObject", "DeleteObjectVersion") if may(action, "b", key)] == []


# The statements of the example in EMR's Management Guide, "Sample policies for private subnets that access Amazon S3".
SAMPLE = [
    (["s3:GetObject"], "al2023-repos-eu-west-3-de612dc2"),
    (["s3:GetObject"], "repo.eu-west-3.emr.amazonaws.com"),
    (["s3:GetObject"], "aws157-instance-data-0-prod-eu-west-3"),
    (["s3:GetObject"], "aws157-instance-data-1-prod-eu-west-3"),
    (["s3:Put*"], "aws157-logs-prod-eu-west-3"),
    (["s3:Put*", "s3:Get*", "s3:Create*", "s3:Abort*", "s3:List*"], "prod.eu-west-3.appinfo.src"),
]
EVERYTHING = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
OF_OBJECTS = ["GetObject", "PutObject", "PutObjectTagging", "DeleteObject", "AbortMultipartUpload"]


@pytest.mark.parametrize(("patterns", "bucket"), SAMPLE, ids=[bucket for _, bucket in SAMPLE])
def test_from_inside_emr_reaches_its_own_buckets_as_its_documentation_asks(patterns: list[str], bucket: str) -> None:
    through = policy_of_endpoint(iam.values("b"))
    for action in OF_OBJECTS:
        request = Request(f"s3:{action}", f"arn:aws:s3:::{bucket}/x")
        wanted = any(fnmatch(f"s3:{action}", pattern) for pattern in patterns)
        assert is_allowed(request, EVERYTHING, endpoint=through) is wanted, request


@pytest.mark.parametrize("bucket", ["somebody-elses", "aws157-logs-prod-us-east-1", "prod.us-east-1.appinfo.src"])
def test_from_inside_no_other_bucket_is_reached_whoever_asks(bucket: str) -> None:
    through = policy_of_endpoint(iam.values("b"))
    asked = [Request(f"s3:{action}", f"arn:aws:s3:::{bucket}/x") for action in OF_OBJECTS]
    assert [str(each) for each in asked if is_allowed(each, EVERYTHING, endpoint=through)] == []


# --- What EMR does, with ServiceRole: its own policy, as AWS has it, and ours to pass the role of the nodes.


def may_emr(action: str, resource: str, **context: str) -> bool:
    values = iam.values("b")
    (passing,) = iam.resources()["ServiceRole"]["Properties"]["Policies"]
    own = [iam.managed_policy("AmazonEMRServicePolicy_v2"), iam.fill(passing["PolicyDocument"], values)]
    return is_allowed(Request(action, resource, tuple(sorted(context.items()))), *own)


def ec2(kind: str, name: str = "x-1") -> str:
    return f"arn:aws:ec2:{REGION}:{'' if kind == 'image' else ACCOUNT}:{kind}/{name}"


def tagged(way: str, tags: dict[str, str]) -> dict[str, str]:
    return {f"aws:{way}Tag/{key}": value for key, value in tags.items()}


NETWORK = {
    "Vpc": "vpc",
    "SubnetA": "subnet",
    "SubnetB": "subnet",
    "PrimarySecurityGroup": "security-group",
    "CoreSecurityGroup": "security-group",
    "ServiceAccessSecurityGroup": "security-group",
}
# What EMR asks EC2 for, and of which parts of our network: EC2 decides on each of them.
IN_NETWORK = [
    ("CreateFleet", ("subnet",)),
    ("RunInstances", ("subnet", "security-group")),
    ("CreateNetworkInterface", ("subnet", "security-group")),
    ("AuthorizeSecurityGroupIngress", ("security-group",)),
    ("AuthorizeSecurityGroupEgress", ("security-group",)),
    ("CreateVpcEndpoint", ("vpc", "subnet", "security-group")),
    ("ModifyVpcEndpoint", ("subnet", "security-group")),
]
# What is made then gets the tags of the cluster.
MADE = [
    ("CreateFleet", "instance"),
    ("CreateFleet", "volume"),
    ("RunInstances", "instance"),
    ("RunInstances", "volume"),
    ("CreateLaunchTemplate", "launch-template"),
    ("CreateNetworkInterface", "network-interface"),
]


@pytest.mark.parametrize(("action", "kinds"), IN_NETWORK, ids=[action for action, _ in IN_NETWORK])
def test_emr_may_work_in_our_network(action: str, kinds: tuple[str, ...]) -> None:
    for name, kind in NETWORK.items():
        if kind in kinds:
            tags = {tag["Key"]: tag["Value"] for tag in iam.resources()[name]["Properties"]["Tags"] if tag["Key"] in LABEL}
            assert may_emr(f"ec2:{action}", ec2(kind), **tagged("Resource", tags)), name


@pytest.mark.parametrize(("action", "kind"), MADE)
def test_emr_may_make_what_a_cluster_consists_of(action: str, kind: str) -> None:
    tags = {tag["Key"]: tag["Value"] for tag in SETTINGS["cluster"]["Tags"] if tag["Key"] in LABEL}
    assert may_emr(f"ec2:{action}", ec2(kind), **tagged("Request", tags))


def test_emr_may_make_and_change_its_own_endpoint() -> None:
    tags = LABEL | {"Name": endpoint.NAME}
    assert may_emr("ec2:CreateVpcEndpoint", ec2("vpc-endpoint"), **tagged("Request", tags))
    assert may_emr("ec2:ModifyVpcEndpoint", ec2("vpc-endpoint"), **tagged("Resource", tags))


def test_emr_may_not_delete_its_endpoint_so_that_cloud_down_has_to() -> None:
    assert not may_emr("ec2:DeleteVpcEndpoints", ec2("vpc-endpoint"), **tagged("Resource", LABEL | {"Name": endpoint.NAME}))


@pytest.mark.parametrize("service", infrastructure.linked_roles(is_serverless=True))
def test_emr_may_not_make_the_roles_of_aws_so_that_cloud_setup_has_to(service: str) -> None:
    role = f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/{service}/AWSServiceRoleForIt"
    assert not may_emr("iam:CreateServiceLinkedRole", role, **{"iam:AWSServiceName": service})


@pytest.mark.parametrize(("role", "allowed"), [("NodeRole", True), ("ServiceRole", False), ("Administrator", False)])
def test_of_all_roles_emr_may_give_the_nodes_theirs(role: str, allowed: bool) -> None:
    passed = {"iam:PassedToService": "ec2.amazonaws.com"}
    assert may_emr("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/{role}", **passed) is allowed
