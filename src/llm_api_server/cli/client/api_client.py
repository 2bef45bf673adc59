"""Blocking client of the HTTP API for `chat` and `bench`; it finds the server, key and model, and streams responses."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from llm_api_server.auth.keys import key_of
from llm_api_server.cli import base
from llm_api_server.config.models import AuthConfig, Config
from llm_api_server.errors import ServerError, Unreachable
from llm_api_server.http_client import blocking
from llm_api_server.lifecycle.config_handover import running_config
from llm_api_server.lifecycle.server_lock import ServerLock, local_url
from llm_api_server.types import ExitCode, Task

ContentT = TypeVar("ContentT")

#: Seconds between two reads. The server sends comments while a stream waits.
_READ_TIMEOUT = 600.0
_READ_SIZE = 65536
_UNAUTHORIZED = 401


class ApiFailure(ServerError):
    """The server responded with an error or an incomplete response; the message is the server's, if it sent one."""


class TokenUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ContentDelta(msgspec.Struct, frozen=True):
    """Part of a streamed response: text, reasoning, the final usage, or a comment sent while the request waits."""

    text: str = ""
    reasoning: str = ""
    usage: TokenUsage | None = None
    comment: str = ""


class _ChatDelta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _ChatChoice(msgspec.Struct):
    delta: _ChatDelta = msgspec.field(default_factory=_ChatDelta)


class _Error(msgspec.Struct):
    message: str


class _ChatEvent(msgspec.Struct):
    choices: list[_ChatChoice] = []
    usage: TokenUsage | None = None
    error: _Error | None = None


class _Model(msgspec.Struct):
    id: str
    tasks: list[Task] | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _ErrorBody(msgspec.Struct):
    error: _Error


class ApiClient:
    """Client of the server at `url`, given with or without `/v1`. Safe to share between threads."""

    def __init__(self, url: str, key: str | None) -> None:
        """Raises `ValueError` with a sentence if the URL or the key is invalid."""
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0:
            raise ValueError(f"--url: {url!r} is not a URL: give one such as http://localhost:8050.")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("--key: a key consists of printable ASCII characters.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"

    def first_model(self) -> str:
        """Return the first model that generates text. Raises `ApiFailure`, `Unreachable`."""
        for model in self._get("/v1/models", _Models).data:
            if model.tasks is None or "generate" in model.tasks:
                return model.id
        raise ApiFailure("There is no model that this key may chat with: add one to models.available.")

    def require_model(self, name: str) -> None:
        """Raises `ApiFailure` with the server's message if this key cannot use such a model."""
        self._get(f"/v1/models/{quote(name)}", _Model)

    def stream(self, body: dict[str, Any]) -> Generator[ContentDelta]:
        """Yield the streamed response to a chat request. Raises `ApiFailure`, `Unreachable`.

        Closing the generator early closes the connection, and so aborts the request.
        """
        request = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._request("POST", "/v1/chat/completions", msgspec.json.encode(request)) as response:
            rest = b""
            while data := response.read1(_READ_SIZE):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.rstrip() == b"data: [DONE]":
                        return
                    if (delta := _parse_line(line)) is not None:
                        yield delta
        raise ApiFailure("The response is incomplete; `llm-api-server logs` may show why.")

    def _get(self, path: str, content: type[ContentT]) -> ContentT:
        with self._request("GET", path) as response:
            try:
                return msgspec.json.decode(response.read(), type=content)
            except msgspec.DecodeError as error:
                raise ApiFailure(f"{self.url} is not an OpenAI-compatible server: {error}") from error

    @contextmanager
    def _request(self, method: str, path: str, body: bytes | None = None) -> Iterator[HTTPResponse]:
        try:
            with blocking.request(
                method, self.url + path, timeout=_READ_TIMEOUT, body=body, headers=self._headers
            ) as response:
                if response.status != blocking.OK:
                    raise ApiFailure(self._error_message(response))
                yield response
        except blocking.ConnectFailed as error:
            raise Unreachable(f"No server responds at {self.url} ({error}). Check the address.") from error
        except blocking.FAILURES as error:
            raise ApiFailure(f"The connection to {self.url} failed: {str(error) or type(error).__name__}") from error

    def _error_message(self, response: HTTPResponse) -> str:
        data = response.read()
        try:
            message = msgspec.json.decode(data, type=_ErrorBody).error.message
        except msgspec.DecodeError:
            message = f"{self.url} responded with {response.status} {response.reason}."
        if response.status == _UNAUTHORIZED:
            return f"{message} (--key, or the environment variable {base.KEY_VARIABLE})"
        return message


def _parse_line(line: bytes) -> ContentDelta | None:
    """Return the content of a line of the event stream, or None. Raises `ApiFailure` for an error event."""
    if line.startswith(b":"):
        return ContentDelta(comment=line[1:].strip().decode("utf-8", "replace"))
    if not line.startswith(b"data:"):
        return None
    try:
        event = msgspec.json.decode(line[5:], type=_ChatEvent)
    except msgspec.DecodeError as error:
        raise ApiFailure(f"The response cannot be parsed: {error}") from error
    if event.error is not None:
        raise ApiFailure(event.error.message)
    delta = event.choices[0].delta if event.choices else _ChatDelta()
    return ContentDelta(delta.content or "", delta.reasoning_content or delta.reasoning or "", event.usage)


def connect(path: Path | None, url: str | None, key: str | None, model: str | None) -> tuple[ApiClient, str]:
    """Return a client of the server at `url`, or of the running one, and the model: `model`, or the default.

    Ends the command if there is no such server, key or model.
    """
    default = None
    if url is None:
        config = _running(path)
        default = config.models.default
        url = local_url(config.server.host, config.server.port)
        key = key or _usable_key(config.auth, config.source, model or default)
    try:
        client = ApiClient(url, key)
    except ValueError as error:
        base.fail(str(error), ExitCode.WRONG)
    with base.errors():
        if model is not None:
            client.require_model(model)
        return client, model or default or client.first_model()


def _running(path: Path | None) -> Config:
    """Return the configuration that the running server uses, or end the command."""
    loaded = base.load_running(path)
    config = running_config(loaded.run_dir)
    if config is None and ServerLock(loaded.run_dir).holder() is None:
        base.not_running(loaded.source)
    config = config or loaded
    if not config.server.port:
        base.fail("The server chose its own port (server.port: 0): give its address with --url.", ExitCode.FAILED)
    return config


def _usable_key(auth: AuthConfig, source: Path, model: str | None) -> str | None:
    """Return the first configured key that may chat with `model`; None if authentication is off."""
    if not auth.enabled:
        return None
    for entry in auth.api_keys:
        key = key_of(entry)
        is_valid = key.enabled and (key.expires_at is None or key.expires_at > time.time())
        if is_valid and not entry.is_hashed and key.may("chat") and (model is None or key.may_use(model)):
            return entry.key
    return base.fail(
        f"No key in {source} is usable: each is hashed, has expired, or may not chat. Give one with --key or "
        f"{base.KEY_VARIABLE}.",
        ExitCode.WRONG,
    )
