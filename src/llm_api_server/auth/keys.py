"""Keys of the configuration, hashed as they are read."""

from __future__ import annotations

from collections.abc import ItemsView

from llm_api_server.auth import access
from llm_api_server.auth.access import Key, Limits
from llm_api_server.config.models import ApiKeyConfig, AuthConfig, LimitedConfig
from llm_api_server.config.secrets import SHA256_PREFIX

_KEY_ID_LENGTH = 12

#: Caller of every request if keys are not required.
ANONYMOUS = Key("anonymous", "anonymous", frozenset({"all"}))


class KeyRing:
    """Keys by SHA-256 digest and by id; their secrets are not kept."""

    def __init__(self, auth: AuthConfig) -> None:
        self._by_digest = {digest(entry.key): key_of(entry) for entry in auth.api_keys}
        self._by_id = {key.key_id: key for key in self._by_digest.values()}

    def __len__(self) -> int:
        return len(self._by_digest)

    def items(self) -> ItemsView[str, Key]:
        """Return pairs of digest and key."""
        return self._by_digest.items()

    def find_by_id(self, key_id: str) -> Key | None:
        return self._by_id.get(key_id)


def configured_keys(auth: AuthConfig) -> list[Key]:
    """Return the keys in the order of the configuration."""
    return [key_of(entry) for entry in auth.api_keys]


def digest(key: str) -> str:
    """Return the hex SHA-256 digest of a configured key, which may already be `sha256:` and the digest."""
    if key.startswith(SHA256_PREFIX):
        return key.removeprefix(SHA256_PREFIX).lower()
    return access.digest(key)


def limits_of(entry: LimitedConfig) -> Limits:
    return Limits(**{name: getattr(entry, name) for name in Limits.__struct_fields__})


def key_of(entry: ApiKeyConfig) -> Key:
    return Key(
        name=entry.name,
        key_id=digest(entry.key)[:_KEY_ID_LENGTH],
        permissions=frozenset(entry.permissions),
        models=tuple(entry.models),
        limits=limits_of(entry),
        priority=entry.priority,
        priority_class=entry.priority_class,
        expires_at=entry.expires_at.timestamp() if entry.expires_at else None,
        networks=tuple(entry.networks),
        enabled=entry.enabled,
    )
