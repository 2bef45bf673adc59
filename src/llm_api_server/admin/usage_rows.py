"""Usage as rows with plain column names, for tables, CSV and the admin API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec

from llm_api_server import formats
from llm_api_server.store.ledger_rows import RequestRow, UsageSum, UsageTotal
from llm_api_server.types import UsageGroup

GROUPS: tuple[UsageGroup, ...] = get_args(UsageGroup)
GROUP_COLUMNS: dict[UsageGroup, tuple[str, ...]] = {
    "key": ("key_name", "key_id"),
    "model": ("model",),
    "day": ("day",),
    "hour": ("hour",),
}
SUM_COLUMNS = UsageTotal.__struct_fields__
REQUEST_COLUMNS = tuple(name for name in RequestRow.__struct_fields__ if name not in {"row", "worker"})


def parse_groups(text: str, allowed: Sequence[UsageGroup] = GROUPS) -> tuple[UsageGroup, ...]:
    """Parse `key,day`; empty or `none` means one sum. Raises `ValueError` with a message for users."""
    words = [word.strip() for word in text.split(",") if word.strip() not in {"", "none"}]
    wrong = next((word for word in words if word not in allowed), None)
    if wrong is not None:
        raise ValueError(f"{wrong!r} cannot be grouped by: give one or several of {', '.join(allowed)}, with commas.")
    return tuple(group for group in allowed if group in words)


def sum_columns(groups: Sequence[UsageGroup]) -> list[str]:
    return [*(column for group in groups for column in GROUP_COLUMNS[group]), *SUM_COLUMNS]


def sum_row(found: UsageSum, columns: Sequence[str]) -> dict[str, Any]:
    return _pick(msgspec.structs.asdict(found), columns)


def request_row(found: RequestRow) -> dict[str, Any]:
    return _pick(msgspec.structs.asdict(found), REQUEST_COLUMNS)


def sums_csv(found: Sequence[UsageSum], groups: Sequence[UsageGroup]) -> str:
    columns = sum_columns(groups)
    return formats.as_csv(columns, [sum_row(one, columns) for one in found])


def requests_csv(found: Sequence[RequestRow]) -> str:
    return formats.as_csv(REQUEST_COLUMNS, map(request_row, found))


def _pick(values: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {column: values[column] for column in columns}
