"""gunicorn's worker class: uvicorn as `serve` runs it. Named in `gunicorn.conf.py`."""

from __future__ import annotations

from typing import Any, ClassVar

from uvicorn_worker import UvicornWorker

from llm_api_server.gateway.http_protocol import HttpProtocol
from llm_api_server.gateway.listeners import repeated


class GunicornWorker(UvicornWorker):  # type: ignore[misc] # comes without types
    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {"loop": "uvloop", "http": HttpProtocol}
    sockets: list[Any]

    def init_process(self) -> None:
        self.sockets = [again for listener in self.sockets for again in repeated(listener)]
        super().init_process()
