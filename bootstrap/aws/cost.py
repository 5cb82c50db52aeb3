"""Compute what a cluster or a job run has cost, and costs an hour: AWS's records of use, by the prices of prices.yaml."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

PRICES = Path(__file__).with_name("prices.yaml")
MONTH = 730  # hours, as AWS counts one


def load() -> dict[str, Any]:
    """Read prices.yaml."""
    return dict(yaml.safe_load(PRICES.read_text()))


def of_node(instance_type: str, market: str, prices: Mapping[str, Any]) -> float:
    """Compute EUR an hour of a node: the instance, EMR's fee, its disks.

    Raises
    ------
    SystemExit
        prices.yaml has no price of the type
    """
    try:
        on_demand = prices["ec2"][instance_type]
    except KeyError:
        known = ", ".join(prices["ec2"])
        raise SystemExit(f"cost: no price of {instance_type!r} in {PRICES}, which has {known}; add it under `ec2`") from None
    share = prices["spot"] if market == "SPOT" else 1
    usd = on_demand * (share + prices["emr"]) + prices["ebs_gb"] * prices["ebs"] / MONTH
    return float(usd / prices["usd_per_eur"])


def cores(instance_type: str) -> int:
    """Return the vCPUs of a type, by its size: 4 for each x of an xlarge, 2 for a large."""
    size = instance_type.partition(".")[2]
    return 4 * int(size.removesuffix("xlarge") or 1) if size.endswith("xlarge") else 2


def per_hour(instances: Iterable[Mapping[str, Any]], prices: Mapping[str, Any]) -> float:
    """Compute EUR an hour of those instances (as list_instances returns them) that have not ended."""
    running = [instance for instance in instances if "EndDateTime" not in instance["Status"]["Timeline"]]
    return sum(of_node(instance["InstanceType"], instance["Market"], prices) for instance in running)


def of_instances(instances: Iterable[Mapping[str, Any]], prices: Mapping[str, Any], until: datetime) -> tuple[float, float]:
    """Compute node hours and EUR, from each instance's creation to its end, or to `until` if it has none.

    Parameters
    ----------
    instances : as list_instances returns them
    prices : prices.yaml
    until : with its time zone
    """
    hours, euros = 0.0, 0.0
    for instance in instances:
        timeline = instance["Status"]["Timeline"]
        begin = timeline.get("CreationDateTime", until)
        if begin >= until:
            continue  # not created yet
        seconds = (min(timeline.get("EndDateTime", until), until) - begin).total_seconds()
        lasted = max(seconds, 60) / 3600  # AWS counts a minute at least
        hours += lasted
        euros += lasted * of_node(instance["InstanceType"], instance["Market"], prices)
    return hours, euros


def of_cores(cores: float, prices: Mapping[str, Any]) -> float:
    """Compute EUR an hour of so many vCPUs of EMR Serverless, with the memory of an executor."""
    return of_job_run({"vCPUHour": cores, "memoryGBHour": cores * prices["memory_gb_per_vcpu"]}, prices)[1]


def of_job_run(billed: Mapping[str, float], prices: Mapping[str, Any]) -> tuple[float, float]:
    """Compute vCPU hours and EUR of the billedResourceUtilization of get_job_run."""
    serverless = prices["serverless"]
    usd = (
        billed.get("vCPUHour", 0) * serverless["vcpu"]
        + billed.get("memoryGBHour", 0) * serverless["memory_gb"]
        + billed.get("storageGBHour", 0) * serverless["storage_gb"]
    )
    return float(billed.get("vCPUHour", 0)), float(usd / prices["usd_per_eur"])
