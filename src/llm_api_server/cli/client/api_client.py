"""A client of the HTTP API, for `chat` and `bench`: finds the server, key and model, and streams answers. Blocking."""

from __future__ import annotations

import http.client
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from llm_api_server.auth.keys import key_of
from llm_api_server.cli import base
from llm_api_server.config.models import Config
from llm_api_server.errors import ServerError, Unreachable
from llm_api_server.lifecycle.config_handover import running_config
from llm_api_server.lifecycle.server_lock import ServerLock, local_url
from llm_api_server.types import ExitCode, Task

AnswerT = TypeVar("AnswerT")

#: Between two reads. The server sends comments while a stream waits.
_READ_TIMEOUT = 600.0
_READ_SIZE = 65536
_UNAUTHORIZED = 401


class ApiFailure(ServerError):
    """The server answered with an error, or not to the end; the message is its own where it has one."""


class TokenUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ContentDelta(msgspec.Struct, frozen=True):
    """A piece of a streamed answer: text, text of its reasoning, the usage at its end, or a comment while it waits."""

    text: str = ""
    reasoning: str = ""
    usage: TokenUsage | None = None
    comment: str = ""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: TokenUsage | None = None
    error: _Error | None = None


class _Model(msgspec.Struct):
    id: str
    tasks: list[Task] | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Refusal(msgspec.Struct):
    error: _Error


class ApiClient:
    """Of the server at `url`, with or without `/v1`. Threads may share it: each request has its own connection."""

    def __init__(self, url: str, key: str | None) -> None:
        """Raises `ValueError` with a sentence when one of them cannot be used."""
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"--url: {url!r} is no URL: give one such as http://localhost:8050.")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("--key: a key has no characters but those of ASCII.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._is_secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port
        self._prefix = urlsplit(self.url).path
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"

    def first_model(self) -> str:
        """The first that generates text. Raises `ApiFailure`, `Unreachable`."""
        for model in self._get("/v1/models", _Models).data:
            if model.tasks is None or "generate" in model.tasks:
                return model.id
        raise ApiFailure("There is no model that this key may chat with: add one to models.available.")

    def require_model(self, name: str) -> None:
        """Raises `ApiFailure` with the server's own words when there is none of that name for this key."""
        self._get(f"/v1/models/{quote(name)}", _Model)

    def stream(self, body: dict[str, Any]) -> Generator[ContentDelta]:
        """The answer to a chat request as it comes. Raises `ApiFailure`, `Unreachable`.

        Closed early, it gives up the connection, and the server stops.
        """
        request = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._answer("POST", "/v1/chat/completions", msgspec.json.encode(request)) as response:
            rest = b""
            while data := response.read1(_READ_SIZE):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.rstrip() == b"data: [DONE]":
                        return
                    if (part := _part(line)) is not None:
                        yield part
        raise ApiFailure("The answer broke off; `llm-api-server logs` may say why.")

    def _get(self, path: str, answer: type[AnswerT]) -> AnswerT:
        with self._answer("GET", path) as response:
            try:
                return msgspec.json.decode(response.read(), type=answer)
            except msgspec.DecodeError as error:
                raise ApiFailure(f"{self.url} does not answer like an OpenAI-compatible server: {error}") from error

    @contextmanager
    def _answer(self, method: str, path: str, body: bytes | None = None) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_READ_TIMEOUT)
        try:
            self._connect(connection)
            connection.request(method, self._prefix + path, body, self._headers)
            with connection.getresponse() as response:
                if response.status != http.client.OK:
                    raise ApiFailure(self._refusal(response))
                yield response
        except (OSError, http.client.HTTPException) as error:
            raise ApiFailure(f"The connection to {self.url} broke: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
        except OSError as error:
            reason = error.strerror or error
            raise Unreachable(f"Nothing answers at {self.url} ({reason}). Is that the address of a server?") from error

    def _refusal(self, response: http.client.HTTPResponse) -> str:
        data = response.read()
        try:
            message = msgspec.json.decode(data, type=_Refusal).error.message
        except msgspec.DecodeError:
            message = f"{self.url} answers with {response.status} {response.reason}."
        if response.status == _UNAUTHORIZED:
            return f"{message} (--key, or the environment's {base.KEY_VARIABLE})"
        return message


def _part(line: bytes) -> ContentDelta | None:
    """None for a line that carries nothing of these."""
    if line.startswith(b":"):
        return ContentDelta(comment=line[1:].strip().decode("utf-8", "replace"))
    if not line.startswith(b"data:"):
        return None
    try:
        event = msgspec.json.decode(line[5:], type=_Event)
    except msgspec.DecodeError as error:
        raise ApiFailure(f"The answer cannot be read: {error}") from error
    if event.error is not None:
        raise ApiFailure(event.error.message)
    delta = event.choices[0].delta if event.choices else _Delta()
    return ContentDelta(delta.content or "", delta.reasoning_content or delta.reasoning or "", event.usage)


def reach(path: Path | None, url: str | None, key: str | None, model: str | None) -> tuple[ApiClient, str]:
    """The server that is named, else the running one of the configuration; and the model: that given, else its default.

    Ends the command where there is none of these.
    """
    if url is not None:
        default = None
    else:
        config = _running(path)
        default = config.models.default
        url = local_url(config.server.host, config.server.port)
        key = key or _usable_key(config, model or default)
    try:
        client = ApiClient(url, key)
    except ValueError as error:
        base.fail(str(error), ExitCode.WRONG)
    with base.errors():
        if model is not None:
            client.require_model(model)
        return client, model or default or client.first_model()


def _running(path: Path | None) -> Config:
    loaded = base.load_running(path)
    config = running_config(loaded.run_dir)
    if config is None and ServerLock(loaded.run_dir).holder() is None:
        base.not_running(loaded)
    config = config or loaded
    if not config.server.port:
        base.fail("The server chose its port itself (server.port: 0): give its address with --url.", ExitCode.FAILED)
    return config


def _usable_key(config: Config, model: str | None) -> str | None:
    """The first of the file that may chat (with `model`); None where no key is needed."""
    if not config.auth.enabled:
        return None
    for entry in config.auth.api_keys:
        key = key_of(entry)
        is_valid = key.enabled and (key.expires_at is None or key.expires_at > time.time())
        if is_valid and not entry.is_hashed and key.may("chat") and (model is None or key.may_use(model)):
            return entry.key
    return base.fail(
        f"No key in {config.source} can be used: those there are hashed, have ended, or may not chat. Give one with "
        f"--key or {base.KEY_VARIABLE}.",
        ExitCode.WRONG,
    )
