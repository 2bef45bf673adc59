"""Keys and limits: the permissions and quotas of a caller, and how keys are made and hashed."""

from __future__ import annotations

import hashlib
import secrets
from fnmatch import fnmatchcase
from functools import lru_cache

import msgspec

from llm_api_server.types import Permission, PriorityClass


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """Limits of one key; None: unlimited. Days and months are those of UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


NO_LIMITS = Limits()


class Key(msgspec.Struct, frozen=True, omit_defaults=True):
    """Permissions and limits of a caller. `models` are shell patterns, `networks` CIDR blocks (empty: any).

    `key_id` identifies the key in logs, tokens and usage; rotating the secret keeps it. `expires_at` is in Unix
    seconds. `priority` is the weight of its requests in the queue; requests of the class `batch` are served
    after all others.
    """

    name: str
    key_id: str
    permissions: frozenset[Permission]
    models: tuple[str, ...] = ("*",)
    limits: Limits = NO_LIMITS
    priority: float = 1.0
    priority_class: PriorityClass = "interactive"
    expires_at: float | None = None
    networks: tuple[str, ...] = ()
    enabled: bool = True

    def may(self, permission: Permission) -> bool:
        return permission in self.permissions or "all" in self.permissions

    def may_use(self, model: str) -> bool:
        return _matches(model, self.models)


@lru_cache(10_000)
def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def new_key() -> str:
    """Return a random key of 256 bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """Return the hex SHA-256 digest of a key; only the digest is stored."""
    return hashlib.sha256(key.encode()).hexdigest()
