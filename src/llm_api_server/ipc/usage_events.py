"""What the ledger knows of a request: said by the workers, kept by the store. Pure.

A request has one row. `RequestStarted` makes it, `RequestProgress` says how far a long one is, `RequestEnded`
settles it, once. They come by
the thousand and hold no cycles, so the garbage collector does not look at them (`gc=False`).
"""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Tokens of one request. `cached_tokens` are part of the prompt, `reasoning_tokens` of the completion."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def work(self) -> int:
        """What it cost an engine, as fairness counts it."""
        return work(self.prompt_tokens, self.completion_tokens)


NO_USAGE = Usage()


def work(prompt_tokens: int, completion_tokens: int) -> int:
    """A token that is generated costs about twice one that is read (Sheng et al., OSDI 2024, section 3)."""
    return prompt_tokens + 2 * completion_tokens


class RequestStarted(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A request was admitted. `row` is unique, `request_id` may be the client's own. `at` is in Unix seconds.

    `prompt` is there only with `storage.record_prompts`.
    """

    row: str
    request_id: str
    key_id: str
    key_name: str
    model: str
    endpoint: str
    stream: bool
    at: float
    prompt: str | None = None


class RequestProgress(msgspec.Struct, frozen=True, gc=False):
    """Tokens so far: what counts when nobody can say more."""

    row: str
    usage: Usage


class Live(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What a request does that runs: told, and not kept. Seconds from its start; None where it did not come to that.

    `position` is its place in the queue of its model, as long as it has no instance.
    """

    row: str
    queued: float | None = None
    first_token: float | None = None
    position: int | None = None


class OpenRequest(msgspec.Struct, frozen=True):
    """One that runs, as far as its worker has told; see `RequestStarted` and `Live`."""

    request_id: str
    key_id: str
    key_name: str
    model: str
    endpoint: str
    stream: bool
    at: float
    usage: Usage
    queued: float | None
    first_token: float | None
    position: int | None


class RequestEnded(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """How it ended. Times are in seconds from the start; None where it did not come to that.

    `status` is the HTTP status, 499 when the client left before the answer. `error` is the code of what went wrong,
    also after a status of 200; `client_closed_request` when the client left, `worker_lost` when its worker died.
    """

    row: str
    status: int
    error: str | None
    instance: str | None
    usage: Usage
    queued: float | None
    first_token: float | None
    duration: float


class Whole(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request that has begun and ended since the last batch: `RequestStarted` and `RequestEnded` in one."""

    row: str
    request_id: str
    key_id: str
    key_name: str
    model: str
    endpoint: str
    stream: bool
    at: float
    prompt: str | None
    status: int
    error: str | None
    instance: str | None
    usage: Usage
    queued: float | None
    first_token: float | None
    duration: float


class Other(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """So many requests that have no row, alike in all else: refused before they were admitted, or not for an engine.

    `model` and `key_name` are empty where there is none. Counted, and not kept in the ledger.
    """

    endpoint: str
    model: str
    key_name: str
    status: int
    error: str
    count: int


WORKER_LOST = "worker_lost"
CLIENT_CLOSED = "client_closed_request"


class Batch(msgspec.Struct, frozen=True, omit_defaults=True):
    """What happened since the last one, in the order of the fields. Saying it twice changes nothing."""

    started: list[RequestStarted] = []
    progress: list[RequestProgress] = []
    ended: list[RequestEnded] = []
    whole: list[Whole] = []
    others: list[Other] = []
    live: list[Live] = []

    @property
    def ends(self) -> int:
        """How many requests it settles."""
        return len(self.ended) + len(self.whole)

    @property
    def has_rows(self) -> bool:
        return bool(self.started or self.progress or self.ended or self.whole)
