"""Forced tool choice as a JSON schema for the engine, and the JSON as tool calls for the client. Pure.

Engines enforce a JSON schema but not a forced choice: llama.cpp generates plain text if the template knows no tools,
vLLM generates arguments that do not match. So the schema demands `{"name": …, "arguments": …}`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Any

import msgspec

from llm_api_server.errors import EngineError, InvalidRequest
from llm_api_server.gateway.wire import schemas
from llm_api_server.gateway.wire.request import RequestFacts
from llm_api_server.gateway.wire.stream_reader import StreamReader, error_event, events

_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
#: Members that give a schema its type; parameters without any of them are an object.
_SHAPES = frozenset({"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"})
_INSTRUCTIONS = "You answer by calling a function. The functions, with their parameters as JSON Schema:"
_ONE_CALL = 'Answer with JSON only: {"name": the function\'s name, "arguments": an object with its parameters}'
_SEVERAL_CALLS = f"{_ONE_CALL}, as a list of one or more such calls"


def is_forced(facts: RequestFacts) -> bool:
    """Return whether the request demands a call: `required`, or a function by its name."""
    request = facts.request
    return isinstance(request, schemas.ChatRequest) and request.tool_choice is not None and bool(_choices(request))


def may_call_several(request: schemas.ChatRequest) -> bool:
    """Return whether the model may call several functions.

    Only on express wish: one call is always valid, and small models do not end a list.
    """
    return request.tool_choice == "required" and request.parallel_tool_calls is True


def changes(facts: RequestFacts, body: bytes, *, knows_tools: bool) -> dict[str, Any]:
    """Return the members of `body` to replace so that the engine must generate a call. Raises `InvalidRequest`.

    A template that knows tools shows them to the model; without one, a system message describes them. The client's
    `response_format` is replaced: a forced choice generates no text for it.
    """
    request = facts.request
    assert isinstance(request, schemas.ChatRequest)
    try:
        return _changes(request, body, knows_tools=knows_tools)
    except (RecursionError, OverflowError) as error:
        raise InvalidRequest(
            "The tools are nested too deeply, or have numbers that are too large.", param="tools"
        ) from error


def _changes(request: schemas.ChatRequest, body: bytes, *, knows_tools: bool) -> dict[str, Any]:
    functions = _functions(request, body)
    several = may_call_several(request)
    schema = {"name": "tool_call", "schema": call_schema(functions, several=several)}
    changed: dict[str, Any] = {
        "response_format": {"type": "json_schema", "json_schema": schema},
        "parallel_tool_calls": msgspec.UNSET,
    }
    if knows_tools:
        return changed | {"tool_choice": "none"}
    messages = msgspec.json.decode(body, type=_Body).messages
    text = describe(functions, several=several)
    return changed | {
        "messages": _with_system_text(messages, text),
        "tools": msgspec.UNSET,
        "tool_choice": msgspec.UNSET,
    }


def call_schema(functions: list[dict[str, Any]], *, several: bool) -> dict[str, Any]:
    """Return the schema of the model's output. `functions` are the `function` members of the allowed tools."""
    definitions: dict[str, Any] = {}
    calls = [_one_call(index, function, definitions) for index, function in enumerate(functions)]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if several:
        schema = {"type": "array", "items": schema, "minItems": 1}
    return {**schema, "$defs": definitions} if definitions else schema


def describe(functions: list[dict[str, Any]], *, several: bool) -> str:
    """Return the functions as text, for a model whose template does not show them."""
    lines = [msgspec.json.encode(function).decode() for function in functions]
    return "\n".join([_INSTRUCTIONS, *lines, _SEVERAL_CALLS if several else _ONE_CALL])


class _Body(msgspec.Struct):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = []


def _choices(request: schemas.ChatRequest) -> list[str]:
    """Return the names of the functions of which one must be called; none if the choice is free or of another kind."""
    if request.tool_choice == "required":
        tools = request.tools or []
        names = [tool.function.name for tool in tools if tool.type == "function" and tool.function is not None]
        return names if len(names) == len(tools) else []
    if isinstance(request.tool_choice, schemas.ToolChoice) and request.tool_choice.function is not None:
        return [request.tool_choice.function.name]
    return []


def _functions(request: schemas.ChatRequest, body: bytes) -> list[dict[str, Any]]:
    names = set(_choices(request))
    functions = [tool["function"] for tool in msgspec.json.decode(body, type=_Body).tools if tool.get("function")]
    return [function for function in functions if function["name"] in names]


