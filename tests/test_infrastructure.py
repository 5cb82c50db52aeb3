"""infrastructure.yaml and infrastructure.py: what the template allows and forbids, and what is made, kept and deleted."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import pytest
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws
from moto.cloudformation import cloudformation_backends
from moto.core import DEFAULT_ACCOUNT_ID as ACCOUNT
from moto.iam.exceptions import InvalidInput
from moto.iam.models import IAMBackend, Role

from bootstrap.aws import cloud, cluster, endpoint, infrastructure, residency
from tests.aws import teach_accounts
from tests.helpers import ROOT
from tests.iam import Template, as_list

SETTINGS = cloud.settings()
REGION = SETTINGS["region"]
OUTPUTS = {
    "Bucket",
    "ServiceRole",
    "InstanceProfile",
    "SecurityConfiguration",
    "Vpc",
    "Subnets",
    "PrimarySecurityGroup",
    "CoreSecurityGroup",
    "ServiceAccessSecurityGroup",
    "ServerlessRole",
    "LauncherPolicy",
}


TEMPLATE = yaml.load(infrastructure.TEMPLATE.read_text(), Template)
RESOURCES = TEMPLATE["Resources"]


def properties(kind: str) -> dict[str, dict[str, Any]]:
    return {name: resource["Properties"] for name, resource in RESOURCES.items() if resource["Type"] == kind}


def statements(name: str) -> dict[str, dict[str, Any]]:
    return {statement["Sid"]: statement for statement in RESOURCES[name]["Properties"]["PolicyDocument"]["Statement"]}


def test_cloudformation_would_take_the_template() -> None:
    command = [Path(sys.executable).with_name("cfn-lint"), "-r", REGION, "--", infrastructure.TEMPLATE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_regions_are_those_of_residency() -> None:
    ((regions, where),) = [rule["Assert"] for rule in TEMPLATE["Rules"]["EuropeanUnionOnly"]["Assertions"]]
    assert set(regions) == residency.EU
    assert where == "AWS::Region"


def test_the_values_in_the_cluster_file_are_parameters_of_the_template() -> None:
    assert set(SETTINGS["parameters"]) <= set(TEMPLATE["Parameters"])
    assert all(isinstance(value, str) for value in SETTINGS["parameters"].values())


def test_what_the_cluster_file_and_the_launcher_fill_in_is_there() -> None:
    assert set(TEMPLATE["Outputs"]) == OUTPUTS | {"ServerlessApplication"}


def test_what_dvc_stores_never_expires() -> None:
    rules = RESOURCES["Bucket"]["Properties"]["LifecycleConfiguration"]["Rules"]
    assert {rule["Prefix"]: rule["ExpirationInDays"] for rule in rules if "ExpirationInDays" in rule} == {
        "staging/": 7,
        "logs/": 90,
    }


def test_what_is_deleted_by_mistake_can_be_had_back_and_nobody_from_outside_can_ask() -> None:
    bucket = RESOURCES["Bucket"]["Properties"]
    assert bucket["VersioningConfiguration"] == {"Status": "Enabled"}
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    assert bucket["OwnershipControls"] == {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}


def test_of_the_stack_only_data_outlives_it() -> None:
    assert {name: each["DeletionPolicy"] for name, each in RESOURCES.items() if "DeletionPolicy" in each} == {
        "Bucket": "RetainExceptOnCreate"
    }


def test_nobody_reads_the_bucket_in_the_clear_or_copies_it_elsewhere() -> None:
    policy = statements("BucketPolicy")
    assert {statement["Effect"] for statement in policy.values()} == {"Deny"}
    assert policy["EncryptedInTransit"]["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert "s3:PutReplicationConfiguration" in policy["NowhereElse"]["Action"]


def test_nodes_have_no_way_out() -> None:
    kinds = {resource["Type"] for resource in RESOURCES.values()}
    ways = ("InternetGateway", "NatGateway", "EIP", "::Route", "TransitGateway", "VPCPeering", "VPNGateway")
    assert not [kind for kind in kinds if kind.endswith(ways)]


def test_nothing_that_costs_by_the_hour_is_made_unless_it_is_wanted() -> None:
    by_the_hour = {"AWS::EC2::VPCEndpoint", "AWS::EMRServerless::Application", "AWS::KMS::Key"}
    paid = [
        r for r in RESOURCES.values() if r["Type"] in by_the_hour and r["Properties"].get("VpcEndpointType") != "Gateway"
    ]
    assert len(paid) == 3
    assert all("Condition" in resource for resource in paid)
    assert {SETTINGS["parameters"][name] for name in ("Serverless", "SessionManager")} == {"false"}


def test_from_inside_only_our_bucket_and_those_of_emr_in_the_region_exist() -> None:
    for sid, statement in statements_of_endpoint().items():
        for resource in as_list(statement["Resource"]):
            assert resource != "*"
            assert "AWS::Region" in resource or resource.startswith(("Bucket.Arn", "${Bucket.Arn}")), f"{sid}: {resource}"


def statements_of_endpoint() -> dict[str, dict[str, Any]]:
    return {
        statement["Sid"]: statement for statement in RESOURCES["S3Endpoint"]["Properties"]["PolicyDocument"]["Statement"]
    }


def test_nobody_comes_in_from_outside() -> None:
    rules = [rule for p in properties("AWS::EC2::SecurityGroup").values() for rule in p.get("SecurityGroupIngress", [])]
    rules += properties("AWS::EC2::SecurityGroupIngress").values()
    assert {rule["CidrIp"] for rule in rules if "CidrIp" in rule} == {"Vpc.CidrBlock"}
    assert len(rules) == 3


def test_what_emr_works_in_carries_the_tag_of_its_policy() -> None:
    tag = {"Key": "for-use-with-amazon-emr-managed-policies", "Value": "true"}
    wanted = ("Vpc", "SubnetA", "SubnetB", "PrimarySecurityGroup", "CoreSecurityGroup", "ServiceAccessSecurityGroup")
    assert [name for name in wanted if tag not in RESOURCES[name]["Properties"]["Tags"]] == []


# The rules that EMR does not write into groups that are ours, by release: its Management Guide, "Working with EMR-managed
# security groups", and the release notes of emr-spark-8.0.0, "VPC endpoint for EMR cluster communication".
PORTS = {
    "emr-7.13.0": (9443, "SourceSecurityGroupId", "PrimarySecurityGroup"),
    "emr-spark-8.0.0": (443, "CidrIp", "Vpc.CidrBlock"),
}


@pytest.mark.parametrize("release", SETTINGS["releases"])
def test_nodes_can_report_to_emr(release: str) -> None:
    port, way, source = PORTS[release]
    rules = [rule for rule in properties("AWS::EC2::SecurityGroupIngress").values() if rule.get(way) == source]
    assert [(rule["GroupId"], rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in rules] == [
        ("ServiceAccessSecurityGroup", "tcp", port, port)
    ]


def test_no_policy_of_ours_allows_all_of_a_service() -> None:
    for name in ("JobPolicy", "LauncherPolicy"):
        for sid, statement in statements(name).items():
            assert not [action for action in as_list(statement["Action"]) if action.endswith(":*")], sid


# --- Made, updated and deleted, by moto. It knows no policy of a bucket, no budget and no application of EMR Serverless.


@pytest.fixture
def aws(keys_of_nobody: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(infrastructure, "WAIT", 0)
    monkeypatch.setattr(residency, "require", lambda region, buckets, remotes: None)

    monkeypatch.setattr(endpoint, "WAIT", 0)
    teach_accounts(monkeypatch)
    with mock_aws():
        yield


@pytest.fixture
def stack() -> Any:
    """Moto's stack, to set its state."""
    return lambda: next(iter(cloudformation_backends[ACCOUNT][REGION].stacks.values()))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Operations and their arguments, as they are sent to AWS."""
    made = []
    send = botocore.client.BaseClient._make_api_call

    def record(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        made.append((operation, arguments))
        return send(client, operation, arguments)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", record)
    return made


def test_up_makes_the_stack_and_prints_its_outputs(aws: None, capsys: pytest.CaptureFixture[str]) -> None:
    infrastructure.main(["up"])
    said = capsys.readouterr().out
    outputs = cloud.outputs(SETTINGS)
    assert set(outputs) == OUTPUTS
    assert outputs["Bucket"] == "fruits-123456789012-eu-west-3"
    assert len(outputs["Subnets"].split(",")) == 2
    assert all(value in said for value in outputs.values())
    assert "CREATE_COMPLETE        fruits" in said


def test_the_bucket_lies_in_the_region_and_is_encrypted(aws: None) -> None:
    infrastructure.main(["up"])
    s3, bucket = boto3.client("s3", region_name=REGION), cloud.outputs(SETTINGS)["Bucket"]
    assert s3.get_bucket_location(Bucket=bucket)["LocationConstraint"] == REGION
    rule = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"][0]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"


def test_up_again_changes_nothing(aws: None, capsys: pytest.CaptureFixture[str]) -> None:
    infrastructure.main(["up"])
    before = cloud.outputs(SETTINGS)
    capsys.readouterr()
    infrastructure.main(["up"])
    assert capsys.readouterr().out.startswith("Stack fruits in eu-west-3 is up to date; nothing to change.\n")
    assert cloud.outputs(SETTINGS) == before


def test_a_new_value_in_the_cluster_file_updates_the_stack(
    aws: None, calls: list[tuple[str, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    infrastructure.main(["up"])
    infrastructure.up(SETTINGS | {"parameters": SETTINGS["parameters"] | {"SessionManager": "true"}})
    assert "UPDATE_COMPLETE        fruits" in capsys.readouterr().out
    changes = [arguments for operation, arguments in calls if operation == "CreateChangeSet"]
    assert [change["ChangeSetType"] for change in changes] == ["CREATE", "UPDATE"]
    assert {"ParameterKey": "SessionManager", "ParameterValue": "true"} in changes[1]["Parameters"]


def test_a_shell_on_the_nodes_needs_two_endpoints(aws: None) -> None:
    infrastructure.up(SETTINGS | {"parameters": SETTINGS["parameters"] | {"SessionManager": "true"}})
    found = boto3.client("ec2", region_name=REGION).describe_vpc_endpoints()["VpcEndpoints"]
    names = {endpoint["ServiceName"] for endpoint in found}
    assert names == {f"com.amazonaws.{REGION}.{service}" for service in ("s3", "ssm", "ssmmessages")}


def test_the_bucket_of_an_earlier_stack_is_taken_back_in(aws: None, calls: list[tuple[str, dict[str, Any]]]) -> None:
    """By AWS: moto imports nothing, so that only the asking is seen."""
    infrastructure.main(["up"])
    (change,) = [arguments for operation, arguments in calls if operation == "CreateChangeSet"]
    assert change["ImportExistingResources"] is True


def test_after_a_deletion_it_can_be_made_again(aws: None) -> None:
    infrastructure.main(["up"])
    bucket = cloud.outputs(SETTINGS)["Bucket"]
    boto3.client("s3", region_name=REGION).put_object(Bucket=bucket, Key="dvc/x", Body=b"data")
    infrastructure.main(["down", "--yes"])
    infrastructure.main(["up"])
    assert boto3.client("s3", region_name=REGION).get_object(Bucket=bucket, Key="dvc/x")["Body"].read() == b"data"


def test_a_first_attempt_that_fails_leaves_nothing_in_the_way_of_the_second(
    aws: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("not authorized to perform iam:CreateRole")

    with monkeypatch.context() as patch:
        patch.setattr(Role, "create_from_cloudformation_json", refuse)
        with pytest.raises(SystemExit, match="stack fruits in eu-west-3 is ROLLBACK_COMPLETE"):
            infrastructure.main(["up"])
    assert "not authorized to perform iam:CreateRole" in capsys.readouterr().out
    assert boto3.client("s3", region_name=REGION).list_buckets()["Buckets"] == []
    infrastructure.main(["up"])
    assert set(cloud.outputs(SETTINGS)) == OUTPUTS


def test_after_a_first_attempt_that_could_not_be_taken_back_the_second_deletes_what_it_left(aws: None, stack: Any) -> None:
    infrastructure.main(["up"])
    stack().status = "ROLLBACK_FAILED"
    infrastructure.main(["up"])
    assert (stack().status, set(cloud.outputs(SETTINGS))) == ("CREATE_COMPLETE", OUTPUTS)


def test_up_waits_for_the_end_of_what_another_call_does(
    aws: None, stack: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    infrastructure.main(["up"])
    stack().status = "UPDATE_IN_PROGRESS"
    follow, waited = infrastructure.follow, []

    def end(cloudformation: Any, stack_id: str, seen: set[str]) -> str:
        waited.append(stack().status)
        stack().status = "UPDATE_COMPLETE"
        return follow(cloudformation, stack_id, seen)

    monkeypatch.setattr(infrastructure, "follow", end)
    infrastructure.main(["up"])
    assert waited == ["UPDATE_IN_PROGRESS"]
    assert "Stack fruits is UPDATE_IN_PROGRESS, by an earlier call or another one; waiting for it" in capsys.readouterr().out


def test_up_sends_who_left_half_a_stack_to_its_deletion(aws: None, stack: Any) -> None:
    infrastructure.main(["up"])
    stack().status = "DELETE_FAILED"
    with pytest.raises(SystemExit, match="is DELETE_FAILED; `make cloud-delete` goes on with that, then `make cloud-setup`"):
        infrastructure.main(["up"])


@pytest.mark.parametrize("state", ["ROLLBACK_COMPLETE", "CREATE_IN_PROGRESS", "DELETE_FAILED"])
def test_of_a_stack_that_is_not_whole_nothing_is_taken(aws: None, stack: Any, state: str) -> None:
    infrastructure.main(["up"])
    if state != "DELETE_FAILED":
        stack().output_map = {}
    stack().status = state
    with pytest.raises(
        SystemExit, match=f"cloud: stack 'fruits' in eu-west-3 is {state}, and not whole. `make cloud-setup`"
    ):
        cloud.outputs(SETTINGS)


def linked_roles() -> set[str]:
    """Of which services the account has the role."""
    roles = boto3.client("iam", region_name=REGION).list_roles()["Roles"]
    return {role["Path"].split("/")[2] for role in roles if role["Path"].startswith("/aws-service-role/")}


@pytest.mark.parametrize("serverless", [False, True])
def test_up_makes_the_roles_that_emr_may_not_make(aws: None, serverless: bool) -> None:
    iam = boto3.client("iam", region_name=REGION)
    iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")  # as in an account that had spot instances before
    infrastructure.up(SETTINGS | {"parameters": SETTINGS["parameters"] | {"Serverless": str(serverless).lower()}})
    services = {"spot", "ec2fleet", "elasticmapreduce", *(["ops.emr-serverless"] if serverless else [])}
    assert linked_roles() == {f"{service}.amazonaws.com" for service in services}


def test_a_role_of_aws_that_may_not_be_made_ends_it(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise InvalidInput("AWS service name is unknown")

    monkeypatch.setattr(IAMBackend, "create_service_linked_role", refuse)
    with pytest.raises(ClientError, match="is unknown"):
        infrastructure.main(["up"])


@pytest.mark.parametrize(
    ("release", "closed", "refused"),
    [
        ("emr-spark-8.0.0", "none", False),
        ("emr-7.13.0", "none", False),
        ("emr-spark-8.0.0", "443", True),
        ("emr-7.13.0", "9443", True),
    ],
)
def test_the_played_emr_refuses_a_network_in_which_nodes_cannot_report(
    aws: None, release: str, closed: str, refused: bool
) -> None:
    infrastructure.main(["up"])
    outputs, ec2 = cloud.outputs(SETTINGS), boto3.client("ec2", region_name=REGION)
    group = outputs["ServiceAccessSecurityGroup"]
    (found,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    rules = [rule for rule in found["IpPermissions"] if str(rule["FromPort"]) == closed]
    if rules:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=rules)
    emr = boto3.client("emr", region_name=REGION)
    with pytest.raises(ClientError, match=f"missing ingress rule .* on port {closed}") if refused else nullcontext():
        emr.run_job_flow(**cluster.request(SETTINGS, outputs, release))


def test_up_looks_at_residency_before_it_sends_anything(
    aws: None, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    def refuse(region: str, buckets: list[str], remotes: dict[str, Any]) -> None:
        raise SystemExit(f"residency: refused {region}")

    monkeypatch.setattr(residency, "require", refuse)
    with pytest.raises(SystemExit, match="refused us-east-1"):
        infrastructure.up(SETTINGS | {"region": "us-east-1"})
    assert calls == []


def test_a_refused_template_is_told_in_cloudformations_words(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def describe_change_set(self, **arguments: str) -> dict[str, str]:
            return {"Status": "FAILED", "StatusReason": "Parameters: [Typo] do not exist in the template"}

        def delete_change_set(self, **arguments: str) -> None: ...

    with pytest.raises(SystemExit, match=r"CloudFormation refuses: Parameters: \[Typo\] do not exist"):
        infrastructure.wait_for_changes(Refusing(), {})


class Failing:
    """CloudFormation that cannot make a role, and takes back what it has made; it moves on at each look at the stack."""

    def __init__(self) -> None:
        self.states = ["CREATE_IN_PROGRESS", "ROLLBACK_IN_PROGRESS", "ROLLBACK_COMPLETE"]
        self.log = [
            ("1", "Role", "CREATE_IN_PROGRESS"),
            ("2", "Role", "CREATE_FAILED"),
            ("3", "fruits", "ROLLBACK_COMPLETE"),
        ]
        self.at = -1

    def describe_stacks(self, StackName: str) -> dict[str, Any]:
        self.at += 1
        return {"Stacks": [{"StackId": "arn", "StackStatus": self.states[self.at]}]}

    def get_paginator(self, operation: str) -> Any:
        return self

    def paginate(self, StackName: str) -> list[dict[str, Any]]:
        happened = [
            {"EventId": one, "LogicalResourceId": name, "ResourceStatus": status, "ResourceStatusReason": "no permission"}
            for one, name, status in self.log[: self.at + 1]
        ]
        return [{"StackEvents": happened[::-1]}]


def test_what_fails_is_printed_with_its_reason_as_it_happens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(infrastructure, "WAIT", 0)
    assert infrastructure.follow(Failing(), "arn", set()) == "ROLLBACK_COMPLETE"
    assert capsys.readouterr().out.splitlines() == [
        "CREATE_FAILED          Role                         no permission",
        "ROLLBACK_COMPLETE      fruits                       no permission",
    ]


def test_down_deletes_all_but_the_bucket_and_says_how_to_delete_that(aws: None, capsys: pytest.CaptureFixture[str]) -> None:
    infrastructure.main(["up"])
    bucket = cloud.outputs(SETTINGS)["Bucket"]
    capsys.readouterr()
    infrastructure.main(["down", "--yes"])
    said = capsys.readouterr().out
    assert f"Kept: s3://{bucket}" in said
    assert [item["Name"] for item in boto3.client("s3", region_name=REGION).list_buckets()["Buckets"]] == [bucket]
    ec2 = boto3.client("ec2", region_name=REGION)
    assert not ec2.describe_vpcs(Filters=[{"Name": "cidr", "Values": ["10.20.0.0/16"]}])["Vpcs"]
    # The command that it prints does what it says.
    exec(said.partition('-c "')[2].rpartition('"')[0], {})
    assert boto3.client("s3", region_name=REGION).list_buckets()["Buckets"] == []


def test_down_removes_what_emr_has_added_to_the_network(aws: None, calls: list[tuple[str, dict[str, Any]]]) -> None:
    infrastructure.main(["up"])
    ec2, outputs = boto3.client("ec2", region_name=REGION), cloud.outputs(SETTINGS)
    primary, core = outputs["PrimarySecurityGroup"], outputs["CoreSecurityGroup"]
    for one, other in ((primary, core), (core, primary)):
        pair = [{"GroupId": other}]
        rule = {"IpProtocol": "tcp", "FromPort": 0, "ToPort": 65535, "UserIdGroupPairs": pair}
        ec2.authorize_security_group_ingress(GroupId=one, IpPermissions=[rule])
    vpc = ec2.describe_security_groups(GroupIds=[core])["SecurityGroups"][0]["VpcId"]
    tags = [{"Key": "Name", "Value": "emr-service-vpce"}]
    ec2.create_vpc_endpoint(
        VpcId=vpc,
        VpcEndpointType="Interface",
        ServiceName=f"com.amazonaws.{REGION}.elasticmapreduce",
        TagSpecifications=[{"ResourceType": "vpc-endpoint", "Tags": tags}],
    )
    infrastructure.remove_additions_of_emr(ec2, outputs)
    assert_only_ours(ec2, primary, core)
    calls.clear()
    infrastructure.main(["down", "--yes"])
    operations = [operation for operation, _ in calls]
    assert operations.index("DescribeVpcEndpoints") < operations.index("DeleteStack"), "else the stack could not be deleted"


def test_down_again_goes_on_where_half_of_the_network_is_gone(aws: None, stack: Any) -> None:
    infrastructure.main(["up"])
    ec2, outputs = boto3.client("ec2", region_name=REGION), cloud.outputs(SETTINGS)
    stack().status = "DELETE_FAILED"
    ec2.delete_security_group(GroupId=outputs["CoreSecurityGroup"])
    infrastructure.remove_additions_of_emr(ec2, outputs)
    (group,) = ec2.describe_security_groups(GroupIds=[outputs["ServiceAccessSecurityGroup"]])["SecurityGroups"]
    assert group["IpPermissions"] == []


def test_down_takes_the_launchers_policy_from_whoever_has_it(aws: None, capsys: pytest.CaptureFixture[str]) -> None:
    """IAM deletes no policy that somebody has: the stack would be DELETE_FAILED."""
    infrastructure.main(["up"])
    iam, arn = boto3.client("iam", region_name=REGION), cloud.outputs(SETTINGS)["LauncherPolicy"]
    iam.create_user(UserName="ana")
    iam.create_group(GroupName="pomologists")
    iam.create_role(RoleName="ci", AssumeRolePolicyDocument="{}")
    iam.attach_user_policy(UserName="ana", PolicyArn=arn)
    iam.attach_group_policy(GroupName="pomologists", PolicyArn=arn)
    iam.attach_role_policy(RoleName="ci", PolicyArn=arn)
    infrastructure.main(["down", "--yes"])
    said = capsys.readouterr().out
    assert iam.list_attached_user_policies(UserName="ana")["AttachedPolicies"] == []
    assert iam.list_attached_group_policies(GroupName="pomologists")["AttachedPolicies"] == []
    assert iam.list_attached_role_policies(RoleName="ci")["AttachedPolicies"] == []
    assert "Took LauncherPolicy from user ana, group pomologists, role ci" in said


def test_down_deletes_nothing_while_a_permission_set_has_the_launchers_policy(aws: None) -> None:
    infrastructure.main(["up"])
    iam, arn = boto3.client("iam", region_name=REGION), cloud.outputs(SETTINGS)["LauncherPolicy"]
    role = "AWSReservedSSO_Pomology_0123456789abcdef"
    iam.create_role(RoleName=role, Path="/aws-reserved/sso.amazonaws.com/", AssumeRolePolicyDocument="{}")
    iam.attach_role_policy(RoleName=role, PolicyArn=arn)
    with pytest.raises(SystemExit, match="Pomology has LauncherPolicy: take it out of that permission set, in IAM Identity"):
        infrastructure.main(["down", "--yes"])
    assert set(cloud.outputs(SETTINGS)) == OUTPUTS


def test_down_waits_for_the_end_of_a_cluster_in_the_network(
    aws: None, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    infrastructure.main(["up"])
    subnets, states = set(cloud.outputs(SETTINGS)["Subnets"].split(",")), ["TERMINATING", "TERMINATING"]
    looks = []

    def look(emr: Any, where: set[str]) -> dict[str, str]:
        looks.append([operation for operation, _ in calls].count("DeleteStack"))
        assert where == subnets
        return {"j-1": states.pop()} if states else {}

    monkeypatch.setattr(endpoint, "list_clusters", look)
    infrastructure.main(["down", "--yes"])
    assert looks == [0, 0, 0]


def test_down_stops_the_serverless_application_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infrastructure, "WAIT", 0)
    states, asked = ["STARTING", "STARTED", "STARTED", "STOPPING", "STOPPED"], []

    class Serverless:
        def get_application(self, applicationId: str) -> dict[str, Any]:
            return {"application": {"state": states.pop(0)}}

        def stop_application(self, applicationId: str) -> None:
            asked.append((applicationId, len(states)))

    infrastructure.stop_application(Serverless(), "a-1")
    assert (asked, states) == ([("a-1", 3)], [])


def assert_only_ours(ec2: Any, primary: str, core: str) -> None:
    groups = ec2.describe_security_groups(GroupIds=[primary, core])["SecurityGroups"]
    assert [group["IpPermissions"] for group in groups] == [[], []]
    left = [e["ServiceName"] for e in ec2.describe_vpc_endpoints()["VpcEndpoints"] if e["State"] != "deleted"]
    assert left == [f"com.amazonaws.{REGION}.s3"]


def test_down_waits_for_the_cluster_to_be_given_back(aws: None) -> None:
    infrastructure.main(["up"])
    instances = {"KeepJobFlowAliveWhenNoSteps": True, "MasterInstanceType": "m6i.xlarge", "InstanceCount": 1}
    emr = boto3.client("emr", region_name=REGION)
    one = emr.run_job_flow(Name="fruits", ReleaseLabel="emr-7.13.0", Instances=instances)["JobFlowId"]
    with pytest.raises(SystemExit, match=rf"cluster {one} is up, in the network of the stack\. Run `make cloud-down` first"):
        infrastructure.main(["down", "--yes"])


def test_down_asks_first(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    infrastructure.main(["up"])
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(SystemExit, match="nothing deleted"):
        infrastructure.main(["down"])
    assert set(cloud.outputs(SETTINGS)) == OUTPUTS


def test_where_there_is_no_stack_down_says_so(aws: None, capsys: pytest.CaptureFixture[str]) -> None:
    infrastructure.main(["down", "--yes"])
    assert capsys.readouterr().out == "No stack 'fruits' in eu-west-3; nothing to delete.\n"


def test_the_makefile_has_a_target_for_each_thing_to_do() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("cloud-setup", "wheelhouse", "cloud-up", "cloud-status", "cloud-down", "cloud-delete"):
        assert f"\n{target}: .venv/run ## on AWS: " in makefile
