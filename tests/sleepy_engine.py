"""A stand-in for a vLLM server with sleep mode, with the endpoints of its documentation; run as a process.

Usage: sleepy_engine.py SOCKET MEMORY_FILE CALLS_FILE [FAULT]

MEMORY_FILE holds the GiB of GPU memory in use and the pid; CALLS_FILE gets a line per call. FAULT: `keeps_memory`
(sleeps but frees nothing), `refuses_sleep`, `refuses_wake`.
"""

import json
import os
import socketserver
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

AWAKE, ASLEEP = 20.0, 1.0
TAGS = frozenset({"weights", "kv_cache"})
SOCKET, MEMORY, CALLS, *FAULT = sys.argv[1:]


class State:
    """`tags` are the sleeping parts. `has_weights` is False from a sleep of level 2 until the weights are reloaded."""

    tags: frozenset[str] = frozenset()
    has_weights = True

    @classmethod
    def write(cls) -> None:
        is_freed = cls.tags == TAGS and FAULT != ["keeps_memory"]
        temporary = Path(MEMORY).with_suffix(".tmp")
        temporary.write_text(f"{ASLEEP if is_freed else AWAKE} {os.getpid()}")
        temporary.replace(MEMORY)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/is_sleeping":
            self.respond(200, {"is_sleeping": bool(State.tags)})
        else:
            self.respond(200, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with Path(CALLS).open("a") as calls:
            calls.write(f"{self.path}{' ' + json.loads(body)['method'] if body else ''}\n")
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if url.path == "/sleep":
            self.sleep(int(query.get("level", ["1"])[0]))
        elif url.path == "/wake_up":
            self.wake(frozenset(query.get("tags", TAGS)))
        elif url.path == "/collective_rpc":
            State.has_weights = "weights" not in State.tags
            self.respond(200, {"results": [None]})
        else:
            self.respond(404, {})

    def sleep(self, level: int) -> None:
        if FAULT == ["refuses_sleep"]:
            self.respond(500, {"error": {"message": "Sleep mode is not enabled"}})
            return
        if not State.tags:  # vLLM ignores a second one
            State.tags = TAGS
            State.has_weights = level == 1
        State.write()
        self.respond(200, {"status": "sleeping", "level": level})

    def wake(self, tags: frozenset[str]) -> None:
        if FAULT == ["refuses_wake"]:
            self.respond(500, {"error": {"message": "CUDA out of memory"}})
            return
        State.tags -= tags
        State.write()
        self.respond(200, {"status": "sleeping" if State.tags else "awake"})

    def respond(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "manager"

    def log_message(self, *_arguments: object) -> None:
        """Quiet."""


if __name__ == "__main__":
    State.write()
    with socketserver.ThreadingUnixStreamServer(f"{SOCKET}.made", Handler) as server:
        Path(f"{SOCKET}.made").rename(SOCKET)  # the socket appears when connections are accepted
        server.daemon_threads = True
        server.serve_forever()
