"""Compute what 1, 10 and 100 million photographs would take: the tables of docs/scale.md, from what was measured.

usage: python -m benchmarks.extrapolate

reads   benchmarks/growing.json  seconds of featurize, with two networks
        benchmarks/results.json  seconds of ingest, and of featurize with one executor and with two
        benchmarks/scale.json    processor seconds and memory of each later stage, by number of images
        bootstrap/aws/cluster.yaml, bootstrap/aws/prices.yaml
writes  docs/scale.md, between its marks

A stage takes its start, and processor seconds for each photograph; `neighbours` also takes some for each photograph and each
centre, of which there is one for 1,024 photographs. Stages on Spark share theirs among all cores, each of which may then do
a little less (EFFICIENCY). The others run on the machine that starts them, one after the other, and count as if on one core.
"""

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from bootstrap.aws import cloud, cluster, cost

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/scale.md"
GROWING, RESULTS, SCALE = (
    json.loads((ROOT / f"benchmarks/{name}.json").read_text()) for name in ("growing", "results", "scale")
)
SIZES = (10**6, 10**7, 10**8)
ON_SPARK = ("ingest", "featurize", "neighbours", "covariance", "reduce")
NETWORKS = {"efficientnet-lite0": "EfficientNet-Lite0, float32", "resnet50": "ResNet50, bfloat16"}
GIB, MIB, KIB = 2**30, 2**20, 2**10
# Of two executors, each does this share of what one does alone. Their longer start, which is left out, can make it seem more
# than all.
EFFICIENCY = min(1.0, RESULTS["executors"]["ratios"]["two"] / 2)
PAIR = 2.9e-9  # processor seconds to compare two sketches: 2,917 for a million images against a million
IMAGES_OF_A_CENTRE = 1024  # ROWS of neighbours
# An assumption: a network reaches 15 % of the 121 TFLOP/s of an NVIDIA L4 in bfloat16 (NVIDIA's data sheet, no sparsity).
# GFLOP of a photograph of 224 x 224 pixels: two for each product.
GPU_GFLOPS = 121_000 * 0.15
GFLOP = {"efficientnet-lite0": 0.78, "resnet50": 7.74}
GPU, GPU_CORES = "g6.2xlarge", 8
LAPTOP, SERVER = "m6i.xlarge", "m6i.4xlarge"  # an xlarge has 4 cores; 2 cost half of it
SERVER_GIB = 64
IDLE_HOURS = 0.5  # that a cluster waits before it ends, and is paid
NODE = "m6i.xlarge"
NODE_GIB = 16


class Cost(NamedTuple):
    """Hold what a stage takes: processor seconds for its start, for each photograph, and for each two of them."""

    start: float
    each: float
    each_two: float = 0.0

    def seconds(self, n: int) -> float:
        return self.start + self.each * n + self.each_two * n**2


class Place(NamedTuple):
    """Hold where a run takes place."""

    name: str
    cores: int  # that stages on Spark share
    spark: float  # EUR an hour of these
    rest: float  # EUR an hour of the machine that runs the other stages; also while it waits for Spark
    gpu: bool = False


def main() -> None:
    PAGE.write_text(fill(PAGE.read_text()))


def fill(page: str) -> str:
    """Put each table between its marks."""
    for name, text in {"hours": hours(), "stages": stages(), "limits": limits(), "check": check()}.items():
        before, rest = page.split(f"<!-- {name} -->\n")
        _, after = rest.split("<!-- end -->", 1)
        page = f"{before}<!-- {name} -->\n{text}<!-- end -->{after}"
    return page


# What was measured


def costs(network: str) -> dict[str, Cost]:
    """Compute the Cost of each stage."""
    growth = RESULTS["growth"]["seconds"]
    few, many = (statistics.median(growth[f"ingest, {n:,} files"]) for n in (10_000, 100_000))
    cores = RESULTS["growth"]["machine"]["cores"]
    runs, n_full = GROWING[network]["featurize"], GROWING[network]["featurize"]["full"]["passes"]
    network_cores = GROWING[network]["machine"]["cores"]
    network_each = (runs["full"]["median"] - runs["start-up"]["median"]) / n_full
    ingest_each = (many - few) / 90_000
    return {
        "ingest": Cost(cores * (few - 10_000 * ingest_each), cores * ingest_each),
        "featurize": Cost(network_cores * runs["start-up"]["median"], network_cores * network_each),
        **{name: measured_cost(name) for name in measured_stages()},
    }


