"""Check params.yaml before anything is computed: a wrong number in the last stage must not be found after an hour.

Each stage checks its own section when it parses its command line. Before a stage runs, the others are made to do so too, if
their section differs from the one in dvc.lock, which an earlier run has accepted.
"""

import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

# An error is one line, without the usage of a command that nobody has typed.
PARSE = """
import argparse, importlib, sys
argparse.ArgumentParser.error = lambda parser, message: sys.exit(message)
importlib.import_module(sys.argv[1]).parse_args(sys.argv[2:])
"""


def check(running: str) -> None:
    """Let the stages parse their sections of params.yaml, except the running one, which does so itself.

    Raises
    ------
    SystemExit
        stages refuse their sections; with a line for each
    """
    if not Path("dvc.yaml").exists():
        return  # a single stage, not one of a pipeline
    parsers = {
        name: subprocess.Popen([sys.executable, "-c", PARSE, *words], stderr=subprocess.PIPE, text=True)
        for name, words in changed_commands()
        if name != running
    }
    said = {name: parser.communicate()[1].strip() for name, parser in parsers.items()}
    refused = [f"{name}: {said[name].splitlines()[-1]}" for name, parser in parsers.items() if parser.returncode]
    if refused:
        raise SystemExit("\n".join(f"params.yaml: {line}" for line in refused))


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
    return dict(yaml.safe_load(path.read_text()) or {}) if path.exists() else {}
