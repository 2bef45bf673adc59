"""A configuration as people may see it: every option with the value that counts, secrets hidden. Pure."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

HIDDEN = "(hidden)"


def shown(section: BaseModel) -> dict[str, Any]:
    """By option, as plain values."""
    fields = type(section).model_fields.items()
    return {name: _value(getattr(section, name), field.repr) for name, field in fields if not field.exclude}


def _value(value: Any, is_public: bool) -> Any:  # noqa: FBT001 - a column of a row
    if isinstance(value, BaseModel):
        return shown(value)
    if isinstance(value, dict):
        return {key: _value(one, is_public) for key, one in value.items()}
    if not is_public and value is not None:
        return HIDDEN
    if isinstance(value, list):
        return [_value(one, is_public) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
