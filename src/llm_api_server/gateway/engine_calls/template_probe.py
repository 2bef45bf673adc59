"""Whether a model's chat template shows the tools of a request to the model. Called by `proxy.py` for forced choices.

The engine is asked, once per instance, to put the same chat into its template with a tool and without: only it knows
which template is in use.
"""

from __future__ import annotations

from typing import Any

import msgspec

from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.response import UpstreamError
from llm_api_server.ipc.lease_messages import InstanceInfo

_JSON = "application/json"
_MAX_ANSWER_BYTES = 16 * 1024 * 1024
_MAX_REMEMBERED = 256
_MESSAGES = [{"role": "user", "content": "Hello"}]
_TOOL = {"type": "function", "function": {"name": "probe", "parameters": {"type": "object", "properties": {}}}}


class TemplateProbe:
    """What was learnt of the instances, for a worker."""

    def __init__(self, upstream: HttpClient) -> None:
        self._upstream = upstream
        self._known: dict[str, bool] = {}

    async def knows_tools(self, instance: InstanceInfo) -> bool:
        """False also where the engine does not tell: a description too many does no harm."""
        known = self._known.get(instance.id)
        if known is not None:
            return known
        plain = await self._render(instance, {})
        with_tool = await self._render(instance, {"tools": [_TOOL], "tool_choice": "none"})
        if plain is None or with_tool is None:
            return False
        if len(self._known) >= _MAX_REMEMBERED:  # of instances long gone
            self._known.clear()
        known = self._known[instance.id] = bool(plain != with_tool)
        return known

    async def _render(self, instance: InstanceInfo, more: dict[str, Any]) -> Any:
        """The prompt, or its tokens; None where the engine cannot say."""
        path, member = ("/tokenize", "tokens") if instance.engine == "vllm" else ("/apply-template", "prompt")
        body = {"model": instance.upstream_model or instance.model, "messages": _MESSAGES, **more}
        try:
            response = await self._upstream.post(
                instance.address, path, msgspec.json.encode(body), content_type=_JSON, headers=instance.headers
            )
            content = await response.read_all(_MAX_ANSWER_BYTES)
            answer = msgspec.json.decode(content, type=dict[str, Any]) if response.status == 200 else {}  # noqa: PLR2004
        except (UpstreamError, msgspec.DecodeError, UnicodeDecodeError):
            return None
        return answer.get(member)
