"""reports/cache.py: what `make cache-info` says, and what `make cache-clear` deletes."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reports import cache


def test_each_kind_of_features_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, size, n in (("a1", 224, 3), ("b2", 160, 1200)):
        task = tmp_path / folder / "task"
        task.mkdir(parents=True)
        pixels = {"width": size, "height": size}
        about = {"backbone": {"name": "resnet50", "weights": "imagenet", "pixels": pixels}, "batch_size": 8}
        (task.parent / "about.json").write_text(json.dumps(about | {"precision": "bfloat16"}))
        pq.write_table(pa.table({"image_id": [str(i) for i in range(n)]}), task / "part-00000.parquet")
    cache.main([str(tmp_path)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:-2] for line in lines] == [
        ["network", "pixels", "batch", "precision", "images"],
        ["resnet50", "224", "x", "224", "8", "bfloat16", "3"],
        ["resnet50", "160", "x", "160", "8", "bfloat16", "1,200"],
    ]
    assert [line[-1] for line in lines[1:]] == ["a1", "b2"]


def test_an_empty_cache_is_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.main([str(tmp_path / "none")])
    assert capsys.readouterr().out == f"cache: {tmp_path}/none holds no features\n"


def test_damaged_files_are_counted_as_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = {"backbone": {"name": "resnet50", "weights": "imagenet", "pixels": {"width": 224, "height": 224}}}
    folder = tmp_path / "cache [1]" / "a1"
    folder.mkdir(parents=True)
    (folder / "about.json").write_text(json.dumps(about | {"batch_size": 8, "precision": "float32"}))
    pq.write_table(pa.table({"image_id": ["a", "b"]}), folder / "part-00000.parquet")
    (folder / "part-00001.parquet").write_bytes(b"")
    (folder / "part-00002.parquet").write_bytes(b"garbage" * 9)
    cache.main([str(tmp_path / "cache [1]")])
    assert capsys.readouterr().out.splitlines()[1].split()[-3] == "2"


@pytest.mark.parametrize("flags", [[], ["--clear"]], ids=["info", "clear"])
def test_a_cache_elsewhere_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="s3://bucket/cache is not on this machine"):
        cache.main([*flags, "s3://bucket/cache"])


def test_to_clear_deletes_features_and_looks_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, about in (("a1", {"backbone": {}}), ("letters", {"author": "somebody"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "about.json").write_text(json.dumps(about))
    (tmp_path / "thesis.txt").touch()
    (tmp_path / "ingest-a1.sqlite").touch()
    cache.main(["--clear", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "thesis.txt"]
    assert capsys.readouterr().out == f"cache: 1 kinds of features are deleted from {tmp_path}\n"
