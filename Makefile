# The commands that people and CI call. Everything is installed in .venv, which is created by the first target that needs it.
#
#   make test PYTHON=python3.12        another interpreter for .venv
#   make ops SCM_OPS_CUDA=OFF          the native library without CUDA kernels
#
# A stamp is written only after its installation has succeeded, so the next call repeats a failed one.

PYTHON ?= python3
VENV   := .venv
FLOORS := build/floors
STUB   := build/stub
AUDIT  := build/audit
BIN    := $(VENV)/bin
CMAKE  := $(BIN)/cmake
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

MADE     := $(VENV)/.stamp-made
TOOLS    := $(VENV)/.stamp-tools
LIGHT    := $(VENV)/.stamp-light
FULL     := $(VENV)/.stamp-full
OPS      := $(VENV)/.stamp-ops
PACKAGE  := pyproject.toml constraints.txt scm_runtime/_version.py
EXTRAS   := cpu,export,hub,text,example,test,dev,bench
COMMA    := ,
KERNELS  := $(shell find cpp_ops -name '.*' -prune -o -type f -print)

DEMO     := demo/digits.png
LABELS   := 0,1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9

.DEFAULT_GOAL := help
.NOTPARALLEL:  # two pips must not install into .venv at the same time
.PHONY: help demo test test-gpu first-gpu test-stub lint types floors floors-runtime audit ops ops-test ops-sanitize ops-tsan ops-arm64 ops-avx512 soak kills fuzz bench bench-large format dist constraints clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | while IFS='	' read -r name what; do printf '  make %-15s %s\n' "$$name" "$$what"; done

demo: $(LIGHT) ## generate twenty digits with the embedded model; does not install torch
	@mkdir -p $(dir $(DEMO))
	$(BIN)/scm-runtime generate digits --labels $(LABELS) --seed 1460 --columns 10 -o $(DEMO)
	@echo "The digits are in $(CURDIR)/$(DEMO)"

test: $(FULL) $(OPS) ## run the tests, one process per core (ARGS="-k noise" selects)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(FULL) ## ruff (rules and format), import-linter, tables of docs/benchmarks.md
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/figures.py --check

types: $(FULL) ## mypy --strict
	$(BIN)/mypy --strict

floors: floors-runtime $(FLOORS)/.stamp-full ## install the lowest versions that pyproject.toml allows, and run the command lines and the tests of the runtime and of each family
	$(call run-floors,full,tests/runtime $(EXPORT_TESTS) -n auto --dist loadfile)

floors-runtime: $(FLOORS)/.stamp-runtime ## the part of floors that needs no torch
	$(FLOORS)/runtime/bin/scm-runtime --help > $(FLOORS)/help.txt
	$(FLOORS)/runtime/bin/scm-export --help > $(FLOORS)/help.txt
	$(call run-floors,runtime,$(RUNTIME_TESTS))

audit: $(FLOORS)/pins.txt $(AUDIT)/.stamp ## check the lowest and the pinned versions of all dependencies against known vulnerabilities (needs the network)
	@# Pillow is checked at its pinned version only: its known vulnerabilities are in decoders, and the runtime decodes only images that it wrote itself.
	grep -v '^pillow==' $(FLOORS)/direct.txt > $(AUDIT)/floors.txt
	@set -e; for pins in $(AUDIT)/floors.txt constraints.txt; do echo "== $$pins"; \
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --vulnerability-service osv $(AUDIT_FLAGS) --requirement $$pins; done

test-gpu: $(FULL) ## run the GPU tests, and again under compute-sanitizer if it is installed (needs onnxruntime-gpu and a CUDA build of torch in .venv)
	$(call build-ops,ON)
	$(BIN)/python -m pytest -m gpu $(ARGS)
	! command -v compute-sanitizer > /dev/null || compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest -m gpu tests/ops $(ARGS)

# It installs the library that it builds, but no packages: a machine with a GPU may have no network. Without .venv, PYTHON must have the packages.
first-gpu: ## build, test, tune and measure on a GPU in ten minutes, and write a report to commit (ARGS="--minutes 20")
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/first_gpu.py $(ARGS)

test-stub: $(FULL) ## run the CUDA path on a stub of a GPU, which computes nothing (tests/stub); skipped without nvcc, or if the packages cannot be installed
	@if ! command -v "$${CUDACXX:-nvcc}" > /dev/null; then echo "SKIPPED: test-stub needs nvcc 13, which was not found. Install the CUDA toolkit, or set CUDACXX."; \
	elif ! "$${CUDACXX:-nvcc}" --version | grep -Eq 'release (1[3-9]|[2-9][0-9])\.'; then echo "SKIPPED: test-stub needs nvcc 13, the version of CUDA in tests/stub/requirements.txt, got: $$("$${CUDACXX:-nvcc}" --version | tail -n 2 | head -n 1)"; \
	elif ! $(MAKE) --no-print-directory $(STUB)/.stamp-venv; then echo "SKIPPED: test-stub cannot install the packages in tests/stub/requirements.txt (see above)."; \
	else $(MAKE) --no-print-directory run-stub; fi

