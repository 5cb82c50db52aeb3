# Each target sets up what it needs. `make help` lists them.

PYTHON ?= python3
BIN := .venv/bin
REPORT := --suspects reports/suspects data/ingested data/split data/reduced data/classifier reports/evaluation reports/report.html
# What `make app` takes on its command line; never from the environment, where a shell may have put a HOST.
HOST := 127.0.0.1
PORT := 8490
LABELS :=
# And `make chaos`.
MINUTES := 10
SEED :=
CACHE := $(or $(FEATURE_CACHE),.dvc/tmp/feature-cache)
# One lock for Linux and macOS, each processor and each Python from 3.11 on.
LOCK := --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command 'make lock'
PIP := pip install --quiet --disable-pip-version-check --require-hashes
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Names and texts are UTF-8, whatever the locale.
export PYTHONUTF8 := 1

.DEFAULT_GOAL := help
.PHONY: help run app page add look pack report compare verify experiments bench test test-slow test-release chaos lint lock cache-info cache-clear \
  remote residency cloud-setup wheelhouse cloud-check cloud-up cloud-status cloud-down cloud-delete cloud-test check identity

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: .venv/run identity ## images to features, PCA and its metrics; only what changed is computed
	@python -m bootstrap.parameters
	@test -e data/features || printf '%s\n' 'The first run computes everything. On two cores, 1,000 small photographs take some two minutes and 10,000 some four:' \
	  '  rendering photographs and freezing the network: half a minute' \
	  '  ingest: seconds for each 1,000;  featurize: ten seconds for each 1,000, or 30 with a large network such as resnet50' \
	  '  each of the others: some ten seconds, most of them to start' \
	  'You may interrupt it: the next run goes on where this one was.' ''
	@dvc repro
	@python -m reports.report $(REPORT)
	@printf '\n'; cat reports/evaluation/summary.txt; printf '\n'; cat data/classifier/summary.txt
	@printf '\nSee:   reports/report.html\nNext:  make app\n       source .venv/bin/activate\n       dvc exp run -S reduce.k=16\n       make experiments\n'
	@printf 'Yours: a folder for each label, then make look FOLDER=~/photographs and make add FOLDER=~/photographs\n'

add: .venv/run ## take a delivery in: FOLDER=… has a folder for each label; INTO=data/mine, or another collection
	@test -n "$(FOLDER)" || { echo 'add: say where the photographs are: make add FOLDER=~/photographs'; exit 2; }
	@python -m reports.delivery $(if $(INTO),--into "$(INTO)") "$(FOLDER)"

look: .venv/run ## what is in a delivery, FOLDER=…, and what ingest would refuse of it; takes nothing in
	@test -n "$(FOLDER)" || { echo 'look: say where the photographs are: make look FOLDER=~/photographs'; exit 2; }
	@python -m reports.delivery --look $(if $(INTO),--into "$(INTO)") "$(FOLDER)"

pack: .venv/run ## a folder as ZIP archives, for a million photographs: FOLDER=…, INTO=…; MB=64, BY=label
	@test -n "$(FOLDER)" -a -n "$(INTO)" || { echo 'pack: say from where to where: make pack FOLDER=~/photographs INTO=data/mine'; exit 2; }
	@python -m reports.pack $(if $(MB),--mb $(MB)) $(if $(filter label,$(BY)),--by_label) "$(FOLDER)" "$(INTO)"

app: page ## recognise photographs in a browser; HOST=0.0.0.0 for a phone in the same network, PORT, LABELS=labels.csv
	@python -m app.serve app/dist --host $(HOST) --port $(PORT)

page: .venv/app ## app/dist, the same as a folder: for a web server, or to open index.html
	@python -m app.page data/model app/dist $(LABELS)

report: .venv/run ## reports/report.html; REVISIONS="main exp-name" draws their runs beside this one's
	@python -m reports.report $(REPORT) $(REVISIONS)

compare: .venv/run ## whether this run and that of REV are the same, but for rounding; REV, OTHER: revision, experiment, folder
	@test -n "$(REV)" || { echo 'compare: say with which run: make compare REV=HEAD'; exit 2; }
	@python -m reports.compare $(REV) $(OTHER)

verify: .venv/run ## hash all that DVC keeps anew; deletes what is damaged, and says how to have it again
	@python -m reports.verify

experiments: .venv/run ## what was tried, side by side
	@dvc exp show --drop '.*' --keep '(Experiment|variance.explained|nearest_neighbour.embedding|linear_probe.embedding|recognition.accuracy|reduce.k|reduce.scale)$$' --sort-by reduce.k

