# make demo   train FFL on real digits, from nothing but Python ≥ 3.10
# make test   the whole test suite, with its own set-up
# make lint   ruff and mypy alone
# make clean  the virtual environments and what they left

PYTHON ?= python3
VENV := .venv
BARE := .venv-bare
CORE_TESTS := test_bare_install.py test_graph.py test_distill_loss.py test_distill_loss_rows.py \
	test_distill_loss_composition.py test_fuse_features.py test_cohort.py test_compat.py
PIP := -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint bare clean

$(VENV)/base: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fflfast needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; say make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing PyTorch into $(VENV) (a few minutes, some gigabytes)"
	$(VENV)/bin/python $(PIP) --constraint constraints.txt torch torchvision
	touch $@

$(VENV)/train: $(VENV)/base pyproject.toml
	$(VENV)/bin/python $(PIP) --constraint constraints.txt --editable '.[train]'
	touch $@

$(VENV)/dev: $(VENV)/base pyproject.toml
	$(VENV)/bin/python $(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/train

# torch and numpy alone: what `pip install .` promises to need.
$(BARE)/installed: constraints-bare.txt pyproject.toml
	$(PYTHON) -m venv --clear $(BARE)
	$(BARE)/bin/python $(PIP) --constraint constraints-bare.txt torch numpy pytest
	touch $@

# One thread: on images this small a second one gains little on an idle machine, and on a busy one the threads spend
# their time waiting for each other.
demo: $(VENV)/train
	OMP_NUM_THREADS=1 $(VENV)/bin/fflfast train --data digits --arch resnet20 --arch resnet20 --method ffl --baseline \
		--out runs/demo-$$(date +%Y%m%d-%H%M%S)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bare: $(BARE)/installed
	$(BARE)/bin/python $(PIP) --force-reinstall --no-deps .
	cd tests && ../$(BARE)/bin/python -m pytest -p no:cacheprovider -c /dev/null --rootdir . $(CORE_TESTS)

test: lint bare
	$(VENV)/bin/python -m pytest

clean:
	rm -rf $(VENV) $(BARE) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
