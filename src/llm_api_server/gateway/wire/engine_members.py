"""Names of engines that are refused because a checked member means the same, in one table. Pure.

llama.cpp prefers its own names to OpenAI's, so `n_predict` would bypass the checks and the accounting of `max_tokens`.
`schemas` declares these members as null, so decoding refuses any other value. All other names pass to the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_MAX_TOKENS = "use 'max_tokens', or 'max_output_tokens' in /v1/responses"

#: Advice for a refused member. Those below the first block are refused on some endpoints only.
ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "n_predict": _MAX_TOKENS,
        "n_cmpl": "use 'n'",
        "n_probs": "use 'logprobs' and 'top_logprobs'",
        "id_slot": "this server chooses the slot; remove it",
        "chat_format": "the model's chat template decides it; remove it",
        "chat_parser": "the model's chat template decides it; remove it",
        "max_completion_tokens": _MAX_TOKENS,
        "max_tokens": _MAX_TOKENS,
        "n": "this endpoint makes one choice; remove it",
        "reasoning_format": "expected 'none', 'auto', 'deepseek' or 'deepseek-legacy'",
    }
)
#: Refused by every endpoint that generates.
EVERYWHERE = ("n_predict", "n_cmpl", "n_probs", "id_slot", "chat_format", "chat_parser")