ops: $(FULL) ## build the native library and install it into .venv (SCM_OPS_CUDA=ON|OFF|AUTO, OPS_FLAGS for CMake)
	$(call build-ops,$(or $(SCM_OPS_CUDA),AUTO))

ops-test: $(TOOLS) ## build the native library and run its C++ tests
	$(call test-ops,build/ops-test,)

ops-sanitize: $(TOOLS) ## the same under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call test-ops,build/sanitize,-DSCM_OPS_SANITIZE=ON)

ops-tsan: $(TOOLS) ## build the library under ThreadSanitizer, and run the tests that have threads
	$(call test-ops,build/tsan,-DSCM_OPS_SANITIZE=THREAD)

ops-arm64: $(TOOLS) ## build the native library for 64-bit ARM and run its C++ tests in emulation; skipped without the cross compiler or qemu
	@if ! command -v aarch64-linux-gnu-g++ > /dev/null; then echo "SKIPPED: ops-arm64 needs aarch64-linux-gnu-g++, which was not found. Install Debian's g++-aarch64-linux-gnu."; \
	elif ! command -v qemu-aarch64 > /dev/null; then echo "SKIPPED: ops-arm64 needs qemu-aarch64, which was not found. Install Debian's qemu-user."; \
	else $(MAKE) --no-print-directory run-arm64; fi

ops-avx512: $(TOOLS) ## run the C++ tests with the kernels for AVX-512, whose intrinsics are emulated, on a processor with AVX2
	$(call CONFIGURE,build/ops-test) -DSCM_OPS_CUDA=OFF -DSCM_OPS_TESTS=ON $(OPS_FLAGS)
	$(CMAKE) --build build/ops-test --parallel $(JOBS) --target scm_ops_avx512_in_software_tests
	build/ops-test/tests/avx512_in_software/scm_ops_avx512_in_software_tests --gtest_brief=1

soak: $(FULL) $(OPS) ## use Generators from many threads in every way, twice for ten minutes (SECONDS=60 for one)
	@# With one malloc arena per thread, it takes an hour until the resident memory is constant.
	MALLOC_ARENA_MAX=1 $(BIN)/python tests/soak/soak.py $(or $(SECONDS),600)

kills: $(FULL) $(OPS) ## kill exports and generations 200 times: nothing may be lost or left (KILLS=20, SEED=1)
	$(BIN)/python tests/soak/kills.py $(or $(KILLS),200) $(or $(SEED),0)

fuzz: $(FULL) ## read mutated files for an hour (SECONDS=600 for another time, SEED=1 for other files); inputs that fail are written to build/fuzz
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/fuzz/campaign.py --seconds $(or $(SECONDS),3600) --seed $(or $(SEED),0)

bench: $(FULL) $(OPS) ## measure the small models on the CPU for at most 20 minutes; another call goes on (ARGS="--minutes 60")
	$(BIN)/python benchmarks/all_scripts.py short $(ARGS)

bench-large: $(FULL) $(OPS) ## measure the models of up to 1.6 billion parameters on the CPU: hours, 16 GB of memory, 20 GB of disk
	$(BIN)/python benchmarks/all_scripts.py large $(ARGS)

format: $(FULL) ## apply ruff's format and fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

dist: $(FULL) ## build the sdist and the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build

# Only torch keeps its pin, which is changed by hand. A local version (+cpu) is removed: it names the build that was installed, not the one
# that is required.
constraints: ## resolve all extras again and rewrite constraints.txt
	@$(CHECK_PYTHON)
	rm -rf build/constraints
	mkdir -p build/constraints
	$(PYTHON) -m venv build/constraints/venv
	grep '^torch==' constraints.txt > build/constraints/pins.txt
	build/constraints/venv/bin/python -m pip --disable-pip-version-check --quiet install -c build/constraints/pins.txt -e '.[$(EXTRAS)]' setuptools
	build/constraints/venv/bin/python -m pip freeze --all --exclude-editable --exclude pip > build/constraints/frozen.txt
	sed '/^[^#]/,$$d' constraints.txt > build/constraints/new.txt
	sed 's/+[a-z0-9.]*$$//' build/constraints/frozen.txt >> build/constraints/new.txt
	mv build/constraints/new.txt constraints.txt
	rm -rf build/constraints

clean: ## remove build products and generated files; keep .venv
	rm -rf build dist demo .import_linter_cache .mypy_cache .ruff_cache .pytest_cache
	find scm_runtime export tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

