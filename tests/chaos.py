"""Disturb runs of the pipeline in random ways, and check that the next run makes all well.

usage: python -m tests.chaos [--minutes 10 | --rounds N] [--seed S] [--first N] [--fault KIND] [--folder FOLDER]

Each round copies a project that has run once, makes a part of it due again, disturbs the run that computes it, and then lets
`dvc repro` run at most twice. It must end with the dvc.lock and the files of an undisturbed run. Or it says in a line what
is wrong and what to do, and that helps. Seed and round tell all that a round does, but not how fast the machine is. At the
first wrong end the exit status is 1, and the command that plays the round again is printed.

FOLDER keeps the undisturbed project and what each run printed; it is a new temporary one unless given. Rounds are played in
a mount namespace of their own (`unshare` of util-linux, no root needed), on a small disk that can be full. Where the system
allows none, no disk is full.
"""

import argparse
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml

from bootstrap.job import files_of, remove, sha256
from tests.helpers import PIPELINE, PYTHON, ROOT, copy_repository, environment_of, run

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
PATIENCE = 300  # seconds that a run may take; one that takes longer hangs
LARGE = "size=4g,nr_inodes=1000000"  # of a disk that is never full
# What finds damage that nothing else can see: in DVC's cache, and in outputs whose times are as before.
VERIFY = "reports.verify"
LABELS, PER_LABEL, DELIVERED = ("Kiwi", "Lemon", "Plum"), 8, 3
MINE = "data/mine"
OUTS = {name: stage["outs"][0] for name, stage in PIPELINE.items() if stage.get("outs")}
# What takes work to compute, and so is worth to disturb; the rest follows anyhow.
DUE = ("backbone", "ingest", "featurize", "neighbours", "split", "covariance", "reduce", "classify", "export")
OTHER_PARAMETERS = (
    ("reduce", "k", 5),
    ("neighbours", "n_neighbours", 5),
    ("featurize", "batch_size", 5),
    ("ingest", "min_side", 2),
    ("sample", "seed", 1),
    ("split", "near", 0.4),
)
# A line that says, in our words or in DVC's, what is wrong. DVC's own first line says no more than which stage failed.
CLEAR = re.compile(rf"^(?:submit|params\.yaml|{'|'.join(PIPELINE)}): \S.{{20,}}", re.MULTILINE)
FULL = "disk is full|No space left|Errno 28|unable to open database file"  # the last by SQLite, if it can make no file
DVCS = re.compile(rf"^ERROR: .*(?:is busy|Unable to acquire lock|{FULL}).*", re.MULTILINE)
TRACE = re.compile(r"^Traceback \(most recent call last\)|^\s+at [\w.$<>/]+\(.*\)$", re.MULTILINE)
COMMAND = re.compile(r"`((?:dvc|git|rm|make) [^`]+)`")


class Wrong(Exception):
    """A round that did not end as it must."""


class Round:
    """One round: a copy of the project, what random choices it makes, what was done."""

    def __init__(self, seed: int, number: int, reference: Path, place: Path, log: Path) -> None:
        self.random = random.Random(f"{seed} {number}")
        self.reference, self.place, self.folder = reference, place, place / "repository"
        self.log = log
        self.done: list[str] = []
        self.n_runs = 0
        self.seconds = 20.0  # that a run of what is due takes, about
        run("cp", "-a", str(reference), str(self.folder), cwd=place)

    def say(self, what: str) -> None:
        self.done.append(what)

    def start(self, *command: str, folder: Path | None = None, **environment: str) -> "Run":
        self.n_runs += 1
        folder = folder or self.folder
        output = self.log.with_name(f"{self.log.name}-{self.n_runs}.txt")
        with output.open("w") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment_of(folder, **alone(self.place) | environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Run(process, output)

    def make_due(self, n: int = 2) -> list[str]:
        """Forget the outputs of some stages, so that the next run computes them again; return their names."""
        first = self.random.randrange(len(DUE))
        names = [*DUE[first : first + self.random.randint(1, n)]]
        self.forget(*names)
        stages = json.loads((self.folder / "reports/runtime.json").read_text())["stages"]
        self.seconds = 3 + sum(1.5 + stage["seconds"] for stage in stages if stage["stage"] in names)
        if "featurize" in names and self.random.random() < 0.5:
            shutil.rmtree(self.folder / ".dvc/tmp/feature-cache")
            names += ["the feature cache"]
        self.say(f"{', '.join(names)} due again")
        return names

    def forget(self, *stages: str, folder: Path | None = None) -> None:
        """Delete the outputs of stages, here and in DVC's cache."""
        folder = folder or self.folder
        files = self.reference.parent.glob("*/dvc.lock")  # of the reference, and of the grown one
        locks = [yaml.safe_load(file.read_text())["stages"] for file in files]
        for name in stages:
            remove(folder / OUTS[name])
            for lock in locks:
                md5 = lock[name]["outs"][0]["md5"]
                remove(folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:])

    def moment(self, share: float = 1.0) -> float:
        """Choose a moment of the run, or of its first part: seconds after its start."""
        return round(self.random.uniform(0.5, share * self.seconds), 1)


