"""Shapes of usage sums and single requests, as the store, the admin API and the command line share them. Pure.

Imports no SQLAlchemy: workers describe their API with these structs before they use the database.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from llm_api_server.types import INTERNAL, UsageGroup


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Selection of requests by their start time. `since` and `until` are Unix seconds and count in whole hours (UTC).

    Requests older than `storage.keep_hours` are kept as days only: start such a range at midnight.
    """

    since: float | None = None
    until: float | None = None
    key_id: str | None = None
    key_name: str | None = None
    model: str | None = None
    group_by: tuple[UsageGroup, ...] = ()


class UsageTotal(msgspec.Struct, frozen=True, kw_only=True):
    """Usage of several requests.

    `seconds` is the duration of all requests together; `first_token` and `queued` are averages, in seconds.
    """

    requests: int
    errors: int
    aborted: Annotated[int, Meta(description="The client disconnected before the end.")]
    prompt_tokens: int
    cached_tokens: Annotated[int, Meta(description="Part of `prompt_tokens`.")]
    completion_tokens: int
    reasoning_tokens: Annotated[int, Meta(description="Part of `completion_tokens`.")]
    seconds: float
    first_token: float | None
    queued: float | None


class UsageSum(UsageTotal, frozen=True, kw_only=True, omit_defaults=True):
    """Usage of one group; it has the fields that `group_by` asks for."""

    key_id: str | None = None
    key_name: str | None = None
    model: str | None = None
    day: Annotated[str | None, Meta(description="Such as 2027-01-31; UTC.")] = None
    hour: Annotated[str | None, Meta(description="Such as 2027-01-31T12:00:00Z.")] = None


class RequestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Times are Unix seconds; `queued`, `first_token` and `duration` are seconds from its start."""

    id: int
    row: Annotated[str, INTERNAL]
    worker: Annotated[str, INTERNAL]
    started_at: float
    ended_at: Annotated[float | None, Meta(description="null: in progress.")]
    key_name: str
    key_id: str
    model: str
    endpoint: str
    stream: bool
    status: int | None
    error: Annotated[
        str | None,
        Meta(description="`worker_lost`: its worker died before the end was recorded; tokens are the last reported."),
    ]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    queued: float | None
    first_token: float | None
    duration: float | None
    instance: str | None
    request_id: str
    prompt: Annotated[str | None, Meta(description="Only with `storage.record_prompts`.")]
