# Two commands do everything from a bare clone: `make demo` and `make test`. Each makes its own environment first.
#
#   make PYTHON=python3.12      the interpreter to build the environment with
#   make VENV=/elsewhere/venv   where the environment goes
#   make PIP_ARGS='...'         extra arguments for pip, such as an index that has CPU-only builds of torch
#   make JOBS=8                 processes that run the tests
#   make TORCH=2.14.1 TRITON=3.8.0                              other versions than those in constraints.txt

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
JOBS ?= 2
TORCH ?=
TRITON ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
SOURCES := $(shell find kernels -name '*.cpp' -o -name '*.h')

.PHONY: engines families own-tests fuzz fuzz-asan help install demo test test-triton test-cpp test-torch ptx ptx-fast ptx-mutants verify bench compile compile-all full lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     encode some real sentences with a real BERT, and ask them questions"
	@echo "make test     run the tests in three ways: the Triton kernels (without a GPU through Triton's interpreter),"
	@echo "              then what a CPU runs with the C++ operators, and without; test-triton, test-cpp, test-torch"
	@echo "make ptx      run the tests of the operators on compiled kernels, emulated: sm_80, sm_90, sm_120 (ARCHES="sm_90")"
	@echo "make ptx-fast run every kernel at every flag once on sm_80 and sm_90, as continuous integration does"
	@echo "make ptx-mutants  remove single steps from the PTX of five kernels, and count what the emulator notices"
	@echo "make fuzz     compare random calls of the CPU operators with float64 for SECONDS=60 from SEED=0; fuzz-asan: the same"
	@echo "              with the C++ operators built with AddressSanitizer and UBSan (GCC)"
	@echo "make verify   check every operator on this machine against the reference"
	@echo "make bench    time everything, and other libraries for comparison (BENCH_ARGS="--quick")"
	@echo "make compile  compile some kernels for NVIDIA and AMD without a GPU, and check their machine code; compile-all: all"
	@echo "make families compare every text model of transformers, built small, with itself accelerated"
	@echo "make engines  test corpora with a real Ray and a real Spark (which needs Java) on this machine, and their examples"
	@echo "make own-tests CHECKOUT=/transformers TESTS=tests/models/bert  run a library's own tests on plain and accelerated models"
	@echo "make full     run what takes hours: every kernel at every config, emulated PTX, other versions of Python and torch"
	@echo "make lint     check code, format, and the types of the public modules"
	@echo "make format   fix code and format"
	@echo "make install  only make the environment, in $(VENV)"
	@echo "make clean    remove what was built, and the environment"

# The stamp is newer than both files once the environment has what they list, so a second run starts at once.
# torch is installed first and alone, so that pip chooses one build of it before another package asks for a different one.
# seqeval exists as source only; PEP 517 builds it, because old versions of pip get its build requirements wrong.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed $(TORCH:%=-e 's/^torch==.*/torch==%/') $(TRITON:%=-e 's/^triton==.*/triton==%/') -e '' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install $(PIP_ARGS) -c $(VENV)/constraints.txt torch
	$(BIN)/python -m pip install $(PIP_ARGS) -c $(VENV)/constraints.txt --use-pep517 -e '.[demo,test,lint]'
	@touch $@

# The C++ operators depend on every source and header; setup.py rebuilds a library only if its sources have changed.
$(BUILT): $(INSTALLED) $(SOURCES) setup.py kernels/cpu/library.py
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

install: $(BUILT)

demo: $(BUILT)
	@$(BIN)/python -m fastbert.demo

# Triton's interpreter runs one program at a time, in Python: processes make the tests faster, torch's threads do not.
# With worksteal a process runs the tests of a file one after another, so that the file's fixtures are made once.
test: test-triton test-cpp test-torch

test-triton test-cpp test-torch: $(BUILT)
	FASTBERT_TEST=$(@:test-%=%) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(JOBS) --dist worksteal

# Triton compiles for each architecture, and numpy executes the PTX. Compiled kernels stay in Triton's cache.
ARCHES ?= sm_80 sm_90 sm_120
OPERATORS := emulated attention attention_machinery attention_schedule batch_invariance cross_entropy embedding encoder_gradients feed_forward layer_norm pooling random
EMULATED = OMP_NUM_THREADS=1 FASTBERT_TEST_ARCH=$$arch $(BIN)/python -m pytest -n $(JOBS)

ptx: $(BUILT)
	set -e; for arch in $(ARCHES); do $(EMULATED) $(OPERATORS:%=tests/test_%.py); done

ptx-fast: $(BUILT)
	set -e; for arch in sm_80 sm_90; do $(EMULATED) tests/test_emulated.py; done

ptx-mutants: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/python tests/ptx/mutants.py

SECONDS ?= 60
SEED ?= 0

fuzz: $(BUILT)
	OMP_NUM_THREADS=2 $(BIN)/python tests/fuzz.py --seconds $(SECONDS) --seed $(SEED)

# The sanitizers must be loaded before Python. Leaks are not reported, because torch leaves memory at its end. The fuzz
# runs with the library that this CPU would choose, then with the one without AVX-512.
SANITIZERS = $(foreach name,libasan.so libubsan.so,$(shell $(CC) -print-file-name=$(name)))
SANITIZED = LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=2 \
  $(BIN)/python tests/fuzz.py --seconds $(SECONDS) --seed $(SEED) --libraries build/asan/fastbert/kernels/cpu

fuzz-asan: $(BUILT)
	FASTBERT_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/asan --build-temp build/asan_objects
	$(SANITIZED)
	ATEN_CPU_CAPABILITY=avx2 $(SANITIZED)

verify: $(BUILT)
	@$(BIN)/python -m fastbert verify

bench: $(BUILT)
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

# A fixed subset; `compile-all` compiles every kernel at every config.
compile: $(INSTALLED)
	$(BIN)/python -m benchmarks.inspection.compile_report --fast

compile-all: $(INSTALLED)
	$(BIN)/python -m benchmarks.inspection.compile_report

# Makes the table of docs/families.md; fails if an accelerated model differs from the original.
families: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families_of_transformers

# Runs a library's own tests from a checkout; fails if a test passes on plain models only, and is not listed.
CHECKOUT ?=
TESTS ?=

own-tests: $(BUILT)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) parameterized expecttest httpx datasets pillow
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.libraries_own $(CHECKOUT) $(TESTS)

engines: $(BUILT)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(VENV)/constraints.txt '.[ray,spark]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engines_local.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_examples.py -k corpus

full:
	@PARTS='$(PARTS)' WAYS='$(WAYS)' PIP_ARGS='$(PIP_ARGS)' .ci/full

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .benchmarks *.egg-info kernels/cpu/_operators*.so
	rm -rf .venvs full_logs
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
	test ! -e $(INSTALLED) || rm -rf $(VENV)
