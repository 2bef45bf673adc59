"""Lines that a user sees when the server is ready: its address, and on this machine a key and a request to try."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable
from pathlib import Path

from llm_api_server import __version__
from llm_api_server.auth.keys import key_of
from llm_api_server.config.checks import is_loopback
from llm_api_server.config.document import read_document
from llm_api_server.config.models import ApiKeyConfig, AuthConfig, Config, ModelsConfig
from llm_api_server.http_client import blocking
from llm_api_server.lifecycle.server_lock import local_url

_START_TIMEOUT = 120.0


class Banner(threading.Thread):
    """Thread that calls `show` once when the server at `url` responds, or ends silently if the server never does."""

    def __init__(self, url: str, show: Callable[[], None]) -> None:
        super().__init__(name="banner", daemon=True)
        self._url = url
        self._show = show

    def run(self) -> None:
        try:
            with blocking.request("GET", f"{self._url}/livez", timeout=_START_TIMEOUT) as response:
                response.read()
        except blocking.FAILURES:
            return  # the server ended before it was ready; its log has the reason
        self._show()


def banner(config: Config, port: int) -> str:
    """Return the address and, if only this machine can connect, a key of the file and a request to try."""
    url = local_url(config.server.host, port)
    workers = "" if config.server.workers == 1 else f", {config.server.workers} workers"
    lines = [f"LLM API Server {__version__} is ready: {url}/v1 (documentation: {url}/docs{workers})"]
    if not is_loopback(config.server.host):
        return "\n".join(lines)
    entry = _key_to_show(config.auth, config.source)
    if entry is not None:
        lines.append(f"Key: {entry.key}")
    model = _model_to_try(config.models, entry) if entry or not config.auth.enabled else None
    if model is not None:
        body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 50}
        key = ["-H", f"Authorization: Bearer {entry.key}"] if entry else []
        command = ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", *key]
        lines += ["Try it:", f"  {shlex.join([*command, '-d', json.dumps(body)])}"]
    return "\n".join(lines)


def _key_to_show(auth: AuthConfig, source: Path) -> ApiKeyConfig | None:
    """Return the first key that the file itself contains; keys from the environment are never printed."""
    if not auth.enabled:
        return None
    expanded = read_document(source).expanded
    for index, entry in enumerate(auth.api_keys):
        if not entry.is_hashed and ("auth", "api_keys", index, "key") not in expanded:
            return entry
    return None


def _model_to_try(models: ModelsConfig, entry: ApiKeyConfig | None) -> str | None:
    """Return a model that `entry` may chat with."""
    name = models.default or next(iter(models.available), None)
    if name is None or (name in models.available and models.available[name].task == "embed"):
        return None
    key = key_of(entry) if entry else None
    return name if key is None or (key.may("chat") and key.may_use(name)) else None
