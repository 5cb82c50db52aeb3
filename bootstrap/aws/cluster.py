"""Rent the cluster of cluster.yaml, look at it, give it back.

usage: python -m bootstrap.aws.cluster up [--release LABEL]    one of a name at a time; prints what it costs, does not wait
       python -m bootstrap.aws.cluster status                  its state, its nodes, what it has cost
       python -m bootstrap.aws.cluster down [--yes]            ends it; what it has written is in the bucket
"""

import re
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from bootstrap.aws import cloud, cost, endpoint, quotas, residency, wheelhouse

UNIT = 4  # vCPUs
TARGETS = ("TargetOnDemandCapacity", "TargetSpotCapacity")


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
        a cluster of the name is up, the nodes have no wheelhouse, or a quota of the account is too small
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
    compared = quotas.require(settings["region"], vcpus(settings, outputs), settings["executors"])
    low, high = per_hour(wanted, cost.load())
    cluster_id = emr.run_job_flow(**wanted)["JobFlowId"]
    idle = wanted["AutoTerminationPolicy"]["IdleTimeout"] / 60
    print(f"Cluster {cluster_id} ({name}, {release}) is starting, which takes some 8 minutes; stages may be sent already.")
    print(f"Quotas: {compared}.")
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
    """Return the request of RunJobFlow: `cluster` of cluster.yaml, filled in, without fleets that would have no node."""
    wanted = dict(fill(settings["cluster"], values(settings, outputs, release)), ReleaseLabel=release)
    fleets = [trim(fleet) for fleet in wanted["Instances"]["InstanceFleets"]]
    wanted["Instances"]["InstanceFleets"] = [fleet for fleet in fleets if any(key in fleet for key in TARGETS)]
    return wanted


