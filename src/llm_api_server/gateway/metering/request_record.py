"""The record of one request: filled in by the layers that it passes, finished by `RequestCompletion`."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import Any

import msgspec

from llm_api_server.auth.access import Key
from llm_api_server.gateway.wire.stream_reader import StreamReader
from llm_api_server.ipc.trace_context import TraceContext
from llm_api_server.ipc.usage_events import NO_USAGE, Usage

#: Status of a request whose client disconnected before the response (nginx's status for it).
CLIENT_CLOSED_REQUEST = 499
_SCOPE_KEY = "llm_api_server.record"


class RequestRecord(msgspec.Struct):
    """Facts about one request. `started_at` is of the monotonic clock; all other times are seconds from it.

    `status` is what the client saw first, `admission` the number of the request among those with limits, `row` its name
    in the ledger.
    """

    request_id: str
    method: str
    path: str
    started_at: float
    key: Key | None = None
    by_token: bool = False
    model: str | None = None
    stream: bool = False
    status: int = 0
    error: str | None = None
    #: As the engine reported it.
    usage: Usage | None = None
    seconds: float = 0.0
    #: Until the first byte to the client.
    first_byte_seconds: float | None = None
    #: Until it had an instance.
    queued_seconds: float | None = None
    #: Until the first token of the engine.
    first_token_seconds: float | None = None
    instance: str | None = None
    #: Position in the queue of its model, if known.
    position: int | None = None
    #: Usage that the ended request is settled with.
    used: Usage = NO_USAGE
    admission: int | None = None
    #: Header lines with the key's rate limits, if known.
    limit_lines: bytes | None = None
    row: str | None = None
    trace: TraceContext | None = None
    #: Set only with `storage.record_prompts`.
    prompt: str | None = None
    #: Prompt tokens by the length of the prompt, set when an engine has it.
    prompt_estimate: int = 0
    #: Counts the tokens of a stream.
    reader: StreamReader | None = None
    extra_headers: list[tuple[bytes, bytes]] = []

    def usage_or_estimate(self) -> Usage:
        """Return the engine's usage, or until it reports any, the tokens of the stream and the prompt's estimate."""
        usage = self.usage or (self.reader.usage_so_far if self.reader is not None else NO_USAGE)
        if usage.prompt_tokens or not self.prompt_estimate:
            return usage
        return msgspec.structs.replace(usage, prompt_tokens=self.prompt_estimate)

    def elapsed(self) -> float:
        return time.monotonic() - self.started_at


def attach(scope: MutableMapping[str, Any], record: RequestRecord) -> None:
    scope[_SCOPE_KEY] = record


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """Return the record that `attach` put into an ASGI scope."""
    record = scope[_SCOPE_KEY]
    assert isinstance(record, RequestRecord)
    return record
