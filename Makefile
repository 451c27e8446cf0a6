# make help lists the targets. PYTHON is the interpreter that the virtual environment is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXT := .ext
ASAN := .asan
EXT_PACKAGES := "torch-scatter>=2.1.2" "torch-sparse>=0.6.18"
# The releases of PyTorch that test-matrix takes, the oldest supported one first.
VERSIONS ?= 2.8 2.11 2.14.1 newest
# What one call of gpu may take, the images of its trainings, and what they are.
MINUTES ?= 9
DATA ?= cifar10
DATA_NAME ?= cifar10

# A process for each core, up to four: each takes some 1.5 GB of memory.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Runs a program with kernels that look after every access to memory, in a cache of their own.
SANITIZED := XDG_CACHE_HOME=$(CURDIR)/$(ASAN) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	DNW_GRAPH_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g" \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" PYTHONPATH=$(CURDIR)

.PHONY: help demo test test-slow test-asan test-aarch64 test-ext test-matrix lint types docs gallery bench gpu

help:
	@echo "make demo      train MobileNetV1-DNW on scikit-learn's digits"
	@echo "make test      run the quick tests: every feature"
	@echo "make test-slow run the others: all combinations of settings, whole trainings"
	@echo "make test-asan run the tests and a fuzz of the operators on kernels built with AddressSanitizer and UBSan (GCC)"
	@echo "make test-aarch64 build the kernels for aarch64 and run them against plain loops (aarch64-linux-gnu-g++, qemu-aarch64)"
	@echo "make test-ext  build torch-scatter and torch-sparse, run the tests that concern them"
	@echo "make test-matrix VERSIONS=\"2.11 newest\"  run the quick tests (all with SLOW=1) under other versions of PyTorch, each in an environment of its own"
	@echo "make lint      check style and format"
	@echo "make types     check types"
	@echo "make docs      build the documentation into site/"
	@echo "make gallery   train small models and draw docs/gallery.md from them (3 minutes)"
	@echo "make bench     time training steps, selection and inference, and measure memory (10 minutes)"
	@echo "make gpu       measure and train on a GPU, 9 minutes of what is left (MINUTES=, DATA=, DATA_NAME=); the same command goes on"
	@echo "Each sets up what it needs in $(VENV). For another interpreter: make PYTHON=/path/to/python3.11 ..."

demo: $(INSTALLED)
	$(BIN)/python examples/imagenet_mobilenet.py

test: $(INSTALLED)
	CHECK_SIGNATURES=0 $(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

test-asan: $(INSTALLED)
	$(SANITIZED) $(BIN)/python -c "from dnw_graph.ops.build import kernels; assert kernels() is not None"
	$(SANITIZED) $(BIN)/python -m pytest -q -s tests/ops --ignore tests/ops/test_build.py
	$(SANITIZED) $(BIN)/python -W ignore tests/robust/fuzz.py --surfaces operators --count 5000

test-aarch64: $(INSTALLED)
	$(BIN)/python -m pytest -m "" -rs tests/ops/test_kernels_alone.py

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python tools/build_docs.py

gallery: $(INSTALLED)
	$(BIN)/python tools/gallery.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/train_step.py --rounds 3
	$(BIN)/python benchmarks/selection.py --rounds 3
	$(BIN)/python benchmarks/inference.py --rounds 5
	$(BIN)/python benchmarks/sparse_layers.py --rounds 5
	$(BIN)/python benchmarks/recorder.py --rounds 3 --batch 64
	$(BIN)/python benchmarks/memory.py

gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES) --data $(DATA) --data-name $(DATA_NAME)

test-ext: $(EXT)/.built
	PYTHONPATH=$(CURDIR)/$(EXT) $(BIN)/python -m pytest -m ext
	PYTHONPATH=$(CURDIR)/$(EXT) $(BIN)/python -m pytest tests/propagation

test-matrix:
	$(PYTHON) tests/matrix.py $(VERSIONS) $(if $(SLOW),--slow)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[train,dev]"
	touch $@

# Takes about half an hour on 2 cores. After another PyTorch has been installed: rm -r .ext
$(EXT)/.built: | $(INSTALLED)
	$(BIN)/python -m pip install setuptools wheel
	$(BIN)/python -m pip install --no-build-isolation --no-deps --target $(EXT) $(EXT_PACKAGES)
	touch $@
