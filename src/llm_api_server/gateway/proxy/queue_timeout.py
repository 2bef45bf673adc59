"""How long a request waits for its turn on a model, and what it is told when that was too long."""

from __future__ import annotations

import time
from collections.abc import Mapping

from llm_api_server.errors import ApiError, ModelLoading, ServerOverloaded
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.ipc.model_status import ModelStatus
from llm_api_server.types import ModelState

#: In which the SDKs of OpenAI and Anthropic say how many seconds their clients wait for an answer.
_HINTS = (b"x-stainless-read-timeout", b"x-stainless-timeout")
#: Of these a client keeps some for the way of the answer.
_MARGIN = 1.0
#: An answer that comes this early helps nobody.
_SHORTEST = 2.0
_USUAL_WAIT = 5.0
_BEFORE_READY = {ModelState.STOPPED, ModelState.STARTING, ModelState.SLEEPING, ModelState.STOPPING}


class QueueTimeout:
    """One request's. `until` is in seconds of the clock of deadlines, `position` where it stands, once that is told."""

    def __init__(self, model: str, until: float, record: RequestRecord | None = None) -> None:
        """`record` is told the position as well."""
        self.until = until
        self.position: int | None = None
        self._model = model
        self._record = record

    def heed(self, headers: Mapping[bytes, bytes], started_at: float) -> None:
        """A client that gives up by itself is told before, when to come again."""
        for name in _HINTS:
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

    def too_long(self, models: Mapping[str, ModelStatus]) -> ApiError | None:
        """What to tell the client; None where the model is not the reason."""
        status = models.get(self._model)
        if status is None or status.state is ModelState.FAILED:
            return None
        if status.state in _BEFORE_READY:
            wait = max(1.0, status.ready_at - time.time()) if status.ready_at is not None else _USUAL_WAIT
            message = f"The model '{self._model}' is not loaded yet; its load goes on. Try again in {wait:.0f} s."
            return ModelLoading(message, retry_after=wait)
        place = f"; the request is number {self.position} in its queue" if self.position is not None else ""
        message = f"The model '{self._model}' is busy{place}. Try again in a moment."
        error = ServerOverloaded(message, retry_after=_USUAL_WAIT)
        error.position = self.position
        return error
