"""The project's bucket on S3, as the storage of runs elsewhere."""

import gzip
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig

from bootstrap.aws import cloud
from bootstrap.job import PART, digest_of_files, files_of, published_name, sha256
from bootstrap.remote import SECONDS


class Bucket:
    """The project's bucket, by its keys; many small files, so many requests at a time."""

    def __init__(self, s3: Any, name: str) -> None:
        self.s3, self.name = s3, name
        self.transfer = TransferConfig(use_threads=False)

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def keys(self, prefix: str) -> list[str]:
        """The keys below the prefix, relative to it."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{prefix}/")
        return [item["Key"][len(prefix) + 1 :] for page in pages for item in page.get("Contents", [])]

    def address(self, place: str) -> str:
        """The URI of a file or a folder of the workspace, named by its content; a place that is a URI already stays.

        Raises
        ------
        SystemExit
            there is no such folder, or no file in it
        """
        return place if place.startswith("s3://") else self._address(place, content_of(place)[0])

    def put(self, place: str) -> str:
        """Send what is not there yet of a file or a folder of the workspace, and return its address."""
        if place.startswith("s3://"):
            return place
        prefix, files = content_of(place)
        there = set(self.keys(prefix))
        lacking = {name: path for name, path in files.items() if name not in there}
        if lacking:
            n_mb = sum(path.stat().st_size for path in lacking.values()) / 2**20
            print(f"submit: sending {len(lacking):,} of {len(files):,} files of {place}, {n_mb:,.1f} MB", flush=True)
            at_once(
                lambda item: self.s3.upload_file(str(item[1]), self.name, f"{prefix}/{item[0]}", Config=self.transfer),
                lacking.items(),
            )
        return self._address(place, prefix)

    def _address(self, place: str, prefix: str) -> str:
        return self.uri(f"{prefix}/{Path(place).name}" if Path(place).is_file() else prefix)

    def fetch(self, prefix: str, folder: Path) -> None:
        """Bring the tables that are whole below the prefix into the folder."""
        keys = self.keys(prefix)
        whole = {key.rpartition("/")[0] for key in keys if key.rpartition("/")[2] == "_SUCCESS"}
        wanted = [key for key in keys if key.rpartition("/")[0] in whole]
        for table in whole:
            (folder / table).mkdir(parents=True, exist_ok=True)
        at_once(
            lambda key: self.s3.download_file(self.name, f"{prefix}/{key}", str(folder / key), Config=self.transfer), wanted
        )

    def adopt(self, prefix: str, folder: Path) -> None:
        """Let the tables below the prefix stand for the folder that they were published as, without sending it.

        Written again by pyarrow, the folder's files are not these to the byte, but the same rows in the same order under
        the same names, and that is all that a stage reads.
        """
        to = f"staging/inputs/{digest_of_files(files_of(folder))}"
        parts = [key for key in self.keys(prefix) if PART.search(key)]

        def copy(key: str) -> None:
            source = {"Bucket": self.name, "Key": f"{prefix}/{key}"}
            self.s3.copy(source, self.name, f"{to}/{published_name(key)}", Config=self.transfer)

        at_once(copy, parts)

    def delete(self, prefix: str) -> None:
        keys = self.keys(prefix)
        for start in range(0, len(keys), 1000):  # as many as one request takes
            objects = [{"Key": f"{prefix}/{key}"} for key in keys[start : start + 1000]]
            self.s3.delete_objects(Bucket=self.name, Delete={"Objects": objects, "Quiet": True})

    def read_log(self, logs: str, stream: str, seconds: float) -> str:
        """The text of stdout or stderr once it has come; an empty one if it does not come in these seconds."""
        bucket, key = bucket_and_key(f"{logs}/{stream}.gz")
        ends = time.monotonic() + seconds
        while True:
            try:
                return gzip.decompress(self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()).decode(errors="replace")
            except self.s3.exceptions.NoSuchKey:
                if time.monotonic() > ends:
                    return ""
                time.sleep(SECONDS)


def content_of(place: str) -> tuple[str, dict[str, Path]]:
    """The prefix of a file or a folder, named by the SHA-256 of its content, and its files by their keys below it."""
    path = Path(place)
    if path.is_file():
        return f"staging/stages/{sha256(path)}", {path.name: path}
    files = files_of(path)
    if not files:
        raise SystemExit(f"submit: {place} has no files to send; run `dvc repro`, or `dvc pull`")
    return f"staging/inputs/{digest_of_files(files)}", files


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def at_once(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(cloud.THREADS) as pool:
        list(pool.map(work, items))
