"""The whole path on AWS for once, with some 60 images on the smallest cluster: `make cloud-test`, for who has an account.

usage: python -m tests.cloud [--yes]    with an administrator's keys; says what it costs, and asks

Takes the last commit to a folder of its own, runs the pipeline here, then on EMR: stack, Python for the nodes, DVC's remote,
check, cluster, all stages. dvc.lock must be that of the run here. In the end, also after a failure or Ctrl-C, it deletes all
that it made: cluster, stack and bucket. Their names end in -test, so nothing of the project's own stack is touched.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import yaml

from bootstrap.aws import cloud, cluster, cost, infrastructure, quotas, residency
from tests.helpers import PYTHON, ROOT, forget

MINUTES = 40  # that it takes, some 15 of them with a cluster; an estimate
SECONDS = 10  # between two looks at a cluster that ends
LAST = 30 * 60  # seconds to wait for its end
FRAMES, K = 2, 8  # 14 fruits, 2 axes, 2 frames: 56 images


def main(argv: list[str]) -> int:
    settings = cloud.settings()
    settings |= {"stack": f"{settings['stack']}-test", "executors": 1}
    settings["cluster"]["Name"] += "-test"
    outputs = dict.fromkeys(re.findall(r"^  (\w+): .*Value", infrastructure.TEMPLATE.read_text(), re.M), "unknown")
    # What can be known at once, before the run here takes its minutes.
    residency.require(settings["region"], [], remotes={})
    cloud.client("sts", settings["region"]).get_caller_identity()
    quotas.require(settings["region"], cluster.vcpus(settings, outputs), settings["executors"])
    _, high = cluster.per_hour(cluster.request(settings, outputs, settings["cluster"]["ReleaseLabel"]), cost.load())
    print(
        f"56 images through the whole pipeline, here and on EMR in {settings['region']}: some {MINUTES} minutes. The "
        f"cluster costs {high:.2f} EUR an hour at most, by prices.yaml, and storage some cents. In the end all is deleted."
    )
    if "--yes" not in argv and not cloud.confirm(f"Make stack {settings['stack']} and a cluster, and pay for them?"):
        raise SystemExit("cloud-test: nothing made")
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "fruits"
        prepare(clone, settings)
        call("dvc", "repro", cwd=clone, SPARK_TARGET="local")
        call("git", "commit", "--quiet", "--all", "--allow-empty", "-m", "Here", cwd=clone)
        try:
            is_equal = run_on_emr(clone, settings)
        finally:
            left = delete(clone, settings)
            for what in left:
                print(f"cloud-test: NOT DELETED, and perhaps paid for: {what}")
    print("cloud-test: the same dvc.lock as here" if is_equal else "cloud-test: another dvc.lock than here; see above")
    return 0 if is_equal and not left else 1


def prepare(clone: Path, settings: dict[str, Any]) -> None:
    """Make a copy of the last commit, with few images and names of its own."""
    call("git", "clone", "--quiet", str(ROOT), str(clone), cwd=clone.parent)
    (clone / "bootstrap/aws/cluster.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    params = (clone / "params.yaml").read_text()
    params = re.sub(r"^  frames: \d+", f"  frames: {FRAMES}", params, flags=re.M)
    (clone / "params.yaml").write_text(re.sub(r"^  k: \d+", f"  k: {K}", params, flags=re.M))
    for key, value in {"user.name": "cloud-test", "user.email": "cloud-test@localhost"}.items():
        call("git", "config", key, value, cwd=clone)


def run_on_emr(clone: Path, settings: dict[str, Any]) -> bool:
    """Run the pipeline on a cluster, and return whether its dvc.lock is that of the run here."""
    before = yaml.safe_load((clone / "dvc.lock").read_text())
    aws("infrastructure", "up", cwd=clone)
    aws("wheelhouse", cwd=clone)
    bucket = cloud.outputs(settings)["Bucket"]
    call("dvc", "remote", "add", "--quiet", "--default", "--force", "storage", f"s3://{bucket}/dvc", cwd=clone)
    call("dvc", "remote", "modify", "storage", "region", settings["region"], cwd=clone)
    call("dvc", "push", cwd=clone)
    aws("check", cwd=clone)
    aws("cluster", "up", cwd=clone)
    forget(clone)
    call("dvc", "repro", cwd=clone, SPARK_TARGET="emr")
    if yaml.safe_load((clone / "dvc.lock").read_text()) == before:
        return True
    with suppress(subprocess.CalledProcessError):
        call(str(PYTHON), "-m", "reports.compare", "HEAD", cwd=clone)
    return False


def delete(clone: Path, settings: dict[str, Any]) -> list[str]:
    """Delete cluster, stack and bucket, whatever of them is there; return what could not be deleted, with the reason."""
    left: list[str] = []
    bucket = ""
    with suppress(Exception, SystemExit):  # there may be no stack
        bucket = cloud.outputs(settings).get("Bucket", "")

    def attempt(what: str, deletion: Callable[[], None]) -> None:
        try:
            deletion()
        except (Exception, SystemExit) as error:
            left.append(f"{what}: {error}")

    attempt(f"cluster {settings['cluster']['Name']}", lambda: end_cluster(clone, settings))
    attempt(f"stack {settings['stack']}", lambda: aws("infrastructure", "down", "--yes", cwd=clone))
    if bucket:
        attempt(f"bucket {bucket}", lambda: delete_bucket(bucket, settings["region"]))
    return left


def end_cluster(clone: Path, settings: dict[str, Any]) -> None:
    """End the cluster, and wait until it is gone: until then it is in the network."""
    emr = cloud.client("emr", settings["region"])
    cluster_id = cloud.find_cluster(emr, settings["cluster"]["Name"])
    aws("cluster", "down", "--yes", cwd=clone)
    ends = time.monotonic() + LAST
    while cluster_id and not emr.describe_cluster(ClusterId=cluster_id)["Cluster"]["Status"]["State"].startswith(
        "TERMINATED"
    ):
        if time.monotonic() > ends:
            raise SystemExit(f"{cluster_id} has not ended within {LAST / 60:.0f} minutes")
        time.sleep(SECONDS)


def delete_bucket(name: str, region: str) -> None:
    bucket = boto3.resource("s3", region).Bucket(name)
    bucket.object_versions.delete()
    bucket.delete()


def aws(command: str, *words: str, cwd: Path) -> None:
    call(str(PYTHON), "-m", f"bootstrap.aws.{command}", *words, cwd=cwd)


def call(*command: str, cwd: Path, **environment: str) -> None:
    print("$", *(f"{name}={value}" for name, value in environment.items()), *command, flush=True)
    path = {"PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, cwd=cwd, env=os.environ | path | environment, check=True)


if __name__ == "__main__":
    with cloud.errors_in_words("cloud-test"):
        sys.exit(main(sys.argv[1:]))
