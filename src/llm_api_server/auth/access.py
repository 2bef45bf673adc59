"""What a caller is and may do: shared by those who find keys, those who keep them and those who count."""

from __future__ import annotations

import hashlib
import secrets
from fnmatch import fnmatchcase
from functools import lru_cache

import msgspec

from llm_api_server.types import Permission, PriorityClass


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """How much one key may use; None: without limit. Days and months are those of UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None


NO_LIMITS = Limits()


class Key(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a caller may do. `models` are shell patterns, `networks` CIDR blocks (none: from everywhere).

    `key_id` names the key in logs, tokens and accounts; it stays the same when the secret is rotated. `expires_at` is
    in Unix seconds. `priority` is the weight of its requests where several wait, and those of the class
    `batch` come after all others.
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
    """A random key of 256 bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """Hex SHA-256 of a key: all that is kept of it."""
    return hashlib.sha256(key.encode()).hexdigest()
