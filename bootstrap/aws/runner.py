"""Connect Amazon's services for Spark to what they share: the bucket, the check of residency, hints.

Inputs go to the project's bucket by the digest of their content, once: what is there is not sent again. What a stage wrote
there is an input of the next stage without being sent. The stage runs there as its own file, by spark-submit in client mode.
Its output comes back into the workspace, where DVC expects it.

    s3://BUCKET/staging/inputs/DIGEST/      a folder of the workspace, by the SHA-256 of its files
    s3://BUCKET/staging/stages/SHA256/      a stage's file
    s3://BUCKET/staging/runs/WHERE/RUN/     what a run writes, until it has been fetched
    s3://BUCKET/feature-cache/              the cache of the stage featurize, unless FEATURE_CACHE is another s3:// prefix
    s3://BUCKET/logs/                       the logs of EMR and of the stages
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from bootstrap.aws import cloud, residency
from bootstrap.aws.bucket import Bucket, bucket_and_key
from bootstrap.remote import Remote, Service, spark_defaults

HINTS = {
    "running beyond physical memory": "an executor took more memory than it asked for: raise spark.executor.memoryOverhead",
    "Container killed by YARN": "an executor took more memory than it asked for: raise spark.executor.memoryOverhead",
    "java.lang.OutOfMemoryError": "Spark ran out of memory: raise spark.driver.memory or spark.executor.memory",
    "No module named": "the nodes lack a package: `make wheelhouse`, then a new cluster",
}


class Rented(Service, Protocol):
    """Add to a Service what the check of residency needs."""

    arn: str
    log_uri: str


def connect(service_of: Callable[[dict[str, Any], Mapping[str, str]], Rented]) -> Remote:
    """Return the Runner made of the service and the bucket, after the check that all of it is in the EU.

    Parameters
    ----------
    service_of : makes the service of cluster.yaml and of the outputs of the stack

    Raises
    ------
    SystemExit
        something is elsewhere, does not exist, or does not answer
    """
    with cloud.errors_in_words("submit"):
        settings = cloud.settings()
        region = settings["region"]
        residency.require(region, [], remotes={})  # before AWS is asked where data will go
        outputs = cloud.outputs(settings)
        service = service_of(settings, outputs)
        cache = os.environ.get("FEATURE_CACHE", "")
        cache = cache if cache.startswith("s3://") else f"s3://{outputs['Bucket']}/feature-cache"
        residency.require_arn(service.arn, region)
        residency.require(region, {outputs["Bucket"], *(bucket_and_key(uri)[0] for uri in (cache, service.log_uri))})
        return Remote(
            service,
            Bucket(cloud.client("s3", region), outputs["Bucket"]),
            settings=spark_defaults() | {"spark.featurize.cache": cache},
            hints=HINTS,
            errors=functools.partial(cloud.errors_in_words, "submit"),
        )
