"""Refuse, before the first byte leaves, whatever would take data out of the European Union.

usage: python -m bootstrap.aws.residency            all buckets, every remote of DVC, what computes
       python -m bootstrap.aws.residency BUCKET...  these buckets alone

Prints who checked what, when, what was found and the verdict, as a table to file. The exit status is 0 if all stays in the
EU, 1 if not or if it cannot be known. Region and stack are those of cluster.yaml; no key is ever printed.

A server on this machine (127.0.0.1, localhost) is let be, as nothing leaves; the table says so.
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

# By name, as eu-west-2 (London) and eu-central-2 (Zurich) begin with eu- and are not in the EU.
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

# What must hold, and what to do where it does not.
REGION = "must be in the EU"
HOST = "must send to AWS in its region"
ACCELERATION = "must not be accelerated"
LOCATION = "must lie in the EU"
REPLICATION = "must not be copied elsewhere"
REMOTE = "must be S3, or on this machine"
ARN = "must be in the region"
ADVICE = {
    REGION: f"Take one of {', '.join(sorted(EU))}: `region` in bootstrap/aws/cluster.yaml, or of the remote.",
    HOST: "Unset AWS_ENDPOINT_URL and its like, endpoint_url in ~/.aws/config, endpointurl of the remote.",
    ACCELERATION: "It takes data through points of presence anywhere: suspend it, and unset use_accelerate_endpoint.",
    LOCATION: "Make a bucket in the region and move there what this one holds, or have its location made readable.",
    REPLICATION: "Remove the rule of replication, or have the location of its destination made readable.",
    REMOTE: "`make remote BUCKET=...` sets one on S3; `dvc remote remove NAME` takes this one away.",
    ARN: "End it, and make it in the region.",
}
# What is not understood, such as the page of a proxy, is not read either.
UNREADABLE = (ClientError, BotoCoreError, ResponseParserError)
# How S3 says that a region, or a server, has no such thing at all.
NOT_OFFERED = {"MethodNotAllowed", "NotImplemented", "XNotImplemented", "UnsupportedArgument", "UnsupportedOperation"}


class Finding(NamedTuple):
    """One line of the table: what was looked at, what must hold, what was found, whether it holds."""

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
        computers, logs = compute_findings(settings, outputs)
        kept = urlsplit(os.environ.get("FEATURE_CACHE", ""))
        findings = check(region, [outputs["Bucket"], *logs, *([kept.netloc] if kept.scheme == "s3" else [])]) + computers
    print(table(findings, region))
    return 0 if all(finding.ok for finding in findings) else 1


def require(
    region: str,
    buckets: Iterable[str],
    services: Iterable[str] = SERVICES,
    remotes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Go on only if all stays in the EU; the parameters are those of check.

    Raises
    ------
    SystemExit
        with every finding that is against it, and what to do
    """
    against = [finding for finding in check(region, buckets, services, remotes) if not finding.ok]
    if against:
        lines = [f"  {subject} {rule}: {found}. {ADVICE[rule]}" for subject, rule, found, _ in against]
        raise SystemExit("\n".join(["residency: refused, and nothing was sent:", *lines]))


def require_arn(arn: str, region: str) -> None:
    """Go on only if what computes is in the region that was found to be right; as require."""
    if (found := arn.split(":")[3]) != region:
        raise SystemExit(f"residency: refused, and nothing was sent: {arn} is in {found}, and cluster.yaml says {region}")


def compute_findings(settings: dict[str, Any], outputs: Mapping[str, str]) -> tuple[list[Finding], list[str]]:
    """Where the cluster that is up and the serverless application are, and the buckets that the cluster's logs go to."""
    region = settings["region"]
    arns, logs = [], []
    emr = cloud.client("emr", region)
    if one := cloud.find_cluster(emr, settings["cluster"]["Name"]):
        about = emr.describe_cluster(ClusterId=one)["Cluster"]
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
    """What was found of the region, the hosts of the services, the buckets and DVC's remotes, in this order.

    A question is put to AWS only once region and hosts are known to be right.

    Parameters
    ----------
    buckets : names of all buckets that data, code or logs go to
    services : boto3's names of the services that will be called
    remotes : settings of DVC's remotes by name; if None, all those that DVC knows of in the current folder
    """
    findings = [in_the_eu("region", region)]
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


def in_the_eu(subject: str, region: str) -> Finding:
    return Finding(subject, REGION, with_place(region), region in EU)


def with_place(region: str) -> str:
    """The region with the name that AWS gives it, such as eu-west-2, Europe (London)."""
    return f"{region}, {places().get(region, 'which is unknown')}{'' if region in EU else ', is not in the EU'}"


@cache
def places() -> dict[str, str]:
    """What AWS calls its regions."""
    partitions = botocore.session.get_session().get_data("endpoints")["partitions"]
    return {region: about["description"] for partition in partitions for region, about in partition["regions"].items()}


def local(client: Any) -> bool:
    return urlsplit(client.meta.endpoint_url).hostname in LOOPBACK


