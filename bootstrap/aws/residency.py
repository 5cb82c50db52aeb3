"""Refuse all that would take data out of the European Union, before the first byte leaves.

usage: python -m bootstrap.aws.residency            all buckets, every remote of DVC, all that computes
       python -m bootstrap.aws.residency BUCKET...  these buckets alone

Prints a table to file: who checked what, when, what was found, and the verdict. The exit status is 0 if all stays in the EU,
and 1 if not or if it cannot be known. Region and stack are those of cluster.yaml; no key is ever printed.

A server on this machine (127.0.0.1, localhost) is accepted, as nothing leaves it; the table says so.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from bootstrap.aws import cloud

# A list, not the prefix eu-, with which eu-west-2 (London) and eu-central-2 (Zurich) begin too: they are not in the EU.
EU = {
    "eu-central-1",
    "eu-north-1",
    "eu-south-1",
    "eu-south-2",
    "eu-west-1",
    "eu-west-3",
    "eusc-de-east-1",
}
SERVICES = ("s3", "sts", "cloudformation", "emr", "emr-serverless")
LOOPBACK = ("127.0.0.1", "::1", "localhost")

# What must hold, and what to do if it does not.
REGION = "must be in the EU"
HOST = "must send to AWS in its region"
ACCELERATION = "must not be accelerated"
LOCATION = "must lie in the EU"
REPLICATION = "must not be copied elsewhere"
REMOTE = "must be S3, or on this machine"
ARN = "must be in the region"
ADVICE = {
    REGION: f"Set `region` in bootstrap/aws/cluster.yaml, or that of the remote, to one of {', '.join(sorted(EU))}.",
    HOST: "Unset AWS_ENDPOINT_URL and its like, endpoint_url in ~/.aws/config, endpointurl of the remote.",
    ACCELERATION: "It sends data through points of presence anywhere: suspend it, and unset use_accelerate_endpoint.",
    LOCATION: "Move what it holds to a bucket in the region, or ask for the permission to read its location.",
    REPLICATION: "Remove the rule of replication, or ask for the permission to read the location of its destination.",
    REMOTE: "`make remote BUCKET=...` sets one on S3; `dvc remote remove NAME` removes this one.",
    ARN: "End it, and make another one in the region.",
}
# Errors that leave a setting unknown; the last one is of an answer that is not AWS's, such as the page of a proxy.
UNREADABLE = (ClientError, BotoCoreError, ResponseParserError)
# Codes by which S3 says that a region, or a server, does not offer a setting at all.
NOT_OFFERED = {"MethodNotAllowed", "NotImplemented", "XNotImplemented", "UnsupportedArgument", "UnsupportedOperation"}


class Finding(NamedTuple):
    """Hold one line of the table: what was checked, what must hold, what was found, whether it holds."""

    subject: str
    rule: str
    found: str
    ok: bool


def main(buckets: list[str]) -> int:
    settings = cloud.settings()
    region = settings["region"]
    findings = check(region, buckets, remotes={})
    if not buckets and all(finding.ok for finding in findings):
        outputs = cloud.outputs(settings)
        computers, logs = check_computers(settings, outputs)
        kept = urlsplit(os.environ.get("FEATURE_CACHE", ""))
        findings = check(region, [outputs["Bucket"], *logs, *([kept.netloc] if kept.scheme == "s3" else [])]) + computers
    print(format_table(findings, region))
    return 0 if all(finding.ok for finding in findings) else 1


def require(
    region: str,
    buckets: Iterable[str],
    services: Iterable[str] = SERVICES,
    remotes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Return only if all stays in the EU; the parameters are those of check.

    Raises
    ------
    SystemExit
        something does not; with each such finding, and what to do
    """
    refused = [finding for finding in check(region, buckets, services, remotes) if not finding.ok]
    if refused:
        lines = [f"  {subject} {rule}: {found}. {ADVICE[rule]}" for subject, rule, found, _ in refused]
        raise SystemExit("\n".join(["residency: refused, and nothing was sent:", *lines]))


def require_arn(arn: str, region: str) -> None:
    """Return only if the cluster or application is in the region, which require has accepted; else raise as require does."""
    if (found := arn.split(":")[3]) != region:
        raise SystemExit(
            f"residency: refused, and nothing was sent: {arn} is in {found}, and cluster.yaml says {region}. {ADVICE[ARN]}"
        )


