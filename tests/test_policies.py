"""The policies against what is really asked of AWS: each call of each `make` target, S3 by jobs, EC2 by EMR itself."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootstrap import remote
from bootstrap.aws import bucket, cloud, cluster, endpoint, infrastructure, residency, wheelhouse
from tests import iam
from tests.aws import KEY_OF_AWS, Aws, aws
from tests.iam import REGION, Request, is_allowed
from tests.test_emr import STAGE, call
from tests.test_wheelhouse import wheel

SETTINGS = cloud.settings()
LABEL = {"for-use-with-amazon-emr-managed-policies": "true"}


class Life:
    """From `make cloud-setup` to `make cloud-delete`: what was needed for each, and what jobs read and wrote."""

    def __init__(self) -> None:
        self.needed: dict[str, set[Request]] = {}
        self.values: dict[str, str] = {}
        self.outputs: dict[str, str] = {}
        self.tags: dict[str, dict[str, str]] = {}  # of what the network consists of, by name in the template
        self.read: set[tuple[str, str]] = set()
        self.written: set[tuple[str, str]] = set()


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    with aws(tmp_path_factory.mktemp("aws")) as played, pytest.MonkeyPatch.context() as patch:
        yield live(played, tmp_path_factory.mktemp("here"), patch)


def live(played: Aws, here: Path, patch: pytest.MonkeyPatch) -> Life:
    life, made = Life(), list[iam.Call]()
    roles: dict[str, str] = {}
    for name, value in played.environment.items():
        patch.setenv(name, value)
    for module, name in ((remote, "SECONDS"), (bucket, "SECONDS"), (endpoint, "WAIT"), (infrastructure, "WAIT")):
        patch.setattr(module, name, 0.05)
    for name in ("LOG_SECONDS", "LOG_SECONDS_OF_FAILURE"):
        patch.setattr(remote, name, 0.2)
    settings = SETTINGS | {"parameters": SETTINGS["parameters"] | {"Serverless": "true"}}
    patch.setattr(cloud, "settings", lambda: settings)
    patch.setattr(wheelhouse, "download", lambda versions, wheels: large_wheel(wheels))
    patch.chdir(here)
    (here / "stage.py").write_text(STAGE)
    (here / "in").mkdir()
    (here / ".dvc").mkdir()
    for name in ("a", "b"):
        (here / f"in/{name}.txt").write_text(name)
    played.is_plain = True
    iam.record(patch, made, but_by=KEY_OF_AWS)

    def noted(target: str) -> None:
        life.needed[target] = {request for each in made for request in iam.needed(each, roles)}
        made.clear()

    infrastructure.main(["up"])
    made.clear()
    life.outputs = outputs = cloud.outputs(settings)
    of_iam, ec2 = played.client("iam"), played.client("ec2")
    profile = outputs["InstanceProfile"]
    roles[profile] = of_iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"][0]["Arn"]
    life.values = iam.values(
        outputs["Bucket"],
        ServiceRole=outputs["ServiceRole"],
        NodeRole=roles[profile],
        ServerlessRole=outputs["ServerlessRole"],
    )
    made.clear()
    wheelhouse.main([])
    noted("wheelhouse")
    cluster.main(["up"])
    noted("cloud-up")
    for target in ("emr", "emr-serverless"):
        assert call(target, output=target) == 0
        assert call(target, source=target, output=f"{target}-next") == 0
        with pytest.raises(SystemExit, match="FAILED"):
            call(target, "fail", output=f"{target}-bad")
        patch.setenv("EMR_HOURS", "0.0003")
        with pytest.raises(SystemExit, match="was cancelled"):
            call(target, "hang", output=f"{target}-long")
        patch.delenv("EMR_HOURS")
        noted(f"repro on {target}")
    assert residency.main([]) == 0
    noted("residency")
    tags = [{"Key": key, "Value": value} for key, value in (LABEL | {"Name": endpoint.NAME}).items()]
    ec2.create_vpc_endpoint(
        VpcId=outputs["Vpc"],
        VpcEndpointType="Interface",
        ServiceName=f"com.amazonaws.{REGION}.elasticmapreduce",
        SubnetIds=outputs["Subnets"].split(","),
        TagSpecifications=[{"ResourceType": "vpc-endpoint", "Tags": tags}],
    )
    cluster.main(["status"])
    noted("cloud-status")
    cluster.main(["down", "--yes"])
    noted("cloud-down")
    life.read, life.written = played.read, played.written
    infrastructure.main(["down", "--yes"])
    return life


def large_wheel(wheels: Path) -> None:
    """So large that it is sent in parts."""
    with zipfile.ZipFile(wheel(wheels), "a") as archive:
        archive.writestr("orchard.bin", os.urandom(9 * 2**20))


TARGETS = ("wheelhouse", "cloud-up", "repro on emr", "repro on emr-serverless", "residency", "cloud-status", "cloud-down")


@pytest.mark.parametrize("target", TARGETS)
def test_whoever_has_the_launchers_policy_may_make_each_call(target: str, life: Life) -> None:
    policy = iam.policy("LauncherPolicy", life.values)
    assert life.needed[target]
    assert [str(each) for each in life.needed[target] if not is_allowed(each, policy)] == []
