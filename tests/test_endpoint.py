"""endpoint.py: EMR's own endpoint is told of, deleted when nothing needs it, and waited for."""

import re
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from moto import mock_aws

from bootstrap.aws import cloud, cluster, endpoint

SETTINGS = cloud.settings()
REGION = SETTINGS["region"]


@pytest.fixture
def ec2(keys_of_nobody: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A network with the endpoint of EMR, and one that is not EMR's."""
    monkeypatch.setattr(endpoint, "WAIT", 0)
    with mock_aws():
        ec2 = boto3.client("ec2", region_name=REGION)
        vpc = ec2.create_vpc(CidrBlock="10.20.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.20.0.0/20")["Subnet"]["SubnetId"]
        for name in (endpoint.NAME, "ours"):
            ec2.create_vpc_endpoint(
                VpcId=vpc,
                VpcEndpointType="Interface",
                ServiceName=f"com.amazonaws.{REGION}.elasticmapreduce",
                SubnetIds=[subnet],
                TagSpecifications=[{"ResourceType": "vpc-endpoint", "Tags": [{"Key": "Name", "Value": name}]}],
            )
        monkeypatch.setattr(cloud, "outputs", lambda settings: {"Vpc": vpc, "Subnets": f"{subnet},subnet-2"})
        yield ec2


@pytest.fixture
def emr(ec2: Any) -> Any:
    return boto3.client("emr", region_name=REGION)


def left(ec2: Any) -> list[str]:
    """Names of the endpoints that are there."""
    found = ec2.describe_vpc_endpoints()["VpcEndpoints"]
    return sorted(tag["Value"] for each in found if each["State"] != "deleted" for tag in each["Tags"])


def start(emr: Any, name: str, subnet: str = "") -> str:
    """Start a cluster, in our network unless `subnet` is another one."""
    where = subnet or cloud.outputs(SETTINGS)["Subnets"].split(",")[0]
    instances = {"KeepJobFlowAliveWhenNoSteps": True, "MasterInstanceType": "m6i.xlarge", "InstanceCount": 1}
    request = {"Name": name, "ReleaseLabel": "emr-7.13.0", "Instances": instances | {"Ec2SubnetId": where}}
    return str(emr.run_job_flow(**request)["JobFlowId"])


def test_cloud_down_deletes_it_and_no_other(ec2: Any, emr: Any, capsys: pytest.CaptureFixture[str]) -> None:
    start(emr, SETTINGS["cluster"]["Name"])
    cluster.main(["down", "--yes"])
    assert left(ec2) == ["ours"]
    assert capsys.readouterr().out.endswith("The endpoint is deleted.\n")


def test_cloud_down_deletes_it_also_after_a_cluster_that_ended_by_itself(ec2: Any) -> None:
    cluster.main(["down"])
    assert left(ec2) == ["ours"]


def test_a_cluster_elsewhere_does_not_need_it(ec2: Any, emr: Any) -> None:
    start(emr, "other", "subnet-of-others")
    endpoint.remove(SETTINGS)
    assert left(ec2) == ["ours"]


def test_while_another_cluster_is_up_in_the_network_it_stays(ec2: Any, emr: Any, capsys: pytest.CaptureFixture[str]) -> None:
    other = start(emr, "other")
    endpoint.remove(SETTINGS)
    assert left(ec2) == [endpoint.NAME, "ours"]
    assert f"It stays, and is paid for: {other} may need it" in capsys.readouterr().out


def test_the_end_of_the_cluster_is_waited_for(ec2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states, at_each_look = ["TERMINATING", "TERMINATING"], []

    def look(emr: Any, subnets: set[str]) -> dict[str, str]:
        at_each_look.append(left(ec2))
        return {"j-1": states.pop()} if states else {}

    monkeypatch.setattr(endpoint, "list_clusters", look)
    endpoint.remove(SETTINGS)
    assert at_each_look == [[endpoint.NAME, "ours"]] * 3
    assert left(ec2) == ["ours"]


def test_its_deletion_is_waited_for_and_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [["vpce-1"], ["vpce-1"], ["vpce-1"], []]
    asked = []

    class Slow:
        def delete_vpc_endpoints(self, VpcEndpointIds: list[str]) -> dict[str, Any]:
            asked.append(VpcEndpointIds)
            return {"Unsuccessful": []}

    monkeypatch.setattr(endpoint, "WAIT", 0)
    monkeypatch.setattr(endpoint, "find", lambda ec2, vpc: [{"VpcEndpointId": each} for each in looks.pop(0)])
    endpoint.delete(Slow(), "vpc-1")
    assert (looks, asked) == ([], [["vpce-1"]])


def test_a_refusal_ends_it_with_the_reason(ec2: Any) -> None:
    class Refusing:
        def delete_vpc_endpoints(self, VpcEndpointIds: list[str]) -> dict[str, Any]:
            why = {"Code": "OperationNotPermitted", "Message": "managed by another service"}
            return {"Unsuccessful": [{"ResourceId": each, "Error": why} for each in VpcEndpointIds]}

        def get_paginator(self, operation: str) -> Any:
            return ec2.get_paginator(operation)

    with pytest.raises(SystemExit, match=r"endpoint: vpce-\w+ is not deleted: OperationNotPermitted: managed by another"):
        endpoint.delete(Refusing(), cloud.outputs(SETTINGS)["Vpc"])


def test_cloud_status_tells_of_it_and_what_it_costs(ec2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.main(["status"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("No cluster")
    assert re.fullmatch(
        r"Endpoint vpce-\w+ of EMR: some 0\.011 USD an hour \(this price is not confirmed\), "
        r"until `make cloud-down` deletes it",
        said[1],
    )
    assert len(said) == 2


def test_where_there_is_none_nothing_is_said_or_waited_for(
    ec2: Any, emr: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(emr, "other")
    monkeypatch.setattr(cloud, "outputs", lambda settings: {"Vpc": "vpc-2", "Subnets": "subnet-3"})
    endpoint.tell(SETTINGS)
    endpoint.remove(SETTINGS)
    assert capsys.readouterr().out == ""


def test_without_a_stack_nothing_is_said(
    ec2: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(settings: dict[str, Any]) -> dict[str, str]:
        raise SystemExit("cloud: no stack")

    monkeypatch.setattr(cloud, "outputs", missing)
    endpoint.tell(SETTINGS)
    endpoint.remove(SETTINGS)
    assert (capsys.readouterr().out, left(ec2)) == ("", [endpoint.NAME, "ours"])
