# Needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo docs test test-docs lint lint-files types format fuzz fuzz-guided interrupts test-torch \
	test-oldest release-check

demo: $(READY)
	$(BIN)/python examples/digits.py

test: $(READY)
	$(BIN)/python -m pytest -n auto

# The pages as a site, in site/index.html.
docs: $(READY)
	$(BIN)/python docs/build_site.py

# The pages, and that what they show runs.
test-docs: $(READY)
	$(BIN)/python -m pytest -n auto tests/pages

lint: $(READY) lint-files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

# Workflows and other files of the repository: their schemas, and what is unsafe in them. No network.
SCHEMA = $(BIN)/check-jsonschema --quiet --builtin-schema
lint-files: $(READY)
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --strict-collection --quiet --no-progress .github

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

MINUTES ?= 10
fuzz: $(READY)
	$(BIN)/python tests/hostile/fuzz.py --minutes $(MINUTES)

interrupts: $(READY)
	$(BIN)/python tests/hostile/interrupts.py --changing

# Its wheels are for Linux and for some Pythons only, so no extra of the package asks for it.
fuzz-guided: $(READY)
	$(BIN)/python -m pip install --quiet atheris
	$(BIN)/python tests/hostile/fuzz_guided.py --minutes $(MINUTES)

# Every lower bound of pyproject.toml, exactly; the recipes have one of their own for timm. What comes
# with these versions is held back where it has left them behind: the interpreter of torch 2.8's Triton
# does not run on NumPy 2.4, and matplotlib 3.9 calls what pyparsing 3.3 warns of.
NOT_OLDEST = check-jsonschema|import-linter|mypy|ruff|zizmor|$(UNBOUND)
# What tests skip without, and what brings newer versions of others along.
UNBOUND = fastai|ipykernel|mmengine|monai|nbconvert|peft|playwright|pytorch-ignite|torch-ema|torch-geometric|ultralytics|zensical
RECIPES = timm==1.0.31
OLDEST = $$(grep -oE '"[A-Za-z][A-Za-z0-9-]*>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' \
	| grep -vE '^($(NOT_OLDEST))=|^$(RECIPES)' | sort -u) 'numpy<2.4' 'pyparsing<3.3'
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $(OLDEST)
	PYTHONPATH=. .venv-oldest/bin/python -m pytest -n auto --ignore=tests/recipes
	.venv-oldest/bin/python -m pip install --quiet $(RECIPES)
	PYTHONPATH=. .venv-oldest/bin/python -m pytest -n auto tests/recipes

# One minor version of torch, with what else pip finds for it: make test-torch TORCH=2.13
TORCH ?= 2.13
test-torch:
	$(PYTHON) -m venv .venv-torch-$(TORCH)
	.venv-torch-$(TORCH)/bin/python -m pip install --quiet --editable '.[demo,test]' 'torch==$(TORCH).*'
	.venv-torch-$(TORCH)/bin/python -m pytest -n auto

# What a release is: both archives, checked, and the wheel alone in an empty environment.
ALONE = .venv-release/bin
release-check: $(READY)
	rm -rf dist .venv-release
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv .venv-release
	$(ALONE)/python -m pip install --quiet dist/*.whl
	cp examples/training_loop.py .venv-release/
	cd .venv-release && bin/we-convert torchvision:resnet18 --dry-run && bin/python training_loop.py

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[demo,lint,test]'
	touch $(READY)