# -- The native library ------------------------------------------------------------------------------------------------

# CUDA kernels take minutes to compile. Targets that install do not build them by default; `make ops` does if there is nvcc. Later targets rebuild
# what `make ops` last built when the sources change.

GENERATOR   = $(if $(wildcard $(1)/CMakeCache.txt),,-G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja))
# The environment variables in CONTRIBUTING.md apply to these targets as they do to pip.
HEADERS     = $(if $(ONNXRUNTIME_INCLUDE_DIR),-DONNXRUNTIME_INCLUDE_DIR=$(ONNXRUNTIME_INCLUDE_DIR)) $(if $(SCM_OPS_FETCH_HEADERS),-DSCM_OPS_FETCH_HEADERS=$(SCM_OPS_FETCH_HEADERS))
CONFIGURE   = $(CMAKE) -S cpp_ops -B $(1) $(call GENERATOR,$(1)) -DSCM_OPS_WERROR=ON $(HEADERS)
JOBS       ?= $(shell nproc 2> /dev/null || echo 2)
SITE        = $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

# $(1): ON, OFF or AUTO; empty for the previous value
define build-ops
$(call CONFIGURE,build/ops) -DCMAKE_BUILD_TYPE=Release $(if $(1),-DSCM_OPS_CUDA=$(1)) $(OPS_FLAGS)
$(CMAKE) --build build/ops --parallel $(JOBS)
$(CMAKE) --install build/ops --prefix "$(SITE)"
@# An editable install that was made without the library does not search that folder.
@$(BIN)/python -c 'import sys; from scm_runtime.ort.native_ops import find_library; sys.exit(find_library() is None)' \
	|| SCM_REQUIRE_OPS=1 SCM_OPS_CUDA=$(or $(1),OFF) $(PIP) install --no-deps -e .
@touch $(OPS)
endef

# $(1): build folder; $(2): further options
define test-ops
$(call CONFIGURE,$(1)) -DSCM_OPS_CUDA=$(or $(SCM_OPS_CUDA),OFF) -DSCM_OPS_TESTS=ON $(2) $(OPS_FLAGS)
$(CMAKE) --build $(1) --parallel $(JOBS)
$(BIN)/ctest --test-dir $(1) --output-on-failure --parallel $(JOBS)
endef

# Only the tests of the operators and of the code that they share: the CUDA sources do not depend on the processor.
.PHONY: run-arm64
run-arm64:
	$(call CONFIGURE,build/arm64) -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DSCM_OPS_CUDA=OFF -DSCM_OPS_TESTS=ON $(OPS_FLAGS)
	$(CMAKE) --build build/arm64 --parallel $(JOBS) --target scm_ops_tests
	$(BIN)/ctest --test-dir build/arm64 --output-on-failure --tests-regex '^scm_ops_tests$$'

$(OPS): $(FULL) $(KERNELS)
	$(call build-ops,$(or $(SCM_OPS_CUDA),$(if $(wildcard build/ops/CMakeCache.txt),,OFF)))

# -- The stub of a GPU --------------------------------------------------------------------------------------------------

