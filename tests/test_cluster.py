"""cluster.yaml and cluster.py: what is asked of EMR, what it costs, and that nobody pays for one that was forgotten."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from moto import mock_aws

from bootstrap.aws import cloud, cluster, cost, quotas, residency, wheelhouse
from bootstrap.environment import LIKE_HASWELL
from tests.aws import PLENTY, teach_quotas
from tests.helpers import ROOT

SETTINGS = cloud.settings()
CLUSTER = SETTINGS["cluster"]
RELEASE = CLUSTER["ReleaseLabel"]
TEMPLATE = (ROOT / "bootstrap/aws/infrastructure.yaml").read_text()
OUTPUTS = {name: f"the-{name}" for name in re.findall(r"^  (\w+):.*Value", TEMPLATE.partition("\nOutputs:")[2], re.M)}
OUTPUTS["Subnets"] = "subnet-a,subnet-b"
NAMES = {"CORE", "MASTER", "TASK"}


def complaints(service: str, operation: str, request: dict[str, Any]) -> str:
    """What botocore has against a request, by the service's own model."""
    shape = botocore.session.get_session().get_service_model(service).operation_model(operation).input_shape
    return str(ParamValidator().validate(request, shape).generate_report())


def enumerations(value: Any, shape: Any) -> Iterator[tuple[str, list[str]]]:
    """Each word in a request of which the service's model knows all that there are: botocore does not look at them."""
    if shape.type_name == "structure":
        for key, item in value.items():
            yield from enumerations(item, shape.members[key])
    elif shape.type_name == "list":
        for item in value:
            yield from enumerations(item, shape.member)
    elif getattr(shape, "enum", None):
        yield value, shape.enum


def of(executors: int) -> dict[str, Any]:
    """The request for so many executors."""
    return cluster.request(SETTINGS | {"executors": executors}, OUTPUTS, RELEASE)


