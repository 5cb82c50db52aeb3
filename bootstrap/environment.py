"""Make the environment of a stage on this machine: nothing in the user's own may change a result.

Variables that choose how numbers are computed, or what computes them, are taken away or set, without a word. Many have
TF_ENABLE_ONEDNN_OPTS=0 in their shell, to silence TensorFlow: with it, every feature would have other last digits.
"""

import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from bootstrap.java import find_spark

LOGGING = Path(__file__).with_name("log4j2.properties").as_uri()

# How these variables begin: of TensorFlow, its compiler, its kernels on processors and GPUs; Keras; NumPy; C's mathematics.
# What says which GPUs there are, CUDA_VISIBLE_DEVICES, is not among them.
OF_ARITHMETIC = (
    *("TF_", "XLA_", "ONEDNN_", "DNNL_", "CUBLAS_", "CUDNN_", "NVIDIA_TF32_"),
    *("KERAS_BACKEND", "NPY_", "OPENBLAS_CORETYPE", "GLIBC_TUNABLES"),
)
# How these begin: of Python, such as other packages (PYTHONPATH) and the encoding of files; of libjpeg, the memory that an
# image may take; of Spark, that another program computes (Spark Connect), and that it is being tested.
OF_PROGRAMS = (
    *("PYTHON", "JPEGMEM"),
    *("SPARK_REMOTE", "SPARK_LOCAL_REMOTE", "SPARK_CONNECT_", "SPARK_API_MODE", "SPARK_TESTING", "SPARK_ANSI_SQL_MODE"),
)
HARMLESS = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")  # where a folder of code must stay as it is
# OpenBLAS and NumPy have code for each kind of processor, whose results differ in the last digits. Most x86 processors since
# 2013 have what Haswell has: with its code, the stages after featurize give the same bytes on all of them. cluster.yaml
# has these too.
LIKE_HASWELL = {
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "AVX512F,AVX512CD,AVX512_SKX,AVX512_CLX,AVX512_CNL,AVX512_ICL,AVX512_SPR",
}
OF_JAVA = ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS", "SPARK_SUBMIT_OPTS")


def python_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of every stage, with OF_ARITHMETIC and OF_PROGRAMS set or taken away.

    Text is UTF-8 in any locale, lines appear as they are printed, and progress bars on a terminal only.
    """
    taken = (*OF_ARITHMETIC, *OF_PROGRAMS)
    kept = {name: value for name, value in environment.items() if name in HARMLESS or not name.startswith(taken)}
    own = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    # TensorFlow imports Keras, which takes a third of the time of both. With this it looks for tf_keras instead, which is
    # not installed. `backbone`, the only stage that needs Keras, imports it itself. cluster.yaml has this too.
    own["TF_USE_LEGACY_KERAS"] = "1"
    if platform.machine() in ("x86_64", "AMD64"):
        own |= LIKE_HASWELL
    if not sys.stderr.isatty():
        own["TQDM_DISABLE"] = "1"  # the stage writes to a pipe in any case, and cannot see where that ends
    return {**kept, **own}


def spark_environment(environment: Mapping[str, str], options: str = "") -> dict[str, str]:
    """Return the environment of spark-submit and its children: JVM options, logging, places, file names in UTF-8.

    Raises
    ------
    SystemExit
        one of OF_JAVA has a setting of Spark, or a file of them, which could change results where nobody looks for it
    """
    for name in OF_JAVA:
        if setting := re.search(r"-D(spark\.[^\s=\"']+)|(?<!\S)(@\S+)", environment.get(name, "")):
            raise SystemExit(
                f"submit: {name} sets {setting[1] or setting[2]}. From there, a setting of Spark could change results: "
                f"unset {name}, or take that out of it."
            )
    given = environment.get("SPARK_SUBMIT_OPTS", "")
    own = {
        "SPARK_CONF_DIR": "/nonexistent",  # first in the class path, where an archive of classes allows no folder
        "SPARK_SUBMIT_OPTS": f"{given} -Dlog4j2.configurationFile={LOGGING} {options}".strip(),
        "SPARK_HOME": str(find_spark(environment)),  # which spark-submit cannot find by itself below a folder with a blank
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    # Java reads the names of files by the locale; in the plain C locale it cannot open one that has an accent.
    if "UTF" not in (environment.get("LC_ALL") or environment.get("LC_CTYPE") or environment.get("LANG") or "").upper():
        own["LC_ALL"] = "C.UTF-8"
    return {**environment, **own}
