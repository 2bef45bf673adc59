"""The engine endpoints: paths, permissions, request schemas and dialects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import msgspec

from llm_api_server.gateway.wire import schemas
from llm_api_server.types import EngineName, Permission, Task

#: The form of errors and streams: OpenAI's chunks, OpenAI's Responses events, or Anthropic's events.
Dialect = Literal["openai", "responses", "anthropic"]


@dataclass(frozen=True)
class Endpoint:
    """One engine endpoint.

    `task` is the task that the model must support; None: any model serves it. `request` is None for multipart forms.
    `engine_paths` has the engines whose path differs from the client's.
    """

    path: str
    permission: Permission
    task: Task | None
    request: type[schemas.Request] | None
    summary: str
    dialect: Dialect = "openai"
    streams: bool = False
    engine_paths: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def decoder(self) -> msgspec.json.Decoder[schemas.Request]:
        assert self.request is not None, "multipart endpoints are read by multipart.py"
        return msgspec.json.Decoder(self.request)

    def path_on(self, engine: EngineName) -> str:
        return self.engine_paths.get(engine, self.path)


_RERANK = {"llama_cpp": "/v1/rerank"}
_TOKENIZE = {"llama_cpp": "/tokenize", "vllm": "/tokenize"}
_DETOKENIZE = {"llama_cpp": "/detokenize", "vllm": "/detokenize"}

_ALL = (
    Endpoint("/v1/chat/completions", "chat", "generate", schemas.ChatRequest, "Answer a conversation", streams=True),
    Endpoint("/v1/completions", "completions", "generate", schemas.CompletionRequest, "Continue a text", streams=True),
    Endpoint(
        "/v1/responses", "responses", "generate", schemas.ResponsesRequest, "OpenAI Responses", "responses",
        streams=True,
    ),
    Endpoint(
        "/v1/messages", "messages", "generate", schemas.MessagesRequest, "Anthropic Messages", "anthropic",
        streams=True,
    ),
    Endpoint(
        "/v1/messages/count_tokens", "messages", "generate", schemas.CountTokensRequest,
        "Count the tokens of Anthropic messages", "anthropic",
    ),
    Endpoint("/v1/embeddings", "embeddings", "embed", schemas.EmbeddingRequest, "Embed texts"),
    Endpoint("/pooling", "embeddings", "pool", schemas.PoolingRequest, "Return the output of the model's pooler"),
    Endpoint("/v1/rerank", "rerank", "rank", schemas.RerankRequest, "Rank documents", engine_paths=_RERANK),
    Endpoint("/v2/rerank", "rerank", "rank", schemas.RerankRequest, "Rank documents", engine_paths=_RERANK),
    Endpoint("/rerank", "rerank", "rank", schemas.RerankRequest, "Rank documents", engine_paths=_RERANK),
    Endpoint("/v1/score", "rerank", "score", schemas.ScoreRequest, "Score pairs of texts"),
    Endpoint("/score", "rerank", "score", schemas.ScoreRequest, "Score pairs of texts"),
    Endpoint("/classify", "rerank", "classify", schemas.ClassifyRequest, "Classify texts"),
    Endpoint("/v1/tokenize", "tokenize", None, schemas.TokenizeRequest, "Text to tokens", engine_paths=_TOKENIZE),
    Endpoint("/tokenize", "tokenize", None, schemas.TokenizeRequest, "Text to tokens"),
    Endpoint("/v1/detokenize", "tokenize", None, schemas.DetokenizeRequest, "Tokens to text", engine_paths=_DETOKENIZE),
    Endpoint("/detokenize", "tokenize", None, schemas.DetokenizeRequest, "Tokens to text"),
    Endpoint("/v1/audio/transcriptions", "audio", "generate", None, "Transcribe speech", streams=True),
    Endpoint("/v1/audio/translations", "audio", "generate", None, "Translate speech", streams=True),
)  # fmt: skip

ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType({endpoint.path: endpoint for endpoint in _ALL})
