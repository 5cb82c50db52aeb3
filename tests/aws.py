"""AWS as far as it can be played here: moto's server for every API, and EMR that really runs spark-submit.

A step that is accepted, or a job run, is run by spark-submit on this machine, on s3:// paths that Hadoop's own view file
system maps to folders; these hold what the bucket holds when it starts, and the bucket gets what it wrote when it ends. What
the stage said comes to the bucket as EMR's logs do. Real: the APIs' requests and answers, Spark, the stages, failures and
signals. Refused, as AWS does: a cluster in a network without EMR's ports, a second policy of a bucket, a role that is there.
Not real: YARN, EMR's nodes and their start, S3A, IAM, spot. What IAM would allow, test_policies.py asks of AWS's own rules.
"""

import functools
import gzip
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.backends import get_backend
from moto.cloudformation.models import ChangeSet, CloudFormationBackend
from moto.cloudformation.parsing import ResourceMap
from moto.core.common_models import CloudFormationModel
from moto.core.responses import ActionResult, BaseResponse
from moto.core.utils import utcnow
from moto.ec2 import ec2_backends
from moto.ec2.models.route_tables import RouteTable
from moto.emr import emr_backends
from moto.emr.exceptions import ValidationException
from moto.emr.models import Cluster, Step
from moto.emr.responses import ElasticMapReduceResponse
from moto.emrserverless import emrserverless_backends
from moto.emrserverless.models import EMRServerlessBackend, JobRun
from moto.iam.exceptions import InvalidInput
from moto.iam.models import IAMBackend
from moto.s3 import s3_backends
from moto.s3.models import FakeBucket
from moto.server import ThreadedMotoServer
from moto.servicequotas.exceptions import NoSuchResource
from moto.servicequotas.models import ServiceQuotasBackend
from moto.servicequotas.responses import ServiceQuotasResponse

from bootstrap.aws import cloud

REGION, NAME, BUCKET = "eu-west-3", "fruits", "fruits-bucket"
ROLE = "arn:aws:iam::123456789012:role/fruits"
SECRET = "not-a-key-that-opens-anything"
KEY_OF_AWS = "AKIAI44QH8DHBEXAMPLE"  # of what AWS itself does here, and the tests
LINKED = {  # roles of AWS itself whose names moto does not know
    "spot.amazonaws.com": "AWSServiceRoleForEC2Spot",
    "ec2fleet.amazonaws.com": "AWSServiceRoleForEC2Fleet",
    "elasticmapreduce.amazonaws.com": "AWSServiceRoleForEMRCleanup",
    "ops.emr-serverless.amazonaws.com": "AWSServiceRoleForAmazonEMRServerless",
}
PLENTY = {"L-1216C47A": 64.0, "L-34B43A08": 64.0, "L-D05C8A75": 128.0}  # vCPUs on demand, on spot, of EMR Serverless


def environment_of_the_driver(words: list[str]) -> dict[str, str]:
    """What cluster.yaml says of it, for a job run or for the primary node; but Python is that of this machine."""
    prefix = "spark.emr-serverless.driverEnv."
    given = dict(word.removeprefix(prefix).split("=", 1) for word in words if word.startswith(prefix))
    if not given:
        of = {each["Classification"]: each for each in cloud.settings()["cluster"]["Configurations"]}
        given = of["spark-env"]["Configurations"][0]["Properties"]
    return {name: value for name, value in given.items() if not name.startswith("PY")}


