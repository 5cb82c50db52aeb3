"""Rent the cluster of cluster.yaml, look at it, give it back.

usage: python -m bootstrap.aws.cluster up [--release LABEL]    one of a name at a time; prints what it costs, does not wait
       python -m bootstrap.aws.cluster status                  its state, its nodes, what it has cost
       python -m bootstrap.aws.cluster down [--yes]            ends it; what it has written is in the bucket
"""

import re
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from bootstrap.aws import cloud, cost, endpoint, residency, wheelhouse


def main(argv: list[str]) -> None:
    settings = cloud.settings()
    parser = ArgumentParser(usage=(__doc__ or "").partition("usage: ")[2])
    parser.add_argument("command", choices=["up", "status", "down"])
    parser.add_argument("--release", default=settings["cluster"]["ReleaseLabel"])
    parser.add_argument("--yes", action="store_true")
    arguments = parser.parse_args(argv)
    emr = cloud.client("emr", settings["region"])
    if arguments.command == "up":
        up(emr, settings, arguments.release)
    elif arguments.command == "status":
        status(emr, settings)
        endpoint.tell(settings)
    else:
        down(emr, settings, arguments.yes)
        endpoint.remove(settings)


def up(emr: Any, settings: dict[str, Any], release: str) -> None:
    """Start the cluster, without waiting for it, and print what it costs.

    Raises
    ------
    SystemExit
        a cluster of the name is up, or the nodes have no wheelhouse
    """
    outputs = cloud.outputs(settings)
    residency.require(settings["region"], [outputs["Bucket"]])
    name = settings["cluster"]["Name"]
    if cluster_id := cloud.find_cluster(emr, name):
        raise SystemExit(
            f"cluster: {name!r} is up already: {cluster_id}. `make cloud-status` shows it, `make cloud-down` ends it."
        )
    bucket, wheels = outputs["Bucket"], wheelhouse.folder(wheelhouse.pins(settings, release))
    if not wheelhouse.exists(cloud.client("s3", settings["region"]), bucket, wheels):
        again = "" if release == settings["cluster"]["ReleaseLabel"] else f" RELEASE={release}"
        raise SystemExit(f"cluster: no s3://{bucket}/{wheels}, Python for the nodes. `make wheelhouse{again}` makes it.")
    wanted = request(settings, outputs, release)
    low, high = per_hour(wanted, cost.load())
    cluster_id = emr.run_job_flow(**wanted)["JobFlowId"]
    idle = wanted["AutoTerminationPolicy"]["IdleTimeout"] / 60
    print(f"Cluster {cluster_id} ({name}, {release}) is starting, which takes some 8 minutes; stages may be sent already.")
    print(f"It costs {low:.2f} to {high:.2f} EUR an hour, EMR's fee included, by the prices of bootstrap/aws/prices.yaml.")
    print(f"It ends by itself when it has been idle for {idle:.0f} minutes; `make cloud-down` ends it now.")


def status(emr: Any, settings: dict[str, Any]) -> None:
    """Print the cluster's state, nodes, age, and cost so far."""
    name = settings["cluster"]["Name"]
    cluster_id = cloud.find_cluster(emr, name)
    if cluster_id is None:
        print(f"No cluster {name!r} is up in {settings['region']}.")
        return
    cluster = emr.describe_cluster(ClusterId=cluster_id)["Cluster"]
    state, now = cluster["Status"], datetime.now(UTC)
    reason = state.get("StateChangeReason", {}).get("Message", "")
    instances = cloud.nodes(emr, cluster_id)
    running = [i for i in instances if not i["Status"]["Timeline"].get("EndDateTime")]
    kinds = Counter((i["InstanceType"], i["Market"].replace("_", " ").lower()) for i in running)
    age = (now - state["Timeline"]["CreationDateTime"]).total_seconds() / 60
    prices = cost.load()
    hours, euros = cost.of_instances(instances, prices, now)
    rate = cost.per_hour(instances, prices)
    print(
        f"Cluster {cluster_id} ({name}, {cluster.get('ReleaseLabel', '')}): {state['State']}{': ' if reason else ''}{reason}"
    )
    print("Nodes:", ", ".join(f"{n} x {kind} {market}" for (kind, market), n in sorted(kinds.items())) or "none yet")
    print(f"Up for {age:.0f} minutes: {hours:.1f} node hours, some {euros:.2f} EUR; {rate:.2f} EUR an hour now")


