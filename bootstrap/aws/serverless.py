"""Run stages on Amazon EMR Serverless, without a cluster: each is a job run (SPARK_TARGET=emr-serverless)."""

import hashlib
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from bootstrap.aws import cloud, cost, quotas, runner
from bootstrap.aws.cluster import job_settings, vcpus_of_job
from bootstrap.job import Runner
from bootstrap.remote import SECONDS, Look, hours

BILL_SECONDS = 60  # to wait for the bill of a run; waiting costs nothing here


def connect() -> Runner:
    return runner.connect(Application)


class Application:
    """Run each stage as a job run of EMR Serverless."""

    def __init__(self, settings: dict[str, Any], outputs: Mapping[str, str]) -> None:
        self.emr = cloud.client("emr-serverless", settings["region"])
        if "ServerlessApplication" not in outputs:
            raise SystemExit(
                "submit: the stack has no EMR Serverless application. "
                'Set `Serverless: "true"` in bootstrap/aws/cluster.yaml, then run `make cloud-setup wheelhouse`.'
            )
        self.where, self.role = outputs["ServerlessApplication"], outputs["ServerlessRole"]
        self.arn = self.emr.get_application(applicationId=self.where)["application"]["arn"]
        self.log_uri = f"s3://{outputs['Bucket']}/logs/serverless"
        self.conf = job_settings(settings, outputs)
        quotas.require(settings["region"], vcpus_of_job(settings, outputs), settings["executors"])

    def find(self, name: str) -> tuple[str, Look] | None:
        latest = max(self._runs(name), key=lambda run: run["createdAt"], default=None)
        return (latest["id"], self.look(latest["id"])) if latest else None

    def start(self, name: str, settings: Mapping[str, str], words: list[str]) -> str:
        conf = {**self.conf, **settings}
        if wrong := [f"{key}={value}" for key, value in conf.items() if re.search(r"[\s'\"\\]", value)]:
            raise SystemExit(f"submit: EMR Serverless takes no setting with a blank or a quote in it: {', '.join(wrong)}")
        # Two requests with one token start one run, also if the first answer was lost.
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
                    # Without quotes, as in AWS's examples: shlex would put some around a #.
                    "sparkSubmitParameters": " ".join(f"--conf {key}={value}" for key, value in conf.items()),
                }
            },
            configurationOverrides={
                "monitoringConfiguration": {"s3MonitoringConfiguration": {"logUri": f"{self.log_uri}/"}},
            },
            executionTimeoutMinutes=max(math.ceil(hours() * 60), 5),  # the least that the service takes
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
        # AWS fills the bill in some seconds to minutes after the end; what was used is there before, and is nearly the same.
        ends = time.monotonic() + BILL_SECONDS
        while not (job := self._job(run)).get("billedResourceUtilization") and time.monotonic() < ends:
            time.sleep(SECONDS)
        used = job.get("billedResourceUtilization") or job.get("totalResourceUtilization")
        vcpu_hours, euros = cost.of_job_run(used or {}, cost.load())
        seconds = job.get("totalExecutionDurationSeconds", 0)
        waited = (job["updatedAt"] - job["createdAt"]).total_seconds() - seconds
        return {
            "where": "emr-serverless",
            "cores": round(vcpu_hours * 3600 / max(seconds, 1), 1) if used else self.rate()[0],
            "seconds": float(seconds),
            **({"vcpu_hours": vcpu_hours, "euros": euros} if used else {}),
            "seconds_waited": max(waited, 0.0),
            "euros_waited": 0.0,
        }

    def _job(self, run: str) -> dict[str, Any]:
        return dict(self.emr.get_job_run(applicationId=self.where, jobRunId=run)["jobRun"])

    def _runs(self, name: str) -> list[dict[str, Any]]:
        pages = self.emr.get_paginator("list_job_runs").paginate(applicationId=self.where)
        return [run for page in pages for run in page["jobRuns"] if run.get("name") == name]
