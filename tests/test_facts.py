"""What AWS says of its own services, as a table with sources, and the project's files held against it.

Nobody of the project has run it in a real account: where a rule is documented, it is written down here once, and the files
must keep it. AWS's documentation was read in November 2026.
"""

import math
import re
from typing import Any

import pytest

from bootstrap.aws import cloud, cluster, cost, quotas
from tests.helpers import ROOT
from tests.test_infrastructure import RESOURCES

SETTINGS = cloud.settings()
TEMPLATE = (ROOT / "bootstrap/aws/infrastructure.yaml").read_text()
OUTPUTS = {name: f"the-{name}" for name in re.findall(r"^  (\w+):.*Value", TEMPLATE.partition("\nOutputs:")[2], re.M)}
SIZES = [1, 2, 3, 16]

# EMR Serverless User Guide, "Understanding application behavior", supported worker configurations: GB of memory by vCPUs, at
# least, at most, and the step between two sizes; GB of disk. Memory is that of the worker: Spark's and its overhead.
WORKERS = {1: (2, 8, 1), 2: (4, 16, 1), 4: (8, 30, 1), 8: (16, 60, 4), 16: (32, 120, 8)}
DISK = (20, 200)
# aws-emr-utilities on GitHub, pull request 175: fewer are refused, as three is the number at the start.
LEAST_EXECUTORS = 3

# What a new account may run, vCPUs. The first two by tables of quotas that people have published, with 5 to 16; the third by
# the EMR Serverless User Guide, "Endpoints and quotas".
FIRST_QUOTAS = {quotas.ON_DEMAND: 5, quotas.SPOT: 5, quotas.SERVERLESS: 16}
CODES = {"L-1216C47A": "ec2", "L-34B43A08": "ec2", "L-D05C8A75": "emr-serverless"}

# EMR Release Guide, "Task configuration": what YARN gets of a node's memory, MB; of m5, which has the vCPUs and the memory
# of m6i, whose own table was not found. Not found either: 2xlarge, here twice an xlarge.
# Spark's application master in client mode: 512 MB and 384 of overhead.
YARN_MB = {"xlarge": 12288, "2xlarge": 24576, "4xlarge": 57344}
MASTER_MB = 512 + 384
# EMR API Reference, InstanceFleetConfig: TargetOnDemandCapacity and TargetSpotCapacity are not both 0.
# EMR API Reference, RunJobFlow: RepoUpgradeOnBoot "applies only when CustomAmiID is used".

# Release notes of emr-spark-8.0.0 and "Working with EMR-managed security groups": ports that the group for service access
# admits, by the beginning of the release's name.
PORTS = {"emr-spark-": {443}, "emr-7.": {9443}}

# EMR Management Guide, "Sample policies for private subnets that access Amazon S3": actions on EMR's own buckets.
ENDPOINT = {"aws157-logs-prod": {"s3:Put*"}, "appinfo.src": {"s3:Put*", "s3:Get*", "s3:Create*", "s3:Abort*", "s3:List*"}}

# Release calendars of both: the last month of standard support. Of the first another copy says May 2027.
SUPPORT = {"emr-spark-8.0.0": "May 2028", "emr-7.13.0": "April 2028"}

# EMR Management Guide, "Spot and On-Demand allocation": the timeouts of LaunchSpecifications hold at launch.
TIMEOUT_MINUTES = (5, 1440)


def gigabytes(text: str) -> float:
    number, unit = float(text[:-1]), text[-1]
    return number / 1024 if unit == "m" else number


def container(conf: dict[str, str], role: str) -> float:
    """GB of a container: Spark's memory, and its overhead, by default a tenth, 384 MB at least."""
    memory = gigabytes(conf[f"spark.{role}.memory"])
    overhead = conf.get(f"spark.{role}.memoryOverhead")
    return memory + (gigabytes(overhead) if overhead else max(memory / 10, 384 / 1024))


def request(executors: int = 16) -> dict[str, Any]:
    return cluster.request(SETTINGS | {"executors": executors}, OUTPUTS, SETTINGS["cluster"]["ReleaseLabel"])


def defaults() -> dict[str, str]:
    found = request()["Configurations"]
    return next(each["Properties"] for each in found if each["Classification"] == "spark-defaults")


@pytest.mark.parametrize("role", ["driver", "executor"])
def test_a_worker_of_emr_serverless_has_one_of_its_sizes(role: str) -> None:
    conf = cluster.job_settings(SETTINGS, OUTPUTS)
    low, high, step = WORKERS[int(conf[f"spark.{role}.cores"])]
    assert low <= container(conf, role) <= high
    assert container(conf, role) % step == 0
    assert DISK[0] <= gigabytes(conf[f"spark.emr-serverless.{role}.disk"]) <= DISK[1]