def trim(fleet: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a fleet its targets of 0, what is said of spot if there is none, nodes larger than all of its units."""
    units = sum(fleet.get(key, 0) for key in TARGETS)
    unused = [key for key in TARGETS if not fleet.get(key)]
    unused += [] if fleet.get("TargetSpotCapacity") else ["LaunchSpecifications"]
    kinds = [kind for kind in fleet["InstanceTypeConfigs"] if kind.get("WeightedCapacity", 1) <= units]
    return {key: value for key, value in fleet.items() if key not in unused} | {"InstanceTypeConfigs": kinds}


def vcpus(settings: dict[str, Any], outputs: Mapping[str, str]) -> Callable[[int], dict[quotas.Quota, int]]:
    """Return a function that computes the vCPUs which a cluster of so many executors takes, on demand and on spot."""

    def needs(executors: int) -> dict[quotas.Quota, int]:
        wanted = request(settings | {"executors": executors}, outputs, settings["cluster"]["ReleaseLabel"])
        fleets, limits = wanted["Instances"]["InstanceFleets"], wanted["ManagedScalingPolicy"]["ComputeLimits"]
        (primary,) = (fleet["InstanceTypeConfigs"] for fleet in fleets if fleet["InstanceFleetType"] == "MASTER")
        on_demand = limits["MaximumOnDemandCapacityUnits"]
        return {
            quotas.ON_DEMAND: min(cost.cores(kind["InstanceType"]) for kind in primary) + UNIT * on_demand,
            quotas.SPOT: UNIT * (limits["MaximumCapacityUnits"] - on_demand),
        }

    return needs


def job_settings(settings: dict[str, Any], outputs: Mapping[str, str]) -> dict[str, str]:
    """Return Spark's settings for a job run: `serverless` of cluster.yaml, filled in."""
    release = settings["parameters"].get("ServerlessRelease", settings["cluster"]["ReleaseLabel"])
    return {key: str(value) for key, value in fill(settings["serverless"], values(settings, outputs, release)).items()}


def vcpus_of_job(settings: dict[str, Any], outputs: Mapping[str, str]) -> Callable[[int], dict[quotas.Quota, int]]:
    """Return a function that computes the vCPUs which a job run of so many executors takes, with its driver."""

    def needs(executors: int) -> dict[quotas.Quota, int]:
        conf = job_settings(settings | {"executors": executors}, outputs)
        n, cores = int(conf["spark.dynamicAllocation.maxExecutors"]), int(conf["spark.executor.cores"])
        return {quotas.SERVERLESS: int(conf["spark.driver.cores"]) + n * cores}

    return needs


def values(settings: dict[str, Any], outputs: Mapping[str, str], release: str) -> dict[str, str | int]:
    """Return what can be filled in, by name: the stack's outputs, name and region, the folder of Python, the units."""
    wheels = wheelhouse.folder(wheelhouse.pins(settings, release))
    return {
        **outputs,
        "Stack": settings["stack"],
        "Region": settings["region"],
        "Wheelhouse": f"s3://{outputs['Bucket']}/{wheels}",
        **units(settings["executors"]),
        "Cores": str(UNIT * settings["executors"]),  # a property of a configuration is a text
    }


def units(executors: int) -> dict[str, int]:
    """Divide the executors among the fleets of a cluster; a unit is an executor.

    Raises
    ------
    SystemExit
        there is no executor
    """
    if executors < 1:
        raise SystemExit(f"cluster: `executors: {executors}` in cluster.yaml: there must be 1 at least")
    core = min(executors, 2)
    on_demand = core if executors > 1 else 0  # so that one executor fits into the quotas of a new account
    return {
        "Executors": executors,
        "Core": core,
        "CoreOnDemand": on_demand,
        "CoreOnSpot": core - on_demand,
        "Task": min(executors - core, 6),  # at the start
        "JobExecutors": max(executors, 3),  # the least that EMR Serverless takes
    }


def fill(value: Any, values: Mapping[str, str | int]) -> Any:
    """Replace each ${Name} by its value. One that stands alone in a list becomes several items, split at the commas.

    A number that stands alone stays a number.

    Raises
    ------
    SystemExit
        a name has no value
    """

    def substitute(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise SystemExit(f"cluster: ${{{match[1]}}} in cluster.yaml is none of {', '.join(sorted(values))}")
        return str(values[match[1]])

    if isinstance(value, Mapping):
        return {key: fill(item, values) for key, item in value.items()}
    if isinstance(value, list):
        filled = [(item, fill(item, values)) for item in value]
        alone = [isinstance(item, str) and re.fullmatch(r"\$\{\w+\}", item) for item in value]
        return [part for (_, new), split in zip(filled, alone, strict=True) for part in (new.split(",") if split else [new])]
    if not isinstance(value, str):
        return value
    number = values.get(value[2:-1]) if re.fullmatch(r"\$\{\w+\}", value) else None
    return number if isinstance(number, int) else re.sub(r"\$\{(\w+)\}", substitute, value)


def per_hour(wanted: Mapping[str, Any], prices: Mapping[str, Any]) -> tuple[float, float]:
    """Return EUR an hour at least (scaled down, with the cheapest types) and at most (scaled up, with the dearest).

    Both are without spot.
    """
    fleets = {fleet["InstanceFleetType"]: fleet["InstanceTypeConfigs"] for fleet in wanted["Instances"]["InstanceFleets"]}
    limits = wanted["ManagedScalingPolicy"]["ComputeLimits"]

    def each(*names: str) -> list[float]:
        kinds = [kind for name in names for kind in fleets.get(name, [])]
        return [cost.of_node(kind["InstanceType"], "ON_DEMAND", prices) / kind.get("WeightedCapacity", 1) for kind in kinds]

    low = min(each("MASTER")) + limits["MinimumCapacityUnits"] * min(each("CORE"))
    high = max(each("MASTER")) + limits["MaximumCapacityUnits"] * max(each("CORE", "TASK"))
    return low, high


if __name__ == "__main__":
    with cloud.errors_in_words("cluster"):
        main(sys.argv[1:])
