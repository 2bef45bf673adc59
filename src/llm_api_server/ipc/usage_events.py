"""Usage events of requests: sent by the workers in batches, counted by the manager, written to the ledger. Pure.

A request has one row: `RequestStarted` opens it, `RequestProgress` updates it, `RequestEnded` settles it, once. Events
come by the thousand and hold no cycles, so the garbage collector skips them (`gc=False`).
"""

from __future__ import annotations

import msgspec

WORKER_LOST = "worker_lost"
CLIENT_CLOSED = "client_closed_request"


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Tokens of one request. `cached_tokens` are part of the prompt, `reasoning_tokens` of the completion."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def cost(self) -> int:
        return cost(self.prompt_tokens, self.completion_tokens)


NO_USAGE = Usage()


def cost(prompt_tokens: int, completion_tokens: int) -> int:
    """Return the cost to an engine: a generated token counts twice a prompt token (Sheng et al., OSDI 2024, sec. 3)."""
    return prompt_tokens + 2 * completion_tokens


class RequestStart(msgspec.Struct, frozen=True, gc=False):
    """Fields that are known when a request is admitted.

    `row` is unique, `request_id` may be the client's own. `at` is in Unix seconds.
    """

    row: str
    request_id: str
    key_id: str
    key_name: str
    model: str
    endpoint: str
    stream: bool
    at: float


class RequestStarted(RequestStart, frozen=True, omit_defaults=True, gc=False):
    """A request was admitted. `prompt` is set only with `storage.record_prompts`."""

    prompt: str | None = None


class RequestProgress(msgspec.Struct, frozen=True, gc=False):
    """Tokens of a running request so far; they count if its worker is lost."""

    row: str
    usage: Usage


class RunningState(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """State of a running request, shown and not stored. Times are seconds from its start, None if not reached.

    `position` is that in the queue of its model while it has no instance.
    """

    row: str
    queued: float | None = None
    first_token: float | None = None
    position: int | None = None


class RequestEnded(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The end of a request. Times are seconds from its start, None if not reached.

    `status` is the HTTP status, 499 if the client left before the response. `error` is an error code, also after a
    status of 200: `client_closed_request` if the client left, `worker_lost` if the worker died.
    """

    row: str
    status: int
    error: str | None
    instance: str | None
    usage: Usage
    queued: float | None
    first_token: float | None
    duration: float


class FinishedRequest(RequestStart, frozen=True, array_like=True, gc=False):
    """A request with its beginning and its end. The order of the fields is the encoded form."""

    prompt: str | None
    status: int
    error: str | None
    instance: str | None
    usage: Usage
    queued: float | None
    first_token: float | None
    duration: float


class OpenRequest(RequestStart, frozen=True, omit_defaults=True, kw_only=True):
    """A running request, as its worker reported it last. Managers of version 0.1 send no `row`."""

    row: str = ""
    usage: Usage
    queued: float | None
    first_token: float | None
    position: int | None


class RequestsWithoutRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Number of requests with these labels that have no row: refused before admission, or not for an engine.

    `model` and `key_name` are empty if there is none.
    """

    endpoint: str
    model: str
    key_name: str
    status: int
    error: str
    count: int


class Batch(msgspec.Struct, frozen=True, omit_defaults=True, rename={"finished": "whole"}):
    """Events since the last batch, to apply in the order of the fields. Applying a batch twice changes nothing.

    `finished` are requests that started and ended in this batch.
    """

    started: list[RequestStarted] = []
    progress: list[RequestProgress] = []
    ended: list[RequestEnded] = []
    finished: list[FinishedRequest] = []
    others: list[RequestsWithoutRow] = []
    live: list[RunningState] = []

    @property
    def ends(self) -> int:
        """Return the number of requests that the batch settles."""
        return len(self.ended) + len(self.finished)

    @property
    def has_rows(self) -> bool:
        return bool(self.started or self.progress or self.ended or self.finished)


def finish(started: RequestStarted | None, ended: RequestEnded) -> FinishedRequest:
    """Join both events of a request. Without its beginning the labels are empty."""
    start = started or _UNKNOWN
    return FinishedRequest(
        ended.row, start.request_id, start.key_id, start.key_name, start.model, start.endpoint, start.stream, start.at,
        start.prompt, ended.status, ended.error, ended.instance, ended.usage, ended.queued, ended.first_token,
        ended.duration,
    )  # fmt: skip


_UNKNOWN = RequestStarted(row="", request_id="", key_id="", key_name="", model="", endpoint="", stream=False, at=0.0)