def _one_call(index: int, function: Mapping[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of one call. The name comes first: client streams need it before the arguments."""
    parameters = dict(function.get("parameters") or _NO_PARAMETERS)
    if not parameters.keys() & _SHAPES:
        parameters = {"type": "object", **parameters}
    if b'"$ref"' in msgspec.json.encode(parameters):
        # References start at the root of the document, so the parameters move to a definition.
        name = f"parameters_{index}"
        definitions[name] = _moved(parameters, f"#/$defs/{name}")
        parameters = {"$ref": f"#/$defs/{name}"}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, root: str) -> Any:
    """Return `schema` with its local references under `root`."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = root + target[1:]
    return moved


def _with_system_text(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Add `text` to the system message: templates accept only one, the first."""
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    content = first["content"]
    added = f"{content}\n\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [{**first, "content": added}, *messages[1:]]


class _At(Enum):
    """Position of `CallReader` in the model's output."""

    START = auto()
    HEAD = auto()
    ARGUMENTS = auto()
    AFTER_ARGUMENTS = auto()
    BETWEEN = auto()
    END = auto()


_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\S)', re.DOTALL)
#: Small models may repeat white space for ever where the schema allows it.
_MAX_HEAD_CHARS = 64 * 1024
_OPEN, _CLOSE = "{[", "}]"


class CallReader:
    """Incremental reader of `{"name": …, "arguments": …}`, or of a list of these, from text cut anywhere."""

    def __init__(self) -> None:
        self._at = _At.START
        self._is_list = False
        self._text = ""
        self._index = -1
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    @property
    def is_complete(self) -> bool:
        return self._at is _At.END

    def feed(self, text: str) -> list[tuple[int, str | None, str]]:
        """Return parts of calls: index, the name at the start of a call, and more of its arguments.

        Raises `EngineError` if the text is not a call.
        """
        self._text += text
        parts: list[tuple[int, str | None, str]] = []
        while self._text:
            before = (self._at, len(self._text))
            part = self._step()
            if part is not None:
                parts.append(part)
            if before == (self._at, len(self._text)):
                break
        return parts

    def _step(self) -> tuple[int, str | None, str] | None:
        if self._at is _At.ARGUMENTS:
            return self._read_arguments()
        self._text = self._text.lstrip()
        if not self._text:
            return None
        match self._at:
            case _At.START:
                self._read_start()
            case _At.HEAD:
                return self._read_head()
            case _At.AFTER_ARGUMENTS:
                self._skip("}")
                self._at = _At.BETWEEN if self._is_list else _At.END
            case _At.BETWEEN:
                self._at = _At.END if self._skip(",]") == "]" else _At.HEAD
            case _:
                raise _invalid_call()
        return None

    def _read_start(self) -> None:
        if self._text[0] == "[":
            self._is_list = True
            self._text = self._text[1:]
        self._at = _At.HEAD

    def _read_head(self) -> tuple[int, str | None, str] | None:
        head = _HEAD.match(self._text)
        if head is None:
            if self._text[0] != "{" or len(self._text) > _MAX_HEAD_CHARS:
                raise _invalid_call()
            return None
        self._text = self._text[head.end() :]
        self._at = _At.ARGUMENTS
        self._index += 1
        self._depth = 0
        return self._index, msgspec.json.decode(head[1], type=str), ""

    def _read_arguments(self) -> tuple[int, str | None, str] | None:
        """Return more of the arguments as the model wrote them, up to the closing brace."""
        for position, char in enumerate(self._text):
            if self._is_in_string:
                self._read_in_string(char)
            elif char == '"':
                self._is_in_string = True
            elif char in _OPEN:
                self._depth += 1
            elif char in _CLOSE:
                self._depth -= 1
            if self._depth == 0 and not self._is_in_string:
                if char not in _CLOSE:  # arguments are an object
                    raise _invalid_call()
                self._at = _At.AFTER_ARGUMENTS
                return self._take(position + 1)
        return self._take(len(self._text))

    def _read_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._is_in_string = False

    def _take(self, length: int) -> tuple[int, None, str]:
        taken, self._text = self._text[:length], self._text[length:]
        return self._index, None, taken

    def _skip(self, expected: str) -> str:
        char, self._text = self._text[0], self._text[1:]
        if char not in expected:
            raise _invalid_call()
        return char


class ForcedCallStream(StreamReader):
    """Stream reader that turns the generated text into tool calls."""

    def __init__(self, *, show_usage: bool, choices: int) -> None:
        super().__init__("openai", show_usage=show_usage, is_chat=True, choices=choices)
        self._readers: dict[int, CallReader] = {}

    def passes(self, chunks: bytes) -> bool:  # noqa: ARG002 - every event changes
        return False

    def feed(self, data: bytes) -> bytes:
        return self._translated(super().feed(data))

    def flush(self) -> bytes:
        return self._translated(super().flush())

    def _translated(self, data: bytes) -> bytes:
        try:
            return b"".join(self._chunks(data))
        except EngineError as error:
            self.failed = error
            return error_event("openai", error)

    def _chunks(self, data: bytes) -> Iterator[bytes]:
        for payload in events(data):
            if b'"choices"' not in payload:
                yield b"data: " + payload + b"\n\n"
                continue
            chunk = msgspec.json.decode(payload, type=dict[str, Any])
            choices = chunk.get("choices") or []
            for choice in choices:
                self._translate(choice, str(chunk.get("id")))
            if not choices or any(map(_has_content, choices)):
                yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _translate(self, choice: dict[str, Any], response_id: str) -> None:
        index = choice.get("index", 0)
        reader = self._readers.setdefault(index, CallReader())
        delta = choice["delta"] = choice.get("delta") or {}
        text = delta.pop("content", None)
        if "role" in delta:
            delta["content"] = None
        calls = _deltas(reader.feed(text), f"{response_id}/{index}") if text else []
        if calls:
            delta["tool_calls"] = calls
        if choice.get("finish_reason") == "stop" and reader.is_complete:
            choice["finish_reason"] = "tool_calls"


def _has_content(choice: dict[str, Any]) -> bool:
    return bool(choice["delta"] or choice.get("finish_reason") or choice.get("logprobs"))


def _deltas(parts: list[tuple[int, str | None, str]], choice_id: str) -> list[dict[str, Any]]:
    """Return one delta per call: clients mistake two entries with one index in a chunk for two calls."""
    deltas: dict[int, dict[str, Any]] = {}
    for index, name, arguments in parts:
        delta = deltas.setdefault(index, {"index": index, "function": {"arguments": ""}})
        delta["function"]["arguments"] += arguments
        if name is not None:
            digest = hashlib.blake2s(f"{choice_id}/{index}".encode(), digest_size=12).hexdigest()
            delta |= {"id": f"call_{digest}", "type": "function"}
            delta["function"]["name"] = name
    return list(deltas.values())


def _invalid_call() -> EngineError:
    return EngineError("The engine did not generate the tool call that was demanded; try again.")
