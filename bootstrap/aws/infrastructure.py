"""Make, update or delete what lasts between clusters: the stack of infrastructure.yaml, in the region of cluster.yaml.

usage: python -m bootstrap.aws.infrastructure up              as often as you like; prints what it does, or why it cannot
       python -m bootstrap.aws.infrastructure down [--yes]    all but the bucket
"""

import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from bootstrap.aws import cloud, endpoint, residency

TEMPLATE = Path(__file__).with_name("infrastructure.yaml")
WAIT = 3  # seconds between two requests
# Roles of AWS itself that a cluster with spot nodes needs, by the service that acts in them. EMR may not make them.
LINKED = {
    "spot.amazonaws.com": "AWSServiceRoleForEC2Spot",
    "ec2fleet.amazonaws.com": "AWSServiceRoleForEC2Fleet",
    "elasticmapreduce.amazonaws.com": "AWSServiceRoleForEMRCleanup",
}
LINKED_OF_SERVERLESS = {"ops.emr-serverless.amazonaws.com": "AWSServiceRoleForAmazonEMRServerless"}


def main(argv: list[str]) -> None:
    parser = ArgumentParser(usage=(__doc__ or "").partition("usage: ")[2])
    parser.add_argument("command", choices=["up", "down"])
    parser.add_argument("--yes", action="store_true")
    arguments = parser.parse_args(argv)
    settings = cloud.settings()
    if arguments.command == "up":
        up(settings)
    else:
        down(settings, arguments.yes)


def up(settings: dict[str, Any]) -> None:
    """Make the stack, or update it, to what the template and cluster.yaml say.

    Raises
    ------
    SystemExit
        CloudFormation failed; the reason has been printed, and the stack is as it was before
    """
    region, name = settings["region"], settings["stack"]
    residency.require(region, [], remotes={})  # no data is sent, and the bucket of a remote may be gone
    cloudformation = cloud.client("cloudformation", region)
    stack = settle(cloudformation, name)
    is_new = stack is None or stack["StackStatus"] == "REVIEW_IN_PROGRESS"
    change = {"StackName": name, "ChangeSetName": f"setup-{time.time_ns()}"}
    made = cloudformation.create_change_set(
        **change,
        ChangeSetType="CREATE" if is_new else "UPDATE",
        TemplateBody=TEMPLATE.read_text(),
        Parameters=[{"ParameterKey": key, "ParameterValue": str(value)} for key, value in settings["parameters"].items()],
        Capabilities=["CAPABILITY_IAM"],
        Tags=[{"Key": "project", "Value": name}],
        ImportExistingResources=True,  # the bucket that an earlier stack of the name has left
    )
    if not wait_for_changes(cloudformation, change):
        print(f"Stack {name} in {region} is up to date; nothing to change.")
    else:
        seen = event_ids(cloudformation, made["StackId"])
        cloudformation.execute_change_set(**change)
        end = follow(cloudformation, made["StackId"], seen)
        if end not in ("CREATE_COMPLETE", "UPDATE_COMPLETE", "IMPORT_COMPLETE"):
            raise SystemExit(f"infrastructure: stack {name} in {region} is {end}; the reason is above, where it says FAILED")
    outputs = cloud.outputs(settings)
    link_roles(cloud.client("iam", region), linked_roles(is_serverless="ServerlessApplication" in outputs))
    print("\n".join(f"{key:28} {value}" for key, value in sorted(outputs.items())))
    if not cloud.client("ec2", region).get_ebs_encryption_by_default()["EbsEncryptionByDefault"]:
        command = f"aws ec2 enable-ebs-encryption-by-default --region {region}"
        print(f"\nNew disks are not encrypted in this account and region. `{command}` encrypts them, and costs nothing.")
    print("\nNext:  make wheelhouse")


