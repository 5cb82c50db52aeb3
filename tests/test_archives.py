"""Facts about archives in stages/ingest.py and reports/pack.py; zipfile, tarfile, zip, tar and zstd are the oracles."""

import hashlib
import importlib
import io
import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zipimport
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from reports import pack
from stages import ingest
from tests import webhdfs
from tests.test_files import Output, Run, fill, run  # noqa: F401
from tests.test_ingest import LIMITS

KINDS = ("zip", "tar", "tar.gz", "tgz", "tar.zst")
# A tar that is read like another kind is a slow test, where Spark runs.
SOME_SLOW = [kind if kind in ("zip", "tar.zst") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
SIZES = {name: LIMITS[name] for name in ("max_bytes", "max_pixels", "min_side")}


@pytest.fixture
def photo(image_bytes: Callable[..., bytes]) -> bytes:
    return image_bytes()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def archive_of(kind: str, contents: dict[str, bytes]) -> bytes:
    """An archive, by Python's library."""
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in contents.items():
                packed.writestr(name, content)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in contents.items():
            add(tar, name, content)
    return compress(kind, file.getvalue())


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **changed: Any) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    for key, value in changed.items():
        setattr(header, key, value)
    tar.addfile(header, io.BytesIO(content))


def compress(kind: str, tar: bytes) -> bytes:
    codec = {"tar": None, "tar.zst": "zstd"}.get(kind, "gzip")
    return tar if codec is None else pa.compress(tar, codec, asbytes=True)


class Seen(NamedTuple):
    """What becomes of the files of an archive."""

    images: dict[str, str]  # label by path; an image_id is tested elsewhere
    refused: dict[str, tuple[str, str]]  # reason and detail by path
    n_files: int


def look(content: bytes, name: str = "a.zip") -> Seen:
    """Read an archive as a task does, without Spark."""
    images, refused, n = {}, {}, 0
    try:
        for file in ingest.files_in(None, os.fsencode(name), len(content), content):
            n += 1
            path = ingest.show(file.path)
            try:
                ingest.open_file(file, **SIZES)
                images[path] = ingest.label_of(file.labelled, 1) or ""
            except ingest.Refused as error:
                refused[path + " again" * (path in images or path in refused)] = (error.reason, error.detail)
    except ingest.Refused as error:
        refused[name] = (error.reason, error.detail)
    assert {reason for reason, _ in refused.values()} <= {*ingest.REASONS, *ingest.PASSED_OVER}
    return Seen(images, refused, n)


