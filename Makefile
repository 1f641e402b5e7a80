# Needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint types format fuzz test-oldest wheel

demo: $(READY)
	$(BIN)/python examples/digits.py

test: $(READY)
	$(BIN)/python -m pytest -n auto

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

MINUTES ?= 10
fuzz: $(READY)
	$(BIN)/python tests/hostile/fuzz.py --minutes $(MINUTES)

# Every lower bound of pyproject.toml, exactly. Left out are the tests of what needs newer ones: the
# integrations, and the recipes, which need a newer timm. Triton 3.4's interpreter, which comes with
# torch 2.8, does not run on newer NumPys.
NOT_OLDEST = accelerate|lightning|transformers|mypy|ruff
OLDEST = $$(grep -oE '"[A-Za-z][A-Za-z0-9-]*>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' \
	| grep -vE '^($(NOT_OLDEST))=|^timm==1.0.31' | sort -u) 'numpy<2.4'
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $(OLDEST)
	PYTHONPATH=. .venv-oldest/bin/python -m pytest -n auto --ignore=tests/training --ignore=tests/recipes

wheel: $(READY)
	rm -rf dist .venv-wheel
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet dist/*.whl
	cd .venv-wheel && bin/we-convert torchvision:resnet18 --dry-run

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[demo,lint,test]'
	touch $(READY)
