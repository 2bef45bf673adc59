"""From what a client sends as its key to who it is. Called for every request; what was seen before costs no question.

Keys of the configuration are known from the start. Keys of the store and tokens are remembered by their digest until
they end, are pushed out by newer ones, or change; who changes them says so (`forget`).
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

MAX_REMEMBERED = 10_000
MAX_UNKNOWN = 1_000
#: How often a key is asked for anew because keys changed while it was looked up.
_TRIES = 3
_TOKEN_DOTS = 2
Value = TypeVar("Value")


class KeySource(Protocol):
    """Where keys that are not in the configuration come from."""

    async def find(self, *, digest: str | None = None, key_id: str | None = None) -> Key | None:
        """By the hex SHA-256 of its secret or by its id. Raises `ApiError` when nobody can tell."""


class Place(Protocol):
    """Where a request comes from; asked only where that matters."""

    @property
    def address(self) -> str | None: ...


class TokenIssuers(Protocol):
    """Tokens that others have issued (`issuers.py`)."""

    def knows(self, token: str) -> bool: ...

    async def verify(self, token: str) -> Key: ...


class Authenticator:
    """`now` tells Unix seconds."""

    def __init__(
        self,
        keys: KeyRing,
        source: KeySource,
        *,
        tokens: TokenSigner | None = None,
        issuers: TokenIssuers | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._source = source
        self._now = now
        self._remembered: _Recent[Known] = _Recent(MAX_REMEMBERED)
        self._unknown: _Recent[bool] = _Recent(MAX_UNKNOWN)
        self.changes = 0
        self.configure(keys, tokens, issuers)

    def configure(self, keys: KeyRing, tokens: TokenSigner | None, issuers: TokenIssuers | None) -> None:
        """Nobody who was let in before is let in without being looked at again."""
        self._keys = keys
        self._configured = {known: Known.of(known, key) for known, key in keys.items()}
        self.tokens = tokens
        self._issuers = issuers
        self.forget(None)

    async def authenticate(self, secret: str, address: str | None) -> tuple[Key, bool]:
        """The key, and whether it came as a token. `secret` may be a header's bytes read as Latin-1.

        Raises `InvalidKey` or `PermissionDenied`, or the source's `ApiError`.
        """
        known = await self.find(secret)
        self.check(known, _At(address))
        return known.key, known.is_token

    async def find(self, secret: str) -> Known:
        """Who sends `secret`, for as long as `changes` stays what it is. Raises as `authenticate` does."""
        return self._look(secret) or await self._find(secret)

    def forget(self, ids: Collection[str] | None) -> None:
        """The keys with these ids have changed, and what was unknown may be known now; None: all may have."""
        self.changes += 1
        self._unknown.clear()
        if ids is None:
            self._remembered.clear()
        else:
            changed = frozenset(ids)
            self._remembered.drop(lambda known: known.key.key_id in changed)

    def _look(self, secret: str) -> Known | None:
        for wanted in _digests(secret):
            known = self._configured.get(wanted) or self._remembered.get(wanted)
            # A dictionary's timing can tell something of the digest only, never of the key.
            if known is not None and hmac.compare_digest(known.digest, wanted):
                return known
        return None

    async def _find(self, secret: str) -> Known:
        wanted = next(_digests(secret))
        if self._unknown.get(wanted):
            raise InvalidKey("Incorrect API key provided.")
        for _ in range(_TRIES):
            changes = self.changes
            known = await self._ask(secret, wanted)
            if changes == self.changes:
                self._remember(wanted, known)
                break
        if known is None:
            raise InvalidKey("Incorrect API key provided.")
        return known

    async def _ask(self, secret: str, wanted: str) -> Known | None:
        if secret.count(".") == _TOKEN_DOTS:
            if self._issuers is not None and self._issuers.knows(secret):
                return Known.of(wanted, await self._issuers.verify(secret), is_token=True)
            if self.tokens is not None:
                return Known.of(wanted, await self._by_token(self.tokens, secret), is_token=True)
        key = await self._source.find(digest=wanted)
        return None if key is None else Known.of(wanted, key)

    async def _by_token(self, tokens: TokenSigner, token: str) -> Key:
        claims = tokens.read(token)
        key = self._keys.find_by_id(claims.sub) or await self._source.find(key_id=claims.sub)
        if key is None:
            raise InvalidKey("The key that this token was made from no longer exists.")
        return tokens.narrow(key, claims)

    def _remember(self, wanted: str, known: Known | None) -> None:
        if known is None:
            self._unknown.put(wanted, value=True)
        else:
            self._remembered.put(wanted, known)

    def check(self, known: Known, place: Place) -> None:
        """Whether the key may be used now and from there. Raises `InvalidKey` or `PermissionDenied`."""
        key = known.key
        if not key.enabled:
            raise InvalidKey("This API key is disabled.")
        if key.expires_at is not None and key.expires_at <= self._now():
            what = "token has expired. Get a new one." if known.is_token else "API key has expired."
            raise InvalidKey(f"This {what}")
        if known.networks and not _is_within(place.address, known.networks):
            raise PermissionDenied("Your API key may not be used from this network.")


@dataclass(frozen=True, slots=True)
class _At:
    address: str | None


@dataclass(frozen=True, slots=True)
class Known:
    """Somebody who was seen, by the digest of what was sent."""

    digest: str
    key: Key
    is_token: bool
    networks: tuple[IPv4Network | IPv6Network, ...]

    @classmethod
    def of(cls, known: str, key: Key, *, is_token: bool = False) -> Known:
        return cls(known, key, is_token, tuple(ip_network(block) for block in key.networks))


class _Recent(Generic[Value]):
    """The last `size` that were used, by their names."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, name: str) -> Value | None:
        value = self._values.get(name)
        if value is not None:
            self._values.move_to_end(name)
        return value

    def put(self, name: str, value: Value) -> None:
        self._values[name] = value
        if len(self._values) > self._size:
            self._values.popitem(last=False)

    def drop(self, is_unwanted: Callable[[Value], bool]) -> None:
        for name in [name for name, value in self._values.items() if is_unwanted(value)]:
            del self._values[name]

    def clear(self) -> None:
        self._values.clear()


def _digests(secret: str) -> Iterator[str]:
    """Of the text, and, where it is not ASCII, of the bytes that the header held."""
    yield hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
    if not secret.isascii():
        try:
            yield hashlib.sha256(secret.encode("latin-1")).hexdigest()
        except UnicodeEncodeError:
            return


def _is_within(address: str | None, networks: tuple[IPv4Network | IPv6Network, ...]) -> bool:
    """Whether a client's address is in one of `networks`; one without an address is nowhere."""
    try:
        client = ip_address((address or "").partition("%")[0])
    except ValueError:
        return False
    if isinstance(client, IPv6Address) and client.ipv4_mapped is not None:
        client = client.ipv4_mapped
    return any(client in network for network in networks)