# An archive is the folder of its name


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_photographs_have_the_same_labels_and_ids_in_an_archive(
    kind: str,
    run: Run,  # noqa: F811
    photos: Path,
    image_bytes: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    contents = {f"{label}/{i}.jpg": image_bytes(seed=i) for i, label in enumerate(("Apple", "Pêche", "deep/Fig"))}
    contents |= {"Apple/cut.jpg": image_bytes()[:300], "Apple/.hidden.jpg": b"", "Apple/a.txt": b"text", "Apple/0.jpg": b""}
    for path, content in contents.items():
        fill(photos, content, path)
    folder = run()
    ids = ids_of(tmp_path)
    shutil.rmtree(photos)
    fill(photos, archive_of(kind, contents), f"2026-11-22.{kind}")
    archive = run()
    assert archive.images == {f"2026-11-22.{kind}/{path}": label for path, label in folder.images.items()}
    assert archive.quarantine == {f"2026-11-22.{kind}/{path}": reason for path, reason in folder.quarantine.items()}
    assert archive.ignored == {f"2026-11-22.{kind}/{path}": why for path, why in folder.ignored.items()}
    assert ids_of(tmp_path) == ids


def ids_of(folder: Path) -> list[tuple[str, str, bytes]]:
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "ingested/images").to_pylist()
    return [(row["image_id"], row["label"], row["content"]) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_photograph_at_the_top_has_the_name_of_the_archive_for_its_label(kind: str, photo: bytes) -> None:
    name = f"deep/Lemon.{kind.upper()}"
    assert look(archive_of(kind, {"1.jpg": photo}), name).images == {f"{name}/1.jpg": "Lemon"}


def test_a_folder_that_is_named_as_an_archive_is_a_folder(run: Run, photos: Path, photo: bytes) -> None:  # noqa: F811
    fill(photos, photo, "Lemon.zip/1.jpg")
    assert run().images == {"Lemon.zip/1.jpg": "Lemon.zip"}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.zst"])
def test_the_content_tells_the_kind_of_an_archive_whatever_its_ending(kind: str, photo: bytes) -> None:
    for name in ("a.zip", "a.tar", "a.tgz", "a.tar.zst"):
        assert look(archive_of(kind, {"Kiwi/1.jpg": photo}), name).images == {f"{name}/Kiwi/1.jpg": "Kiwi"}


def test_an_image_that_is_named_as_an_archive_is_an_image(photo: bytes) -> None:
    assert look(photo, "Kiwi/1.zip").images == {"Kiwi/1.zip": "Kiwi"}


@pytest.mark.parametrize("name", ["Kiwi/letter.docx", "Kiwi/photos.jpg.bak"])
def test_a_document_that_is_a_zip_by_content_is_no_folder(name: str, photo: bytes) -> None:
    docx = archive_of("zip", {"word/media/1.jpg": photo})
    assert look(docx, name).refused == {name: ("no_image", "ZIP archive")}


def test_all_of_a_tar_that_tar_itself_writes_is_read(tmp_path: Path, photo: bytes) -> None:
    long = "a folder of a long name " * 9
    fill(tmp_path / "in", photo, "Kiwi/1.jpg", f"{long}/Fig/1.jpg", "Pêche/1.jpg")
    for form in ("gnu", "pax", "ustar", "v7"):
        names = ["Kiwi", "Pêche"] if form in ("ustar", "v7") else ["."]
        subprocess.run(["tar", "-H", form, "-cf", "../a.tar", *names], cwd=tmp_path / "in", check=True)
        seen = look((tmp_path / "a.tar").read_bytes(), "a.tar")
        wanted = {"a.tar/Kiwi/1.jpg": "Kiwi", "a.tar/Pêche/1.jpg": "Pêche"}
        wanted |= {f"a.tar/{long}/Fig/1.jpg": "Fig"} if names == ["."] else {}
        assert seen == Seen(wanted, {}, len(wanted))


def test_a_zip_of_zip64_is_read(photo: bytes) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for i in range(70_000):
            packed.writestr(f"a/{i}", b"")
        with packed.open(zipfile.ZipInfo("Kiwi/1.jpg"), "w", force_zip64=True) as member:
            member.write(photo)
    content = file.getvalue()
    assert b"PK\6\7" in content
    names = [file.path for file in ingest.files_in(None, b"a.zip", len(content), content)]
    assert (len(names), names[-1]) == (70_001, b"a.zip/Kiwi/1.jpg")


def test_numbers_of_more_than_32_bits_are_those_of_the_extra_field() -> None:
    extra = struct.pack("<HHI", 9, 4, 0) + struct.pack("<HHQQ", 1, 16, 5 * 2**32, 7 * 2**32)
    assert [*ingest.long_numbers(extra, 0xFFFFFFFF, 12, 0xFFFFFFFF)] == [5 * 2**32, 12, 7 * 2**32]


# Names


def zip_of(name: bytes, is_utf8: bool, content: bytes) -> bytes:
    """A ZIP archive of one file whose name is these bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("x" * len(name), content)
    zipped = bytearray(file.getvalue().replace(b"x" * len(name), name))
    for at, sign in ((6, b"PK\3\4"), (8, b"PK\1\2")):
        zipped[zipped.index(sign) + at + 1] |= 8 * is_utf8
    return bytes(zipped)


@pytest.mark.parametrize(
    ("name", "is_utf8", "label"),
    [
        ("Pêche/1.jpg".encode(), True, "Pêche"),
        ("Pêche/1.jpg".encode(), False, "Pêche"),  # macOS
        ("Pêche/1.jpg".encode("cp437"), False, "Pêche"),
        (b"Red Apple\\1.jpg", False, "Red Apple"),
        (b"./Kiwi//./1.jpg", False, "Kiwi"),
    ],
    ids=["said", "not_said", "code_page_437", "backslash", "dots"],
)
def test_a_name_in_a_zip_is_read_as_it_was_meant(name: bytes, is_utf8: bool, label: str, photo: bytes) -> None:
    assert look(zip_of(name, is_utf8, photo)).images == {f"a.zip/{label}/1.jpg": label}


def test_a_name_that_is_not_in_utf_8_is_refused_by_its_bytes(photo: bytes) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="latin1") as tar:
        add(tar, "Pêche/1.jpg", photo)
    for content, name in ((file.getvalue(), "a.tar"), (zip_of("Pêche/1.jpg".encode("latin1"), True, photo), "a.zip")):
        assert look(content, name).refused[f"{name}/P\\xeache/1.jpg"][0] == "unreadable"


@pytest.mark.parametrize("name", ["/etc/1.jpg", "../1.jpg", "Kiwi/../../1.jpg", "C:/Kiwi/1.jpg", "C:\\Kiwi\\1.jpg", "./."])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_leads_out_of_the_archive_is_refused(kind: str, name: str, photo: bytes) -> None:
    if kind == "tar" and "\\" in name:
        pytest.skip("a backslash is a letter there")
    ((path, (reason, _)),) = look(archive_of(kind, {name: photo}), f"a.{kind}").refused.items()
    assert (path.startswith(f"a.{kind}/"), reason) == (True, "unsafe_name")


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_files_of_one_name_the_first_counts(kind: str, photo: bytes) -> None:
    if kind == "zip":
        content = archive_of("zip", {"Kiwi/1.jpg": photo, "Kiwi/2.jpg": b"text"}).replace(b"Kiwi/2", b"Kiwi/1")
    else:
        content = archive_of(kind, {"Kiwi/1.jpg": photo, "./Kiwi/1.jpg": b"text"})
    seen = look(content, f"a.{kind}")
    assert seen.images == {f"a.{kind}/Kiwi/1.jpg": "Kiwi"}
    assert seen.refused[f"a.{kind}/Kiwi/1.jpg again"][0] == "duplicate_name"


def test_what_macos_adds_and_what_is_hidden_is_ignored(run: Run, photos: Path, photo: bytes) -> None:  # noqa: F811
    names = ("__MACOSX/Kiwi/._1.jpg", "Kiwi/.DS_Store", "Kiwi/1.jpg", "Kiwi/Thumbs.db")
    fill(photos, archive_of("zip", dict.fromkeys(names, photo)), "a.zip", ".trash/b.zip")
    output = run()
    assert output.images == {"a.zip/Kiwi/1.jpg": "Kiwi"}
    assert {path: reason for path, (reason, _) in output.ignored.items()} == dict.fromkeys(
        [*(f"a.zip/{name}" for name in names if name != "Kiwi/1.jpg"), ".trash/b.zip"], "hidden"
    )


def test_patterns_and_share_choose_among_the_files_of_an_archive(run: Run, photos: Path, photo: bytes) -> None:  # noqa: F811
    fill(photos, archive_of("tar", {f"{label}/{i}.jpg": photo for label in ("Fig", "Kiwi") for i in range(20)}), "a.tar")
    fill(photos, archive_of("zip", {"Fig/1.jpg": photo}), "b.zip")
    output = run(take=["a.tar/Kiwi/*"], leave_out=["b.*"], share=0.5)
    chosen = [
        path
        for path in (f"a.tar/Kiwi/{i}.jpg" for i in range(20))
        if int.from_bytes(hashlib.sha256(path.encode()).digest()) < 2**255
    ]
    assert sorted(output.images) == sorted(chosen)
    assert output.ignored["b.zip"] == ("left_out", "b.*")
    assert output.n_files() == 41


# What cannot be read is a row of the quarantine


def tar_with(*headers: tuple[str, bytes, dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content, changed in headers:
            add(tar, name, content, **changed)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "no regular"),
        (tarfile.FIFOTYPE, "no regular"),
    ],
    ids=["symbolic_link", "hard_link", "device", "pipe"],
)
def test_what_is_no_file_in_a_tar_is_refused(kind: bytes, told: str, photo: bytes) -> None:
    linkname = "Kiwi/1.jpg" if "link" in told else ""
    content = tar_with(("Kiwi/1.jpg", photo, {}), ("Kiwi/2.jpg", b"", {"type": kind, "linkname": linkname}))
    seen = look(content, "a.tar")
    assert seen.images == {"a.tar/Kiwi/1.jpg": "Kiwi"}
    assert seen.refused["a.tar/Kiwi/2.jpg"][0] == "unreadable"
    assert told in seen.refused["a.tar/Kiwi/2.jpg"][1]


def test_a_link_in_a_zip_is_refused() -> None:
    file, link = io.BytesIO(), zipfile.ZipInfo("Kiwi/1.jpg")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr(link, "/etc/passwd")
    assert look(file.getvalue()).refused["a.zip/Kiwi/1.jpg"] == ("unreadable", "a link: pack the file itself")


def test_a_sparse_file_in_a_tar_is_read_with_its_holes(tmp_path: Path, photo: bytes) -> None:
    (tmp_path / "Kiwi").mkdir()
    with (tmp_path / "Kiwi/1.jpg").open("wb") as file:
        file.write(photo)
        file.truncate(2**20)
    with (tmp_path / "Kiwi/2.jpg").open("wb") as file:
        file.truncate(2**40)  # read, it would take a terabyte
    subprocess.run(["tar", "-cSf", "a.tar", "Kiwi"], cwd=tmp_path, check=True)
    content = (tmp_path / "a.tar").read_bytes()
    files = ingest.files_in(None, b"a.tar", len(content), content)
    read = {file.path: file.read() for file in files if file.length < 2**30}
    assert read == {b"a.tar/Kiwi/1.jpg": photo.ljust(2**20, b"\0")}
    assert look(content, "a.tar").refused["a.tar/Kiwi/2.jpg"][0] == "too_large"


def test_a_file_with_a_password_is_refused(tmp_path: Path, photo: bytes) -> None:
    zip_ = shutil.which("zip") or pytest.skip("needs zip")
    fill(tmp_path, photo, "Kiwi/1.jpg")
    subprocess.run([zip_, "-qr", "-P", "secret", "a.zip", "Kiwi"], cwd=tmp_path, check=True)
    assert look((tmp_path / "a.zip").read_bytes()).refused["a.zip/Kiwi/1.jpg"][0] == "encrypted"


@pytest.mark.parametrize("size", [10, 50_000], ids=["small", "larger_than_a_photograph_may_be"])
def test_an_archive_in_an_archive_is_refused(size: int, photo: bytes) -> None:
    seen = look(archive_of("zip", {"Kiwi/inner.zip": os.urandom(size), "Kiwi/1.jpg": photo}))
    assert seen.images == {"a.zip/Kiwi/1.jpg": "Kiwi"}
    assert seen.refused["a.zip/Kiwi/inner.zip"][0] == "nested_archive"


def test_a_method_of_zip_that_is_not_read_is_named(photo: bytes) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr("Kiwi/1.jpg", photo)
    reason, detail = look(file.getvalue()).refused["a.zip/Kiwi/1.jpg"]
    assert (reason, "method 14" in detail) == ("unreadable", True)


def test_a_file_larger_than_max_bytes_is_not_unpacked(photo: bytes) -> None:
    content = archive_of("zip", {"Kiwi/1.jpg": bytes(50_000_000), "Kiwi/2.jpg": photo})
    tracemalloc.start()
    seen = look(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen.refused["a.zip/Kiwi/1.jpg"] == ("too_large", f"50,000,000 bytes, more than {LIMITS['max_bytes']:,}")
    assert peak < 10_000_000


def test_a_zip_that_understates_what_is_packed_is_not_unpacked_beyond() -> None:
    true, said = 15_000_000, 10_000  # bytes
    lied = archive_of("zip", {"Kiwi/1.jpg": bytes(true)}).replace(struct.pack("<I", true), struct.pack("<I", said))
    lied = lied.replace(struct.pack("<I", zlib.crc32(bytes(true))), struct.pack("<I", zlib.crc32(bytes(said))))
    tracemalloc.start()
    seen = look(lied)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen.refused["a.zip/Kiwi/1.jpg"][0] == "unreadable"
    assert peak < 2_000_000


def test_a_flipped_bit_that_no_decoder_sees_is_told_by_the_checksum_of_a_zip(image_bytes: Callable[..., bytes]) -> None:
    photo = image_bytes("BMP")  # any bits are pixels
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as stored:
        stored.writestr("Kiwi/1.bmp", photo)
    content = bytearray(file.getvalue())
    content[content.index(photo) + len(photo) - 9] ^= 1
    reason, detail = look(bytes(content)).refused["a.zip/Kiwi/1.bmp"]
    assert (reason, "checksum" in detail) == ("unreadable", True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_is_refused_when_it_grows_beyond_what_photographs_can(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "HARMLESS", 2**20)
    content = archive_of(kind, {f"Kiwi/{i}.jpg": bytes(2**20) for i in range(60)})
    if kind == "tar":
        assert ("a.tar" in look(content, "a.tar").refused) is False  # it is as large as what is in it
        return
    seen = look(content, f"a.{kind}")
    assert seen.refused[f"a.{kind}"][0] == "archive_bomb"
    assert 0 < seen.n_files < 60


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_is_cut_short_anywhere_is_refused(kind: str, image_bytes: Callable[..., bytes]) -> None:
    content = archive_of(kind, {f"Kiwi/{i}.jpg": image_bytes(seed=i) for i in range(9)})
    end = len(content.rstrip(b"\0")) + 512 if kind == "tar" else len(content)
    for length in [*range(1, end, end // 23), end - 512, end - 1]:
        seen = look(content[:length], f"a.{kind}")
        assert seen.refused[f"a.{kind}"][0] == "bad_archive", length
        assert len(seen.images) < 9 or kind != "zip"


def test_of_an_archive_that_is_cut_short_what_came_before_is_kept(image_bytes: Callable[..., bytes]) -> None:
    content = archive_of("tar", {f"Kiwi/{i}.jpg": image_bytes(seed=i) for i in range(9)})
    seen = look(content[: len(content) // 2 // 512 * 512 + 700], "a.tar")
    assert 2 <= len(seen.images) < 9
    assert "a.tar" in seen.refused


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_damage_nothing_but_a_refusal_is_raised(kind: str, image_bytes: Callable[..., bytes]) -> None:
    import numpy as np

    content, random = archive_of(kind, {f"Kiwi/{i}.jpg": image_bytes(seed=i) for i in range(4)}), np.random.default_rng(0)
    n_all = 0
    for _ in range(300):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[random.integers(0, len(content), 5)] = random.integers(0, 256, 5)
        seen = look(damaged.tobytes(), f"a.{kind}")
        n_all += len(seen.images) == 4
        # A file is missing only where the archive itself is refused.
        assert seen.n_files == 4 or f"a.{kind}" in seen.refused
    assert n_all < 300


def test_a_damaged_header_in_the_middle_of_a_tar_is_not_its_end(image_bytes: Callable[..., bytes]) -> None:
    content = bytearray(archive_of("tar", {f"Kiwi/{i}.jpg": image_bytes(seed=i) for i in range(4)}))
    content[content.index(b"Kiwi/2")] ^= 1
    seen = look(bytes(content), "a.tar")
    assert (len(seen.images), seen.refused["a.tar"][0]) == (2, "bad_archive")


def test_two_tars_in_one_file_are_not_read_as_the_first(photo: bytes) -> None:
    one = archive_of("tar", {"Kiwi/1.jpg": photo})
    seen = look(one + one, "a.tar")
    assert (len(seen.images), seen.refused["a.tar"][0]) == (1, "bad_archive")


def test_a_header_of_a_tar_that_is_too_large_is_not_read() -> None:
    content = tar_with(("x", b"17 comment=abcde\n", {"type": b"x"}), ("Kiwi/1.jpg", b"", {}))
    header = tarfile.TarInfo.frombuf(content[:512], "utf-8", "strict")
    header.size = 2**33
    seen = look(header.tobuf(tarfile.GNU_FORMAT) + content[512:], "a.tar")
    assert seen.refused == {"a.tar": ("bad_archive", "after 0 files: a header of 8,589,934,592 bytes")}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"Rar!\x1a\7\1\0", "an archive"),
        (b"hello", "starts with b'hello'"),
    ],
    ids=["web_page", "rar", "text"],
)
def test_what_is_named_as_an_archive_and_is_none_is_refused(content: bytes, told: str) -> None:
    reason, detail = look(content).refused["a.zip"]
    assert (reason, told in detail) == ("bad_archive", True)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_without_a_file_is_empty(kind: str, run: Run, photos: Path, photo: bytes) -> None:  # noqa: F811
    fill(photos, photo, "Kiwi/1.jpg")
    fill(photos, archive_of(kind, {}), f"a.{kind}")
    fill(photos, b"", f"b.{kind}")
    assert run().quarantine == {f"a.{kind}": "empty", f"b.{kind}": "empty"}


def test_no_share_of_refused_files_allows_an_archive_that_cannot_be_read(
    run: Run,  # noqa: F811
    photos: Path,
    photo: bytes,
) -> None:
    fill(photos, photo, *(f"Kiwi/{i}.jpg" for i in range(9)))
    fill(photos, archive_of("zip", {"Kiwi/1.jpg": photo})[:-9], "a.zip")
    assert run(max_quarantined=1).quarantine == {"a.zip": "bad_archive"}
    with pytest.raises(SystemExit, match=r"1 archives cannot be read to their ends\. Nobody knows how many files they have"):
        run(max_quarantined=0.5)


def test_an_archive_that_the_file_system_cannot_read_is_an_error_with_its_name(photo: bytes) -> None:
    content = archive_of("tar.gz", {"Kiwi/1.jpg": photo})

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 512:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(OSError, match=r"^a\.tar\.gz cannot be read: Input/output error"):
        list(ingest.members_of(Failing(content * 9), b"a.tar.gz", len(content), ingest.WHOLE))


def test_an_archive_that_changes_after_it_was_listed_is_an_error_with_both_lengths(tmp_path: Path, photo: bytes) -> None:
    content = archive_of("zip", {"Kiwi/1.jpg": photo})
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(OSError, match=rf"^a\.zip: {len(content):,} of {len(content) + 1:,} bytes were read"):
        list(ingest.files_in(os.fsencode(tmp_path), b"a.zip", len(content) + 1, None))


# Several tasks


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_an_archive_are_the_whole(
    kind: str, tmp_path: Path, image_bytes: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "TASK_BYTES", 3 * ingest.OPEN_BYTES)
    contents = {f"Kiwi/{i}{'long' * 40 * (i % 3)}.jpg": image_bytes(seed=i) for i in range(20)} | {"./Kiwi/0.jpg": b"twin"}
    content = archive_of(kind, contents)
    (tmp_path / "a").write_bytes(content)
    name = f"a.{kind}"
    (tmp_path / name).write_bytes(content)
    parts = ingest.cut(str(tmp_path), name.encode(), len(content))
    assert (len(parts) > 5) == (kind in ("zip", "tar"))
    files = [
        file._replace(read=bytes, refused=None) if file.refused else file._replace(read=bytes)
        for part in parts
        for file in ingest.files_in(os.fsencode(tmp_path), name.encode(), len(content), None, part)
    ]
    whole = [file._replace(read=bytes, refused=None) for file in ingest.files_in(None, name.encode(), len(content), content)]
    assert files == whole
    twins = [
        file.refused.reason
        for part in parts
        for file in ingest.files_in(os.fsencode(tmp_path), name.encode(), len(content), None, part)
        if file.refused
    ]
    assert twins == ["duplicate_name"]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.zst"])
def test_a_large_archive_is_read_by_several_tasks_once(
    kind: str,
    run: Run,  # noqa: F811
    photos: Path,
    image_bytes: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingest, "TASK_BYTES", 8 * ingest.OPEN_BYTES)
    monkeypatch.setattr(ingest, "SMALL_ARCHIVE", 1)
    names = [f"Kiwi/{i}.jpg" for i in range(30)]
    fill(photos, archive_of(kind, {name: image_bytes(seed=i) for i, name in enumerate(names)}), f"a.{kind}")
    assert sorted(run().images) == sorted(f"a.{kind}/{name}" for name in names)


def test_a_damaged_archive_is_one_task(tmp_path: Path, photo: bytes) -> None:
    content = archive_of("tar", {f"Kiwi/{i}.jpg": photo for i in range(2000)})[: -(2**15)]
    (tmp_path / "a.tar").write_bytes(content)
    assert ingest.cut(str(tmp_path), b"a.tar", len(content)) == [ingest.WHOLE]


def test_the_driver_keeps_names_of_one_task() -> None:
    n = 100_000
    files = ((f"Some label/Some name of a photograph {i:07}.jpg", 5000) for i in range(n))
    tracemalloc.start()
    listed = (listed for listed, _ in ingest.share_out("/", files, ingest.reader_of_names([], [], 1)))
    assert sum(names.count(b"\0") for names in listed) == 2 * n
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19


def test_before_a_task_python_reads_no_zip_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as modules:
        modules.writestr("only_in_this_zip.py", "")
    monkeypatch.syspath_prepend(tmp_path / "a.zip")
    importlib.import_module("only_in_this_zip")
    assert str(tmp_path / "a.zip") in sys.path_importer_cache
    ingest.forget_zips()
    assert not any(isinstance(finder, zipimport.zipimporter) for finder in sys.path_importer_cache.values())


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_to_cut_an_archive_takes_some_bytes_for_each_file(kind: str, tmp_path: Path) -> None:
    n = 10_000
    content = archive_of(kind, {f"Kiwi/{i}.jpg": b"" for i in range(n)})
    (tmp_path / f"a.{kind}").write_bytes(content)
    tracemalloc.start()
    ingest.cut(str(tmp_path), f"a.{kind}".encode(), len(content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / n < 500


# Elsewhere


@pytest.mark.parametrize("kind", SOME_SLOW)
def test_elsewhere_an_archive_is_read_as_here(
    kind: str,
    run: Run,  # noqa: F811
    photos: Path,
    image_bytes: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    names = [f"Kiwi/{i}.jpg" for i in range(20)]
    contents = {name: image_bytes(seed=i, size=(200, 300)) for i, name in enumerate(names)}
    fill(photos, archive_of(kind, contents), f"a.{kind}")  # larger than a photograph may be
    fill(photos, archive_of("zip", {"Fig/1.jpg": image_bytes(), "a/x.txt": b"text"})[:-3], "b.zip")
    fill(photos, archive_of("tar", {}), "c.tar")
    fill(photos, image_bytes(), "Fig/1.jpg", ".hidden/1.jpg")
    fill(photos, b"", "d.zip")
    here = run(max_file_mb=1)
    with webhdfs.serve(tmp_path) as server:
        there = run(f"{server.url}/photos", max_file_mb=1)
    assert there[:3] == here[:3]
    assert len(here.images) == 21
    assert set(here.quarantine.values()) == {"bad_archive", "empty"}


def test_elsewhere_an_archive_that_spark_cannot_move_is_refused_with_both_numbers(
    run: Run,  # noqa: F811
    photos: Path,
    photo: bytes,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    spark: SparkSession,
) -> None:
    monkeypatch.setattr(ingest, "MOVABLE", 1000)
    content = archive_of("zip", {f"Kiwi/{i}.jpg": photo for i in range(9)})
    fill(photos, content, "a.zip")
    fill(photos, photo, "Kiwi/1.jpg")
    with webhdfs.serve(tmp_path) as server:
        listing = ingest.find_files(spark, f"{server.url}/photos", take=[], leave_out=[], share=1)
        rows = ingest.inspect_files(spark, listing, **LIMITS | {"max_bytes": 900}).collect()
    details = {row.path: (row.reason, row.detail) for row in rows}
    assert details["a.zip"] == (
        "too_large",
        f"{len(content):,} bytes; Spark moves an archive of at most 1,000: pack smaller ones",
    )


# make pack


def collection(folder: Path, n: int, size: int = 1000) -> None:
    for i in range(n):
        fill(folder, hashlib.sha256(str(i).encode()).digest() * (size // 32), f"{'ABC'[i % 3]}/{i:04}.jpg")


def packed(folder: Path, into: Path, *flags: str) -> dict[str, str]:
    """Pack, and tell the SHA-256 of each archive."""
    shutil.rmtree(into, ignore_errors=True)
    pack.main([*flags, str(folder), str(into)])
    files = (path for path in into.rglob("*") if path.is_file())
    return {str(path.relative_to(into)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("flags", [[], ["--by_label"]], ids=["by_delivery", "by_label"])
def test_what_is_packed_gives_the_same_images(
    flags: list[str],
    run: Run,  # noqa: F811
    photos: Path,
    image_bytes: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    for i, label in enumerate(("Apple", "Pêche", "deep/Fig", "Apple")):
        fill(photos, image_bytes(seed=i), f"{label}/{i}_100.jpg")
    fill(photos, image_bytes(), "Apple/.hidden.jpg")
    run()
    ids = ids_of(tmp_path)
    pack.main([*flags, str(photos), str(tmp_path / "packed")])
    output = run(str(tmp_path / "packed"))
    assert ids_of(tmp_path) == ids
    assert output.ignored == {}
    assert "note" not in output.text


def test_the_same_files_are_packed_into_the_same_bytes(tmp_path: Path) -> None:
    collection(tmp_path / "one", 50)
    shutil.copytree(tmp_path / "one", tmp_path / "two/one")
    for path in (tmp_path / "two").rglob("*.jpg"):
        os.utime(path, (0, 0))
        path.chmod(0o600)
    assert packed(tmp_path / "one", tmp_path / "a") == packed(tmp_path / "two/one", tmp_path / "b")


def test_what_is_packed_is_read_by_unzip(tmp_path: Path) -> None:
    unzip = shutil.which("unzip") or pytest.skip("needs unzip")
    collection(tmp_path / "one", 50)
    for name in packed(tmp_path / "one", tmp_path / "a"):
        subprocess.run([unzip, "-q", str(tmp_path / "a" / name), "-d", str(tmp_path / "out")], check=True)
    subprocess.run(["diff", "-r", str(tmp_path / "one"), str(tmp_path / "out")], check=True)


@pytest.mark.parametrize("flags", [[], ["--by_label"]], ids=["by_delivery", "by_label"])
def test_a_photograph_more_or_less_changes_few_archives(flags: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "one"
    collection(folder, 600, size=50_000)
    before = packed(folder, tmp_path / "a", "--mb", "1", *flags)
    assert 15 < len(before) < 60
    sizes = [path.stat().st_size for path in (tmp_path / "a").rglob("*.zip")]
    assert max(sizes) < 2.2e6
    fill(folder, b"another", "B/0300.5.jpg")
    (folder / "C/0002.jpg").unlink()
    after = packed(folder, tmp_path / "a", "--mb", "1", *flags)
    assert 1 <= len({*after.items()} - {*before.items()}) <= 4


def test_a_text_beside_the_labels_is_not_packed(tmp_path: Path) -> None:
    collection(tmp_path / "one", 9)
    before = packed(tmp_path / "one", tmp_path / "a")
    fill(tmp_path / "one", b"text", "LICENSE")
    assert packed(tmp_path / "one", tmp_path / "a") == before


def test_archives_of_a_label_are_where_the_label_was(tmp_path: Path) -> None:
    collection(tmp_path / "one/all", 9)
    names = packed(tmp_path / "one", tmp_path / "a", "--by_label")
    assert sorted(name.split(".")[0] for name in names) == ["all/A", "all/B", "all/C"]


def test_archives_that_are_there_are_not_written_over(tmp_path: Path) -> None:
    collection(tmp_path / "one", 9)
    before = packed(tmp_path / "one", tmp_path / "a")
    fill(tmp_path / "one", b"other", "A/0000.jpg")
    with pytest.raises(SystemExit, match=r"^pack: 1 of 1 archives are there already, such as .*one\.part-\w{12}\.zip"):
        pack.main([str(tmp_path / "one"), str(tmp_path / "a")])
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "a").iterdir()] == [*before.values()]


def test_a_pack_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection(tmp_path / "one", 9)
    (tmp_path / "a").mkdir()

    def fail(archive: Path, *_: object) -> None:
        archive.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        pack.main([str(tmp_path / "one"), str(tmp_path / "a")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "one"]
    assert [*(tmp_path / "a").iterdir()] == []


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("1.jpg", "lies in no folder"),
        ("A/a.zip", "is an archive"),
        (os.fsdecode(b"P\xeache/1.jpg"), "rename it"),
        ("A/a\\b.jpg", "rename it"),
    ],
    ids=["no_label", "archive", "latin1", "backslash"],
)
def test_what_cannot_be_packed_is_named(path: str, told: str, tmp_path: Path) -> None:
    collection(tmp_path / "one", 9)
    fill(tmp_path / "one", b"x", path)
    with pytest.raises(SystemExit, match=f"^pack: .*{told}"):
        pack.main([str(tmp_path / "one"), str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("folder", "into"), [("nowhere", "a"), ("one", "one/a"), ("one", "."), ("empty", "a")])
def test_a_place_that_cannot_be_is_refused(folder: str, into: str, tmp_path: Path) -> None:
    collection(tmp_path / "one", 9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"^pack: "):
        pack.main([str(tmp_path / folder), str(tmp_path / into)])
