"""Authentication of every request: from a client's key or token to a `Key`. Runs on the worker's event loop.

Keys of the configuration are always known. Keys of the store and tokens are cached by digest until they expire, are
evicted by newer ones, or are invalidated.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from llm_api_server.auth.access import Key
from llm_api_server.auth.keys import KeyRing
from llm_api_server.errors import InvalidKey, PermissionDenied

if TYPE_CHECKING:
    from llm_api_server.auth.tokens import TokenSigner

MAX_CACHED = 10_000
MAX_UNKNOWN = 1_000
#: Maximum number of lookups of one key while keys keep changing during the lookup.
_TRIES = 3
_TOKEN_DOTS = 2
Value = TypeVar("Value")


class KeyLookup(Protocol):
    """Source of keys that are not in the configuration."""

    async def find(self, *, digest: str | None = None, key_id: str | None = None) -> Key | None:
        """Find a key by the SHA-256 digest of its secret or by its id. Raises `ApiError` if that is impossible now."""


class Client(Protocol):
    """Sender of a request; its address is read only if the key is limited to networks."""

    @property
    def address(self) -> str | None: ...


class TokenIssuers(Protocol):
    """Verifier of tokens of identity providers (`issuers.py`)."""

    def claims_token(self, token: str) -> bool: ...

    async def verify(self, token: str) -> Key: ...


class Authenticator:
    """Cache and verifier of keys and tokens. `changes` counts invalidations; `now` returns Unix seconds."""

    def __init__(
        self,
        keys: KeyRing,
        source: KeyLookup,
        *,
        tokens: TokenSigner | None = None,
        issuers: TokenIssuers | None = None,
        now: Callable[[], float] = time.time,
        max_cached: int = MAX_CACHED,
        max_unknown: int = MAX_UNKNOWN,
    ) -> None:
        self._source = source
        self._now = now
        self._cached: _LruCache[KnownCaller] = _LruCache(max_cached)
        self._unknown: _LruCache[bool] = _LruCache(max_unknown)
        self.changes = 0
        self.configure(keys, tokens, issuers)

    def configure(self, keys: KeyRing, tokens: TokenSigner | None, issuers: TokenIssuers | None) -> None:
        """Replace keys and tokens and invalidate every cached authentication."""
        self._keys = keys
        self._configured = {digest: KnownCaller.of(digest, key) for digest, key in keys.items()}
        self.tokens = tokens
        self._issuers = issuers
        self.invalidate(None)

    async def authenticate(self, secret: str, address: str | None) -> tuple[Key, bool]:
        """Return the key, and whether a token stood for it. `secret` may be a header's bytes decoded as Latin-1.

        Raises `InvalidKey` or `PermissionDenied`, or the source's `ApiError`.
        """
        caller = await self.find(secret)
        self.check(caller, _Address(address))
        return caller.key, caller.is_token

    async def find(self, secret: str) -> KnownCaller:
        """Return the caller with this `secret`, valid until `changes` changes. Raises as `authenticate` does."""
        return self._find_cached(secret) or await self._look_up(secret)

    def invalidate(self, ids: Collection[str] | None) -> None:
        """Drop the cached authentications of the keys with these ids (None: all), and all unknown secrets."""
        self.changes += 1
        self._unknown.clear()
        if ids is None:
            self._cached.clear()
        else:
            changed = frozenset(ids)
            self._cached.drop(lambda caller: caller.key.key_id in changed)

    def _find_cached(self, secret: str) -> KnownCaller | None:
        for digest in _digests(secret):
            caller = self._configured.get(digest) or self._cached.get(digest)
            # The timing of a dictionary lookup can reveal parts of the digest only, never of the key.
            if caller is not None and hmac.compare_digest(caller.digest, digest):
                return caller
        return None

    async def _look_up(self, secret: str) -> KnownCaller:
        digest = next(_digests(secret))
        if self._unknown.get(digest):
            raise InvalidKey("Incorrect API key provided.")
        for _ in range(_TRIES):
            changes = self.changes
            caller = await self._fetch(secret, digest)
            if changes == self.changes:
                if caller is None:
                    self._unknown.put(digest, value=True)
                else:
                    self._cached.put(digest, caller)
                break
        if caller is None:
            raise InvalidKey("Incorrect API key provided.")
        return caller

    async def _fetch(self, secret: str, digest: str) -> KnownCaller | None:
        if secret.count(".") == _TOKEN_DOTS:
            if self._issuers is not None and self._issuers.claims_token(secret):
                return KnownCaller.of(digest, await self._issuers.verify(secret), is_token=True)
            if self.tokens is not None:
                return KnownCaller.of(digest, await self._by_token(self.tokens, secret), is_token=True)
        key = await self._source.find(digest=digest)
        return None if key is None else KnownCaller.of(digest, key)

    async def _by_token(self, tokens: TokenSigner, token: str) -> Key:
        claims = tokens.read(token)
        key = self._keys.find_by_id(claims.sub) or await self._source.find(key_id=claims.sub)
        if key is None:
            raise InvalidKey("The key that this token was made from no longer exists.")
        return tokens.narrow(key, claims)

    def check(self, caller: KnownCaller, client: Client) -> None:
        """Raise `InvalidKey` or `PermissionDenied` unless the key may be used now and by this client."""
        key = caller.key
        if not key.enabled:
            raise InvalidKey("This API key is disabled.")
        if key.expires_at is not None and key.expires_at <= self._now():
            raise InvalidKey(
                "This token has expired. Get a new one." if caller.is_token else "This API key has expired."
            )
        if caller.networks and not _is_within(client.address, caller.networks):
            raise PermissionDenied("Your API key may not be used from this network.")


@dataclass(frozen=True, slots=True)
class _Address:
    address: str | None


@dataclass(frozen=True, slots=True)
class KnownCaller:
    """Caller with a known key or token; `digest` is that of the secret it sent."""

    digest: str
    key: Key
    is_token: bool
    networks: tuple[IPv4Network | IPv6Network, ...]

    @classmethod
    def of(cls, digest: str, key: Key, *, is_token: bool = False) -> KnownCaller:
        return cls(digest, key, is_token, tuple(ip_network(block) for block in key.networks))


class _LruCache(Generic[Value]):
    """The `size` most recently used values, by key."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, key: str) -> Value | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: str, value: Value) -> None:
        self._values[key] = value
        if len(self._values) > self._size:
            self._values.popitem(last=False)

    def drop(self, is_unwanted: Callable[[Value], bool]) -> None:
        for key in [key for key, value in self._values.items() if is_unwanted(value)]:
            del self._values[key]

    def clear(self) -> None:
        self._values.clear()


def _digests(secret: str) -> Iterator[str]:
    """Yield the digest of the text and, if it is not ASCII, that of the header's bytes."""
    yield hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
    if not secret.isascii():
        try:
            yield hashlib.sha256(secret.encode("latin-1")).hexdigest()
        except UnicodeEncodeError:
            return


def _is_within(address: str | None, networks: tuple[IPv4Network | IPv6Network, ...]) -> bool:
    """Return whether a client's address is in one of `networks`; False without an address."""
    try:
        client = ip_address((address or "").partition("%")[0])
    except ValueError:
        return False
    if isinstance(client, IPv6Address) and client.ipv4_mapped is not None:
        client = client.ipv4_mapped
    return any(client in network for network in networks)
