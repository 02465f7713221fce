PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --config-settings editable_mode=strict --editable
# A strict editable install links every file, which mypy needs; a file that comes or goes makes it anew.
FOLDERS := $(shell find runtime kernels export bench -type d -not -name __pycache__ -not -path "*/node_modules*")

.PHONY: demo test clean

demo: .venv/user  ## draw every style into out/demo.png
	$(BIN)/stylemuse demo --out out/demo.png

test: .venv/dev  ## all that CI runs: format, rules, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile  # a process a core, one thread each

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/user: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) .
	touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt $(FOLDERS)
	$(INSTALL) '.[dev]'
	touch $@ .venv/user

clean:
	rm -rf .venv build dist out *.egg-info
