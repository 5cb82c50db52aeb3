"""Run a stage on Amazon EMR: on the cluster of cluster.yaml (SPARK_TARGET=emr), or serverless (emr-serverless).

Inputs go to the project's bucket by their content, once: what is there is not sent again, and what a stage wrote there is
an input of the next without having been sent at all. The stage runs there as its own file, by spark-submit in client mode;
its output comes back into the workspace, where DVC expects it, as if it had been written here.

    s3://BUCKET/staging/inputs/DIGEST/      a folder of the workspace, by the SHA-256 of its files
    s3://BUCKET/staging/stages/SHA256/      a stage's file
    s3://BUCKET/staging/runs/WHERE/RUN/     what a run writes, until it has been fetched
    s3://BUCKET/feature-cache/              the cache of the stage featurize, unless FEATURE_CACHE is another s3:// prefix
    s3://BUCKET/logs/                       what EMR and the stages say

A run is named by the digest of all that it depends on. A call that was cut off (connection lost, laptop closed) is taken up
by the same command: it finds the run by its name, waits for it, and fetches what it wrote.

EMR_HOURS is how long a stage may take, waiting included, before it is cancelled: 12 unless set.
"""

import gzip
import hashlib
import math
import os
import random
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError

import cloud
import cost
import residency
import runtime
from cluster import find_cluster, job_settings, nodes
from job import PART, Job, place_for, publish, published

SECONDS = 5  # between two looks
LOG_SECONDS = 60  # to wait for a log when all is well,
LOG_SECONDS_OF_FAILURE = 360  # and when not; EMR brings it to S3 within five minutes
LINES = 20  # of what a stage said last
LOGGED = re.compile(r"\d\d[/:]\d\d[/:]\d\d.* (INFO|WARN) ")  # Spark's own lines
HINTS = {
    "running beyond physical memory": "an executor took more memory than it asked for: raise spark.executor.memoryOverhead",
    "Container killed by YARN": "an executor took more memory than it asked for: raise spark.executor.memoryOverhead",
    "java.lang.OutOfMemoryError": "Spark ran out of memory: raise spark.driver.memory or spark.executor.memory",
    "No module named": "the nodes lack a package: `make wheelhouse`, then a new cluster",
}


class Look(NamedTuple):
    """What is known of a run at a moment."""

    state: str  # the service's word for it, and where it waits, of what
    is_over: bool
    is_sound: bool
    reason: str  # why it ended badly, in the service's words
    logs: str  # the s3:// folder of stdout.gz and stderr.gz


class Service(Protocol):
    """What runs a stage: a cluster, or an application without one."""

    where: str  # its id
    arn: str
    log_uri: str

    def find(self, name: str) -> tuple[str, Look] | None:
        """The latest run of that name."""

    def start(self, name: str, settings: dict[str, str], words: list[str], minutes: int) -> str:
        """The id of a new run: these Spark settings; the stage's file and its command line."""

    def look(self, run: str) -> Look: ...

    def cancel(self, run: str) -> None: ...

    def rate(self) -> tuple[int, float]:
        """The cores there are, and what they cost in an hour, EUR."""

    def bill(self, run: str) -> dict[str, Any]:
        """What it took: see runtime.record."""