def measured_stages() -> list[str]:
    return [name for name in next(iter(SCALE["images"].values())) if name != "compare"]


def measured(name: str) -> tuple[tuple[int, dict[str, Any]], tuple[int, dict[str, Any]]]:
    """Return the fewest and the most images that the stage was measured with, and what was measured."""
    found = [(int(n), stages[name]) for n, stages in SCALE["images"].items() if name in stages]
    return min(found, key=lambda each: each[0]), max(found, key=lambda each: each[0])


def measured_cost(name: str) -> Cost:
    (n_few, few), (n_many, many) = measured(name)
    each_two = PAIR / IMAGES_OF_A_CENTRE if name == "neighbours" else 0.0
    (few_seconds, many_seconds) = (each["processor_seconds"] - each_two * n**2 for n, each in ((n_few, few), (n_many, many)))
    each = (many_seconds - few_seconds) / (n_many - n_few)
    return Cost(few_seconds - each * n_few, each, each_two)


def bytes_of_each(name: str, kind: str) -> float:
    """Compute what one photograph more takes of the memory of the stage's largest process of a kind, bytes."""
    (n_few, few), (n_many, many) = measured(name)
    return (many["mib"].get(kind, 0) - few["mib"].get(kind, 0)) * MIB / (n_many - n_few)


# Where it runs


def places() -> list[Place]:
    prices, settings = cost.load(), cloud.settings()
    units = cluster.units(settings["executors"])
    on_demand, spot = (cost.of_node(NODE, market, prices) for market in ("ON_DEMAND", "SPOT"))
    nodes = (1 + units["CoreOnDemand"]) * on_demand + (units["Executors"] - units["CoreOnDemand"]) * spot
    server = prices["ec2"][SERVER] / prices["usd_per_eur"]
    return [
        Place("2 cores", 2, 0, prices["ec2"][LAPTOP] / 2 / prices["usd_per_eur"]),
        Place("16 cores", 16, 0, server),
        Place(f"cluster of {units['Executors'] * cluster.UNIT} cores", units["Executors"] * cluster.UNIT, nodes, server),
        Place("one GPU, 8 cores", GPU_CORES, 0, prices["ec2"][GPU] / prices["usd_per_eur"], gpu=True),
    ]


def spark_hours(n: int, network: str, place: Place) -> float:
    """Compute the hours of the stages on Spark."""
    each = costs(network)
    if place.gpu:
        on_gpu = n * GFLOP[network] / GPU_GFLOPS * place.cores  # while its cores wait for it
        each["featurize"] = Cost(each["featurize"].start, max(on_gpu / n, beside_network()))
    shared = place.cores * (EFFICIENCY if place.cores > 1 else 1)
    return sum(each[name].seconds(n) for name in ON_SPARK) / shared / 3600


def beside_network() -> float:
    """Compute the processor seconds of featurize for a photograph without the network: decoding, moving, writing."""
    section = RESULTS["limit"]
    bare, ours = (statistics.median(section["seconds"][f"{name}, start-up apart"]) for name in ("bare loop", "featurize"))
    decoding = 0.0005  # as docs/performance.md has it: 0.1 ms to decode, 0.4 to resize
    return section["machine"]["cores"] * (ours - bare) / section["images"] + decoding


def run_of(n: int, network: str, place: Place) -> tuple[float, float]:
    """Compute hours and EUR of a whole run."""
    on_spark = spark_hours(n, network, place)
    others = sum(each.seconds(n) for name, each in costs(network).items() if name not in ON_SPARK) / 3600
    idle = IDLE_HOURS if place.spark else 0
    return on_spark + others, (on_spark + idle) * place.spark + (on_spark + others) * place.rest


# The tables


def hours() -> str:
    lines = ["| photographs | network | " + " | ".join(place.name for place in places()) + " |"]
    lines += ["|---|---|" + "---|" * len(places())]
    for n in SIZES:
        for network, name in NETWORKS.items():
            found = [run_of(n, network, place) for place in places()]
            lines.append(
                f"| {n:,} | {name} | " + " | ".join(f"{say(each)} h, {say(euros)} €" for each, euros in found) + " |"
            )
    return "\n".join(lines) + "\n"


