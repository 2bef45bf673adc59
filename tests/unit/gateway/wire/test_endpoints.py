"""The table of engine endpoints."""

from __future__ import annotations

import pytest

from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.types import EngineName


@pytest.mark.parametrize(
    ("path", "engine", "expected"),
    [
        ("/v1/tokenize", "vllm", "/tokenize"),
        ("/v2/rerank", "llama_cpp", "/v1/rerank"),
        ("/v2/rerank", "vllm", "/v2/rerank"),
    ],
)
def test_an_engine_is_asked_under_its_own_path(path: str, engine: EngineName, expected: str) -> None:
    assert ENDPOINTS[path].path_on(engine) == expected
