"""Management of keys, stored and configured ones in one list. Configured keys are read-only."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import msgspec
from msgspec import Meta

from llm_api_server.auth.access import Key
from llm_api_server.auth.keys import configured_keys
from llm_api_server.config.models import AuthConfig
from llm_api_server.errors import KeyInConfiguration, KeyNotFound, NameTaken
from llm_api_server.store.key_fields import Actor, KeyFields, KeyRecord
from llm_api_server.types import PriorityClass

if TYPE_CHECKING:
    from llm_api_server.store.keys import Keys

#: Seconds that a replaced secret stays valid.
DEFAULT_OVERLAP = 86400.0
_STORE_ID = re.compile("key_[0-9a-f]{16}")

KeyState = Literal["active", "disabled", "expired", "revoked"]


class ListedKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key, without its secret. Times are Unix seconds."""

    id: str
    name: str
    source: Annotated[Literal["store", "config"], Meta(description="config: change it in the configuration file.")]
    state: KeyState
    note: str | None = None
    hint: Annotated[str | None, Meta(description="The last characters of its secret.")] = None
    permissions: list[str]
    models: list[str]
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrent: int | None
    tokens_per_day: int | None
    tokens_per_month: int | None
    priority: float
    priority_class: PriorityClass
    expires_at: float | None
    networks: list[str]
    enabled: bool
    created_at: float | None = None
    last_used_at: float | None = None
    revoked_at: float | None = None
    old_secret_until: Annotated[float | None, Meta(description="End of validity of the replaced secret.")] = None


class PickedKey(TypedDict, total=False):
    """Filters of the usage ledger that select one key."""

    key_id: str
    key_name: str


class ManagedKeys:
    """Keys of the store and of the configuration; a name is unique among both.

    Methods raise the errors of `store.keys.Keys`, and `KeyInConfiguration`.
    """

    def __init__(self, auth: AuthConfig, source: Path, keys: Keys) -> None:
        self._configured = configured_keys(auth)
        self._source = source
        self._keys = keys

    def list(self) -> Sequence[ListedKey]:
        return [*map(_from_config, self._configured), *map(_from_record, self._keys.list())]

    def get(self, name_or_id: str) -> ListedKey:
        if not name_or_id.isprintable():  # PostgreSQL refuses NUL, and no stored name is unprintable
            raise KeyNotFound(f"There is no key {name_or_id!r}.")
        try:
            return _from_record(self._keys.get(name_or_id))
        except KeyNotFound:
            found = self._find_configured(name_or_id)
            if found is None:
                raise
            return _from_config(found)

    def create(self, fields: KeyFields, actor: Actor) -> tuple[ListedKey, str]:
        """Create a key; return it and its secret, which is stored nowhere."""
        self._check_name(fields)
        record, secret = self._keys.create(fields, actor)
        return _from_record(record), secret

    def update(self, name_or_id: str, fields: KeyFields, actor: Actor) -> ListedKey:
        key_id = self._changeable(name_or_id)
        self._check_name(fields)
        return _from_record(self._keys.update(key_id, fields, actor))

    def rotate(self, name_or_id: str, overlap: float, actor: Actor) -> tuple[ListedKey, str]:
        """Give the key a new secret; return both."""
        record, secret = self._keys.rotate(self._changeable(name_or_id), overlap, actor)
        return _from_record(record), secret

    def revoke(self, name_or_id: str, actor: Actor) -> ListedKey:
        return _from_record(self._keys.revoke(self._changeable(name_or_id), actor))

    def delete(self, name_or_id: str, actor: Actor) -> ListedKey:
        """Delete the key; return it as it was."""
        key = self.get(self._changeable(name_or_id))
        self._keys.delete(key.id, actor)
        return key

    def picked(self, name_or_id: str | None) -> PickedKey:
        """Return the filters that select the usage of a key, even of a deleted one; None: all keys."""
        if name_or_id is None:
            return {}
        is_id = _STORE_ID.fullmatch(name_or_id) or any(key.key_id == name_or_id for key in self._configured)
        return {"key_id": name_or_id} if is_id else {"key_name": name_or_id}

    def _changeable(self, name_or_id: str) -> str:
        key = self.get(name_or_id)
        if key.source == "config":
            raise KeyInConfiguration(
                f"The key {key.name!r} is in the configuration: change it in auth.api_keys of {self._source} "
                "and reload."
            )
        return key.id

    def _check_name(self, fields: KeyFields) -> None:
        if isinstance(fields.name, str) and self._find_configured(fields.name) is not None:
            message = f"A key of the configuration has the name {fields.name!r}; choose another."
            raise NameTaken(message, param="name")

    def _find_configured(self, name_or_id: str) -> Key | None:
        return next((key for key in self._configured if name_or_id in {key.name, key.key_id}), None)


def _from_config(key: Key) -> ListedKey:
    return ListedKey(source="config", **_listed(key))


def _from_record(record: KeyRecord) -> ListedKey:
    times = {name: getattr(record, name) for name in ("created_at", "last_used_at", "revoked_at", "old_secret_until")}
    listed = _listed(record.key) | ({"state": "revoked"} if record.revoked_at is not None else {})
    return ListedKey(source="store", note=record.note, hint=record.hint, **times, **listed)


def _listed(key: Key) -> dict[str, Any]:
    return {
        "id": key.key_id,
        "name": key.name,
        "state": _state(key),
        "permissions": sorted(key.permissions),
        "models": [*key.models],
        **msgspec.structs.asdict(key.limits),
        "priority": key.priority,
        "priority_class": key.priority_class,
        "expires_at": key.expires_at,
        "networks": [*key.networks],
        "enabled": key.enabled,
    }


def _state(key: Key) -> KeyState:
    if not key.enabled:
        return "disabled"
    return "expired" if key.expires_at is not None and key.expires_at <= time.time() else "active"
