"""What a team shares by way of S3: git's and DVC's own commands, fresh clones, a real S3 server that checks signatures."""

import filecmp
import json
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from PIL import Image

from tests.helpers import PIPELINE, PYTHON, run

pytestmark = pytest.mark.slow

BUCKET, KEY, SECRET = "fruits-of-a-team", "THETEAM", secrets.token_hex(16)
PORTS = ["master.port", "volume.port", "filer.port", "s3.port"]


class Storage(NamedTuple):
    """A server, and how one who may talks to it: by the environment alone."""

    environment: dict[str, str]
    client: Any

    def objects(self) -> dict[str, object]:
        """The time of the last upload of each object, by its key."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return {each["Key"]: each["LastModified"] for page in pages for each in page.get("Contents", [])}


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """SeaweedFS with an empty bucket, on this machine alone."""
    folder = tmp_path_factory.mktemp("storage")
    identity = {"name": "team", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = [*PORTS, *(f"{name}.grpc" for name in PORTS)]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [
        *(str(PYTHON.with_name("weed")), "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-dir={folder}", "-s3", f"-s3.config={folder}/s3.json", "-s3.autoCreateBucket=false", "-s3.iam=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        *("-master.volumeSizeLimitMB=64", "-volume.max=32"),
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    url = f"http://127.0.0.1:{ports['s3.port']}"
    who = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    # aws_access_key_id and so on are what boto3 calls the variables of the environment.
    client = boto3.client(
        "s3",
        "eu-west-3",
        endpoint_url=url,
        config=Config(retries={"max_attempts": 1}),
        **{k.lower(): v for k, v in who.items()},
    )
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server:
        try:
            for _ in range(300):
                try:
                    client.create_bucket(Bucket=BUCKET)
                    break
                except (BotoCoreError, ClientError):
                    time.sleep(0.2)
            else:
                raise AssertionError((folder / "log").read_text()[-3000:])
            yield Storage({"AWS_ENDPOINT_URL": url, **who}, client)
        finally:
            server.kill()


@pytest.fixture(scope="module")
def author(clone: Path, storage: Storage) -> Path:
    """Who ran the pipeline, set the remote and pushed everything; git's remote is a bare repository beside."""
    run("git", "init", "--quiet", "--bare", str(clone.parent / "origin.git"), cwd=clone)
    run("git", "remote", "add", "origin", str(clone.parent / "origin.git"), cwd=clone)
    make_remote(BUCKET, clone, **storage.environment)
    run("git", "commit", "--quiet", "-am", "Share by way of S3", cwd=clone)
    run("git", "push", "--quiet", "origin", "HEAD", cwd=clone)
    run("dvc", "push", cwd=clone, **storage.environment)
    return clone


def make_remote(bucket: str, folder: Path, **environment: str) -> str:
    return run("make", "--old-file=.venv/run", "remote", f"BUCKET={bucket}", cwd=folder, **environment)  # installs nothing


@pytest.fixture
def mate(author: Path, tmp_path: Path) -> Path:
    """Another's fresh clone, without any data."""
    run("git", "clone", "--quiet", str(author.parent / "origin.git"), str(tmp_path / "repository"), cwd=tmp_path)
    run("make", "identity", cwd=tmp_path / "repository")
    return tmp_path / "repository"


def stages_run(said: str) -> list[str]:
    return [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]


def data(folder: Path) -> list[str]:
    """The files of all that DVC tracks."""
    places = [place for stage in PIPELINE.values() for place in stage.get("outs", [])]
    files = [path for place in places for path in (folder / place).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in files)


def test_the_remote_is_a_place_and_a_region_and_no_credential(author: Path) -> None:
    said = run("git", "diff", "HEAD~1", "--unified=0", "--", ".dvc/config", cwd=author)
    assert [line[1:].strip() for line in said.splitlines() if line.startswith("+") and "+++" not in line] == [
        "remote = storage",
        "['remote \"storage\"']",
        f"url = s3://{BUCKET}/dvc",
        "region = eu-west-3",
    ]


