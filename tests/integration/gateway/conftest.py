"""Fixtures of the gateway tests: a worker, its fake engine and its fake manager, for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from llm_api_server.gateway.http.fast_path import HttpProtocol
from llm_api_server.gateway.proxy.running_requests import RunningRequests
from llm_api_server.ipc.run_dir import RunDir
from tests.gateway_worker import Gateway, make_config, run_engine, run_gateway, short_run_dir


@pytest.fixture
def run_dir() -> Iterator[RunDir]:
    with short_run_dir() as run_dir:
        yield run_dir


@pytest.fixture
async def engine_socket(run_dir: RunDir) -> AsyncIterator[Path]:
    async with run_engine(run_dir) as path:
        yield path


@pytest.fixture
async def gateway(run_dir: RunDir, engine_socket: Path, request: pytest.FixtureRequest) -> AsyncIterator[Gateway]:
    http = getattr(request, "param", HttpProtocol)
    async with run_gateway(run_dir, engine_socket, make_config(run_dir), http) as one:
        yield one


@pytest.fixture(scope="module")
async def shared_gateway() -> AsyncIterator[Gateway]:
    """One worker for all cases of a module that leave no trace in it, nor in its engine or manager."""
    with short_run_dir() as run_dir:
        async with run_engine(run_dir) as path, run_gateway(run_dir, path, make_config(run_dir)) as one:
            yield one


@pytest.fixture
def fast_pings() -> RunningRequests:
    """Registry that pings a waiting stream twenty times a second."""
    return RunningRequests(first_ping_delay=0.05, ping_interval=0.05)
