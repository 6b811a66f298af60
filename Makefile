# Both targets are complete from a fresh clone: they make a virtual environment, install into it and run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BINDINGS := $(VENV)/bindings
RESOURCE_MODELS := $(VENV)/resource_models
QUICKSTART ?= quickstart

.PHONY: quickstart test lint types unit example clean

quickstart: $(INSTALLED)
	$(BIN)/trtdeploy quickstart --output $(QUICKSTART)

test: lint types unit

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

# Two files at a time: much of a test is waiting for processes and servers to start.
unit: $(INSTALLED) $(BINDINGS) $(RESOURCE_MODELS)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The Python bindings of TensorRT 10 and 11, without the libraries: what the contract tests hold the code against.
$(BINDINGS): tests/contract/fetch_bindings.py $(INSTALLED)
	$(BIN)/python tests/contract/fetch_bindings.py $@
	touch $@

# What KServe and the Prometheus operator publish of their resources: what the manifests in docker/ are held against.
$(RESOURCE_MODELS): tests/project/published_models.py $(INSTALLED)
	$(BIN)/python tests/project/published_models.py $@
	touch $@

# The checked-in example, from what `make quickstart` has built; its plan stays out of version control.
example: $(INSTALLED)
	rm -rf model_repository/efficientnet_b0_digits
	$(BIN)/trtdeploy package $(QUICKSTART)/model.plan --name efficientnet_b0_digits --repository model_repository

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("trtdeploy needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[training,modelopt,triton,server,rtx,report,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(QUICKSTART) .mypy_cache .pytest_cache .ruff_cache
