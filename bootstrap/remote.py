"""Run a stage on Spark by a service elsewhere, on copies of its inputs, and bring its output back.

A run there is named by the digest of all that it depends on. A call that was cut off (connection lost, laptop closed) is
taken up by the same command: it finds the run by its name, waits for it, and fetches what it wrote.

EMR_HOURS is how long a stage may take, waiting included, before it is cancelled: 12 unless set.
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

SECONDS = 5  # between two looks
LOG_SECONDS = 60  # to wait for a log when all is well,
LOG_SECONDS_OF_FAILURE = 360  # and when not; EMR brings it to S3 within five minutes
LINES = 20  # of what a stage said last
LOGGED = re.compile(r"\d\d[/:]\d\d[/:]\d\d.* (INFO|WARN) ")  # Spark's own lines


class Look(NamedTuple):
    """What is known of a run at a moment."""

    state: str  # the service's word for it, and where it waits, of what
    is_over: bool
    is_sound: bool
    reason: str  # why it ended badly, in the service's words
    logs: str  # the URI of the folder of its logs


class Service(Protocol):
    """What runs a stage: a cluster, or an application without one."""

    where: str  # its id

    def find(self, name: str) -> tuple[str, Look] | None:
        """The id of the latest run of that name, and a look at it."""

    def start(self, name: str, settings: Mapping[str, str], words: list[str]) -> str:
        """Start a run, and return its id.

        Parameters
        ----------
        settings : Spark's
        words : the URI of the stage's file, and its command line
        """

    def look(self, run: str) -> Look: ...

    def cancel(self, run: str) -> None: ...

    def rate(self) -> tuple[int, float]:
        """The cores there are, and what they cost in an hour, EUR."""

    def bill(self, run: str) -> dict[str, Any]:
        """What a run took: see runtime.record."""


class Storage(Protocol):
    """Where the service reads and writes: files by their keys."""

    def address(self, place: str) -> str:
        """The URI that a file or a folder of the workspace has there, which its content tells."""

    def put(self, place: str) -> str:
        """Send what is not there yet of a file or a folder of the workspace, and return its address."""

    def uri(self, key: str) -> str: ...

    def keys(self, prefix: str) -> list[str]:
        """The keys below the prefix, relative to it."""

    def fetch(self, prefix: str, folder: Path) -> None:
        """Bring the tables that are whole below the prefix into the folder."""

    def adopt(self, prefix: str, folder: Path) -> None:
        """Let the tables below the prefix stand for the folder that they were published as, without sending it."""

    def delete(self, prefix: str) -> None: ...

    def read_log(self, logs: str, stream: str, seconds: float) -> str:
        """The text of stdout or stderr once it has come; an empty one if it does not come in these seconds."""


@dataclass(frozen=True)
class Remote:
    """A service and its storage, as a Runner."""

    service: Service
    storage: Storage
    settings: Mapping[str, str]  # Spark's, of every run
    hints: Mapping[str, str]  # what to do, by what stderr says
    errors: Callable[[], AbstractContextManager[None]]  # that end with one line where the service refuses

    def command(self, job: Job) -> list[str]:
        with self.errors():
            code, *inputs = map(self.storage.address, [job.stage, *job.inputs])
        _, key = self._name(job, [code, *inputs])
        conf = [f"--conf={name}={value}" for name, value in self.settings.items()]
        return ["spark-submit", *conf, code, *inputs, self.storage.uri(key), *job.flags]

    def run(self, job: Job, partial: Path, lock: int) -> Outcome:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # to be told to end is Ctrl-C, also where it is ignored
        with self.errors():
            return self._run(job, partial)

    def _run(self, job: Job, partial: Path) -> Outcome:
        code, *inputs = map(self.storage.put, [job.stage, *job.inputs])
        name, key = self._name(job, [code, *inputs])
        found = self.service.find(name)
        if found and (not found[1].is_over or (found[1].is_sound and self.storage.keys(key))):
            run = found[0]
            say(job, f"run {run} of an earlier call is {found[1].state}; taking it up")
        else:
            self.storage.delete(key)  # what a run that failed has left
            say(job, self._estimate(job))
            run = self.service.start(name, self.settings, [code, *inputs, self.storage.uri(key), *job.flags])
        look = wait(self.service, run, job)
        self.storage.fetch(key, partial)
        if look.is_sound:
            return Outcome(0, functools.partial(self._settle, job, run, key, look.logs))
        stderr = self.storage.read_log(look.logs, "stderr", LOG_SECONDS_OF_FAILURE)
        hints = [hint for sign, hint in self.hints.items() if sign in stderr]
        reason = " ".join([f"{run} is {look.state}.", look.reason, *hints])
        print(last_words(stderr), file=sys.stderr)
        return Outcome(1, dict, f"submit: {job.name}: {reason}\nIts logs: {look.logs}/")

    def _settle(self, job: Job, run: str, key: str, logs: str) -> Mapping[str, Any]:
        """Keep the output there as an input of later stages, tidy up, say what the stage said, and return what it took."""
        with self.errors():
            self.storage.adopt(key, Path(job.output))
            took = self.service.bill(run)
            self.storage.delete(key)
            said = self.storage.read_log(logs, "stdout", LOG_SECONDS)
        print(said or f"submit: what {job.name} says will be in {logs}/stdout.gz", end="" if said else "\n")
        return took

    def _name(self, job: Job, sources: list[str]) -> tuple[str, str]:
        """A name for all that the run depends on, and the key where it writes."""
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        name = f"{job.name} {digest_of([*sources, *job.flags, *settings])[:16]}"
        return name, f"staging/runs/{self.service.where}/{name.replace(' ', '-')}"

    def _estimate(self, job: Job) -> str:
        """Say what the stage may take and cost."""
        cores, euros = self.service.rate()
        if not cores:
            return "what it may cost is not known: no node is up yet"
        seconds = runtime.estimate(job, cores)
        price = f"{cores} cores at {euros:.2f} EUR an hour"
        if seconds is None:
            return f"{price}; no earlier run tells how long it may take"
        return f"{price}: some {seconds / 60:.0f} min and {euros * seconds / 3600:.2f} EUR, by what the last run took"


def wait(service: Service, run: str, job: Job) -> Look:
    """Look until the run is over, and say when its state changes; cancel it when we are told to end, or time is up."""
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
                raise SystemExit(f"submit: {job.name}: {run} took more than EMR_HOURS={hours():g} and was cancelled")
            time.sleep(SECONDS * random.uniform(0.8, 1.2))
    except KeyboardInterrupt:
        cancel(service, run, job)
        raise
    except Exception:
        say(job, f"{run} goes on; the same command takes it up again")
        raise


def cancel(service: Service, run: str, job: Job) -> None:
    """Cancel the run, and see it end: what it writes must not meet what the next one writes."""
    say(job, f"cancelling {run}; Ctrl-C leaves it alone")
    service.cancel(run)
    while not service.look(run).is_over:
        time.sleep(SECONDS)
    say(job, f"{run} is cancelled")


def last_words(stderr: str) -> str:
    """Cut out what a stage said last: from its last traceback on, if it has one."""
    lines = [line for line in stderr.splitlines() if not LOGGED.match(line)]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-LINES:])


def spark_defaults() -> dict[str, str]:
    """Read the settings of spark-defaults.conf, which a run on this machine has from that file."""
    lines = Path(__file__).with_name("spark-defaults.conf").read_text().splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))


def hours() -> float:
    return float(os.environ.get("EMR_HOURS", "12"))


def say(job: Job, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {job.name}: {text}", flush=True)