bench: .venv/dev ## what it takes, against other ways; IMAGES=FOLDER of some 10,000 photographs; half an hour of a quiet machine
	@python -m benchmarks.bench $(IMAGES)

test: .venv/dev ## what takes minutes; run it before each commit
	@pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: .venv/dev ## the rest: the whole pipeline, real networks, killed runs
	@pytest -m slow

test-release: .venv/dev ## the stages under the Spark of RELEASE (emr-7.13.0 unless set), whose packages it installs
	@python -m tests.releases $(RELEASE)

chaos: .venv/dev ## kill, fill, damage: disturb runs for MINUTES=10, and check the run after each; SEED=… plays the same again
	@python -m tests.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

lint: .venv/dev ## ruff and mypy
	@ruff check . && ruff format --check . && mypy

lock: .venv/dev ## constraints*.txt of requirements*.txt; a version moves only where it must (delete the files to move all)
	@uv pip compile $(LOCK) requirements.txt --output-file constraints.txt
	@uv pip compile $(LOCK) requirements-app.txt --constraints constraints.txt --output-file constraints-app.txt
	@uv pip compile $(LOCK) requirements-dev.txt --constraints constraints.txt --output-file constraints-dev.txt

cache-info: .venv/run ## what the feature cache holds: network, size of images, batch size, precision, images, MB
	@python -m reports.cache "$(CACHE)"

cache-clear: .venv/run ## empty the feature cache; what is wanted again is computed again
	@python -m reports.cache --clear "$(CACHE)"

remote: .venv/run ## DVC's remote on S3, to share data and results; BUCKET=name, in the EU
	@test -n "$(BUCKET)" || { echo 'remote: say which bucket: make remote BUCKET=name'; exit 1; }
	@python -m bootstrap.aws.residency $(BUCKET)
	@dvc remote add --quiet --default --force storage s3://$(BUCKET)/dvc
	@dvc remote modify storage region $$(python -c 'from bootstrap.aws import cloud; print(cloud.settings()["region"])')
	@printf '\nSee:   .dvc/config\nNext:  dvc push\n'

residency: .venv/run ## whether all data stays in the EU, as a table to file
	@python -m bootstrap.aws.residency

cloud-setup: .venv/run ## on AWS: bucket, network and roles, in the region of bootstrap/aws/cluster.yaml; costs nothing by the hour
	@python -m bootstrap.aws.infrastructure up

wheelhouse: .venv/run ## on AWS: Python for the nodes of a cluster; RELEASE=emr-7.13.0 for another release than the default
	@python -m bootstrap.aws.wheelhouse $(if $(RELEASE),--release $(RELEASE))

cloud-check: .venv/run ## on AWS: whether a cluster could start, ten lines; stops at the first thing that is wrong
	@python -m bootstrap.aws.check $(if $(RELEASE),--release $(RELEASE))

cloud-up: .venv/run ## on AWS: rent the cluster of bootstrap/aws/cluster.yaml; says what it costs
	@python -m bootstrap.aws.cluster up $(if $(RELEASE),--release $(RELEASE))

cloud-status: .venv/run ## on AWS: the cluster, its nodes, what it has cost
	@python -m bootstrap.aws.cluster status

cloud-down: .venv/run ## on AWS: give the cluster back
	@python -m bootstrap.aws.cluster down

cloud-delete: .venv/run ## on AWS: delete what cloud-setup made, but not the bucket
	@python -m bootstrap.aws.infrastructure down

cloud-test: .venv/dev identity ## on AWS: 56 images through all of it, in a stack of its own, which it deletes; costs some EUR, asks first
	@python -m tests.cloud

identity: # DVC's experiments are commits, and git makes none of nobody
	@git config user.email > /dev/null || { git config user.name "$${USER:-nobody}" && git config user.email "$${USER:-nobody}@localhost" \
	  && echo "git knew no user.name and user.email; for this repository they are now $${USER:-nobody}"; }

check: # what the machine must have, said before anything else fails
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit(f"Python 3.11, 3.12 or 3.13 is needed, and {sys.executable} is {sys.version.split()[0]}. Set PYTHON, as in: make PYTHON=python3.11 run")'
	@$(PYTHON) -m bootstrap.java

.venv/run: constraints.txt | check
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv: some 2 GB, minutes' && $(PIP) -r constraints.txt
	@python -m bootstrap.local
	@touch $@

.venv/app: .venv/run constraints-app.txt
	@$(PIP) -r constraints-app.txt
	@touch $@

.venv/dev: .venv/app constraints-dev.txt
	@$(PIP) -r constraints-dev.txt
	@touch $@
