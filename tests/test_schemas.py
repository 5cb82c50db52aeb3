"""Who reads a table knows its columns as who writes it: each pair of a reader and a writer."""

import importlib

import pytest
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType


@pytest.mark.parametrize(
    ("reader", "read", "writer", "written"),
    [
        ("stages.featurize", "IMAGES", "stages.ingest", "IMAGES"),
        ("stages.neighbours", "FEATURES", "stages.featurize", "FEATURES"),
        ("stages.split", "FILES", "stages.neighbours", "SKETCHES"),
        ("stages.covariance", "FEATURES", "stages.featurize", "FEATURES"),
        ("stages.covariance", "IMAGES", "stages.split", "IMAGES"),
        ("stages.reduce", "FEATURES", "stages.featurize", "FEATURES"),
        ("stages.reduce", "SUMS", "stages.covariance", "SUMS"),
        ("stages.analysis", "SUMS", "stages.covariance", "SUMS"),
        ("stages.baseline", "IMAGES", "stages.ingest", "IMAGES"),
        ("stages.baseline", "FEATURES", "stages.featurize", "FEATURES"),
        ("stages.baseline", "SPLIT", "stages.split", "IMAGES"),
        ("stages.evaluate", "SPLIT", "stages.split", "IMAGES"),
        ("stages.evaluate", "LEAK", "stages.split", "SETTINGS"),
        ("stages.evaluate", "BASELINE", "stages.baseline", "PREDICTIONS"),
        ("stages.evaluate", "SPECTRUM", "stages.reduce", "SPECTRUM"),
        ("stages.evaluate", "SETTINGS", "stages.reduce", "SETTINGS"),
        ("stages.evaluate", "EMBEDDINGS", "stages.reduce", "EMBEDDINGS"),
        ("stages.classify", "SPLIT", "stages.split", "IMAGES"),
        ("stages.classify", "REDUCTION", "stages.reduce", "SETTINGS"),
        ("stages.export", "EMBEDDINGS", "stages.reduce", "EMBEDDINGS"),
        ("stages.drift", "IMAGES", "stages.featurize", "FEATURES"),
        ("stages.drift", "VECTORS", "stages.featurize", "FEATURES"),
        ("stages.drift", "SCALING", "stages.reduce", "SCALING"),
        ("stages.drift", "COMPONENTS", "stages.reduce", "COMPONENTS"),
        ("reports.report", "LABELLED", "stages.ingest", "IMAGES"),
        ("reports.report", "FOLDS", "stages.split", "IMAGES"),
        ("reports.report", "PICTURES", "stages.ingest", "IMAGES"),
        ("reports.report", "QUARANTINE", "stages.ingest", "QUARANTINE"),
        ("reports.report", "EMBEDDINGS", "stages.reduce", "EMBEDDINGS"),
    ],
)
def test_a_reader_knows_the_columns_as_the_writer_writes_them(reader: str, read: str, writer: str, written: str) -> None:
    wanted = getattr(importlib.import_module(reader), read)
    there = getattr(importlib.import_module(writer), written)
    # A reader on Spark knows the types too, others the names.
    typed = there if isinstance(there, StructType) else from_arrow_schema(there)
    assert [each for each in wanted if each not in (typed.fields if isinstance(wanted, StructType) else there.names)] == []