def down(settings: dict[str, Any], yes: bool) -> None:
    """Delete the stack, but not the bucket, which holds the data.

    Raises
    ------
    SystemExit
        a cluster is up, the answer was not yes, a permission set has the launcher's policy, or CloudFormation failed
    """
    region, name = settings["region"], settings["stack"]
    residency.require(region, [], remotes={})  # no data is sent, and the bucket of a remote may be gone
    cloudformation = cloud.client("cloudformation", region)
    stack = find(cloudformation, name)
    if stack is None:
        print(f"No stack {name!r} in {region}; nothing to delete.")
        return
    outputs, emr = cloud.outputs_of(stack), cloud.client("emr", region)
    if cluster_id := cloud.find_cluster(emr, settings["cluster"]["Name"]) or endpoint.find_user(emr, outputs):
        raise SystemExit(
            f"infrastructure: cluster {cluster_id} is up, in the network of the stack. Run `make cloud-down` first."
        )
    if not yes and not cloud.confirm(f"Delete stack {name} in {region}: network, roles, everything but the bucket?"):
        raise SystemExit("infrastructure: nothing deleted")
    if policy := outputs.get("LauncherPolicy"):
        detach(cloud.client("iam", region), policy)
    if application := outputs.get("ServerlessApplication"):
        stop_application(cloud.client("emr-serverless", region), application)
    while endpoint.list_clusters(emr, endpoint.subnets(outputs)):  # one that is ending still holds the network
        time.sleep(WAIT)
    remove_additions_of_emr(cloud.client("ec2", region), outputs)
    seen = event_ids(cloudformation, stack["StackId"])
    cloudformation.delete_stack(StackName=name)
    end = follow(cloudformation, stack["StackId"], seen)
    if end != "DELETE_COMPLETE":
        raise SystemExit(f"infrastructure: stack {name} in {region} is {end}; the reason is above, where it says FAILED")
    if bucket := outputs.get("Bucket"):
        print(f"Kept: s3://{bucket}, with all data; `make cloud-setup` takes it back in. To delete it too, for good:")
        deletion = f"b = boto3.resource('s3', '{region}').Bucket('{bucket}'); b.object_versions.delete(); b.delete()"
        print(f'  .venv/bin/python -c "import boto3; {deletion}"')


def linked_roles(is_serverless: bool) -> dict[str, str]:
    """Return the names of the roles of AWS itself that the stack needs, by the service that acts in them."""
    return LINKED | (LINKED_OF_SERVERLESS if is_serverless else {})


def link_roles(iam: Any, services: Iterable[str]) -> None:
    """Make the roles by which these services of AWS act in the account, once in an account's life; they cost nothing."""
    for service in services:
        try:
            role = iam.create_service_linked_role(AWSServiceName=service)["Role"]["RoleName"]
        except ClientError as error:
            if "has been taken" not in str(error):
                raise
        else:
            print(f"Made the role {role}, of {service}")


def settle(cloudformation: Any, name: str) -> dict[str, Any] | None:
    """Return the stack once it can be updated, or None if there is none: wait, and delete what a first attempt has left.

    Raises
    ------
    SystemExit
        its deletion has failed, now or before
    """
    stack = find(cloudformation, name)
    if stack and stack["StackStatus"].endswith("_IN_PROGRESS") and stack["StackStatus"] != "REVIEW_IN_PROGRESS":
        print(f"Stack {name} is {stack['StackStatus']}, by an earlier call or another one; waiting for it", flush=True)
        follow(cloudformation, stack["StackId"], event_ids(cloudformation, stack["StackId"]))
        stack = find(cloudformation, name)
    if stack and stack["StackStatus"] in ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED"):  # of a first attempt; no update is taken
        cloudformation.delete_stack(StackName=name)
        follow(cloudformation, stack["StackId"], event_ids(cloudformation, stack["StackId"]))
        stack = find(cloudformation, name)
    if stack and stack["StackStatus"] == "DELETE_FAILED":
        raise SystemExit(
            f"infrastructure: stack {name} is DELETE_FAILED; `make cloud-delete` goes on with that, then `make cloud-setup`"
        )
    return stack


def detach(iam: Any, policy: str) -> None:
    """Take the policy from all that have it: IAM deletes none that is attached.

    Raises
    ------
    SystemExit
        a permission set of IAM Identity Center has it, whose roles cannot be changed from here
    """
    try:
        pages = list(iam.get_paginator("list_entities_for_policy").paginate(PolicyArn=policy))
    except iam.exceptions.NoSuchEntityException:  # deleted already, by a call that failed later
        return
    kinds = {"User": iam.detach_user_policy, "Group": iam.detach_group_policy, "Role": iam.detach_role_policy}
    found = [(kind, each[f"{kind}Name"]) for kind in kinds for page in pages for each in page[f"Policy{kind}s"]]
    for _, name in found:
        if name.startswith("AWSReservedSSO_"):
            permissions = name.removeprefix("AWSReservedSSO_").rpartition("_")[0]
            raise SystemExit(
                f"infrastructure: nothing deleted: {permissions} has LauncherPolicy: take it out of that permission set, "
                "in IAM Identity Center, then repeat the command"
            )
    for kind, name in found:
        kinds[kind](**{f"{kind}Name": name, "PolicyArn": policy})
    if found:
        print("Took LauncherPolicy from", ", ".join(f"{kind.lower()} {name}" for kind, name in found))


