"""Tokens that identity providers issue (OpenID Connect): verified by the keys that they publish (JWKS, RFC 7517)."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from loguru import logger

from llm_api_server.auth.access import Key
from llm_api_server.auth.keys import limits_of
from llm_api_server.config.models import Config, IssuerConfig
from llm_api_server.errors import InvalidKey, IssuerUnavailable
from llm_api_server.http_client import blocking

MAX_TOKEN_CHARS = 16 * 1024
MAX_KEYS_BYTES = 1024 * 1024
FETCH_TIMEOUT = 5.0
#: Seconds that fetched keys are used without a look for newer ones.
FRESH_FOR = 300.0
#: Seconds between two fetches because of a token with an unknown key, or after one that failed.
RETRY_AFTER = 30.0
#: Seconds that the last good keys serve on while newer ones cannot be had.
STALE_FOR = 86400.0
#: Clocks of issuers may be wrong by so many seconds.
LEEWAY = 30.0
_MAX_NAME_CHARS = 128
_MIN_RSA_BITS = 2048
_REFUSED = "Incorrect token provided."


class _Head(msgspec.Struct):
    alg: str
    kid: str | None = None
    crit: Any = None


class _Issued(msgspec.Struct):
    iss: str


class Issuers:
    """The configured identity providers. `now` tells Unix seconds."""

    def __init__(self, config: Config, *, now: Callable[[], float] = time.time) -> None:
        self._issuers = {entry.issuer: _Issuer(entry, config.folder, now) for entry in config.auth.issuers}

    def knows(self, token: str) -> bool:
        """Whether the token says that it comes from one of them; who says so is not yet believed."""
        return bool(self._issuers) and _issuer_of(token) in self._issuers

    async def verify(self, token: str) -> Key:
        """Who it is, until the token ends. Raises `InvalidKey`, or `IssuerUnavailable` without keys to verify it by."""
        issuer = self._issuers.get(_issuer_of(token) or "")
        if issuer is None:
            raise InvalidKey(_REFUSED)
        return await issuer.verify(token)


class _Issuer:
    def __init__(self, entry: IssuerConfig, folder: Path, now: Callable[[], float]) -> None:
        self._entry = entry
        self._now = now
        is_url = entry.jwks.startswith(("https://", "http://"))
        self._keys: _KeyFile | _KeyUrl = (
            _KeyUrl(entry.jwks) if is_url else _KeyFile(folder / Path(entry.jwks).expanduser())
        )

    async def verify(self, token: str) -> Key:
        head = _head(token)
        if head.alg not in self._entry.algorithms or head.crit is not None:
            raise InvalidKey(_REFUSED)
        key = _pick(await self._keys.get(), head)
        if key is None:
            key = _pick(await self._keys.get(newer=True), head)
        if key is None:
            raise InvalidKey(_REFUSED)
        return self._as_key(self._claims(token, key, head.alg))

    def _claims(self, token: str, key: jwt.PyJWK, algorithm: str) -> dict[str, Any]:
        # Times are checked below, against our own clock.
        options: jwt.types.Options = {
            "require": ["exp", "iss", "aud"], "verify_exp": False, "verify_iat": False, "verify_nbf": False
        }  # fmt: skip
        entry = self._entry
        try:
            claims: dict[str, Any] = jwt.decode(
                token, key.key, algorithms=[algorithm], audience=entry.audience, issuer=entry.issuer, options=options
            )
        except Exception as error:  # the library has no one root for what wild claims can do to it
            raise InvalidKey(_REFUSED) from error
        now = self._now()
        exp, starts = claims["exp"], [claims.get(name, 0) for name in ("nbf", "iat")]
        if not all(_is_time(one) for one in (exp, *starts)):
            raise InvalidKey(_REFUSED)
        if exp <= now:
            raise InvalidKey("This token has expired. Get a new one.")
        if max(starts) > now + LEEWAY:
            raise InvalidKey("This token is not valid yet.")
        return claims

    def _as_key(self, claims: dict[str, Any]) -> Key:
        entry = self._entry
        name = claims.get(entry.name_claim)
        if not isinstance(name, str) or not name:
            raise InvalidKey(f"This token does not say who you are ('{entry.name_claim}').")
        identity = hashlib.sha256(f"{entry.issuer}\0{name}".encode("utf-8", "surrogatepass")).hexdigest()
        return Key(
            name="".join(char if char.isprintable() else "?" for char in name[:_MAX_NAME_CHARS]),
            key_id=f"ext_{identity[:16]}",
            permissions=frozenset(entry.permissions),
            models=tuple(entry.models),
            limits=limits_of(entry),
            priority=entry.priority,
            priority_class=entry.priority_class,
            expires_at=float(claims["exp"]),
        )


class _KeyFile:
    """Read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._keys: list[jwt.PyJWK] = []

    async def get(self, *, newer: bool = False) -> list[jwt.PyJWK]:  # noqa: ARG002 - it is always the newest
        try:
            status = self._path.stat()
            if self._seen != (status.st_mtime_ns, status.st_size):
                self._keys = _read(self._path.read_bytes())
                self._seen = (status.st_mtime_ns, status.st_size)
        except (OSError, ValueError) as error:
            logger.error("the keys of an identity provider cannot be read from {}: {}", self._path, error)
            if self._seen is None:
                raise IssuerUnavailable("The identity provider's keys cannot be read just now.") from error
        return self._keys


