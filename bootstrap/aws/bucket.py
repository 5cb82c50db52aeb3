"""Keep the files of runs elsewhere in the project's bucket on S3."""

import gzip
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig

from bootstrap.aws import cloud
from bootstrap.job import PUBLISHED, digest_of_files, files_of, published_name, sha256
from bootstrap.remote import SECONDS


class Bucket:
    """Read and write the project's bucket, with many requests at a time, as most files are small."""

    def __init__(self, s3: Any, name: str) -> None:
        self.s3, self.name = s3, name
        self.transfer = TransferConfig(use_threads=False)

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def keys(self, prefix: str) -> list[str]:
        """List the keys below the prefix, relative to it."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{prefix}/")
        return [item["Key"][len(prefix) + 1 :] for page in pages for item in page.get("Contents", [])]

    def address(self, place: str) -> str:
        """Return the URI of a file or folder of the workspace, named by its content; return an s3:// URI as it is.

        Raises
        ------
        SystemExit
            the folder does not exist, or has no file
        """
        return place if place.startswith("s3://") else self._address(place, content_of(place)[0])

    def put(self, place: str) -> str:
        """Send those files of a file or folder of the workspace that are not there yet, and return its address."""
        if place.startswith("s3://"):
            return place
        prefix, files = content_of(place)
        sent = set(self.keys(prefix))
        missing = {name: path for name, path in files.items() if name not in sent}
        if missing:
            n_mb = sum(path.stat().st_size for path in missing.values()) / 2**20
            print(f"submit: sending {len(missing):,} of {len(files):,} files of {place}, {n_mb:,.1f} MB", flush=True)
            run_in_threads(
                lambda item: self.s3.upload_file(str(item[1]), self.name, f"{prefix}/{item[0]}", Config=self.transfer),
                missing.items(),
            )
        return self._address(place, prefix)

    def _address(self, place: str, prefix: str) -> str:
        return self.uri(f"{prefix}/{Path(place).name}" if Path(place).is_file() else prefix)

    def fetch(self, prefix: str, folder: Path) -> None:
        """Download the tables below the prefix that are whole into the folder."""
        keys = self.keys(prefix)
        whole = {key.rpartition("/")[0] for key in keys if key.rpartition("/")[2] == "_SUCCESS"}
        wanted = [key for key in keys if key.rpartition("/")[0] in whole]
        for table in whole:
            (folder / table).mkdir(parents=True, exist_ok=True)
        run_in_threads(
            lambda key: self.s3.download_file(self.name, f"{prefix}/{key}", str(folder / key), Config=self.transfer), wanted
        )

    def adopt(self, prefix: str, folder: Path) -> None:
        """Copy the tables below the prefix to the address of the folder that they were published as: it need not be sent.

        The folder's files were written again by pyarrow, so their bytes differ. Names, rows and order of rows are the same,
        and a stage reads nothing else.
        """
        to = f"staging/inputs/{digest_of_files(files_of(folder))}"
        parts = [key for key in self.keys(prefix) if PUBLISHED.search(key)]

        def copy(key: str) -> None:
            source = {"Bucket": self.name, "Key": f"{prefix}/{key}"}
            self.s3.copy(source, self.name, f"{to}/{published_name(key)}", Config=self.transfer)

        run_in_threads(copy, parts)

    def delete(self, prefix: str) -> None:
        keys = self.keys(prefix)
        for start in range(0, len(keys), 1000):  # as many as one request takes
            objects = [{"Key": f"{prefix}/{key}"} for key in keys[start : start + 1000]]
            self.s3.delete_objects(Bucket=self.name, Delete={"Objects": objects, "Quiet": True})

    def read_log(self, logs: str, stream: str, seconds: float) -> str:
        """Return the text of stdout or stderr; wait for it so many seconds, then return an empty one."""
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
    """Return the prefix of a file or folder, named by the SHA-256 of its content, and its files by their keys below it.

    Raises
    ------
    SystemExit
        the folder does not exist, or has no file
    """
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


def run_in_threads(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(cloud.THREADS) as pool:
        list(pool.map(work, items))
