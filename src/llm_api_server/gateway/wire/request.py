"""What the gateway reads of a request and changes in it, per endpoint. Pure; `proxy.py` calls it with whole bodies.

Wrong shapes raise `InvalidRequest` with OpenAI's `param`, so that no engine has to find them (engines answer some with
500 and ignore others). What is not read passes through as it came.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from llm_api_server.errors import InvalidRequest, NotSupported
from llm_api_server.gateway.media.content_parts import Media, find_media, may_have_media
from llm_api_server.gateway.wire import schemas
from llm_api_server.gateway.wire.schema_limits import check_bounds, may_have_bounds
from llm_api_server.types import EngineName, Permission, Task

#: How errors and streams look: OpenAI's chunks, OpenAI's Responses events, or Anthropic's events.
Dialect = Literal["openai", "responses", "anthropic"]

MAX_EMBEDDING_INPUTS = 2048  # openai-openapi, CreateEmbeddingRequest.input
#: Each prompt of a request is a request to the engine.
MAX_PROMPTS = 256
_MAX_PATH_CHARS = 200
_LONG_BYTES = 16 * 1024
#: A name may be written so.
_ESCAPED_ASCII = b"\\u00"


@dataclass(frozen=True)
class Endpoint:
    """One engine endpoint. `task` is what it needs of a model; None: any model will do.

    `paths` tells where an engine has it under another path than the client's.
    """

    path: str
    permission: Permission
    task: Task | None
    request: type[schemas.Request] | None
    summary: str
    dialect: Dialect = "openai"
    streams: bool = False
    paths: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def decoder(self) -> msgspec.json.Decoder[schemas.Request]:
        assert self.request is not None, "multipart endpoints are read by multipart.py"
        return msgspec.json.Decoder(self.request)


_RERANK = {"llama_cpp": "/v1/rerank"}
_TOKENIZE = {"llama_cpp": "/tokenize", "vllm": "/tokenize"}
_DETOKENIZE = {"llama_cpp": "/detokenize", "vllm": "/detokenize"}

ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType(
    {
        endpoint.path: endpoint
        for endpoint in (
            Endpoint(
                "/v1/chat/completions", "chat", "generate", schemas.ChatRequest, "Answer a conversation", streams=True
            ),
            Endpoint(
                "/v1/completions", "completions", "generate", schemas.CompletionRequest, "Continue a text", streams=True
            ),
            Endpoint(
                "/v1/responses",
                "responses",
                "generate",
                schemas.ResponsesRequest,
                "OpenAI Responses",
                "responses",
                streams=True,
            ),
            Endpoint(
                "/v1/messages",
                "messages",
                "generate",
                schemas.MessagesRequest,
                "Anthropic Messages",
                "anthropic",
                streams=True,
            ),
            Endpoint(
                "/v1/messages/count_tokens",
                "messages",
                "generate",
                schemas.CountTokensRequest,
                "Count the tokens of Anthropic messages",
                "anthropic",
            ),
            Endpoint("/v1/embeddings", "embeddings", "embed", schemas.EmbeddingRequest, "Embed texts"),
            Endpoint("/pooling", "embeddings", "pool", schemas.PoolingRequest, "What the model's pooler gives"),
            Endpoint("/v1/rerank", "rerank", "rank", schemas.RerankRequest, "Rank documents", paths=_RERANK),
            Endpoint("/v2/rerank", "rerank", "rank", schemas.RerankRequest, "Rank documents", paths=_RERANK),
            Endpoint("/rerank", "rerank", "rank", schemas.RerankRequest, "Rank documents", paths=_RERANK),
            Endpoint("/v1/score", "rerank", "score", schemas.ScoreRequest, "Score pairs of texts"),
            Endpoint("/score", "rerank", "score", schemas.ScoreRequest, "Score pairs of texts"),
            Endpoint("/classify", "rerank", "classify", schemas.ClassifyRequest, "Classify texts"),
            Endpoint("/v1/tokenize", "tokenize", None, schemas.TokenizeRequest, "Text to tokens", paths=_TOKENIZE),
            Endpoint("/tokenize", "tokenize", None, schemas.TokenizeRequest, "Text to tokens"),
            Endpoint(
                "/v1/detokenize", "tokenize", None, schemas.DetokenizeRequest, "Tokens to text", paths=_DETOKENIZE
            ),
            Endpoint("/detokenize", "tokenize", None, schemas.DetokenizeRequest, "Tokens to text"),
            Endpoint("/v1/audio/transcriptions", "audio", "generate", None, "Transcribe speech", streams=True),
            Endpoint("/v1/audio/translations", "audio", "generate", None, "Translate speech", streams=True),
        )
    }
)


class RequestFacts(msgspec.Struct):
    """What was read of a request. `stream` is settled; `says_stream` tells whether the body says the same.

    `has_developer`: a message has the role `developer`.
    """

    request: schemas.Request | None
    model: str | None
    stream: bool = False
    says_stream: bool = True
    wants_usage: bool = False
    max_tokens: int | None = None
    media: Sequence[Media] = ()
    has_developer: bool = False


def read_request(
    endpoint: Endpoint, body: bytes, *, stream_by_default: bool = False, may_fetch: bool = False
) -> RequestFacts:
    """Decode and check a JSON body. Raises `InvalidRequest`."""
    assert endpoint.request is not None, "multipart endpoints are read by multipart.py"
    media: Sequence[Media] = ()
    try:
        if _is_plain(body):
            body.decode()
            request = endpoint.decoder.decode(body)
        else:
            content = msgspec.json.decode(body)
            request = msgspec.convert(content, endpoint.request)
            media = find_media(content, may_fetch=may_fetch)
            check_bounds(content)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}.") from error
    except RecursionError as error:
        raise InvalidRequest("The JSON body of your request is nested too deeply.") from error
    if request.model == "":
        raise _invalid("Invalid 'model': expected a model's name.", "model")
    said, options, has_developer = None, None, False
    if isinstance(request, schemas.ChatRequest):
        has_developer = _check_chat(request)
        max_tokens = request.max_completion_tokens or request.max_tokens
        said, options = request.stream, request.stream_options
    else:
        _check(request)
        max_tokens = _max_tokens(request)
        if isinstance(request, schemas.Sampling):
            said, options = request.stream, request.stream_options
        elif isinstance(request, schemas.MessagesRequest):
            said = request.stream
    stream = endpoint.streams and (stream_by_default if said is None else said)
    if options is not None and not stream:
        raise _invalid("'stream_options' is only allowed when 'stream' is true.", "stream_options")
    wants_usage = options is not None and options.include_usage is True
    says_stream = bool(said) == stream
    return RequestFacts(request, request.model, stream, says_stream, wants_usage, max_tokens, media, has_developer)


def _is_plain(body: bytes) -> bool:
    """Whether only its endpoint's members need a look. To search a long body takes longer than to decode all of it."""
    return len(body) < _LONG_BYTES and not (may_have_media(body) or may_have_bounds(body))


