PYTHON ?= python3
TRITON_VERSIONS := 3.6 3.9
TARGET := sm_90
# Triton 3.6's interpreter makes scalars of one-element arrays, which NumPy 2.4 refuses.
REQUIRES_3.6 := 'numpy<2.4'

BIN := .venv/bin
EVERYTHING := -e '.[cli,perf,demo,dev]'
MATRIX := $(TRITON_VERSIONS:%=matrix-%)
# pytest runs one process per core: more threads in each would only compete.
TEST_ENV := env -u TRITON_INTERPRET OMP_NUM_THREADS=1

FAST_TESTS := tests/support $(addprefix tests/api/test_, architecture.py conversion.py errors.py \
  fused.py group_norm.py layer.py layout.py settings.py statistics.py)
# every strategy, layout and direction, each kernel's answers against float64
FAST_KERNEL_TESTS := tests/kernels/test_activations.py tests/kernels/test_forward_backward.py \
  -k "float32 and (matches_float64 or activations)"

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("The set-up needs Python 3.11 or newer, but $(PYTHON) is Python %d.%d. "
             "Remedy: make PYTHON=/path/to/python3.11" % sys.version_info[:2])
endef
export CHECK_PYTHON

define CHECK_WHEEL
from importlib.metadata import files, version
import torch, triton_gn
assert version("triton-gn") == triton_gn.__version__, version("triton-gn")
assert triton_gn.group_norm(torch.randn(2, 6, 5), 2).shape == (2, 6, 5)
paths = [path.as_posix() for path in files("triton-gn")]
assert "triton_gn/py.typed" in paths, paths
assert all(path.startswith(("triton_gn/", "triton_gn-")) for path in paths), paths
print("The wheel works in an empty environment:", triton_gn.__file__)
endef
export CHECK_WHEEL

# $(call make_venv,DIRECTORY,WHAT TO INSTALL)
define make_venv
@command -v $(PYTHON) >/dev/null || { echo "The set-up needs Python 3.11 or newer, but there is no \
  $(PYTHON). Remedy: make PYTHON=/path/to/python3.11" >&2; exit 1; }
@$(PYTHON) -c "$$CHECK_PYTHON"
@echo "Setting up $(1) ..."
@$(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip install -qq -c constraints.txt $(2)
endef

# $(call run_tests,PYTHON,TESTS THAT NEED NO INTERPRETER)
# Both halves always run. Under ARGS one half may select no test: pytest's exit status 5.
define run_tests
@$(TEST_ENV) $(1) -m pytest -n auto $(2) $(ARGS); torch=$$?; \
$(TEST_ENV) TRITON_INTERPRET=1 $(1) -m pytest -n auto tests/kernels $(ARGS); kernels=$$?; \
case "$(if $(ARGS),some,all) $$torch $$kernels" in \
  "all 0 0" | "some 0 0" | "some 0 5" | "some 5 0") ;; \
  *) exit 1 ;; \
esac
endef

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint format compile-all figures gpu matrix $(MATRIX) wheel clean

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 12

demo: .venv/.installed ## Train with PyTorch's GroupNorm and triton_gn's, fuse a U-Net, draw a sweep of plans
	@env -u TRITON_INTERPRET $(BIN)/python examples/digits.py
	@echo
	@env -u TRITON_INTERPRET $(BIN)/python -m perf coverage --model UNet2DCondition
	@echo
	@env -u TRITON_INTERPRET $(BIN)/python -m perf demo

test: .venv/.installed ## Run all tests; ARGS="-k name" selects some
	$(call run_tests,$(BIN)/python,tests --ignore=tests/kernels)

test-fast: .venv/.installed ## Run the tests of the API, the layers and each kernel in float32, in a minute
	@$(TEST_ENV) $(BIN)/python -m pytest -n auto $(FAST_TESTS)
	@$(TEST_ENV) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto $(FAST_KERNEL_TESTS)

lint: .venv/.installed ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.installed ## Format the code and repair what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

compile-all: .venv/.installed ## Compile the plans of all perf/workloads.csv for an H100; TARGET=sm_80 for another
	$(BIN)/python -m triton_gn inspect --workloads perf/workloads.csv --direction both \
	  --target $(TARGET)

gpu: ## On a GPU: tests, ceilings, core benchmark, short tune, figures; again, it goes on from there
	$(PYTHON) -m perf gpu

figures: .venv/.installed ## Predict for an H100, draw what the README shows; TARGET=sm_80 for another
	$(BIN)/python -m perf bench --predict $(TARGET) --directions forward,backward
	$(BIN)/python -m perf sweep --target $(TARGET) --shape 2x320x64x64 --groups 32 \
	  --activation silu --direction forward
	$(BIN)/python -m perf plot perf/results/predicted

matrix: $(MATRIX) ## Run the kernel tests on the oldest and the newest Triton

$(MATRIX): matrix-%: .venv-triton-%/.installed
	@echo "Triton $*"
	$(call run_tests,.venv-triton-$*/bin/python,tests/offline/test_compile.py tests/offline/test_ptx.py tests/offline/test_standin.py)

wheel: .venv/.installed ## Build the wheel and use it in an empty environment
	@rm -rf dist .venv-wheel
	$(BIN)/python -m build
	$(call make_venv,.venv-wheel,dist/*.whl)
	@cd / && "$(CURDIR)/.venv-wheel/bin/python" -I -W error \
	  -W "ignore:Failed to initialize NumPy" -c "$$CHECK_WHEEL"

clean: ## Remove everything that these targets made
	rm -rf .venv .venv-* demo dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	$(call make_venv,.venv,$(EVERYTHING))
	@touch $@

.venv-triton-%/.installed: pyproject.toml constraints.txt
	$(call make_venv,.venv-triton-$*,-e '.[test]' 'triton==$*.*' $(REQUIRES_$*))
	@touch $@
