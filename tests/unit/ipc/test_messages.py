"""The encoded form of messages is a contract between versions: an old worker runs beside a new manager."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from llm_api_server.auth.access import Limits
from llm_api_server.errors import ControlError
from llm_api_server.ipc import framing
from llm_api_server.ipc.framing import encode
from llm_api_server.ipc.lease_messages import (
    Acquire,
    Claim,
    EndedRequest,
    Granted,
    InstanceInfo,
    PrefillDone,
    ReturnSlots,
    RevokeSlots,
)
from llm_api_server.ipc.messages import Refused, to_client_decoder, to_manager_decoder
from llm_api_server.ipc.quota_messages import (
    Admit,
    Admitted,
    QuotaGrant,
    RateLimit,
    RateLimits,
    ReportQuota,
    RevokeQuota,
)

INFO: dict[str, Any] = {
    "id": "m-1",
    "model": "m",
    "engine": "vllm",
    "address": "unix:/x",
    "upstream_model": None,
    "headers": {},
    "context_length": None,
    "tasks": None,
}
CLAIM = {"key_id": "k", "work": 7, "reads": 5, "is_light": True}
RATE_LIMIT = {"limit": 10, "remaining": 9, "reset": 1.0}


@pytest.mark.parametrize(
    ("message", "encoded"),
    [
        (
            Acquire(1, "m", None, Claim("k", cost=7, prefill_tokens=5, is_light=True)),
            {"type": "acquire", "request": 1, "model": "m", "task": None, "claim": CLAIM},
        ),
        (PrefillDone(4), {"type": "read", "number": 4}),
        (
            ReturnSlots("m-1", 3, [EndedRequest("k", 9)]),
            {"type": "release", "instance": "m-1", "places": 3, "ended": [["k", 9]]},
        ),
        (
            Admit(2, "id", "ann", Limits(max_concurrent=3), 10, 50),
            {
                "type": "admit",
                "request": 2,
                "key_id": "id",
                "name": "ann",
                "limits": {"max_concurrent": 3},
                "tokens": 10,
            }
            | {"tokens": 10, "spare": 50, "counts": True},
        ),
        (
            ReportQuota("id", 2, 30, QuotaGrant(1, 2, 3), is_reply=True),
            {"type": "spend", "key_id": "id", "requests": 2, "tokens": 30}
            | {"back": {"requests": 1, "tokens": 2, "places": 3}, "is_answer": True},
        ),
    ],
    ids=lambda value: value.get("type") if isinstance(value, dict) else "",
)
def test_messages_of_workers_keep_their_encoded_names(message: Any, encoded: dict[str, Any]) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message)) == encoded
    assert to_manager_decoder().feed(_framed(encoded)) == [message]


@pytest.mark.parametrize(
    ("message", "encoded"),
    [
        (
            Granted(1, InstanceInfo("m-1", "m", "vllm", "unix:/x"), 3, until_revoked=True, key_id="k"),
            {"type": "granted", "request": 1, "instance": INFO, "places": 3, "keeps": True, "key_id": "k"},
        ),
        (RevokeSlots("m-1"), {"type": "reclaim", "instance": "m-1"}),
        (
            Admitted(2, RateLimits(RateLimit(10, 9, 1.0)), 60, QuotaGrant(concurrent=3)),
            {"type": "admitted", "request": 2, "standing": {"requests": RATE_LIMIT}, "reserved": 60}
            | {"share": {"places": 3}},
        ),
        (RevokeQuota("id"), {"type": "recall", "key_id": "id"}),
        (
            Refused(3, "slow_down", "no", rate_limits=RateLimits(tokens=RateLimit(10, 9, 1.0))),
            {"type": "refused", "request": 3, "code": "slow_down", "message": "no", "retry_after": None}
            | {"should_retry": None, "standing": {"tokens": RATE_LIMIT}, "position": None},
        ),
    ],
    ids=lambda value: value.get("type") if isinstance(value, dict) else "",
)
def test_messages_of_the_manager_keep_their_encoded_names(message: Any, encoded: dict[str, Any]) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message)) == encoded
    assert to_client_decoder().feed(_framed(encoded)) == [message]


def test_messages_are_decoded_however_the_stream_is_cut() -> None:
    decoder, stream = to_manager_decoder(), encode(PrefillDone(1)) + encode(PrefillDone(2))
    messages = [message for at in range(len(stream)) for message in decoder.feed(stream[at : at + 1])]
    assert messages == [PrefillDone(1), PrefillDone(2)]


def test_an_unknown_message_is_an_error() -> None:
    with pytest.raises(ControlError, match="unknown control message"):
        to_manager_decoder().feed(_framed({"type": "from the future"}))


def test_a_message_over_the_limit_is_an_error() -> None:
    length = (framing.MAX_MESSAGE_BYTES + 1).to_bytes(4, "big")
    with pytest.raises(ControlError, match="over the limit"):
        to_manager_decoder().feed(length)


def _framed(encoded: dict[str, Any]) -> bytes:
    body = msgspec.msgpack.encode(encoded)
    return len(body).to_bytes(4, "big") + body
