# make demo   the walk on the pocket model, and where its report is
# make pocket the same with three trainings of each model, controls and more attacks: two hours, into reports/pocket-full
# make methods  every base method, plainly and meta-unlearned, on both pocket models, into reports/methods-*; how much a shared trajectory costs
# make attacks  every attack, by training and by prompts, on the models of make pocket (which it trains if they are not there) and, in short, on the sibling, into reports/attacks-pocket, reports/attacks-pocket-sdxl
# make test   the tests
# Both set up .venv first, once. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
CORES ?= 2
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
export IPYTHONDIR := $(CURDIR)/.venv/ipython

WALK = $(BIN)/snakemake --cores $(CORES) --nolock --rerun-incomplete --rerun-triggers mtime params input --quiet host progress reason rules

.PHONY: demo pocket methods attacks test

demo: .venv/installed
	@$(WALK) --configfile notebooks/profiles/pocket-demo.yaml
	@echo "The report: file://$(CURDIR)/reports/pocket/index.html"

pocket: .venv/installed
	@$(WALK) --configfile notebooks/profiles/pocket.yaml
	@echo "The report: file://$(CURDIR)/reports/pocket-full/index.html"

methods: .venv/installed
	@$(WALK) --configfile notebooks/profiles/methods-pocket.yaml
	@$(WALK) --configfile notebooks/profiles/methods-pocket-sdxl.yaml
	@$(WALK) --configfile notebooks/profiles/ablation-trajectory.yaml

attacks: .venv/installed
	@$(WALK) --configfile notebooks/profiles/pocket.yaml --until 21_meta_unlearn-0 21_meta_unlearn-1 21_meta_unlearn-2
	@$(WALK) --configfile notebooks/profiles/attacks-pocket.yaml
	@$(WALK) --configfile notebooks/profiles/attacks-pocket-sdxl.yaml
	@echo "The report: file://$(CURDIR)/reports/attacks-pocket/index.html"

test: .venv/installed
	@$(BIN)/pytest -q

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
