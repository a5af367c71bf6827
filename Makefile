# Two commands matter: `make run` and `make test`. Both set up everything they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c flows/constraints.txt

.PHONY: run test stack stack-down cluster-test test-tensors test-pipelines setup check quick quick-tensors quick-pipelines docs exactness faults mutants fuzz audit bench bench-gpu bench-large-batch bench-lisa pictures clean

run: $(VENV)/.installed
	@$(BIN)/ingot run --recipe demo

setup: $(VENV)/.installed-dev

# Two halves side by side, one thread each: most tests keep one core busy.
test: check
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 test-tensors test-pipelines

TENSORS = tests/models tests/exactness tests/contracts tests/golden tests/bench \
  $(addprefix tests/pipelines/,compression data deploy evaluation training)

test-tensors: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q $(TENSORS)

test-pipelines: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q $(addprefix --ignore=,$(TENSORS))

# What needs a cluster: a real Slurm of two nodes on this host. As root on Debian and Ubuntu it installs Slurm first.
cluster-test: $(VENV)/.installed-dev
	@command -v slurmctld >/dev/null || apt-get install -y slurm-wlm munge
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/cluster -m "cluster_full or not cluster_full"

# PostgreSQL, S3, Prefect, MLflow and a worker on this machine's loopback, with passwords; prints the pages.
stack: $(VENV)/.installed-dev
	@$(BIN)/python infra/stack.py up

# Ends them, and removes what they kept.
stack-down: $(VENV)/.installed-dev
	@$(BIN)/python infra/stack.py down

# Unit tests that train nothing, in two halves side by side. What trains, starts ranks or services, or is marked `slow`, is
# left to `make test`. The selection is this list and that mark, nothing else.
QUICK_TENSORS = tests/models
QUICK_PIPELINES = tests/style tests/docs tests/flows tests/pipelines/core tests/pipelines/report
QUICK = -q -m "not slow and not exactness and not faults_full" --timeout 60

quick: $(VENV)/.installed-dev
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 quick-tensors quick-pipelines

quick-tensors: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(QUICK) $(QUICK_TENSORS)

quick-pipelines: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(QUICK) $(QUICK_PIPELINES)

# Lint, formatting, types and layers; no test runs. Under a minute, less once mypy has its cache.
check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The full grid of optimizers, ranks, ZeRO stages and options (about an hour on two cores).
exactness: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m exactness --timeout 3600

# Every fault that is survived, by its tests wherever they stand; see tests/faults/catalogue.py.
faults: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $$($(BIN)/python tests/faults/catalogue.py) -m "faults_full or not faults_full" --timeout 3600

# Small deliberate bugs, one at a time in a copy of the tree: names those that no test notices (a quarter of an hour).
mutants: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py --jobs 2

# Every parser of ours on thousands of damaged and invented inputs, others each time (some ten minutes).
fuzz: $(VENV)/.installed-dev
	INGOT_FUZZ=2000 $(BIN)/python -m pytest -q tests/contracts/test_parsers.py --timeout 3600

# Known vulnerabilities of the versions that are tested together; asks PyPI, and fails where that does not answer.
audit: $(VENV)/.installed-dev
	$(BIN)/pip-audit --strict --disable-pip --no-deps --progress-spinner off -r flows/constraints.txt

# Ratios against named baselines, measured in one run each.
bench: $(VENV)/.installed-dev
	for file in $(filter-out tests/bench/bench_gpu.py,$(wildcard tests/bench/bench_*.py)); do $(BIN)/python $$file || exit 1; done

# The same on a CUDA machine; without one it says so and exits with 2.
bench-gpu:
	@PYTHONPATH=. $(PYTHON) tests/bench/bench_gpu.py

# LAMB, AdamW and LARS while the batch grows 16-fold: hours on two cores, in parts of 25 minutes; call it until it is done.
bench-large-batch: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/large_batch.py --minutes 25

# LISA beside full AdamW and LoRA: quality, memory and time; about half an hour, in parts that go on.
bench-lisa: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/lisa_quality.py --minutes 25

# Write the pages of docs/reference that are made from the code.
docs: $(VENV)/.installed
	$(BIN)/python infra/reference_pages.py

# Make the pictures and tables of README and docs anew, from the newest run of the demo. Needs Chromium.
pictures: $(VENV)/.installed-dev
	$(BIN)/python infra/pictures/make.py

clean:
	rm -rf $(VENV) .ingot data .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.installed: pyproject.toml flows/constraints.txt
	@echo "Setting up $(VENV) (a few minutes, once) ..."
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) -e '.[dev]'
	@touch $@
