"""A server of the OpenAI API in a thread, with the responses of the test, for commands that are its clients."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

#: Maps the body of a chat request to the lines of the stream, or to a status and the message of an error.
Answer = Callable[[dict[str, Any]], list[str] | tuple[int, str]]


def words(*texts: str, completion_tokens: int | None = None) -> list[str]:
    """Return the lines of a whole stream with these pieces of text."""
    usage = {"prompt_tokens": 7, "completion_tokens": completion_tokens or len(texts)}
    events = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    return [*(event(one) for one in events), event({"choices": [], "usage": usage}), "data: [DONE]"]


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}"


class TinyApi:
    """A context manager. `requests` are the bodies of chats, `keys` their authorization headers."""

    def __init__(self, answer: Answer, models: list[dict[str, Any]]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.answer = answer
        self.models = models
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(api: TinyApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/v1/models").strip("/")
            found = [model for model in api.models if name in {"", model["id"]}]
            if name and not found:
                self._say(404, json.dumps({"error": {"message": f"There is no {name}."}}))
            else:
                self._say(200, json.dumps(found[0] if name else {"data": found}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            api.requests.append(body)
            api.keys.append(self.headers["authorization"])
            answer = api.answer(body)
            if isinstance(answer, tuple):
                self._say(answer[0], json.dumps({"error": {"message": answer[1]}}))
            else:
                self._say(200, "".join(f"{line}\n\n" for line in answer))

        def _say(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    return Handler
