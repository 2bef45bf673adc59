"""Tokens of identity providers: accepted as configured, refused when forged; key sets from files and URLs."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_api_server.auth import issuers as module
from llm_api_server.auth.access import Key, Limits
from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.auth.issuers import Issuers, RefreshPolicy
from llm_api_server.auth.keys import KeyRing
from llm_api_server.config.load import load_config
from llm_api_server.config.models import AuthConfig, IssuerConfig
from llm_api_server.errors import ConfigError, InvalidKey, IssuerUnavailable

ISSUER, AUDIENCE = "https://login.example.com/", "llm"
NOW = 1_800_000_000.0
DEFAULT_POLICY = RefreshPolicy()
RSA = rsa.generate_private_key(65537, 2048)
SMALL = rsa.generate_private_key(65537, 1024)  # noqa: S505 - to be refused
EC = ec.generate_private_key(ec.SECP256R1())
OTHER = rsa.generate_private_key(65537, 2048)


def public(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    algorithm: Any = jwt.algorithms.ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else None
    algorithm = algorithm or jwt.algorithms.RSAAlgorithm
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, "use": "sig", **more}


def key_set(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


KEYS = key_set(public(RSA, "r"), public(EC, "e"), {"kty": "oct", "k": "c2VjcmV0", "kid": "o"}, {"kty": "new"})


def token(*, key: Any = RSA, algorithm: str = "RS256", kid: str | None = "r", head: Any = None, **claims: Any) -> str:
    """Sign a token; claims of None are left out."""
    payload = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": NOW + 60, "iat": NOW, **claims}
    headers = {**({"kid": kid} if kid else {}), **(head or {})}
    return jwt.encode({k: v for k, v in payload.items() if v is not None}, key, algorithm=algorithm, headers=headers)


def make(jwks: Path | str, policy: RefreshPolicy = DEFAULT_POLICY, **fields: Any) -> Issuers:
    entry = {"issuer": ISSUER, "audience": [AUDIENCE], "jwks": str(jwks), **fields}
    return Issuers([IssuerConfig.model_validate(entry)], Path(), now=lambda: NOW, refresh=policy)


def verify(issuers: Issuers, text: str) -> Key:
    assert issuers.claims_token(text)
    return asyncio.run(issuers.verify(text))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jwks") / "keys.json"
    path.write_bytes(KEYS)
    return path


@pytest.fixture(scope="module")
def issuers(file: Path) -> Issuers:
    return make(file)


def test_a_caller_gets_the_rights_of_the_configuration(file: Path) -> None:
    issuers = make(file, permissions=["chat"], models=["a*"], requests_per_minute=5, priority=2, name_claim="email")
    for text in (token(email="ann@example.com"), token(key=EC, algorithm="ES256", kid="e", email="ann@example.com")):
        key = verify(issuers, text)
        assert (key.name, key.permissions, key.models) == ("ann@example.com", frozenset({"chat"}), ("a*",))
        assert (key.limits, key.priority, key.expires_at) == (Limits(requests_per_minute=5), 2, NOW + 60)
    other = verify(issuers, token(email="bob@example.com"))
    assert key.key_id.startswith("ext_")
    assert other.key_id != key.key_id


def test_callers_have_no_admin_permission_by_default(issuers: Issuers) -> None:
    key = verify(issuers, token(aud=["x", AUDIENCE]))
    assert key.may("chat")
    assert not key.may("admin")
    assert key.limits == Limits()


@pytest.mark.parametrize(
    "forged",
    [
        {"key": OTHER},
        {"kid": "unknown"},
        {"kid": "e"},
        {"kid": "o"},
        {"key": EC, "algorithm": "ES256", "kid": "r"},
        {"algorithm": "RS512"},
        {"aud": "somebody"},
        {"aud": None},
        {"aud": 7},
        {"exp": None},
        {"exp": NOW},
        {"exp": "soon"},
        {"exp": True},
        {"exp": 1e300},
        {"nbf": NOW + 60},
        {"iat": NOW + 60},
        {"iat": "then"},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": ["ann"]},
        {"head": {"crit": ["exp"]}},
    ],
)
def test_any_other_token_is_refused(issuers: Issuers, forged: dict[str, Any]) -> None:
    assert verify(issuers, token()).name == "ann"
    with pytest.raises(InvalidKey):
        verify(issuers, token(**forged))


def test_keys_in_token_headers_are_ignored(issuers: Issuers) -> None:
    own = {"jwk": public(OTHER, "x"), "jku": "https://evil.example.com/keys", "x5u": "https://evil.example.com/x5"}
    with pytest.raises(InvalidKey):
        verify(issuers, token(key=OTHER, kid=None, head=own))
    assert verify(issuers, token(head=own)).name == "ann"


def test_hmac_with_the_public_key_and_missing_signatures_are_refused(issuers: Issuers) -> None:
    pem = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    body = token().split(".")[1]
    for algorithm in ("HS256", "none", "None", "RS256"):
        head = _part({"alg": algorithm, "typ": "JWT", "kid": "r"})
        mac = hmac.digest(pem, f"{head}.{body}".encode(), "sha256")
        for signature in ("", base64.urlsafe_b64encode(mac).rstrip(b"=").decode()):
            with pytest.raises(InvalidKey):
                verify(issuers, f"{head}.{body}.{signature}")


def _part(content: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
def test_weak_keys_and_keys_for_encryption_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "weak.json").write_bytes(key_set(public(SMALL, "s")))
    (tmp_path / "enc.json").write_bytes(key_set(public(RSA, "r", use="enc")))
    for name, text in (("weak", token(key=SMALL, kid="s")), ("enc", token())):
        with pytest.raises(InvalidKey):
            verify(make(tmp_path / f"{name}.json"), text)


def test_a_token_without_a_key_id_needs_the_only_key_that_fits(issuers: Issuers, tmp_path: Path) -> None:
    assert verify(issuers, token(kid=None)).name == "ann"
    (tmp_path / "two.json").write_bytes(key_set(public(RSA, "r"), public(OTHER, "o")))
    with pytest.raises(InvalidKey):
        verify(make(tmp_path / "two.json"), token(kid=None))


def test_tokens_of_other_issuers_are_not_claimed(issuers: Issuers) -> None:
    for text in (
        token(iss="https://login.example.com"),
        token(iss=None),
        f"e30.{_part({'iss': [ISSUER]})}.x",
        "a.b.c",
        "..",
        "",
        "é.é.é",
    ):
        assert not issuers.claims_token(text)
    assert not issuers.claims_token(token(pad="x" * module.MAX_TOKEN_CHARS))


@settings(deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=60), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
))  # fmt: skip
def test_malformed_tokens_are_refused_without_another_error(head: bytes, signature: bytes, wild: Any) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(InvalidKey))
        issuers = _of_memory()
        encoded = [base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (head, signature)]
        body = _part({"iss": ISSUER, "aud": wild, "exp": wild, "sub": wild})
        asyncio.run(issuers.verify(f"{encoded[0]}.{body}.{encoded[1]}"))


@settings(deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
), st.sampled_from(["aud", "exp", "nbf", "iat", "sub"]))  # fmt: skip
def test_signed_tokens_with_odd_claims_are_refused_or_valid(wild: Any, claim: str) -> None:
    try:
        key = asyncio.run(_of_memory().verify(token(**{claim: wild})))
    except InvalidKey:
        return
    assert isinstance(key.name, str)
    assert key.expires_at is not None
    assert key.expires_at > NOW


@settings(deadline=None)
@given(st.data())
def test_a_token_with_one_other_character_is_refused(data: st.DataObject) -> None:
    text = token()
    ends = {len(text) - 1, *(index - 1 for index, char in enumerate(text) if char == ".")}
    place = data.draw(st.integers(0, len(text) - 1).filter(lambda index: index not in ends))
    other = data.draw(st.sampled_from("abcXYZ019-_.~ é").filter(lambda char: char != text[place]))
    issuers, changed = _of_memory(), text[:place] + other + text[place + 1 :]
    if issuers.claims_token(changed):
        with pytest.raises(InvalidKey):
            asyncio.run(issuers.verify(changed))


def _of_memory() -> Issuers:
    """Return issuers with keys in memory."""
    issuers = make("/nowhere")
    (issuer,) = issuers._issuers.values()

    class KeySet:
        async def get(self, *, newer: bool = False) -> list[jwt.PyJWK]:
            return module._parse(KEYS)

    issuer._keys = KeySet()
    return issuers


def test_a_key_file_is_read_again_when_it_changes_and_a_broken_one_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    issuers = make(path)
    with pytest.raises(IssuerUnavailable):
        verify(issuers, token())
    path.write_bytes(KEYS)
    verify(issuers, token())
    path.write_bytes(key_set(public(OTHER, "o")))
    verify(issuers, token(key=OTHER, kid="o"))
    with pytest.raises(InvalidKey):
        verify(issuers, token())
    path.write_bytes(b"{")
    verify(issuers, token(key=OTHER, kid="o"))


class Provider:
    """A web server that responds with `body` and counts requests."""

    def __init__(self) -> None:
        self.status, self.body, self.fetches = 200, KEYS, 0
        provider = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.fetches += 1
                time.sleep(0.05)
                self.send_response(provider.status)
                self.send_header("location", "/elsewhere")
                self.send_header("content-length", str(len(provider.body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(provider.body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/keys?x=1"


@pytest.fixture
def provider() -> Iterator[Provider]:
    one = Provider()
    thread = threading.Thread(target=one.server.serve_forever, daemon=True)
    thread.start()
    yield one
    one.server.shutdown()
    one.server.server_close()
    thread.join()


@pytest.mark.anyio
async def test_concurrent_callers_share_one_fetch(provider: Provider) -> None:
    issuers = make(provider.url)
    found = await asyncio.gather(*(issuers.verify(token()) for _ in range(20)))
    assert {key.name for key in found} == {"ann"}
    assert provider.fetches == 1


@pytest.mark.anyio
async def test_an_unknown_key_causes_no_second_fetch_within_the_retry_time(provider: Provider) -> None:
    issuers = make(provider.url)
    await issuers.verify(token())
    provider.body = key_set(public(OTHER, "o"))
    for _ in range(5):
        with pytest.raises(InvalidKey):
            await issuers.verify(token(key=OTHER, kid="o"))
    assert provider.fetches == 1


@pytest.mark.anyio
async def test_an_unknown_key_causes_a_fetch_after_the_retry_time(provider: Provider) -> None:
    issuers = make(provider.url, RefreshPolicy(retry_after=0))
    await issuers.verify(token())
    provider.body = key_set(public(OTHER, "o"))
    assert (await issuers.verify(token(key=OTHER, kid="o"))).name == "ann"
    with pytest.raises(InvalidKey):
        await issuers.verify(token())


@pytest.mark.parametrize(
    ("status", "body"), [(500, b""), (302, b""), (200, b"{"), (200, b'{"keys": 7}'), (200, b" " * (1024 * 1024 + 1))]
)
@pytest.mark.anyio
async def test_the_last_good_keys_are_used_while_fetches_fail(provider: Provider, status: int, body: bytes) -> None:
    issuers, without_keys = (make(provider.url, RefreshPolicy(fresh_for=0, retry_after=0)) for _ in range(2))
    await issuers.verify(token())
    provider.status, provider.body = status, body
    assert (await issuers.verify(token())).name == "ann"
    assert provider.fetches == 2
    with pytest.raises(IssuerUnavailable):
        await without_keys.verify(token())


@pytest.mark.anyio
async def test_keys_older_than_the_limit_are_not_used(provider: Provider) -> None:
    with pytest.raises(IssuerUnavailable):
        await make(provider.url, RefreshPolicy(stale_for=-1)).verify(token())
    assert provider.fetches == 1


@pytest.mark.anyio
async def test_the_authenticator_accepts_an_issuers_token_until_it_expires(file: Path) -> None:
    class NoStore:
        async def find(self, *, digest: str | None = None, key_id: str | None = None) -> None:
            return None

    now = NOW
    door = Authenticator(KeyRing(AuthConfig()), NoStore(), issuers=make(file), now=lambda: now)
    key, is_token = await door.authenticate(token(), None)
    assert (key.name, is_token) == ("ann", True)
    now = NOW + 60
    with pytest.raises(InvalidKey, match="expired"):
        await door.authenticate(token(), None)


@pytest.mark.parametrize(
    "entry",
    [
        {"jwks": "http://login.example.com/keys"},
        {"jwks": "ftp://login.example.com/keys"},
    ],
)
def test_key_sets_need_https_or_a_file(tmp_path: Path, entry: dict[str, str]) -> None:
    issuer = {"issuer": ISSUER, "audience": [AUDIENCE], **entry}
    (tmp_path / "config.yaml").write_text(json.dumps({"auth": {"issuers": [issuer]}}))
    with pytest.raises(ConfigError, match="https"):
        load_config(tmp_path / "config.yaml")
