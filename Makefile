# make help lists the targets; demo and test do the whole set-up themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUN    ?= runs/cpu-demo
BASELINE ?= $(PEER)
# the kernels, where a GPU is of compute capability 9.0 (H100) or newer
EXTRAS  = dev$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>&1 | grep -qE '^(9|[1-9][0-9])\.' && echo ,kernels)
export HF_HUB_OFFLINE ?= 1
export GRADIO_ANALYTICS_ENABLED ?= False

.PHONY: help setup demo chat web space test test-slow quality bench bench-gpu clean
help: ## show this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install the pinned stack, with the kernels if there is a GPU for them

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed ($$($(PYTHON) --version) found); try make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch and the pinned stack: minutes, without output'
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(STAMP)

demo: setup ## train a chat model from nothing on this CPU, print its scores (minutes)
	$(BIN)/nanochat demo --run-dir $(RUN)
	@echo 'or:  make chat    make web    make space$(if $(filter-out runs/cpu-demo,$(RUN)),    each with RUN=$(RUN))'

chat: setup ## chat in the terminal with the model of $(RUN)
	$(BIN)/nanochat chat --run-dir $(RUN)

web: setup ## the server with its chat page on http://127.0.0.1:8000 with the model of $(RUN)
	$(BIN)/nanochat serve --run-dir $(RUN)

space: setup ## the Gradio Space on http://127.0.0.1:7860 with the model of $(RUN)
	MODEL_ID=$$($(BIN)/python -c 'from nanochat_hf.run import Run; print(Run("$(RUN)").model(None))') && export MODEL_ID && \
		$(BIN)/python spaces/chat/app.py

test: setup ## quick offline tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow and not gpu" -n 2

test-slow: setup ## all that runs without a GPU: end-to-end, several processes, browser (if Chromium is there)
	@! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || \
		$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/pip install --quiet playwright || true
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not gpu"

quality: setup ## lint and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup ## tokens/s of the loader, the optimizer and a training step on this machine
	$(BIN)/python scripts/bench.py

bench-gpu: setup ## training and decoding on a GPU; BASELINE=path of a karpathy/nanochat checkout runs it beside ours; CONTENDERS=, CONFIGS= choose
	$(BIN)/python scripts/bench_gpu.py $(if $(BASELINE),--baseline $(BASELINE)) $(if $(CONTENDERS),--contenders $(CONTENDERS)) \
		$(if $(CONFIGS),--configs $(CONFIGS))
	$(BIN)/python scripts/bench_decoding.py

.PHONY: docs
docs: setup ## the documentation as a site in build/site; a dead link fails
	$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	rm -rf build/docs && mkdir -p build/docs
	git ls-files --cached --others --exclude-standard | tar -cf - -T - | tar -xf - -C build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict && echo "open build/site/index.html"

clean: ## delete runs/ and caches, keep .venv
	rm -rf runs .pytest_cache .ruff_cache
