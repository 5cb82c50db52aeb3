"""Who reads a table knows its columns as who writes it: each pair of a reader and a writer."""

import importlib

import pytest
from pyspark.sql.types import StructType


@pytest.mark.parametrize(
    ("reader", "read", "writer", "written"),
    [
        ("stages.featurize", "IMAGES", "stages.ingest", "IMAGES"),
        ("stages.neighbours", "FEATURES", "stages.featurize", "FEATURES"),
        ("stages.split", "SKETCHES", "stages.neighbours", "SKETCHES"),
        ("stages.split", "NEIGHBOURS", "stages.neighbours", "NEIGHBOURS"),
        ("stages.covariance", "FEATURES", "stages.featurize", "FEATURES"),
        ("stages.reduce", "FEATURES", "stages.featurize", "FEATURES"),
        ("stages.reduce", "MOMENTS", "stages.covariance", "MOMENTS"),
        ("stages.analysis", "MOMENTS", "stages.covariance", "MOMENTS"),
        ("stages.baseline", "IMAGES", "stages.ingest", "IMAGES"),
        ("stages.baseline", "FEATURES", "stages.featurize", "FEATURES"),
        ("stages.evaluate", "LABELLED", "stages.featurize", "FEATURES"),
        ("stages.evaluate", "VECTORS", "stages.featurize", "FEATURES"),
        ("stages.evaluate", "BASELINE", "stages.baseline", "PREDICTIONS"),
        ("stages.evaluate", "SPECTRUM", "stages.reduce", "SPECTRUM"),
        ("stages.evaluate", "SETTINGS", "stages.reduce", "SETTINGS"),
        ("stages.evaluate", "EMBEDDINGS", "stages.reduce", "EMBEDDINGS"),
        ("stages.drift", "IMAGES", "stages.featurize", "FEATURES"),
        ("stages.drift", "EARLIER", "stages.featurize", "FEATURES"),
        ("stages.drift", "VECTORS", "stages.featurize", "FEATURES"),
        ("stages.drift", "SCALING", "stages.reduce", "SCALING"),
        ("stages.drift", "COMPONENTS", "stages.reduce", "COMPONENTS"),
        ("reports.report", "LABELLED", "stages.ingest", "IMAGES"),
        ("reports.report", "FOLDS", "stages.ingest", "IMAGES"),
        ("reports.report", "PICTURES", "stages.ingest", "IMAGES"),
        ("reports.report", "QUARANTINE", "stages.ingest", "QUARANTINE"),
        ("reports.report", "EMBEDDINGS", "stages.reduce", "EMBEDDINGS"),
    ],
)
def test_a_reader_knows_the_columns_as_the_writer_writes_them(reader: str, read: str, writer: str, written: str) -> None:
    wanted = getattr(importlib.import_module(reader), read)
    there = getattr(importlib.import_module(writer), written)
    # A reader on Spark knows the types too, others the names.
    is_typed = isinstance(wanted, StructType)
    assert [each for each in wanted if each not in (there.fields if is_typed else there.names)] == []
