"""Plans of remote models: no process, the address without /v1, the key as a header."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_api_server.config.models import ModelConfig
from llm_api_server.engines.base import ModelProblem
from llm_api_server.engines.remote import RemoteEngine, base_address


def test_a_plan_starts_nothing_and_carries_the_key() -> None:
    model = ModelConfig(path="https://host.example/v1", api_key="sk-remote-key", upstream_model="their-name")
    plan = RemoteEngine().plan("ours", model, Path("unused.sock"))
    assert plan.argv == []
    assert plan.address == "https://host.example"
    assert plan.headers == {"authorization": "Bearer sk-remote-key"}
    assert plan.upstream_model == "their-name"


def test_without_a_key_there_is_no_header_and_the_configured_name_is_sent() -> None:
    plan = RemoteEngine().plan("ours", ModelConfig(path="http://127.0.0.1:8000"), Path("unused.sock"))
    assert plan.headers == {}
    assert plan.upstream_model == "ours"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://a:1/v1/", "http://a:1"),
        ("http://a/openai/v1", "http://a/openai"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("http://a/v10", "http://a/v10"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert base_address(url) == address


@pytest.mark.parametrize("url", ["http://", "http://a:99999/v1", "ftp://a", "http://a/?x=1", "http://u:p@a/v1"])
def test_unusable_urls_are_problems(url: str) -> None:
    with pytest.raises(ModelProblem):
        RemoteEngine().inspect(ModelConfig(path=url))
