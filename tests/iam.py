"""Who may do what: calls of boto3 as the actions of IAM that they need, decided by policies with AWS's rules as data.

The rules are those of tests/policies/: AWS's reference of actions, resource types and condition keys, and the order in which
policies are evaluated. Nothing is asked of AWS. What is translated here is AWS's Service Authorization Reference.
"""

import json
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import botocore.client
import pytest
import yaml
from moto.core import DEFAULT_ACCOUNT_ID as ACCOUNT
from moto.ec2 import ec2_backends
from moto.emr import emr_backends
from moto.iam import iam_backends
from moto.iam.aws_managed_policies import aws_managed_policies_data

from app import page
from bootstrap.aws import infrastructure

REGION = "eu-west-3"
FOLDER = Path(__file__).with_name("policies")
OF_SERVICE = {"emr": "elasticmapreduce", "service-quotas": "servicequotas"}  # prefix of IAM, where boto3 has another name
OF_OPERATION = {
    "ListObjectsV2": "ListBucket",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "GetBucketReplication": "GetReplicationConfiguration",
    "GetBucketAccelerateConfiguration": "GetAccelerateConfiguration",
}


class Request(NamedTuple):
    """What IAM decides on: an action, on a resource, in a context."""

    action: str
    resource: str = "*"
    context: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.action} on {self.resource} with {dict(self.context)}"


class Template(yaml.SafeLoader):
    """YAML with CloudFormation's tags, which become their arguments."""


Template.add_multi_constructor(
    "!",
    lambda loader, tag, node: (
        loader.construct_scalar(node)
        if isinstance(node, yaml.ScalarNode)
        else loader.construct_sequence(node, deep=True)
        if isinstance(node, yaml.SequenceNode)
        else loader.construct_mapping(node, deep=True)
    ),
)


@cache
def resources() -> dict[str, Any]:
    """The resources of infrastructure.yaml."""
    return dict(yaml.load(infrastructure.TEMPLATE.read_text(), Template)["Resources"])


def policy(name: str, values: Mapping[str, str]) -> dict[str, Any]:
    """The policy of that resource of infrastructure.yaml, with the values of what it refers to."""
    return dict(fill(resources()[name]["Properties"]["PolicyDocument"], values))


def fill(part: Any, values: Mapping[str, str]) -> Any:
    """A part of the template with the values of what it refers to."""
    if isinstance(part, dict):
        return {key: fill(each, values) for key, each in part.items()}
    if isinstance(part, list):
        return [fill(each, values) for each in part]
    if not isinstance(part, str):
        return part
    for key, value in values.items():
        part = value if part == key else part.replace(f"${{{key}}}", value)
    assert "${" not in part, part
    return part


def values(bucket: str, stack: str = "fruits", **roles: str) -> dict[str, str]:
    """What the policies of infrastructure.yaml refer to; `roles` are ARNs, also that of the instance profile."""
    return {
        "AWS::Partition": "aws",
        "AWS::Region": REGION,
        "AWS::AccountId": ACCOUNT,
        "AWS::StackName": stack,
        "Bucket.Arn": f"arn:aws:s3:::{bucket}",
        **{f"{role}.Arn": f"arn:aws:iam::{ACCOUNT}:role/{role}" for role in ("ServiceRole", "NodeRole", "ServerlessRole")},
        "InstanceProfile.Arn": f"arn:aws:iam::{ACCOUNT}:instance-profile/InstanceProfile",
        **{f"{role}.Arn": arn for role, arn in roles.items()},
    }


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@cache
def managed_policy(name: str) -> dict[str, Any]:
    """The policy of AWS of that name, as moto has copied it from AWS."""
    return dict(json.loads(aws_managed_policies_data)[name]["Document"])