class Cluster:
    """EMR on EC2: a stage is a step."""

    def __init__(self, settings: dict[str, Any], outputs: dict[str, str]) -> None:
        self.emr = cloud.client("emr", settings["region"])
        name = settings["cluster"]["Name"]
        found = find_cluster(self.emr, name)
        if not found:
            raise SystemExit(f"submit: no cluster {name!r} is up in {settings['region']}: `make cloud-up` starts one.")
        self.where = found
        cluster = self.emr.describe_cluster(ClusterId=self.where)["Cluster"]
        self.arn, self.log_uri = cluster["ClusterArn"], cluster["LogUri"].replace("s3n://", "s3://").rstrip("/")

    def find(self, name: str) -> tuple[str, Look] | None:
        steps = [step for step in self._steps() if step["Name"] == name]
        latest = max(steps, key=lambda step: step["Status"]["Timeline"]["CreationDateTime"], default=None)
        return (latest["Id"], self.look(latest["Id"])) if latest else None

    def start(self, name: str, settings: dict[str, str], words: list[str], minutes: int) -> str:
        conf = [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]
        step = {
            "Name": name,
            "ActionOnFailure": "CONTINUE",
            "HadoopJarStep": {
                "Jar": "command-runner.jar",
                "Args": ["spark-submit", "--deploy-mode", "client", *conf, *words],
            },
        }
        (run,) = self.emr.add_job_flow_steps(JobFlowId=self.where, Steps=[step])["StepIds"]
        # EMR knows no token by which it would see that a request comes again because the first answer was lost.
        twins = [
            each["Id"]
            for each in self._steps()
            if each["Name"] == name and each["Id"] != run and each["Status"]["State"] in ("PENDING", "RUNNING")
        ]
        for twin in twins:
            self.cancel(twin)
        return str(run)

    def look(self, run: str) -> Look:
        status = self.emr.describe_step(ClusterId=self.where, StepId=run)["Step"]["Status"]
        state, logs = status["State"], f"{self.log_uri}/{self.where}"
        if state in ("COMPLETED", "FAILED", "CANCELLED", "INTERRUPTED"):
            told = [status.get("FailureDetails", {}).get(key) for key in ("Reason", "Message")]
            reason = " ".join(filter(None, [*told, status.get("StateChangeReason", {}).get("Message")]))
            return Look(state, True, state == "COMPLETED", reason, f"{logs}/steps/{run}")
        cluster = self.emr.describe_cluster(ClusterId=self.where)["Cluster"]["Status"]
        why = cluster.get("StateChangeReason", {})
        said = " ".join(filter(None, [f"cluster {self.where} is {cluster['State']}", why.get("Code"), why.get("Message")]))
        if cluster["State"].startswith("TERMINAT"):
            node = re.search(r"\((i-\w+)\), bootstrap action (\d+)", said)
            place = f"node/{node[1]}/bootstrap-actions/{node[2]}" if node else f"steps/{run}"
            return Look("lost", True, False, said, f"{logs}/{place}")
        return Look(f"{state}; {said}" if state == "PENDING" else state, False, False, "", f"{logs}/steps/{run}")

    def cancel(self, run: str) -> None:
        self.emr.cancel_steps(ClusterId=self.where, StepIds=[run], StepCancellationOption="TERMINATE_PROCESS")

    def rate(self) -> tuple[int, float]:
        running = [instance for instance in nodes(self.emr, self.where) if instance["Status"]["State"] == "RUNNING"]
        prices = cost.load()
        return sum(cost.cores(instance["InstanceType"]) for instance in running), cost.per_hour(running, prices)

    def bill(self, run: str) -> dict[str, Any]:
        instances = nodes(self.emr, self.where)
        times = {step["Id"]: step["Status"]["Timeline"] for step in self._steps()}
        started, ended = times[run]["StartDateTime"], times[run]["EndDateTime"]
        created = self.emr.describe_cluster(ClusterId=self.where)["Cluster"]["Status"]["Timeline"]["CreationDateTime"]
        others = [
            each["EndDateTime"] for each in times.values() if each.get("EndDateTime") and each["EndDateTime"] <= started
        ]
        before = max([created, *others])
        prices = cost.load()
        spent = [cost.of_instances(instances, prices, until) for until in (before, started, ended)]
        return {
            "where": "emr",
            "cores": self.rate()[0],
            "seconds": (ended - started).total_seconds(),
            "node_hours": spent[2][0] - spent[1][0],
            "euros": spent[2][1] - spent[1][1],
            "seconds_waited": (started - before).total_seconds(),
            "euros_waited": spent[1][1] - spent[0][1],
        }

    def _steps(self) -> list[dict[str, Any]]:
        pages = self.emr.get_paginator("list_steps").paginate(ClusterId=self.where)
        return [step for page in pages for step in page["Steps"]]


