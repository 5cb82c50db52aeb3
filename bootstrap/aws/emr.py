"""Run stages on Amazon EMR, on the cluster of cluster.yaml: each is a step (SPARK_TARGET=emr)."""

import re
from collections.abc import Mapping
from typing import Any

from bootstrap.aws import cloud, cost, runner
from bootstrap.job import Runner
from bootstrap.remote import Look


def connect() -> Runner:
    return runner.connect(Cluster)


class Cluster:
    """Run each stage as a step of EMR on EC2."""

    def __init__(self, settings: dict[str, Any], outputs: Mapping[str, str]) -> None:
        self.emr = cloud.client("emr", settings["region"])
        name = settings["cluster"]["Name"]
        found = cloud.find_cluster(self.emr, name)
        if not found:
            raise SystemExit(f"submit: no cluster {name!r} is up in {settings['region']}: `make cloud-up` starts one.")
        self.where = found
        cluster = self.emr.describe_cluster(ClusterId=self.where)["Cluster"]
        self.arn, self.log_uri = cluster["ClusterArn"], cluster["LogUri"].replace("s3n://", "s3://").rstrip("/")

    def find(self, name: str) -> tuple[str, Look] | None:
        steps = [step for step in self._steps() if step["Name"] == name]
        latest = max(steps, key=lambda step: step["Status"]["Timeline"]["CreationDateTime"], default=None)
        return (latest["Id"], self.look(latest["Id"])) if latest else None

    def start(self, name: str, settings: Mapping[str, str], words: list[str]) -> str:
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
        # If the first answer is lost, boto3 repeats the request. EMR has no token to notice that, and adds a second step.
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
        running = [instance for instance in cloud.nodes(self.emr, self.where) if instance["Status"]["State"] == "RUNNING"]
        prices = cost.load()
        return sum(cost.cores(instance["InstanceType"]) for instance in running), cost.per_hour(running, prices)

    def bill(self, run: str) -> dict[str, Any]:
        instances = cloud.nodes(self.emr, self.where)
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
