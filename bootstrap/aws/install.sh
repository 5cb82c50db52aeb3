#!/usr/bin/env bash
# EMR bootstrap action: Python 3.11 with what the stages import, on each node, before Spark is there.
#
# usage: install.sh s3://BUCKET/bootstrap/WHEELHOUSE REGION
#
# All comes from the project's bucket, each file checked by its SHA-256; no package index is asked, and none can be reached. If
# anything is missing, the script fails, and EMR ends the cluster with BOOTSTRAP_FAILURE before a stage starts. Its message is in
# logs/CLUSTER/node/INSTANCE/bootstrap-actions/1/stderr.gz.
set -euo pipefail

usage='usage: install.sh s3://BUCKET/bootstrap/WHEELHOUSE REGION'
wheelhouse=${1:?$usage}
region=${2:?$usage}
target=${FRUITS_HOME:-/opt/fruits}
python=${PYTHON:-python3.11} # EMR's own python3 is 3.9, that of Amazon Linux: it stays as it is

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT

# A release that lacks it: from Amazon Linux's repository, which is a bucket in the region.
command -v "$python" > /dev/null || sudo dnf install --assumeyes --quiet "$python" "$python-pip"

aws s3 cp --recursive --only-show-errors --region "$region" "$wheelhouse/" "$wheels"
sudo mkdir -p "$target"
sudo "$python" -m venv "$target/venv"
# --isolated: no setting of the machine can add an index.
sudo "$target/venv/bin/python" -m pip --isolated install --quiet --disable-pip-version-check --no-cache-dir \
  --no-index --find-links "$wheels" --require-hashes --requirement "$wheels/requirements.txt"

# Any user who runs a stage must be able to read it. A package that cannot be imported fails here, not in a task.
sudo chmod -R a+rX "$target"
"$target/venv/bin/python" -c "import ${FRUITS_IMPORTS:-numpy, pandas, pi_heif, PIL, pyarrow, simplejpeg, tensorflow, threadpoolctl}"