class Aws:
    """The server, and the thread that runs what EMR was asked to run."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.environment = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        self.commands: list[list[str]] = []  # what was run
        self.read: set[tuple[str, str]] = set()  # by runs: bucket and key
        self.written: set[tuple[str, str]] = set()
        self.is_plain = False  # run stages as plain Python, which takes no seconds; they find the buckets in the folder S3
        self.running: dict[str, subprocess.Popen[bytes]] = {}  # by the id of step or job run
        self.is_paused = False  # accept, but start nothing
        self.quotas = dict(PLENTY)
        self.bill_seconds = self.log_seconds = 0.0  # after the end of a run, until the bill and the logs are there
        self.at_work = threading.Lock()
        self.is_over = threading.Event()
        self.worker = threading.Thread(target=self.work, daemon=True)

    def lend_keys(self, patch: pytest.MonkeyPatch, empty: Path | None = None) -> None:
        """Let this process ask the server, with its keys; with a file in place of a configuration, where DVC wants one."""
        for name, value in self.environment.items():
            patch.setenv(name, value)
        if empty:
            empty.touch()
            for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
                patch.setenv(name, str(empty))

    def client(self, service: str, region: str = REGION) -> Any:
        keys = {"aws_access_key_id": KEY_OF_AWS, "aws_secret_access_key": SECRET}
        return boto3.client(service, region_name=region, endpoint_url=self.url, **keys)

    def fresh(self) -> None:
        """An empty bucket, the stack, one cluster that waits; nothing run yet."""
        self.is_paused = True
        for name in list(self.running):
            self.kill(name)
        with self.at_work:
            self.running.clear()
        for service in ("s3", "emr", "emr-serverless", "cloudformation"):
            get_backend(service).reset()
        self.commands.clear()
        self.bill_seconds = self.log_seconds = 0.0
        self.quotas |= PLENTY
        application = self.client("emr-serverless").create_application(
            name=NAME, releaseLabel="emr-7.13.0", type="SPARK", clientToken=NAME
        )
        outputs = {"Bucket": BUCKET, "ServerlessApplication": application["applicationId"], "ServerlessRole": ROLE}
        template = {
            "Resources": {"Bucket": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": BUCKET}}},
            "Outputs": {name: {"Value": value} for name, value in outputs.items()},
        }
        self.client("cloudformation").create_stack(StackName=NAME, TemplateBody=json.dumps(template))
        instances = {"KeepJobFlowAliveWhenNoSteps": True}
        tags = [{"Key": "project", "Value": NAME}]
        self.client("emr").run_job_flow(Name=NAME, LogUri=f"s3://{BUCKET}/logs/", Instances=instances, Tags=tags)

    def clusters(self) -> list[Any]:
        return [
            cluster for regions in emr_backends.values() for each in regions.values() for cluster in each.clusters.values()
        ]

    def job_runs(self) -> list[JobRun]:
        backends = [each for regions in emrserverless_backends.values() for each in regions.values()]
        return [run for backend in backends for runs in backend.job_runs.values() for run in runs]

    def work(self) -> None:
        while not self.is_over.wait(0.1):
            with self.at_work:
                self.look_for_work()

    def look_for_work(self) -> None:
        if not self.is_paused:
            for cluster in self.clusters():
                waiting = [
                    step for step in cluster.steps if step.state in ("PENDING", "RUNNING") and not step.start_date_time
                ]
                if cluster.state in ("RUNNING", "WAITING") and waiting:
                    self.run_step(cluster, waiting[0])
            for run in self.job_runs():
                if run.state == "SUBMITTED":
                    self.run_job(run)

    def run_step(self, cluster: Any, step: Any) -> None:
        cluster.state, step.state, step.start_date_time = "RUNNING", "RUNNING", utcnow()
        assert step.jar == "command-runner.jar"
        assert step.args[:3] == ["spark-submit", "--deploy-mode", "client"]
        status = self.spark_submit(step.args[3:], step.id, f"{cluster.log_uri}{cluster.id}/steps/{step.id}")
        step.end_date_time = utcnow()
        if step.state == "RUNNING":
            step.state = "COMPLETED" if status == 0 else "FAILED"
            step.failure = {} if status == 0 else {"Reason": "Unknown Error.", "Message": f"exitCode {status}"}
        cluster.state = "WAITING" if cluster.state == "RUNNING" else cluster.state

    def run_job(self, run: JobRun) -> None:
        run.state, started = "RUNNING", utcnow()
        assert run.job_driver is not None
        assert run.configuration_overrides is not None
        driver, monitoring = run.job_driver["sparkSubmit"], run.configuration_overrides["monitoringConfiguration"]
        conf, file = driver["sparkSubmitParameters"], driver["entryPoint"]
        assert isinstance(conf, str)
        assert isinstance(file, str)
        assert isinstance(monitoring, dict)
        if set(conf) & set("'\"\\"):  # AWS's examples have none; what it makes of them is not documented
            run.state, run.state_details = "FAILED", f"Job failed, quotes in the settings: {conf}"
            return
        words = [*shlex.split(conf), file, *driver["entryPointArguments"]]
        where = monitoring["s3MonitoringConfiguration"]["logUri"]
        logs = f"{where}applications/{run.application_id}/jobs/{run.id}/SPARK_DRIVER"
        status = self.spark_submit(words, run.id, logs)
        seconds = (utcnow() - started).total_seconds()
        run.total_execution_duration_seconds = round(seconds)
        minutes = max(seconds, 60) / 60  # as AWS bills a worker of 4 vCPUs and 16 GB
        used = {"vCPUHour": minutes / 15, "memoryGBHour": minutes / 3.75, "storageGBHour": 0.0}
        vars(run).update(total_resource_utilization=used, billed_resource_utilization=None)
        self.later(self.bill_seconds, lambda: setattr(run, "billed_resource_utilization", used))
        run.updated_at = utcnow()
        if run.state == "RUNNING":
            run.state = "SUCCESS" if status == 0 else "FAILED"
            run.state_details = "" if status == 0 else f"Job failed, exit code {status}."

    def spark_submit(self, words: list[str], name: str, logs: str) -> int:
        """Run it on folders that hold what the buckets hold; the exit status."""
        self.commands.append(words)
        places = [word.removeprefix("s3://") for word in words if word.startswith("s3://")]
        s3 = self.client("s3")
        buckets = [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]
        root = self.folder / name
        before = set()
        for bucket in buckets:
            (root / bucket).mkdir(parents=True)
            for key in keys(s3, bucket):
                if key.startswith(("staging/", "feature-cache/")):
                    (root / bucket / key).parent.mkdir(parents=True, exist_ok=True)
                    s3.download_file(bucket, key, str(root / bucket / key))
                    before.add((bucket, key))
                    if f"{bucket}/{key}".startswith(tuple(places)):
                        self.read.add((bucket, key))
        view = "spark.hadoop.fs.viewfs"
        conf = {
            "spark.hadoop.fs.s3.impl": "org.apache.hadoop.fs.viewfs.ViewFileSystemOverloadScheme",
            f"{view}.overload.scheme.target.file.impl": "org.apache.hadoop.fs.LocalFileSystem",
            **{f"{view}.mounttable.{bucket}.linkFallback": f"file://{root / bucket}" for bucket in buckets},
            "spark.archives": "",  # of packages, which are installed here
            "spark.ui.enabled": "false",
        }
        own = [part for key, value in conf.items() for part in ("--conf", f"{key}={value}")]
        cut = next(i for i, word in enumerate(words) if word.startswith("s3://"))  # the stage's file
        said = {stream: (root / stream).open("wb") for stream in ("stdout", "stderr")}
        spark_submit = [
            str(Path(sys.executable).with_name("spark-submit")),
            *("--master", "local[2]", "--driver-memory", "1g", "--driver-java-options", "-XX:TieredStopAtLevel=1"),
            *words[:cut],
            *own,
            *words[cut:],
        ]
        plain = [sys.executable, str(root / words[cut].removeprefix("s3://")), *words[cut + 1 :]]
        process = subprocess.Popen(
            plain if self.is_plain else spark_submit,
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "SPARK_"))},
                "PYSPARK_PYTHON": sys.executable,
                "PYSPARK_DRIVER_PYTHON": sys.executable,
                "SPARK_LOCAL_IP": "127.0.0.1",
                **environment_of_the_driver(words),
                "S3": str(root),
            },
            start_new_session=True,
            stdout=said["stdout"],
            stderr=said["stderr"],
        )
        self.running[name] = process
        status = process.wait()
        bucket, _, prefix = logs.removeprefix("s3://").partition("/")
        for stream, file in said.items():
            file.close()
            log = {"Key": f"{prefix}/{stream}.gz", "Body": gzip.compress((root / stream).read_bytes())}
            self.later(self.log_seconds, functools.partial(s3.put_object, Bucket=bucket, **log))
        for each in buckets:
            for path in (root / each).rglob("*"):
                key = path.relative_to(root / each).as_posix()
                if path.is_file() and not path.name.endswith(".crc") and (each, key) not in before:
                    self.written.add((each, key))
                    s3.upload_file(str(path), each, key)
        shutil.rmtree(root)
        return status

    def later(self, seconds: float, happens: Callable[[], Any]) -> None:
        if seconds:
            timer = threading.Timer(seconds, happens)
            timer.daemon = True
            timer.start()
        else:
            happens()

    def kill(self, name: str) -> None:
        if name in self.running and self.running[name].poll() is None:
            with suppress(ProcessLookupError):  # the worker, which waits for it, may have seen its end first
                os.killpg(self.running[name].pid, signal.SIGTERM)


def keys(s3: Any, bucket: str) -> list[str]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]


@contextmanager
def aws(folder: Path) -> Iterator[Aws]:
    """A running Aws, alone in this process, without what earlier ones have left in moto."""
    for service in ("s3", "emr", "emr-serverless", "cloudformation", "ec2", "iam"):
        get_backend(service).reset()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    played = Aws(f"http://{host}:{port}", folder)
    with pytest.MonkeyPatch.context() as patch:
        teach(patch, played)
        played.worker.start()
        try:
            yield played
        finally:
            played.is_over.set()
            for name in list(played.running):
                played.kill(name)
            played.worker.join()
            server.stop()


def teach(patch: pytest.MonkeyPatch, played: Aws) -> None:
    """What moto does not know of EMR, or knows otherwise than AWS."""
    teach_quotas(patch, played.quotas)

    # Over HTTP it would file every cluster under us-east-1.
    patch.setattr(ElasticMapReduceResponse, "get_region_from_url", BaseResponse.get_region_from_url)

    def cancel_steps(self: Any) -> ActionResult:
        cluster = self.backend.clusters[self._get_param("ClusterId")]
        wanted = self._get_param("StepIds")
        for step in cluster.steps:
            if step.id in wanted and step.state in ("PENDING", "RUNNING"):
                step.state = "CANCELLED"
                step.start_date_time = step.start_date_time or utcnow()
                played.kill(step.id)
        return ActionResult({"CancelStepsInfoList": [{"StepId": each, "Status": "SUBMITTED"} for each in wanted]})

    patch.setattr(ElasticMapReduceResponse, "cancel_steps", cancel_steps, raising=False)

    def list_instances(self: Any) -> ActionResult:
        cluster = self.backend.clusters[self._get_param("ClusterId")]
        timeline = {"CreationDateTime": cluster.creation_datetime - timedelta(minutes=6)}
        nodes = [("m6i.xlarge", "ON_DEMAND"), ("m6i.xlarge", "ON_DEMAND"), ("m6i.2xlarge", "SPOT")]
        status = {"State": "RUNNING", "Timeline": timeline}
        return ActionResult({"Instances": [{"InstanceType": t, "Market": m, "Status": status} for t, m in nodes]})

    patch.setattr(ElasticMapReduceResponse, "list_instances", list_instances)
    teach_accounts(patch)

    add_steps = Cluster.add_steps

    def add_pending(self: Any, steps: list[dict[str, Any]]) -> list[Step]:
        state, added = getattr(self, "state", None), add_steps(self, steps)
        self.state = state
        for step in added:
            step.state = "PENDING"
        return added

    patch.setattr(Cluster, "add_steps", add_pending)
    status_of: Callable[[Any], dict[str, Any]] = vars(Step)["status"].fget
    patch.setattr(Step, "status", property(lambda self: {**status_of(self), "FailureDetails": getattr(self, "failure", {})}))

    make = JobRun.__init__

    def submitted(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.state, self.created_at, self.updated_at = "SUBMITTED", utcnow(), utcnow()

    patch.setattr(JobRun, "__init__", submitted)
    start = EMRServerlessBackend.start_job_run

    def start_once(self: Any, **kwargs: Any) -> JobRun:
        known = [run for runs in self.job_runs.values() for run in runs if run.client_token == kwargs["client_token"]]
        return known[0] if known else start(self, **kwargs)

    patch.setattr(EMRServerlessBackend, "start_job_run", start_once)

    def cancel_job_run(self: Any, application_id: str, job_run_id: str) -> tuple[str, str]:
        self.get_job_run(application_id, job_run_id).state = "CANCELLED"
        played.kill(job_run_id)
        return application_id, job_run_id

    patch.setattr(EMRServerlessBackend, "cancel_job_run", cancel_job_run)
    # It says 404 where a new application has no run yet.
    patch.setattr(
        EMRServerlessBackend, "list_job_runs", lambda self, application_id, **_: self.job_runs.get(application_id, [])
    )


def refuse_closed_ports(ec2: Any, instances: dict[str, Any], release: str) -> None:
    """As EMR does: the service-access group must admit what reports to the service, by the release's port and way.

    EMR's Management Guide, "EMR-managed security groups for the service access", and the release notes of emr-spark-8.0.0.
    """
    group = ec2.get_security_group_from_id(instances["ServiceAccessSecurityGroup"])
    network, primary = ec2.get_vpc(group.vpc_id).cidr_block, instances["EmrManagedMasterSecurityGroup"]
    major = int(re.search(r"\d+", release)[0])  # type: ignore[index]
    port, source = (443, network) if major >= 8 else (9443, primary)
    open_to = [
        rule.ip_range.get("CidrIp") or rule.source_group.get("GroupId")
        for rule in group.ingress_rules
        if rule.ip_protocol == "tcp" and rule.from_port <= port <= rule.to_port
    ]
    if source not in open_to:
        raise ValidationException(f"ServiceAccessSecurityGroup is missing ingress rule from {source} on port {port}")


class BucketPolicy(CloudFormationModel):
    """AWS::S3::BucketPolicy, which moto does not know. CloudFormation makes it for a bucket that has none.

    It is not put in force: moto would refuse everything, as it reads no condition of a bucket's policy.
    """

    def __init__(self, bucket: str) -> None:
        self.physical_resource_id = bucket

    @staticmethod
    def cloudformation_name_type() -> str:
        return "Bucket"

    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::S3::BucketPolicy"

    @classmethod
    def create_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str, **_: Any
    ) -> "BucketPolicy":
        properties = cloudformation_json["Properties"]
        bucket = s3_backends[account_id]["aws"].buckets[properties["Bucket"]]
        if "stacks_policy" in vars(bucket):
            raise ValueError(f"The bucket policy already exists on bucket {bucket.name}.")
        vars(bucket)["stacks_policy"] = properties["PolicyDocument"]
        return cls(bucket.name)

    @classmethod
    def update_from_cloudformation_json(cls, original_resource: Any, *_: Any, **__: Any) -> Any:
        return original_resource

    def delete(self, account_id: str, region_name: str) -> None:
        with suppress(KeyError):  # the bucket is deleted before its policy, now and then
            del vars(s3_backends[account_id]["aws"].buckets[self.physical_resource_id])["stacks_policy"]


class ServerlessApplication(CloudFormationModel):
    """AWS::EMRServerless::Application, which moto makes by its own API only, and of no release with a hyphen in its name."""

    def __init__(self, application: str) -> None:
        self.physical_resource_id = application

    @staticmethod
    def cloudformation_name_type() -> str:
        return "Name"

    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::EMRServerless::Application"

    @classmethod
    def create_from_cloudformation_json(
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str, **_: Any
    ) -> "ServerlessApplication":
        service: Any = emrserverless_backends[account_id][region_name]
        made = service.create_application(resource_name, "emr-7.13.0", "SPARK", resource_name, *[None] * 6)
        return cls(made.id)

    @classmethod
    def update_from_cloudformation_json(cls, original_resource: Any, *_: Any, **__: Any) -> Any:
        return original_resource

    def delete(self, account_id: str, region_name: str) -> None:
        emrserverless_backends[account_id][region_name].delete_application(self.physical_resource_id)


def teach_accounts(patch: pytest.MonkeyPatch) -> None:
    """What moto does not know of what cloud-setup and cloud-up ask for, or knows otherwise than AWS."""

    def apply(change: Any) -> None:
        """With the outputs of a stack that is made by a change set; what fails is rolled back."""
        stack = change.stack
        if change.change_set_type == "UPDATE":
            stack.update(change.template, parameters=change.parameters)
            return
        stack.template, stack.parameters = change.template, change.parameters
        stack._parse_template()
        stack.resource_map = stack._create_resource_map()
        try:
            stack.resource_map.create(stack.template_dict)
        except Exception as error:
            change.failure = error
            delete_resources(stack.resource_map, kept=("Retain",))
        else:
            stack.output_map = stack._create_output_map()

    def execute_change_set(self: Any, change_set_name: str, stack_name: str | None = None) -> None:
        (change,) = [each for each in self.change_sets.values() if each.change_set_name == change_set_name]
        execute(self, change_set_name, stack_name)
        if failure := getattr(change, "failure", None):
            change.stack._add_stack_event("CREATE_FAILED", resource_status_reason=str(failure))
            change.stack._add_stack_event("ROLLBACK_COMPLETE")
            change.stack.status = "ROLLBACK_COMPLETE"

    def delete_resources(self: Any, kept: tuple[str, ...] = ("Retain", "RetainExceptOnCreate")) -> None:
        every = self._resource_json_map
        self._resource_json_map = {name: each for name, each in every.items() if each.get("DeletionPolicy") not in kept}
        delete(self)
        self._resource_json_map = every

    def delete_route_table(table: Any, *_: str) -> None:
        table.associations.clear()
        table.ec2_backend.delete_route_table(table.id)

    def take_in_or_make(
        cls: Any, resource_name: str, cloudformation_json: Any, account_id: str, *rest: Any, **more: Any
    ) -> Any:
        known = s3_backends[account_id]["aws"].buckets
        return known.get(resource_name) or make(resource_name, cloudformation_json, account_id, *rest, **more)

    def create_service_linked_role(self: Any, service_name: str, description: str, suffix: str) -> Any:
        if any(f"/{service_name}/" in role.path for role in self.roles.values()):
            raise InvalidInput(
                f"Service role name of {service_name} has been taken in this account, please try a different suffix."
            )
        role = link(self, service_name, description, suffix)
        role.name = LINKED.get(service_name, role.name)
        return role

    def run_where_nodes_can_report(self: Any) -> ActionResult:
        instances = self._get_param("Instances") or {}
        if "ServiceAccessSecurityGroup" in instances:
            ec2 = ec2_backends[self.current_account][self.region]
            refuse_closed_ports(ec2, instances, self._get_param("ReleaseLabel"))
        return run_job_flow(self)

    run_job_flow = ElasticMapReduceResponse.run_job_flow
    execute, delete = CloudFormationBackend.execute_change_set, ResourceMap.delete
    make, link = FakeBucket.create_from_cloudformation_json, IAMBackend.create_service_linked_role
    patch.setattr(ChangeSet, "apply", apply)
    patch.setattr(CloudFormationBackend, "execute_change_set", execute_change_set)
    patch.setattr(ResourceMap, "delete", delete_resources)
    patch.setattr(RouteTable, "delete", delete_route_table, raising=False)
    patch.setattr(FakeBucket, "create_from_cloudformation_json", classmethod(take_in_or_make))
    patch.setattr(IAMBackend, "create_service_linked_role", create_service_linked_role)
    patch.setattr(ElasticMapReduceResponse, "run_job_flow", run_where_nodes_can_report)


def teach_quotas(patch: pytest.MonkeyPatch, quotas: dict[str, float]) -> None:
    """The account's quotas, and that EMR keeps no cluster which needs more vCPUs than they allow."""

    def get(self: Any, service_code: str, quota_code: str) -> dict[str, Any]:
        if quota_code not in quotas:
            raise NoSuchResource
        return {"ServiceCode": service_code, "QuotaCode": quota_code, "Value": quotas[quota_code]}

    patch.setattr(ServiceQuotasBackend, "get_service_quota", get)
    patch.setattr(
        ServiceQuotasResponse, "get_aws_default_service_quota", ServiceQuotasResponse.get_service_quota, raising=False
    )
    run = ElasticMapReduceResponse.run_job_flow

    def run_job_flow(self: Any) -> ActionResult:
        fleets = self._get_param("Instances.InstanceFleets", [])
        units = {"MASTER": 0, "CORE": 0, "TASK": 0} | {
            each["InstanceFleetType"]: each.get("TargetOnDemandCapacity", 0) for each in fleets
        }
        answer: Any = run(self)
        if 4 * sum(units.values()) > quotas.get("L-1216C47A", math.inf):
            cluster = self.backend.clusters[answer.result["JobFlowId"]]
            cluster.state, cluster.last_state_change_reason = (
                "TERMINATED_WITH_ERRORS",
                "You have requested more vCPU capacity",
            )
        return answer

    patch.setattr(ElasticMapReduceResponse, "run_job_flow", run_job_flow)
