"""Error of a request that has waited too long for a slot, and the wait that the client's own timeout leaves."""

from __future__ import annotations

import time

import pytest

from llm_api_server.errors import ModelLoading, ServerOverloaded
from llm_api_server.gateway.proxy.queue_timeout import QueueTimeout
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.types import ModelState


def status(state: ModelState, *, ready_at: float | None = None) -> dict[str, ModelStatus]:
    return {"m": ModelStatus("m", state, "llama_cpp", "m", ready_at=ready_at)}


@pytest.mark.parametrize(("ready_in", "retry_after"), [(40, 40), (-40, 1)])
def test_a_loading_model_gives_the_rest_of_its_load_as_retry_after(ready_in: float, retry_after: float) -> None:
    error = QueueTimeout("m", 10).error(status(ModelState.STARTING, ready_at=time.time() + ready_in))
    assert isinstance(error, ModelLoading)
    assert error.retry_after == pytest.approx(retry_after, abs=1)


def test_a_busy_model_gives_the_last_position_in_its_queue() -> None:
    queue = QueueTimeout("m", 10)
    queue.on_position(7)
    error = queue.error(status(ModelState.READY))
    assert isinstance(error, ServerOverloaded)
    assert error.position == 7
    assert "number 7" in error.message


@pytest.mark.parametrize("models", [{}, status(ModelState.FAILED)])
def test_no_error_names_the_model_if_it_is_not_the_reason(models: dict[str, ModelStatus]) -> None:
    assert QueueTimeout("m", 10).error(models) is None


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
def test_the_wait_ends_before_the_clients_own_timeout(headers: dict[bytes, bytes], until: float) -> None:
    queue = QueueTimeout("m", 300)
    queue.apply_client_timeout(headers, started_at=100)
    assert queue.until == until
