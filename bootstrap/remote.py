"""Run a stage on Spark by a service elsewhere, on copies of its inputs, and bring its output back.

A run there is named by the digest of all that it depends on. After a call was cut off (connection lost, laptop closed), the
same command finds the run by its name, waits for it, and fetches what it wrote.

EMR_HOURS is the hours that a stage may take, waiting included, before it is cancelled: 12 unless set.
"""

import functools
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bootstrap import runtime
from bootstrap.job import Job, Outcome, digest_of

SECONDS = 5  # between two looks at a run
# To wait for the log of a run that failed; EMR brings it to S3 within five minutes. That of a run that ended well is not
# waited for: the cluster would be paid for meanwhile.
LOG_SECONDS = 360
LINES = 20  # of the end of a log
LOGGED = re.compile(r"\d\d[/:]\d\d[/:]\d\d.* (INFO|WARN) ")  # Spark's own lines


class Look(NamedTuple):
    """Hold what is known of a run at one moment."""

    state: str  # in the service's words; for a run that waits, also what it waits for
    is_over: bool
    is_sound: bool
    reason: str  # why it failed, in the service's words
    logs: str  # the URI of the folder of its logs


class Service(Protocol):
    """Run stages on a cluster, or by an application without one."""

    where: str  # the id of the cluster or application

    def find(self, name: str) -> tuple[str, Look] | None:
        """Return the id of the latest run of that name, and a look at it; None if there is no such run."""

    def start(self, name: str, settings: Mapping[str, str], words: list[str]) -> str:
        """Start a run, and return its id.

        Parameters
        ----------
        settings : Spark's
        words : the URI of the stage's file, then its arguments
        """

    def look(self, run: str) -> Look: ...

    def cancel(self, run: str) -> None: ...

    def rate(self) -> tuple[int, float]:
        """Return the number of cores, and what they cost, in EUR an hour."""

    def bill(self, run: str) -> dict[str, Any]:
        """Return what a run took: see runtime.record."""


class Storage(Protocol):
    """Hold the files that the service reads and writes, by their keys."""

    def address(self, place: str) -> str:
        """Return the URI that a file or folder of the workspace has there, which follows from its content."""

    def put(self, place: str) -> str:
        """Send those files of a file or folder of the workspace that are not there yet, and return its address."""

    def uri(self, key: str) -> str: ...

    def keys(self, prefix: str) -> list[str]:
        """List the keys below the prefix, relative to it."""

    def fetch(self, prefix: str, folder: Path) -> None:
        """Download the tables below the prefix that are whole into the folder."""

    def adopt(self, prefix: str, folder: Path) -> None:
        """Copy the tables below the prefix to the address of the folder that they were published as: it need not be sent."""

    def delete(self, prefix: str) -> None: ...

    def read_log(self, logs: str, stream: str, seconds: float) -> str:
        """Return the text of stdout or stderr; wait for it so many seconds, then return an empty one."""


