"""Delete the interface endpoint that EMR leaves behind in our network: its policy lets it make one, and not delete it.

It is named emr-service-vpce, serves one cluster after the other, and is paid for by the hour, also when none is up.
"""

import time
from collections.abc import Mapping
from typing import Any

from bootstrap.aws import cloud

NAME = "emr-service-vpce"  # AmazonEMRServicePolicy_v2 allows no other one
USD = 0.011  # an hour, in each zone; the price of Paris is not confirmed
WAIT = 3  # seconds between two requests


def tell(settings: dict[str, Any]) -> None:
    """Print which of them are there, and what they cost."""
    for each in find(cloud.client("ec2", settings["region"]), network(settings)[0]):
        usd = USD * max(len(each.get("SubnetIds", [])), 1)
        print(
            f"Endpoint {each['VpcEndpointId']} of EMR: some {usd:.3f} USD an hour (this price is not confirmed), "
            "until `make cloud-down` deletes it"
        )


def remove(settings: dict[str, Any]) -> None:
    """Delete them once the cluster has ended; if another cluster is up in the network, say so and keep them."""
    ec2, emr = (cloud.client(service, settings["region"]) for service in ("ec2", "emr"))
    vpc, where = network(settings)
    if not find(ec2, vpc):
        return
    print("Waiting for the end of the cluster, some minutes, to delete the endpoint that EMR leaves behind", flush=True)
    while clusters := list_clusters(emr, where):
        if up := sorted(name for name, state in clusters.items() if state in cloud.UP):
            print(f"It stays, and is paid for: {', '.join(up)} may need it. End that, then `make cloud-down` again.")
            return
        time.sleep(WAIT)
    delete(ec2, vpc)
    print("The endpoint is deleted.")


def delete(ec2: Any, vpc: str) -> None:
    """Delete them, and wait until they are gone: until then they hold subnets and security groups.

    Raises
    ------
    SystemExit
        AWS refuses to delete one; with its reason
    """
    asked: set[str] = set()
    while found := {each["VpcEndpointId"] for each in find(ec2, vpc)}:
        if new := sorted(found - asked):
            for refused in ec2.delete_vpc_endpoints(VpcEndpointIds=new).get("Unsuccessful", []):
                why = refused["Error"]
                raise SystemExit(f"endpoint: {refused['ResourceId']} is not deleted: {why['Code']}: {why['Message']}")
            asked.update(new)
        time.sleep(WAIT)


def find(ec2: Any, vpc: str) -> list[dict[str, Any]]:
    """List those in the network that are not deleted yet."""
    ours = [{"Name": "vpc-id", "Values": [vpc]}, {"Name": "tag:Name", "Values": [NAME]}]
    pages = ec2.get_paginator("describe_vpc_endpoints").paginate(Filters=ours)
    return [each for page in pages for each in page["VpcEndpoints"] if each["State"].lower() != "deleted"]


def network(settings: dict[str, Any]) -> tuple[str, set[str]]:
    """Return the id of the stack's network and those of its subnets; ids that nothing has, if there is no stack."""
    try:
        outputs = cloud.outputs(settings)
    except SystemExit:
        return "none", set()
    return outputs.get("Vpc", "none"), subnets(outputs)


def subnets(outputs: Mapping[str, str]) -> set[str]:
    return set(outputs.get("Subnets", "").split(",")) - {""}


def find_user(emr: Any, outputs: Mapping[str, str]) -> str | None:
    """Find the id of a cluster, of whatever name, that runs or will run in the stack's network; None if there is none."""
    return next((each for each, state in list_clusters(emr, subnets(outputs)).items() if state in cloud.UP), None)


def list_clusters(emr: Any, where: set[str]) -> dict[str, str]:
    """Return the states of the clusters that are up or ending in those subnets, by their ids."""
    pages = emr.get_paginator("list_clusters").paginate(ClusterStates=[*cloud.UP, "TERMINATING"])
    clusters = {}
    for cluster in (cluster for page in pages for cluster in page["Clusters"]):
        attributes = emr.describe_cluster(ClusterId=cluster["Id"])["Cluster"].get("Ec2InstanceAttributes", {})
        if where & {attributes.get("Ec2SubnetId"), *attributes.get("RequestedEc2SubnetIds", [])}:
            clusters[cluster["Id"]] = cluster["Status"]["State"]
    return clusters
