# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# Both make `.venv` from requirements.lock with pip as it is configured here, and build the CPU's kernels.

PYTHON ?= python3
BIN := .venv/bin
MAKEFLAGS += --jobs=2 # the C++ compiler works beside pip
# Tests' processes: two share a processor, so that one works while the other waits for a server of its own.
PROCESSORS := $(shell nproc 2>/dev/null || echo 2)
WORKERS ?= $(shell echo $$(( $(PROCESSORS) > 1 ? 4 : 2 )))
unexport PYTHONDONTWRITEBYTECODE # .venv comes without bytecode: the first process to import a module keeps it

.PHONY: help demo test tables gpu gpu-scenes server check docs deploy format fuzz fuzz-files fuzz-ops sanitize lock wheels clean
.PHONY: kernel-wheels dynamo ray

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile | expand -t 20

demo: .venv/.demo .venv/.built  ## the tiny Llama 4, from its checkpoint to text
	$(BIN)/python examples/demo.py

test: .venv/.test .venv/.built  ## all tests
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

tables: .venv/.test .venv/.built  ## all tests, over the whole of the tables of which `make test` takes a sample
	ARRIERO_WHOLE_TABLES=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

gpu: .venv/.test .venv/.built  ## on a machine with a card: all its tests and speeds, one JSON, one table
	$(BIN)/python benchmarks/card.py

gpu-scenes: .venv/.test .venv/.built  ## without a card: every precision in every way, kernels interpreted
	$(BIN)/python benchmarks/gpu_scenes.py

check: .venv/.test .venv/.built  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.venv/source $(BIN)/mypy -p arriero

docs: .venv/.test .venv/.built  ## the site in build/docs, from docs/ and the code; a dead link fails it
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs build/docs

deploy:  ## what lies in deploy/, checked by tools of others in an environment of its own
	$(PYTHON) deploy/check.py

fuzz-files: .venv/.test .venv/.built  ## 10,000 damaged files of every format that is read
	PYTHONPATH=tests/support $(BIN)/python tests/fuzz/files.py

server: build/served/tiny  ## a server tried hard: schemathesis, clients of others, a soak of ten minutes
	$(BIN)/python tests/fuzz/openapi.py build/served/tiny
	$(BIN)/python tests/fuzz/clients.py build/served/tiny
	$(BIN)/python tests/fuzz/schemas.py 420
	$(BIN)/python benchmarks/server_soak.py build/served/tiny
	$(BIN)/python benchmarks/server_speed.py build/served/tiny

format: .venv/.test  ## style, mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: .venv/.test .venv/.built fuzz-files  ## damaged files, and hostile graphs: the whole table, and 2,000 random ones
	$(BIN)/python tests/fuzz/ops.py --count 2000

fuzz-ops: .venv/.test  ## the CPU's ops alone under libFuzzer, 20 minutes (Clang)
	$(BIN)/python tests/fuzz/native.py coverage --seconds 1200

sanitize: .venv/.test .venv/.built  ## the CPU's ops under the sanitizers of addresses, undefined behaviour and threads
	$(BIN)/python tests/fuzz/native.py sanitize

lock:  ## requirements.lock anew: the newest versions within pyproject.toml's ranges
	$(PYTHON) -m venv .venv/lock
	.venv/lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv/lock/bin/python .ci/environment.py lock

wheels:  ## what pip resolves for arriero[cpu] on each platform, and its size
	$(PYTHON) .ci/wheels.py

kernel-wheels: .venv/.test .venv/.built  ## wheels with the CPU's kernels for Linux on x86-64 and ARM, whose ops QEMU runs
	$(BIN)/python .ci/kernel_wheels.py --run

dynamo: build/served/tiny  ## two workers of NVIDIA Dynamo over the tiny Llama 4 in int8, in a network of their own (root)
	$(BIN)/python benchmarks/dynamo_workers.py build/served/tiny

ray: build/served/tiny  ## two replicas under Ray Serve, as examples/ray_serve.py makes them (root)
	$(BIN)/python benchmarks/ray_replicas.py build/served/tiny

clean:  ## away with all that make made
	rm -rf .venv demo build *.egg-info plugins/cpu/*.so

build/served/tiny: .venv/.test .venv/.built
	mkdir -p build/served
	$(BIN)/arriero export examples/tiny-llama4 -o build/served/model --force
	$(BIN)/arriero calibrate build/served/model --recipe int8 --data examples/tiny-llama4/unseen.txt -o build/served/int8 --force
	$(BIN)/arriero build build/served/int8 --target cpu -o build/served/tiny --force

# Each file stands for a step that is done: the environment, the parts of the lock in it, the package with its kernels.
.venv/.made:
	$(PYTHON) -m venv .venv
	$(BIN)/python .ci/environment.py install build
	touch $@

.venv/.demo: requirements.lock | .venv/.made
	$(BIN)/python .ci/environment.py install demo
	touch $@

.venv/.test: requirements.lock .venv/.demo
	$(BIN)/python .ci/environment.py install test
	touch $@

.venv/.built: pyproject.toml $(wildcard plugins/cpu/*.cpp plugins/cpu/*.h) | .venv/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	mkdir -p .venv/source && ln -sfn "$(CURDIR)" .venv/source/arriero
	touch $@
