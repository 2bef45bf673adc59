"""What a request is told that has waited for too long, and how long it waits when its client says so."""

from __future__ import annotations

import time

import pytest

from llm_api_server.errors import ModelLoading, ServerOverloaded
from llm_api_server.gateway.proxy.queue_timeout import QueueTimeout
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.types import ModelState


def status(state: ModelState, *, ready_at: float | None = None) -> dict[str, ModelStatus]:
    return {"m": ModelStatus("m", state, "llama_cpp", "m", ready_at=ready_at)}


def test_a_load_that_goes_on_says_when_it_will_be_over() -> None:
    error = QueueTimeout("m", 10).too_long(status(ModelState.STARTING, ready_at=time.time() + 40))
    assert isinstance(error, ModelLoading)
    assert error.retry_after == pytest.approx(40, abs=1)
    late = QueueTimeout("m", 10).too_long(status(ModelState.STARTING, ready_at=time.time() - 40))
    assert late is not None
    assert late.retry_after == 1


def test_a_busy_model_says_which_place_was_reached() -> None:
    wait = QueueTimeout("m", 10)
    wait.on_position(7)
    error = wait.too_long(status(ModelState.READY))
    assert isinstance(error, ServerOverloaded)
    assert error.position == 7
    assert "number 7" in error.message


@pytest.mark.parametrize("models", [{}, status(ModelState.FAILED)])
def test_where_the_model_is_not_the_reason_nothing_is_said_of_it(models: dict[str, ModelStatus]) -> None:
    assert QueueTimeout("m", 10).too_long(models) is None


@pytest.mark.parametrize(
    ("headers", "until"),
    [
        ({}, 300),
        ({b"x-stainless-read-timeout": b"60"}, 159),
        ({b"x-stainless-timeout": b"60.5"}, 159.5),
        ({b"x-stainless-read-timeout": b"NOT_GIVEN", b"x-stainless-timeout": b"10"}, 109),
        ({b"x-stainless-read-timeout": b"600"}, 300),
        ({b"x-stainless-read-timeout": b"1"}, 300),
        ({b"x-stainless-read-timeout": b"nan"}, 300),
        ({b"x-stainless-read-timeout": b"-5"}, 300),
    ],
)
def test_a_client_that_gives_up_by_itself_is_told_before(headers: dict[bytes, bytes], until: float) -> None:
    wait = QueueTimeout("m", 300)
    wait.heed(headers, started_at=100)
    assert wait.until == until