def fleets(request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {fleet["InstanceFleetType"]: fleet for fleet in request["Instances"]["InstanceFleets"]}


@pytest.fixture
def quotas_of_the_account() -> dict[str, float]:
    return dict(PLENTY)


@pytest.fixture
def emr(keys_of_nobody: None, monkeypatch: pytest.MonkeyPatch, quotas_of_the_account: dict[str, float]) -> Iterator[Any]:
    """EMR in Paris, with the stack there and Python for the nodes."""
    with mock_aws():
        teach_quotas(monkeypatch, quotas_of_the_account)
        s3 = boto3.client("s3", region_name=SETTINGS["region"])
        s3.create_bucket(Bucket="the-bucket", CreateBucketConfiguration={"LocationConstraint": SETTINGS["region"]})
        key = f"{wheelhouse.folder(wheelhouse.pins(SETTINGS, RELEASE))}/requirements.txt"
        s3.put_object(Bucket="the-bucket", Key=key, Body=b"")
        monkeypatch.setattr(cloud, "outputs", lambda settings: OUTPUTS | {"Bucket": "the-bucket"})
        monkeypatch.setattr(residency, "require", lambda region, buckets: None)
        yield boto3.client("emr", region_name=SETTINGS["region"])


@pytest.mark.parametrize("release", SETTINGS["releases"])
def test_the_request_is_one_that_emr_takes(release: str) -> None:
    request = cluster.request(SETTINGS, OUTPUTS, release)
    assert complaints("emr", "RunJobFlow", request) == ""
    assert request["ReleaseLabel"] == release


def test_each_word_of_the_request_is_one_that_emr_knows() -> None:
    model = botocore.session.get_session().get_service_model("emr").operation_model("RunJobFlow").input_shape
    words = list(enumerations(cluster.request(SETTINGS, OUTPUTS, RELEASE), model))
    assert len(words) == 6
    assert [word for word, known in words if word not in known] == []


def test_the_default_release_is_among_the_known() -> None:
    assert RELEASE in SETTINGS["releases"]


def test_nothing_of_the_request_is_left_to_be_filled_in() -> None:
    request = cluster.request(SETTINGS, OUTPUTS, RELEASE)
    assert "${" not in yaml.safe_dump(request)
    assert request["Instances"]["Ec2SubnetIds"] == ["subnet-a", "subnet-b"]
    assert request["LogUri"] == "s3://the-Bucket/logs/"


def test_a_placeholder_without_a_value_is_named() -> None:
    with pytest.raises(SystemExit, match=r"\$\{Typo\} in cluster\.yaml is none of Bucket"):
        cluster.fill(["${Typo}"], {"Bucket": "b"})


def test_the_bootstrap_action_installs_from_where_its_script_is() -> None:
    (action,) = cluster.request(SETTINGS, OUTPUTS, RELEASE)["BootstrapActions"]
    script, folder = action["ScriptBootstrapAction"]["Path"], action["ScriptBootstrapAction"]["Args"][0]
    assert script == f"{folder}/install.sh"
    assert folder == f"s3://the-Bucket/{wheelhouse.folder(wheelhouse.pins(SETTINGS, RELEASE))}"


def test_a_forgotten_cluster_ends_by_itself() -> None:
    assert 60 <= CLUSTER["AutoTerminationPolicy"]["IdleTimeout"] <= 3600
    assert CLUSTER["Instances"]["TerminationProtected"] is False


def test_only_what_can_be_lost_is_on_spot() -> None:
    found = fleets(of(16))
    assert {name for name, fleet in found.items() if fleet.get("TargetSpotCapacity")} == {"TASK"}
    assert set(found) == NAMES


def test_spot_has_several_pools_of_one_kind_of_processor() -> None:
    types = [kind["InstanceType"] for kind in fleets(CLUSTER)["TASK"]["InstanceTypeConfigs"]]
    assert len(types) > 1
    everywhere = {kind["InstanceType"] for fleet in fleets(CLUSTER).values() for kind in fleet["InstanceTypeConfigs"]}
    assert {name.partition(".")[0] for name in everywhere} == {"m6i"}


@pytest.mark.parametrize("executors", [1, 2, 3, 16, 100])
def test_the_cluster_as_it_starts_is_within_the_limits_of_its_scaling(executors: int) -> None:
    request = of(executors)
    limits = request["ManagedScalingPolicy"]["ComputeLimits"]
    core, task = (fleets(request).get(name, {}) for name in ("CORE", "TASK"))
    on_demand, on_spot = (core.get(name, 0) for name in cluster.TARGETS)
    assert on_demand + on_spot == limits["MaximumCoreCapacityUnits"] == limits["MinimumCapacityUnits"]
    assert on_demand == limits["MaximumOnDemandCapacityUnits"]
    assert on_demand + on_spot + task.get("TargetSpotCapacity", 0) <= limits["MaximumCapacityUnits"] == executors


@pytest.mark.parametrize("executors", [1, 2, 3, 16])
def test_the_request_of_any_size_is_one_that_emr_takes(executors: int) -> None:
    request = of(executors)
    assert complaints("emr", "RunJobFlow", request) == ""
    for fleet in fleets(request).values():
        targets = [fleet[key] for key in cluster.TARGETS if key in fleet]
        assert min(targets) > 0
        assert ("LaunchSpecifications" in fleet) == ("TargetSpotCapacity" in fleet)
        assert max(kind.get("WeightedCapacity", 1) for kind in fleet["InstanceTypeConfigs"]) <= sum(targets)


def test_one_executor_fits_into_the_quotas_of_a_new_account() -> None:
    needs = cluster.vcpus(SETTINGS, OUTPUTS)
    assert needs(1) == {quotas.ON_DEMAND: 4, quotas.SPOT: 4}
    assert needs(16) == {quotas.ON_DEMAND: 12, quotas.SPOT: 56}


def test_a_cluster_has_an_executor_at_least() -> None:
    with pytest.raises(SystemExit, match=r"`executors: 0` in cluster\.yaml: there must be 1 at least"):
        of(0)


def test_a_size_beyond_the_quotas_is_refused_with_both_numbers_how_to_ask_for_more_and_what_fits(
    emr: Any, quotas_of_the_account: dict[str, float]
) -> None:
    quotas_of_the_account |= {"L-1216C47A": 16.0, "L-34B43A08": 10.0}
    with pytest.raises(SystemExit) as refusal:
        cluster.main(["up"])
    said = str(refusal.value)
    assert "Running On-Demand Standard instances: 12 needed, 16 allowed\n" in said
    assert "All Standard Spot Instance Requests: 56 needed, 10 allowed\n" in said
    asked = "aws service-quotas request-service-quota-increase --region eu-west-3 --service-code ec2 --quota-code"
    assert re.findall(f"{asked} (.*)", said) == ["L-34B43A08 --desired-value 56"]
    assert said.endswith("`executors: 4` fits now.")
    assert cloud.find_cluster(emr, "fruits") is None


def test_of_a_new_account_one_executor_fits_and_comes_up(
    emr: Any, quotas_of_the_account: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    quotas_of_the_account |= {"L-1216C47A": 5.0, "L-34B43A08": 5.0}
    with pytest.raises(SystemExit, match="`executors: 1` fits now"):
        cluster.main(["up"])
    monkeypatch.setattr(cloud, "settings", lambda: SETTINGS | {"executors": 1})
    cluster.main(["up"])
    assert cloud.find_cluster(emr, "fruits")


def test_where_nothing_fits_no_size_is_offered(emr: Any, quotas_of_the_account: dict[str, float]) -> None:
    quotas_of_the_account |= {"L-1216C47A": 1.0}
    with pytest.raises(SystemExit, match="No smaller size fits"):
        cluster.main(["up"])


def test_quotas_that_aws_does_not_tell_stop_nothing(
    emr: Any, quotas_of_the_account: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    del quotas_of_the_account["L-34B43A08"]
    cluster.main(["up"])
    assert "All Standard Spot Instance Requests: 56 vCPUs needed, the quota is not known" in capsys.readouterr().out


def test_emr_keeps_no_cluster_beyond_the_quota(
    emr: Any, quotas_of_the_account: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of AWS as the tests play it: so the check beforehand is worth something."""
    quotas_of_the_account |= {"L-1216C47A": 5.0}
    monkeypatch.setattr(quotas, "require", lambda *_: "not asked")
    cluster.main(["up"])
    assert cloud.find_cluster(emr, "fruits") is None


def test_a_job_run_has_three_executors_at_least_with_numbers_as_text() -> None:
    found = [cluster.job_settings(SETTINGS | {"executors": n}, OUTPUTS) for n in (1, 16)]
    assert [conf["spark.dynamicAllocation.maxExecutors"] for conf in found] == ["3", "16"]
    needs = cluster.vcpus_of_job(SETTINGS, OUTPUTS)
    assert [needs(n)[quotas.SERVERLESS] for n in (1, 3, 16)] == [16, 16, 68]


def configuration(name: str) -> dict[str, str]:
    request = cluster.request(SETTINGS, OUTPUTS, RELEASE)
    return next(c["Properties"] for c in request["Configurations"] if c["Classification"] == name)


def test_the_region_is_told_wherever_it_would_be_looked_up() -> None:
    name = "spark.hadoop.fs.s3a.endpoint.region"
    assert configuration("spark-defaults")[name] == cluster.job_settings(SETTINGS, OUTPUTS)[name] == "eu-west-3"
    (action,) = cluster.request(SETTINGS, OUTPUTS, RELEASE)["BootstrapActions"]
    assert action["ScriptBootstrapAction"]["Args"][1] == "eu-west-3"


def test_a_unit_is_four_vcpus() -> None:
    for name in ("CORE", "TASK"):
        for kind in fleets(CLUSTER)[name]["InstanceTypeConfigs"]:
            assert cost.cores(kind["InstanceType"]) == 4 * kind["WeightedCapacity"]


def test_an_executor_fits_beside_the_application_master_on_the_smallest_node() -> None:
    conf = next(c for c in CLUSTER["Configurations"] if c["Classification"] == "spark-defaults")["Properties"]
    gigabytes = [int(conf[key].removesuffix("g")) for key in ("spark.executor.memory", "spark.executor.memoryOverhead")]
    # What EMR gives YARN on an xlarge of 16 GB: 12,288 MB (EMR Release Guide, task configuration).
    assert sum(gigabytes) * 1024 + 1024 <= 12288
    assert conf["spark.executor.cores"] == "4"


def test_nobody_gets_in_by_ssh() -> None:
    assert "Ec2KeyName" not in CLUSTER["Instances"]


def test_the_cluster_carries_the_tags_that_its_policies_ask_for() -> None:
    tags = {tag["Key"]: tag["Value"] for tag in cluster.request(SETTINGS, OUTPUTS, RELEASE)["Tags"]}
    assert tags == {"project": SETTINGS["stack"], "for-use-with-amazon-emr-managed-policies": "true"}


def test_a_job_run_unpacks_the_packages_of_the_wheelhouse() -> None:
    conf = cluster.job_settings(SETTINGS, OUTPUTS)
    folder = wheelhouse.folder(wheelhouse.pins(SETTINGS, RELEASE))
    assert conf["spark.archives"] == f"s3://the-Bucket/{folder}/{wheelhouse.ARCHIVE}#packages"
    assert all(isinstance(value, str) and "${" not in value for value in conf.values())


def test_a_cluster_costs_at_least_its_smallest_and_at_most_its_largest_nodes() -> None:
    prices = {
        "ec2": {"small": 0.1, "large": 0.4, "dear": 0.8},
        "spot": 0.1,
        "emr": 0,
        "ebs": 0,
        "ebs_gb": 0,
        "usd_per_eur": 1,
    }

    def fleet(name: str, *kinds: tuple[str, int]) -> dict[str, Any]:
        configs = [{"InstanceType": kind, "WeightedCapacity": units} for kind, units in kinds]
        return {"InstanceFleetType": name, "InstanceTypeConfigs": configs}

    request = {
        "Instances": {
            "InstanceFleets": [
                fleet("MASTER", ("small", 1), ("large", 1)),
                fleet("CORE", ("large", 4)),  # 0.1 a unit
                fleet("TASK", ("large", 4), ("dear", 4)),  # 0.1 and 0.2
            ]
        },
        "ManagedScalingPolicy": {"ComputeLimits": {"MinimumCapacityUnits": 4, "MaximumCapacityUnits": 10}},
    }
    assert cluster.per_hour(request, prices) == pytest.approx((0.1 + 0.4, 0.4 + 2.0))


def test_up_asks_for_the_cluster_and_says_what_it_costs(emr: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.main(["up"])
    one = cloud.find_cluster(emr, "fruits")
    said = capsys.readouterr().out
    low, high = cluster.per_hour(of(16), cost.load())
    assert "Running On-Demand Standard instances: 12 vCPUs needed, 64 allowed; All Standard Spot Instance" in said
    assert f"Cluster {one} (fruits, {RELEASE})" in said
    assert f"{low:.2f} to {high:.2f} EUR an hour" in said
    assert "30 minutes; `make cloud-down` ends it now" in said
    asked = emr.describe_cluster(ClusterId=one)["Cluster"]
    assert asked["SecurityConfiguration"] == "the-SecurityConfiguration"


def test_up_asks_for_the_other_release(emr: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"`make wheelhouse RELEASE=emr-7\.13\.0` makes it"):
        cluster.main(["up", "--release", "emr-7.13.0"])


def test_up_looks_at_residency_first(emr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(region: str, buckets: list[str]) -> None:
        asked.append((region, buckets))
        raise SystemExit("residency: refused")

    monkeypatch.setattr(residency, "require", refuse)
    with pytest.raises(SystemExit, match="residency"):
        cluster.main(["up"])
    assert asked == [("eu-west-3", ["the-bucket"])]
    assert cloud.find_cluster(emr, "fruits") is None


def test_a_second_cluster_of_the_name_is_refused(emr: Any) -> None:
    cluster.main(["up"])
    one = cloud.find_cluster(emr, "fruits")
    with pytest.raises(SystemExit, match=f"'fruits' is up already: {one}"):
        cluster.main(["up"])


def test_without_python_for_the_nodes_no_cluster_is_asked_for(emr: Any) -> None:
    s3 = boto3.client("s3", region_name=SETTINGS["region"])
    for item in s3.list_objects_v2(Bucket="the-bucket")["Contents"]:
        s3.delete_object(Bucket="the-bucket", Key=item["Key"])
    with pytest.raises(
        SystemExit, match=r"no s3://the-bucket/bootstrap/\w+, Python for the nodes\. `make wheelhouse` makes it"
    ):
        cluster.main(["up"])
    assert cloud.find_cluster(emr, "fruits") is None


def test_two_clusters_of_a_name_are_an_error(emr: Any) -> None:
    both = [emr.run_job_flow(**cluster.request(SETTINGS, OUTPUTS, RELEASE))["JobFlowId"] for _ in range(2)]
    with pytest.raises(SystemExit, match="2 clusters named 'fruits' are up") as error:
        cloud.find_cluster(emr, "fruits")
    assert all(one in str(error.value) for one in both)


def test_a_cluster_that_has_ended_is_not_found(emr: Any) -> None:
    cluster.main(["up"])
    cluster.main(["down", "--yes"])
    assert cloud.find_cluster(emr, "fruits") is None
    assert cloud.find_cluster(emr, "apples") is None


def test_down_asks_first(emr: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.main(["up"])
    one = cloud.find_cluster(emr, "fruits")
    questions: list[str] = []

    def press_enter(question: str) -> str:
        questions.append(question)
        return ""

    monkeypatch.setattr("builtins.input", press_enter)
    with pytest.raises(SystemExit, match="not ended; it is still paid for, until `make cloud-down`"):
        cluster.main(["down"])
    assert questions == [f"End cluster {one} (fruits) and what runs on it? [y/N] "]
    assert cloud.find_cluster(emr, "fruits") == one
    monkeypatch.setattr("builtins.input", lambda question: "y")
    cluster.main(["down"])
    assert cloud.find_cluster(emr, "fruits") is None


def test_where_nobody_can_answer_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    assert not cloud.confirm("Sure?")


def test_without_a_cluster_down_and_status_say_so(emr: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.main(["down"])
    cluster.main(["status"])
    assert capsys.readouterr().out.splitlines() == [
        "No cluster 'fruits' is up in eu-west-3; nothing to end.",
        "No cluster 'fruits' is up in eu-west-3.",
    ]


def test_status_says_what_there_is_and_what_it_has_cost(
    emr: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.main(["up"])
    one = cloud.find_cluster(emr, "fruits")
    now = datetime.now(UTC)

    def instance(kind: str, market: str, minutes: float, ended: float | None = None) -> dict[str, Any]:
        timeline = {"CreationDateTime": now - timedelta(minutes=minutes)}
        if ended is not None:
            timeline["EndDateTime"] = now - timedelta(minutes=ended)
        return {"InstanceType": kind, "Market": market, "Status": {"Timeline": timeline}}

    instances = [
        instance("m6i.xlarge", "ON_DEMAND", 60),
        instance("m6i.2xlarge", "SPOT", 30),
        instance("m6i.2xlarge", "SPOT", 30),
        instance("m6i.4xlarge", "SPOT", 60, ended=30),
    ]
    monkeypatch.setattr(cloud, "nodes", lambda emr, one: instances)
    capsys.readouterr()
    cluster.main(["status"])
    said = capsys.readouterr().out
    prices = cost.load()
    each = {kind: cost.of_node(kind, "SPOT", prices) for kind in ("m6i.2xlarge", "m6i.4xlarge")}
    primary = cost.of_node("m6i.xlarge", "ON_DEMAND", prices)
    assert f"Cluster {one} (fruits, {RELEASE}): WAITING" in said
    assert "Nodes: 2 x m6i.2xlarge spot, 1 x m6i.xlarge on demand\n" in said
    assert f"2.5 node hours, some {primary + each['m6i.2xlarge'] + each['m6i.4xlarge'] / 2:.2f} EUR" in said
    assert f"{primary + 2 * each['m6i.2xlarge']:.2f} EUR an hour now" in said


def test_each_page_of_instances_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages:
        def get_paginator(self, name: str) -> Any:
            return self

        def paginate(self, **arguments: str) -> list[dict[str, Any]]:
            return [{"Instances": [{"Id": "1"}]}, {"Instances": [{"Id": "2"}]}]

    assert [instance["Id"] for instance in cloud.nodes(Pages(), "j-1")] == ["1", "2"]


@pytest.mark.parametrize("executors", [3, 16])
def test_a_stage_is_divided_into_as_many_tasks_as_all_executors_have_cores(executors: int) -> None:
    settings = SETTINGS | {"executors": executors}
    of = {each["Classification"]: each for each in cluster.request(settings, OUTPUTS, RELEASE)["Configurations"]}
    for spark in (of["spark-defaults"]["Properties"], cluster.job_settings(settings, OUTPUTS)):
        assert int(spark["spark.default.parallelism"]) == executors * int(spark["spark.executor.cores"])


def test_drivers_and_executors_run_the_same_code_of_blas_and_numpy_as_this_machine() -> None:
    of = {each["Classification"]: each for each in SETTINGS["cluster"]["Configurations"]}
    places = [
        of["spark-env"]["Configurations"][0]["Properties"],
        environment_in(of["spark-defaults"]["Properties"], "spark.executorEnv."),
        environment_in(SETTINGS["serverless"], "spark.executorEnv."),
        environment_in(SETTINGS["serverless"], "spark.emr-serverless.driverEnv."),
    ]
    assert [{name: each.get(name) for name in LIKE_HASWELL} for each in places] == [LIKE_HASWELL] * 4


def environment_in(properties: dict[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in properties.items() if key.startswith(prefix)}
