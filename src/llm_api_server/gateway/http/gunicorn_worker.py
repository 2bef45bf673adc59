"""gunicorn's worker class: uvicorn as `serve` runs it. `gunicorn.conf.py` names it."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from uvicorn_worker import UvicornWorker

from llm_api_server.event_loop.accept_loop import WORKERS
from llm_api_server.gateway.http.fast_path import HttpProtocol


class GunicornWorker(UvicornWorker):  # type: ignore[misc] # comes without types
    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {
        "loop": "llm_api_server.event_loop.accept_loop:Loop",
        "http": HttpProtocol,
    }

    def init_process(self) -> None:
        os.environ[WORKERS] = str(self.cfg.workers)
        super().init_process()