@pytest.mark.parametrize("executors", SIZES)
def test_a_job_run_has_as_many_executors_as_are_accepted(executors: int) -> None:
    conf = cluster.job_settings(SETTINGS | {"executors": executors}, OUTPUTS)
    assert int(conf["spark.dynamicAllocation.maxExecutors"]) >= LEAST_EXECUTORS


def test_what_a_new_account_may_run_is_enough_for_the_smallest_size() -> None:
    needs = cluster.vcpus(SETTINGS, OUTPUTS)(1) | cluster.vcpus_of_job(SETTINGS, OUTPUTS)(1)
    assert {quota: vcpus for quota, vcpus in needs.items() if vcpus > FIRST_QUOTAS[quota]} == {}


def test_the_quotas_have_aws_s_codes() -> None:
    assert {each.code: each.service for each in (quotas.ON_DEMAND, quotas.SPOT, quotas.SERVERLESS)} == CODES


def test_the_application_may_use_what_a_job_run_asks_for() -> None:
    (vcpus, memory) = map(int, re.findall(r"MaximumCapacity: \{Cpu: (\d+) vCPU, Memory: (\d+) GB\}", TEMPLATE)[0])
    conf, n = cluster.job_settings(SETTINGS, OUTPUTS), SETTINGS["executors"]
    assert cluster.vcpus_of_job(SETTINGS, OUTPUTS)(n)[quotas.SERVERLESS] <= vcpus
    assert container(conf, "driver") + n * container(conf, "executor") <= memory


@pytest.mark.parametrize("name", ["CORE", "TASK"])
def test_yarn_starts_no_more_executors_on_a_node_than_its_vcpus_are_for(name: str) -> None:
    executor = container(defaults(), "executor") * 1024
    (fleet,) = (each for each in request()["Instances"]["InstanceFleets"] if each["InstanceFleetType"] == name)
    for kind in fleet["InstanceTypeConfigs"]:
        size = kind["InstanceType"].partition(".")[2]
        started = math.floor(YARN_MB[size] / executor)
        assert (
            started == kind["WeightedCapacity"] == cost.cores(kind["InstanceType"]) / int(defaults()["spark.executor.cores"])
        )


def test_the_only_node_of_the_smallest_size_holds_an_executor_beside_the_application_master() -> None:
    assert container(defaults(), "executor") * 1024 + MASTER_MB <= YARN_MB["xlarge"]


@pytest.mark.parametrize("executors", SIZES)
def test_no_fleet_is_asked_for_without_a_node(executors: int) -> None:
    for fleet in request(executors)["Instances"]["InstanceFleets"]:
        assert sum(fleet.get(key, 0) for key in cluster.TARGETS) > 0


def test_nothing_is_asked_for_that_needs_an_image_of_ones_own() -> None:
    assert {"RepoUpgradeOnBoot", "CustomAmiId"} & set(request()) == set()


def test_spot_is_waited_for_as_long_as_emr_allows() -> None:
    fleets = request()["Instances"]["InstanceFleets"]
    found = [each["LaunchSpecifications"]["SpotSpecification"] for each in fleets if "LaunchSpecifications" in each]
    assert [TIMEOUT_MINUTES[0] <= each["TimeoutDurationMinutes"] <= TIMEOUT_MINUTES[1] for each in found] == [True]


@pytest.mark.parametrize("release", SETTINGS["releases"])
def test_until_when_a_release_is_supported_is_told(release: str) -> None:
    (line,) = re.findall(rf"^  {re.escape(release)}: .*$", cloud.SETTINGS.read_text(), re.M)
    assert f"until {SUPPORT[release]}" in line


@pytest.mark.parametrize("release", SETTINGS["releases"])
def test_the_group_for_service_access_admits_what_the_release_needs(release: str) -> None:
    rules = [each["Properties"] for each in RESOURCES.values() if each["Type"] == "AWS::EC2::SecurityGroupIngress"]
    rules = [each for each in rules if each["GroupId"] == "ServiceAccessSecurityGroup"]
    rules += RESOURCES["ServiceAccessSecurityGroup"]["Properties"].get("SecurityGroupIngress", [])
    (needed,) = (ports for name, ports in PORTS.items() if release.startswith(name))
    assert needed <= {port for each in rules for port in range(each["FromPort"], each["ToPort"] + 1)}


@pytest.mark.parametrize("bucket", ENDPOINT)
def test_the_endpoint_of_s3_lets_emr_do_what_its_sample_policy_does(bucket: str) -> None:
    allowed: set[str] = set()
    for statement in RESOURCES["S3Endpoint"]["Properties"]["PolicyDocument"]["Statement"]:
        resources, actions = (
            each if isinstance(each, list) else [each] for each in (statement["Resource"], statement["Action"])
        )
        if any(bucket in resource for resource in resources):
            allowed |= set(actions)
    assert ENDPOINT[bucket] <= allowed