class Run:
    """A command that was started, and what it prints."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Path) -> None:
        self.process, self.output = process, output

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Wrong(f"a run hangs for {PATIENCE} seconds") from None

    def said(self) -> str:
        return self.output.read_text(errors="replace")


def kill(round_: Round) -> None:
    """Kill a process of the run by SIGKILL, at any moment."""
    round_.make_due()
    running = round_.start("dvc", "repro")
    kill_one(round_, running)
    if round_.random.random() < 0.3:
        running = round_.start("dvc", "repro")
        kill_one(round_, running)


def kill_one(round_: Round, running: Run) -> None:
    """Kill one process of a run at a random moment: dvc, the door, Java or a worker, each as likely if it is there."""
    moment = round_.moment(0.6)
    time.sleep(moment)
    there = {role: process for process in processes(round_.folder) if (role := role_of(process))}
    if running.process.poll() is not None or not there:
        round_.say(f"nothing left to kill after {moment} s")
    else:
        role = round_.random.choice(sorted(there))
        with suppress(psutil.Error):
            stages = re.findall(r"stages[./](\w+)", " ".join(there[role].cmdline()))
            there[role].kill()
            round_.say(f"kill -9 of {role}{f' of {stages[0]}' if stages else ''} after {moment} s")
    running.wait()


def fill_disk(round_: Round) -> None:
    """Let the disk become full, of bytes or of files, while the run works."""
    if not is_own_disk(round_.place):
        round_.say("no disk to fill here: the system allows no namespace")
        return
    round_.make_due()
    what, moment = (
        round_.random.choice(("bytes", "files")),
        round_.random.choice((0, round_.moment(0.5), round_.moment(0.9))),
    )
    free = round_.random.randrange(2 ** round_.random.randint(10, 22)) if what == "bytes" else round_.random.randrange(30)
    if not moment:
        leave_free(round_.place, what, free)
    running = round_.start("dvc", "repro")
    if moment:
        time.sleep(moment)
        leave_free(round_.place, what, free)
    status = running.wait()
    round_.say(f"a disk with {free:,} {what} free from {moment} s on; the run ended with status {status}")
    mount(round_.place, LARGE)
    if status and not re.search(FULL, running.said()):
        raise Wrong("on a full disk, the run says nothing of it")


def leave_free(folder: Path, what: str, free: int) -> None:
    """Make a disk so small that so many bytes or files are free on it."""
    while True:
        disk = os.statvfs(folder)
        used_bytes, used_files = (disk.f_blocks - disk.f_bfree) * disk.f_frsize, disk.f_files - disk.f_ffree
        with suppress(subprocess.CalledProcessError):  # more is used already
            mount(folder, f"size={used_bytes + free}" if what == "bytes" else f"nr_inodes={used_files + free}")
            return


def damage(round_: Round) -> None:
    """Flip a bit of a file, or cut the file."""
    names = round_.make_due()
    kinds = {
        "feature cache": [".dvc/tmp/feature-cache"],
        "archive of classes": [".dvc/tmp/classes-*.jsa"],
        "notes of what stages took": [".dvc/tmp/took", ".dvc/tmp/runtime"],
        "record": ["reports/runtime.json"],
        "outputs": [*OUTS.values()],
        "DVC's cache": [".dvc/cache/files"],
    }
    kind = round_.random.choice([*kinds])
    for reader, read in (("featurize", "feature cache"), ("reduce", "archive of classes")):
        if kind == read and reader not in names:
            round_.forget(reader)
    files = sorted({path for each in kinds[kind] for found in round_.folder.glob(each) for path in below(found)})
    is_silent = kind == "DVC's cache" or round_.random.random() < 0.5
    for path in round_.random.sample(files, min(len(files), round_.random.randint(1, 3))):
        hurt(round_, path, keeps_times=is_silent)
    if is_silent:
        running = round_.start(sys.executable, "-m", VERIFY)
        round_.say(f"verify ended with status {running.wait()}")


def hurt(round_: Round, path: Path, keeps_times: bool = False) -> None:
    before, size = path.stat(), path.stat().st_size
    path.chmod(0o600)
    if size and round_.random.random() < 0.5:
        offset, bit = round_.random.randrange(size), round_.random.randrange(8)
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << bit]))
        what = f"bit {bit} of byte {offset:,} flipped"
    else:
        length = round_.random.choice((0, round_.random.randrange(size or 1)))
        os.truncate(path, length)
        what = f"cut to {length:,} of {size:,} bytes"
    path.chmod(before.st_mode & 0o777)
    if keeps_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    crc = path.with_name(f".{path.name}.crc")
    if crc.exists() and round_.random.random() < 0.5:
        crc.unlink()  # as after a power loss
        what += ", its .crc gone"
    round_.say(f"{path.relative_to(round_.folder)}: {what}{', its times kept' * keeps_times}")


def deliver(round_: Round) -> None:
    """Copy photographs into the collection, byte by byte, while the run works."""
    delivery, later = round_.reference.parent / "delivery", grow(round_.reference)
    # With both runs in its cache, the project computes what is due, and no more.
    shutil.copytree(later / ".dvc/cache", round_.folder / ".dvc/cache", dirs_exist_ok=True)
    round_.forget("ingest")
    moment, gap = round_.moment(0.7), round_.random.uniform(0.05, 2)
    running = round_.start("dvc", "repro")
    time.sleep(moment)
    for path in below(delivery):
        target = round_.folder / MINE / path.relative_to(delivery)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        with target.open("wb") as file:
            for half in (content[: len(content) // 2], content[len(content) // 2 :]):
                file.write(half)
                file.flush()
                time.sleep(gap)
    round_.say(f"ingest due again; {DELIVERED} photographs came after {moment} s; the run ended with {running.wait()}")
    round_.reference = later


def run_twice(round_: Round) -> None:
    """Start two runs in one folder."""
    round_.make_due()
    delay = round_.moment(0.3)
    one = round_.start("dvc", "repro")
    time.sleep(delay)
    two = round_.start("dvc", "repro")
    round_.say(f"a second run {delay} s after the first; they ended with {one.wait()} and {two.wait()}")
    for each in (one, two):
        if each.process.returncode:
            find_error(each.said())


def share_cache(round_: Round) -> None:
    """Let two projects compute features at once, in one cache that is empty, whole or damaged."""
    other = round_.place / "other"
    run("cp", "-a", str(round_.folder), str(other), cwd=round_.place)
    cache = round_.folder / ".dvc/tmp/feature-cache"
    state = round_.random.choice(("empty", "whole", "damaged"))
    round_.say(f"two projects share a cache that is {state}")
    if state == "empty":
        shutil.rmtree(cache)
    elif state == "damaged":
        for path in (path for path in below(cache) if path.suffix == ".parquet" and round_.random.random() < 0.7):
            hurt(round_, path)
    delay = round_.moment(0.1)
    folders = (round_.folder, other)
    runs = []
    for folder in folders:
        round_.forget("featurize", folder=folder)
        runs.append(round_.start("dvc", "repro", "featurize", folder=folder, FEATURE_CACHE=str(cache)))
        time.sleep(delay)
    statuses = [each.wait() for each in runs]
    round_.say(f"the second {delay} s after the first; they ended with {statuses}")
    if any(statuses):
        raise Wrong(f"two runs that share a cache ended with {statuses}")
    if wrong := what_differs(other, round_.reference, {"data/features"}):
        raise Wrong(f"in the second project: {wrong}")


def change_parameters(round_: Round) -> None:
    """Start a run with other parameters, kill it or not, and change them back at once."""
    file = round_.folder / "params.yaml"
    text = file.read_text()
    params = yaml.safe_load(text)
    stage, name, value = round_.random.choice(OTHER_PARAMETERS)
    params[stage][name] = value
    file.write_text(yaml.safe_dump(params))
    running = round_.start("dvc", "repro")
    moment = round_.moment()
    if round_.random.random() < 0.7:
        round_.say(f"{stage}.{name} = {value}")
        kill_one(round_, running)
    else:
        time.sleep(moment)
        round_.say(f"{stage}.{name} = {value} for {moment} s of a run")
    file.write_text(text)
    if running.process.poll() is None:
        running.wait()


FAULTS: dict[str, Callable[[Round], None]] = {
    "kill": kill,
    "full disk": fill_disk,
    "damage": damage,
    "delivery": deliver,
    "two runs": run_twice,
    "shared cache": share_cache,
    "parameters": change_parameters,
}


def settle(round_: Round) -> str:
    """Let `dvc repro` run, at most twice, do what its error says, and say how it ended."""
    errors: list[str] = []
    for _ in range(2):
        running = round_.start("dvc", "repro")
        if running.wait() == 0:
            if wrong := what_differs(round_.folder, round_.reference):
                raise Wrong(f"dvc repro ended well, but {wrong}")
            return "well" + "".join(f", after: {error}" for error in errors)
        errors.append(find_error(running.said()))
        for command in COMMAND.findall(errors[-1]):
            if command != "dvc repro":
                errors[-1] += f" (status {round_.start('sh', '-c', command).wait()})"
    raise Wrong(f"two runs, and still: {errors[-1]}")


def find_error(said: str) -> str:
    """Return the line of an output that says what was wrong; an output without one, or with a trace, is Wrong."""
    of_last_stage = said.rpartition("\n> ")[2].partition("\n")[2]  # each stage begins with its command
    lines = [found[0] for pattern in (CLEAR, DVCS) for found in pattern.finditer(of_last_stage)]
    if TRACE.search(said):
        raise Wrong("a run ended with a trace")
    if not lines:
        raise Wrong("a run ended without a word that says why")
    return lines[-1]


def what_differs(folder: Path, reference: Path, outs: set[str] | None = None) -> str:
    """Say in what a project differs from an undisturbed one: in its outputs, or, of all of them, in its lock."""
    for out in sorted(outs or OUTS.values()):
        here, there = (contents(each / out) for each in (folder, reference))
        if different := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
            return f"{out} has {len(different):,} files that are different, such as {different[0]}"
    locks = [yaml.safe_load((each / "dvc.lock").read_text())["stages"] for each in (folder, reference)]
    stages = [] if outs else [name for name in PIPELINE if locks[0].get(name) != locks[1].get(name)]
    return f"dvc.lock differs in {', '.join(stages)}" if stages else ""


def contents(place: Path) -> dict[str, str]:
    """Hash each file of an output, which may be missing."""
    return {name: sha256(path) for name, path in files_of(place).items()}


def processes(folder: Path) -> Iterator[psutil.Process]:
    """Find the processes that work in a folder."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(folder):
                yield process