def stop_application(serverless: Any, application: str) -> None:
    """Stop the application, and wait for it: for a quarter of an hour after a job run, CloudFormation cannot delete it."""
    is_told = False
    while (state := serverless.get_application(applicationId=application)["application"]["state"]) in (
        "STARTING",
        "STARTED",
        "STOPPING",
    ):
        if state == "STARTED" and not is_told:
            serverless.stop_application(applicationId=application)
            is_told = True
        time.sleep(WAIT)


def remove_additions_of_emr(ec2: Any, outputs: Mapping[str, str]) -> None:
    """Delete what EMR has added to our network: its own endpoint, and rules by which security groups name one another.

    CloudFormation does not know of them, and could not delete the network.
    """
    groups = [value for key, value in outputs.items() if key.endswith("SecurityGroup")]
    if not groups:
        return
    endpoint.delete(ec2, outputs["Vpc"])
    # Not by GroupIds, which AWS refuses if one is gone, after a first deletion that failed.
    for group in ec2.describe_security_groups(Filters=[{"Name": "group-id", "Values": groups}])["SecurityGroups"]:
        if group["IpPermissions"]:
            ec2.revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=group["IpPermissions"])
        if group["IpPermissionsEgress"]:
            ec2.revoke_security_group_egress(GroupId=group["GroupId"], IpPermissions=group["IpPermissionsEgress"])


def find(cloudformation: Any, name: str) -> dict[str, Any] | None:
    """Return the stack of that name or id, or None if there is none."""
    try:
        (stack,) = cloudformation.describe_stacks(StackName=name)["Stacks"]
    except ClientError as error:
        if "does not exist" not in str(error):
            raise
        return None
    return dict(stack)


def wait_for_changes(cloudformation: Any, change: Mapping[str, str]) -> bool:
    """Wait for the change set, and return whether it changes anything.

    Raises
    ------
    SystemExit
        CloudFormation refuses the change; with its reason
    """
    while True:
        found = cloudformation.describe_change_set(**change)
        if found["Status"] == "CREATE_COMPLETE":
            return True
        if found["Status"] == "FAILED":
            reason = found.get("StatusReason", "")
            cloudformation.delete_change_set(**change)
            if "didn't contain changes" in reason or "No updates" in reason:
                return False
            raise SystemExit(f"infrastructure: CloudFormation refuses: {reason}")
        time.sleep(WAIT)


def follow(cloudformation: Any, stack_id: str, seen: set[str]) -> str:
    """Print what happens to the stack's resources, except the events in `seen`; return the state in which it ends.

    The stack is found by its id, as a deleted one has no name any more.
    """
    while True:
        stack = find(cloudformation, stack_id)
        for event in events(cloudformation, stack_id):
            if event["EventId"] not in seen and event["ResourceStatus"].endswith(("_COMPLETE", "_FAILED")):
                reason = event.get("ResourceStatusReason", "")
                print(f"{event['ResourceStatus']:22} {event['LogicalResourceId']:28} {reason}".rstrip())
            seen.add(event["EventId"])
        state = str(stack["StackStatus"]) if stack else "DELETE_COMPLETE"
        if not state.endswith("_IN_PROGRESS"):
            return state
        time.sleep(WAIT)


def event_ids(cloudformation: Any, stack_id: str) -> set[str]:
    return {event["EventId"] for event in events(cloudformation, stack_id)}


def events(cloudformation: Any, name: str) -> list[dict[str, Any]]:
    """List the events of the stack, oldest first; none if there is no such stack."""
    try:
        pages = cloudformation.get_paginator("describe_stack_events").paginate(StackName=name)
        return [event for page in pages for event in page["StackEvents"]][::-1]
    except ClientError as error:
        if "does not exist" not in str(error):
            raise
        return []


if __name__ == "__main__":
    with cloud.errors_in_words("infrastructure"):
        main(sys.argv[1:])
