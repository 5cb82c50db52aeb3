"""model: read what a model says of itself, which `export` wrote, and check that it is whole."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What page and command need of model.json.
KINDS = {
    "labels": list,
    "calibrated": bool,
    "thresholds": dict,
    "measured": dict,
    "trained_on": dict,
    "pixels": dict,
    "backbone": dict,
    "files": dict,
}
AGAIN = "Run `make run`, or copy the folder again"


def describe(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Read model.json, and check that the files of these names are those that it speaks of.

    Raises
    ------
    ValueError
        there is no model in the folder, or it is not whole; the message says what to do.
    """
    try:
        about = json.loads((folder / "model.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"there is no model in {folder}. Run `make run`, which writes data/model.") from None
    except OSError as error:
        raise ValueError(f"{folder / 'model.json'} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'model.json'} is damaged: {error}. {AGAIN}.") from None
    wrong = [key for key, kind in KINDS.items() if not isinstance(about, dict) or not isinstance(about.get(key), kind)]
    if wrong:
        raise ValueError(f"{folder / 'model.json'} is damaged: it has no {', '.join(wrong)}. {AGAIN}.")
    for name in names:
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read: {error.strerror}. {AGAIN}.") from None
        if found != about["files"].get(name):
            raise ValueError(
                f"{folder / name} has SHA-256 {found}, and model.json says {about['files'].get(name)}. {AGAIN}."
            )
    return about
