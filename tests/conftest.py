"""Fixtures of all tests: a clean environment, asyncio for asynchronous tests, and the real test models on demand."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import models, needs, postgres

_FOLDERS = itertools.count()
E2E = Path(__file__).parent / "e2e"

# No test judges by the clock, and a busy machine is not a failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# A line per request would hide the failure.
for _client in ("httpx", "httpx2"):
    logging.getLogger(_client).setLevel(logging.WARNING)

_OURS = ("LLM_API_SERVER_", "OPENAI_", "ANTHROPIC_", "VLLM_")
_KEPT = {models.CACHE_VARIABLE, needs.NEED_VARIABLE}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark the tests of `tests/e2e`. Run them first: beside another test process the long ones must not come last."""
    for item in items:
        if item.path.is_relative_to(E2E):
            item.add_marker(pytest.mark.e2e)
    yield
    items.sort(key=lambda item: "e2e" not in item.keywords)


@pytest.fixture(autouse=True, scope="session")
def clean_environment() -> None:
    """Hide the settings of the caller's environment from the server, its engines and the clients.

    A shell's background jobs ignore Ctrl-C and would pass that on to the commands that tests interrupt.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in list(os.environ):
        if name.startswith(_OURS) and name not in _KEPT:
            del os.environ[name]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(autouse=True)
def unchanged_environment() -> Iterator[None]:
    """Undo what a test, or a command called in this process, sets."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short path, since the path of a unix socket below it has at most 107 bytes."""
    return tmp_path_factory.mktemp(f"t{next(_FOLDERS)}", numbered=False)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[postgres.Cluster]:
    """A PostgreSQL of the tests' own; `new_database()` gives the URL of an empty database."""
    cluster = postgres.Cluster(postgres.skip_without_postgres())
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct for llama.cpp: a chat model with an 8,192-token context."""
    return models.smollm2_gguf()


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma-3-270m (base, no chat tuning) for llama.cpp: a second, larger model."""
    return models.gemma3_gguf()


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder: an embedding model of 384 dimensions."""
    return models.minilm_folder()


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2 as a Hugging Face folder for vLLM; made with `.venv-vllm`, so only for tests marked `vllm`."""
    return models.smollm2_folder()


@pytest.fixture(scope="session")
def ranker_folder() -> Path:
    """A classifier of one label, which ranks, with a random head; made with `.venv-vllm`, for tests marked `vllm`."""
    return models.ranker_folder()


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of `.venv-vllm`."""
    return models.vllm_python()


@pytest.fixture(scope="session")
def node_openai() -> Path:
    """A folder in which Node resolves the `openai` package: run scripts with it as the working directory."""
    if shutil.which("npm") is None and "CI" not in os.environ:
        pytest.skip("Node and npm are not installed")
    return models.node_openai()


@pytest.fixture(scope="session")
def node_browser() -> Path:
    """The packages that drive a browser."""
    if shutil.which("npm") is None:
        needs.missing("node", "npm is not installed")
    return models.node_browser()
