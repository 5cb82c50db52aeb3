"""delivery.py: what is said of a delivery, and what is taken in; sha256sum's bytes are the oracle."""

import hashlib
import os
import shutil
import subprocess
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from dvc.repo import Repo
from pyspark.sql import SparkSession

from bootstrap import parameters
from reports import delivery
from stages import ingest
from tests.helpers import PARAMS, ROOT
from tests.test_archives import archive_of
from tests.test_ingest import HEIC, with_orientation


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new repository of DVC's with the pipeline's parameters."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("dvc.yaml", "params.yaml", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    Repo.init().close()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    return folder


@pytest.fixture
def brought(tmp_path: Path, image_bytes: Callable[..., bytes]) -> Path:
    """A delivery: three photographs of two labels, one that is cut, one text, one hidden file."""
    folder = tmp_path / "brought"
    contents = {
        "Apple/1.jpg": image_bytes(seed=1),
        "Apple/2.png": image_bytes("PNG", size=(60, 40), seed=2),
        "deep/Plum/31_100.jpg": image_bytes(seed=3),
        "Plum/cut.jpg": image_bytes(seed=4)[:200],
        "Plum/notes.txt": b"taken on Monday",
        "Plum/.DS_Store": b"\0",
    }
    for path, content in contents.items():
        write(folder / path, content)
    return folder


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def change(old: str, new: str) -> None:
    params = Path("params.yaml").read_text()
    assert old in params
    Path("params.yaml").write_text(params.replace(old, new, 1))


