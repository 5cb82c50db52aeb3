"""Put into the project's bucket what install.sh installs on the nodes of a cluster.

usage: python -m bootstrap.aws.wheelhouse [--release LABEL]

Uploads the wheels of what the Spark stages import, at the versions of requirements.txt and constraints.txt, for the nodes'
Python, each with its SHA-256. pyspark is left out, as it would replace EMR's own. The folder is named by these versions and
by install.sh: so a cluster never gets another commit's packages, and nothing in a folder ever changes.

If cluster.yaml asks for EMR Serverless, whose workers install nothing, the same packages are also uploaded as an archive.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from bootstrap.aws import cloud, residency

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALL = Path(__file__).with_name("install.sh")
# What the stages on Spark import.
IMPORTED = ("numpy", "pandas", "pi-heif", "pillow", "pyarrow", "simplejpeg", "tensorflow-cpu", "threadpoolctl")
PYTHON = "3.11"  # which all the releases have
# Amazon Linux 2023 has glibc 2.34, and runs what was built for an older one. pip wants the name of each older one.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)] + ["manylinux2014_x86_64", "manylinux2010_x86_64"]
INDEX = "requirements.txt"  # uploaded last: if it exists, so do all wheels
ARCHIVE = "packages.tar.gz"


def main(argv: list[str]) -> None:
    settings = cloud.settings()
    parser = argparse.ArgumentParser(usage=(__doc__ or "").partition("usage: ")[2].partition("\n")[0])
    parser.add_argument("--release", default=settings["cluster"]["ReleaseLabel"])
    release = parser.parse_args(argv).release
    versions = pins(settings, release)
    region, bucket = settings["region"], cloud.outputs(settings)["Bucket"]
    residency.require(region, [bucket])
    s3 = cloud.client("s3", region)
    key = folder(versions)
    with_archive = settings["parameters"]["Serverless"] == "true"
    if exists(s3, bucket, key) and (not with_archive or exists(s3, bucket, key, ARCHIVE)):
        print(f"s3://{bucket}/{key} exists already: Python for {release}")
        return
    with tempfile.TemporaryDirectory() as name:
        wheels = Path(name)
        download(versions, wheels)
        (wheels / INDEX).write_text(with_hashes(wheels))
        (wheels / INSTALL.name).write_bytes(INSTALL.read_bytes())
        if with_archive:
            pack(wheels)
        upload(s3, bucket, key, wheels)
    print(f"s3://{bucket}/{key}: Python for {release}\nNext:  make cloud-up")


def pins(settings: dict[str, Any], release: str) -> dict[str, str]:
    """Return the exact version of each package that a node may need: the release's own, or that of the requirements.

    Raises
    ------
    SystemExit
        cluster.yaml does not know the release
    """
    if release not in settings["releases"]:
        known = ", ".join(settings["releases"])
        raise SystemExit(
            f"wheelhouse: unknown release {release!r}; cluster.yaml knows {known}: take one of them, or add it to `releases`"
        )
    lines = [line for name in ("constraints.txt", INDEX) for line in (ROOT / name).read_text().splitlines()]
    pinned = [match.groups() for line in lines if (match := re.match(r"([\w.-]+)==([^\s;#]+)", line))]
    return {normalize(name): version for name, version in pinned} | settings["releases"][release]


def normalize(name: str) -> str:
    """Write a package's name as PEP 503 does."""
    return re.sub(r"[-_.]+", "-", name).lower()


def folder(versions: Mapping[str, str]) -> str:
    """Return the prefix in the bucket that holds these versions and this install.sh."""
    what = "\n".join([PYTHON, *PLATFORMS, *IMPORTED, *(f"{name}=={versions[name]}" for name in sorted(versions))])
    return f"bootstrap/{hashlib.sha256(what.encode() + INSTALL.read_bytes()).hexdigest()[:16]}"


def exists(s3: Any, bucket: str, key: str, name: str = INDEX) -> bool:
    """Return whether the folder of the bucket has that file."""
    try:
        s3.head_object(Bucket=bucket, Key=f"{key}/{name}")
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchKey"):
            raise
        return False
    return True


def download(versions: Mapping[str, str], wheels: Path) -> None:
    """Download the wheels of what is imported, and of what that imports, for the nodes, not for this machine."""
    limits = wheels / "constraints.txt"
    limits.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    wanted = [f"{name}=={versions[name]}" for name in IMPORTED]
    print("Downloading", *wanted, "and what they need, some 400 MB")
    if pip("download", "--constraint", str(limits), "--dest", str(wheels), *wanted):
        raise SystemExit("wheelhouse: pip could not download them, for the reason above; nothing was uploaded")
    limits.unlink()


def pip(command: str, *arguments: str) -> int:
    """Run a command of pip for the nodes' Python, whatever runs here, and return its exit status."""
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    target += [part for platform in PLATFORMS for part in ("--platform", platform)]
    quiet = ["--quiet", "--disable-pip-version-check", "--progress-bar", "off"]
    return subprocess.run([sys.executable, "-m", "pip", command, *quiet, *target, *arguments]).returncode


def pack(wheels: Path) -> None:
    """Install the wheels into a folder, and pack that folder as an archive beside them."""
    with tempfile.TemporaryDirectory() as name:
        checked = ["--no-index", "--find-links", str(wheels), "--require-hashes", "--requirement", str(wheels / INDEX)]
        if pip("install", "--no-deps", "--no-compile", *checked, "--target", name):
            raise SystemExit("wheelhouse: pip could not install the wheels, for the reason above; nothing was uploaded")
        print("Packing them for EMR Serverless, about a minute")
        with tarfile.open(wheels / ARCHIVE, "w:gz", compresslevel=6) as archive:
            archive.add(name, ".")


def with_hashes(wheels: Path) -> str:
    """Return a requirements.txt of exactly these wheels, each with the SHA-256 of its file."""
    lines = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        with wheel.open("rb") as file:
            lines.append(f"{normalize(name)}=={version} --hash=sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}\n")
    return "".join(lines)


def upload(s3: Any, bucket: str, key: str, wheels: Path) -> None:
    """Upload the files that the folder lacks, the index last."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/")
    have = {(item["Key"], item["Size"]) for page in pages for item in page.get("Contents", [])}
    files = [file for file in wheels.iterdir() if file.name != INDEX]
    missing = [file for file in files if (f"{key}/{file.name}", file.stat().st_size) not in have]
    megabytes = sum(file.stat().st_size for file in missing) / 1e6
    print(f"Uploading {len(missing)} files, {megabytes:,.0f} MB, to s3://{bucket}/{key}")

    def put(file: Path) -> None:
        s3.upload_file(str(file), bucket, f"{key}/{file.name}", Config=TransferConfig(use_threads=False))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, missing))
    put(wheels / INDEX)


if __name__ == "__main__":
    with cloud.errors_in_words("wheelhouse"):
        main(sys.argv[1:])
