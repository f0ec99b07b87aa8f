# make demo   train FFL on real digits, from nothing but Python ≥ 3.10
# make test   the whole test suite, with its own set-up
# make lint   ruff and mypy alone
# make bench  the operators' benchmarks on this machine, what share of a training step they are, and how fast it trains
# make paper  train the published CIFAR-100 runs and write their table (DATA_DIR=D with cifar-100-binary in it); goes on
#             where it was interrupted
# make table  the same for every method, on ResNet-32 and WRN-20-8, by its own recipe and by a common one (ONLY=ffl,dml,
#             MINUTES=25: save and stop in time, exit code 3)
# make pose   OKDHP on Leeds Sports Pose at a CPU's budget (DATA_DIR=D with joints.json and images)
# make gpu    on a machine with a GPU: build, tests, race and memory checks, benchmarks; results go to $OUT
#             (STAGES=build,doctor,… for some of it, MINUTES=9.5 where a machine is lent for ten; docs/gpu.md)
# make clean  the virtual environments and what they left

PYTHON ?= python3
VENV := .venv
BARE := .venv-bare
OLDEST := .venv-oldest
WHEEL := build/wheel
# Its PyTorch comes with CUDA's libraries: 7 GB installed, and the archives beside them meanwhile.
OLDEST_NEEDS_KB := 12000000
# What needs neither an extra nor Triton.
CORE_TESTS := test_bare_install.py test_graph.py test_distill_loss.py test_distill_loss_rows.py \
	test_distill_loss_composition.py test_drop_in.py test_doctor.py test_doctor_fusion.py test_fuse_features.py \
	test_fusion_operator.py test_fusion_composition.py test_fusion_stages.py test_fusion_cpu.py test_cohort.py test_compat.py
# What tells whether one build of the kernels works with another PyTorch.
KERNEL_TESTS := test_distill_loss.py test_distill_loss_rows.py test_fusion_stages.py test_fusion_cpu.py
# A file's tests stay in one process: what they share is made once.
PROCESSES := --numprocesses auto --maxprocesses 4 --dist loadfile
PIP := -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint wheel bare oldest oldest-tests oldest-if-room bench paper table pose gpu clean

$(VENV)/base: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fflfast needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; say make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing PyTorch into $(VENV) (a few minutes, some gigabytes)"
	$(VENV)/bin/python $(PIP) --constraint constraints.txt torch torchvision setuptools ninja
	touch $@

# The kernels are built with the torch that is there, which pip's isolated builds cannot see.
$(VENV)/train: $(VENV)/base pyproject.toml
	FFLFAST_BUILD=$${FFLFAST_BUILD:-auto-cpu} PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
		$(VENV)/bin/python $(PIP) --no-build-isolation --constraint constraints.txt --editable '.[train]'
	touch $@

$(VENV)/dev: $(VENV)/base pyproject.toml setup.py $(wildcard csrc/*.h csrc/*/*)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
		$(VENV)/bin/python $(PIP) --no-build-isolation --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/train

$(OLDEST)/installed: constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python $(PIP) --constraint constraints-oldest.txt torch numpy pytest
	touch $@

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

# One wheel, built with the newest torch, for the two environments below.
wheel: $(VENV)/dev
	rm -rf $(WHEEL)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
		$(VENV)/bin/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir $(WHEEL) .

bare: $(BARE)/installed wheel
	$(BARE)/bin/python $(PIP) --force-reinstall --no-deps $(WHEEL)/*.whl
	cd tests && FFLFAST_TEST_BACKENDS='reference cpu' ../$(BARE)/bin/python -m pytest -p no:cacheprovider -c /dev/null --rootdir . $(CORE_TESTS)

oldest: wheel
	@$(MAKE) --no-print-directory oldest-tests

oldest-tests: $(OLDEST)/installed
	$(OLDEST)/bin/python $(PIP) --force-reinstall --no-deps $(WHEEL)/*.whl
	cd tests && FFLFAST_TEST_BACKENDS='reference cpu' ../$(OLDEST)/bin/python -m pytest -p no:cacheprovider -c /dev/null --rootdir . $(KERNEL_TESTS)

# One version of PyTorch more must not cost a small machine all of its tests.
oldest-if-room: wheel
	@if [ -e $(OLDEST)/installed ] || [ "$$(df -Pk . | awk 'NR == 2 { print $$4 }')" -ge $(OLDEST_NEEDS_KB) ]; then \
		$(MAKE) --no-print-directory oldest-tests; \
	else \
		echo "NOT RUN: the tests with the oldest PyTorch need $(OLDEST_NEEDS_KB) kB of disk here, and less is free" \
			"(make oldest tries all the same)"; \
	fi

test: lint bare oldest-if-room
	FFLFAST_TEST_BACKENDS='reference cpu triton emulated' $(VENV)/bin/python -m pytest $(PROCESSES)

bench: $(VENV)/dev
	$(VENV)/bin/python -m benchmarks.loss
	$(VENV)/bin/python -m benchmarks.fusion
	$(VENV)/bin/python -m benchmarks.augment
	$(VENV)/bin/python -m benchmarks.step_share
	$(VENV)/bin/python -m benchmarks.train
	$(VENV)/bin/python -m benchmarks.train.alternatives

paper: $(VENV)/dev
	$(VENV)/bin/python -m benchmarks.paper $(if $(DATA_DIR),--data-dir $(DATA_DIR)) $(if $(MINUTES),--minutes $(MINUTES))

table: $(VENV)/dev
	$(VENV)/bin/python -m benchmarks.table $(if $(DATA_DIR),--data-dir $(DATA_DIR)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(MINUTES),--minutes $(MINUTES))

pose: $(VENV)/dev
	$(VENV)/bin/python -m benchmarks.pose $(if $(DATA_DIR),--data-dir $(DATA_DIR)) $(if $(MINUTES),--minutes $(MINUTES))

gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(STAGES),--stages $(STAGES)) $(if $(OUT),--out $(OUT)) \
		$(if $(MINUTES),--minutes $(MINUTES)) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(BUNDLE),--bundle)

clean:
	rm -rf $(VENV) $(BARE) $(OLDEST) build dist *.egg-info fflfast/*.so .pytest_cache .mypy_cache .ruff_cache