def check_computers(settings: dict[str, Any], outputs: Mapping[str, str]) -> tuple[list[Finding], list[str]]:
    """Check where the cluster that is up and the serverless application are; list also the buckets of the cluster's logs."""
    region = settings["region"]
    arns, logs = [], []
    emr = cloud.client("emr", region)
    if cluster_id := cloud.find_cluster(emr, settings["cluster"]["Name"]):
        about = emr.describe_cluster(ClusterId=cluster_id)["Cluster"]
        arns.append(about["ClusterArn"])
        logs = [urlsplit(about["LogUri"]).netloc] if about.get("LogUri") else []
    if application := outputs.get("ServerlessApplication"):
        serverless = cloud.client("emr-serverless", region)
        arns.append(serverless.get_application(applicationId=application)["application"]["arn"])
    return [Finding(arn.rpartition(":")[2].strip("/"), ARN, arn, arn.split(":")[3] == region) for arn in arns], logs


def check(
    region: str,
    buckets: Iterable[str],
    services: Iterable[str] = SERVICES,
    remotes: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Finding]:
    """Check the region, the hosts of the services, the buckets and DVC's remotes, and list the findings in this order.

    AWS is asked nothing before region and hosts are known to be right.

    Parameters
    ----------
    buckets : names of all buckets that data, code or logs go to
    services : boto3's names of the services that will be called
    remotes : settings of DVC's remotes by name; if None, all those that DVC knows of in the current folder
    """
    findings = [check_region("region", region)]
    if not findings[0].ok:
        return findings
    clients = {service: cloud.client(service, region) for service in {"s3": None, **dict.fromkeys(services)}}
    for service, client in clients.items():
        findings += check_endpoint(f"service {service}", client)
    if not all(finding.ok for finding in findings):
        return findings
    for bucket in dict.fromkeys(buckets):
        findings += check_bucket(f"bucket {bucket}", bucket, clients["s3"])
    for name, remote in (dvc_remotes() if remotes is None else remotes).items():
        findings += check_remote(f"remote {name}", remote)
    return findings


def check_region(subject: str, region: str) -> Finding:
    return Finding(subject, REGION, describe_region(region), region in EU)


def describe_region(region: str) -> str:
    """Return the region with AWS's name for it, such as eu-west-3, Europe (Paris), and say if it is not in the EU."""
    return f"{region}, {region_names().get(region, 'which is unknown')}{'' if region in EU else ', is not in the EU'}"


@cache
def region_names() -> dict[str, str]:
    """Return AWS's names for its regions."""
    partitions = botocore.session.get_session().get_data("endpoints")["partitions"]
    return {region: about["description"] for partition in partitions for region, about in partition["regions"].items()}


def is_local(client: Any) -> bool:
    return urlsplit(client.meta.endpoint_url).hostname in LOOPBACK


def check_endpoint(subject: str, client: Any) -> Iterator[Finding]:
    """Check where the client sends its requests."""
    url, region = urlsplit(client.meta.endpoint_url), client.meta.region_name
    domain = "amazonaws.eu" if region.startswith("eusc-") else "amazonaws.com"
    own = url.scheme == "https" and f".{url.netloc}".endswith(f".{region}.{domain}")
    found = f"{url.netloc}, this machine: nothing leaves" if is_local(client) else client.meta.endpoint_url
    yield Finding(subject, HOST, found, own or is_local(client))
    if client.meta.service_model.service_name == "s3" and (client.meta.config.s3 or {}).get("use_accelerate_endpoint"):
        yield Finding(subject, ACCELERATION, "use_accelerate_endpoint is set in the configuration of AWS", False)


def check_bucket(subject: str, bucket: str, client: Any) -> Iterator[Finding]:
    """Check that what the bucket holds is, and remains, in the EU."""
    if ":" in bucket:
        yield Finding(subject, LOCATION, "an access point, which may lead to many regions, not a bucket", False)
        return
    found, ok = locate(bucket, client)
    yield Finding(subject, LOCATION, found, ok)
    if not ok:
        return
    try:
        status = client.get_bucket_accelerate_configuration(Bucket=bucket).get("Status", "none")
        yield Finding(subject, ACCELERATION, status, status != "Enabled")
    except UNREADABLE as error:
        yield Finding(subject, ACCELERATION, *judge_error(error, "s3:GetAccelerateConfiguration"))
    try:
        rules = client.get_bucket_replication(Bucket=bucket)["ReplicationConfiguration"]["Rules"]
    except UNREADABLE as error:
        yield Finding(subject, REPLICATION, *judge_error(error, "s3:GetReplicationConfiguration"))
        return
    for copy in dict.fromkeys(rule["Destination"]["Bucket"].rpartition(":")[2] for rule in rules):
        found, ok = locate(copy, client)
        yield Finding(subject, REPLICATION, f"to {copy}: {found}", ok)


