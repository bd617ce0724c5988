# make demo    sets up a virtual environment and runs examples/digits.py
# make test    sets up a virtual environment and runs lint, types and the tests
# make check   lint and types only
# make fix     sorts imports, repairs what ruff can repair, formats
# make matrix  lint, types and tests on all versions that are supported, and docs/versions.md; hours, see noxfile.py
# make bench   a step's cost beside the peers: benchmarks/peers.py
# make clean   removes caches and build outputs; the next command installs again
#
# Variables, e.g. `make test PYTEST_ARGS="-q tests/trainer/test_strategy.py"`:
#   PYTHON       the interpreter that the virtual environment is made with (3.10 or newer)
#   VENV         where the virtual environment is
#   PYTEST_ARGS  arguments of pytest; -n is in how many processes, each of whose tests may have two or three more
#   DEMO_ARGS    arguments of examples/digits.py
#   BENCH_ARGS   arguments of benchmarks/peers.py
#   MATRIX_ARGS  arguments of nox, e.g. MATRIX_ARGS='-s "suite(python=3.12, torch=2.14.1)"'. Interpreters are found as
#                python3.10 and so on; pyenv offers several at once with PYENV_VERSION=3.11.7:3.10.13:3.12.1:3.13.0
#   TORCH_ARGS   arguments of pip where it installs torch. The wheel that PyPI has for Linux brings CUDA, some gigabytes;
#                without a GPU: TORCH_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -q -n 3 --dist loadgroup
DEMO_ARGS ?=
BENCH_ARGS ?=
MATRIX_ARGS ?=
TORCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# Not `-c constraints.txt`: only these reach the isolated environment as well that pip builds the package in. Old
# versions of pip read the first for it, new ones the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.PHONY: demo test check fix matrix bench clean
.NOTPARALLEL:

demo: $(VENV)/.stamp-demo
	OMP_NUM_THREADS=1 $(BIN)/python examples/digits.py $(DEMO_ARGS)

test: check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.stamp-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

matrix: $(VENV)/.stamp-test
	TORCH_ARGS="$(TORCH_ARGS)" $(BIN)/python -m nox $(MATRIX_ARGS)

bench: $(VENV)/.stamp-bench
	$(BIN)/python -m benchmarks.peers $(BENCH_ARGS)

fix: $(VENV)/.stamp-test
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV)/.stamp-* build dist .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find lightning_easgd tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment that has pip is used as it is; without pip it is a half-made one. torch comes first and pinned:
# whatever variant of it is there or was chosen by TORCH_ARGS then satisfies all who require torch.
$(VENV)/.stamp-torch: constraints.txt
	@$(PIP) --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'Python >= 3.10 is needed: make PYTHON=/path/to/python3' >&2; exit 1; }; \
	  echo '$(PYTHON) -m venv $(VENV)'; \
	  $(PYTHON) -m venv $(VENV); }
	$(PIP) install $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.stamp-demo: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(PIP) install -e ".[examples]"
	@touch $@

$(VENV)/.stamp-test: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(PIP) install -e ".[dev,examples]"
	@touch $@

$(VENV)/.stamp-bench: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(PIP) install -e ".[dev,examples,bench]"
	@touch $@
