"""Estimates of a request's tokens, before an engine counts them. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from llm_api_server.gateway.wire import schemas
from llm_api_server.gateway.wire.endpoints import Endpoint
from llm_api_server.gateway.wire.request import RequestFacts
from llm_api_server.ipc.usage_events import cost

#: For English text in JSON; other languages and code have fewer.
_BYTES_PER_TOKEN = 4
_TOKENS_PER_MEDIUM = 1000
#: Output tokens reserved for a request without a limit of its own.
_OPEN_OUTPUT_TOKENS = 4096
#: Most responses end long before their limit.
_USUAL_OUTPUT_TOKENS = 256
#: Characters of a recorded prompt (`storage.record_prompts`).
_MAX_PROMPT_CHARS = 64 * 1024
_PROMPT_MEMBERS = ("system", "instructions", "messages", "prompt", "input", "query", "documents", "content")


def prompt_tokens(endpoint: Endpoint, facts: RequestFacts, body_bytes: int) -> int:
    """Estimate the prompt tokens; 0 if the model does not run, as for tokenizing."""
    if endpoint.task is None or isinstance(facts.request, schemas.CountTokensRequest):
        return 0
    if not facts.media:
        return max(1, body_bytes // _BYTES_PER_TOKEN)
    text = body_bytes - sum(medium.size for medium in facts.media)
    return max(1, text // _BYTES_PER_TOKEN) + _TOKENS_PER_MEDIUM * len(facts.media)


def output_tokens(endpoint: Endpoint, facts: RequestFacts, context_length: int | None) -> tuple[int, int]:
    """Return the requested maximum of output tokens, and the optional tokens of a request without a maximum."""
    request = facts.request
    if not endpoint.streams or isinstance(request, schemas.CountTokensRequest):
        return 0, 0
    # No getattr with a default: the exception it hides costs more than the rest of this function.
    if isinstance(request, schemas.ChatRequest):
        choices = request.n or 1
    elif isinstance(request, schemas.CompletionRequest):
        choices = max(request.n or 1, request.best_of or 1) * prompt_count(request)
    else:
        choices = 1
    if facts.max_tokens is not None:
        return facts.max_tokens * choices, 0
    return 0, min(context_length or _OPEN_OUTPUT_TOKENS, _OPEN_OUTPUT_TOKENS) * choices


def expected_cost(prompt: int, requested: int, optional: int) -> int:
    """Estimate the cost of a request for fair scheduling, from its tokens."""
    return cost(prompt, min(requested or optional, _USUAL_OUTPUT_TOKENS))


def prompt_count(request: schemas.CompletionRequest) -> int:
    """Return the number of prompts in a request; a list of token ids is one."""
    given = request.prompt
    return len(given) if isinstance(given, list) and not isinstance(given[0], int) else 1


def prompt_text(body: bytes) -> str | None:
    """Return the members of a JSON body that hold the prompt, cut to `_MAX_PROMPT_CHARS`; None: there are none."""
    members: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    kept = {name: members[name] for name in _PROMPT_MEMBERS if name in members}
    return msgspec.json.encode(kept).decode()[:_MAX_PROMPT_CHARS] if kept else None
