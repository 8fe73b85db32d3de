# make sanity: the two sanity checks. make test: all tests. make power: every check on every bug, takes hours.
# The first call of any of them sets up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A folder in which checks and transformer are inside transformer_checks, as in the wheel, for mypy.
TYPING := $(VENV)/typing
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: mutants sanity test lint bench gpu power clean

sanity: $(VENV)/installed
	$(BIN)/python -m pytest -m sanity

test: $(VENV)/installed-for-tests
	$(ONE_THREAD) $(BIN)/python -m pytest tests checks -n 2 --dist worksteal -q --durations=20

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(TYPING)/transformer_checks
	@ln -sfn $(CURDIR)/checks $(CURDIR)/transformer $(CURDIR)/src/transformer_checks/*.py $(TYPING)/transformer_checks
	cd $(TYPING) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --package transformer_checks
	@echo "files that a rule could be moved out of (over 450 lines):"
	@git ls-files 'checks/*.py' 'transformer/*.py' 'power/*.py' 'tests/*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > 450'

# Times our model, the GPT-2 of transformers, x-transformers and, with NANOGPT=folder, nanoGPT; then default runs of the
# checks over models of several sizes, beside an earlier version with BEFORE=its python.
bench: $(VENV)/installed-for-tests
	$(BIN)/python -m benchmarks.compare $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python -m benchmarks.suite $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(if $(BEFORE),--before $(BEFORE))

# Runs every check and benchmark that needs CUDA, in at most ten minutes; the table is out/gpu/table.md.
gpu: $(VENV)/installed-for-tests
	$(BIN)/python -m benchmarks.gpu

# Runs every check on every known bug and every correct model; takes hours, and continues a run that was stopped.
# JOBS=processes SEEDS=seeds per correct model (20) ONLY='words in names'
power: $(VENV)/installed-for-tests
	$(ONE_THREAD) $(BIN)/python -m power.power $(if $(JOBS),--jobs $(JOBS)) $(if $(SEEDS),--seeds $(SEEDS)) \
		$(if $(ONLY),--only '$(ONLY)')

# Makes small changes to FILE=model.py[:NAME], one at a time: how many are caught, which survive. Continues too.
mutants: $(VENV)/installed-for-tests
	$(ONE_THREAD) $(BIN)/python -m power.mutants $(FILE)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(INSTALL) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) out .pytest_cache .ruff_cache .mypy_cache .hypothesis
