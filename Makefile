# Two commands: `make demo` shows the thing working, `make test` proves it. Both make their own environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := build/lowest
# The system's certificates, as pip takes them.
export UV_SYSTEM_CERTS := 1

.PHONY: demo test lint types unit lowest lowest-tokens lowest-tests peers fuzz bench docs clean

demo: $(VENV)/installed-demo
	$(BIN)/gpt2onnx export tales build/tales --dtype int8 --force
	$(BIN)/gpt2onnx generate "Once upon a time" -m build/tales --echo --max-new-tokens 160 --temperature 0.7 --top-p 0.9 --seed 7
	@# Export the default model too, so that the first `gpt2onnx generate` of your own starts at once.
	@$(BIN)/gpt2onnx generate "Once" --max-new-tokens 1 --quiet >build/first.txt
	@echo "Now yours: $(BIN)/gpt2onnx generate \"Once upon a time\""

test: lint types $(LOWEST)/installed
	$(MAKE) unit
	$(MAKE) --jobs=2 lowest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/cog --check docs/cli.md

# The installed package is checked from another folder, which also proves that it is whole.
types: $(VENV)/installed-dev
	rm -rf build/site build/lib
	$(BIN)/pip install --quiet --no-deps --target build/site .
	cd build/site && ../../$(BIN)/mypy --config-file ../../pyproject.toml --strict -p gpt2onnx
	cd build/site && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

# Two files at a time: many tests wait, for servers, for signals, for their own processes.
unit: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile

# The lowest versions that pyproject.toml allows, and what can be tested with them: PyTorch needs newer ones.
LOWEST_TESTS := batching bundle cli_errors export_failures forward_passes hub isolation jobs screening session streaming wide

lowest: lowest-tokens lowest-tests

lowest-tokens: $(VENV)/installed-dev $(LOWEST)/installed
	GPT2ONNX_LOWEST=$(LOWEST)/bin/python $(BIN)/pytest tests/test_lowest.py

lowest-tests: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile $(LOWEST_TESTS:%=tests/test_%.py)

$(LOWEST)/installed: $(VENV)/installed-dev pyproject.toml
	$(BIN)/uv venv --quiet --clear --python 3.11 $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable '.[cpu,export,energy,sweep]'
	$(BIN)/uv pip install --quiet --python $(LOWEST) hypothesis packaging pytest pytest-xdist
	touch $@

# The bundle in optimum, onnxruntime-genai and transformers.js: needs Node and the npm registry, too.
peers: $(VENV)/installed-dev
	GPT2ONNX_PEERS=build/peers $(BIN)/pytest tests/test_other_runtimes.py tests/test_portable.py

# Damaged, hostile and absurd input, N of each kind, faults at every step, every byte flipped: docs/reliability.md.
N ?= 5000
fuzz: $(VENV)/installed-dev
	GPT2ONNX_FUZZ=$(N) GPT2ONNX_FAULTS=2000 GPT2ONNX_FLIPS=all $(BIN)/pytest -s tests/test_fuzz_*.py \
		tests/test_faults.py tests/test_bundle.py

# Side by side with other runtimes, each installed outside the repository: docs/benchmarks. About an hour the first time.
bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.report

# Writes what docs/cli.md and docs/guide.md show of the commands anew, from the commands themselves.
docs: $(VENV)/installed-dev
	$(BIN)/cog -r docs/cli.md docs/guide.md

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/uv: | $(VENV)/bin/python
	$(BIN)/pip install --quiet uv

# By pip, as the README says, which heeds pip's own settings; uv, which is faster, is for the tests' many packages.
$(VENV)/installed-demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet '.[cpu,export]'
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(VENV) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build
