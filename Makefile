# What people and CI call. `make` lists the targets.
VENV ?= .venv
DEMO ?= demo
BIN := $(VENV)/bin
# Two processes share the test files, in the order of tests/conftest.py; a cluster of Java takes the rest of a machine.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
MANYEYES := $(BIN)/manyeyes

.DEFAULT_GOAL := help
.PHONY: help install demo photos rnn test test-fast lint format bench wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## make .venv and install Manyeyes with all extras into it

$(VENV)/.installed: pyproject.toml scripts/setup.sh
	@scripts/setup.sh $(VENV)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml scripts/setup.sh
	@scripts/setup.sh $(VENV) dev
	@touch $(VENV)/.installed $@

demo: $(VENV)/.installed ## install, then train a recogniser on Fashion-MNIST: data to server in ten minutes
	@VENV=$(VENV) DEMO=$(DEMO) scripts/demo.sh fashion-mnist cnn

rnn: $(VENV)/.installed ## the same with a recurrent network
	@VENV=$(VENV) DEMO=$(DEMO) scripts/demo.sh fashion-mnist rnn

photos: $(VENV)/.installed ## fine-tune EfficientNet-Lite0 on a few hundred colour photos
	@VENV=$(VENV) DEMO=$(DEMO) scripts/demo.sh photos photos

test: $(VENV)/.installed-dev ## install what the tests need and run them all
	@$(BIN)/python tests/spark_classes.py
	@$(PYTEST)

test-fast: $(VENV)/.installed-dev ## only the tests that take seconds
	@$(PYTEST) -m 'not slow'

lint: $(VENV)/.installed-dev ## style, types and the direction of imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## put the code into the project's style
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/.installed-dev ## every benchmark: ratios beside a bound, one table each
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

wheel: $(VENV)/.installed-dev ## build dist/*.whl
	@$(BIN)/python -m build --wheel --outdir dist .

clean: ## remove what was built and the demo's data (not .venv)
	rm -rf build dist $(DEMO) .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
