"""Keys and their audit as the command line shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from llm_api_server import formats
from llm_api_server.admin.keys import ListedKey
from llm_api_server.redaction import one_line
from llm_api_server.times import as_utc

if TYPE_CHECKING:
    from llm_api_server.store.key_fields import AuditEntry

_COLUMNS: dict[str, Callable[[ListedKey], str]] = {
    "NAME": lambda key: one_line(key.name),
    "ID": lambda key: key.id,
    "ENDS WITH": lambda key: key.hint or "-",
    "STATE": lambda key: key.state,
    "PERMISSIONS": lambda key: ",".join(key.permissions) or "-",
    "MODELS": lambda key: one_line(",".join(key.models)) or "-",
    "EXPIRES": lambda key: _time(key.expires_at) or "never",
    "LAST USED": lambda key: _time(key.last_used_at) or "-",
    "SOURCE": lambda key: key.source,
}
_TIMES = ("expires_at", "created_at", "last_used_at", "revoked_at", "old_secret_until")


def as_json(content: ListedKey | Sequence[ListedKey] | Sequence[AuditEntry], **more: str) -> str:
    """`more` is added to a single key."""
    found = msgspec.to_builtins(content)
    return msgspec.json.format(msgspec.json.encode({**found, **more} if more else found), indent=2).decode()


def as_table(keys: Sequence[ListedKey]) -> str:
    if not keys:
        return "There are no keys: make one with `llm-api-server keys create --name NAME`."
    return formats.as_table([list(_COLUMNS), *([show(key) for show in _COLUMNS.values()] for key in keys)])


def as_lines(key: ListedKey) -> str:
    """Every field that has a value, one per line."""
    return formats.as_lines({name: _shown(name, value) for name, value in msgspec.to_builtins(key).items()})


def audit_table(entries: Sequence[AuditEntry]) -> str:
    if not entries:
        return "No changes are known."
    rows = [[as_utc(entry.at), entry.actor, entry.action, entry.key_name, _changes(entry)] for entry in entries]
    return formats.as_table([["TIME", "WHO", "DID", "KEY", "CHANGES"], *([one_line(c) for c in row] for row in rows)])


def _changes(entry: AuditEntry) -> str:
    """What became of the fields that changed; a new key's defaults are left out, and a deleted key's values."""
    if entry.action == "delete":
        return ""
    changed = {name: (old, new) for name, (old, new) in entry.changes.items() if name != "hint"}
    if entry.action == "create":
        return ", ".join(f"{name}={_shown(name, new)}" for name, (_, new) in changed.items() if new not in (None, []))
    return ", ".join(
        f"{name}: {_shown(name, old) or 'none'} -> {_shown(name, new) or 'none'}"
        for name, (old, new) in changed.items()
    )


def _shown(name: str, value: Any) -> Any:
    if value is None or value == []:
        return None
    if name in _TIMES:
        return _time(value)
    return one_line(", ".join(value) if isinstance(value, list) else str(value))


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else as_utc(seconds)
