# Needs GNU make and Python >= 3.11; everything else is installed into .venv on first use.
PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

BIN       := .venv/bin
INSTALLED := .venv/.installed
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# What JupyterLab tells of the kernel that it happened to use.
LANGUAGE := version codemirror_mode file_extension mimetype nbconvert_exporter pygments_lexer
# Keeps tags and cell ids; strips outputs, counts and what a run or an editor leaves in the metadata.
STRIP := $(BIN)/nbstripout --keep-id \
	--extra-keys "metadata.papermill cell.metadata.papermill $(addprefix metadata.language_info.,$(LANGUAGE))"
# What git compares and commits of a notebook, so that running one in JupyterLab changes nothing tracked.
# Where nothing is installed, git takes the file as it is.
CLEAN := test -x $(BIN)/nbstripout && exec $(STRIP) || exec cat
FILTER := git config filter.notebook.clean '$(CLEAN)' 2>/dev/null || true

.DEFAULT_GOAL := help
.PHONY: help run test gpu lab lint types bench format clean lock

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

run: $(INSTALLED) ## Tell the whole story on the MiniWorld; writes a report under reports/
	$(BIN)/tdlib run $(ARGS)

test: $(INSTALLED) ## Run lint, types and all tests but slow ones (ARGS="-m slow")
	@failed=""; \
	$(MAKE) --no-print-directory lint || failed="$$failed lint"; \
	$(MAKE) --no-print-directory types || failed="$$failed types"; \
	echo "pytest -n $(WORKERS) $(ARGS)"; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS) || failed="$$failed pytest"; \
	if [ -n "$$failed" ]; then echo "make test: FAILED:$$failed" >&2; exit 1; fi; \
	echo "make test: lint, types and tests hold"

gpu: $(INSTALLED) ## Run the tests of what a GPU changes
	TDLIB_TEST_GPU=1 $(BIN)/python -m pytest tests/test_gpu.py $(ARGS)

lab: $(INSTALLED) ## Open JupyterLab on the notebooks
	@$(FILTER)
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks $(ARGS)

lint: $(INSTALLED) ## Check style, formatting and that notebooks are stripped
	@failed=""; \
	$(BIN)/ruff check --output-format concise . || failed="$$failed check"; \
	$(BIN)/ruff format --check --output-format concise . || failed="$$failed format"; \
	$(if $(NOTEBOOKS),$(STRIP) --verify $(NOTEBOOKS) || failed="$$failed notebook-outputs";) \
	if [ -n "$$failed" ]; then \
		echo "make lint: FAILED:$$failed ('make format' mends most of it)" >&2; exit 1; \
	fi

types: $(INSTALLED) ## Check types with mypy
	$(BIN)/mypy

bench: $(INSTALLED) ## Measure speed on this machine
	$(BIN)/python tests/bench.py $(ARGS)

format: $(INSTALLED) ## Format the code, mend what ruff can, strip the notebooks
	@$(if $(NOTEBOOKS),$(STRIP) $(NOTEBOOKS);) $(BIN)/ruff check --fix-only .; $(BIN)/ruff format .

# Names what it removes under data/: real data sets and the committed models lie there too.
clean: ## Remove generated data, all reports and caches
	rm -rf data/miniworld* data/cache data/shifts build
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find reports -mindepth 1 -maxdepth 1 ! -name README.md ! -name figures ! -name studies -exec rm -rf {} +
	find tdlib tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

lock: $(INSTALLED) ## Write requirements.lock anew after a change of pyproject.toml
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev,regions]"
	@{ echo "# Made by 'make lock' with $$($(BIN)/python -V) on $$(uname -s) $$(uname -m): pip freeze of .venv after installing .[dev,regions]"; \
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude wheel \
	| sed -E -e 's/\+[A-Za-z0-9.]+$$//' \
	-e 's/^((nvidia|cuda)-.*|triton==.*)$$/\1 ; platform_system == "Linux" and platform_machine == "x86_64"/'; \
	} > requirements.lock.new
	@if ! grep -q '^torch==' requirements.lock.new || grep -nE '@ |://' requirements.lock.new; then \
		rm -f requirements.lock.new; \
		echo "make lock: not written: pip freeze failed, or .venv holds packages installed from an address" >&2; \
		exit 1; \
	fi
	mv requirements.lock.new requirements.lock
	@touch $(INSTALLED)

# The stamp is written last: a failed or interrupted installation is repeated by the next make.
$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python >= 3.11 is needed, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." >&2; \
		echo "Name another one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "Installing requirements.lock into .venv (the first time this downloads for some minutes) ..."
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@$(FILTER)
	@touch $@
