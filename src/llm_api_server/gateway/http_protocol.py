"""uvicorn's HTTP protocol with a limit on the head of a request. Used by `serving.py` and `gunicorn_worker.py`.

uvicorn's httptools protocol has none: before any key is checked, one connection could fill the memory with a header.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Request line and headers together. Checked per read, so that some more may arrive.
MAX_HEAD_BYTES = 256 * 1024


class HttpProtocol(HttpToolsProtocol):
    """Answers 400 and closes when a head does not end within `MAX_HEAD_BYTES`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_head = True
        self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers of your request are too long.")

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_head = True
        self._head_bytes = 0
        super().on_message_complete()
