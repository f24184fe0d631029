# make demo | test | lint | wheel | clean.  Another Python: make PYTHON=python3.12 test.  Another place: make VENV=../venv test
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# One stamp per kind of installation, so that only a changed pyproject.toml installs again.
DEV := $(VENV)/.installed-dev
# The demo needs the base dependencies only; an installation for development holds them too.
BASE := $(if $(wildcard $(DEV)),$(DEV),$(VENV)/.installed)

.DELETE_ON_ERROR: # an environment half made is no environment
.PHONY: help demo test lint wheel clean

help:
	@echo "make demo    encode and decode the bundled photographs; writes demo/"
	@echo "make test    the tests that need neither a GPU nor a network"
	@echo "make lint    ruff check, ruff format --check, codespell"
	@echo "make wheel   build dist/*.whl"
	@echo "make clean   remove what these made, $(VENV) excepted"

demo: $(BASE)
	$(BIN)/tokenizers-vis demo --out demo

test: $(DEV)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -q

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# build/ goes before and after: setuptools packs whatever an earlier build left there, deleted files included.
wheel: $(DEV)
	rm -rf build dist/*.whl
	$(BIN)/python -m pip wheel . --no-deps -w dist
	rm -rf build

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed, $(PYTHON) is older or missing: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing tokenizers_vis into $(VENV). The first time downloads up to 3 GB (torch) and takes 2 to 15 minutes."
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	@echo "Installing tokenizers_vis and its tools into $(VENV). The first time downloads up to 3 GB (torch) and takes 2 to 15 minutes."
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@