def rewrite(body: bytes, changes: Mapping[str, Any]) -> bytes:
    """`body` with top-level members replaced or added (`msgspec.UNSET` removes one); the rest byte for byte."""
    if not changes:
        return body
    if _lacks(body, changes):
        return b"%b,%b" % (body.rstrip()[:-1], msgspec.json.encode(changes)[1:])
    members: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    members.update(changes)
    return msgspec.json.encode({key: value for key, value in members.items() if value is not msgspec.UNSET})


def _lacks(body: bytes, changes: Mapping[str, Any]) -> bool:
    """Whether `body` has some members, and certainly none of these: then they can be put behind the others."""
    if len(body) > _LONG_BYTES or body.find(b'"') < 0 or body.find(_ESCAPED_ASCII) >= 0:
        return False
    return all(body.find(b'"%b"' % name.encode()) < 0 and value is not msgspec.UNSET for name, value in changes.items())


def ask_for_usage(facts: RequestFacts, body: bytes) -> dict[str, Any]:
    """`stream_options` of `body` with `include_usage` set."""
    if isinstance(facts.request, schemas.Sampling) and facts.request.stream_options is None:
        return {"include_usage": True}
    options = msgspec.json.decode(body, type=_StreamOptionsOnly).stream_options or {}
    return {**options, "include_usage": True}


