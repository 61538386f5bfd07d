# make run [PROFILE=offline]   set up, run the whole workbook, print the results table
# make test                    set up, lint, types, unit tests, notebooks
# make conformance             PEFT's own tests on our method
# make port TARGET=minilm-l3   one target: pre-train if needed, port
# make attempts                ways to port, compared on dev (notebook 07 for every task and target); figures attempts.*
# make copies                  the adapter on pruned copies of its source (notebook 10); figures compression*
# make bench                   times and memory of the layers on this machine
# make fetch                   set up and fetch the offline models and text, no more
# make clean CONFIRM=1         remove runs/, all results and trained files in it
# make lab                     JupyterLab on notebooks/ (its root is here, so that notebooks can show figures/)

SHELL := bash
PROFILE ?= offline
TASK ?= movies
SEED ?= 0
PYTHON ?= python3
CORES ?= $(shell nproc 2>/dev/null || echo 2)
# Cells side by side: one where they would share a GPU.
JOBS ?= $(if $(wildcard /dev/nvidia0),1,$(CORES))
VENV := .venv
# Dozens of processes import the package: compiled once.
unexport PYTHONDONTWRITEBYTECODE
export UHL_RUNS := $(abspath $(UHL_RUNS))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One batch at a time: the lock goes with its process, so a killed run never blocks the next one.
LOCK := $(if $(shell command -v flock),flock -n -E 75 runs/.lock,)
SNAKE = $(LOCK) env PYTHONWARNINGS=ignore $(BIN)/snakemake --nolock --cores $(JOBS) --rerun-triggers mtime \
	--rerun-incomplete --keep-going --quiet rules
TARGETS = $(patsubst params/$(PROFILE)/%.yaml,%,$(shell grep -ls '^target:' params/$(PROFILE)/*.yaml))
PROFILES = $(patsubst params/%/grid.yaml,%,$(wildcard params/*/grid.yaml))
BUSY := { s=$$?; [ $$s != 75 ] || echo "make: another batch holds runs/.lock; wait for it or stop it"; exit $$s; }

# The jobs of one target follow one another, so each has all threads.
port: JOBS = 1

.PHONY: run test fetch lint unit notebooks conformance port attempts copies bench lab table clean

$(STAMP): pyproject.toml requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/pip install --disable-pip-version-check -q -r requirements.lock
	@$(BIN)/pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

run: $(STAMP)
	@$(BIN)/python -m uhl fetch --profile $(PROFILE)
	@mkdir -p runs
	@$(SNAKE) --config profile=$(PROFILE) || $(BUSY)
	@$(BIN)/python -m uhl table --profile $(PROFILE)

port: $(STAMP)
	@test -f "params/$(PROFILE)/grid.yaml" || { echo "no profile $(PROFILE); profiles: $(PROFILES)"; exit 1; }
	@test -n "$(TARGET)" || { echo "make port needs TARGET=<name>, one of: $(TARGETS)"; exit 1; }
	@test -f "params/$(PROFILE)/$(TARGET).yaml" || { echo "no params/$(PROFILE)/$(TARGET).yaml; targets: $(TARGETS)"; exit 1; }
	@$(BIN)/python -m uhl fetch --profile $(PROFILE) --model $(TARGET) --task "$(TASK)"
	@mkdir -p runs
	@$(SNAKE) --config profile=$(PROFILE) -- $(or $(UHL_RUNS),runs)/$(PROFILE)/$(TASK)-s$(SEED)/port-$(TARGET)/manifest.json || $(BUSY)
	@$(BIN)/python -m uhl table --profile $(PROFILE) --target $(TARGET)

attempts: $(STAMP)
	@$(BIN)/python -m uhl fetch --profile $(PROFILE)
	@mkdir -p runs
	@$(SNAKE) --config profile=$(PROFILE) -- all_attempts || $(BUSY)
	@$(BIN)/python -m uhl attempts --profile $(PROFILE)

copies: $(STAMP)
	@$(BIN)/python -m uhl fetch --profile $(PROFILE)
	@mkdir -p runs
	@$(SNAKE) --config profile=$(PROFILE) -- all_copies || $(BUSY)
	@$(BIN)/python -m uhl copies --profile $(PROFILE)

# Two at a time, because each has long stretches with one process; every line says whose it is.
test: $(STAMP)
	@$(MAKE) --no-print-directory -j2 notebooks unit lint

FAILS = set -o pipefail; export PYTHONUNBUFFERED=1;
NAMED = 2>&1 | while IFS= read -r line || [ -n "$$line" ]; do printf '%s\n' "$@  $$line"; done

fetch: $(STAMP)
	@$(BIN)/python -m uhl fetch --profile offline

lint: $(STAMP)
	@$(FAILS) $(BIN)/ruff check . $(NAMED)
	@$(FAILS) $(BIN)/ruff format --check . $(NAMED)
	@$(FAILS) $(BIN)/mypy $(NAMED)

unit: export OMP_NUM_THREADS = 1
unit: fetch
	@$(FAILS) $(BIN)/pytest -n $(CORES) --dist worksteal $(NAMED)

notebooks: export OMP_NUM_THREADS = 1
notebooks: fetch
	@$(FAILS) UHL_BATCH=1 UHL_RUNS=$$(mktemp -d) $(BIN)/pytest --nbval --nbval-sanitize-with tests/nbval.cfg \
		--nbval-cell-timeout 300 -n $(CORES) notebooks $(NAMED)

# PEFT's own tests on our method: some minutes, and peft's source distribution is fetched on first use.
conformance: $(STAMP)
	@$(FAILS) $(BIN)/python tests/conformance.py -n $(CORES) $(NAMED)

# Times and memory on this machine: notebook 08 in full, on BERT-base. Goes on where it stopped; writes figures/speed_*.
bench: export UHL_BATCH = 1
bench: $(STAMP)
	@mkdir -p $(or $(UHL_RUNS),$(CURDIR)/runs)/bench
	$(BIN)/papermill notebooks/08_budget_and_speed.ipynb $(or $(UHL_RUNS),$(CURDIR)/runs)/bench/notebook.ipynb --cwd notebooks \
		--log-output --no-progress-bar -p full True -p shape bert-base -p batch 8 -p length 128 -p repeats 9 -p threads 2

lab: $(STAMP)
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks

# make table [PROFILE=offline-full] [PARTIAL=--partial]   figures anew from all results, then figures/ and a README
RUNS = $(or $(UHL_RUNS),$(CURDIR)/runs)/$(PROFILE)
table: PROFILE := $(if $(filter file,$(origin PROFILE)),offline-full,$(PROFILE))
table: export UHL_BATCH = 1
table: $(STAMP)
	@mkdir -p $(RUNS)/analysis
	@$(BIN)/papermill notebooks/06_analysis.ipynb $(RUNS)/analysis/notebook.ipynb --cwd notebooks --no-progress-bar \
		-p profile $(PROFILE) > $(RUNS)/analysis/log.txt 2>&1 || { tail -5 $(RUNS)/analysis/log.txt; exit 1; }
	@$(BIN)/python -m uhl table --profile $(PROFILE) --readme $(PARTIAL)

# All results and trained files of runs/ are hours of work.
clean:
	@test ! -d runs || test "$(CONFIRM)" = 1 || { echo "make clean removes runs/ and all that ran there; add CONFIRM=1"; exit 1; }
	@mkdir -p runs
	@$(LOCK) rm -rf runs .snakemake || $(BUSY)
