"""Check what the start of a cluster needs, a line each, and stop at the first thing that is wrong, with what mends it.

usage: python -m bootstrap.aws.check [--release LABEL]

Nothing is rented. The exit status is 0 if all is well, 1 if not.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from bootstrap.aws import cloud, cluster, cost, infrastructure, quotas, residency, wheelhouse

# CloudFormation compares the template with the one before, not with what there is: it sees nothing that was removed by hand.
MEND = (
    "`make cloud-setup`, or, if that has nothing to change, `make cloud-delete cloud-setup`, makes it anew; the bucket stays"
)
DAYS = 365  # after which prices.yaml is too old to tell what a cluster costs


@dataclass
class Project:
    """Hold what the checks look at; AWS is asked for the stack's outputs once, by the first check that needs them."""

    settings: Mapping[str, Any]
    release: str

    @property
    def region(self) -> str:
        return str(self.settings["region"])

    @cached_property
    def outputs(self) -> dict[str, str]:
        return cloud.outputs(dict(self.settings))

    @cached_property
    def request(self) -> dict[str, Any]:
        return cluster.request(dict(self.settings), self.outputs, self.release)

    def client(self, service: str) -> Any:
        return cloud.client(service, self.region)


def main(argv: list[str]) -> int:
    settings = cloud.settings()
    parser = ArgumentParser(usage=(__doc__ or "").partition("usage: ")[2].partition("\n")[0])
    parser.add_argument("--release", default=settings["cluster"]["ReleaseLabel"])
    project = Project(settings, parser.parse_args(argv).release)
    for check in CHECKS:
        name = check.__name__.removeprefix("check_")
        try:
            with cloud.errors_in_words(name):
                found = check(project)
        except SystemExit as wrong:
            print(f"WRONG  {name:12} {str(wrong).removeprefix(f'{name}: ')}")
            return 1
        print(f"ok     {name:12} {found}", flush=True)
    print("\nNext:  make cloud-up")
    return 0


def check_region(project: Project) -> str:
    """Check that the region is in the EU, and that requests go there: before the first of them."""
    residency.require(project.region, [], remotes={})
    return residency.describe_region(project.region)


def check_credentials(project: Project) -> str:
    """Check that AWS knows who asks."""
    return str(project.client("sts").get_caller_identity()["Arn"])


def check_stack(project: Project) -> str:
    """Check that cluster.yaml knows the release, and that the stack has all that cluster.yaml takes from it."""
    wheelhouse.pins(dict(project.settings), project.release)
    return f"{project.settings['stack']}; {project.request['Name']} would be {project.release}"


def check_quotas(project: Project) -> str:
    """Check that the account may run so many vCPUs."""
    settings, outputs, executors = dict(project.settings), project.outputs, project.settings["executors"]
    needs = [cluster.vcpus(settings, outputs)]
    if "ServerlessApplication" in outputs:
        needs.append(cluster.vcpus_of_job(settings, outputs))
    return "; ".join(quotas.require(project.region, each, executors) for each in needs)


def check_roles(project: Project) -> str:
    """Check that the roles of the stack are there, and those of AWS itself."""
    iam = project.client("iam")  # one for all regions; it holds names, no data
    outputs = project.outputs
    iam.get_role(RoleName=outputs["ServiceRole"].rpartition("/")[2])
    profile = iam.get_instance_profile(InstanceProfileName=outputs["InstanceProfile"])["InstanceProfile"]
    if not profile["Roles"]:
        raise SystemExit(f"the nodes' instance profile {outputs['InstanceProfile']} has no role: {MEND}")
    linked = infrastructure.linked_roles(is_serverless="ServerlessApplication" in outputs)
    for service, name in linked.items():
        try:
            iam.get_role(RoleName=name)
        except iam.exceptions.NoSuchEntityException:
            raise SystemExit(
                f"no {name}, a role of AWS that {service} needs. An administrator makes it: `make cloud-setup`, or "
                f"`aws iam create-service-linked-role --aws-service-name {service}`"
            ) from None
    return f"{outputs['ServiceRole'].rpartition('/')[2]}, {', '.join(linked.values())}"


