# make help lists the targets. Each works as the first command on a fresh clone: what it needs is installed into .venv/.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Triton, which only the tests of kernels need on a machine without a GPU: 190 MB.
KERNELS_STAMP := $(VENV)/.installed-triton
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q
# Interpreters to try, newest first; PYTHON=/path/to/python names one.
PYTHON ?= python3.13 python3.12 python3.11 python3
GPU_PYTHON ?= python3

.DEFAULT_GOAL := help
WHEELS ?= build/wheels
GPU_OUT ?= runs/gpu
.PHONY: help setup demo flickr8k test lint bench gpu gpu-wheels

help:
	@echo "make setup   install vpgtrans, editable, with everything it needs into $(VENV)/ (PYTHON=... names the interpreter)"
	@echo "make demo    the whole transfer on the miniature world (DEMO_ARGS=... is handed on)"
	@echo "make flickr8k  the same on real photographs; VPGTRANS_DATA names the data folder (hours on two cores)"
	@echo "make test    all quick tests (PYTEST_ARGS=... is handed on, such as '-m slow' or 'tests/test_x.py')"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make bench   every benches/bench_*.py (BENCH_ARGS=... is handed on)"
	@echo "make gpu     on a CUDA machine, without network: build for GPU_PYTHON (its own torch), then tests and benches in parts (PART=...)"
	@echo "make gpu-wheels  before that, with a network: the Python packages that such a machine may lack, into $(WHEELS)/"

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/vpgtrans demo $(DEMO_ARGS)

flickr8k: $(STAMP)
	$(BIN)/vpgtrans demo --plan recipes/flickr8k/plan.yaml --out runs/flickr8k $(DEMO_ARGS)
	$(BIN)/vpgtrans demo --plan recipes/flickr8k/plan_llama.yaml --out runs/flickr8k_llama $(DEMO_ARGS)

# One thread a process: the tests' matrices are tiny, and several processes share the cores. TEST_PROCESSES=0: all in one, as -s and --pdb want it.
TEST_PROCESSES ?= 2
test: export OMP_NUM_THREADS = 1
test: export OPENBLAS_NUM_THREADS = 1
test: export TOKENIZERS_PARALLELISM = false
test: export HF_HUB_OFFLINE = 1
test: $(KERNELS_STAMP)
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	@set -e; for bench in benches/bench_*.py; do $(BIN)/python $$bench $(BENCH_ARGS); done

# A folder beside the interpreter's own packages, so that its torch is used and its installation left as it is. Packages that it lacks
# (pydantic; peers such as flash-attn) come from $(WHEELS)/, which `make gpu-wheels` fills where there is a network.
gpu:
	@$(GPU_PYTHON) -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"' || \
		{ echo "make gpu: $(GPU_PYTHON) needs torch and a CUDA device; GPU_PYTHON=... names another interpreter" >&2; exit 1; }
	@if [ ! -f build/gpu/.built ]; then \
		rm -rf build/gpu; \
		$(GPU_PYTHON) -m pip install --disable-pip-version-check -q --no-index --no-build-isolation --no-deps --target build/gpu . && \
		if ls $(WHEELS)/*.whl >/dev/null 2>&1; then \
			$(GPU_PYTHON) -m pip install --disable-pip-version-check -q --no-index --no-deps --target build/gpu $(WHEELS)/*.whl; \
		fi && touch build/gpu/.built; \
	fi
	PYTHONPATH=build/gpu $(GPU_PYTHON) -P benches/gpu.py --out $(GPU_OUT) $(if $(PART),--part $(PART)) $(GPU_ARGS)

gpu-wheels: $(STAMP)
	$(BIN)/python -m pip download --disable-pip-version-check -q --no-deps --only-binary :all: --python-version 3.12 \
		--platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 --platform any \
		-c constraints.txt -d $(WHEELS) pydantic pydantic_core annotated-types typing-inspection xformers

# Made anew where its Python is gone, or where the folder was moved or copied: it would still run the old tree.
VENV_ROOT := $(shell $(BIN)/python -c '' 2>/dev/null && cat $(VENV)/.root)
ifneq ($(VENV_ROOT),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): setup.py pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*)
	@$(check_machine); \
	if [ "$(VENV_ROOT)" != "$(CURDIR)" ]; then \
		echo "Creating $(VENV)/ with $$python"; \
		"$$python" -m venv --clear $(VENV) && printf '%s' "$(CURDIR)" > $(VENV)/.root; \
	fi
	@echo "Installing into $(VENV)/: the first time this fetches torch and takes some minutes"
	@$(PIP_INSTALL) -c constraints.txt setuptools cmake ninja pybind11
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP_INSTALL) --no-build-isolation -c constraints.txt -e '.[test,lint]'
	@touch $@
	@echo "Installed. The command is $(BIN)/vpgtrans; to have it on PATH: source $(BIN)/activate"

$(KERNELS_STAMP): $(STAMP)
	@$(PIP_INSTALL) -c constraints.txt 'triton; platform_system == "Linux"'
	@touch $@

# Prints the version and what is missing for a virtual environment and for compiling an extension; fails below 3.11.
define PROBE
import importlib.util, os, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit(1)
missing = [] if importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv") else ["venv"]
if not os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    missing.append("dev")
print("%d.%d" % sys.version_info[:2], *missing)
endef
export PROBE

# Sets $$python to the first interpreter that lacks nothing, or says which system packages to install, and fails.
define check_machine
python=; version=; lacks=; \
for candidate in $(PYTHON); do \
	found=$$("$$candidate" -c "$$PROBE" 2>/dev/null) || continue; \
	if [ -z "$$python" ] || [ "$${found#* }" = "$$found" ]; then \
		python=$$candidate; version=$${found%% *}; lacks=$${found#$$version}; \
	fi; \
	[ -n "$$lacks" ] || break; \
done; \
debian=; fedora=; \
if [ -z "$$python" ]; then \
	echo "make setup: found no Python 3.11 or newer (tried: $(PYTHON))." >&2; \
	debian=" python3 python3-venv python3-dev"; fedora=" python3 python3-devel"; \
fi; \
for part in $$lacks; do case $$part in \
	venv) echo "make setup: $$python ($$version) cannot make virtual environments: the module ensurepip is missing." >&2; \
		debian="$$debian python$$version-venv"; fedora="$$fedora python3-libs";; \
	dev) echo "make setup: $$python ($$version) comes without its C headers (Python.h)." >&2; \
		debian="$$debian python$$version-dev"; fedora="$$fedora python3-devel";; \
esac; done; \
compiler=; \
for candidate in "$${CXX:-c++}" g++ clang++; do \
	if printf '#include <vector>\n' | $$candidate -x c++ -fsyntax-only - 2>/dev/null; then compiler=$$candidate; break; fi; \
done; \
if [ -z "$$compiler" ]; then \
	echo "make setup: found no working C++ compiler (tried: $${CXX:-c++} g++ clang++)." >&2; \
	debian="$$debian g++"; fedora="$$fedora gcc-c++"; \
fi; \
if [ -n "$$debian" ]; then \
	echo "As root:" >&2; \
	echo "  Debian, Ubuntu:  apt-get install$$debian" >&2; \
	echo "  Fedora:          dnf install$$fedora" >&2; \
	if [ -z "$$python" ]; then \
		echo "Where python3 is older than 3.11: python3.11 python3.11-venv python3.11-dev (Fedora: python3.11 python3.11-devel)." >&2; \
		echo "Or name an interpreter: make setup PYTHON=/path/to/python3.11" >&2; \
	fi; \
	exit 1; \
fi
endef
