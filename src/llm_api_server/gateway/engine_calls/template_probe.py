"""Probe of an instance's chat template: whether it shows the model the tools of a request.

The engine renders the same chat with a tool and without, once per instance: only it knows which template is in use.
"""

from __future__ import annotations

from typing import Any

import msgspec

from llm_api_server.http_client.client import HttpClient
from llm_api_server.http_client.response import UpstreamError
from llm_api_server.ipc.lease_messages import InstanceInfo

_JSON = "application/json"
_MAX_RESPONSE_BYTES = 16 * 1024 * 1024
_MAX_INSTANCES = 256
_MESSAGES = [{"role": "user", "content": "Hello"}]
_TOOL = {"type": "function", "function": {"name": "probe", "parameters": {"type": "object", "properties": {}}}}


class TemplateProbe:
    """Results by instance, for one worker."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._known: dict[str, bool] = {}

    async def knows_tools(self, instance: InstanceInfo) -> bool:
        """Return whether the template shows tools; False if unknown, since describing them twice does no harm."""
        known = self._known.get(instance.id)
        if known is not None:
            return known
        plain = await self._render(instance, {})
        with_tool = await self._render(instance, {"tools": [_TOOL], "tool_choice": "none"})
        if plain is None or with_tool is None:
            return False
        if len(self._known) >= _MAX_INSTANCES:  # mostly of instances that are gone
            self._known.clear()
        known = self._known[instance.id] = bool(plain != with_tool)
        return known

    async def _render(self, instance: InstanceInfo, more: dict[str, Any]) -> Any:
        """Return the rendered prompt or its tokens; None if the engine cannot render it."""
        path, member = ("/tokenize", "tokens") if instance.engine == "vllm" else ("/apply-template", "prompt")
        body = {"model": instance.upstream_model or instance.model, "messages": _MESSAGES, **more}
        try:
            response = await self._client.post(
                instance.address, path, msgspec.json.encode(body), content_type=_JSON, headers=instance.headers
            )
            content = await response.read_all(_MAX_RESPONSE_BYTES)
            decoded = msgspec.json.decode(content, type=dict[str, Any]) if response.status == 200 else {}  # noqa: PLR2004
        except (UpstreamError, msgspec.DecodeError, UnicodeDecodeError):
            return None
        return decoded.get(member)