def check_bucket(project: Project) -> str:
    """Check that the bucket is in the EU, and that one may write to it."""
    name, key = project.outputs["Bucket"], "staging/check"
    residency.require(project.region, [name], remotes={})
    s3 = project.client("s3")
    s3.put_object(Bucket=name, Key=key, Body=b"")
    s3.delete_object(Bucket=name, Key=key)
    return f"s3://{name}"


def check_network(project: Project) -> str:
    """Check that nodes have addresses, a way to S3, and one to EMR."""
    ec2, outputs = project.client("ec2"), project.outputs
    subnets = ec2.describe_subnets(SubnetIds=outputs["Subnets"].split(","))["Subnets"]
    free = min(subnet["AvailableIpAddressCount"] for subnet in subnets)
    if free <= project.settings["executors"]:
        raise SystemExit(f"a subnet has {free} free addresses, and {project.settings['executors'] + 1} nodes need one each")
    service = f"com.amazonaws.{project.region}.s3"
    filters = [{"Name": "vpc-id", "Values": [subnets[0]["VpcId"]]}, {"Name": "service-name", "Values": [service]}]
    endpoints = ec2.describe_vpc_endpoints(Filters=filters)["VpcEndpoints"]
    if not [each for each in endpoints if each["State"].lower() == "available"]:
        raise SystemExit(f"no endpoint of {service} is available in {subnets[0]['VpcId']}, so nodes cannot start; {MEND}")
    group = outputs["ServiceAccessSecurityGroup"]
    (found,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    port = 443 if project.release.startswith("emr-spark-") else 9443  # by which the nodes reach EMR
    # A rule for all protocols has no ports.
    if not any(rule.get("FromPort", 0) <= port <= rule.get("ToPort", port) for rule in found["IpPermissions"]):
        raise SystemExit(f"{group} does not admit port {port}, which {project.release} needs; {MEND}")
    return f"{len(subnets)} subnets, {free:,} addresses; S3 by {endpoints[0]['VpcEndpointId']}; EMR by port {port}"


def check_wheelhouse(project: Project) -> str:
    """Check that Python for the nodes is in the bucket."""
    name, folder = project.outputs["Bucket"], wheelhouse.folder(wheelhouse.pins(dict(project.settings), project.release))
    files = [wheelhouse.INDEX, *([wheelhouse.ARCHIVE] if "ServerlessApplication" in project.outputs else [])]
    for file in files:
        if not wheelhouse.exists(project.client("s3"), name, folder, file):
            again = "" if project.release == project.settings["cluster"]["ReleaseLabel"] else f" RELEASE={project.release}"
            raise SystemExit(f"no s3://{name}/{folder}/{file}: `make wheelhouse{again}`")
    return f"s3://{name}/{folder}"


def check_remote(project: Project) -> str:
    """Check that DVC has a remote on S3, in the EU."""
    from dvc.config import Config  # slow to import

    name = Config.from_cwd().get("core", {}).get("remote")
    settings = residency.dvc_remotes().get(name)
    if settings is None or not settings["url"].startswith("s3://"):
        found = f"DVC's default remote is {name} ({settings['url']})" if settings else "DVC has no default remote"
        raise SystemExit(f"{found}: `make remote BUCKET={project.outputs['Bucket']}`")
    residency.require(project.region, [], remotes={name: settings})
    return f"{name}, {settings['url']}"


def check_prices(project: Project) -> str:
    """Check that what the cluster costs can be told."""
    known = cost.load()
    low, high = cluster.per_hour(project.request, known)
    days = (datetime.now(UTC).date() - known["read"]).days
    if days > DAYS:
        raise SystemExit(f"{cost.PRICES.name} was read {days} days ago: look its prices up again, and set its `read`")
    return f"{low:.2f} to {high:.2f} EUR an hour, by prices of {known['read']}"


CHECKS = [
    check_region,
    check_credentials,
    check_stack,
    check_quotas,
    check_roles,
    check_bucket,
    check_network,
    check_wheelhouse,
    check_remote,
    check_prices,
]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
