"""What a key of the store may be: the rules of `config.ApiKeyConfig`, and what a database needs on top. Pure."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import ValidationError

from llm_api_server.config.models import ApiKeyConfig
from llm_api_server.errors import InvalidKeyField
from llm_api_server.types import PriorityClass

_UNUSED_KEY = "not-a-key"
_LARGEST = 2**53
_KEY_ID = re.compile("key_[0-9a-f]{16}")
_MAX_NOTE = 10_000
_YEAR_9999 = 253_370_764_800.0


class KeyFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is set when a key is made or changed; what is not given keeps its value, or its default.

    `expires_at` is in Unix seconds. Limits, `note` and `expires_at` may be None: without.
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


def given(fields: KeyFields) -> dict[str, Any]:
    """The values that are set, checked and in their usual form, by column. Raises `InvalidKeyField`."""
    values = {name: value for name in fields.__struct_fields__ if (value := getattr(fields, name)) is not UNSET}
    _check_ours(values)
    theirs = {name: value for name, value in values.items() if name not in {"note", "expires_at"}}
    checked = _check_as_configured(theirs)
    return values | {name: getattr(checked, name) for name in theirs}


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """All columns of a new key."""
    defaults = _check_as_configured({"name": values.get("name", "")})
    return {name: getattr(defaults, name, None) for name in KeyFields.__struct_fields__} | values


def check_overlap(overlap: float) -> None:
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


_NEVER_NONE = frozenset({"name", "permissions", "models", "priority", "priority_class", "networks", "enabled"})


def _check_ours(values: dict[str, Any]) -> None:
    for field, value in values.items():
        words = value if isinstance(value, list) else [value]
        if field != "note" and not all(word.isprintable() for word in words if isinstance(word, str)):
            raise InvalidKeyField(field, "it holds characters that cannot be shown.")
        if isinstance(value, int) and value > _LARGEST:
            raise InvalidKeyField(field, f"give at most {_LARGEST}.")
    note = values.get("note")
    if note is not None and len(note) > _MAX_NOTE:
        raise InvalidKeyField("note", f"give at most {_MAX_NOTE} characters.")
    if _KEY_ID.fullmatch(values.get("name") or ""):
        raise InvalidKeyField("name", "it has the form of a key's id; choose another.")
    expires_at = values.get("expires_at")
    if expires_at is not None and not (math.isfinite(expires_at) and 0 < expires_at <= _YEAR_9999):
        raise InvalidKeyField("expires_at", "give a time in Unix seconds.")
