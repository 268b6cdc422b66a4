# `make help` lists what people use. Each target makes the environment that it needs.
PYTHON ?= python3
VENV ?= .venv
# Exact versions for `make test`; none are the newest.
PINS ?= tests/pins.txt
# Folder of an environment's programs.
bin = $(1)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(call bin,$(VENV))
UV = UV_SYSTEM_CERTS=1 $(BIN)/uv
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Files of tests by their names, whatever folder they are in.
tests = $(foreach name,$(1),$(wildcard tests/*/test_$(name).py tests/*/*/test_$(name).py))

# Environments of `make reference`: the newest transformers, the last that optimum takes, the last that has diverse beams and
# contrastive search in its core, and the lowest versions of all.
REFERENCE := build/reference
OPTIMUM := build/peers/python
FORMER := build/former
LOWEST := build/lowest
# Environment of `make site`.
MKDOCS := build/mkdocs

.PHONY: help demo test lint types unit reference system lowest golden newest pins peers fuzz bench docs site clean

help:
	@sed -n 's/^\([a-z]*\):.*## /make \1: /p' Makefile

demo: $(VENV)/demo-installed  ## export the embedded model and let it tell a story
	@echo "2/3 Exporting tales, the embedded model, to build/tales"
	@$(BIN)/gpt2onnx export tales build/tales --force
	@echo "3/3 Generating"
	@$(BIN)/gpt2onnx generate "Once upon a time" -m build/tales --echo --temperature 0.6 --top-p 0.9 --seed 36 --max-new-tokens 147
	@echo "Now yours: $(BIN)/gpt2onnx generate -m build/tales \"Once upon a time\""

test: lint  ## lint, types and tests, with the versions of tests/pins.txt, without PyTorch
	$(MAKE) --jobs=2 types unit

# What 4.57 can judge as a whole; the other files have comparisons that only 5 can make.
OPTIMUM_TESTS := checkpoint_tokenizers checkpoints generation graph portable reference tokenizer

# What only an older transformers can answer.
FORMER_TESTS := contrastive_search diverse_beams

reference: system lowest $(REFERENCE)/installed $(OPTIMUM)/installed $(FORMER)/installed  ## compare with PyTorch and other runtimes; run whole programs, and the lowest versions
	$(MAKE) types SYSTEMS='linux darwin win32'
	$(call bin,$(REFERENCE))/python $(PYTEST) --golden check
	GPT2ONNX_PEERS=build/peers $(call bin,$(OPTIMUM))/python $(PYTEST) --golden live $(call tests,$(OPTIMUM_TESTS))
	GPT2ONNX_PEERS=build/peers $(BIN)/python $(PYTEST) -k 'not transformers.js' $(call tests,other_runtimes)
	$(call bin,$(FORMER))/python $(PYTEST) --golden check $(call tests,$(FORMER_TESTS))

newest:  ## `make test` with the newest packages that pyproject.toml allows
	rm -f build/newest/installed
	$(MAKE) test VENV=build/newest PINS=

bench: $(VENV)/system-installed  ## side by side with other runtimes; about an hour the first time
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.report

# Parts of these, and what developers need now and then.

lint: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/cog --check -I . docs/cli.md docs/precision.md docs/python.md
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/tests.yml deploy/ci.yml

# Types are checked for this system; `make reference` names them all.
SYSTEMS = $(shell $(PYTHON) -c "import sys; print(sys.platform)")
# The installed package is checked from another folder, which also proves that it is whole. What mypy remembers holds for one system.
MYPY = "$(abspath $(BIN))/mypy" --config-file ../../pyproject.toml --strict --cache-dir ../mypy/$(1) --platform $(1)
types: $(VENV)/installed
	rm -rf build/site build/lib
	$(UV) pip install --quiet --no-deps --python $(VENV) --target build/site .
	cd build/site && for system in $(SYSTEMS); do $(call MYPY,$$system) -p gpt2onnx || exit; done
	cd build/site && PYTHONPATH=. $(call MYPY,$(firstword $(SYSTEMS))) ../../tests/project/typed_use.py
	cd build/site && PYTHONPATH=. "$(abspath $(BIN))/lint-imports" --config ../../pyproject.toml --no-cache

# Two files at a time: many tests wait, for servers, for signals, for their own processes.
unit: $(VENV)/installed
	$(BIN)/python $(PYTEST)

# Whole programs from outside: kits, wheels, a cluster, pages in a browser, every example of the docs; killed, stopped or overloaded.
system: $(VENV)/system-installed
	$(BIN)/python $(PYTEST) -m system

# The lowest versions that pyproject.toml allows, and what can be tested with them.
LOWEST_TESTS := batching bundle cli_errors faults hub isolation jobs session speculation streaming

