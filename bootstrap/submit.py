"""Run one stage and publish what it wrote: the door that every stage goes through.

usage: python -m bootstrap.submit [--dry_run] PROGRAM STAGE INPUT... OUTPUT [--FLAG VALUE ...]

PROGRAM is spark-submit or python. All that follows STAGE is the stage's own command line. An INPUT @NAME is the place that
params.yaml has under NAME: there, a place may have any name, and no shell reads it. Before the stage starts, the parameters
of every stage are checked, and that DVC hashes all files of its inputs. While it works, no other run writes beside OUTPUT.
The stage writes to a path of its own, which becomes OUTPUT only when the stage has ended well, and none of its inputs has
changed meanwhile. What it took is noted for reports/runtime.json. The exit status is that of the stage.

Where a stage runs is no parameter of the stage and never enters dvc.lock. Environment variables say it:

SPARK_TARGET         what runs stages on Spark, one of TARGETS: local (this machine) unless set. Others always run here.
SPARK_MASTER         local[*] unless set; any master that spark-submit takes
SPARK_DRIVER_MEMORY  a quarter of this machine's memory unless set
FEATURE_CACHE        .dvc/tmp/feature-cache unless set; the folder (or s3:// prefix) where features are kept for reuse

--dry_run prints the command that would run the stage, and sends nothing.
"""

import importlib
import os
import shlex
import signal
import sys
from collections.abc import Mapping

from bootstrap import inputs, parameters, runtime
from bootstrap.job import PROGRAMS, Job, Runner, publish, workplace

# For each value of SPARK_TARGET, the module whose `connect()` returns the Runner of stages on Spark. A module is imported
# only when it is chosen: a run on this machine does not wait for boto3.
TARGETS = {
    "local": "bootstrap.local",
    "emr": "bootstrap.aws.emr",
    "emr-serverless": "bootstrap.aws.serverless",
}


def main(argv: list[str]) -> int:
    if sys.getfilesystemencoding() != "utf-8":
        raise SystemExit(
            f"submit: in this locale, text is {sys.getfilesystemencoding()}, and the pipeline's is UTF-8: names would be "
            "others. Set PYTHONUTF8=1, and run again."
        )
    dry_run = argv[:1] == ["--dry_run"]
    asked = parse(argv[dry_run:])
    job = asked._replace(inputs=parameters.look_up(asked.inputs))
    runner = find_runner(job, os.environ)
    if dry_run:
        print(shlex.join(runner.command(job)))
        return 0
    parameters.check(job.name, asked.inputs)
    inputs.check(job.inputs)
    places = inputs.read_by(job)
    seen = inputs.look(places)
    with workplace(job) as (partial, lock):
        outcome = runner.run(job, partial, lock)
        if outcome.status == 0:
            parameters.check_unchanged(job, os.environ)
            inputs.check_unchanged(job.name, places, seen)
        publish(job, partial, is_sound=outcome.status == 0)
    if outcome.status == 0:
        runtime.record(asked, outcome.settle())
    elif outcome.message:
        raise SystemExit(outcome.message)
    return outcome.status


def parse(argv: list[str]) -> Job:
    """Split a command line into the parts of a job.

    Raises
    ------
    SystemExit
        PROGRAM is none of PROGRAMS, or INPUT or OUTPUT is missing; with the usage
    """
    program, *rest = argv or [""]
    n_places = next((i for i, argument in enumerate(rest) if argument.startswith("--")), len(rest))
    if program not in PROGRAMS or n_places < 2:
        raise SystemExit((__doc__ or "").partition("\n\n")[2].partition("\n\n")[0])
    stage, *inputs, output = rest[:n_places]
    return Job(program, stage, inputs, output, rest[n_places:])


def find_runner(job: Job, environment: Mapping[str, str]) -> Runner:
    """Return the Runner of the job: for a stage on Spark, that of SPARK_TARGET; else this machine.

    Raises
    ------
    SystemExit
        SPARK_TARGET is none of TARGETS
    """
    target = environment.get("SPARK_TARGET") or "local"
    if target not in TARGETS:
        raise SystemExit(f"submit: SPARK_TARGET is {target!r}; set it to one of {', '.join(TARGETS)}")
    module = importlib.import_module(TARGETS[target if job.program == "spark-submit" else "local"])
    runner: Runner = module.connect()
    return runner


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
