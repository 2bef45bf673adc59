"""Limit on the time that a request waits for a slot, and the error once that is over."""

from __future__ import annotations

import time
from collections.abc import Mapping

from llm_api_server.errors import ApiError, ModelLoading, ServerOverloaded
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.types import ModelState

#: Headers in which the SDKs of OpenAI and Anthropic send their client's timeout, in seconds.
_TIMEOUT_HEADERS = (b"x-stainless-read-timeout", b"x-stainless-timeout")
#: Seconds of the client's timeout that are left for the way of the response.
_MARGIN = 1.0
#: Shorter timeouts are ignored: an error this early helps no client.
_SHORTEST = 2.0
_DEFAULT_RETRY_AFTER = 5.0
_BEFORE_READY = {ModelState.STOPPED, ModelState.STARTING, ModelState.SLEEPING, ModelState.STOPPING}


class QueueTimeout:
    """Wait of one request: `until`, in seconds of `time.monotonic`, at queue `position` once that is known."""

    def __init__(self, model: str, until: float, record: RequestRecord | None = None) -> None:
        """`record` gets the position as well."""
        self.until = until
        self.position: int | None = None
        self._model = model
        self._record = record

    def apply_client_timeout(self, headers: Mapping[bytes, bytes], started_at: float) -> None:
        """End the wait before the client's own timeout, so that the client learns when to retry."""
        for name in _TIMEOUT_HEADERS:
            try:
                seconds = float(headers.get(name, b"")) - _MARGIN
            except ValueError:
                continue
            if seconds >= _SHORTEST:
                self.until = min(self.until, started_at + seconds)
                return

    def on_position(self, position: int) -> None:
        self.position = position
        if self._record is not None:
            self._record.position = position

    def error(self, models: Mapping[str, ModelStatus]) -> ApiError | None:
        """Return the error to respond with; None if the model is not the reason."""
        status = models.get(self._model)
        if status is None or status.state is ModelState.FAILED:
            return None
        if status.state in _BEFORE_READY:
            wait = max(1.0, status.ready_at - time.time()) if status.ready_at is not None else _DEFAULT_RETRY_AFTER
            message = f"The model '{self._model}' is not loaded yet; it continues to load. Try again in {wait:.0f} s."
            return ModelLoading(message, retry_after=wait)
        position = f"; the request is number {self.position} in its queue" if self.position is not None else ""
        message = f"The model '{self._model}' is busy{position}. Try again in a moment."
        error = ServerOverloaded(message, retry_after=_DEFAULT_RETRY_AFTER)
        error.position = self.position
        return error
