# make demo   the experiment on the pocket model, and where its report is
# make methods  every base method, plainly and meta-unlearned, on both pocket models, into reports/methods-*
# make attacks  every attack, by training and by prompts, on three trainings of each model and, in short, on the sibling, into reports/attacks-pocket, reports/attacks-pocket-sdxl
# make paper  the paper's grid of notebooks, into reports/<model>: make paper MODEL=pocket SEEDS="0 1 2" MACHINE=laptop (a folder of notebooks/machines), which is what it does by itself;
#             SEEDS=0 is one training of each model; with DRY=1 only how many notebooks that would run, and for how long
# make ablations  trainings of the pocket model that differ in one thing each, into reports/pocket/ablations; SEEDS, MACHINE and DRY as with make paper
# make test   the tests
# All of them set up .venv first, once. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
CORES ?= 2
MODEL ?= pocket
MACHINE ?= laptop
DRY ?=
BIN := .venv/bin
# what is said from outside is text: neither make nor the shell reads it for more than that
override MODEL := $(value MODEL)
override SEEDS := $(or $(value SEEDS),$(if $(filter pocket,$(MODEL)),0 1 2,0))
override MACHINE := $(value MACHINE)
export MODEL SEEDS MACHINE
# the pocket models are here; others are fetched
ifneq ($(filter pocket%,$(MODEL)),)
export HF_HUB_OFFLINE ?= 1
endif
export TOKENIZERS_PARALLELISM := false
export IPYTHONDIR := $(CURDIR)/.venv/ipython

HOW = --nolock --rerun-incomplete --rerun-triggers mtime params input --quiet host progress reason rules
EXPERIMENT = $(BIN)/snakemake --cores $(CORES) $(HOW)
# a machine's profile says how many cores, unless CORES is said
GRID = $(BIN)/snakemake $(if $(filter file,$(origin CORES)),,--cores $(CORES)) $(HOW) --keep-going --profile "notebooks/machines/$$MACHINE" \
	--configfile notebooks/profiles/$@.yaml --config model="$$MODEL" seeds="$$SEEDS"

.PHONY: demo methods attacks paper ablations test

demo: .venv/installed
	@$(EXPERIMENT) --configfile notebooks/profiles/pocket-demo.yaml
	@echo "The report: file://$(CURDIR)/reports/demo/index.html"

methods: .venv/installed
	@$(EXPERIMENT) --configfile notebooks/profiles/methods-pocket.yaml
	@$(EXPERIMENT) --configfile notebooks/profiles/methods-pocket-sdxl.yaml

attacks: .venv/installed
	@$(EXPERIMENT) --configfile notebooks/profiles/attacks-pocket.yaml
	@$(EXPERIMENT) --configfile notebooks/profiles/attacks-pocket-sdxl.yaml
	@echo "The report: file://$(CURDIR)/reports/attacks-pocket/index.html"

# what only large models and clusters need: the extras of pyproject.toml
paper: $(if $(DRY),,$(if $(filter sd-v1-4 sdxl,$(MODEL)),.venv/with-measures))
paper ablations: .venv/installed $(if $(filter slurm,$(MACHINE)),.venv/with-slurm)
	@test -f "notebooks/machines/$$MACHINE/config.yaml" || { echo "error: unknown MACHINE '$$MACHINE': allowed are $(notdir $(wildcard notebooks/machines/*)), or a folder of your own beside them" >&2; exit 1; }
	@$(if $(DRY),$(BIN)/python -m mu.notebooks.forecast) $(GRID)
	@$(if $(DRY),,echo "The report: file://$(CURDIR)/reports/$$MODEL/index.html")

test: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(CORES) --dist loadfile

.venv/with-%: .venv/installed
	@$(BIN)/python -m pip install -qq -e ".[$*]"
	@$(BIN)/python -c 'import importlib.util as i; i.find_spec("torchvision") and __import__("torchvision")' 2>/dev/null || { $(BIN)/python -m pip uninstall -qq -y torchvision; \
		echo "error: the index has a torchvision of another build than torch, with which nothing would run; it was taken out again: install both from one index, then: touch $@" >&2; exit 1; }
	@touch $@

# nudenet (AGPL-3.0) is there for the tests. torchvision, torch-fidelity and lpips lie apart: a torchvision of another build than torch breaks every import of
# transformers, and only the tests of FID and LPIPS look there. pip is quiet and leaves nothing outside .venv; torch goes first, so that whatever build the index offers is the one that stays
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mu needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=...")'
	@echo "Setting up .venv (once, some minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq torch==2.13.0
	@$(BIN)/python -m pip install -qq -e ".[dev,recipe,gpu,nudenet]"
	@$(BIN)/python -m pip install -qq --no-deps --target .venv/measures torchvision==0.28.0 torch-fidelity==0.4.0 lpips==0.1.4
	@touch $@
