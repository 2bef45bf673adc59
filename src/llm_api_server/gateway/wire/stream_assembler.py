"""Assembly of one JSON body from an event stream, for requests without `stream`. Pure.

llama.cpp notices a closed stream at its next token, but a closed plain request only after a second without other
activity. So it always streams.
"""

from __future__ import annotations

from typing import Any

import msgspec

from llm_api_server.errors import BadEngineResponse
from llm_api_server.gateway.wire.endpoints import Dialect
from llm_api_server.gateway.wire.stream_reader import events, index_of

#: Calls that a stream may leave out before one, so that an index cannot take all memory.
_MAX_CALL_GAP = 128
_OBJECTS = {"chat.completion.chunk": "chat.completion", "text_completion": "text_completion"}


class StreamAssembler:
    """Collects whole events, as `StreamReader` returns them."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._content: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._arguments: dict[int, str] = {}
        self._is_complete = False

    def feed(self, data: bytes) -> None:
        for payload in events(data):
            if payload == b"[DONE]":
                self._is_complete = True
                continue
            try:
                event = msgspec.json.decode(payload, type=dict[str, Any])
            except msgspec.DecodeError:
                continue
            try:
                self._add(event)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise BadEngineResponse("The engine sent an event that could not be understood.") from error

    def _add(self, event: dict[str, Any]) -> None:
        match self._dialect:
            case "openai":
                self._add_chunk(event)
            case "responses":
                self._add_response_event(event)
            case "anthropic":
                self._add_message_event(event)

    def body(self) -> bytes:
        """Return the JSON body after the end of the stream. Raises `EngineError` if the stream ended early."""
        if not self._is_complete:
            raise BadEngineResponse("The engine stopped before the end of its response.")
        if self._dialect == "openai":
            self._content["choices"] = [_finished_choice(self._choices[index]) for index in sorted(self._choices)]
        if self._dialect == "anthropic":
            self._content["content"] = [self._finished_block(index) for index in sorted(self._blocks)]
        return msgspec.json.encode(self._content)

    def _add_chunk(self, chunk: dict[str, Any]) -> None:
        for key, value in chunk.items():
            if key != "choices":
                self._content[key] = _OBJECTS.get(value, value) if key == "object" else value
        for part in chunk.get("choices") or []:
            index = index_of(part.get("index"))
            choice = self._choices.setdefault(index, {"index": index, "finish_reason": None, "logprobs": None})
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            self._is_complete = self._is_complete or bool(choice["finish_reason"])
            _add_logprobs(choice, part.get("logprobs"))
            if "text" in part:
                choice["text"] = choice.get("text", "") + part["text"]
            else:
                _add_delta(
                    choice.setdefault("message", {"role": "assistant", "content": None}), part.get("delta") or {}
                )

    def _add_response_event(self, event: dict[str, Any]) -> None:
        """Keep the last event of OpenAI Responses, which has the whole response."""
        if event.get("type") in ("response.completed", "response.incomplete", "response.failed"):
            self._content = event["response"]
            self._is_complete = True

    def _add_message_event(self, event: dict[str, Any]) -> None:
        match event.get("type"):
            case "message_start":
                self._content = event["message"]
            case "content_block_start":
                self._blocks[event["index"]] = dict(event["content_block"])
            case "content_block_delta":
                self._add_block_delta(event["index"], event["delta"])
            case "message_delta":
                self._content |= event["delta"]
                self._content["usage"] = {**self._content.get("usage", {}), **event.get("usage", {})}
            case "message_stop":
                self._is_complete = True

    def _add_block_delta(self, index: int, delta: dict[str, Any]) -> None:
        if delta.get("type") == "input_json_delta":
            self._arguments[index] = self._arguments.get(index, "") + delta["partial_json"]
            return
        _add_texts(self._blocks[index], {key: value for key, value in delta.items() if key != "type"})

    def _finished_block(self, index: int) -> dict[str, Any]:
        block = self._blocks[index]
        if index in self._arguments:
            try:
                block["input"] = msgspec.json.decode(self._arguments[index] or "{}")
            except msgspec.DecodeError:  # truncated by max_tokens
                block["input"] = {}
        return block


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    _add_texts(message, {key: value for key, value in delta.items() if key not in ("role", "tool_calls")})
    for part in delta.get("tool_calls") or []:
        calls = message.setdefault("tool_calls", [])
        index = index_of(part.get("index"))
        if index > len(calls) + _MAX_CALL_GAP:
            raise ValueError(index)
        while len(calls) <= index:
            calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = calls[index]
        call["id"] = part.get("id") or call["id"]
        _add_texts(call["function"], part.get("function") or {})


def _add_texts(target: dict[str, Any], parts: dict[str, Any]) -> None:
    for key, value in parts.items():
        if isinstance(value, str):
            target[key] = (target.get(key) or "") + value
        elif value is not None:
            target[key] = value


def _add_logprobs(choice: dict[str, Any], part: dict[str, Any] | None) -> None:
    if part is None:
        return
    whole = choice["logprobs"] = choice["logprobs"] or {}
    for key, value in part.items():
        whole[key] = [*(whole.get(key) or []), *value] if isinstance(value, list) else value


def _finished_choice(choice: dict[str, Any]) -> dict[str, Any]:
    """Give a message without text and tool calls an empty text."""
    message = choice.get("message")
    if message is not None and message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return choice
