"""What several test files share."""

from pathlib import Path

from bootstrap import java


def make_archive(dvc_root: dict[str, str], version: str) -> Path:
    """Let a first run with that version of Java make its archive of classes, of no class."""
    with java.class_archive(dvc_root, version) as options:
        made = Path(options.split()[0].removeprefix("-XX:ArchiveClassesAtExit="))
        made.write_bytes(b"classes")
    (archive,) = made.parent.iterdir()
    return archive