lowest: $(VENV)/installed $(LOWEST)/installed
	GPT2ONNX_LOWEST=$(call bin,$(LOWEST))/python $(BIN)/python -m pytest tests/project/test_lowest.py
	$(call bin,$(LOWEST))/python $(PYTEST) $(call tests,$(LOWEST_TESTS))

# Asks PyTorch and transformers anew, and writes their answers to tests/golden.
golden: $(REFERENCE)/installed $(FORMER)/installed
	$(call bin,$(REFERENCE))/python tests/golden/make_torch_files.py
	$(call bin,$(REFERENCE))/python $(PYTEST) --golden write
	$(call bin,$(FORMER))/python $(PYTEST) --golden write $(call tests,$(FORMER_TESTS))

# Writes the newest versions that pyproject.toml allows, for all systems and Pythons, to tests/pins.txt.
pins: $(VENV)/uv-installed
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --extra system --no-header --no-annotate \
		--output-file tests/pins.txt pyproject.toml

# The bundle in optimum, onnxruntime-genai and transformers.js, and the server's clients: needs Node and the npm registry, too.
peers: $(VENV)/installed $(OPTIMUM)/installed
	GPT2ONNX_PEERS=build/peers $(BIN)/python -m pytest -s tests/project/test_other_runtimes.py tests/serving/test_real_clients.py

# Damaged, hostile and absurd input, N of each kind, faults at every step, every byte flipped: docs/reliability.md.
N ?= 5000
fuzz: $(VENV)/installed
	GPT2ONNX_FUZZ=$(N) GPT2ONNX_FAULTS=2000 GPT2ONNX_FLIPS=all $(BIN)/python -m pytest -s -m 'not slow' \
		tests/*/test_fuzz_*.py tests/*/*/test_fuzz_*.py \
		tests/exporter/test_faults.py tests/exporter/checkpoint/test_formats.py tests/models/test_bundle.py

# Writes what docs/cli.md, docs/guide.md and docs/python.md show anew, from the commands and docstrings themselves.
docs: $(VENV)/installed
	$(BIN)/cog -r -I . docs/cli.md docs/guide.md docs/precision.md docs/python.md

# The docs as a site, in build/docs; a link that leads nowhere is an error.
site: $(MKDOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(call bin,$(MKDOCS))/mkdocs build --strict

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

$(VENV)/uv-installed: | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install --quiet uv
	touch $@

# By pip, as the README says, which heeds pip's own settings; uv, which is faster, is for the tests' many packages.
$(VENV)/demo-installed: pyproject.toml
	@echo "1/3 Installing gpt2onnx and ONNX Runtime into $(VENV)"
	@test -f $(VENV)/pyvenv.cfg || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install '.[cpu,export]'
	@touch $@

# $(call install,EXTRA)
install = $(UV) pip install --quiet --python $(VENV) $(if $(PINS),--constraint $(PINS),--upgrade) --editable '.[$(1)]'

$(VENV)/installed: pyproject.toml $(PINS) | $(VENV)/uv-installed
	$(call install,dev)
	touch $@

$(VENV)/system-installed: $(VENV)/installed
	$(call install,system)
	touch $@

# PyTorch's CPU build from its own index where that can be reached; else what pip finds.
define environment
	$(UV) venv --quiet --clear --seed $(1) $(2)
	$(UV) pip install --quiet --python $(2) --torch-backend cpu torch==2.13.0 2>build/torch.log || \
		$(call bin,$(2))/python -m pip install --quiet --no-compile torch==2.13.0
endef

$(REFERENCE)/installed: pyproject.toml | $(VENV)/uv-installed
	$(call environment,--python $(PYTHON),$(REFERENCE))
	$(UV) pip install --quiet --python $(REFERENCE) --editable '.[bench,test]' 'transformers>=5.24'
	touch $@

$(OPTIMUM)/installed: pyproject.toml | $(VENV)/uv-installed
	$(call environment,--python $(PYTHON),$(OPTIMUM))
	$(UV) pip install --quiet --python $(OPTIMUM) --editable '.[test,optimum]' 'onnxruntime-genai>=0.8'
	touch $@

$(FORMER)/installed: pyproject.toml | $(VENV)/uv-installed
	$(call environment,--python $(PYTHON),$(FORMER))
	$(UV) pip install --quiet --python $(FORMER) --editable '.[test]' 'transformers==4.55.4'
	touch $@

$(LOWEST)/installed: pyproject.toml | $(VENV)/uv-installed
	$(UV) venv --quiet --clear --python 3.11 $(LOWEST)
	$(UV) pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable '.[cpu,export,energy,sweep]'
	$(UV) pip install --quiet --python $(LOWEST) hypothesis packaging pytest pytest-xdist
	touch $@

$(MKDOCS)/installed: pyproject.toml | $(VENV)/uv-installed
	$(UV) venv --quiet --clear --python $(PYTHON) $(MKDOCS)
	$(UV) pip install --quiet --python $(MKDOCS) '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build