def test_a_bucket_that_cannot_be_asked_where_it_is_becomes_no_remote(author: Path, storage: Storage) -> None:
    before = (author / ".dvc/config").read_text()
    with pytest.raises(AssertionError, match=r"(?s)bucket nowhere +must lie in the EU +cannot be read.*REFUSED: 1 of"):
        make_remote("nowhere", author, **storage.environment)
    assert (author / ".dvc/config").read_text() == before


def test_what_is_pushed_is_pulled_byte_for_byte_and_not_computed_again(author: Path, mate: Path, storage: Storage) -> None:
    run("dvc", "pull", cwd=mate, **storage.environment)
    files = data(author)
    assert len(files) > 112  # the photographs, and more
    assert data(mate) == files
    assert filecmp.cmpfiles(author, mate, files, shallow=False) == (files, [], [])
    shutil.copytree(mate / "data/sample", mate / "data/mine")
    Image.new("RGB", (50, 50), "teal").save(mate / "data/mine/Pear/one-more.png")
    run("dvc", "add", "data/mine", cwd=mate)
    said = run("dvc", "exp", "run", "-S", "images=data/mine", "featurize", cwd=mate)
    assert "1 passes of efficientnet-lite0, 112 images from an earlier run" in said


def test_what_was_pushed_is_not_uploaded_again(author: Path, storage: Storage) -> None:
    before = storage.objects()
    said = run("dvc", "push", cwd=author, **storage.environment)
    assert "Everything is up to date" in said
    assert storage.objects() == before


def test_another_k_in_a_fresh_clone_computes_and_fetches_what_it_needs(mate: Path, storage: Storage) -> None:
    said = run("dvc", "exp", "run", "--pull", "--allow-missing", "-S", "reduce.k=4", cwd=mate, **storage.environment)
    assert stages_run(said) == ["reduce", "evaluate", "classify", "export", "runtime"]
    assert (mate / "data/features").exists()
    assert not (mate / "data/sample").exists()


@pytest.fixture(scope="module")
def experiment(author: Path, storage: Storage) -> str:
    """An experiment that its author has pushed, with the run cache."""
    run("dvc", "exp", "run", "--name", "three", "-S", "reduce.k=3", cwd=author, **storage.environment)
    run("dvc", "exp", "push", "origin", "three", cwd=author, **storage.environment)
    run("dvc", "push", "--run-cache", cwd=author, **storage.environment)
    return "three"


def test_an_experiment_that_is_pushed_is_had_with_metrics_and_data(
    author: Path, mate: Path, experiment: str, storage: Storage
) -> None:
    run("dvc", "exp", "pull", "origin", experiment, cwd=mate, **storage.environment)
    run("dvc", "exp", "apply", experiment, cwd=mate, **storage.environment)
    metrics = json.loads((mate / "reports/evaluation/metrics.json").read_text())
    files = [file for file in data(author) if file.startswith("data/reduced")]
    assert metrics["variance"]["components"] == 3
    assert filecmp.cmpfiles(author, mate, files, shallow=False) == (files, [], [])


def test_what_a_mate_has_run_is_not_run_again(mate: Path, experiment: str, storage: Storage) -> None:
    said = run("dvc", "exp", "run", "--pull", "--allow-missing", "-S", "reduce.k=3", cwd=mate, **storage.environment)
    assert stages_run(said) == ["runtime"]  # which records that all others came from the cache
    assert [f"Stage '{stage}' is cached" in said for stage in ("reduce", "evaluate", "classify", "export")] == [True] * 4


def test_wrong_credentials_are_said(mate: Path, storage: Storage) -> None:
    wrong = storage.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    with pytest.raises(AssertionError, match=r"ERROR: failed to connect to s3 .* Forbidden"):
        run("dvc", "pull", cwd=mate, **wrong)
    with pytest.raises(AssertionError, match=r"(?s)cannot be read: .*SignatureDoesNotMatch.*REFUSED: 1 of"):
        make_remote(BUCKET, mate, **wrong)


def test_the_secret_is_in_no_file_and_no_commit(author: Path, experiment: str) -> None:
    found = subprocess.run(["grep", "--recursive", "--files-with-matches", SECRET, "."], cwd=author, capture_output=True)
    assert found.returncode == 1  # no line selected
    assert SECRET not in run("git", "log", "--all", "--patch", cwd=author)
