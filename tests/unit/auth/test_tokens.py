"""Tokens: never wider than their key, invalid without it, and accepted with the server's HS256 signature only."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest

from llm_api_server.auth.accepted_tokens import token_issuers, token_signer
from llm_api_server.auth.access import Key
from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.auth.keys import KeyRing, digest
from llm_api_server.auth.tokens import AUDIENCE, ISSUER, TokenSigner
from llm_api_server.config.models import AuthConfig
from llm_api_server.errors import InvalidKey, InvalidRequest

SECRET = "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"
NARROW = {"key": "sk-narrow-0123456789", "name": "narrow", "permissions": ["chat", "models"], "models": ["qwen*", "a"]}
WIDE = {"key": "sk-wide-0123456789", "name": "wide"}


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def ring(*entries: dict[str, Any]) -> KeyRing:
    return KeyRing(AuthConfig.model_validate({"api_keys": entries}))


def key_of(keys: KeyRing, entry: dict[str, Any]) -> Key:
    return dict(keys.items())[digest(entry["key"])]


class NoStore:
    async def find(self, *, digest: str | None = None, key_id: str | None = None) -> None:
        return None


class Tokens:
    """Issuer of tokens that verifies them as a request would."""

    def __init__(self, keys: KeyRing, now: Clock) -> None:
        self._signer = TokenSigner(SECRET, 3600, now=now)
        self._authenticator = Authenticator(keys, NoStore(), tokens=self._signer, now=now)
        self.issue = self._signer.issue

    def verify(self, token: str) -> Key:
        key, is_token = asyncio.run(self._authenticator.authenticate(token, None))
        assert is_token
        return key


def rights(key: Key) -> tuple[list[str], list[str]]:
    return sorted(key.permissions), list(key.models)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys() -> KeyRing:
    return ring(NARROW, WIDE)


@pytest.fixture
def signer(keys: KeyRing, clock: Clock) -> Tokens:
    return Tokens(keys, clock)


def forged(clock: Clock, *, secret: str = SECRET, algorithm: str = "HS256", **claims: Any) -> str:
    """Sign a token with the given claims; None leaves one out."""
    keys = ring(WIDE)
    payload = {"sub": key_of(keys, WIDE).key_id, "iss": ISSUER, "aud": AUDIENCE, "iat": int(clock())}
    payload |= {"exp": int(clock()) + 60, "permissions": ["all"], "models": ["*"], **claims}
    return jwt.encode({k: v for k, v in payload.items() if v is not None}, secret, algorithm=algorithm)


def test_a_token_has_all_rights_of_its_key_by_default(signer: Tokens, keys: KeyRing, clock: Clock) -> None:
    for entry in (NARROW, WIDE):
        key = key_of(keys, entry)
        token, end = signer.issue(key)
        assert signer.verify(token) == msgspec.structs.replace(key, expires_at=end)
        assert end == clock.now + 3600


def test_a_token_may_have_fewer_rights(signer: Tokens, keys: KeyRing, clock: Clock) -> None:
    token, end = signer.issue(key_of(keys, NARROW), ["chat"], ["qwen3"], 60)
    key = signer.verify(token)
    assert key.name == "narrow"
    assert rights(key) == (["chat"], ["qwen3"])
    assert end == clock.now + 60
    token, _ = signer.issue(key_of(keys, WIDE), ["embeddings"], ["a*"])
    assert rights(signer.verify(token)) == (["embeddings"], ["a*"])


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"permissions": ["embeddings"]}, "permissions"),
        ({"permissions": ["all"]}, "permissions"),
        ({"permissions": ["chat", "sing"]}, "permissions"),
        ({"models": ["llama"]}, "models"),
        ({"models": ["*"]}, "models"),
        ({"models": ["q*"]}, "models"),
        ({"expires_in": 3601}, "expires_in"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": -5}, "expires_in"),
        ({"expires_in": float("nan")}, "expires_in"),
    ],
)
def test_rights_beyond_the_keys_are_refused_by_name(
    signer: Tokens, keys: KeyRing, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        signer.issue(key_of(keys, NARROW), **asked)
    assert caught.value.param == param
    wanted = asked[param]
    assert (wanted[-1] if isinstance(wanted, list) else param) in caught.value.message


def test_a_token_expires(signer: Tokens, keys: KeyRing, clock: Clock) -> None:
    token, end = signer.issue(key_of(keys, WIDE), expires_in=60)
    clock.now = end - 1
    assert signer.verify(token).name == "wide"
    clock.now = end
    with pytest.raises(InvalidKey, match="expired"):
        signer.verify(token)


def test_a_token_expires_with_its_key(signer: Tokens, keys: KeyRing, clock: Clock) -> None:
    token, _ = signer.issue(key_of(keys, NARROW))
    after = Tokens(ring(WIDE), clock)
    with pytest.raises(InvalidKey, match="no longer exists"):
        after.verify(token)


def test_a_token_narrows_with_its_key(keys: KeyRing, signer: Tokens, clock: Clock) -> None:
    token, _ = signer.issue(key_of(keys, NARROW))
    narrowed = Tokens(ring({**NARROW, "permissions": ["models"], "models": ["a"]}), clock)
    assert rights(narrowed.verify(token)) == (["models"], ["a"])


@pytest.mark.parametrize(
    "claims",
    [
        {"secret": SECRET + "x"},
        {"algorithm": "HS512"},
        {"iss": "somebody"},
        {"aud": "somebody"},
        {"iss": None},
        {"aud": None},
        {"exp": None},
        {"iat": None},
        {"sub": None},
        {"sub": 7},
        {"exp": "soon"},
        {"permissions": ["fly"]},
        {"permissions": "all"},
        {"permissions": None},
        {"models": "*"},
        {"models": None},
    ],
)
@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
def test_any_other_token_is_refused(signer: Tokens, clock: Clock, claims: dict[str, Any]) -> None:
    assert signer.verify(forged(clock)).name == "wide"
    with pytest.raises(InvalidKey):
        signer.verify(forged(clock, **claims))


@pytest.mark.parametrize("token", ["", "a.b.c", "..", "é.é.é", "e30.e30.e30"])
def test_malformed_tokens_are_refused(signer: Tokens, token: str) -> None:
    with pytest.raises(InvalidKey):
        signer.verify(token)


def test_an_unsigned_token_is_refused(signer: Tokens, clock: Clock) -> None:
    head = base64.urlsafe_b64encode(json.dumps({"alg": "none", "typ": "JWT"}).encode()).rstrip(b"=").decode()
    body = forged(clock).split(".")[1]
    for signature in ("", "AAAA"):
        with pytest.raises(InvalidKey):
            signer.verify(f"{head}.{body}.{signature}")


def test_there_is_a_signer_only_with_a_real_secret() -> None:
    assert token_signer(AuthConfig(secret_key=SECRET)) is not None
    assert token_signer(AuthConfig(secret_key=SECRET, tokens=False)) is None
    assert token_signer(AuthConfig(secret_key="your-secret-key")) is None
    assert token_signer(AuthConfig()) is None


def test_workers_without_tokens_do_not_import_their_libraries() -> None:
    assert token_issuers(AuthConfig(), Path()) is None
    code = "import sys, llm_api_server.gateway.app; sys.exit('jwt' in sys.modules or 'cryptography' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
