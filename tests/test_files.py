"""Facts about stages/ingest.py: which files it reads, which it passes over, and what it says of labels."""

import argparse
import hashlib
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from pyspark.errors import PythonException
from pyspark.sql import SparkSession

from bootstrap import parameters
from stages import ingest
from tests.helpers import PARAMS

ALL: dict[str, Any] = {"take": [], "leave_out": [], "share": 1.0}


class Output(NamedTuple):
    """What a run of the stage wrote and printed."""

    images: dict[str, str]  # label by path
    quarantine: dict[str, str]  # reason by path
    ignored: dict[str, tuple[str, str]]  # reason and kind by path
    text: str

    def n_files(self) -> int:
        return len(self.images) + len(self.quarantine) + len(self.ignored)


@pytest.fixture
def photo(image_bytes: Callable[..., bytes]) -> bytes:
    return image_bytes()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return tmp_path / "photos"


@pytest.fixture
def run(spark: SparkSession, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Output]:
    """Run the stage on the folder `photos`, with other parameters than those of params.yaml."""

    def run_ingest(source: str = "", **changed: Any) -> Output:
        shutil.rmtree(tmp_path / "ingested", ignore_errors=True)
        flags = parameters.flags(PARAMS["ingest"] | {"max_quarantined": 100} | changed)
        ingest.main([source or str(photos), str(tmp_path / "ingested"), *flags])
        images, quarantine, ignored = (
            pq.read_table(tmp_path / "ingested" / name).to_pylist() for name in ("images", "quarantine", "ignored")
        )
        return Output(
            {row["path"]: row["label"] for row in images},
            {row["path"]: row["reason"] for row in quarantine},
            {row["path"]: (row["reason"], row["kind"]) for row in ignored},
            capsys.readouterr().out,
        )

    return run_ingest


Run = Callable[..., Output]


