# make demo   set up, train all four tasks on generated scenes, write runs/quickstart/report.html
# make test   set up, run the tests
# make slow   the tests that `make test` leaves out: methods killed and resumed, shards, compilers, more ranks, long runs
# make oldest the same with the oldest torch that pyproject.toml allows
# make lint   what CI checks besides the tests
# make lock   renew requirements.lock

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: demo test slow oldest lint lock clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/indiclip fit --config conf/quickstart.yaml

# As many processes as cores, of one thread each: more threads than cores make all of them many times slower. Each
# begins with whole files, so that what a file's tests share is made once, and takes from the others when it is done.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(VENV)/.installed
	$(PYTEST) -m "not slow" $(ARGS)

slow: $(VENV)/.installed
	$(PYTEST) -m slow $(ARGS)

oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet "torch==$$(sed -n 's/.*"torch>=\([0-9.]*\)".*/\1.*/p' pyproject.toml)" -e '.[test]'
	$(PYTEST:$(BIN)/%=$(VENV)-oldest/bin/%) -m "not slow" $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lock pins every package with its hash; the project itself is installed beside it, editable.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "IndiCLIP needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "installing into $(VENV): 7 GB, some minutes"
ifneq ($(UV),)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-build-isolation --no-deps -e .
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
endif
	@touch $@

lock:
	@test -n "$(UV)" || { echo "make lock needs uv: https://docs.astral.sh/uv"; exit 1; }
	$(UV) pip compile --quiet --universal --python-version 3.11 --extra dev --generate-hashes --no-emit-index-url \
		--no-emit-find-links --no-header --no-annotate -o requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) $(VENV)-oldest