def role_of(process: psutil.Process) -> str:
    """Tell what a process is in a run: dvc, door, java or worker; empty if none of them."""
    with suppress(psutil.Error):
        words = process.cmdline()
        if words and Path(words[0]).name == "java":
            return "java"
        if "bootstrap.submit" in words:
            return "door"
        if any(re.search(r"^stages[./]|pyspark\.daemon", word) for word in words[:4]):
            return "worker"
        if any(Path(word).name == "dvc" for word in words[:2]):
            return "dvc"
    return ""


def below(place: Path) -> list[Path]:
    return sorted(path for path in (place, *place.rglob("*")) if path.is_file() and not path.is_symlink())


def make_reference(folder: Path) -> Path:
    """Make a project with a few photographs and run it, and a delivery beside it. What is there already is kept."""
    reference = folder / "reference"
    if reference.exists():
        return reference
    partial = folder / "reference.partial"
    shutil.rmtree(partial, ignore_errors=True)
    copy_repository(partial, {"frames: 36": "frames: 1", "size: 100": "size: 16", "image_size: 224": "image_size: 32"}
                    | {"  k: 64": "  k: 8", "images: data/sample": f"images: {MINE}"})  # fmt: skip
    rendered = folder / "rendered"
    shutil.rmtree(rendered, ignore_errors=True)
    flags = ["--frames", str(PER_LABEL), "--size", "48", "--seed", "7"]
    run(str(PYTHON), "-m", "stages.sample", str(rendered), *flags, cwd=ROOT)
    for label in LABELS:
        for i, path in enumerate(below(rendered / label)[: PER_LABEL + 1]):
            target = (partial / MINE if i < PER_LABEL else folder / "delivery") / label / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    environment = alone(folder)
    run("dvc", "add", MINE, cwd=partial, **environment)
    run("dvc", "repro", cwd=partial, **environment)
    run("git", "add", "--all", cwd=partial)
    run("git", "commit", "--quiet", "-m", "First", cwd=partial)
    partial.rename(reference)
    return reference