def fill(folder: Path, content: bytes, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


# Files in = images + quarantine + ignored

ODD_NAMES = (
    "Kiwi/_MG_0001.JPG",
    "Kiwi/_DSC0001.JPG",
    "Kiwi/1.jfif",
    "Kiwi/2.jpe",
    "Kiwi/3.JFIF",
    "Kiwi/4.jpg_large",
    "Kiwi/5.JPG.1",
    "Kiwi/6",
    "Kiwi/12:30.jpg",
    "Kiwi/new\nline.jpg",
    "Kiwi/wrong.txt",
    "_2024/1.jpg",
)
IGNORED = {
    "Kiwi/.hidden.jpg": ("hidden", "hidden"),
    ".git/objects/1.jpg": ("hidden", "hidden"),
    "Kiwi/Thumbs.db": ("hidden", "system"),
    "__MACOSX/Kiwi/1.jpg": ("hidden", "system"),
    "Kiwi/@eaDir/1.jpg": ("hidden", "system"),
    "Kiwi/letter.PDF": ("no_image", "pdf"),
    "readme": ("no_image", "without extension"),
    "Kiwi/empty.csv": ("no_image", "csv"),
    "Kiwi/long.mp4": ("no_image", "mp4"),
    "Kiwi/long.pdf": ("no_image", "pdf"),
    "Kiwi/1.NEF": ("no_image", "raw photograph of a camera"),
    "Kiwi/raw": ("no_image", "raw photograph of a camera"),
    "Kiwi/scan": ("no_image", "PDF document"),
    "Kiwi/film.dat": ("no_image", "video"),
    "Kiwi/photos.jpg.bak": ("no_image", "ZIP archive"),
}


@pytest.fixture(scope="module")
def odd(spark: SparkSession, image_bytes: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Output:
    """What becomes of names of any kind."""
    photos = tmp_path_factory.mktemp("odd") / "photos"
    fill(photos, image_bytes(), *ODD_NAMES, *IGNORED)
    fill(photos, b"text", "Kiwi/letter.PDF", "readme")
    fill(photos, b"", "Kiwi/empty.csv")
    fill(photos, b"0" * (2**20 + 1), "Kiwi/long.mp4")
    fill(photos, b"%PDF-1.7" + bytes(2**20), "Kiwi/long.pdf")  # which nobody reads to tell
    fill(photos, b"%PDF-1.7", "Kiwi/scan")
    fill(photos, b"\0\0\0 ftypisom", "Kiwi/film.dat")
    fill(photos, b"PK\x03\x04", "Kiwi/photos.jpg.bak")
    fill(photos, b"FUJIFILMCCD-RAW", "Kiwi/raw")
    fill(photos, image_bytes("TIFF"), "Kiwi/1.NEF")  # as the preview in it looks
    fill(photos, b"text", "Kiwi/letter.jpe")
    latin1 = os.fsencode(photos) + b"/P\xeache"
    os.mkdir(latin1)
    with open(latin1 + b"/1.jpg", "wb") as file:
        file.write(image_bytes())
    listing = ingest.find_files(spark, str(photos), **ALL)
    limits: dict[str, Any] = {
        "max_bytes": 2**20,
        "max_pixels": 10_000,
        "min_side": 1,
        "label_depth": 1,
        "group_pattern": "x",
    }
    inspected = ingest.inspect_files(spark, listing, **limits)
    rows = inspected.select("path", "label", "reason").collect()
    return Output(
        {row.path: row.label for row in rows if row.reason is None},
        {row.path: row.reason for row in rows if row.reason not in (None, *ingest.PASSED_OVER)},
        {row.path: (row.reason, row.kind) for row in ingest.ignore(inspected).collect()},
        "",
    )


@pytest.mark.parametrize("path", ODD_NAMES)
def test_what_can_be_decoded_is_an_image_whatever_its_name(path: str, odd: Output) -> None:
    assert odd.images[path] == path.split("/")[0]


@pytest.mark.parametrize(("path", "why"), IGNORED.items(), ids=IGNORED.keys())
def test_other_files_are_ignored_by_kind_which_content_tells_before_the_name(
    path: str, why: tuple[str, str], odd: Output
) -> None:
    assert odd.ignored[path] == why


def test_text_that_is_named_as_an_image_is_refused(odd: Output) -> None:
    assert odd.quarantine["Kiwi/letter.jpe"] == "not_an_image"


def test_a_name_that_is_not_in_utf_8_is_refused_by_its_bytes(odd: Output) -> None:
    assert odd.quarantine["P\\xeache/1.jpg"] == "unreadable"


def test_every_file_is_in_one_of_three_tables(odd: Output) -> None:
    assert odd.n_files() == len(ODD_NAMES) + len(IGNORED) + 2
    assert {reason for reason, _ in odd.ignored.values()} <= {*ingest.PASSED_OVER}


def test_the_last_line_counts_images_and_all_others_by_kind(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, "Kiwi/_MG_1.JPG", "Fig/1", "Fig/2", "Fig/.a", "Fig/.b")
    fill(photos, b"text", "Kiwi/a.txt", "Fig/letter.jpg")
    lines = run().text.splitlines()
    assert lines[-1] == "ingest: 3 images of 2 labels; 1 files quarantined, 3 ignored (2 hidden, 1 txt)"
    assert "ingest: ignored: 1 txt, such as Kiwi/a.txt" in lines
    assert any(line.startswith("ingest: refused: Fig/letter.jpg: not_an_image, ") for line in lines)


# Links


def test_a_link_to_a_folder_is_refused_by_name(spark: SparkSession, photos: Path, photo: bytes) -> None:
    fill(photos, photo, "Kiwi/1.jpg", "Banana/1.jpg")
    (photos / "Banana/up").symlink_to("..")
    with pytest.raises(SystemExit, match=r"1 links to folders are below .*, such as Banana/up\. DVC does not follow them"):
        ingest.find_files(spark, str(photos), **ALL)


def test_a_link_to_a_file_is_that_file_as_for_dvc(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos.parent / "cache", photo, "1a2b")
    (photos / "Kiwi").mkdir(parents=True)
    (photos / "Kiwi/1.jpg").symlink_to(photos.parent / "cache/1a2b")
    assert run().images == {"Kiwi/1.jpg": "Kiwi"}


def test_the_source_may_be_a_link(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, "Kiwi/1.jpg")
    (photos.parent / "link").symlink_to(photos)
    assert run(str(photos.parent / "link")).images == {"Kiwi/1.jpg": "Kiwi"}


def test_a_link_to_nothing_is_unreadable(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, "Kiwi/1.jpg")
    (photos / "Kiwi/2.jpg").symlink_to("nowhere.jpg")
    assert run().quarantine == {"Kiwi/2.jpg": "unreadable"}


@pytest.mark.parametrize("name", ["pipe.jpg", "pipe"])
def test_a_pipe_is_unreadable_and_nobody_waits_for_it(name: str, run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, "Kiwi/1.jpg")
    os.mkfifo(photos / "Kiwi" / name)
    assert run().quarantine == {f"Kiwi/{name}": "unreadable"}


# Another file system, which Hadoop lists and reads


@pytest.fixture
def elsewhere(spark: SparkSession, photos: Path) -> str:
    """The address of the folder `photos` on another file system."""
    hadoop: Any = spark._jsc.hadoopConfiguration()
    hadoop.set("fs.viewfs.mounttable.store.link./photos", photos.as_uri())
    hadoop.set("fs.viewfs.impl.disable.cache", "true")
    return "viewfs://store/photos"


def test_elsewhere_the_same_files_are_read(run: Run, photos: Path, elsewhere: str, photo: bytes) -> None:
    fill(photos, photo, "Kiwi/1.jpg", "Kiwi/2", "a b/c%20d [1]/{3}.jpg", "Kiwi/.hidden.jpg", ".git/1.jpg", "Fig/Thumbs.db")
    fill(photos, b"text", "Kiwi/a.txt")
    fill(photos, b"", "Kiwi/empty.jpg", "Kiwi/empty.txt")
    fill(photos, b"0" * (2**20 + 1), "Kiwi/large.jpg", "Kiwi/large.mp4")
    here, there = run(max_file_mb=1), run(elsewhere, max_file_mb=1)
    assert there[:3] == here[:3]
    assert len(here.images) == 3


def test_elsewhere_only_what_is_taken_is_read(run: Run, photos: Path, elsewhere: str, photo: bytes) -> None:
    fill(photos, photo, *(f"Kiwi [1]/{i}.jpg" for i in range(9)), "Fig/1.jpg")
    here, there = run(share=0.5, leave_out=["Fig/*"]), run(elsewhere, share=0.5, leave_out=["Fig/*"])
    assert there[:3] == here[:3]


def test_elsewhere_names_that_spark_skips_end_the_run(
    spark: SparkSession, photos: Path, elsewhere: str, photo: bytes
) -> None:
    fill(photos, photo, "Kiwi/1.jpg", "Kiwi/_MG_1.JPG")
    with pytest.raises(SystemExit, match=r"names that start with _ from viewfs://store/photos: 1 of 2 .* Kiwi/_MG_1\.JPG"):
        ingest.find_files(spark, elsewhere, **ALL)


# Files that are taken


def taken(paths: list[str], **given: Any) -> list[str]:
    reads = ingest.reader_of_names(**(ALL | given))
    return [path for path in paths if reads(path, False) is None]


PATHS = ["Apple/1.jpg", "Pear/1.jpg", "test-multiple_fruits/1.jpg", "all/test-multiple_fruits/2.jpg"]


def test_what_a_pattern_leaves_out_is_not_read() -> None:
    assert taken(PATHS, leave_out=["*/test-multiple_fruits/*"]) == PATHS[:2]


def test_only_what_a_pattern_takes_is_read() -> None:
    assert taken(PATHS, take=["Apple/*", "Pear/*"]) == PATHS[:2]


def test_what_is_taken_may_still_be_left_out() -> None:
    assert taken(PATHS, take=["Apple/*", "Pear/*"], leave_out=["Pear/*"]) == PATHS[:1]


def test_a_pattern_means_an_accent_whatever_its_form() -> None:
    assert taken([unicodedata.normalize("NFD", "Pêche/1.jpg")], leave_out=["Pêche/*"]) == []


def test_what_is_left_out_is_ignored_by_its_pattern(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, *PATHS)
    output = run(leave_out=["*/test-multiple_fruits/*"], take=["*/[12].jpg"])
    assert set(output.ignored.values()) == {("left_out", "*/test-multiple_fruits/*")}
    assert len(output.ignored) == len(output.images) == 2


def test_a_share_is_chosen_by_the_sha_256_of_the_path() -> None:
    paths = [f"Kiwi/{i}.jpg" for i in range(1000)]
    chosen = [path for path in paths if int.from_bytes(hashlib.sha256(path.encode()).digest()) < 0.1 * 2**256]
    assert taken(paths, share=0.1) == chosen
    assert 70 < len(chosen) < 130  # more than three standard deviations


def test_what_is_not_in_the_share_is_counted(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, *(f"Kiwi/{i}.jpg" for i in range(20)))
    output = run(share=0.5)
    assert output.n_files() == 20
    assert set(output.ignored.values()) == {("not_in_share", "not in the share of 0.5")}
    assert f"{len(output.images)} images of 1 labels; 0 files quarantined, {len(output.ignored)} ignored" in output.text


# Labels


def test_two_forms_of_one_accent_are_one_label(run: Run, photos: Path, photo: bytes) -> None:
    paths = {unicodedata.normalize(form, f"Pêche/{form}.jpg") for form in ("NFC", "NFD")}
    fill(photos, photo, *paths)
    output = run()
    assert output.images == dict.fromkeys(paths, unicodedata.normalize("NFC", "Pêche"))
    assert "warning" not in output.text


def test_labels_that_differ_by_capitals_or_blanks_are_said_with_their_numbers(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, "Limes/1.jpg", "Limes/2.jpg", "limes/1.jpg", "Limes /1.jpg", "Fig/1.jpg")
    text = run().text
    assert "differ by capitals or blanks only: 'Limes' (2 images), 'Limes ' (1 images), 'limes' (1 images)" in text
    assert "warning: the label 'Limes ' starts or ends with a blank" in text


NESTED = [f"{fruit}/{state}/{i}.jpg" for fruit in ("Apple", "Banana") for state in ("Fresh", "Rotten") for i in (1, 2)]


def test_a_label_below_several_folders_is_said_and_how_to_tell_them_apart(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, *NESTED)
    text = run().text
    assert "note: 2 of 2 labels lie below several folders, such as 'Fresh' (Apple 2, Banana 2)" in text
    assert "ingest.label_depth=2" in text


def test_two_folders_can_make_the_label(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, *NESTED)
    output = run(label_depth=2)
    assert output.images == {path: path.rpartition("/")[0] for path in NESTED}
    assert "note" not in output.text


def test_folders_for_training_and_test_are_no_parents(run: Run, photos: Path, photo: bytes) -> None:
    subsets = ("train", "Training", "test", "val", "valid", "Validation")
    fill(photos, photo, *(f"{subset}/Kiwi/1.jpg" for subset in subsets))
    assert "note" not in run().text


# What ends a run


def test_a_folder_that_does_not_exist_ends_the_run(spark: SparkSession, photos: Path) -> None:
    with pytest.raises(SystemExit, match=r"photos is no folder\. `images` in params\.yaml"):
        ingest.find_files(spark, str(photos), **ALL)


def test_a_folder_without_files_ends_the_run(spark: SparkSession, photos: Path) -> None:
    photos.mkdir()
    with pytest.raises(SystemExit, match=f"no image below {photos}: it has no file"):
        ingest.find_files(spark, str(photos), **ALL)


def test_a_folder_without_images_ends_the_run_and_says_what_is_there(run: Run, photos: Path) -> None:
    fill(photos, b"text", "notes.txt", "Kiwi/1.jpg")
    with pytest.raises(SystemExit, match=f"no image below {photos}: 0 images .* 1 files quarantined, 1 ignored .1 txt."):
        run(max_quarantined=1)


def test_an_image_outside_any_labels_folder_ends_the_run(spark: SparkSession, photos: Path, photo: bytes) -> None:
    fill(photos, photo, "Kiwi/1.jpg", "loose.jpg")
    with pytest.raises(SystemExit, match=r"1 of 2 files have no label: loose\.jpg is in"):
        ingest.find_files(spark, str(photos), **ALL)


def test_a_file_that_is_deleted_after_it_was_listed_ends_the_stage_by_name(
    spark: SparkSession, photos: Path, photo: bytes
) -> None:
    fill(photos, photo, "Kiwi/stays.jpg", "Kiwi/goes.jpg")
    listing = ingest.find_files(spark, str(photos), **ALL)
    (photos / "Kiwi/goes.jpg").unlink()
    limits: dict[str, Any] = {
        "max_bytes": 2**20,
        "max_pixels": 10_000,
        "min_side": 1,
        "label_depth": 1,
        "group_pattern": "x",
    }
    with pytest.raises(PythonException, match=r"Kiwi/goes\.jpg cannot be read: No such file"):
        ingest.inspect_files(spark, listing, **limits).collect()


def test_a_number_of_refused_files_ends_the_run_if_one_more_is(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, *(f"Kiwi/{i}.jpg" for i in range(5)))
    fill(photos, photo[:300], "Kiwi/cut.jpg", "Fig/cut.jpg")
    assert len(run(max_quarantined=2).quarantine) == 2
    with pytest.raises(SystemExit, match="2 of 7 files are refused, more than max_quarantined 1 allows"):
        run(max_quarantined=1)


@pytest.mark.parametrize(("given", "allowed"), [(0, 0), (3, 3), (1, 1), (0.01, 2), (1.0, 200), (0.0, 0)])
def test_a_limit_with_a_decimal_point_is_a_share(given: float, allowed: int) -> None:
    limit = ingest.count_or_share(str(given))
    said = [ingest.say_too_many({"n_files": 200, "n_quarantined": n, "n_bad_archives": 0}, limit) for n in range(201)]
    assert [each is None for each in said] == [n <= allowed for n in range(201)]


def test_refused_files_are_named_whether_or_not_they_end_the_run(
    run: Run, photos: Path, photo: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(photos, photo, "Kiwi/1.jpg")
    fill(photos, photo[:300], *(f"Kiwi/cut{i:02}.jpg" for i in range(12)))
    first = [*(f"ingest: refused: Kiwi/cut{i:02}.jpg: truncated, " for i in range(10)), "ingest: refused: 2 more; "]

    def named(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if "refused: " in line]
        return [line[: len(start)] for line, start in zip(lines, first, strict=True)]

    assert named(run().text) == first
    with pytest.raises(SystemExit):
        run(max_quarantined=0)
    assert named(capsys.readouterr().out) == first


def test_a_limit_that_is_neither_a_number_nor_a_share_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="neither a number of files nor a share"):
        ingest.count_or_share("some")


# What a delivery should be


def breaches(*expected: str, min_images: int = 1) -> list[str]:
    folders = [("Apple", "a/Apple", 3), ("Apple", "b/Apple", 2), ("Pear", "a/Pear", 4)]
    return [*ingest.breaches(folders, [*expected], min_images)]


def test_labels_are_expected_by_number() -> None:
    assert (breaches("2"), breaches("3")) == ([], ["2 labels instead of 3"])


def test_labels_are_expected_by_name() -> None:
    assert breaches("Pear", "Apple") == []
    assert breaches("Apple", "Fig") == ["1 labels are missing: Fig", "1 labels were not expected: Pear"]


def test_each_label_needs_so_many_images() -> None:
    assert (breaches(min_images=4), breaches(min_images=5)) == ([], ["1 labels have less than 5 images: Pear 4"])


def test_a_breach_ends_the_run_or_is_said(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, "Kiwi/1.jpg")
    with pytest.raises(SystemExit, match="1 labels instead of 2"):
        run(labels=2, on_breach="end")
    output = run(labels=2, on_breach="say")
    assert "ingest: 1 labels instead of 2" in output.text
    assert len(output.images) == 1


def test_an_image_that_is_too_small_is_refused_with_both_numbers(run: Run, photos: Path, photo: bytes) -> None:
    fill(photos, photo, "Kiwi/1.jpg", "Kiwi/2.jpg")  # 30 x 20 pixels
    assert len(run(min_side=20).images) == 2
    with pytest.raises(SystemExit, match="no image"):
        run(min_side=21)
