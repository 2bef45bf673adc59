"""Tokens of identity providers (OpenID Connect), verified with the keys they publish (JWKS, RFC 7517).

Key sets are fetched in a thread, at most once at a time, and replaced only by a valid newer one.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from loguru import logger

from llm_api_server.auth.access import Key
from llm_api_server.auth.keys import limits_of
from llm_api_server.config.models import IssuerConfig
from llm_api_server.errors import InvalidKey, IssuerUnavailable
from llm_api_server.http_client import blocking

MAX_TOKEN_CHARS = 16 * 1024
MAX_KEYS_BYTES = 1024 * 1024
FETCH_TIMEOUT = 5.0
#: Tolerated clock difference between this server and an issuer, in seconds.
LEEWAY = 30.0
_MAX_NAME_CHARS = 128
_MIN_RSA_BITS = 2048
_REFUSED = "Incorrect token provided."


@dataclass(frozen=True)
class RefreshPolicy:
    """Times of a fetched key set, in seconds."""

    #: Age up to which keys are used without fetching newer ones.
    fresh_for: float = 300.0
    #: Minimum time between two fetches.
    retry_after: float = 30.0
    #: Age up to which keys are used while fetching newer ones fails.
    stale_for: float = 86400.0


class _Header(msgspec.Struct):
    alg: str
    kid: str | None = None
    crit: Any = None


class _Issued(msgspec.Struct):
    iss: str


class Issuers:
    """The configured identity providers. `folder` is the base of relative paths; `now` returns Unix seconds."""

    def __init__(
        self,
        entries: Iterable[IssuerConfig],
        folder: Path,
        *,
        now: Callable[[], float] = time.time,
        refresh: RefreshPolicy = RefreshPolicy(),
    ) -> None:
        self._issuers = {entry.issuer: _Issuer(entry, _key_set(entry.jwks, folder, refresh), now) for entry in entries}

    def claims_token(self, token: str) -> bool:
        """Return whether the token names one of these issuers; its signature is not checked."""
        return _issuer_of(token) in self._issuers

    async def verify(self, token: str) -> Key:
        """Return the caller as a key that expires with the token.

        Raises `InvalidKey`, or `IssuerUnavailable` if there are no keys to verify the token with.
        """
        issuer = self._issuers.get(_issuer_of(token) or "")
        if issuer is None:
            raise InvalidKey(_REFUSED)
        return await issuer.verify(token)


def _key_set(location: str, folder: Path, refresh: RefreshPolicy) -> _KeySet:
    if location.startswith(("https://", "http://")):
        return _FetchedKeySet(location, refresh)
    return _KeySetFile(folder / Path(location).expanduser())


class _Issuer:
    def __init__(self, entry: IssuerConfig, keys: _KeySet, now: Callable[[], float]) -> None:
        self._entry = entry
        self._keys = keys
        self._now = now

    async def verify(self, token: str) -> Key:
        header = _header(token)
        if header.alg not in self._entry.algorithms or header.crit is not None:
            raise InvalidKey(_REFUSED)
        key = _pick(await self._keys.get(), header) or _pick(await self._keys.get(newer=True), header)
        if key is None:
            raise InvalidKey(_REFUSED)
        return self._as_key(self._claims(token, key, header.alg))

    def _claims(self, token: str, key: jwt.PyJWK, algorithm: str) -> dict[str, Any]:
        # Times are checked below, against `self._now`.
        options: jwt.types.Options = {
            "require": ["exp", "iss", "aud"], "verify_exp": False, "verify_iat": False, "verify_nbf": False
        }  # fmt: skip
        entry = self._entry
        try:
            claims: dict[str, Any] = jwt.decode(
                token, key.key, algorithms=[algorithm], audience=entry.audience, issuer=entry.issuer, options=options
            )
        except Exception as error:  # malformed claims raise errors without a common base class
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
            raise InvalidKey(f"This token has no claim '{entry.name_claim}' to name its caller.")
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


class _KeySet(Protocol):
    async def get(self, *, newer: bool = False) -> list[jwt.PyJWK]:
        """Return the keys; `newer`: the known ones do not include the wanted key. Raises `IssuerUnavailable`."""


class _KeySetFile:
    """Key set in a file, read again when the file changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, int] | None = None
        self._keys: list[jwt.PyJWK] = []

    async def get(self, *, newer: bool = False) -> list[jwt.PyJWK]:  # noqa: ARG002 - a file is always current
        try:
            status = self._path.stat()
            version = (status.st_mtime_ns, status.st_size)
            if self._version != version:
                self._keys = _parse(self._path.read_bytes())
                self._version = version
        except (OSError, ValueError) as error:
            logger.error("cannot read the keys of an identity provider from {}: {}", self._path, error)
            if self._version is None:
                raise IssuerUnavailable("The identity provider's keys cannot be read.") from error
        return self._keys


