"""Paths that clients with a wrong base URL mean."""

from __future__ import annotations

import pytest

from llm_api_server.gateway.wire.known_paths import meant_path, unknown_url

KNOWN = {"/v1/chat/completions", "/v1/messages", "/v1/models", "/rerank", "/v1/rerank", "/health", "/admin/api/keys"}


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/v1/messages", "/v1/messages"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/V1/Chat/Completions", "/v1/chat/completions"),
        ("/api/v1/chat/completions", "/v1/chat/completions"),
        ("/openai/chat/completions", "/v1/chat/completions"),
        ("/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/models/org/m", "/v1/models/org/m"),
        ("/v1/v1/models/Org/M", "/v1/models/Org/M"),
        ("/v1/models/m/", "/v1/models/m"),
        ("/rerank/", "/rerank"),
        ("/health/", "/health"),
        ("/admin/api/keys/", "/admin/api/keys"),
    ],
)
def test_wrong_base_url_is_seen_through(path: str, meant: str) -> None:
    assert meant_path(path, KNOWN) == meant
    assert f"Did you mean {meant}?" in unknown_url("POST", path, KNOWN).message


@pytest.mark.parametrize(
    "path", ["/", "//", "/v1", "/v1/nothing", "/chat", "/v1/chat/completions/x", "/a" * 13 + "/health"]
)
def test_other_paths_mean_nothing_known(path: str) -> None:
    assert meant_path(path, KNOWN) is None
    assert "See /docs" in unknown_url("GET", path, KNOWN).message
