"""Shapes of a stored key and of its changes, and the checks of its fields. Pure; imports no SQLAlchemy.

The rules are those of `ApiKeyConfig`, plus the limits of a database.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType
from pydantic import ValidationError

from llm_api_server.auth.access import Key
from llm_api_server.config.models import ApiKeyConfig
from llm_api_server.errors import InvalidKeyField
from llm_api_server.types import PriorityClass

_UNUSED_KEY = "not-a-key"
#: Largest integer that JSON clients read exactly.
_MAX_INTEGER = 2**53
_KEY_ID = re.compile("key_[0-9a-f]{16}")
_MAX_NOTE_CHARS = 10_000
_YEAR_9999 = 253_370_764_800.0
_NEVER_NONE = frozenset({"name", "permissions", "models", "priority", "priority_class", "networks", "enabled"})


class KeyFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields to set on a key. An unset field keeps its value, or gets its default on creation.

    `expires_at` is in Unix seconds. None removes a limit, the note or the expiry.
    """

    name: str | UnsetType = UNSET
    note: str | UnsetType | None = UNSET
    permissions: list[str] | UnsetType = UNSET
    models: list[str] | UnsetType = UNSET
    requests_per_minute: int | UnsetType | None = UNSET
    tokens_per_minute: int | UnsetType | None = UNSET
    max_concurrent: int | UnsetType | None = UNSET
    tokens_per_day: int | UnsetType | None = UNSET
    tokens_per_month: int | UnsetType | None = UNSET
    priority: float | UnsetType = UNSET
    priority_class: PriorityClass | UnsetType = UNSET
    expires_at: float | UnsetType | None = UNSET
    networks: list[str] | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class KeyRecord(msgspec.Struct, frozen=True):
    """A stored key without its secret. `hint` is the end of the secret; times are in Unix seconds."""

    key: Key
    note: str | None
    hint: str
    created_at: float
    last_used_at: float | None
    revoked_at: float | None
    old_secret_until: float | None


@dataclass(frozen=True)
class Actor:
    """Author of a change: `cli:` and a user, or the name of the API key in use."""

    name: str
    key_id: str | None = None
    request_id: str | None = None


class AuditEntry(msgspec.Struct, frozen=True):
    """One change of a key. `actor` is the name of the key in use, or `cli:` and a user; `at` is in Unix seconds."""

    revision: int
    at: float
    actor: str
    actor_key_id: str | None
    request_id: str | None
    action: Annotated[str, Meta(description="create, update, rotate, revoke or delete")]
    key_id: str
    key_name: str
    changes: Annotated[dict[str, list[Any]], Meta(description="By field: the old and the new value; null: none.")]


def given(fields: KeyFields) -> dict[str, Any]:
    """Return the set fields by column, checked and normalized. Raises `InvalidKeyField`."""
    values = {name: value for name in fields.__struct_fields__ if (value := getattr(fields, name)) is not UNSET}
    _check_for_database(values)
    configurable = {name: value for name, value in values.items() if name not in {"note", "expires_at"}}
    checked = _check_as_configured(configurable)
    return values | {name: getattr(checked, name) for name in configurable}


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return all columns of a new key."""
    defaults = _check_as_configured({"name": values.get("name", "")})
    return {name: getattr(defaults, name, None) for name in KeyFields.__struct_fields__} | values


def check_overlap(overlap: float) -> None:
    """Raise `InvalidKeyField` if `overlap` is no duration in seconds."""
    if not 0 <= overlap <= _YEAR_9999:
        raise InvalidKeyField("overlap", "give a number of seconds, 0 or more.")


def _check_as_configured(values: dict[str, Any]) -> ApiKeyConfig:
    for field, value in values.items():
        if value is None and field in _NEVER_NONE:
            raise InvalidKeyField(field, "give a value.")
    try:
        return ApiKeyConfig.model_validate({"key": _UNUSED_KEY, "name": "any", **values})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = str(first.get("ctx", {}).get("error", first["msg"]))
        raise InvalidKeyField(str(first["loc"][0]), f"{reason}.") from error


def _check_for_database(values: dict[str, Any]) -> None:
    for field, value in values.items():
        words = value if isinstance(value, list) else [value]
        if field != "note" and not all(word.isprintable() for word in words if isinstance(word, str)):
            raise InvalidKeyField(field, "remove the characters that cannot be printed.")
        if isinstance(value, int) and value > _MAX_INTEGER:
            raise InvalidKeyField(field, f"give at most {_MAX_INTEGER}.")
    note = values.get("note")
    if note is not None and len(note) > _MAX_NOTE_CHARS:
        raise InvalidKeyField("note", f"give at most {_MAX_NOTE_CHARS} characters.")
    if _KEY_ID.fullmatch(values.get("name") or ""):
        raise InvalidKeyField("name", "it has the form of a key's id; choose another.")
    expires_at = values.get("expires_at")
    if expires_at is not None and not (math.isfinite(expires_at) and 0 < expires_at <= _YEAR_9999):
        raise InvalidKeyField("expires_at", "give a time in Unix seconds.")