@cache
def simulator() -> subprocess.Popen[str]:
    page.fetch(FOLDER, "fetching AWS's rules as data into tests/policies/node_modules")
    return subprocess.Popen(
        [page.find("node"), "simulate.mjs"], cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@cache
def decide(request: Request, policies: str, endpoint: str = "") -> str:
    """The decision on the request by the policies, in JSON: Allowed, ImplicitlyDenied or ExplicitlyDenied.

    Raises
    ------
    ValueError
        AWS has no such action, or it has no such resource or key
    """
    process = simulator()
    assert process.stdin is not None
    assert process.stdout is not None
    asked = {"action": request.action, "resource": request.resource, "context": dict(request.context)}
    asked |= {"policies": json.loads(policies), "endpoint": json.loads(endpoint or "null")}
    print(json.dumps(asked), file=process.stdin, flush=True)
    decided = json.loads(process.stdout.readline())
    if "errors" in decided or decided["ignored"]:
        raise ValueError(f"{request}: {decided}")
    return str(decided["result"])


def is_allowed(request: Request, *policies: dict[str, Any], endpoint: dict[str, Any] | None = None) -> bool:
    """Whether one of the policies allows it, and that of the endpoint through which it is sent."""
    return decide(request, json.dumps(policies), json.dumps(endpoint) if endpoint else "") == "Allowed"


class Call(NamedTuple):
    """A call of boto3."""

    service: str
    operation: str
    arguments: dict[str, Any]


def record(patch: pytest.MonkeyPatch, made: list[Call], but_by: str = "") -> None:
    """Note the calls of this process in `made`, but those by the holder of that access key."""
    send = botocore.client.BaseClient._make_api_call

    def note(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        credentials = client._request_signer._credentials
        if not (credentials and credentials.access_key == but_by):
            made.append(Call(client.meta.service_model.service_name, operation, dict(arguments)))
        return send(client, operation, arguments)

    patch.setattr(botocore.client.BaseClient, "_make_api_call", note)


def needed(call: Call, roles: Mapping[str, str]) -> Iterator[Request]:
    """What the call needs; nothing in the case of a call that everybody may make.

    Parameters
    ----------
    roles : ARN of the role of each instance profile
    """
    service, operation, arguments = call
    prefix, action = OF_SERVICE.get(service, service), OF_OPERATION.get(operation, operation)
    here = {"aws:RequestedRegion": REGION, "aws:SecureTransport": "true"}

    def ask(action: str, resource: str = "*", **context: str) -> Request:
        return Request(action, resource, tuple(sorted((here | context).items())))

    def arn(service: str, resource: str) -> str:
        return f"arn:aws:{service}:{REGION}:{ACCOUNT}:{resource}"

    def tags_of(resource: str, tags: Mapping[str, str]) -> dict[str, str]:
        return {f"aws:{resource}Tag/{key}": value for key, value in tags.items()}

    if service == "sts" and operation == "GetCallerIdentity":
        return
    if service == "s3":
        yield from needed_of_s3(action, arguments, here)
    elif operation == "RunJobFlow":
        tags = tags_of("Request", {tag["Key"]: tag["Value"] for tag in arguments.get("Tags", [])})
        yield ask("elasticmapreduce:RunJobFlow", **tags)
        new = arn("elasticmapreduce", "cluster/j-NEW")  # without tags yet
        yield ask("elasticmapreduce:AddTags", new, **tags)
        for policy in ("AutoTerminationPolicy", "ManagedScalingPolicy"):
            if policy in arguments:
                yield ask(f"elasticmapreduce:Put{policy}", new)
        yield ask("iam:PassRole", arguments["ServiceRole"], **{"iam:PassedToService": "elasticmapreduce.amazonaws.com"})
        yield ask("iam:PassRole", roles[arguments["JobFlowRole"]], **{"iam:PassedToService": "ec2.amazonaws.com"})
    elif service == "emr" and (ids := cluster_ids(arguments)):
        for each in ids:
            tags = {tag["Key"]: tag["Value"] for tag in emr_backends[ACCOUNT][REGION].clusters[each].tags}
            yield ask(f"{prefix}:{action}", arn(prefix, f"cluster/{each}"), **tags_of("Resource", tags))
    elif service == "emr-serverless":
        run = f"/jobruns/{arguments['jobRunId']}" if "jobRunId" in arguments else ""
        yield ask(f"{prefix}:{action}", arn(prefix, f"/applications/{arguments['applicationId']}{run}"))
        if operation == "StartJobRun":
            role = arguments["executionRoleArn"]
            yield ask("iam:PassRole", role, **{"iam:PassedToService": "emr-serverless.amazonaws.com"})
    elif service == "service-quotas" and "QuotaCode" in arguments:
        yield ask(f"{prefix}:{action}", arn(prefix, f"{arguments['ServiceCode']}/{arguments['QuotaCode']}"))
    elif operation == "GetRole":
        yield ask("iam:GetRole", iam_backends[ACCOUNT]["aws"].get_role(arguments["RoleName"]).arn)
    elif operation == "GetInstanceProfile":
        profile = iam_backends[ACCOUNT]["aws"].get_instance_profile(arguments["InstanceProfileName"])
        yield ask("iam:GetInstanceProfile", profile.arn)
    elif operation == "DescribeStacks":
        yield ask("cloudformation:DescribeStacks", arn("cloudformation", f"stack/{arguments['StackName']}/0a1b2c3d"))
    elif operation == "DeleteVpcEndpoints":
        for each in arguments["VpcEndpointIds"]:
            tags = {tag["key"]: tag["value"] for tag in ec2_backends[ACCOUNT][REGION].vpc_end_points[each].get_tags()}
            yield ask("ec2:DeleteVpcEndpoints", arn("ec2", f"vpc-endpoint/{each}"), **tags_of("Resource", tags))
    else:
        yield ask(f"{prefix}:{action}")


def needed_of_s3(action: str, arguments: Mapping[str, Any], here: Mapping[str, str]) -> Iterator[Request]:
    """What a call to S3 needs. To be told that a key is not there, and not that it is forbidden, one must see the bucket."""
    bucket, context = f"arn:aws:s3:::{arguments['Bucket']}", tuple(sorted(here.items()))
    if action == "DeleteObjects":
        for each in arguments["Delete"]["Objects"]:
            yield Request("s3:DeleteObject", f"{bucket}/{each['Key']}", context)
    elif action in ("CopyObject", "UploadPartCopy"):
        source = arguments["CopySource"]
        yield Request("s3:GetObject", f"arn:aws:s3:::{source['Bucket']}/{source['Key']}", context)
        yield Request("s3:PutObject", f"{bucket}/{arguments['Key']}", context)
    elif action in ("HeadObject", "GetObject"):
        yield Request("s3:GetObject", f"{bucket}/{arguments['Key']}", context)
        yield Request("s3:ListBucket", bucket, context)
    else:
        yield Request(f"s3:{action}", f"{bucket}/{arguments['Key']}" if "Key" in arguments else bucket, context)


def cluster_ids(arguments: Mapping[str, Any]) -> list[str]:
    one = arguments.get("ClusterId") or arguments.get("JobFlowId")
    return [one] if one else list(arguments.get("JobFlowIds", []))
