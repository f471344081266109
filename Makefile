# The entry points. Each target that needs the environment brings it up to date first, which costs nothing when it is.

PYTHON ?=
export PYTHON
# Programs that tests start would compile our files anew, each of them, where this is set: half a minute of the tests.
unexport PYTHONDONTWRITEBYTECODE
PY := .venv/bin/python
GPU_PYTHON := $(or $(PYTHON),python3)
SOURCES := $(CURDIR)/packages/mics-kernels/src:$(CURDIR)/packages/mics-core/src:$(CURDIR)/packages/mics-models/src

.PHONY: $(shell awk -F: '/^[a-z0-9-]+:/ {print $$1}' $(MAKEFILE_LIST))

help: ## Print this list; PYTHON=python3.12 names the interpreter, ARGS="..." goes to the command that runs.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-17s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Build .venv with the locked versions, without CUDA where there is no GPU: half a minute, and the downloads.
	@tools/setup.sh

# On a busy machine OpenMP's threads otherwise burn the time slices of those they wait for: seven times slower, measured.
PATIENT := OMP_WAIT_POLICY=passive

# Ranks wait for each other most of the time: a second process of tests uses the cores meanwhile.
PYTEST := $(PATIENT) $(PY) -m pytest -n 2 --dist loadgroup
test: setup ## Run the tests: six minutes on 2 cores, and the same draws every time.
	@$(if $(ARGS),$(PATIENT) $(PY) -m pytest $(ARGS),$(PYTEST))

test-deep: setup ## Run everything, with more and new draws, all kills, the wheels, oldest versions: tens of minutes.
	@$(if $(ARGS),,$(MAKE) --no-print-directory test-oldest ARGS=tests)
	@$(PYTEST) --deep $(ARGS)

test-bench: setup ## Run the tests of the benchmarks' own tools: five minutes.
	@$(PATIENT) $(PY) -m pytest bench/tests $(ARGS)

mutants: setup ## Plant small faults in the packages one by one, and tell which the tests find: tens of minutes.
	@$(PATIENT) $(PY) tests/mutants/plant.py $(ARGS)

# torch comes as the package index has it, with CUDA's libraries, which it wants without a GPU, too: uv takes a third of
# the time that pip does. The interpreter of Triton 3.6 fails on numpy 2.4.
OLDEST := torch==2.11.0 triton==3.6.0 numpy==2.3.5
OLDEST_AT := $(CURDIR)/.venv/oldest-$(subst $() ,-,$(subst ==,-,$(OLDEST)))
# Always the same tests, in some 100 s: kernels, and of every folder what leans most on torch.
OLDEST_TESTS := tests/kernels tests/core/test_one_rank.py tests/core/test_many_ranks.py tests/ranks/test_worlds.py \
	tests/ranks/test_lifecycle.py tests/ranks/test_models.py::test_precision \
	tests/ranks/test_training.py::test_five_steps_are_those_of_one_process tests/checkpoint/test_resharding.py \
	tests/checkpoint/test_contents.py tests/models/test_gpt.py
test-oldest: setup ## Run tests on the oldest versions supported, torch 2.11 and Triton 3.6 (4.6 GB); ARGS=tests: all.
	@test -e $(OLDEST_AT)/complete || { \
		echo "test-oldest installs $(OLDEST) and what they need: 2 GB to download, 4.6 GB in $(OLDEST_AT)"; \
		$(PY) -m uv pip install --quiet --target $(OLDEST_AT) $(OLDEST) && touch $(OLDEST_AT)/complete; }
	@PYTHONPATH=$(OLDEST_AT) $(PY) -c 'import torch, triton, numpy; \
		found = [torch.__version__.partition("+")[0], triton.__version__, numpy.__version__]; \
		assert found == "$(OLDEST)".replace("==", " ").split()[1::2], found; \
		print(f"test-oldest runs on torch {torch.__version__}, Triton {found[1]} and numpy {found[2]}")'
	@PYTHONPATH=$(OLDEST_AT) $(PYTEST) $(or $(ARGS),$(OLDEST_TESTS))

lint: setup ## Check style and formatting.
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

types: setup ## Check the types of the three packages, strictly.
	@$(PY) -m mypy

contracts: setup ## Check which package may import which.
	@.venv/bin/lint-imports --no-logo

check: lint types contracts ## Run lint, types and contracts: a minute.

