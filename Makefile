# Run "make help" for the targets and their variables.

PYTHON ?= python3
CORES ?= 2
MODEL ?= pocket
MACHINE ?= laptop
DRY ?=
BIN := .venv/bin
# Variables from the command line are literal text: neither make nor the shell expands them.
override MODEL := $(value MODEL)
override SEEDS := $(or $(value SEEDS),$(if $(filter pocket%,$(MODEL)),11 12 13,0))
override MACHINE := $(value MACHINE)
override REPOSITORY := $(value REPOSITORY)
export MODEL SEEDS MACHINE REPOSITORY
# The repository contains the pocket models; other models are downloaded.
ifneq ($(filter pocket%,$(MODEL)),)
export HF_HUB_OFFLINE ?= 1
endif
export TOKENIZERS_PARALLELISM := false
export IPYTHONDIR := $(CURDIR)/.venv/ipython

FLAGS = --nolock --rerun-incomplete --rerun-triggers mtime params input \
	--quiet host progress reason rules
EXPERIMENT = $(BIN)/snakemake --cores $(CORES) $(FLAGS)
# The machine's profile sets the number of cores, unless CORES is given.
GRID = $(BIN)/snakemake $(PART) $(if $(filter file,$(origin CORES)),,--cores $(CORES)) $(FLAGS) \
	--keep-going --profile "notebooks/machines/$$MACHINE" \
	--configfile notebooks/profiles/$(PROFILE).yaml --config model="$$MODEL" seeds="$$SEEDS"
PROFILE = $@
REPORT = reports/$$MODEL
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -q

.PHONY: help demo methods attacks paper ablations lint test-core test stress book

help: ## List the targets (default)
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p; s/^## ?(.*)/\1/p' Makefile | awk -F'|' \
		'NF == 2 {printf "%-16s %s\n", $$1, $$2; next} {print}'

demo: .venv/installed ## Run all notebooks on the pocket model; report in reports/demo
	@$(EXPERIMENT) --configfile notebooks/profiles/pocket-demo.yaml
	@echo "The report: file://$(CURDIR)/reports/demo/index.html"

paper: ## Reproduce the paper's experiments; about 33 hours for MODEL=pocket
methods: ## Compare the methods, a part of make paper; report in reports/methods-MODEL
ablations: ## Run the ablations; report in reports/MODEL/ablations
attacks: ## Run every attack on a defended model; about an hour for MODEL=pocket

# Large models and clusters need the extras of pyproject.toml.
paper methods: $(if $(DRY),,$(if $(filter sd-v1-4 sdxl,$(MODEL)),.venv/with-measures))
ablations: REPORT = reports/$$MODEL/ablations
attacks: REPORT = reports/attacks-$$MODEL
methods: REPORT = reports/methods-$$MODEL
methods: PROFILE = paper
methods: PART = 25_compare_methods
paper methods ablations attacks: .venv/installed $(if $(filter slurm,$(MACHINE)),.venv/with-slurm)
	@test -f "notebooks/machines/$$MACHINE/config.yaml" || { \
		echo "error: unknown MACHINE '$$MACHINE': allowed are" \
		"$(notdir $(wildcard notebooks/machines/*)); or add notebooks/machines/$$MACHINE" >&2; \
		exit 1; }
	@$(if $(DRY),$(BIN)/python -m mu.notebooks.forecast) $(GRID)
	@$(if $(DRY),,echo "The report: file://$(CURDIR)/$(REPORT)/index.html")

lint: .venv/installed ## Check style and format with ruff
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

test-core: .venv/installed ## Test the equations and the methods; about a minute
	@$(PYTEST) -n $(CORES) --dist loadfile tests/core tests/methods

# In the order of the files: the slow ones, of notebooks, are neither the first nor the last.
test: .venv/installed ## Run all tests, notebooks included; about a quarter of an hour
	@$(PYTEST) -n $(CORES) --dist loadfile --no-loadscope-reorder

stress: .venv/installed ## Kill notebooks at 20 random moments, compare with undisturbed runs
	@$(BIN)/python tests/notebooks/stress.py --kills 20

book: .venv/installed ## Write the generated parts of the notebooks, for the fork REPOSITORY if given
	@$(BIN)/python -m mu.notebooks.book $(if $(value REPOSITORY),--repository "$$REPOSITORY")

##
## Each target first sets up .venv, once. Variables (with their defaults):
##   PYTHON=python3     Python 3.11 or newer
##   CORES=2            number of cores
##   MODEL=pocket       paper, methods, ablations, attacks: a model of the grid, such as pocket or sdxl
##   SEEDS="11 12 13"   paper, methods, ablations: training seeds; 0 for other than pocket models
##   MACHINE=laptop     the same: a folder of notebooks/machines
##   REPOSITORY=        book: https://github.com/OWNER/NAME, which notebooks open on Colab
##   DRY=1              the same: print the number of notebooks and the time, run nothing

.venv/with-%: .venv/installed
	@$(INSTALL) -c constraints.txt -e ".[$*]"
	@$(BIN)/python -c 'import importlib.util as i; \
		i.find_spec("torchvision") and __import__("torchvision")' 2>/dev/null || { $(BIN)/python -m pip uninstall -qq -y torchvision; \
		echo "error: torchvision does not match the installed torch and was removed." \
		"Install a matching build, then run: touch $@" >&2; exit 1; }
	@touch $@

# uv, where it is installed, in place of pip.
UV := $(shell command -v uv)
INSTALL = $(if $(UV),$(UV) pip install -q --python $(BIN)/python,$(BIN)/python -m pip install -qq)

# nudenet (AGPL-3.0) is installed for the tests only. torchvision, torch-fidelity and lpips go to a
# folder of their own, which only the tests of FID and LPIPS import: a torchvision that does not
# match torch breaks every import of transformers. torch is installed first, so that pip keeps the
# build that the index offers. Nothing is written outside .venv but the cache of pip or uv.
# constraints.txt has the versions with which everything was tested.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"mu needs Python 3.11 or newer, not " + sys.version.split()[0] + ": make PYTHON=...")'
	@echo "Setting up .venv (once, some minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(INSTALL) -c constraints.txt torch
	@$(INSTALL) -c constraints.txt -e ".[dev,recipe,gpu,nudenet]"
	@$(INSTALL) --no-deps \
		--target .venv/measures torchvision==0.28.0 torch-fidelity==0.4.0 lpips==0.1.4
	@touch $@
