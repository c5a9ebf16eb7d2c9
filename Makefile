# make demo: set up, then refine the shipped generator of digits.  make test: the test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date

.PHONY: setup demo test lint format docs wheel gpu-check compat fuzz soak clean

setup: $(STAMP)

# The stamp is newer than what it was made from, so an up-to-date environment costs nothing.
$(STAMP): requirements.txt requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(STAMP)

demo: setup
	$(BIN)/python refine.py --network=stylegan2-digits.pkl

# Tests of one file stay together, for their fixtures, and files are begun in their order: the longest are among the first.
# A test that hangs is ended, and says where.
TEST_WORKERS ?= 2
SUITE := -m pytest --numprocesses=$(TEST_WORKERS) --dist=loadfile --no-loadscope-reorder --timeout=600 --durations=20
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python $(SUITE)

# Style, types, and that imports run one way.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site: build/site/index.html. It warns of nothing, or fails. Node.js's npm fetches what renders
# formulas, diagrams and the search, which becomes part of the site: reading it needs no network.
SITE := build/docs
docs: $(SITE)/.up-to-date
	NO_MKDOCS_2_WARNING=1 $(SITE)/venv/bin/mkdocs build --strict

$(SITE)/.up-to-date: requirements-docs.txt scripts/site/npm.txt
	rm -rf $(SITE)
	$(PYTHON) -m venv $(SITE)/venv
	$(SITE)/venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	mkdir -p $(SITE)/npm
	cd $(SITE)/npm && npm pack --silent $$(cat $(CURDIR)/scripts/site/npm.txt)
	cd $(SITE)/npm && for archive in *.tgz; do \
		mkdir $${archive%-*} && tar xzf $$archive --strip-components=1 -C $${archive%-*} || exit 1; \
	done
	touch $@

# Wheel and source distribution, and a check of what is in them.
wheel: setup
	$(BIN)/python -c "import build.__main__" 2>/dev/null || $(BIN)/python -m pip install --quiet build
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build
	$(BIN)/python scripts/check_dist.py dist

# On a CUDA machine, with whatever Python has PyTorch there: build and examine the operators, test, measure.
gpu-check:
	$(PYTHON) -m torch_utils.custom_ops
	$(PYTHON) -m pytest -m gpu tests/torch_utils tests/stylegan2_ada tests/di_refine/edm
	$(PYTHON) benchmarks/ops.py --device=cuda

# Open our pickles under the oldest Python and PyTorch that their source text is for, and run the suite under the oldest
# and the newest that the package supports.
READER ?= python3.8
OLDEST ?= python3.10
NEWEST ?= python3.13
COMPAT := build/compat
compat: setup
	$(READER) -m venv $(COMPAT)/reader
	$(COMPAT)/reader/bin/python -m pip install --quiet numpy torch==1.8.1
	COMPAT_PYTHON=$(CURDIR)/$(COMPAT)/reader/bin/python $(BIN)/python -m pytest -m compat -rP
	$(OLDEST) -m venv $(COMPAT)/oldest
	$(COMPAT)/oldest/bin/python -m pip install --quiet -e '.[dev]' torch==2.6.0
	OMP_NUM_THREADS=1 $(COMPAT)/oldest/bin/python $(SUITE)
	$(NEWEST) -m venv $(COMPAT)/newest
	$(COMPAT)/newest/bin/python -m pip install --quiet --upgrade -e '.[dev]'
	OMP_NUM_THREADS=1 $(COMPAT)/newest/bin/python $(SUITE)

# A minute of fuzzing each reader. The corpora stay in build/fuzz and grow with every run; what breaks a reader is written
# there, too. Atheris has wheels for Linux.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= networks pairs weights folders states arrays datasets registry runs
fuzz: setup
	$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/python -m pip install --quiet atheris==3.0.0
	mkdir -p build/fuzz
	cd build/fuzz && for target in $(FUZZ_TARGETS); do \
		$(CURDIR)/$(BIN)/python $(CURDIR)/tests/fuzz/fuzz.py $$target $$target -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

# Ten minutes of faults: kills, signals, full disk, damaged files. SOAK=gan, refine or distill for another command.
SOAK ?= teacher
soak: setup
	$(BIN)/python tests/soak/soak.py --command=$(SOAK)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