def locate(bucket: str, client: Any) -> tuple[str, bool]:
    """Return where the bucket lies, by what S3 says, and whether that is in the EU."""
    try:
        stated = client.get_bucket_location(Bucket=bucket)["LocationConstraint"]
    except UNREADABLE as error:
        return unreadable(error, "s3:GetBucketLocation"), False
    if not stated and is_local(client):
        return "this machine", True
    region = {"EU": "eu-west-1"}.get(stated, stated or "us-east-1")  # S3 does not give its first two regions by name
    return describe_region(region), region in EU


def judge_error(error: Exception, permission: str) -> tuple[str, bool]:
    """Return what an error means for a setting, and whether that is right: its absence is, but not that it is unreadable."""
    if error_code(error) in NOT_OFFERED | {"ReplicationConfigurationNotFoundError"}:
        return "none", True
    return unreadable(error, permission), False


def unreadable(error: Exception, permission: str) -> str:
    if error_code(error) in ("AccessDenied", "403"):
        return f"cannot be read: you lack the permission {permission}"
    return f"cannot be read: {error}"


def error_code(error: Exception) -> str:
    return str(error.response["Error"]["Code"]) if isinstance(error, ClientError) else ""


def dvc_remotes() -> dict[str, Any]:
    """Read the settings of every remote that DVC knows here: of the system, the user, the repository, the working copy."""
    from dvc import config, fs  # slow to import, and not needed for a bucket

    known = config.Config.from_cwd()
    return {name: fs.get_fs_config(known, name=name) for name in known["remote"]}


def check_remote(subject: str, remote: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that what DVC pushes to the remote is, and remains, in the EU."""
    url = urlsplit(remote["url"])
    if url.scheme != "s3":
        yield Finding(subject, REMOTE, remote["url"], not url.scheme or url.hostname in LOOPBACK)
        return
    client = dvc_client(remote)
    findings = [check_region(subject, client.meta.region_name), *check_endpoint(subject, client)]
    yield from findings
    if all(finding.ok for finding in findings):
        yield from check_bucket(subject, url.netloc, client)


def dvc_client(remote: Mapping[str, Any]) -> Any:
    """Make a client with the endpoint, region and profile of the one that DVC makes for the remote."""
    from dvc.fs import get_cloud_fs

    filesystem, settings, _ = get_cloud_fs({}, **remote)
    fs_args = filesystem(**settings).fs_args
    session = boto3.Session(
        fs_args.get("key"), fs_args.get("secret"), fs_args.get("token"), profile_name=fs_args.get("profile")
    )
    config = cloud.CONFIG.merge(Config(**fs_args.get("config_kwargs", {})))
    return session.client("s3", use_ssl=fs_args["use_ssl"], config=config, **fs_args.get("client_kwargs", {}))


def identify_caller(region: str) -> tuple[str, str]:
    """Return the account, and the user or role, that checks; no key."""
    client = cloud.client("sts", region)
    if not all(finding.ok for finding in [check_region("region", region), *check_endpoint("service sts", client)]):
        return "not asked", "not asked"
    if is_local(client):
        return "none: this machine", "none: this machine"
    try:
        identity = client.get_caller_identity()
    except UNREADABLE as error:
        return "unknown", f"unknown ({error})"
    return identity["Account"], identity["Arn"]


def format_table(findings: list[Finding], region: str) -> str:
    """Format the findings as text to file: who checked, when, which account, and the verdict in the last line."""
    rows = [("subject", "rule", "found", "verdict")]
    rows += [(subject, rule, found, "ok" if ok else "REFUSED") for subject, rule, found, ok in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    n_refused = sum(not finding.ok for finding in findings)
    account, who = identify_caller(region)
    return "\n".join(
        [
            "Residency of the data: what was checked, and what was found",
            f"date        {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            f"account     {account}",
            f"checked by  {who}",
            "",
            *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows),
            "",
            *(f"{rule}: {ADVICE[rule]}" for rule in dict.fromkeys(finding.rule for finding in findings if not finding.ok)),
            f"REFUSED: {n_refused} of {len(findings)} do not hold" if n_refused else "All stays in the European Union",
        ]
    )


if __name__ == "__main__":
    with cloud.errors_in_words("residency"):
        sys.exit(main(sys.argv[1:]))