class Application:
    """EMR Serverless: a stage is a job run."""

    def __init__(self, settings: dict[str, Any], outputs: dict[str, str]) -> None:
        self.emr = cloud.client("emr-serverless", settings["region"])
        if "ServerlessApplication" not in outputs:
            raise SystemExit(
                "submit: the stack has no EMR Serverless application: `make cloud-setup SERVERLESS=yes` adds one."
            )
        self.where, self.role = outputs["ServerlessApplication"], outputs["ServerlessRole"]
        self.arn = self.emr.get_application(applicationId=self.where)["application"]["arn"]
        self.log_uri = f"s3://{outputs['Bucket']}/logs/serverless"
        self.conf = job_settings(settings, outputs)

    def find(self, name: str) -> tuple[str, Look] | None:
        latest = max(self._runs(name), key=lambda run: run["createdAt"], default=None)
        return (latest["id"], self.look(latest["id"])) if latest else None

    def start(self, name: str, settings: dict[str, str], words: list[str], minutes: int) -> str:
        conf = {**self.conf, **settings}
        # The same token twice is the same run, also where the answer to the first call was lost.
        token = hashlib.sha256(f"{name} {len(self._runs(name))}".encode()).hexdigest()
        run = self.emr.start_job_run(
            applicationId=self.where,
            clientToken=token,
            executionRoleArn=self.role,
            name=name,
            jobDriver={
                "sparkSubmit": {
                    "entryPoint": words[0],
                    "entryPointArguments": words[1:],
                    "sparkSubmitParameters": shlex.join(
                        part for key, value in conf.items() for part in ("--conf", f"{key}={value}")
                    ),
                }
            },
            configurationOverrides={
                "monitoringConfiguration": {"s3MonitoringConfiguration": {"logUri": f"{self.log_uri}/"}},
            },
            executionTimeoutMinutes=max(minutes, 5),  # it takes no fewer
        )
        return str(run["jobRunId"])

    def look(self, run: str) -> Look:
        job = self._job(run)
        state = job["state"]
        is_over = state in ("SUCCESS", "FAILED", "CANCELLED")
        logs = f"{self.log_uri}/applications/{self.where}/jobs/{run}/SPARK_DRIVER"
        return Look(state, is_over, state == "SUCCESS", job.get("stateDetails") or "", logs)

    def cancel(self, run: str) -> None:
        self.emr.cancel_job_run(applicationId=self.where, jobRunId=run)

    def rate(self) -> tuple[int, float]:
        cores = int(self.conf["spark.executor.cores"]) * int(self.conf["spark.dynamicAllocation.maxExecutors"])
        return cores, cost.of_cores(cores, cost.load())

    def bill(self, run: str) -> dict[str, Any]:
        job = self._job(run)
        vcpu_hours, euros = cost.of_job_run(job["billedResourceUtilization"], cost.load())
        seconds = job.get("totalExecutionDurationSeconds", 0)
        waited = (job["updatedAt"] - job["createdAt"]).total_seconds() - seconds
        return {
            "where": "emr-serverless",
            "cores": round(vcpu_hours * 3600 / max(seconds, 1), 1),
            "seconds": float(seconds),
            "vcpu_hours": vcpu_hours,
            "euros": euros,
            "seconds_waited": max(waited, 0.0),
            "euros_waited": 0.0,
        }

    def _job(self, run: str) -> dict[str, Any]:
        return dict(self.emr.get_job_run(applicationId=self.where, jobRunId=run)["jobRun"])

    def _runs(self, name: str) -> list[dict[str, Any]]:
        pages = self.emr.get_paginator("list_job_runs").paginate(applicationId=self.where)
        return [run for page in pages for run in page["jobRuns"] if run.get("name") == name]


SERVICES: dict[str, Callable[[dict[str, Any], dict[str, str]], Service]] = {"emr": Cluster, "emr-serverless": Application}


