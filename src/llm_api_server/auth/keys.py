"""The keys of the configuration, hashed when they are read: who asks, and what may it do. Called for every request."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator

from llm_api_server import access
from llm_api_server.access import Key, Limits
from llm_api_server.config import SHA256_PREFIX, ApiKeyConfig, AuthConfig

_KEY_ID_LENGTH = 12


#: Who asks when keys are not required.
ANONYMOUS = Key("anonymous", "anonymous", frozenset({"all"}))


class KeyRing:
    """Finds keys by their SHA-256 digest; the keys themselves are not kept."""

    def __init__(self, auth: AuthConfig) -> None:
        keys = {digest(entry.key): _key(entry) for entry in auth.api_keys}
        self._by_digest = {known: (known, key) for known, key in keys.items()}
        self._by_id = {key.key_id: key for key in keys.values()}

    def __len__(self) -> int:
        return len(self._by_digest)

    def find(self, secret: str) -> Key | None:
        """The key for `secret`, which may be a header's bytes read as Latin-1."""
        for raw in _as_bytes(secret):
            wanted = hashlib.sha256(raw).hexdigest()
            # A dictionary's timing can tell something of the digest only, never of the key.
            known, key = self._by_digest.get(wanted, ("", None))
            if hmac.compare_digest(known, wanted):
                return key
        return None

    def find_by_id(self, key_id: str) -> Key | None:
        return self._by_id.get(key_id)


def configured_keys(auth: AuthConfig) -> list[Key]:
    """In the order of the configuration."""
    return [_key(entry) for entry in auth.api_keys]


def digest(key: str) -> str:
    """Hex SHA-256 of a key of the configuration, which may be given as `sha256:` and its digest."""
    if key.startswith(SHA256_PREFIX):
        return key.removeprefix(SHA256_PREFIX).lower()
    return access.digest(key)


def _key(entry: ApiKeyConfig) -> Key:
    return Key(
        name=entry.name,
        key_id=digest(entry.key)[:_KEY_ID_LENGTH],
        permissions=frozenset(entry.permissions),
        models=tuple(entry.models),
        limits=Limits(
            entry.requests_per_minute,
            entry.tokens_per_minute,
            entry.max_concurrent,
            entry.tokens_per_day,
            entry.tokens_per_month,
        ),
        priority=entry.priority,
        expires_at=entry.expires_at.timestamp() if entry.expires_at else None,
        networks=tuple(entry.networks),
        enabled=entry.enabled,
    )


def _as_bytes(secret: str) -> Iterator[bytes]:
    yield secret.encode("utf-8", "surrogatepass")
    if not secret.isascii():
        try:
            yield secret.encode("latin-1")
        except UnicodeEncodeError:
            return
