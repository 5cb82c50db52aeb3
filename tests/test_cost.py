"""cost.py: hours and euros, against sums done by hand."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from bootstrap.aws import cloud, cost

START = datetime(2026, 11, 25, 8, tzinfo=UTC)
# Round numbers, so that each expectation can be checked by eye.
PRICES: dict[str, Any] = {
    "ec2": {"big": 2.0},
    "spot": 0.5,
    "emr": 0.25,
    "ebs": 7.3,
    "ebs_gb": 10,  # 0.1 USD an hour
    "serverless": {"vcpu": 0.1, "memory_gb": 0.01, "storage_gb": 0.001},
    "memory_gb_per_vcpu": 4,
    "usd_per_eur": 2.0,
}


def instance(market: str = "ON_DEMAND", minutes: float | None = 30) -> dict[str, Any]:
    timeline = {"CreationDateTime": START}
    if minutes is not None:
        timeline["EndDateTime"] = START + timedelta(minutes=minutes)
    return {"InstanceType": "big", "Market": market, "Status": {"Timeline": timeline}}


def test_an_hour_on_demand_is_the_instance_the_fee_and_the_disk() -> None:
    assert cost.of_node("big", "ON_DEMAND", PRICES) == pytest.approx((2 + 0.5 + 0.1) / 2)


def test_on_spot_the_fee_is_that_of_the_price_on_demand() -> None:
    assert cost.of_node("big", "SPOT", PRICES) == pytest.approx((1 + 0.5 + 0.1) / 2)


def test_an_instance_is_paid_for_from_its_creation_to_its_end() -> None:
    assert cost.of_instances([instance(minutes=30)], PRICES, START + timedelta(hours=9)) == pytest.approx((0.5, 0.65))


def test_an_instance_that_still_runs_is_paid_for_until_now() -> None:
    assert cost.of_instances([instance(minutes=None)], PRICES, START + timedelta(hours=2)) == pytest.approx((2, 2.6))


def test_seconds_of_an_instance_count_as_a_minute() -> None:
    hours, _ = cost.of_instances([instance(minutes=0.1)], PRICES, START + timedelta(hours=2))
    assert hours == pytest.approx(1 / 60)


def test_an_instance_that_is_not_there_yet_costs_nothing() -> None:
    waiting = {"InstanceType": "big", "Market": "SPOT", "Status": {"Timeline": {}}}
    assert cost.of_instances([waiting], PRICES, START) == (0, 0)


def test_what_was_created_after_a_moment_had_cost_nothing_then() -> None:
    assert cost.of_instances([instance(minutes=None)], PRICES, START - timedelta(minutes=5)) == (0, 0)


def test_what_has_ended_costs_nothing_by_the_hour() -> None:
    assert cost.per_hour([instance(minutes=None), instance(minutes=5)], PRICES) == pytest.approx(1.3)


def test_a_job_run_is_what_was_billed() -> None:
    billed = {"vCPUHour": 10, "memoryGBHour": 40, "storageGBHour": 100}
    assert cost.of_job_run(billed, PRICES) == pytest.approx((10, (1 + 0.4 + 0.1) / 2))


def test_a_job_run_without_billed_storage_has_a_price() -> None:
    assert cost.of_job_run({"vCPUHour": 1, "memoryGBHour": 0}, PRICES) == pytest.approx((1, 0.05))


def test_vcpus_of_serverless_come_with_their_memory() -> None:
    assert cost.of_cores(10, PRICES) == pytest.approx((1 + 0.4) / 2)


def test_the_memory_of_a_vcpu_is_that_of_an_executor_of_the_cluster_file() -> None:
    conf = cloud.settings()["serverless"]
    gigabytes = [int(conf[key].removesuffix("g")) for key in ("spark.executor.memory", "spark.executor.memoryOverhead")]
    assert sum(gigabytes) / int(conf["spark.executor.cores"]) == cost.load()["memory_gb_per_vcpu"]


def test_the_vcpus_of_a_type() -> None:
    sizes = ("m6i.large", "m6i.xlarge", "m6i.2xlarge", "g6.48xlarge")
    assert [cost.cores(size) for size in sizes] == [2, 4, 8, 192]


def test_a_type_without_a_price_is_named() -> None:
    with pytest.raises(SystemExit, match=r"no price of 'huge' in .*prices\.yaml, which has big; add it"):
        cost.of_node("huge", "SPOT", PRICES)


def test_every_type_of_the_cluster_has_a_price() -> None:
    fleets = cloud.settings()["cluster"]["Instances"]["InstanceFleets"]
    types = {kind["InstanceType"] for fleet in fleets for kind in fleet["InstanceTypeConfigs"]}
    assert types <= set(cost.load()["ec2"])


def test_the_disks_that_are_paid_for_are_those_of_the_cluster() -> None:
    cluster = cloud.settings()["cluster"]
    for fleet in cluster["Instances"]["InstanceFleets"]:
        for kind in fleet["InstanceTypeConfigs"]:
            volumes = [v["VolumeSpecification"] for v in kind["EbsConfiguration"]["EbsBlockDeviceConfigs"]]
            sizes = [v["SizeInGB"] for v in volumes]
            assert cluster["EbsRootVolumeSize"] + sum(sizes) == cost.load()["ebs_gb"]


def test_the_prices_of_an_m6i_are_those_of_its_vcpus() -> None:
    m6i = {name: usd for name, usd in cost.load()["ec2"].items() if name.startswith("m6i")}
    assert list(m6i.values()) == pytest.approx([0.056 * cost.cores(name) for name in m6i])
