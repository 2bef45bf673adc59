"""Rules for secrets in a configuration: published keys, and secrets too weak to sign tokens."""

from __future__ import annotations

MIN_SECRET_BYTES = 32
#: Prefix of a key that is given as the hex SHA-256 digest of its secret.
SHA256_PREFIX = "sha256:"
#: Keys of published examples.
EXAMPLE_KEYS = frozenset({"sk-myapikey123456789", "sk-restricted987654321"})
_EXAMPLE_SECRETS = frozenset({"your-secret-key", "your_secret_key", "change-me", "changeme", "secret", "secret-key"})


def is_weak_secret(secret: str | None) -> bool:
    """Return whether `secret` is missing, from an example, too short, or too regular to sign tokens."""
    if secret is None or secret.lower() in _EXAMPLE_SECRETS:
        return True
    return len(secret.encode()) < MIN_SECRET_BYTES or len(set(secret)) < 8  # noqa: PLR2004 - "aaaa…", "12121212…"
