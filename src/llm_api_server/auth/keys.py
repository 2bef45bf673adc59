"""The keys of the configuration, hashed when they are read: who asks, and what may it do. Called for every request."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from llm_api_server.config import SHA256_PREFIX, ApiKeyConfig, AuthConfig
from llm_api_server.types import Permission

_KEY_ID_LENGTH = 12


@dataclass(frozen=True)
class Key:
    """What a caller may do. `models` are shell patterns; `key_id` names the key in logs and tokens."""

    name: str
    permissions: frozenset[Permission]
    models: tuple[str, ...]
    key_id: str

    def may(self, permission: Permission) -> bool:
        return permission in self.permissions or "all" in self.permissions

    def may_use(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.models)


#: Who asks when keys are not required.
ANONYMOUS = Key("anonymous", frozenset({"all"}), ("*",), "anonymous")


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


def new_key() -> str:
    """A random key of 256 bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """Hex SHA-256 of a key of the configuration, which may be given as `sha256:` and its digest."""
    if key.startswith(SHA256_PREFIX):
        return key.removeprefix(SHA256_PREFIX).lower()
    return hashlib.sha256(key.encode()).hexdigest()


def _key(entry: ApiKeyConfig) -> Key:
    key_id = digest(entry.key)[:_KEY_ID_LENGTH]
    return Key(entry.name, frozenset(entry.permissions), tuple(entry.models), key_id)


def _as_bytes(secret: str) -> Iterator[bytes]:
    yield secret.encode("utf-8", "surrogatepass")
    if not secret.isascii():
        try:
            yield secret.encode("latin-1")
        except UnicodeEncodeError:
            return
