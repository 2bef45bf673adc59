"""Request bodies as typed structs, which also describe the API. Pure.

A struct has only the members that the gateway reads; all others pass to the engine unread.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]
PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]
NotNegativeInt = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
#: Engines compare stop texts after every token and apply biases before it, so both are limited.
StopText = Annotated[str, Meta(max_length=4096)]
StopTexts = Annotated[list[StopText], Meta(max_length=64)]
LogitBias = Annotated[dict[str, float], Meta(max_length=1024)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
ReasoningFormat = Literal["none", "auto", "deepseek", "deepseek-legacy"]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ContentPart(msgspec.Struct):
    """One part of a message: text, a refusal, an image, or another type that the engine knows."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(msgspec.Struct):
    role: Text
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    audio: Any = None
    function_call: Any = None


class Function(msgspec.Struct):
    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    type: str
    function: Function | None = None


class FunctionChoice(msgspec.Struct):
    name: Text


class ToolChoice(msgspec.Struct):
    type: str
    function: FunctionChoice | None = None


class JsonSchemaFormat(msgspec.Struct):
    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: str
    json_schema: JsonSchemaFormat | None = None


class Request(msgspec.Struct):
    """Base of all requests. `model` is a name or alias; absent: the default model."""

    model: str | None = None


class Generating(Request):
    """Base of requests that generate. Members of the type null are refused: see `engine_members`."""

    n_predict: None = None
    n_cmpl: None = None
    n_probs: None = None
    id_slot: None = None
    chat_format: None = None
    chat_parser: None = None
    reasoning_format: ReasoningFormat | None = None
    prompt_logprobs: TopLogprobs | None = None


class Sampling(Generating):
    """Base of OpenAI's requests that generate. `service_tier: flex` selects the priority class `batch`."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None


class ChatRequest(Sampling, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    n: Choices | None = None
    stop: StopText | StopTexts | None = None
    seed: Int64 | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None


class CompletionRequest(Sampling, kw_only=True):
    prompt: str | list[str | int | list[int]]
    max_tokens: NotNegativeInt | None = None
    max_completion_tokens: None = None
    n: Choices | None = None
    best_of: Choices | None = None
    echo: bool | None = None
    suffix: str | None = None
    stop: StopText | StopTexts | None = None
    seed: Int64 | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    logprobs: TopLogprobs | bool | None = None
    user: str | None = None


class EmbeddingRequest(Request, kw_only=True):
    """`messages` in place of `input` is vLLM's form for chat and image embeddings."""

    input: str | list[str | int | list[int]] | None = None
    messages: list[Message] | None = None
    encoding_format: str | None = None
    dimensions: PositiveInt | None = None
    user: str | None = None


class PoolingRequest(Request, kw_only=True):
    """Request of vLLM's `/pooling`; `data` is for its plugins."""

    input: str | list[str | int | list[int]] | None = None
    messages: list[Message] | None = None
    data: Any = None


class ResponsesRequest(Sampling, kw_only=True):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: PositiveInt | None = None
    max_tokens: None = None
    max_completion_tokens: None = None
    stop: StopText | StopTexts | None = None
    n: Literal[1] | None = None
    logit_bias: LogitBias | None = None
    logprobs: TopLogprobs | bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    store: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: dict[str, Any] | None = None


class AnthropicMessage(msgspec.Struct):
    role: Text
    content: str | list[ContentPart]


class MessagesRequest(Generating, kw_only=True):
    """Anthropic's request (docs.anthropic.com/en/api/messages)."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1)]
    max_tokens: PositiveInt
    max_completion_tokens: None = None
    system: str | list[ContentPart] | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    stop_sequences: StopTexts | None = None
    stop: StopText | StopTexts | None = None
    n: Literal[1] | None = None
    logit_bias: LogitBias | None = None
    logprobs: TopLogprobs | bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None


class CountTokensRequest(Request, kw_only=True):
    messages: Annotated[list[AnthropicMessage], Meta(min_length=1)]
    system: str | list[ContentPart] | None = None
    tools: list[dict[str, Any]] | None = None


class RerankRequest(Request, kw_only=True):
    query: str | dict[str, Any]
    documents: Annotated[list[str | dict[str, Any]], Meta(min_length=1)] | dict[str, Any]
    top_n: NotNegativeInt | None = None
    return_documents: bool | None = None


class ScoreRequest(Request, kw_only=True):
    """Request of vLLM's `/score`, which accepts its two sides under several names."""

    text_1: str | list[Any] | dict[str, Any] | None = None
    text_2: str | list[Any] | dict[str, Any] | None = None
    queries: str | list[Any] | dict[str, Any] | None = None
    documents: str | list[Any] | dict[str, Any] | None = None
    items: str | list[Any] | dict[str, Any] | None = None
    data_1: str | list[Any] | dict[str, Any] | None = None
    data_2: str | list[Any] | dict[str, Any] | None = None


class ClassifyRequest(Request, kw_only=True):
    """Request of vLLM's `/classify`."""

    input: str | list[str | int | list[int]] | None = None
    messages: list[Message] | None = None


class TokenizeRequest(Request, kw_only=True):
    """`prompt` is vLLM's name for the text, `content` llama.cpp's; clients may send either."""

    prompt: str | None = None
    content: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Request, kw_only=True):
    tokens: list[NotNegativeInt]


class AudioForm(msgspec.Struct, kw_only=True):
    """Multipart form of the audio endpoints."""

    file: bytes
    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    response_format: str | None = None
    temperature: float | None = None
    stream: bool | None = None