@dataclass(frozen=True)
class Remote:
    """Run jobs by a service, on its storage."""

    service: Service
    storage: Storage
    settings: Mapping[str, str]  # of Spark, for every run
    hints: Mapping[str, str]  # what to do, by a text that is then in stderr
    errors: Callable[[], AbstractContextManager[None]]  # makes a context that turns the service's errors into one line

    def command(self, job: Job) -> list[str]:
        with self.errors():
            stage, *inputs = map(self.storage.address, [job.stage, *job.inputs])
        _, key = self._name(job, [stage, *inputs])
        conf = [f"--conf={name}={value}" for name, value in self.settings.items()]
        return ["spark-submit", *conf, stage, *inputs, self.storage.uri(key), *job.flags]

    def run(self, job: Job, partial: Path, lock: int) -> Outcome:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM acts like Ctrl-C, also where that is ignored
        with self.errors():
            return self._run(job, partial)

    def _run(self, job: Job, partial: Path) -> Outcome:
        stage, *inputs = map(self.storage.put, [job.stage, *job.inputs])
        name, key = self._name(job, [stage, *inputs])
        found = self.service.find(name)
        if found and (not found[1].is_over or (found[1].is_sound and self.storage.keys(key))):
            run = found[0]
            say(job, f"run {run} of an earlier call is {found[1].state}; taking it up")
        else:
            self.storage.delete(key)  # what a failed run has left
            say(job, self._estimate(job))
            run = self.service.start(name, self.settings, [stage, *inputs, self.storage.uri(key), *job.flags])
        look = wait(self.service, run, job)
        self.storage.fetch(key, partial)
        if look.is_sound:
            return Outcome(0, functools.partial(self._settle, job, run, key, look.logs))
        stderr = self.storage.read_log(look.logs, "stderr", LOG_SECONDS)
        hints = [hint for sign, hint in self.hints.items() if sign in stderr]
        reason = " ".join([f"{run} is {look.state}.", look.reason, *hints])
        print(last_lines(stderr), file=sys.stderr)
        return Outcome(1, dict, f"submit: {job.name}: {reason}\nIts logs: {look.logs}/")

    def _settle(self, job: Job, run: str, key: str, logs: str) -> Mapping[str, Any]:
        """Keep the output there as an input of later stages, tidy up, print the stage's log, and return what it took."""
        with self.errors():
            self.storage.adopt(key, Path(job.output))
            self.storage.delete(key)
            said = self.storage.read_log(logs, "stdout", 0)
        print(
            said or f"submit: the log of {job.name} is on its way; within five minutes it will be in {logs}/stdout.gz",
            end="" if said else "\n",
        )
        return self._bill(job, run)

    def _bill(self, job: Job, run: str) -> Mapping[str, Any]:
        """Return what the run took; if that cannot be known, say why and return nothing: the output is published already."""
        try:
            with self.errors():
                return self.service.bill(run)
        except (Exception, SystemExit) as error:
            say(job, f"what it took and cost is not known: {error!r}")
            return {}

    def _name(self, job: Job, sources: list[str]) -> tuple[str, str]:
        """Return a name that follows from all that the run depends on, and the key that it writes to."""
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        name = f"{job.name} {digest_of([*sources, *job.flags, *settings])[:16]}"
        return name, f"staging/runs/{self.service.where}/{name.replace(' ', '-')}"

    def _estimate(self, job: Job) -> str:
        """Return a sentence on what the stage may take and cost."""
        cores, euros = self.service.rate()
        if not cores:
            return "the cost is not known: no node is up yet"
        seconds = runtime.estimate(job, cores)
        price = f"{cores} cores at {euros:.2f} EUR an hour"
        if seconds is None:
            return f"{price}; the time is not known: there is no earlier run"
        return f"{price}: some {seconds / 60:.0f} min and {euros * seconds / 3600:.2f} EUR, estimated from the last run"


def wait(service: Service, run: str, job: Job) -> Look:
    """Wait until the run is over, and print each change of its state; cancel it on Ctrl-C.

    Raises
    ------
    SystemExit
        the run took more than EMR_HOURS, and was cancelled
    """
    ends = time.monotonic() + hours() * 3600
    before = ""
    try:
        while True:
            look = service.look(run)
            if look.state != before:
                say(job, f"{run} is {look.state}")
                before = look.state
            if look.is_over:
                return look
            if time.monotonic() > ends:
                cancel(service, run, job)
                raise SystemExit(
                    f"submit: {job.name}: {run} took more than EMR_HOURS={hours():g} and was cancelled; set EMR_HOURS higher"
                )
            time.sleep(SECONDS * random.uniform(0.8, 1.2))
    except KeyboardInterrupt:
        cancel(service, run, job)
        raise
    except Exception:
        say(job, f"{run} goes on; the same command takes it up again")
        raise


def cancel(service: Service, run: str, job: Job) -> None:
    """Cancel the run and wait for its end: it must not write while the next one does."""
    say(job, f"cancelling {run}, and waiting for its end; Ctrl-C stops waiting")
    service.cancel(run)
    while not service.look(run).is_over:
        time.sleep(SECONDS)
    say(job, f"{run} is cancelled")


def last_lines(stderr: str) -> str:
    """Return the end of a stage's log without Spark's lines: from the last traceback on, if any, else LINES lines."""
    lines = [line for line in stderr.splitlines() if not LOGGED.match(line)]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-LINES:])


def spark_defaults() -> dict[str, str]:
    """Read the settings of spark-defaults.conf, a file that spark-submit finds only on this machine."""
    lines = Path(__file__).with_name("spark-defaults.conf").read_text().splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))


def hours() -> float:
    return float(os.environ.get("EMR_HOURS", "12"))


def say(job: Job, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {job.name}: {text}", flush=True)