def down(emr: Any, settings: dict[str, Any], yes: bool) -> None:
    """End the cluster, after a question unless `yes`."""
    name = settings["cluster"]["Name"]
    cluster_id = cloud.find_cluster(emr, name)
    if cluster_id is None:
        print(f"No cluster {name!r} is up in {settings['region']}; nothing to end.")
        return
    if not yes and not cloud.confirm(f"End cluster {cluster_id} ({name}) and what runs on it?"):
        raise SystemExit("cluster: not ended; it is still paid for, until `make cloud-down`")
    emr.terminate_job_flows(JobFlowIds=[cluster_id])
    print(f"Cluster {cluster_id} is ending; its nodes are paid for some seconds more.")


def request(settings: dict[str, Any], outputs: Mapping[str, str], release: str) -> dict[str, Any]:
    """Return the request of RunJobFlow: `cluster` of cluster.yaml, filled in."""
    return dict(fill(settings["cluster"], values(settings, outputs, release)), ReleaseLabel=release)


def job_settings(settings: dict[str, Any], outputs: Mapping[str, str]) -> dict[str, str]:
    """Return Spark's settings for a job run: `serverless` of cluster.yaml, filled in."""
    release = settings["parameters"].get("ServerlessRelease", settings["cluster"]["ReleaseLabel"])
    return dict(fill(settings["serverless"], values(settings, outputs, release)))


def values(settings: dict[str, Any], outputs: Mapping[str, str], release: str) -> dict[str, str]:
    """Return what can be filled in, by name: the stack's outputs, its name, the folder of Python for the release."""
    wheels = wheelhouse.folder(wheelhouse.pins(settings, release))
    return {**outputs, "Stack": settings["stack"], "Wheelhouse": f"s3://{outputs['Bucket']}/{wheels}"}


def fill(value: Any, values: Mapping[str, str]) -> Any:
    """Replace each ${Name} by its value. One that stands alone in a list becomes several items, split at the commas.

    Raises
    ------
    SystemExit
        a name has no value
    """

    def substitute(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise SystemExit(f"cluster: ${{{match[1]}}} in cluster.yaml is none of {', '.join(sorted(values))}")
        return values[match[1]]

    if isinstance(value, Mapping):
        return {key: fill(item, values) for key, item in value.items()}
    if isinstance(value, list):
        filled = [(item, fill(item, values)) for item in value]
        alone = [isinstance(item, str) and re.fullmatch(r"\$\{\w+\}", item) for item in value]
        return [part for (_, new), split in zip(filled, alone, strict=True) for part in (new.split(",") if split else [new])]
    return re.sub(r"\$\{(\w+)\}", substitute, value) if isinstance(value, str) else value


def per_hour(wanted: Mapping[str, Any], prices: Mapping[str, Any]) -> tuple[float, float]:
    """Return EUR an hour at least (scaled down, with the cheapest types) and at most (scaled up, with the dearest).

    Both are without spot.
    """
    fleets = {fleet["InstanceFleetType"]: fleet["InstanceTypeConfigs"] for fleet in wanted["Instances"]["InstanceFleets"]}
    limits = wanted["ManagedScalingPolicy"]["ComputeLimits"]

    def each(*names: str) -> list[float]:
        kinds = [kind for name in names for kind in fleets[name]]
        return [cost.of_node(kind["InstanceType"], "ON_DEMAND", prices) / kind.get("WeightedCapacity", 1) for kind in kinds]

    low = min(each("MASTER")) + limits["MinimumCapacityUnits"] * min(each("CORE"))
    high = max(each("MASTER")) + limits["MaximumCapacityUnits"] * max(each("CORE", "TASK"))
    return low, high


if __name__ == "__main__":
    with cloud.errors_in_words("cluster"):
        main(sys.argv[1:])
