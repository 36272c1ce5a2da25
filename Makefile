# The commands that set everything up: `make demo`, `make test` (five minutes) and `make test-all` (half an hour).
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-all docs readme reports clean

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/test: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,ray,slurm,bench,postgres]'
	touch .venv/demo $@

demo: .venv/demo
	$(BIN)/noisysam demo

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

# by files, so that a service is started once
test-all: test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m "slow or services"

.venv/docs: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch .venv/demo $@

docs: .venv/docs
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html

readme: .venv/demo
	$(BIN)/python -m noisysam.cli.catalogue README.md reports/README.md docs/results.md docs/methods.md docs/optimizers.md docs/speed.md

reports: .venv/demo
	$(BIN)/noisysam report --all --from reports/records
	$(BIN)/noisysam leaderboard reports/records

clean:
	rm -rf .venv