def content_of(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


PHOTOGRAPHS = ("Apple/1.jpg", "Apple/2.png", "deep/Plum/31_100.jpg")


def test_what_is_in_a_delivery_is_said(repository: Path, brought: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delivery.main(["--look", str(brought)])
    said = capsys.readouterr().out
    size = sum((brought / path).stat().st_size for path in PHOTOGRAPHS)
    assert f"brought: 3 photographs of 2 labels, {size / 1e6:,.1f} MB" in said
    assert "formats   JPEG 2, PNG 1; 30 x 20 to 60 x 40 pixels" in said
    assert "labels    Apple 2, Plum 1" in said
    assert "films     2 names tell no film" in said
    assert "refused   1 truncated:\n            Plum/cut.jpg: " in said
    assert "ignored   2 files: hidden 1, txt 1" in said


ODD = {"max_file_mb": 1, "max_pixels": 10_000, "min_side": 10, "leave_out": ["*/left out/*"], "max_quarantined": 100}


@pytest.fixture
def odd(tmp_path: Path, image_bytes: Callable[..., bytes]) -> Path:
    """A delivery of all that there is: formats, names, links, damage, and files that are no images."""
    folder, photo = tmp_path / "odd", image_bytes()
    contents = {
        "Kiwi/1.jpg": photo,
        "Kiwi/new/_MG_1": photo,
        "Kiwi/wrong.txt": photo,
        "Kiwi/12:30.jpg": photo,
        unicodedata.normalize("NFD", "Pêche/1.jpg"): photo,
        "Kiwi/2.png": image_bytes("PNG"),
        "Kiwi/3.webp": image_bytes("WEBP"),
        "Kiwi/4.bmp": image_bytes("BMP"),
        "Kiwi/5.gif": image_bytes("GIF"),
        "Kiwi/6.tif": image_bytes("TIFF"),
        "Kiwi/7.avif": image_bytes("AVIF"),
        "Kiwi/8.HEIC": HEIC,
        "loose": photo,
        "Kiwi/turned.jpg": image_bytes(exif=with_orientation(6)),
        "Kiwi/cut.jpg": photo[:200],
        "Kiwi/cut": photo[:200],
        "Kiwi/empty.jpg": b"",
        "Kiwi/small.jpg": image_bytes(size=(9, 20)),
        "Kiwi/wide.jpg": image_bytes(size=(101, 100)),
        "Kiwi/large.jpg": bytes(2**20 + 1),
        "Kiwi/letter.jpg": b"text",
        "Kiwi/letter.png": b"%PDF-1.7",
        "Kiwi/empty.csv": b"",
        "Kiwi/large.mp4": bytes(2**20 + 1),
        "Kiwi/notes.txt": b"text",
        "Kiwi/notes": b"%PDF-1.7",
        "Kiwi/photos.jpg.bak": b"PK\x03\x04",
        "Kiwi/preview.NEF": image_bytes("TIFF"),
        "Kiwi/raw": b"FUJIFILMCCD-RAW",
        "Kiwi/left out/1.jpg": photo,
        "Kiwi/.hidden.jpg": photo,
        "Kiwi/@eaDir/1.jpg": photo,
        "__MACOSX/Kiwi/1.jpg": photo,
        "Kiwi/THUMBS.DB": b"",
        os.fsdecode(b"P\xeache/1.jpg"): photo,
        os.fsdecode(b"P\xeache/notes.txt"): b"text",
        os.fsdecode(b"P\xeache/.hidden"): b"",
    }
    members = {"Kiwi/1.jpg": photo, "Kiwi/2.jpg": photo, "Kiwi/cut.jpg": photo[:200], "../1.jpg": photo, "Kiwi/a.zip": b"PK"}
    members |= {"Pear/1.jpg": photo, "Kiwi/.hidden.jpg": photo, "Kiwi/left out/1.jpg": photo, "Kiwi/notes.txt": b"text"}
    packed = bytearray(archive_of("zip", members).replace(b"Kiwi/2", b"Kiwi/1"))
    packed[packed.rindex(b"Pear/1") - 46 + 8] |= 1  # it has a password
    contents |= {
        "packed.zip": bytes(packed),
        "Lemon.tar": archive_of("tar", {"1.jpg": photo}),
        "cut.zip": bytes(packed[:-30]),
    }
    contents |= {"left out/x.zip": bytes(packed)}
    bomb = bytearray(archive_of("zip", {"Kiwi/1.jpg": photo}))
    at = bomb.index(b"PK\1\2") + 24
    bomb[at : at + 4] = b"\0\0\0\x60"  # bytes, unpacked: 1.5 GiB
    contents |= {"bomb.zip": bytes(bomb)}
    for path, content in contents.items():
        write(folder / path, content)
    (folder / "Kiwi/link.jpg").symlink_to("1.jpg")
    (folder / "Kiwi/lost.jpg").symlink_to("nowhere.jpg")
    return folder


def test_each_file_is_what_ingest_says_it_is(spark: SparkSession, odd: Path, tmp_path: Path) -> None:
    flags = parameters.flags(PARAMS["ingest"] | ODD)
    ingest.main([str(odd), str(tmp_path / "ingested"), *flags])
    images, quarantine, ignored = (
        pq.read_table(tmp_path / "ingested" / name).to_pylist() for name in ("images", "quarantine", "ignored")
    )
    wanted = {row["path"]: (row["label"], row["image_id"], row["width"], row["height"]) for row in images}
    wanted |= {row["path"]: (row["reason"], row["detail"], row["length"]) for row in quarantine}
    wanted |= {row["path"]: (row["reason"], row["kind"], row["length"]) for row in ignored}
    seen = {
        file.path: (file.reason, file.detail, file.size)
        if file.reason
        else (file.label, file.image_id, file.width, file.height)
        for file in delivery.look(odd, ingest.parse_args(["", "", *flags]))
    }
    assert seen == wanted
    n_packed = 8 + 1  # in packed.zip, of which two have one name, and in Lemon.tar
    assert len(seen) == sum(len(names) for _, _, names in os.walk(odd)) - 2 + n_packed
    assert {row["reason"] for row in quarantine} == {*ingest.REASONS}
    assert wanted["Lemon.tar/1.jpg"][0] == "Lemon"
    assert {row["reason"] for row in ignored} == {*ingest.PASSED_OVER} - {"not_in_share"}


def test_all_formats_are_named(repository: Path, odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delivery.main(["--look", str(odd)])
    said = capsys.readouterr().out
    (formats,) = [line.split(";")[0].split()[1:] for line in said.splitlines() if line.startswith("  formats")]
    assert sorted(formats[::2]) == sorted(ingest.FORMATS)


def test_a_delivery_is_taken_in_whatever_share_a_run_takes(repository: Path, brought: Path) -> None:
    change("share: 1", "share: 0.001")
    delivery.main([str(brought)])
    assert len(content_of(repository / "data/mine")) == len(PHOTOGRAPHS)


def test_what_is_left_out_stays_where_it_is(repository: Path, brought: Path) -> None:
    change("leave_out: []", "leave_out: [Apple/*]")
    delivery.main([str(brought)])
    assert {*content_of(repository / "data/mine")} == {"deep/Plum/31_100.jpg"}


def test_two_folders_can_make_the_label(repository: Path, brought: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change("label_depth: 1", "label_depth: 2")
    delivery.main(["--look", str(brought)])
    assert "labels    Apple 2, deep/Plum 1\n" in capsys.readouterr().out


def test_what_ingest_will_say_of_labels_is_said_of_collection_and_delivery_together(
    repository: Path, brought: Path, image_bytes: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    change("min_images_per_label: 1", "min_images_per_label: 2")
    write(repository / "data/mine/apple/1.jpg", image_bytes(seed=9))
    write(repository / "data/mine/Plum/1.jpg", image_bytes(seed=8))
    delivery.main(["--look", str(brought)])
    said = capsys.readouterr().out
    assert (
        "together  warning: labels that differ by capitals or blanks only: 'Apple' (2 images), 'apple' (1 images)\n" in said
    )
    assert "together  note: 1 of 3 labels lie below several folders, such as 'Plum' (. 1, deep 1). " in said
    assert "together  1 labels have less than 2 images: apple 1; `ingest` would end there\n" in said


def test_a_look_takes_nothing_in(repository: Path, brought: Path) -> None:
    before = content_of(brought)
    delivery.main(["--look", str(brought)])
    assert (content_of(brought), (repository / "data").exists()) == (before, False)


def test_photographs_are_taken_in_byte_for_byte_and_nothing_else_is(repository: Path, brought: Path) -> None:
    before = content_of(brought)
    delivery.main([str(brought)])
    assert content_of(repository / "data/mine") == {path: before[path] for path in PHOTOGRAPHS}
    assert content_of(brought) == before
    assert [path.name for path in (repository / "data").iterdir() if path.name.endswith("partial")] == []


def test_dvc_tracks_what_was_taken_in(repository: Path, brought: Path) -> None:
    delivery.main([str(brought)])
    with Repo() as repo:
        assert repo.data_status(untracked_files="no")["uncommitted"] == {}
    assert yaml.safe_load((repository / "data/mine.dvc").read_text())["outs"][0]["nfiles"] == len(PHOTOGRAPHS)


def test_it_ends_with_the_next_commands(repository: Path, brought: Path, capfd: pytest.CaptureFixture[str]) -> None:
    delivery.main([str(brought)])
    assert "Next:  git add data/mine.dvc && git commit" in (said := capfd.readouterr().out)
    assert "dvc exp run -S images=data/mine" in said


def test_by_default_a_delivery_goes_where_the_pipeline_reads(repository: Path, brought: Path) -> None:
    change("images: data/sample", "images: data/all of them")
    delivery.main([str(brought)])
    assert len(content_of(repository / "data/all of them")) == len(PHOTOGRAPHS)


def test_another_file_of_the_same_name_is_never_written_over(
    repository: Path, brought: Path, image_bytes: Callable[..., bytes]
) -> None:
    for content in (b"of another size", bytes((brought / "Apple/1.jpg").stat().st_size)):
        write(repository / "data/mine/Apple/1.jpg", content)
        before = content_of(repository)
        with pytest.raises(
            SystemExit, match=r"^Nothing is taken in: Apple/1\.jpg is in data/mine already, with other content"
        ):
            delivery.main([str(brought)])
        assert content_of(repository) == before


def test_what_is_there_already_is_said_and_not_copied_again(
    repository: Path, brought: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delivery.main([str(brought)])
    written = os.stat("data/mine/Apple/1.jpg").st_mtime_ns
    shutil.copy(brought / "Apple/1.jpg", brought / "Apple/again.jpg")
    shutil.copy(brought / "Apple/2.png", brought / "Plum/2.png")
    delivery.main([str(brought)])
    said = capsys.readouterr().out
    assert "known     3 are in data/mine already\n" in said
    assert "known     2 are in data/mine under another name\n" in said
    assert (
        "known     1 are in data/mine under another label: one of the two is wrong\n            Plum/2.png = Apple/2.png"
        in said
    )
    assert "2 photographs are in data/mine now" in said
    assert os.stat("data/mine/Apple/1.jpg").st_mtime_ns == written


def test_labels_that_the_collection_does_not_have_are_said(
    repository: Path, brought: Path, image_bytes: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    delivery.main([str(brought)])
    write(brought / "Kiwi/1.jpg", image_bytes(seed=9))
    delivery.main([str(brought)])
    assert "new       labels that data/mine does not have: Kiwi\n" in capsys.readouterr().out


def test_a_copy_that_fails_half_way_leaves_nothing(repository: Path, brought: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []

    def copy_two(source: Path, target: Path) -> None:
        if len(copies) == 2:
            raise OSError(28, "No space left on device")
        copies.append(target.write_bytes(source.read_bytes()))

    monkeypatch.setattr(delivery.shutil, "copyfile", copy_two)
    with pytest.raises(OSError, match="No space left"):
        delivery.main([str(brought)])
    assert content_of(repository / "data") == {}


@pytest.mark.parametrize("name", ["up", "Apple/3.jpg"])
def test_a_link_to_a_folder_is_refused_by_name(name: str, repository: Path, brought: Path) -> None:
    (brought / name).symlink_to("..")
    with pytest.raises(SystemExit, match=rf"1 links to folders are below .*brought, such as {name}\. "):
        delivery.main([str(brought)])


def test_photographs_without_a_label_are_refused_by_name(
    repository: Path, brought: Path, image_bytes: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    write(brought / "bare.jpg", image_bytes(seed=5))
    delivery.main(["--look", str(brought)])
    assert "refused   1 no_label:\n            bare.jpg: in no folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "into", "said"),
    [
        ("../nowhere", "data/mine", "is no folder. Say which one"),
        ("../brought/Apple", "data/mine", "has no folders for the labels"),
        ("../brought", "data/sample", "belongs to the pipeline"),
        ("../brought", "../brought/Apple", "lie one in the other"),
    ],
)
def test_a_place_that_cannot_be_is_refused(folder: str, into: str, said: str, repository: Path, brought: Path) -> None:
    before = content_of(repository)
    with pytest.raises(SystemExit, match=said):
        delivery.main([folder, "--into", into])
    assert content_of(repository) == before


def test_an_old_commit_still_checks_out_its_own_picture(
    repository: Path, brought: Path, image_bytes: Callable[..., bytes]
) -> None:
    # Whoever writes over a file of the workspace must not write into DVC's cache.
    delivery.main([str(brought)])
    before = content_of(repository / "data/mine")
    dvc_file = (repository / "data/mine.dvc").read_text()
    for command in (
        "rm -r data/mine",
        "dvc checkout --quiet data/mine.dvc",
        "cp ../brought/Apple/2.png data/mine/Apple/1.jpg",
        "dvc add --quiet data/mine",
    ):
        subprocess.run(command.split(), check=True)
    (repository / "data/mine.dvc").write_text(dvc_file)
    subprocess.run(["dvc", "checkout", "--quiet", "data/mine.dvc"], check=True)
    assert content_of(repository / "data/mine") == before


@pytest.mark.parametrize("name", ["data/mine", "data/my photos", "R&D", "fruits (1)", "l'été", "a,b=c", "x:[y]"])
def test_the_command_of_the_experiment_gives_dvc_the_name_of_the_folder(name: str, repository: Path) -> None:
    from dvc.utils.hydra import apply_overrides

    command = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {delivery.experiment(Path(name)).removeprefix('dvc exp run -S ')}"],
        capture_output=True,
        text=True,
        check=True,
    )
    apply_overrides(repository / "params.yaml", [command.stdout.rstrip("\n")])
    assert yaml.safe_load((repository / "params.yaml").read_text())["images"] == name


# Archives


@pytest.fixture
def zipped(brought: Path) -> Path:
    """The same delivery, with all of it in an archive."""
    contents = {str(path.relative_to(brought)): path.read_bytes() for path in sorted(brought.rglob("*")) if path.is_file()}
    shutil.rmtree(brought)
    write(brought / "archive.zip", archive_of("zip", contents))
    return brought


def test_what_is_in_an_archive_is_said_as_of_a_folder(
    repository: Path, zipped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    delivery.main(["--look", str(zipped)])
    said = capsys.readouterr().out
    assert "brought: 3 photographs of 2 labels, " in said
    assert "labels    Apple 2, Plum 1" in said
    assert "refused   1 truncated:\n            archive.zip/Plum/cut.jpg: " in said
    assert "ignored   2 files: hidden 1, txt 1" in said


def test_an_archive_is_taken_in_whole(repository: Path, zipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content_of(zipped)
    delivery.main([str(zipped)])
    assert content_of(repository / "data/mine") == before
    assert "3 photographs are in data/mine now" in capsys.readouterr().out


def test_an_archive_without_a_photograph_stays_where_it_is(repository: Path, brought: Path) -> None:
    write(brought / "notes.zip", archive_of("zip", {"Plum/notes.txt": b"text"}))
    write(brought / "cut.zip", archive_of("zip", {"Plum/notes.txt": b"text"})[:-9])
    delivery.main([str(brought)])
    assert {*content_of(repository / "data/mine")} == {*PHOTOGRAPHS}


def test_what_the_collection_has_in_an_archive_is_known(
    repository: Path, zipped: Path, image_bytes: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    delivery.main([str(zipped)])
    write(zipped / "Pear/again.jpg", image_bytes(seed=1))
    capsys.readouterr()
    delivery.main(["--look", str(zipped)])
    said = capsys.readouterr().out
    assert "known     3 are in data/mine already\n" in said
    assert "under another label: one of the two is wrong\n            Pear/again.jpg = archive.zip/Apple/1.jpg" in said
    assert "new       labels that data/mine does not have: Pear\n" in said


def test_an_archive_of_the_same_name_is_never_written_over(repository: Path, zipped: Path) -> None:
    delivery.main([str(zipped)])
    before = content_of(repository)
    content = bytearray((zipped / "archive.zip").read_bytes())
    content[content.rindex(b"PK\1\2") + 38] ^= 1  # the rights of its last file
    write(zipped / "archive.zip", bytes(content))
    with pytest.raises(SystemExit, match=r"^Nothing is taken in: archive\.zip is in data/mine already, with other content"):
        delivery.main([str(zipped)])
    assert content_of(repository) == before