def grow(reference: Path) -> Path:
    """Make the project that has run with the delivery, too. What is there already is kept."""
    folder, later = reference.parent, reference.with_name("grown")
    if not later.exists():
        partial = reference.with_name("grown.partial")
        shutil.rmtree(partial, ignore_errors=True)
        run("cp", "-a", str(reference), str(partial), cwd=folder)
        shutil.copytree(folder / "delivery", partial / MINE, dirs_exist_ok=True)
        run("dvc", "repro", cwd=partial, **alone(folder))
        partial.rename(later)
    return later


def alone(folder: Path) -> dict[str, str]:
    """Return what a run's environment needs for DVC to believe nothing that it remembers of projects elsewhere.

    DVC remembers files by path, time and size, and rounds have the same paths.
    """
    return {"DVC_SITE_CACHE_DIR": str(folder / "site"), "SPARK_MASTER": "local[2]"}


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, on a disk of its own where that is possible; end what still works in it."""
    folder.mkdir(parents=True)
    if os.environ.get("CHAOS_NAMESPACE"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", LARGE, "chaos", str(folder)], check=True)
    try:
        yield folder
    finally:
        for process in [*processes(folder)]:
            with suppress(psutil.Error):
                process.kill()
        if is_own_disk(folder):
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def is_own_disk(folder: Path) -> bool:
    return os.path.ismount(folder)


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True, capture_output=True)


def play(seed: int, number: int, folder: Path, fault: str) -> bool:
    """Play a round, print what was done and how it ended, and return whether it ended well."""
    reference, started = make_reference(folder), time.monotonic()
    (folder / "logs").mkdir(exist_ok=True)
    with disk(folder / f"disk-{seed}-{number}-{os.getpid()}") as place:
        name = f"seed-{seed}-round-{number}-{fault.replace(' ', '-')}"
        round_ = Round(seed, number, reference, place, folder / "logs" / name)
        try:
            FAULTS[fault](round_)
            end = settle(round_)
            is_well = True
        except Wrong as wrong:
            end, is_well = f"WRONG: {wrong}", False
    took = time.monotonic() - started
    print(f"seed {seed} round {number}: {fault}: {'; '.join(round_.done)}: {end} ({took:.0f} s)", flush=True)
    if not is_well:
        print(
            f"chaos: what the runs printed: {round_.log}-*.txt\nchaos: once more: {replay(seed, number, fault)}", flush=True
        )
    return is_well


def fault_of(seed: int, number: int) -> str:
    """Choose the kind of fault of a round: each once in as many rounds, in random order."""
    names = [*FAULTS]
    random.Random(f"{seed} {number // len(names)}").shuffle(names)
    return names[number % len(names)]


def replay(seed: int, number: int, fault: str) -> str:
    return f"python -m tests.chaos --seed {seed} --first {number} --rounds 1 --fault {shlex.quote(fault)}"


def enter_namespace() -> None:
    """Start this program again in a mount namespace of its own, if the system allows one."""
    if not os.environ.get("CHAOS_NAMESPACE"):
        try:
            is_allowed = subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
        except OSError:
            is_allowed = False
        if is_allowed:
            os.environ["CHAOS_NAMESPACE"] = "1"
            os.execvp(NAMESPACE[0], [*NAMESPACE, sys.executable, "-m", "tests.chaos", *sys.argv[1:]])
        print("chaos: the system allows no namespace (unshare), so no disk will be full", flush=True)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    enter_namespace()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with this program
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_reference(folder)
        for number in itertools.count(args.first):
            if not play(args.seed, number, folder, args.fault or fault_of(args.seed, number)):
                return 1
            n_played = number + 1 - args.first
            if n_played == args.rounds if args.rounds else time.monotonic() > deadline:
                break
    print(f"chaos: {n_played} rounds ended well")
    return 0


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="start no round later than that")
    parser.add_argument("--rounds", type=int, help="play so many, whatever they take")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of all random choices")
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--fault", choices=FAULTS, help="play this kind only; all of them in turn unless given")
    parser.add_argument("--folder", type=Path, help="where the undisturbed project and the logs are kept")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