class _KeyUrl:
    """Fetched in a thread, once for all who wait."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: list[jwt.PyJWK] | None = None
        self._got_at = float("-inf")
        self._tried_at = float("-inf")
        self._fetch: asyncio.Task[None] | None = None

    async def get(self, *, newer: bool = False) -> list[jwt.PyJWK]:
        """`newer`: those known so far do not suffice. Raises `IssuerUnavailable`."""
        now = time.monotonic()
        is_due = newer or now - self._got_at > FRESH_FOR
        if self._fetch is None and is_due and now - self._tried_at > (RETRY_AFTER if self._tried_at > 0 else 0):
            self._tried_at = now
            self._fetch = asyncio.create_task(self._refresh())
        if self._fetch is not None and is_due:
            await asyncio.shield(self._fetch)
        if self._keys is None or time.monotonic() - self._got_at > STALE_FOR:
            raise IssuerUnavailable("The identity provider's keys cannot be had just now.", retry_after=RETRY_AFTER)
        return self._keys

    async def _refresh(self) -> None:
        try:
            self._keys = _read(
                await asyncio.to_thread(blocking.get, self._url, timeout=FETCH_TIMEOUT, max_bytes=MAX_KEYS_BYTES)
            )
            self._got_at = time.monotonic()
        except (*blocking.FAILURES, ValueError) as error:
            logger.error("the keys of an identity provider cannot be had from {}: {}", self._url, error)
        finally:
            self._fetch = None


def _read(document: bytes) -> list[jwt.PyJWK]:
    """The public keys for signatures in a JWKS; others in it are passed over. Raises `ValueError`."""
    try:
        entries = msgspec.json.decode(document, type=_KeySet).keys
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no JWKS: {error}") from error
    keys = []
    for entry in entries:
        if entry.get("use", "sig") != "sig":
            continue
        try:
            keys.append(jwt.PyJWK(entry))
        except Exception:  # noqa: BLE001, S112 - of a kind that is not known here
            continue
    return keys


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]


def _pick(keys: list[jwt.PyJWK], head: _Head) -> jwt.PyJWK | None:
    """The key that the token names; without a name the only one that fits."""
    fitting = [key for key in keys if _fits(key, head.alg)]
    if head.kid is not None:
        return next((key for key in fitting if key.key_id == head.kid), None)
    return fitting[0] if len(fitting) == 1 else None


def _fits(key: jwt.PyJWK, algorithm: str) -> bool:
    if key.algorithm_name != algorithm:
        return False
    public = key.key
    if algorithm == "RS256":
        return isinstance(public, RSAPublicKey) and public.key_size >= _MIN_RSA_BITS
    return isinstance(public, EllipticCurvePublicKey) and isinstance(public.curve, SECP256R1)


def _head(token: str) -> _Head:
    try:
        return msgspec.convert(jwt.get_unverified_header(token), _Head)
    except Exception as error:  # as in `_claims`
        raise InvalidKey(_REFUSED) from error


def _issuer_of(token: str) -> str | None:
    """`iss` as the token has it, unverified."""
    if len(token) > MAX_TOKEN_CHARS:
        return None
    try:
        payload = jwt.utils.base64url_decode(token.split(".")[1].encode("ascii"))
        return msgspec.json.decode(payload, type=_Issued).iss
    except (ValueError, IndexError, msgspec.DecodeError, RecursionError):
        return None


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53