def run(job: Job, target: str, dry_run: bool) -> int:
    """Run the stage there, and publish its output here. Returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be told to end is Ctrl-C, also where that is ignored
    with cloud.errors_in_words("submit"):
        settings = cloud.settings()
        residency.require(settings["region"], [], remotes={})  # whom we may ask where data will go
        outputs = cloud.outputs(settings)
        service = SERVICES[target](settings, outputs)
        cache = os.environ.get("FEATURE_CACHE", "")
        cache = cache if cache.startswith("s3://") else f"s3://{outputs['Bucket']}/feature-cache"
        residency.require_arn(service.arn, settings["region"])
        residency.require(
            settings["region"], {outputs["Bucket"], *(bucket_and_key(uri)[0] for uri in (cache, service.log_uri))}
        )
        bucket = Bucket(cloud.client("s3", settings["region"]), outputs["Bucket"], is_dry=dry_run)
        return run_there(job, service, bucket, cache, dry_run)


def run_there(job: Job, service: Service, bucket: "Bucket", cache: str, dry_run: bool) -> int:
    stage = Path(job.stage).stem
    code = bucket.put_file(job.stage, f"staging/stages/{sha256(Path(job.stage))}/{Path(job.stage).name}")
    inputs = [place if place.startswith("s3://") else bucket.put_folder(Path(place)) for place in job.inputs]
    conf = {**spark_defaults(), "spark.featurize.cache": cache}
    name = f"{stage} {digest_of([code, *inputs, *job.flags, *map('='.join, conf.items())])[:16]}"
    there = f"staging/runs/{service.where}/{name.replace(' ', '-')}"
    words = [code, *inputs, bucket.uri(there), *job.flags]
    if dry_run:
        print(shlex.join(["spark-submit", *(f"--conf={key}={value}" for key, value in conf.items()), *words]))
        return 0
    with place_for(job) as (partial, _):
        found = service.find(name)
        if found and (not found[1].is_over or (found[1].is_sound and bucket.keys(there))):
            run_id = found[0]
            say(stage, f"run {run_id} of an earlier call is {found[1].state}; taking it up")
        else:
            bucket.delete(there)  # what a run that failed has left
            say(stage, estimate(job, service))
            run_id = service.start(name, conf, words, minutes=math.ceil(hours() * 60))
        look = wait(service, run_id, stage)
        bucket.fetch(there, partial)
        publish(job, partial, look.is_sound)
    if not look.is_sound:
        stderr = bucket.read_log(f"{look.logs}/stderr.gz", LOG_SECONDS_OF_FAILURE)
        print(last_words(stderr), file=sys.stderr)
        hints = [hint for sign, hint in HINTS.items() if sign in stderr]
        raise SystemExit(
            f"submit: {stage}: {' '.join([f'{run_id} is {look.state}.', look.reason, *hints])}\nIts logs: {look.logs}/"
        )
    bucket.adopt(there, Path(job.output))
    runtime.record(job, service.bill(run_id))
    bucket.delete(there)
    said = bucket.read_log(f"{look.logs}/stdout.gz", LOG_SECONDS)
    print(said or f"submit: what {stage} says will be in {look.logs}/stdout.gz", end="" if said else "\n")
    return 0


def estimate(job: Job, service: Service) -> str:
    """What the stage may take and cost, in words."""
    cores, euros = service.rate()
    if not cores:
        return "what it may cost is not known: no node is up yet"
    seconds = runtime.estimate(job, cores)
    price = f"{cores} cores at {euros:.2f} EUR an hour"
    if seconds is None:
        return f"{price}; no earlier run tells how long it may take"
    return f"{price}: some {seconds / 60:.0f} min and {euros * seconds / 3600:.2f} EUR, by what the last run took"


def wait(service: Service, run: str, stage: str) -> Look:
    """Look until the run is over, and say when its state changes; cancel it when we are told to end, or time is up."""
    ends = time.monotonic() + hours() * 3600
    before = ""
    try:
        while True:
            look = service.look(run)
            if look.state != before:
                say(stage, f"{run} is {look.state}")
                before = look.state
            if look.is_over:
                return look
            if time.monotonic() > ends:
                cancel(service, run, stage)
                raise SystemExit(f"submit: {stage}: {run} took more than EMR_HOURS={hours():g} and was cancelled")
            time.sleep(SECONDS * random.uniform(0.8, 1.2))
    except KeyboardInterrupt:
        cancel(service, run, stage)
        raise
    except (BotoCoreError, ClientError):
        say(stage, f"{run} goes on; the same command takes it up again")
        raise


def cancel(service: Service, run: str, stage: str) -> None:
    """Cancel the run, and see it end: what it writes must not meet what the next one writes."""
    say(stage, f"cancelling {run}; Ctrl-C leaves it alone")
    service.cancel(run)
    while not service.look(run).is_over:
        time.sleep(SECONDS)
    say(stage, f"{run} is cancelled")


class Bucket:
    """The project's bucket, by its keys; many small files, so many requests at a time."""

    def __init__(self, s3: Any, name: str, is_dry: bool = False) -> None:
        self.s3, self.name, self.is_dry = s3, name, is_dry
        self.transfer = TransferConfig(use_threads=False)

    def uri(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def keys(self, prefix: str) -> list[str]:
        """What lies below the prefix, relative to it."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=f"{prefix}/")
        return [item["Key"][len(prefix) + 1 :] for page in pages for item in page.get("Contents", [])]

    def put_file(self, path: str, key: str) -> str:
        """The URI of a file whose content its key tells: it is sent if it is not there."""
        if not self.is_dry and not self.keys(str(Path(key).parent)):
            self.s3.upload_file(path, self.name, key)
        return self.uri(key)

    def put_folder(self, folder: Path) -> str:
        """The URI of a folder with these files; those that are not there are sent.

        Raises
        ------
        SystemExit
            there is no such folder, or no file in it
        """
        files = files_of(folder)
        if not files:
            raise SystemExit(f"submit: {folder} has no files to send; run `dvc repro`, or `dvc pull`")
        prefix = f"staging/inputs/{digest_of_folder(files)}"
        there = set(self.keys(prefix))
        lacking = {name: path for name, path in files.items() if name not in there}
        if lacking and not self.is_dry:
            n_mb = sum(path.stat().st_size for path in lacking.values()) / 2**20
            print(f"submit: sending {len(lacking):,} of {len(files):,} files of {folder}, {n_mb:,.1f} MB", flush=True)
            at_once(
                lambda item: self.s3.upload_file(str(item[1]), self.name, f"{prefix}/{item[0]}", Config=self.transfer),
                lacking.items(),
            )
        return self.uri(prefix)

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
        to = f"staging/inputs/{digest_of_folder(files_of(folder))}"
        parts = [key for key in self.keys(prefix) if PART.search(key)]
        at_once(
            lambda key: self.s3.copy(
                {"Bucket": self.name, "Key": f"{prefix}/{key}"}, self.name, f"{to}/{published(key)}", Config=self.transfer
            ),
            parts,
        )

    def delete(self, prefix: str) -> None:
        keys = self.keys(prefix)
        for start in range(0, len(keys), 1000):  # as many as one request takes
            objects = [{"Key": f"{prefix}/{key}"} for key in keys[start : start + 1000]]
            self.s3.delete_objects(Bucket=self.name, Delete={"Objects": objects, "Quiet": True})

    def read_log(self, uri: str, seconds: float) -> str:
        """The text of a gzipped log, when it has come; an empty one, if it does not come in these seconds."""
        bucket, key = bucket_and_key(uri)
        ends = time.monotonic() + seconds
        while True:
            try:
                return gzip.decompress(self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()).decode(errors="replace")
            except self.s3.exceptions.NoSuchKey:
                if time.monotonic() > ends:
                    return ""
                time.sleep(SECONDS)


def files_of(folder: Path) -> dict[str, Path]:
    """Each file below the folder, by its path relative to it, sorted."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def digest_of_folder(files: dict[str, Path]) -> str:
    with ThreadPoolExecutor() as pool:
        return digest_of(f"{name} {content}" for name, content in zip(files, pool.map(sha256, files.values()), strict=True))


def digest_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def at_once(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(cloud.THREADS) as pool:
        list(pool.map(work, items))


def spark_defaults() -> dict[str, str]:
    """The settings of spark-defaults.conf, which a run on this machine has from that file."""
    lines = Path(__file__).with_name("spark-defaults.conf").read_text().splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))


def last_words(stderr: str) -> str:
    """What a stage said last: from its last traceback on, if it has one."""
    lines = [line for line in stderr.splitlines() if not LOGGED.match(line)]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-LINES:])


def hours() -> float:
    return float(os.environ.get("EMR_HOURS", "12"))


def say(stage: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {stage}: {text}", flush=True)
