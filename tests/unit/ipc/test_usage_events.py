"""The encoded form of usage events, which processes of other versions read and write."""

from __future__ import annotations

import msgspec
import pytest

from llm_api_server.ipc.trace_context import TraceContext, TracedRequest
from llm_api_server.ipc.usage_events import (
    NO_USAGE,
    Batch,
    FinishedRequest,
    OpenRequest,
    RequestEnded,
    RequestProgress,
    RequestStarted,
    RequestsWithoutRow,
    RunningState,
    Usage,
    finish,
)

STARTED = RequestStarted("r", "req", "k", "ann", "m", "/v1/completions", stream=True, at=1.5, prompt="hello")
ENDED = RequestEnded("r", 200, None, "i", Usage(7, 5), 0.25, 0.5, 2.0)
FINISHED = ["r", "req", "k", "ann", "m", "/v1/completions", True, 1.5, "hello", 200, None, "i",
            {"prompt_tokens": 7, "completion_tokens": 5}, 0.25, 0.5, 2.0]  # fmt: skip
BATCH = Batch(
    [STARTED],
    [RequestProgress("r", Usage(1))],
    [ENDED],
    [finish(STARTED, ENDED)],
    [RequestsWithoutRow("other", "", "ann", 404, "not_found", 2)],
    [RunningState("r", position=3)],
)
ENCODED = {
    "started": [
        {"row": "r", "request_id": "req", "key_id": "k", "key_name": "ann", "model": "m", "stream": True, "at": 1.5,
         "endpoint": "/v1/completions", "prompt": "hello"}
    ],
    "progress": [{"row": "r", "usage": {"prompt_tokens": 1}}],
    "ended": [
        {"row": "r", "status": 200, "error": None, "instance": "i", "queued": 0.25, "first_token": 0.5,
         "duration": 2.0, "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
    ],
    "whole": [FINISHED],
    "others": [["other", "", "ann", 404, "not_found", 2]],
    "live": [{"row": "r", "position": 3}],
}  # fmt: skip


def test_a_batch_is_encoded_as_in_version_0_1() -> None:
    encoded = msgspec.msgpack.encode(BATCH)
    assert msgspec.msgpack.decode(encoded) == ENCODED
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ENCODED), type=Batch) == BATCH


def test_a_traced_request_is_encoded_as_in_version_0_1() -> None:
    traced = TracedRequest(TraceContext("1", "", "2", "3"), finish(STARTED, ENDED))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(traced)) == [["1", "", "2", "3"], FINISHED]


def test_an_open_request_of_version_0_1_has_no_row() -> None:
    fields = {"request_id": "req", "key_id": "k", "key_name": "ann", "model": "m", "endpoint": "/v1/completions",
              "stream": True, "at": 1.5, "usage": {}, "queued": None, "first_token": None,
              "position": 1}  # fmt: skip
    found = msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=OpenRequest)
    assert (found.row, found.request_id, found.usage, found.position) == ("", "req", NO_USAGE, 1)


def test_version_0_1_reads_all_fields_of_an_open_request() -> None:
    request = OpenRequest(
        request_id="req", key_id="k", key_name="ann", model="m", endpoint="/v1/completions", stream=True, at=1.5,
        row="r", usage=NO_USAGE, queued=None, first_token=None, position=None,
    )  # fmt: skip
    wanted = {"request_id", "key_id", "key_name", "model", "endpoint", "stream", "at", "usage", "queued",
              "first_token", "position"}  # fmt: skip
    assert wanted <= msgspec.msgpack.decode(msgspec.msgpack.encode(request)).keys()


@pytest.mark.parametrize("started", [STARTED, None])
def test_a_finished_request_has_the_fields_of_both_events(started: RequestStarted | None) -> None:
    found = finish(started, ENDED)
    assert isinstance(found, FinishedRequest)
    assert (found.row, found.status, found.usage, found.duration) == ("r", 200, Usage(7, 5), 2.0)
    assert (found.model, found.key_name, found.at) == (("m", "ann", 1.5) if started else ("", "", 0.0))
