"""A tiny OpenAI engine on a unix socket for failure tests: `python fake_engine.py SOCKET`. Standard library only.

The request's text (`messages[-1].content` or `prompt`) decides what it does, as `word` or `word:number`:

    hello            a response in five pieces (also the default)
    chunks:N         N numbered pieces, each one sent when the file SOCKET.go holds at least its number
    flood:N          N pieces of 16 KiB as fast as the connection takes them
    head-only        a stream's head and then nothing
    silent           nothing, ever
    die              closes the connection without a response
    die-mid          closes it after two pieces
    split            each event cut in two across packets
    error-event      two pieces, then llama.cpp's error event
    error-first      an error event and nothing else
    status:N         that status with llama.cpp's error body
    close-after      a good response, after which it closes the connection unannounced
    big:N            a JSON response of N bytes

Every request is one line in SOCKET.log: `PATH CONNECTION BODY`, and `aborted` when a client left before the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

HEAD = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PIECES = ["Hel", "lo", " the", "re", "!"]
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


class Engine:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections = 0
        self.flood_sent = 0

    def log(self, line: str) -> None:
        with Path(f"{self.path}.log").open("a") as file:
            file.write(line + "\n")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await self._one(reader, writer, number):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ")[1]
        length = int(
            next(line for line in head.lower().split("\r\n") if line.startswith("content-length")).split(":")[1]
        )
        body = await reader.readexactly(length)
        self.log(f"{path} {number} {body.decode(errors='replace') if length < 10000 else length}")
        response = Response(self, writer, path, body)
        left = asyncio.create_task(reader.read(1))
        working = asyncio.create_task(response.run())
        await asyncio.wait({left, working}, return_when=asyncio.FIRST_COMPLETED)
        is_left = not working.done() or isinstance(working.exception(), OSError)
        for task in (left, working):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await task
        if is_left:
            self.log("aborted")
            return False
        return working.result()


class Response:
    def __init__(self, engine: Engine, writer: asyncio.StreamWriter, path: str, body: bytes) -> None:
        self.engine = engine
        self.writer = writer
        self.path = path
        self.request: dict[str, Any] = json.loads(body) if body.startswith(b"{") else {}

    async def run(self) -> bool:
        """Serve one request; return False to close the connection."""
        word, _, number = self._text().partition(":")
        if self.path in ("/tokenize", "/apply-template", "/detokenize"):
            return await self._tokenize()
        match word:
            case "silent":
                await asyncio.Event().wait()
            case "die":
                return False
            case "status":
                error = {"code": int(number), "message": f"says {number} at /home/user/models/secret.gguf", "type": "x"}
                return await self._json({"error": error}, int(number))
            case "big":
                return await self._json({"text": "x" * int(number), "usage": USAGE})
            case "close-after":
                await self._json(self._answer())
                return False
            case _ if self.request.get("stream"):
                return await self._stream(word, int(number or 0))
        return await self._json(self._answer())

    def _text(self) -> str:
        if self.request.get("messages"):
            content = self.request["messages"][-1].get("content")
            return content if isinstance(content, str) else "hello"
        prompt = self.request.get("prompt", self.request.get("input"))
        return prompt if isinstance(prompt, str) else "hello"

    async def _tokenize(self) -> bool:
        """Return a token per word; a template adds three. `é` has pieces that are not text."""
        if self.path == "/detokenize":
            return await self._json({"content": " ".join(str(token) for token in self.request["tokens"])})
        if self.path == "/apply-template":
            return await self._json({"prompt": "a b c " + " ".join(m["content"] for m in self.request["messages"])})
        words = str(self.request.get("content", self.request.get("prompt"))).split()
        if self.request.get("with_pieces"):
            pieces = [{"id": n, "piece": [0xC3] if word == "é" else word} for n, word in enumerate(words)]
            return await self._json({"tokens": pieces})
        return await self._json({"tokens": list(range(len(words)))})

    def _answer(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(PIECES)}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": self.request.get("model"),
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": USAGE,
        }

    async def _json(self, content: Any, status: int = 200) -> bool:
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        await self.writer.drain()
        return True

    async def _stream(self, word: str, number: int) -> bool:
        self.writer.write(HEAD.encode())
        await self.writer.drain()
        match word:
            case "head-only":
                await asyncio.Event().wait()
            case "die-mid":
                await self._events(PIECES[:2])
                return False
            case "error-event":
                await self._events(PIECES[:2])
                await self._send(
                    b'data: {"error":{"code":500,"message":"boom at /opt/x/y.cpp","type":"server_error"}}\n\n'
                )
                await self._send(b"data: [DONE]\n\n")
            case "error-first":
                await self._send(b'data: {"error":{"code":400,"message":"Grammar error: no","type":"x"}}\n\n')
            case "chunks":
                await self._gated(number)
            case "flood":
                await self._flood(number)
            case _:
                await self._events(PIECES, split=word == "split")
                await self._end(split=word == "split")
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()
        return True

    async def _events(self, pieces: list[str], *, split: bool = False) -> None:
        for index, piece in enumerate(pieces):
            delta = {"role": "assistant", "content": piece} if index == 0 else {"content": piece}
            await self._send(self._chunk([{"index": 0, "delta": delta, "finish_reason": None}]), split=split)

    async def _end(self, *, split: bool = False) -> None:
        await self._send(self._chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}]), split=split)
        if (self.request.get("stream_options") or {}).get("include_usage"):
            await self._send(self._chunk([], usage=USAGE), split=split)
        await self._send(b"data: [DONE]\n\n", split=split)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "choices": choices, **more}
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"

    async def _gated(self, count: int) -> None:
        gate = Path(f"{self.engine.path}.go")
        for index in range(count):
            while not gate.exists() or int(gate.read_text() or 0) <= index:
                await asyncio.sleep(0.01)
            await self._events([str(index)])
        await self._end()

    async def _flood(self, count: int) -> None:
        for index in range(count):
            await self._events(["x" * 16384])
            Path(f"{self.engine.path}.sent").write_text(str(index + 1))
        await self._end()

    async def _send(self, data: bytes, *, split: bool = False) -> None:
        middle = len(data) // 2 if split else len(data)
        for part in (data[:middle], data[middle:]):
            if part:
                self.writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                await self.writer.drain()
                await asyncio.sleep(0.005 if split else 0)


async def main(path: Path) -> None:
    engine = Engine(path)
    made = path.with_suffix(".made")
    server = await asyncio.start_unix_server(engine.serve, made)
    made.rename(path)  # the socket appears when connections are accepted
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(Path(sys.argv[1])))