def check_endpoint(subject: str, client: Any) -> Iterator[Finding]:
    """Where the client sends what it is given."""
    url, region = urlsplit(client.meta.endpoint_url), client.meta.region_name
    domain = "amazonaws.eu" if region.startswith("eusc-") else "amazonaws.com"
    own = url.scheme == "https" and f".{url.netloc}".endswith(f".{region}.{domain}")
    found = f"{url.netloc}, this machine: nothing leaves" if local(client) else client.meta.endpoint_url
    yield Finding(subject, HOST, found, own or local(client))
    if client.meta.service_model.service_name == "s3" and (client.meta.config.s3 or {}).get("use_accelerate_endpoint"):
        yield Finding(subject, ACCELERATION, "use_accelerate_endpoint is set in the configuration of AWS", False)


def check_bucket(subject: str, bucket: str, client: Any) -> Iterator[Finding]:
    """Whether what the bucket holds is, and remains, in the EU."""
    if ":" in bucket:
        yield Finding(subject, LOCATION, "an access point, which may lead to many regions, not a bucket", False)
        return
    found, ok = location(bucket, client)
    yield Finding(subject, LOCATION, found, ok)
    if not ok:
        return
    try:
        status = client.get_bucket_accelerate_configuration(Bucket=bucket).get("Status", "none")
        yield Finding(subject, ACCELERATION, status, status != "Enabled")
    except UNREADABLE as error:
        yield Finding(subject, ACCELERATION, *absent(error, "s3:GetAccelerateConfiguration"))
    try:
        rules = client.get_bucket_replication(Bucket=bucket)["ReplicationConfiguration"]["Rules"]
    except UNREADABLE as error:
        yield Finding(subject, REPLICATION, *absent(error, "s3:GetReplicationConfiguration"))
        return
    for copy in dict.fromkeys(rule["Destination"]["Bucket"].rpartition(":")[2] for rule in rules):
        found, ok = location(copy, client)
        yield Finding(subject, REPLICATION, f"to {copy}: {found}", ok)


def location(bucket: str, client: Any) -> tuple[str, bool]:
    """Where the bucket really lies, and whether that is in the EU."""
    try:
        stated = client.get_bucket_location(Bucket=bucket)["LocationConstraint"]
    except UNREADABLE as error:
        return unreadable(error, "s3:GetBucketLocation"), False
    if not stated and local(client):
        return "this machine", True
    region = {"EU": "eu-west-1"}.get(stated, stated or "us-east-1")  # S3's first two regions are not told by name
    return with_place(region), region in EU


def absent(error: Exception, permission: str) -> tuple[str, bool]:
    """What an error says of a setting: that there is none, which is well, or that it cannot be read, which is not."""
    if code(error) in NOT_OFFERED | {"ReplicationConfigurationNotFoundError"}:
        return "none", True
    return unreadable(error, permission), False


def unreadable(error: Exception, permission: str) -> str:
    if code(error) in ("AccessDenied", "403"):
        return f"cannot be read: you lack the permission {permission}"
    return f"cannot be read: {error}"


def code(error: Exception) -> str:
    return str(error.response["Error"]["Code"]) if isinstance(error, ClientError) else ""


def dvc_remotes() -> dict[str, Any]:
    """The settings of every remote that DVC knows of here: of the system, the user, the repository, the working copy."""
    from dvc import config, fs  # slow to import, and not needed for a bucket

    known = config.Config.from_cwd()
    return {name: fs.get_fs_config(known, name=name) for name in known["remote"]}


def check_remote(subject: str, remote: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether what DVC pushes to the remote is, and remains, in the EU."""
    url = urlsplit(remote["url"])
    if url.scheme != "s3":
        yield Finding(subject, REMOTE, remote["url"], not url.scheme or url.hostname in LOOPBACK)
        return
    client = dvc_client(remote)
    findings = [in_the_eu(subject, client.meta.region_name), *check_endpoint(subject, client)]
    yield from findings
    if all(finding.ok for finding in findings):
        yield from check_bucket(subject, url.netloc, client)


def dvc_client(remote: Mapping[str, Any]) -> Any:
    """A client with the endpoint, region and profile of the one that DVC makes for the remote."""
    from dvc.fs import get_cloud_fs

    filesystem, settings, _ = get_cloud_fs({}, **remote)
    its = filesystem(**settings).fs_args
    session = boto3.Session(its.get("key"), its.get("secret"), its.get("token"), profile_name=its.get("profile"))
    config = cloud.CONFIG.merge(Config(**its.get("config_kwargs", {})))
    return session.client("s3", use_ssl=its["use_ssl"], config=config, **its.get("client_kwargs", {}))


def caller(region: str) -> tuple[str, str]:
    """The account, and the user or role, that the findings are of; no key."""
    client = cloud.client("sts", region)
    if not all(finding.ok for finding in [in_the_eu("region", region), *check_endpoint("service sts", client)]):
        return "not asked", "not asked"
    if local(client):
        return "none: this machine", "none: this machine"
    try:
        identity = client.get_caller_identity()
    except UNREADABLE as error:
        return "unknown", f"unknown ({error})"
    return identity["Account"], identity["Arn"]


def table(findings: list[Finding], region: str) -> str:
    """The findings as text to file: who asked, when, of which account, and the verdict in the last line."""
    rows = [("subject", "rule", "found", "verdict")]
    rows += [(subject, rule, found, "ok" if ok else "REFUSED") for subject, rule, found, ok in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    against = sum(not finding.ok for finding in findings)
    account, who = caller(region)
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
            f"REFUSED: {against} of {len(findings)} do not hold" if against else "All stays in the European Union",
        ]
    )


if __name__ == "__main__":
    with cloud.errors_in_words("residency"):
        sys.exit(main(sys.argv[1:]))
