"""How many tokens a request may take, before any engine has seen it. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from llm_api_server.gateway.wire import schemas
from llm_api_server.gateway.wire.endpoints import Endpoint
from llm_api_server.gateway.wire.request import RequestFacts
from llm_api_server.ipc.usage_events import cost

#: Of text in JSON; other languages and code have fewer.
_BYTES_PER_TOKEN = 4
_TOKENS_PER_MEDIUM = 1000
#: Most that is reserved for an answer whose length the request leaves open.
OPEN_ANSWER_TOKENS = 4096
_USUAL_ANSWER = 256
#: Of a prompt that is kept with its row.
MAX_PROMPT_CHARS = 64 * 1024
_PROMPT_MEMBERS = ("system", "instructions", "messages", "prompt", "input", "query", "documents", "content")


def prompt_tokens(endpoint: Endpoint, facts: RequestFacts, body_bytes: int) -> int:
    """About what the engine will count for the prompt; 0 where it generates and reads nothing."""
    if endpoint.task is None or isinstance(facts.request, schemas.CountTokensRequest):
        return 0
    if not facts.media:
        return max(1, body_bytes // _BYTES_PER_TOKEN)
    text = body_bytes - sum(medium.size for medium in facts.media)
    return max(1, text // _BYTES_PER_TOKEN) + _TOKENS_PER_MEDIUM * len(facts.media)


def answer_tokens(endpoint: Endpoint, facts: RequestFacts, context_length: int | None) -> tuple[int, int]:
    """Tokens that the answer may have as the request says, and as it leaves open."""
    request = facts.request
    if not endpoint.streams or isinstance(request, schemas.CountTokensRequest):
        return 0, 0
    # No getattr with a default: the error that it hides costs more than all else here.
    if isinstance(request, schemas.ChatRequest):
        choices = request.n or 1
    elif isinstance(request, schemas.CompletionRequest):
        choices = max(request.n or 1, request.best_of or 1) * prompts(request)
    else:
        choices = 1
    if facts.max_tokens is not None:
        return facts.max_tokens * choices, 0
    return 0, min(context_length or OPEN_ANSWER_TOKENS, OPEN_ANSWER_TOKENS) * choices


def work_of(prompt: int, stated: int, spare: int) -> int:
    """About what an engine will have to do: most answers end long before they must."""
    return cost(prompt, min(stated or spare, _USUAL_ANSWER))


def prompts(request: schemas.CompletionRequest) -> int:
    """How many there are in one request: a list of numbers is one."""
    given = request.prompt
    return len(given) if isinstance(given, list) and not isinstance(given[0], int) else 1


def prompt_text(body: bytes) -> str | None:
    """The members of a JSON body that hold what was asked, cut to `MAX_PROMPT_CHARS`."""
    members: dict[str, Any] = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    kept = {name: members[name] for name in _PROMPT_MEMBERS if name in members}
    return msgspec.json.encode(kept).decode()[:MAX_PROMPT_CHARS] if kept else None
