"""environment.py: what of the user's environment reaches a stage."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bootstrap.environment import LIKE_HASWELL, OF_JAVA, python_environment, spark_environment
from tests.helpers import ROOT

# A variable for each way in which a person's shell has changed the last digits of a result, or might.
CHANGE_RESULTS = {
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS": "1",
    "TF_XLA_FLAGS": "--tf_xla_auto_jit=2",
    "TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_IGNORE_PERFORMANCE": "1",
    "XLA_FLAGS": "--xla_cpu_enable_fast_math=true",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "DNNL_MAX_CPU_ISA": "SSE41",
    "CUBLAS_WORKSPACE_CONFIG": ":16:8",
    "CUDNN_AUTOTUNE": "1",
    "NVIDIA_TF32_OVERRIDE": "1",
    "KERAS_BACKEND": "jax",
    "NPY_ENABLE_CPU_FEATURES": "AVX2",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2",
    "PYTHONPATH": "/opt/ros/python",  # with another NumPy
    "PYTHONWARNINGS": "error",
    "PYTHONIOENCODING": "latin-1",
    "PYTHONOPTIMIZE": "2",
    "JPEGMEM": "1000",
    "SPARK_REMOTE": "sc://localhost",
    "SPARK_CONNECT_MODE_ENABLED": "1",
    "SPARK_API_MODE": "connect",
    "SPARK_TESTING": "1",
}


@pytest.mark.parametrize("name", CHANGE_RESULTS)
def test_a_variable_that_changes_results_does_not_reach_a_stage(name: str) -> None:
    assert name not in python_environment({name: CHANGE_RESULTS[name]})


@pytest.mark.parametrize("name", LIKE_HASWELL)
def test_the_same_code_runs_on_every_x86_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert python_environment({name: "something else"})[name] == LIKE_HASWELL[name]


@pytest.mark.parametrize("name", LIKE_HASWELL)
def test_another_family_of_processors_runs_its_own_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert name not in python_environment({name: LIKE_HASWELL[name]})


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86 processor")
def test_numpy_and_blas_take_the_code_of_haswell() -> None:
    program = (
        "import numpy, threadpoolctl as t; from numpy._core._multiarray_umath import __cpu_features__ as features;"
        "print({each['architecture'] for each in t.threadpool_info()}, features['AVX512F'], features['AVX2'])"
    )
    environment = python_environment(os.environ)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "{'Haswell'} False True\n", done.stderr


def test_tensorflow_does_not_import_keras() -> None:
    program = "import sys, tensorflow; print(sorted({'keras', 'tf_keras', 'sklearn'} & sys.modules.keys()))"
    environment = python_environment(os.environ)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_text_is_utf_8_in_any_locale() -> None:
    assert python_environment({"LC_ALL": "fr_FR.ISO-8859-1", "PYTHONUTF8": "0"})["PYTHONUTF8"] == "1"


@pytest.mark.parametrize("name", ["PYTHONDONTWRITEBYTECODE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HTTPS_PROXY"])
def test_other_variables_reach_a_stage(name: str) -> None:
    assert python_environment({name: "1"})[name] == "1"


def test_the_door_runs_a_stage_in_that_environment(tmp_path: Path) -> None:
    stage = tmp_path / "stage.py"
    stage.write_text("import os, sys\nopen(sys.argv[2], 'w').write(os.environ.get('TF_ENABLE_ONEDNN_OPTS', 'not set'))\n")
    subprocess.run(
        [sys.executable, "-m", "bootstrap.submit", "python", "stage.py", "in", "out"],
        cwd=tmp_path,
        env=os.environ | CHANGE_RESULTS | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert (tmp_path / "out").read_text() == "not set"


@pytest.mark.parametrize("name", OF_JAVA)
def test_a_setting_of_spark_among_the_options_of_java_is_refused(name: str) -> None:
    options = "-Xmx2g -Dspark.sql.files.maxRecordsPerFile=50"
    with pytest.raises(SystemExit, match=f"{name} sets spark.sql.files.maxRecordsPerFile"):
        spark_environment({name: options})


def test_a_file_of_options_of_java_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"JDK_JAVA_OPTIONS sets @options\.txt"):
        spark_environment({"JDK_JAVA_OPTIONS": "-Xmx2g @options.txt"})


def test_other_options_of_java_are_kept() -> None:
    options = "-Djava.io.tmpdir=/scratch/spark.tmp"
    assert options in spark_environment({"SPARK_SUBMIT_OPTS": options})["SPARK_SUBMIT_OPTS"]


@pytest.mark.parametrize(
    ("environment", "locale"),
    [({}, "C.UTF-8"), ({"LANG": "C"}, "C.UTF-8"), ({"LC_ALL": "C", "LANG": "fr_FR.UTF-8"}, "C.UTF-8")],
    ids=["none", "C", "C over French"],
)
def test_names_of_files_are_utf_8_in_any_locale(environment: dict[str, str], locale: str) -> None:
    assert spark_environment(environment)["LC_ALL"] == locale


def test_a_utf_8_locale_is_kept() -> None:
    assert "LC_ALL" not in spark_environment({"LANG": "fr_FR.UTF-8"})
