# The two commands that set everything up: `make demo` and `make test`.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test readme clean

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,ray,slurm,search,bench,postgres]'
	touch .venv/demo $@

demo: .venv/demo
	$(BIN)/noisysam demo

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

readme: .venv/demo
	$(BIN)/python -m noisysam.cli.catalogue README.md reports/optimizers.md reports/methods.md

clean:
	rm -rf .venv
