"""Configured keys: found by their secret, stored as digests, with the rights of the configuration."""

from __future__ import annotations

import asyncio
import gc
import hashlib

import pytest

from llm_api_server.auth.access import Key, new_key
from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.auth.keys import ANONYMOUS, KeyRing, digest
from llm_api_server.config.models import AuthConfig
from llm_api_server.errors import InvalidKey
from llm_api_server.types import Permission

PLAIN = "sk-plain-0123456789"
HASHED = "sk-hashed-0123456789"
UMLAUT = "sk-schlüssel-新密钥"


@pytest.fixture
def ring() -> KeyRing:
    auth = AuthConfig.model_validate(
        {
            "api_keys": [
                {"key": PLAIN, "name": "plain", "permissions": ["chat", "models"], "models": ["qwen*", "exact"]},
                {"key": f"sha256:{hashlib.sha256(HASHED.encode()).hexdigest().upper()}", "name": "hashed"},
                {"key": UMLAUT, "name": "umlaut"},
            ]
        }
    )
    return KeyRing(auth)


class NoStore:
    async def find(self, *, digest: str | None = None, key_id: str | None = None) -> None:
        return None


def find(ring: KeyRing, secret: str) -> Key | None:
    """Authenticate as a request would."""
    try:
        return asyncio.run(Authenticator(ring, NoStore()).authenticate(secret, None))[0]
    except InvalidKey:
        return None


def named(key: Key | None) -> str | None:
    return key.name if key else None


def test_keys_are_found_plain_or_hashed(ring: KeyRing) -> None:
    assert named(find(ring, PLAIN)) == "plain"
    assert named(find(ring, HASHED)) == "hashed"
    assert len(ring) == 3


def test_a_key_with_other_letters_is_found_by_its_header_bytes(ring: KeyRing) -> None:
    assert named(find(ring, UMLAUT)) == "umlaut"
    assert named(find(ring, UMLAUT.encode().decode("latin-1"))) == "umlaut"


@pytest.mark.parametrize(
    "secret",
    [
        "",
        PLAIN[:-1],
        PLAIN + " ",
        PLAIN.upper(),
        digest(PLAIN),
        f"sha256:{digest(HASHED)}",
        "ÿ" * 9,
        "\ud800",
        "新" * 9,
    ],
)
def test_any_other_secret_is_not_found(ring: KeyRing, secret: str) -> None:
    assert find(ring, secret) is None


def test_the_secret_of_a_key_is_not_kept() -> None:
    secret = "sk-kept-nowhere-0123456789"
    ring = KeyRing(AuthConfig.model_validate({"api_keys": [{"key": secret, "name": "a"}]}))
    seen: set[int] = set()
    todo: list[object] = [ring]
    while todo:
        thing = todo.pop()
        if id(thing) not in seen and not isinstance(thing, type):
            seen.add(id(thing))
            assert thing != secret
            todo += gc.get_referents(thing)
    assert named(find(ring, secret)) == "a"


def test_the_id_is_the_beginning_of_the_hash(ring: KeyRing) -> None:
    key = find(ring, PLAIN)
    assert key is not None
    assert key.key_id == hashlib.sha256(PLAIN.encode()).hexdigest()[:12]
    assert ring.find_by_id(key.key_id) == key
    assert ring.find_by_id("") is None


@pytest.mark.parametrize(
    ("permission", "may"), [("chat", True), ("models", True), ("embeddings", False), ("all", False)]
)
def test_permissions(ring: KeyRing, permission: Permission, may: bool) -> None:
    key = find(ring, PLAIN)
    assert key is not None
    assert key.may(permission) is may
    assert ANONYMOUS.may(permission)


@pytest.mark.parametrize(("model", "may"), [("qwen3-8b", True), ("exact", True), ("Qwen3", False), ("exactly", False)])
def test_models_are_case_sensitive_shell_patterns(ring: KeyRing, model: str, may: bool) -> None:
    key = find(ring, PLAIN)
    assert key is not None
    assert key.may_use(model) is may
    assert ANONYMOUS.may_use(model)


def test_new_keys_differ_and_are_long() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("sk-") and len(key) == 46 for key in keys)
