"""Checks of request bodies beyond their types: rules between members, and limits inside JSON schemas. Pure.

llama.cpp builds `"minItems": 5, "maxItems": 2` by counting from 2 down to 5, and takes all memory of the machine until
the kernel kills it. So contradictory limits never reach an engine, wherever they stand in a body.
"""

from __future__ import annotations

import re
from typing import Any

from llm_api_server.errors import InvalidRequest, NotSupported
from llm_api_server.gateway.wire import schemas
from llm_api_server.gateway.wire.engine_members import ADVICE
from llm_api_server.types import EngineName

_MAX_EMBEDDING_INPUTS = 2048  # openai-openapi, CreateEmbeddingRequest.input
#: Each prompt of a request becomes a request of its own in the engine.
_MAX_PROMPTS = 256
_MAX_PATH_CHARS = 200
#: msgspec's form of a message: `Expected ... - at `$.a[0].b``.
_AT = re.compile(r"^(?P<problem>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>[^`]*)`")
#: Larger values wrap around in engines that count with 32 bits.
_LARGEST_LIMIT = 2**31 - 1
_LIMIT_PAIRS = (("minItems", "maxItems"), ("minLength", "maxLength"), ("minProperties", "maxProperties"))
#: A schema's regular expression, and llama.cpp's own member of a body.
_REPEATING_MEMBERS = ("pattern", "grammar")
_REPETITION = re.compile(r"\{\s*(\d+)\s*,\s*(\d+)\s*\}")


def schema_error(problem: str) -> InvalidRequest:
    """Return msgspec's validation message as OpenAI's message and `param`."""
    match = _AT.match(problem)
    problem, path = (match["problem"], match["path"] or "") if match else (problem, "")
    problem = problem[:1].lower() + problem[1:]
    path = path[:_MAX_PATH_CHARS]
    if missing := _MISSING.search(problem):
        return _missing(f"{path}.{missing['name']}" if path else missing["name"])
    if path in ADVICE and problem.startswith(("expected `null`,", "invalid enum value")):
        problem = ADVICE[path]
    if not path:
        return InvalidRequest(f"The body of your request must be a JSON object: {problem}.")
    return _invalid(f"Invalid '{path}': {problem}.", path)


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param)


def _missing(param: str) -> InvalidRequest:
    return _invalid(f"Missing required parameter: '{param}'.", param)


def check_request(request: schemas.Request) -> None:
    """Check the rules between members, of any request but a chat. Raises `InvalidRequest`."""
    match request:
        case schemas.CompletionRequest():
            _check_prompt(request)
            if request.max_tokens == 0 and request.echo is not True:
                raise _invalid("Invalid 'max_tokens': 0 is only allowed with 'echo'; ask for at least 1.", "max_tokens")
        case schemas.EmbeddingRequest():
            _check_embedding_input(request)
        case schemas.ResponsesRequest():
            if request.input == []:
                raise _invalid("Invalid 'input': expected at least one item.", "input")
        case schemas.TokenizeRequest():
            if request.prompt is None and request.content is None and request.messages is None:
                raise _missing("prompt")
        case schemas.PoolingRequest() | schemas.ClassifyRequest():
            if not (request.input or request.messages or getattr(request, "data", None)):
                raise _missing("input")
        case schemas.ScoreRequest():
            _check_score(request)


