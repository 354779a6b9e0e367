# make install | demo | test | translate | bench | kernels | gpu-check | lint | wheel     (make help explains each)
PYTHON ?= python3
VENV   ?= .venv
# Any torch >= 2.6 does; this one is pinned so that a CPU-only machine does not fetch CUDA packages by accident.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml pydiffseq.pth pydiffseq_autoload.py
MODEL  := examples/tatoeba_de_en/model
DEMO_MINUTES ?= 8

.PHONY: help install demo test translate bench kernels gpu-check lint wheel clean info

help:
	@echo "make install    environment in $(VENV) and the compiled package"
	@echo "make demo       translate with the shipped model, then train from scratch for $(DEMO_MINUTES) minutes and translate again"
	@echo "make translate  German lines on standard input -> English lines"
	@echo "make test       the whole test suite"
	@echo "make bench      CPU kernel benchmarks: JSON and a table in build/bench"
	@echo "make kernels    compile the CUDA kernels with nvcc (no GPU needed); registers, spills, tensor-core instructions"
	@echo "make gpu-check  on a CUDA machine, no network needed: build, tests, benchmarks, compute-sanitizer (under 10 minutes)"
	@echo "make lint       ruff and mypy"
	@echo "make wheel      build a wheel in dist/"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.dependencies: pyproject.toml | $(BIN)/python
	@echo "installing $(TORCH), then fairseq, which compiles its own extensions (about 4 minutes on 2 cores)"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --progress-bar on fairseq-fixed==0.12.3.1 | grep -v "already satisfied"
	@touch $@

$(VENV)/.installed: $(SOURCES) | $(VENV)/.dependencies
	$(BIN)/python -m pip install --quiet -e ".[fairseq,test,lint]"
	@touch $@

install: $(VENV)/.installed
	@$(BIN)/pydiffseq info

info: install

demo: $(VENV)/.installed
	$(BIN)/python examples/tatoeba_de_en/demo.py --minutes $(DEMO_MINUTES)

translate: $(VENV)/.installed
	@$(BIN)/python examples/tatoeba_de_en/translate.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# BENCH narrows the choice: make bench BENCH="-k 'float32 and not rotary'"
BENCH ?=
bench: $(VENV)/.installed
	@mkdir -p build/bench
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only -q --benchmark-max-time=0.5 \
	  --benchmark-min-rounds=3 --benchmark-json=build/bench/cpu.json $(BENCH)
	$(BIN)/python benchmarks/table.py build/bench/cpu.json --markdown build/bench/cpu.md

# Needs nvcc only. Fails on an error, a warning, a spill, or a matrix kernel without tensor-core instructions.
kernels:
	$(PYTHON) tools/kernel_report.py --markdown build/kernels/kernels.md

# Takes the Python at hand, which has torch for CUDA, and builds into pydiffseq/; results in build/gpu, or in $$OUT if that is set.
gpu-check:
	$(PYTHON) tools/gpu_check.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .
	@ls -l dist

clean:
	rm -rf build dist work *.egg-info
