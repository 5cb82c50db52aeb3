"""Ask AWS how many vCPUs the account may run at a time, and refuse a size that is larger, with one that fits."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from botocore.exceptions import ClientError

from bootstrap.aws import cloud


class Quota(NamedTuple):
    """Name a limit of the account in a region, as Service Quotas does."""

    service: str
    code: str
    name: str


ON_DEMAND = Quota("ec2", "L-1216C47A", "Running On-Demand Standard instances")
SPOT = Quota("ec2", "L-34B43A08", "All Standard Spot Instance Requests")
SERVERLESS = Quota("emr-serverless", "L-D05C8A75", "Max concurrent vCPUs per account")


def ask(region: str, quotas: Iterable[Quota]) -> dict[Quota, float | None]:
    """Ask for the vCPUs that each quota allows; None where AWS does not tell."""
    client = cloud.client("service-quotas", region)

    def value(quota: Quota) -> float | None:
        # A quota that was never changed may be known by its default only.
        for request in (client.get_service_quota, client.get_aws_default_service_quota):
            try:
                return float(request(ServiceCode=quota.service, QuotaCode=quota.code)["Quota"]["Value"])
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("NoSuchResourceException", "AccessDeniedException"):
                    raise
        return None

    return {quota: value(quota) for quota in quotas}


def require(region: str, needs: Callable[[int], Mapping[Quota, int]], executors: int) -> str:
    """Return only if the quotas allow that number of executors; return what was compared, as a sentence.

    Parameters
    ----------
    needs : computes the vCPUs that so many executors take of each quota

    Raises
    ------
    SystemExit
        a quota is too small; with both numbers, the command that asks AWS for more, and the largest number that fits
    """
    wanted = needs(executors)
    allowed = ask(region, wanted)

    def fits(needed: Mapping[Quota, int]) -> bool:
        return all(vcpus <= (allowed[quota] or 0) for quota, vcpus in needed.items() if allowed[quota] is not None)

    if fits(wanted):
        return "; ".join(f"{quota.name}: {vcpus} vCPUs needed, {number(allowed[quota])}" for quota, vcpus in wanted.items())
    lines = [f"quotas: `executors: {executors}` of bootstrap/aws/cluster.yaml needs more vCPUs than {region} allows:"]
    for quota, vcpus in wanted.items():
        limit = allowed[quota]
        lines.append(f"  {quota.name}: {vcpus} needed, {number(limit)}")
        if limit is not None and vcpus > limit:
            lines.append(
                f"    aws service-quotas request-service-quota-increase --region {region} --service-code {quota.service} "
                f"--quota-code {quota.code} --desired-value {vcpus}"
            )
    size = next((n for n in range(executors - 1, 0, -1) if fits(needs(n))), None)
    now = f"`executors: {size}` fits now" if size else "No smaller size fits"
    raise SystemExit("\n".join([*lines, f"The commands ask AWS for more; an answer takes minutes to days. {now}."]))


def number(vcpus: float | None) -> str:
    return "the quota is not known" if vcpus is None else f"{vcpus:g} allowed"