def check_chat(request: schemas.ChatRequest) -> tuple[bool, bool]:
    """Check a chat request. Raises `InvalidRequest`.

    Return whether a message has the role `developer`, and whether one has tool calls or a refusal.
    """
    has_developer = has_replayed = False
    for index, message in enumerate(request.messages):
        if not isinstance(message.content, str) and _check_message(message, f"messages[{index}]"):
            has_replayed = True
        if message.tool_calls is not None:
            has_replayed = True
        if message.role == "developer":
            has_developer = True
    if request.top_logprobs is not None and not request.logprobs:
        raise _invalid("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    if request.tools:
        _check_tools(request.tools)
    if request.tool_choice is not None:
        _check_tool_choice(request)
    if request.response_format is not None:
        _check_response_format(request.response_format)
    return has_developer, has_replayed


def _check_message(message: schemas.Message, param: str) -> bool:
    """Check the content of a message; return whether it has a refusal."""
    if message.content is None and message.role != "assistant":
        raise _missing(f"{param}.content")
    has_refusal = False
    for index, part in enumerate(message.content or []):
        if isinstance(part, schemas.ContentPart) and part.type == "text" and part.text is None:
            raise _missing(f"{param}.content[{index}].text")
        if isinstance(part, schemas.ContentPart) and part.type == "refusal":
            if part.refusal is None:
                raise _missing(f"{param}.content[{index}].refusal")
            has_refusal = True
    return has_refusal


def _check_tools(tools: list[schemas.Tool]) -> None:
    for index, tool in enumerate(tools):
        if tool.type == "function" and tool.function is None:
            raise _missing(f"tools[{index}].function")


def _check_tool_choice(request: schemas.ChatRequest) -> None:
    choice = request.tool_choice
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise _invalid("Invalid 'tool_choice': expected 'none', 'auto', 'required' or a function.", "tool_choice")
    if choice in ("none", "auto"):
        return
    if not request.tools:
        raise _invalid("'tool_choice' is only allowed when 'tools' are given.", "tool_choice")
    if isinstance(choice, schemas.ToolChoice) and choice.type == "function":
        if choice.function is None:
            raise _missing("tool_choice.function")
        names = [tool.function.name for tool in request.tools if tool.function is not None]
        if choice.function.name not in names:
            raise _invalid(
                f"'tool_choice' names the function '{choice.function.name}', which is not among 'tools'.",
                "tool_choice.function.name",
            )


def _check_response_format(wanted: schemas.ResponseFormat) -> None:
    if wanted.type != "json_schema":
        return
    if wanted.json_schema is None:
        raise _missing("response_format.json_schema")
    if wanted.json_schema.schema is None:
        raise _missing("response_format.json_schema.schema")


def _check_prompt(request: schemas.CompletionRequest) -> None:
    if request.prompt == []:
        raise _invalid("Invalid 'prompt': expected at least one prompt.", "prompt")
    if (
        isinstance(request.prompt, list)
        and len(request.prompt) > _MAX_PROMPTS
        and not isinstance(request.prompt[0], int)
    ):
        raise _invalid(f"Invalid 'prompt': at most {_MAX_PROMPTS} prompts are allowed.", "prompt")


def _check_embedding_input(request: schemas.EmbeddingRequest) -> None:
    texts = request.input
    if texts is None:
        if not request.messages:
            raise _missing("input")
    elif not texts:
        raise _invalid("Invalid 'input': it must not be empty.", "input")
    elif isinstance(texts, list):
        if any(item in ("", []) for item in texts):
            raise _invalid("Invalid 'input': none of its items may be empty.", "input")
        if len(texts) > _MAX_EMBEDDING_INPUTS and not isinstance(texts[0], int):
            raise _invalid(f"Invalid 'input': at most {_MAX_EMBEDDING_INPUTS} items are allowed.", "input")
    if request.encoding_format not in (None, "float", "base64"):
        raise _invalid("Invalid 'encoding_format': expected 'float' or 'base64'.", "encoding_format")


def _check_score(request: schemas.ScoreRequest) -> None:
    one = (request.text_1, request.queries, request.data_1)
    other = (request.text_2, request.documents, request.items, request.data_2)
    if not any(one):
        raise _invalid("Missing required parameter: 'text_1' (or 'queries').", "text_1")
    if not any(other):
        raise _invalid("Missing required parameter: 'text_2' (or 'documents').", "text_2")


def check_supported(request: schemas.Request | None, engine: EngineName) -> None:
    """Refuse members that this engine would silently ignore. Raises `NotSupported`."""
    if isinstance(request, schemas.ChatRequest):
        return
    if engine != "remote" and isinstance(request, schemas.ResponsesRequest):
        stored = "This server does not store responses"
        _refuse("previous_response_id", stored, when=request.previous_response_id is not None)
        _refuse("background", stored, when=request.background is True)
    if engine != "llama_cpp":
        return
    if isinstance(request, schemas.EmbeddingRequest):
        _refuse("dimensions", "This model's embeddings have a fixed size", when=request.dimensions is not None)
    elif isinstance(request, schemas.CompletionRequest):
        _refuse("echo", "This model's engine cannot repeat the prompt", when=request.echo is True)
        _refuse("suffix", "This model's engine cannot fill in before a suffix", when=bool(request.suffix))
        # llama.cpp copies the prefilled prompt to the other choices; with an empty prompt it would wait for ever.
        lacks_prompt = not request.prompt or any(prompt in ("", []) for prompt in request.prompt)
        choices = request.n or 1
        _refuse("n", "This model's engine needs a prompt for several choices", when=lacks_prompt and choices > 1)
        must_pick = (request.best_of or 1) > choices
        _refuse("best_of", "This model's engine cannot pick the best of several choices", when=must_pick)


def _refuse(param: str, reason: str, *, when: bool) -> None:
    if when:
        raise NotSupported(f"{reason}: remove '{param}'.", param=param)


def may_have_schema_limits(body: bytes) -> bool:
    """Return False if `check_schema_limits` would find nothing. An escape may hide a key."""
    find = body.find  # `in` is slower: it first tries the bytes as a number, at the price of an exception
    return (
        find(b'"pattern"') >= 0 or find(b'"grammar"') >= 0 or find(b"\\u") >= 0 or find(b'Items"') >= 0
        or find(b'Length"') >= 0 or find(b'Properties"') >= 0
    )  # fmt: skip


def check_schema_limits(content: Any, param: str = "") -> None:
    """Refuse a minimum above its maximum, and limits that no output could reach, at any depth of `content`.

    `param` is the JSON path of `content`. Raises `InvalidRequest`.
    """
    if isinstance(content, list):
        for index, item in enumerate(content):
            check_schema_limits(item, f"{param}[{index}]")
    elif isinstance(content, dict):
        _check_limits(content, param)
        for key, item in content.items():
            if isinstance(item, dict | list):
                check_schema_limits(item, f"{param}.{key}" if param else key)


def _check_limits(schema: dict[str, Any], param: str) -> None:
    for low_name, high_name in _LIMIT_PAIRS:
        low, high = _limit(schema, low_name, param), _limit(schema, high_name, param)
        if low is not None and high is not None and low > high:
            raise _impossible(f"'{low_name}' is greater than '{high_name}'", param)
    for name in _REPEATING_MEMBERS:
        text = schema.get(name)
        for low, high in _REPETITION.findall(text) if isinstance(text, str) else ():
            if float(low) > float(high):
                raise _impossible(f"'{name}' repeats at least {low} and at most {high} times", param)


def _limit(schema: dict[str, Any], name: str, param: str) -> float | None:
    """Return None if it is absent or no number; the engine itself refuses the latter."""
    limit = schema.get(name)
    if not isinstance(limit, int | float) or isinstance(limit, bool):
        return None
    if not 0 <= limit <= _LARGEST_LIMIT:
        raise _impossible(f"'{name}' must be between 0 and {_LARGEST_LIMIT}", param)
    return limit


def _impossible(reason: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid schema: {reason[:200]}.", param=param[:200] or None)
