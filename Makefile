# make sanity: the main job. make test: every test. Both set up .venv first, once. make power: the long run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# mypy sees the package as a wheel has it: checks and transformer inside transformer_checks.
TYPING := $(VENV)/typing
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: mutants sanity test lint bench power clean

sanity: $(VENV)/installed
	$(BIN)/python -m pytest -m sanity

test: $(VENV)/installed-for-tests
	$(ONE_THREAD) $(BIN)/python -m pytest tests checks -n 2 --dist worksteal -q

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p $(TYPING)/transformer_checks
	@ln -sfn $(CURDIR)/checks $(CURDIR)/transformer $(CURDIR)/src/transformer_checks/*.py $(TYPING)/transformer_checks
	cd $(TYPING) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --package transformer_checks

# ours beside HF GPT-2, x-transformers and, with NANOGPT=folder, a nanoGPT
bench: $(VENV)/installed-for-tests
	$(BIN)/python -m benchmarks.compare $(if $(NANOGPT),--nanogpt $(NANOGPT))

# every known bug and every correct model against every check, for hours; goes on where it was stopped.
# JOBS=processes SEEDS=of each correct model (20) ONLY='words of names'
power: $(VENV)/installed-for-tests
	$(ONE_THREAD) $(BIN)/python -m power.power $(if $(JOBS),--jobs $(JOBS)) $(if $(SEEDS),--seeds $(SEEDS)) \
		$(if $(ONLY),--only '$(ONLY)')

# one-place mistakes made mechanically in FILE=model.py[:NAME]: how many are caught, which survive; goes on where it was
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
