# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check docs format clean

demo: $(READY)  ## the tiny Llama 4, from its checkpoint to text
	$(BIN)/python examples/demo.py

test: $(READY)  ## all tests
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.venv/source $(BIN)/mypy -p arriero

docs: $(READY)  ## the site in build/docs, from docs/ and the code; a dead link fails it
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs build/docs

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv demo build *.egg-info plugins/cpu/*.so

$(READY): pyproject.toml $(wildcard plugins/cpu/*.cpp plugins/cpu/*.h)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[accuracy,calibration,export,tensorrt,test]'
	mkdir -p .venv/source && ln -sfn "$(CURDIR)" .venv/source/arriero
	touch $(READY)