STUB_SITE = $$($(STUB)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

$(STUB)/.stamp-venv: tests/stub/requirements.txt
	rm -rf $(STUB)/venv
	$(BIN)/python -m venv $(STUB)/venv
	$(STUB)/venv/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r $<
	@touch $@

# Two devices: there are tests that need a second one. -P: the package in this folder has no library for the stub.
.PHONY: run-stub
run-stub:
	$(CMAKE) -S tests/stub -B $(STUB)/libraries $(call GENERATOR,$(STUB)/libraries) -DSCM_STUB_SITE_PACKAGES="$(STUB_SITE)"
	$(CMAKE) --build $(STUB)/libraries --parallel $(JOBS)
	$(call CONFIGURE,$(STUB)/ops) -DCMAKE_BUILD_TYPE=Release -DSCM_OPS_CUDA=ON -DSCM_OPS_CUDA_RUNTIME=Shared -DSCM_OPS_CUDA_ARCHITECTURES=90-real $(OPS_FLAGS)
	$(CMAKE) --build $(STUB)/ops --parallel $(JOBS)
	$(BIN)/python tests/stub/environment.py $(STUB)
	$(CMAKE) --install $(STUB)/ops --prefix $(STUB)/packages
	rm -f $(STUB)/log
	LD_LIBRARY_PATH=$(abspath $(STUB)/libraries) SCM_STUB_LOG=$(abspath $(STUB)/log) SCM_STUB_DEVICES=2 PYTHONPATH=tests OMP_NUM_THREADS=1 \
	$(STUB)/venv/bin/python -P -m pytest -p stub.plugin $(or $(ARGS),tests/stub tests/gpu)

# -- The virtual environment ------------------------------------------------------------------------------------------

CHECK_PYTHON = command -v $(PYTHON) > /dev/null \
	|| { echo "scm-runtime needs Python 3.11 or newer, and $(PYTHON) was not found. Name another: make PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("scm-runtime needs Python 3.11 or newer, and $(PYTHON) is %d.%d.%d. \
	Name another: make PYTHON=python3.12" % sys.version_info[:3])'

$(MADE):
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	@touch $@

# pip builds the library from the current sources. If `make ops` has built another one, that one is installed again.
INSTALL = SCM_OPS_CUDA=$(or $(SCM_OPS_CUDA),OFF) $(PIP) install -c constraints.txt -e
FRESH   = @test -e build/ops/CMakeCache.txt || touch $(OPS)

# What the C++ tests need: CI builds them while the rest is installed.
$(TOOLS): $(MADE) constraints.txt
	$(PIP) install -c constraints.txt cmake ninja uv
	@touch $@

$(LIGHT): $(MADE) $(PACKAGE)
	$(INSTALL) '.[cpu]'
	@touch $@
	$(FRESH)

# -- The lowest versions ------------------------------------------------------------------------------------------------

# uv resolves and pip installs: pip uses the build of torch that is available (CONTRIBUTING.md), uv would download another. torch and packages that
# pyproject.toml does not name have the versions in constraints.txt, if the floors allow it.

LOWEST_EXTRAS  := cpu,export,hub,text,test
RUNTIME_EXTRAS := cpu,hub
RESOLVE         = $(BIN)/uv pip compile --quiet --no-header --no-annotate --python $(BIN)/python --resolution lowest-direct
RESOLVE        += --extra cpu --extra export --extra hub --extra text --extra test
RUNTIME_TESTS  := $(patsubst %,tests/runtime/test_%.py,commands cache devices doctor pool samples)
EXPORT_TESTS   := $(patsubst %,tests/export/test_%.py,cli consistency export latent_consistency module_family sana_sprint)

$(FLOORS)/pins.txt: $(FULL)
	rm -rf $(FLOORS)
	mkdir -p $(FLOORS)
	grep '^torch==' constraints.txt > $(FLOORS)/torch.txt
	$(RESOLVE) --no-deps pyproject.toml -o $(FLOORS)/direct.txt
	cp constraints.txt $(FLOORS)/new.txt
	$(RESOLVE) -c $(FLOORS)/torch.txt $$(sed 's/==.*//; s/^/--upgrade-package /' $(FLOORS)/direct.txt) pyproject.toml -o $(FLOORS)/new.txt
	mv $(FLOORS)/new.txt $@

# $(1): name of the environment; $(2): extras to install; $(3): further options for pip
define install-floors
$(BIN)/python -m venv $(FLOORS)/$(1)
SCM_OPS_CUDA=OFF $(FLOORS)/$(1)/bin/python -m pip --disable-pip-version-check --quiet install -c $(FLOORS)/pins.txt $(3) -e '.[$(2)]' pytest pytest-xdist
@touch $@
endef

$(FLOORS)/.stamp-runtime: $(FLOORS)/pins.txt
	$(call install-floors,runtime,$(RUNTIME_EXTRAS),$(WITHOUT_OPS))

$(FLOORS)/.stamp-full: $(FLOORS)/pins.txt
	$(call install-floors,full,$(LOWEST_EXTRAS))

# pip-audit is no dependency of the project, not even for development: it has an environment of its own.
$(AUDIT)/.stamp: $(MADE)
	$(BIN)/python -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip --disable-pip-version-check --quiet install 'pip-audit>=2.10'
	@touch $@

# The environment without torch has no native library either, which takes a minute to compile.
WITHOUT_OPS = -C wheel.cmake=false -C wheel.platlib=false

# Warnings are errors only with the pinned versions: older ones emit warnings about their own use.
run-floors = $(if $(filter runtime,$(1)),env -u SCM_REQUIRE_OPS) OMP_NUM_THREADS=1 $(FLOORS)/$(1)/bin/python -m pytest -W default $(2)

# pip installs torch, because uv would download another build (see the lowest versions), and scm-runtime. uv installs the rest, in a tenth of pip's time. If it
# cannot, because it does not find pip's index for instance, pip installs all.
$(FULL): $(TOOLS) $(PACKAGE)
	$(PIP) install --no-compile -c constraints.txt torch
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -r pyproject.toml $(addprefix --extra ,$(subst $(COMMA), ,$(EXTRAS))) \
		|| echo "uv could not install the packages (see above): pip does."
	$(INSTALL) '.[$(EXTRAS)]'
	@touch $(LIGHT) $@
	$(FRESH)
