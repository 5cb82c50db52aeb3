"""Facts about what docs/scale.md says of more photographs than were measured."""

import re

import pytest

from benchmarks import extrapolate
from bootstrap.aws import cost

CLUSTER = next(place for place in extrapolate.places() if place.spark)
NETWORK = "resnet50"


def test_the_tables_of_the_page_are_those_that_are_computed() -> None:
    page = extrapolate.PAGE.read_text()
    assert extrapolate.fill(page) == page, "run `python -m benchmarks.extrapolate`"


def test_two_executors_take_what_the_seconds_of_one_tell() -> None:
    measured, by_one, by_limit = map(int, re.findall(r"\| (\d+) \|$", extrapolate.check(), re.M))
    assert 2 * by_one / extrapolate.RESULTS["executors"]["ratios"]["two"] == pytest.approx(measured, abs=1)
    assert by_limit == pytest.approx(measured, rel=0.15)


def test_no_core_counts_for_more_than_one() -> None:
    assert extrapolate.EFFICIENCY <= 1


def test_a_cluster_costs_what_its_nodes_do() -> None:
    prices = cost.load()
    on_demand, spot = (cost.of_node("m6i.xlarge", market, prices) for market in ("ON_DEMAND", "SPOT"))
    assert CLUSTER.cores == 64
    assert CLUSTER.spark == pytest.approx(3 * on_demand + 14 * spot)


@pytest.mark.parametrize("place", extrapolate.places(), ids=lambda place: place.name)
def test_ten_times_as_many_photographs_take_about_ten_times_as_long(place: extrapolate.Place) -> None:
    few, many = (extrapolate.run_of(n, NETWORK, place)[0] for n in (10**6, 10**7))
    assert 9 < many / few < 12


def test_more_cores_take_fewer_hours() -> None:
    two, sixteen, cluster = (extrapolate.run_of(10**7, NETWORK, place)[0] for place in extrapolate.places()[:3])
    assert two > 5 * sixteen > 5 * cluster


def test_resnet50_takes_a_gpu_a_fifth_longer_than_the_rest_takes_its_cores_and_a_small_network_less() -> None:
    cores = extrapolate.beside_network() / extrapolate.GPU_CORES
    small, large = (extrapolate.GFLOP[network] / extrapolate.GPU_GFLOPS for network in ("efficientnet-lite0", NETWORK))
    assert small < cores
    assert large / cores == pytest.approx(1.2, abs=0.1)