def stages() -> str:
    lines = [
        "| stage | processor seconds to start | for 1,000 photographs | bytes for a photograph | hours of a core for 10⁷ |"
    ]
    lines += ["|---|---|---|---|---|"]
    rows = [(name, each) for name, each in costs(min(NETWORKS)).items() if name != "featurize"]
    rows[1:1] = [(f"featurize, {name}", costs(network)["featurize"]) for network, name in NETWORKS.items()]
    for name, each in rows:
        rate = say(1000 * each.each) + (f" and {each.each_two * 1e9:.2g} for each million" if each.each_two else "")
        is_known = name in measured_stages()
        memory = say(max(bytes_of_each(name, "stage"), bytes_of_each(name, "worker"), 0)) if is_known else ""
        lines.append(f"| {name} | {say(max(each.start, 0))} | {rate} | {memory} | {say(each.seconds(10**7) / 3600)} |")
    return "\n".join(lines) + "\n"


def limits() -> str:
    """Tell for what memory, disk or patience a photograph takes too much, and of how many photographs; the least first."""
    settings, n_executors = cloud.settings(), cloud.settings()["executors"]
    defaults = next(
        each["Properties"] for each in settings["cluster"]["Configurations"] if each["Classification"] == "spark-defaults"
    )
    worker = int(defaults["spark.executor.memoryOverhead"].removesuffix("g")) / int(defaults["spark.executor.cores"]) * GIB
    driver = (NODE_GIB - 4) * GIB
    disk = cost.load()["ebs_gb"] * 1e9 * n_executors
    found = [
        ("names, sketches and cells in each worker of `neighbours`", 64 + 4 * 64 + 4 * 4 + 8, "bytes", worker),
        ("the driver of `neighbours`", bytes_of_each("neighbours", "stage"), "bytes", driver),
        ("names of images in one column of Arrow, in `split` and `suspects`", 64, "bytes", 2 * GIB),
        ("`split` on this machine, of 64 GiB", bytes_of_each("split", "stage"), "bytes", SERVER_GIB * GIB),
        ("`suspects`, likewise", bytes_of_each("suspects", "stage"), "bytes", SERVER_GIB * GIB),
        ("names and folds in each worker of `covariance`", 64 + 1, "bytes", worker),
        ("the list of files in the driver of `ingest`", 100, "bytes", driver),
        ("the shuffle of `featurize`, and its table, on the nodes' disks", 2 * 4 * 1280, "bytes", disk),
        ("`dvc status` of photographs as files: more than 3 seconds", 12.0 / 106_050, "seconds", 3),
        ("requests to S3 for photographs as files, 5,500 a second: an hour", 1 / 5500, "seconds", 3600),
    ]
    lines = ["| what | a photograph takes | there is | so it ends at |", "|---|---|---|---|"]
    for what, each, unit, there in sorted(found, key=lambda row: row[3] / row[1]):
        taken = f"{say(each)} bytes" if unit == "bytes" else f"{1000 * each:.2f} ms"
        is_there = f"{say(there / GIB)} GiB" if unit == "bytes" else f"{say(there)} s"
        lines.append(f"| {what} | {taken} | {is_there} | {say(there / each / 1e6)} million |")
    return "\n".join(lines) + "\n"


def check() -> str:
    """Hold what one executor's seconds tell of two against what was measured."""
    section = RESULTS["executors"]
    n = section["images"]
    one, two = (
        statistics.median(
            section["seconds"][f"featurize, {k} executor{'s'[: k - 1]} of one core: {n:,} images, start-up apart"]
        )
        for k in (1, 2)
    )
    each = RESULTS["limit"]["seconds"]["featurize, start-up apart"]
    by_limit = statistics.median(each) * n / RESULTS["limit"]["images"]
    lines = ["| featurize, two cores, start-up apart | seconds |", "|---|---|"]
    lines += [f"| measured, {n:,} photographs, two executors | {two:.0f} |"]
    lines += [f"| from one executor, if two did twice as much | {one / 2:.0f} |"]
    lines += [f"| from {RESULTS['limit']['images']:,} photographs in one process on two cores | {by_limit:.0f} |"]
    return "\n".join(lines) + "\n"


def say(value: float) -> str:
    """Write a number with two digits that count."""
    if value == 0:
        return "0"
    if value >= 10:
        return f"{float(f'{value:.2g}'):,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


if __name__ == "__main__":
    main()
