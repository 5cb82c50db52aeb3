"""Check params.yaml before anything is computed: a wrong number in the last stage must not be found after an hour.

usage: python -m bootstrap.parameters    checks the folder of images only: prints nothing if it is there, else what to do

Each stage checks its own section when it parses its command line. Before a stage runs, the others are made to do so too, if
their section differs from the one in dvc.lock, which an earlier run has accepted. What they accept is noted, for a stage
takes a second or more to import what it needs, and would take it before each stage of the run.
"""

import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from bootstrap.job import Job, digest_of, sha256

ACCEPTED = Path(".dvc/tmp/accepted")  # a line for each command line that is not in dvc.lock yet: see digest_of_command
# An error is one line, without the usage of a command that nobody has typed.
PARSE = """
import argparse, importlib, sys
argparse.ArgumentParser.error = lambda parser, message: sys.exit(message)
importlib.import_module(sys.argv[1]).parse_args(sys.argv[2:])
"""


def check(running: str, inputs: Iterable[str] = ()) -> None:
    """Check the folder of images, and let the stages parse their sections, except the running one, which does so itself.

    Where DVC knows the folder, only a stage that reads it must have it here: the others go on with what `dvc pull` brings.

    Raises
    ------
    SystemExit
        there is no such folder, or stages refuse their sections; with a line for each
    """
    if not Path("dvc.yaml").exists():
        return  # a single stage, not one of a pipeline
    others = {name: words for name, words in changed_commands() if name != running}
    digests = {name: digest_of_command(name, words) for name, words in others.items()}
    accepted = ACCEPTED.read_bytes().split() if ACCEPTED.exists() else []
    parsers = {
        name: subprocess.Popen([sys.executable, "-c", PARSE, *words], stderr=subprocess.PIPE, text=True)
        for name, words in others.items()
        if digests[name].encode() not in accepted
    }
    said = {name: parser.communicate()[1].strip() for name, parser in parsers.items()}
    refused = [f"{name}: {said[name].splitlines()[-1]}" for name, parser in parsers.items() if parser.returncode]
    refused += what_is_wrong_with_images(is_read="@images" in inputs)
    if refused:
        raise SystemExit("\n".join(f"params.yaml: {line}" for line in refused))
    if parsers:
        with suppress(OSError):  # as on a full disk, or where there is no DVC
            ACCEPTED.write_text("\n".join(digests.values()))


def digest_of_command(stage: str, words: list[str]) -> str:
    """Hash a command line and the file of its stage, which decides about it."""
    return digest_of([sha256(Path(f"stages/{stage}.py")), *words])


def what_is_wrong_with_images(is_read: bool = True) -> list[str]:
    """Say why a run cannot read the folder of images, and what to do; nothing if it can, or if a stage makes the folder."""
    images = load("params.yaml").get("images")
    if not images or not isinstance(images, str):
        return [f"images: {images!r} is no folder"]
    outputs = {output for stage in load("dvc.yaml")["stages"].values() for output in stage.get("outs", [])}
    if images in outputs or Path(images).is_dir():
        return []
    if images.startswith("~"):
        return [f"images: DVC does not know what ~ is: write {Path(images).expanduser()}"]
    if Path(f"{images}.dvc").exists():
        pull = f"source .venv/bin/activate && dvc pull {shlex.quote(images)}"
        return [f"images: {images} is not here, but DVC knows it: `{pull}` fetches it from the remote"] * is_read
    return [f"images: there is no folder {images}. In a queue, an experiment has only what git or DVC tracks: see `dvc add`"]


def look_up(places: list[str]) -> list[str]:
    """Put in the place of each @NAME what params.yaml has under NAME.

    Raises
    ------
    SystemExit
        params.yaml has no such text
    """
    return [find_place(place[1:]) if place.startswith("@") else place for place in places]


def find_place(name: str) -> str:
    place = load("params.yaml").get(name)
    if not isinstance(place, str):
        raise SystemExit(f"submit: params.yaml has no folder under {name}, but {place!r}")
    return place


def check_unchanged(job: Job, environment: Mapping[str, str]) -> None:
    """Check that params.yaml still has the parameters that DVC has started the stage with.

    DVC reads params.yaml again when a stage has ended, and would record what it finds as the parameters of this output.

    Raises
    ------
    SystemExit
        it has others
    """
    section = load("params.yaml").get(job.name)
    if environment.get("DVC_STAGE") == job.name and section is not None and flags(section) != job.flags:
        raise SystemExit(
            f"submit: params.yaml was changed while this run was at work: {job.name} has `{shlex.join(job.flags)}`, and now "
            f"`{shlex.join(flags(section))}` is there. Perhaps somebody has started another `dvc exp run` in this folder; "
            "beside a run, use `dvc exp run --queue`. Write the parameters that you want, and run again."
        )


def changed_commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the name, and the module with its command line, of each stage whose section is not the one in dvc.lock."""
    pipeline, sections, accepted = (load(name) for name in ("dvc.yaml", "params.yaml", "dvc.lock"))
    for name, stage in pipeline["stages"].items():
        section = sections.get(name)
        locked = accepted.get("stages", {}).get(name, {}).get("params", {}).get("params.yaml", {}).get(name)
        if section is not None and section != locked:
            words = shlex.split(stage["cmd"])
            places = words[words.index(f"stages/{name}.py") + 1 : words.index(f"${{{name}}}")]
            yield name, [f"stages.{name}", *places, *flags(section)]


def flags(section: Mapping[str, Any]) -> list[str]:
    """Convert a section of params.yaml to flags, as DVC does for ${section} in dvc.yaml."""
    words = []
    for key, value in section.items():
        if value is not False and value != []:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [] if value is True else [value])]
    return words


def load(name: str) -> dict[str, Any]:
    path = Path(name)
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


if __name__ == "__main__":
    sys.exit("\n".join(f"params.yaml: {line}" for line in what_is_wrong_with_images()) or None)
