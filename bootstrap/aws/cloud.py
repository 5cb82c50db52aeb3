"""Give all that talks to AWS its settings, clients that retry, the stack, the cluster, and errors of one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import yaml
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)

SETTINGS = Path(__file__).with_name("cluster.yaml")
UP = ["STARTING", "BOOTSTRAPPING", "RUNNING", "WAITING"]  # states of a cluster that runs or will run
THREADS = 32  # requests at a time; most are of small files
NO_KEYS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound, SSOError, TokenRetrievalError)
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired")
# A request that is throttled, or meets an error of the server, is sent again. The wait doubles each time, and is partly
# random, so that not all requests come back at once.
CONFIG = Config(
    retries={"mode": "standard", "max_attempts": 8},
    connect_timeout=10,
    read_timeout=60,
    max_pool_connections=THREADS,
)


def settings() -> dict[str, Any]:
    """Read cluster.yaml: region, stack, and what the cluster and the job runs are made of."""
    return dict(yaml.safe_load(SETTINGS.read_text()))


def client(service: str, region: str) -> Any:
    """Make a client of that service in that region, whatever region the user's own configuration names."""
    return boto3.client(service, region_name=region, config=CONFIG)


def outputs(settings: dict[str, Any]) -> dict[str, str]:
    """Return the outputs of the CloudFormation stack (infrastructure.yaml) by name.

    Raises
    ------
    SystemExit
        the region has no such stack, or it is not whole: its making or its deletion goes on, or has failed
    """
    try:
        (stack,) = client("cloudformation", settings["region"]).describe_stacks(StackName=settings["stack"])["Stacks"]
    except ClientError as error:
        if "does not exist" not in str(error):
            raise
        raise SystemExit(
            f"cloud: no stack {settings['stack']!r} in {settings['region']}. "
            "`make cloud-setup` makes it: bucket, network and roles."
        ) from None
    state, found = stack["StackStatus"], outputs_of(stack)
    if not found or state.startswith("DELETE"):
        raise SystemExit(
            f"cloud: stack {settings['stack']!r} in {settings['region']} is {state}, and not whole. `make cloud-setup` "
            "makes it, or says what to do."
        )
    return found


def outputs_of(stack: Mapping[str, Any]) -> dict[str, str]:
    """Return the outputs of a stack, as describe_stacks returns it, by name; none if it was never whole."""
    return {output["OutputKey"]: output["OutputValue"] for output in stack.get("Outputs", [])}


def find_cluster(emr: Any, name: str) -> str | None:
    """Find the id of the cluster of that name that runs or will run; None if there is none.

    Raises
    ------
    SystemExit
        several clusters have that name
    """
    pages = emr.get_paginator("list_clusters").paginate(ClusterStates=UP)
    found = [cluster["Id"] for page in pages for cluster in page["Clusters"] if cluster["Name"] == name]
    if len(found) > 1:
        raise SystemExit(
            f"cluster: {len(found)} clusters named {name!r} are up: {', '.join(found)}. End all but one: "
            "`aws emr terminate-clusters --cluster-ids ID`."
        )
    return found[0] if found else None


def nodes(emr: Any, cluster_id: str) -> list[dict[str, Any]]:
    """List all instances that the cluster has had, as list_instances returns them."""
    pages = emr.get_paginator("list_instances").paginate(ClusterId=cluster_id)
    return [instance for page in pages for instance in page["Instances"]]


def confirm(question: str) -> bool:
    """Ask the person at the terminal, and return whether the answer is yes; without a terminal it is no."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


@contextmanager
def errors_in_words(who: str) -> Iterator[None]:
    """Turn a refusal of AWS, or a failure to reach it, into a SystemExit of one line, without a traceback."""
    try:
        yield
    except ClientError as error:
        code, operation = error.response["Error"]["Code"], error.operation_name
        advice = " Log in again (`aws sso login`, or new keys), and repeat the command." if code in EXPIRED else ""
        raise SystemExit(f"{who}: {operation}: {code}: {error.response['Error'].get('Message', '')}{advice}") from None
    except NO_KEYS as error:
        advice = "`aws sso login`, or AWS_PROFILE=… for another profile, or new keys."
        raise SystemExit(f"{who}: {str(error).rstrip('.')}. {advice}") from None
    except (BotoCoreError, Boto3Error) as error:
        raise SystemExit(f"{who}: {error}") from None
