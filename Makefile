# featdiff: `make help` lists what can be done.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev
export PATH := $(CURDIR)/$(BIN):$(PATH)
PORT ?= 5000

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo "  PROFILE=name   with repro or profile: switch the profile first (conf/profiles/); SUITES=folder: read suites there"

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "featdiff: Python 3.11 or newer is needed; say PYTHON=python3.11"; exit 2; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

install: $(STAMP)  ## create .venv and install from the constraints file (other targets do it too)

profile: $(STAMP)  ## write params.yaml for PROFILE (DISCARD=1 overwrites edits by hand)
	@$(BIN)/python -m featdiff.config.profiles use $(PROFILE) $(if $(DISCARD),--discard) $(if $(SUITES),--suites=$(SUITES))

repro: $(STAMP) $(if $(PROFILE)$(SUITES),profile)  ## run what is out of date of the whole study, stages side by side (JOBS=1: one by one), then fill the tracking view
	@$(BIN)/python -m featdiff.config.profiles check > /dev/null
	@$(BIN)/python -m featdiff.artifacts.dvc
	@$(BIN)/python -m featdiff.pipeline.repro $(if $(JOBS),--jobs $(JOBS))
	-@$(BIN)/python -m featdiff.tracking.mirror sync --wait 60
	@echo "report: $(CURDIR)/report/index.html"

crosscoders: $(STAMP)  ## fit several crosscoders from one read of their rows, for dvc repro to take up (FITS="joint_topk joint_l1"; none: all that are out of date)
	@$(BIN)/python -m $(if $(FITS),featdiff.processes.launch -m )featdiff.crosscoder.together $(FITS)

test: $(STAMP)  ## the quick test suite
	@$(BIN)/python -m pytest -n auto --dist loadfile

plan: $(STAMP)  ## operations, disk, memory and time of every stage before it is run (PROFILE=…; CONFIG=folder of a model that is not here; GPUS=8 NODES=1 GPU=h100)
	@$(BIN)/python -m featdiff.planning.plan $(PROFILE) $(if $(CONFIG),--config '$(CONFIG)') $(if $(GPUS),--gpus $(GPUS) --nodes $(or $(NODES),1) --gpu $(or $(GPU),h100))

rehearse: $(STAMP)  ## a large profile small, to its report, with a model of its architecture and random weights (PROFILE=qwen3_4b)
	@$(BIN)/python -m featdiff.planning.rehearse $(PROFILE)

why: $(STAMP)  ## why STAGE reruns: which param, file or stage upstream changed, and from what to what (no STAGE: all)
	@$(BIN)/python -m featdiff.artifacts.why $(STAGE)

picture: $(STAMP)  ## take docs/report.png of the report (needs chromium or chrome, or BROWSER)
	@$(BIN)/python -m featdiff.report.picture

trace: $(STAMP)  ## rows, artifacts, commits and runs behind the numbers of a claim, or the claims behind an artifact (OF=necessary; none: all)
	@$(BIN)/python -m featdiff.report.trace $(OF)

verify: $(STAMP)  ## hash every artifact against its manifest and every object of DVC's cache against its name
	@$(BIN)/python -m featdiff.artifacts.integrity

faults: $(STAMP)  ## kill, corrupt, fill the disk, lose ranks and servers: under 25 minutes on two idle cores
	@$(BIN)/python -m pytest tests/faults -m faults -n 3 --dist worksteal

servers: $(STAMP)  ## a team's set-up for real: PostgreSQL, S3 and MLflow behind a password, the nano study between two clones (needs PostgreSQL)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[team]'
	@$(BIN)/python -m pytest tests/team -m team -s

browser: $(STAMP)  ## the report and the page of answers in a real browser (needs chromium or chrome)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser]'
	@$(BIN)/python -m pytest tests/browser -m browser

golden: $(STAMP)  ## attribution methods against known features; fails where the figures are missed
	@$(BIN)/python -m featdiff.attribution.golden

bench: $(STAMP)  ## against sae-lens, sparsify and the limit of this machine, in turns (CASES="step answers"; none: all, some 10 minutes idle once the peers are installed)
	@$(BIN)/python -m benchmarks $(CASES)

profile-step: $(STAMP)  ## where a crosscoder step and a pass of questions under edits spend their time (CASES="step answers")
	@$(BIN)/python -m benchmarks.profiling $(CASES)

studies: $(STAMP)  ## run whole studies whose truth is known (STUDIES="noise locked-106", JOBS=2 at a time; hours), and fill docs/calibration.md
	@$(BIN)/python -m featdiff.pipeline.studies $(if $(JOBS),--jobs $(JOBS)) $(STUDIES)

check: $(STAMP)  ## format, lint, types, quick tests
	@ruff format --check . && ruff check . && mypy && $(BIN)/python -m pytest -n auto --dist loadfile -m "not graph and not faults and not team and not browser"

format: $(STAMP)  ## format and mend what the linter can
	@ruff format . && ruff check --fix .

remote: $(STAMP)  ## share results: URL=folder, s3://, ssh://, gs:// or azure://… becomes the remote once it is proved (ENDPOINT=… for an S3 server)
	@$(BIN)/python -m featdiff.artifacts.remote set '$(URL)' $(if $(ENDPOINT),--endpoint '$(ENDPOINT)')

push: $(STAMP)  ## copy the results of dvc.lock to the remote
	@$(BIN)/python -m featdiff.artifacts.remote push

pull: $(STAMP)  ## fetch the results of dvc.lock; STAGE=report: what reading the report needs
	@$(BIN)/python -m featdiff.artifacts.remote pull $(STAGE)
	$(if $(STAGE),,-@$(BIN)/python -m featdiff.tracking.mirror rebuild)

ui: $(STAMP)  ## open the tracking UI (PORT=5000)
	@$(BIN)/python -m featdiff.tracking.mirror ui $(PORT)

.PHONY: help install profile repro crosscoders test plan rehearse why trace picture verify faults servers browser golden bench profile-step studies check format remote push pull ui
