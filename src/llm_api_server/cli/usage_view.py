"""What was used, as the command line shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from llm_api_server import formats
from llm_api_server.admin import usage_rows
from llm_api_server.redaction import one_line
from llm_api_server.times import as_utc
from llm_api_server.types import UsageGroup

if TYPE_CHECKING:
    from llm_api_server.store.ledger_rows import RequestRow, UsageSum

#: The table leaves out what CSV and JSON have.
_SUMS = {
    "requests": "REQUESTS",
    "errors": "ERRORS",
    "aborted": "ABORTED",
    "prompt_tokens": "PROMPT",
    "cached_tokens": "CACHED",
    "completion_tokens": "COMPLETION",
    "reasoning_tokens": "REASONING",
    "first_token": "FIRST TOKEN",
    "queued": "QUEUED",
}
_REQUESTS = {
    "started_at": "STARTED",
    "key_name": "KEY",
    "model": "MODEL",
    "endpoint": "ENDPOINT",
    "status": "STATUS",
    "error": "ERROR",
    "prompt_tokens": "PROMPT",
    "completion_tokens": "COMPLETION",
    "first_token": "FIRST TOKEN",
    "duration": "SECONDS",
    "request_id": "REQUEST ID",
}
_GROUPS = {"key": ("key_name", "KEY"), "model": ("model", "MODEL"), "day": ("day", "DAY"), "hour": ("hour", "HOUR")}
_SECONDS = {"first_token", "queued", "duration"}


def sums_table(found: Sequence[UsageSum], total: Sequence[UsageSum], groups: Sequence[UsageGroup]) -> str:
    """A line for each group; the last has the totals."""
    if not found:
        return "Nothing was used."
    columns = dict(_GROUPS[group] for group in groups) | _SUMS
    rows = [[_cell(name, value) for name, value in _values(one, columns).items()] for one in found]
    if groups:
        last = [_cell(name, value) for name, value in _values(total[0], columns).items()]
        rows.append(["TOTAL", *[""] * (len(groups) - 1), *last[len(groups) :]])
    return formats.as_table([list(columns.values()), *rows])


def requests_table(found: Sequence[RequestRow]) -> str:
    if not found:
        return "No requests are kept."
    rows = [[_cell(name, usage_rows.request_row(one)[name]) for name in _REQUESTS] for one in found]
    return formats.as_table([list(_REQUESTS.values()), *rows])


def sums_json(found: Sequence[UsageSum], total: Sequence[UsageSum], groups: Sequence[UsageGroup]) -> str:
    columns = usage_rows.sum_columns(groups)
    data = [usage_rows.sum_row(one, columns) for one in found]
    return _json({"data": data, "total": usage_rows.sum_row(total[0], usage_rows.SUM_COLUMNS) if total else None})


def requests_json(found: Sequence[RequestRow]) -> str:
    return _json({"data": [usage_rows.request_row(one) for one in found]})


def _values(found: UsageSum, columns: Mapping[str, str]) -> dict[str, Any]:
    return usage_rows.sum_row(found, list(columns))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "started_at":
        return as_utc(value)
    return f"{value:.2f} s" if name in _SECONDS else one_line(str(value))


def _json(content: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()
