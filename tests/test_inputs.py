"""inputs.py: a stage reads the files that DVC hashes."""

import os
from pathlib import Path

import pytest
from dvc.repo import Repo

from bootstrap import inputs
from bootstrap.job import Job


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of DVC's with photographs, of which .dvcignore leaves out a backup."""
    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True).close()
    for name in ("Kiwi/1.jpg", "Kiwi/2.jpg", "Kiwi/.2.jpg.bak", ".git/1.bak"):
        path = tmp_path / "data/mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / ".dvcignore").write_text("*.bak\n")
    return tmp_path


def test_a_folder_that_dvc_hashes_whole_is_accepted(repository: Path) -> None:
    inputs.check(["data/mine", "data/nowhere"])


def test_a_file_that_dvc_would_not_see_is_refused_by_name(repository: Path) -> None:
    (repository / "data/mine/Kiwi/3.jpg.bak").write_text("three")
    with pytest.raises(SystemExit, match=r"DVC leave out 1 of 3 files of data/mine, such as Kiwi/3\.jpg\.bak, but"):
        inputs.check(["data/mine"])


def test_outputs_of_stages_are_not_looked_at(repository: Path) -> None:
    (repository / "data/mine/3.bak").write_text("three")
    (repository / "dvc.yaml").write_text("stages: {sample: {cmd: x, outs: [data/mine]}}")
    inputs.check(["data/mine"])


def test_what_dvc_takes_for_the_content_of_files_is_what_ingest_lists(repository: Path) -> None:
    # Of links, DVC follows those to files, not those to folders.
    from dvc.fs import localfs

    from stages import ingest

    folder = repository / "data/mine"
    (folder / "Kiwi/link.jpg").symlink_to("1.jpg")
    here = {path for path, _ in ingest.list_local(str(folder))}
    assert here == {path[len(str(folder)) + 1 :] for path in localfs.find(str(folder))}
    (folder / "Fig").symlink_to("Kiwi")
    assert here == {path[len(str(folder)) + 1 :] for path in localfs.find(str(folder))}
    with pytest.raises(SystemExit, match="links to folders"):
        list(ingest.list_local(str(folder)))


@pytest.mark.parametrize("what", ["comes", "goes", "changes", "is touched", "is another"])
def test_a_file_that_changes_while_a_stage_is_at_work_is_told(what: str, repository: Path) -> None:
    places = ["data/mine", ".dvcignore", "nowhere"]
    before = inputs.look(places)
    inputs.check_unchanged("ingest", places, before)
    file = repository / "data/mine/Kiwi/2.jpg"
    match what:
        case "comes":
            file.with_name("3.jpg").write_text("three")
        case "goes":
            file.unlink()
        case "changes":
            file.write_text("another")
        case "is another":  # of the same size and time, as files of one archive have
            other = file.with_name("3.jpg").with_suffix("")
            other.write_text("Kiwi/0.jpg")
            os.utime(other, ns=(0, file.stat().st_mtime_ns))
            other.replace(file)
        case _:
            os.utime(file, ns=(0, 0))
    such = {"comes": r", such as data/mine/Kiwi/3\.jpg", "goes": ""}.get(what, r", such as data/mine/Kiwi/2\.jpg")
    with pytest.raises(
        SystemExit, match=rf"files of data/mine/Kiwi came, .* while ingest was at work{such}\. So its output"
    ):
        inputs.check_unchanged("ingest", places, before)


def test_a_place_that_is_a_file_is_looked_at(repository: Path) -> None:
    before = inputs.look(["data/mine", ".dvcignore"])
    (repository / ".dvcignore").write_text("*.tmp\n")
    with pytest.raises(SystemExit, match=r"files of \.dvcignore came, went or changed"):
        inputs.check_unchanged("ingest", ["data/mine", ".dvcignore"], before)


def test_a_folder_without_files_is_no_change(repository: Path) -> None:
    before = inputs.look(["data"])
    (repository / "data/mine/New folder").mkdir()
    inputs.check_unchanged("ingest", ["data"], before)


def test_a_link_that_leads_nowhere_is_no_file(repository: Path) -> None:
    before = inputs.look(["data"])
    for name, target in {"loop": "loop", "gone": "nowhere", "through": "Kiwi/0.jpg/x"}.items():
        (repository / "data/mine" / name).symlink_to(target)
    assert inputs.look(["data"]) == before


def test_a_look_keeps_eight_bytes_of_a_file(repository: Path) -> None:
    assert {folder: len(marks) for folder, marks in inputs.look(["data"]).items()} == {
        "data": 0,
        "data/mine": 0,
        "data/mine/Kiwi": 3 * 8,
        "data/mine/.git": 8,
    }


def test_a_module_that_stages_share_is_looked_at(repository: Path) -> None:
    (repository / "dvc.yaml").write_text("stages: {one: {cmd: x, deps: [stages/one.py, shared.py, data/mine]}}")
    job = Job("python", "stages/one.py", ["data/mine"], "out", [])
    assert inputs.read_by(job) == ["stages/one.py", "data/mine", "shared.py"]


def test_a_stage_of_which_dvc_knows_nothing_reads_its_file_and_its_inputs(repository: Path) -> None:
    assert inputs.read_by(Job("python", "one.py", ["in"], "out", [])) == ["one.py", "in"]