format: setup ## Format the code and repair what the linter can.
	@$(PY) -m ruff check --fix-only
	@$(PY) -m ruff format

bench: setup ## Run every benchmark that the machine allows, and renew the tables: 20 minutes on 2 cores.
	@$(PY) -m bench.all $(ARGS)

bench-planner: setup ## Measure what planning itself costs, and a step of 16,384 ranks simulated: half a minute.
	@$(PY) -m bench.planner $(ARGS)

bench-wires: setup ## Measure the emulated wires against what they are asked to be (needs root): a quarter of a minute.
	@$(PY) -m bench.wires $(ARGS)

bench-kernels: setup ## Measure each kernel against the best torch idiom for the same work: two minutes.
	@$(PY) -m bench.kernels $(ARGS)

bench-host: setup ## Measure what the runtime costs the host for each unit, against FSDP2: half a minute.
	@$(PY) -m bench.host $(ARGS)

bench-training: setup ## Measure training steps on this machine, against plain PyTorch, DDP and FSDP2: two minutes.
	@$(PY) -m bench.training $(ARGS)

bench-links: setup ## Measure how much of a slow link the transfers between emulated nodes use (needs root): two minutes.
	@$(PY) -m bench.links $(ARGS)

bench-peers: setup ## Measure a training step on emulated nodes against the peers (needs root): six minutes.
	@$(PY) -m bench.scenes peers-100 peers-400 peers-large $(ARGS)

bench-scenes: setup ## Measure all scenes on emulated nodes: peers, scaling, what each mechanism brings (needs root): 23 minutes.
	@$(PY) -m bench.scenes $(ARGS)

bench-checkpoints: setup ## Measure checkpoints against the disk, and what a background save costs: a minute.
	@$(PY) -m bench.checkpoints $(ARGS)

bench-report: setup ## Renew the measured tables of README and docs from the results.
	@$(PY) -m bench.report $(ARGS)

# A rented GPU machine often has torch and no network: whatever PYTHON already has is used as it is.
gpu-check: ## Check and measure this machine's GPUs, on PYTHON as it is where that has all: nine minutes; PART=2, or all.
	@if $(GPU_PYTHON) -c 'import einops, hypothesis, pytest, pytest_benchmark, safetensors, torch, triton' 2>/dev/null; \
	then py=$(GPU_PYTHON); else tools/setup.sh && py=$(PY) || exit 1; fi; \
	PYTHONPATH=$(SOURCES):$(CURDIR) $$py -m bench.gpu_check $(addprefix --part ,$(PART)) $(ARGS)

# Four CPU ranks stand for two nodes of two, so that partition groups of two and both hops have something to do.
GPUS = $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
RANKS = $(or $(filter-out 0,$(GPUS)),4)
PLACED = $(if $(filter 0,$(GPUS)),sharding.ranks_per_node=2,batch.samples=$(shell echo $$((4 * $(GPUS)))))
pretrain: setup ## Train a small GPT on the sources of Python's standard library: three minutes on 2 cores.
	@echo "$(RANKS) ranks start, which takes some 10 seconds on 2 cores: each is a process that imports torch"
	@$(PATIENT) OMP_NUM_THREADS=1 $(PY) -m mics_models.training.launch --standalone --nproc-per-node $(RANKS) \
		--shutdown-timeout 300 --signals-to-handle SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 -m mics_models.pretrain $(PLACED) $(ARGS)

dist: setup ## Build the wheels and source archives into dist/, and try the wheels in an empty environment.
	@rm -rf dist
	@for package in packages/*; do $(PY) -m build -qq --no-isolation --outdir dist $$package || exit 1; done
	@$(PY) -m pytest --deep tests/repository/test_wheels.py --wheels dist

# The lock holds for every machine, so it names the CUDA libraries, too; tools/setup.sh leaves them out without a GPU.
# Pins stay as they are where they can: ARGS=--upgrade renews them all.
lock: setup ## Pin all versions in requirements.lock, from the packages' ranges and the dev group.
	@.venv/bin/uv pip compile --quiet --universal --no-annotate --all-extras --custom-compile-command 'make lock' \
		--group pyproject.toml:dev $(wildcard packages/*/pyproject.toml) \
		$(patsubst packages/%,--no-emit-package %,$(wildcard packages/*)) --output-file requirements.lock $(ARGS)

clean: ## Remove the environment, the built packages and every cache.
	@rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