def developer_changes(facts: RequestFacts, body: bytes) -> dict[str, Any]:
    """`messages` with the role `developer` named `system`, the only name most chat templates know."""
    request = facts.request
    if not facts.has_developer or not isinstance(request, schemas.ChatRequest):
        return {}
    messages = msgspec.json.decode(body, type=_MessagesOnly).messages
    for read, message in zip(request.messages, messages, strict=True):
        if read.role == "developer":
            message["role"] = msgspec.Raw(b'"system"')
    return {"messages": messages}


def upstream_path(endpoint: Endpoint, engine: EngineName) -> str:
    return endpoint.paths.get(engine, endpoint.path)


def check_supported(facts: RequestFacts, engine: EngineName) -> None:
    """Refuse what this engine would ignore in silence. Raises `NotSupported`."""
    request = facts.request
    if isinstance(request, schemas.ChatRequest):
        return
    if engine != "remote" and isinstance(request, schemas.ResponsesRequest):
        stored = "Responses are not stored here"
        _refuse("previous_response_id", stored, when=request.previous_response_id is not None)
        _refuse("background", stored, when=request.background is True)
    if engine != "llama_cpp":
        return
    if isinstance(request, schemas.EmbeddingRequest):
        _refuse("dimensions", "This model's embeddings have a fixed size", when=request.dimensions is not None)
    elif isinstance(request, schemas.CompletionRequest):
        _refuse("echo", "This model's engine cannot repeat the prompt", when=request.echo is True)
        _refuse("suffix", "This model's engine cannot fill in before a suffix", when=bool(request.suffix))
        # It would wait for ever: nothing is read that one answer could pass on to the others.
        is_empty = not request.prompt or any(prompt in ("", []) for prompt in request.prompt)
        _refuse("n", "This model's engine needs a prompt for several answers", when=is_empty and (request.n or 1) > 1)
        several = (request.best_of or 1) > (request.n or 1)
        _refuse("best_of", "This model's engine cannot choose the best of several", when=several)


def tokenize_changes(facts: RequestFacts, engine: EngineName) -> dict[str, Any]:
    """`prompt` is vLLM's name for the text to split, `content` llama.cpp's: either is understood."""
    request = facts.request
    if not isinstance(request, schemas.TokenizeRequest) or engine != "vllm":
        return {}
    if request.prompt is None and request.content is not None:
        return {"prompt": request.content, "content": msgspec.UNSET}
    return {}


class _StreamOptionsOnly(msgspec.Struct):
    stream_options: dict[str, Any] | None = None


class _MessagesOnly(msgspec.Struct):
    messages: list[dict[str, msgspec.Raw]]


def _refuse(param: str, reason: str, *, when: bool) -> None:
    if when:
        raise NotSupported(f"{reason}: '{param}' is not supported.", param=param)


# ── wrong shapes ─────────────────────────────────────────────────────────────────────────────────────────────────

_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"missing required field `(?P<name>[^`]*)`")


def _explain(problem: str) -> InvalidRequest:
    """msgspec's `Expected ... - at `$.a[0].b`` as OpenAI's message and `param`."""
    match = _AT.match(problem)
    what, path = (match["what"], match["path"] or "") if match else (problem, "")
    path = path[:_MAX_PATH_CHARS]
    if missing := _MISSING.search(what):
        param = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if not path:
        return InvalidRequest(f"The body of your request must be a JSON object: {_lower(what)}.")
    return InvalidRequest(f"Invalid '{path}': {_lower(what)}.", param=path)


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param)


# ── rules that types cannot say ──────────────────────────────────────────────────────────────────────────────────


