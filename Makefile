PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --config-settings editable_mode=strict --editable
# A strict editable install links every file, which mypy needs; a file that comes or goes makes it anew.
FOLDERS := $(shell find runtime kernels export bench -type d -not -name __pycache__ -not -path "*/node_modules*")

.PHONY: demo test quick clean

demo: .venv/user  ## draw every style into out/demo.png
	$(BIN)/stylemuse demo --force --out out/demo.png
	@echo "Next:"
	@echo "  . .venv/bin/activate"
	@echo "  stylemuse generate 'a fox' --style neon --out out/fox.png"
	@echo "  stylemuse subjects"

test: .venv/dev  ## all that CI runs: format, rules, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile -rs  # a process a core, one thread each

QUICK := repository public schedule guidance noise philox sampling files formats canonical lora_files bank planning \
         batcher cache pace hub weights tokenizer machine refusals
quick: .venv/dev  ## the part of it that takes less than a minute: format, rules, and tests without a network's pass
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto -m "not slow" $(QUICK:%=tests/test_%.py)

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