class _FetchedKeySet:
    """Key set behind a URL. All callers wait for the same fetch."""

    def __init__(self, url: str, policy: RefreshPolicy) -> None:
        self._url = url
        self._policy = policy
        self._keys: list[jwt.PyJWK] | None = None
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._fetch: asyncio.Task[None] | None = None

    async def get(self, *, newer: bool = False) -> list[jwt.PyJWK]:
        now, policy = time.monotonic(), self._policy
        is_due = newer or now - self._fetched_at > policy.fresh_for
        if self._fetch is None and is_due and now - self._tried_at > policy.retry_after:
            self._tried_at = now
            self._fetch = asyncio.create_task(self._refresh())
        if self._fetch is not None and is_due:
            await asyncio.shield(self._fetch)
        if self._keys is None or time.monotonic() - self._fetched_at > policy.stale_for:
            raise IssuerUnavailable("The identity provider's keys are unavailable.", retry_after=policy.retry_after)
        return self._keys

    async def _refresh(self) -> None:
        try:
            self._keys = _parse(
                await asyncio.to_thread(blocking.get, self._url, timeout=FETCH_TIMEOUT, max_bytes=MAX_KEYS_BYTES)
            )
            self._fetched_at = time.monotonic()
        except (*blocking.FAILURES, ValueError) as error:
            logger.error("cannot fetch the keys of an identity provider from {}: {}", self._url, error)
        finally:
            self._fetch = None


class _KeySetDocument(msgspec.Struct):
    keys: list[dict[str, Any]]


def _parse(document: bytes) -> list[jwt.PyJWK]:
    """Return the signing keys of a JWKS document. Raises `ValueError` if it is none."""
    try:
        entries = msgspec.json.decode(document, type=_KeySetDocument).keys
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not a JWKS document: {error}") from error
    keys = []
    for entry in entries:
        if entry.get("use", "sig") != "sig":
            continue
        # One by one, because `jwt.PyJWKSet` refuses a whole set for one malformed key, and an empty set.
        try:
            keys.append(jwt.PyJWK(entry))
        except Exception:  # noqa: BLE001, S112 - an unknown kind of key
            continue
    return keys


def _pick(keys: list[jwt.PyJWK], header: _Header) -> jwt.PyJWK | None:
    """Return the key with the token's `kid`, or the only suitable key if the token has no `kid`."""
    suitable = [key for key in keys if _is_suitable(key, header.alg)]
    if header.kid is not None:
        return next((key for key in suitable if key.key_id == header.kid), None)
    return suitable[0] if len(suitable) == 1 else None


def _is_suitable(key: jwt.PyJWK, algorithm: str) -> bool:
    if key.algorithm_name != algorithm:
        return False
    public = key.key
    if algorithm == "RS256":
        return isinstance(public, RSAPublicKey) and public.key_size >= _MIN_RSA_BITS
    return isinstance(public, EllipticCurvePublicKey) and isinstance(public.curve, SECP256R1)


def _header(token: str) -> _Header:
    try:
        return msgspec.convert(jwt.get_unverified_header(token), _Header)
    except Exception as error:  # as in `_claims`
        raise InvalidKey(_REFUSED) from error


def _issuer_of(token: str) -> str | None:
    """Return the `iss` claim of an unverified token."""
    if len(token) > MAX_TOKEN_CHARS:
        return None
    try:
        payload = jwt.utils.base64url_decode(token.split(".")[1].encode("ascii"))
        return msgspec.json.decode(payload, type=_Issued).iss
    except (ValueError, IndexError, msgspec.DecodeError, RecursionError):
        return None


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53
