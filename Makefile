# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run in as many processes, of a thread each; a process takes about 1 GB.
JOBS ?= 2

.PHONY: demo test test-all fuzz lint types aot bench bench-large tiny-model qwen3-model install clean

demo: install
	$(BIN)/hfprune demo

# The fast tests, in under 6 minutes on 2 idle cores.
test: $(VENV)/.dev install lint types
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow"

# All tests, five minutes of the fuzz among them: what CI runs.
test-all: $(VENV)/.dev install lint types
	HFPRUNE_FUZZ_SECONDS=300 $(BIN)/pytest -n $(JOBS) --dist worksteal

# Five minutes of commands on mutated files; of the other tests it is half a minute.
fuzz: $(VENV)/.dev install
	HFPRUNE_FUZZ_SECONDS=300 $(BIN)/pytest -n $(JOBS) tests/test_fuzz.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --style=file:csrc/.clang-format --dry-run --Werror csrc/*.cpp csrc/*.h tests/csrc/*.cpp tests/csrc/*.h

# From tests/, so that mypy sees the installed package and not the source tree, where kernels/ is not
# yet hfprune_fast.kernels.
types: $(VENV)/.dev install
	cd tests && ../$(BIN)/mypy --config-file ../pyproject.toml -p hfprune_fast

# Every kernel for every architecture, without a GPU: registers, shared memory, spills, wide loads and
# stores. About a minute on 2 cores.
aot: install
	$(BIN)/python tools/aot.py

# Every operation beside its peers at sizes for a CPU, in under 10 minutes on 2 idle cores: writes
# bench/results/<machine>-<date>.json and .md, from which `python bench/reporting/report.py` makes
# docs/benchmarks.md.
BENCH = CUDA_VISIBLE_DEVICES= $(BIN)/pytest bench -v --rows bench/results --benchmark-columns=median,iqr,rounds

bench: $(VENV)/.bench install
	$(BENCH) --small

# A checkpoint of 5 GB, scored resident and streamed: a quarter of an hour; <machine>-<date>-large.json.
bench-large: $(VENV)/.bench install
	HFPRUNE_LARGE=1 $(BENCH) --small --rows-suffix=-large -k from_disk

# Trains the model that ships with the package again, beside it; about a quarter of an hour on 2 cores.
tiny-model: $(VENV)/.runtime
	rm -rf build/tiny
	$(BIN)/python tools/tiny_model.py --out build/tiny

# A trained model of another family and shape, which does not ship; about a quarter of an hour too.
qwen3-model: $(VENV)/.runtime
	rm -rf build/qwen3
	$(BIN)/python tools/tiny_model.py --family qwen3 --out build/qwen3

# The package itself, as users get it: built and copied, not editable. Needs no network.
install: $(VENV)/.runtime
	rm -rf build/lib build/bdist*
	$(BIN)/pip install --quiet --no-index --no-deps --no-build-isolation --force-reinstall .

$(VENV)/.runtime: pyproject.toml constraints.txt
	@echo "installing into $(VENV); torch is large, this takes a minute or more"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt setuptools pybind11 cmake ninja
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.runtime
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