def _check(request: schemas.Request) -> None:
    match request:
        case schemas.CompletionRequest():
            _check_prompt(request)
        case schemas.EmbeddingRequest():
            _check_embedding_input(request)
        case schemas.ResponsesRequest():
            if request.input == []:
                raise _invalid("Invalid 'input': expected at least one item.", "input")
        case schemas.TokenizeRequest():
            if request.prompt is None and request.content is None and request.messages is None:
                raise _invalid("Missing required parameter: 'prompt'.", "prompt")
        case schemas.PoolingRequest() | schemas.ClassifyRequest():
            if not (request.input or request.messages or getattr(request, "data", None)):
                raise _invalid("Missing required parameter: 'input'.", "input")
        case schemas.ScoreRequest():
            _check_score(request)


def _check_chat(request: schemas.ChatRequest) -> bool:
    """Whether a message has the role `developer`."""
    has_developer = False
    for index, message in enumerate(request.messages):
        if not isinstance(message.content, str):
            _check_message(message, f"messages[{index}]")
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
    return has_developer


def _check_message(message: schemas.Message, param: str) -> None:
    """One whose content is not text alone."""
    if message.content is None and message.role != "assistant":
        raise _invalid(f"Missing required parameter: '{param}.content'.", f"{param}.content")
    for index, part in enumerate(message.content or []):
        if isinstance(part, schemas.ContentPart) and part.type == "text" and part.text is None:
            place = f"{param}.content[{index}].text"
            raise _invalid(f"Missing required parameter: '{place}'.", place)


def _check_tools(tools: list[schemas.Tool]) -> None:
    for index, tool in enumerate(tools):
        if tool.type == "function" and tool.function is None:
            place = f"tools[{index}].function"
            raise _invalid(f"Missing required parameter: '{place}'.", place)


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
            raise _invalid("Missing required parameter: 'tool_choice.function'.", "tool_choice.function")
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
        place = "response_format.json_schema"
    elif wanted.json_schema.schema is None:
        place = "response_format.json_schema.schema"
    else:
        return
    raise _invalid(f"Missing required parameter: '{place}'.", place)


def _check_prompt(request: schemas.CompletionRequest) -> None:
    if request.prompt == []:
        raise _invalid("Invalid 'prompt': expected at least one prompt.", "prompt")
    if (
        isinstance(request.prompt, list)
        and len(request.prompt) > MAX_PROMPTS
        and not isinstance(request.prompt[0], int)
    ):
        raise _invalid(f"Invalid 'prompt': at most {MAX_PROMPTS} prompts are allowed.", "prompt")


def _check_embedding_input(request: schemas.EmbeddingRequest) -> None:
    texts = request.input
    if texts is None:
        if not request.messages:
            raise _invalid("Missing required parameter: 'input'.", "input")
    elif not texts:
        raise _invalid("Invalid 'input': it must not be empty.", "input")
    elif isinstance(texts, list):
        if any(item in ("", []) for item in texts):
            raise _invalid("Invalid 'input': none of its items may be empty.", "input")
        if len(texts) > MAX_EMBEDDING_INPUTS and not isinstance(texts[0], int):
            raise _invalid(f"Invalid 'input': at most {MAX_EMBEDDING_INPUTS} items are allowed.", "input")
    if request.encoding_format not in (None, "float", "base64"):
        raise _invalid("Invalid 'encoding_format': expected 'float' or 'base64'.", "encoding_format")


def _check_score(request: schemas.ScoreRequest) -> None:
    one = (request.text_1, request.queries, request.data_1)
    other = (request.text_2, request.documents, request.items, request.data_2)
    if not any(one):
        raise _invalid("Missing required parameter: 'text_1' (or 'queries').", "text_1")
    if not any(other):
        raise _invalid("Missing required parameter: 'text_2' (or 'documents').", "text_2")


def _max_tokens(request: schemas.Request) -> int | None:
    match request:
        case schemas.CompletionRequest() | schemas.MessagesRequest():
            return request.max_tokens
        case schemas.ResponsesRequest():
            return request.max_output_tokens
    return None
