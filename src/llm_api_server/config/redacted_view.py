"""View of a configuration for people: every option with its effective value, secrets hidden."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

HIDDEN = "(hidden)"


def redacted(section: BaseModel) -> dict[str, Any]:
    """Return the options of `section` by name, as plain values."""
    fields = type(section).model_fields.items()
    return {
        name: _value(getattr(section, name), is_public=bool(field.repr)) for name, field in fields if not field.exclude
    }


def _value(value: Any, *, is_public: bool) -> Any:
    if isinstance(value, BaseModel):
        return redacted(value)
    if isinstance(value, dict):
        return {key: _value(one, is_public=is_public) for key, one in value.items()}
    if not is_public and value is not None:
        return HIDDEN
    if isinstance(value, list):
        return [_value(one, is_public=is_public) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
