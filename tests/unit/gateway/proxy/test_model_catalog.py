"""Names, aliases and adapters, and who may use which."""

from __future__ import annotations

import pytest

from llm_api_server.auth.access import Key
from llm_api_server.config.models import ModelConfig, ModelsConfig
from llm_api_server.errors import InvalidRequest, ModelNotFound, PermissionDenied
from llm_api_server.gateway.proxy.model_catalog import Found, ModelCatalog

BASE = ModelConfig(path="org/base", aliases=["gpt-4o"], adapters={"legal": "a", "base-medical": "b"})
OTHER = ModelConfig(path="org/other", adapters={"poems": "c"})


def catalog(default: str | None = None) -> ModelCatalog:
    return ModelCatalog(ModelsConfig(default=default, available={"base": BASE, "other": OTHER}))


def key(*models: str) -> Key:
    return Key("k", "id", frozenset({"all"}), models)


def test_adapters_follow_their_models() -> None:
    assert [found.name for found in catalog().all] == ["base", "legal", "base-medical", "other", "poems"]
    assert [found.model for found in catalog().all] == ["base", "base", "base", "other", "other"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("base", Found("base")),
        ("gpt-4o", Found("base")),
        ("legal", Found("base", "legal")),
        ("poems", Found("other", "poems")),
        (None, Found("base", "legal")),
    ],
)
def test_every_name_is_found(wanted: str | None, found: Found) -> None:
    assert catalog("legal").find(wanted, key("*")) == found


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [
        (["base"], {"base", "gpt-4o"}),
        (["gpt-4o"], {"gpt-4o"}),
        (["legal"], {"legal"}),
        (["base*"], {"base", "gpt-4o", "base-medical"}),
        (["other", "legal"], {"other", "legal"}),
        ([], set()),
    ],
)
def test_an_adapter_is_allowed_by_its_own_name_only(patterns: list[str], allowed: set[str]) -> None:
    names = ["base", "gpt-4o", "legal", "base-medical", "other", "poems"]
    for name in names:
        if name in allowed:
            catalog().find(name, key(*patterns))
        else:
            with pytest.raises(PermissionDenied, match=name):
                catalog().find(name, key(*patterns))


def test_the_default_needs_the_same_right() -> None:
    with pytest.raises(PermissionDenied):
        catalog("legal").find(None, key("base"))
    with pytest.raises(InvalidRequest):
        catalog().find(None, key("*"))


def test_a_path_is_no_name() -> None:
    with pytest.raises(ModelNotFound):
        catalog().find("org/base", key("*"))
