"""The adapter of a remote OpenAI-compatible server: an address, a key and a name, no process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from llm_api_server.config.models import ModelConfig
from llm_api_server.engines.base import LaunchPlan, ModelFacts, ModelProblem, Placement
from llm_api_server.types import EngineName


class RemoteEngine:
    """Adapter of remote servers (`base.Engine`). An unreachable server fails requests, not the model."""

    name: EngineName = "remote"
    phase_marks: Sequence[tuple[str, str]] = ()

    def inspect(self, model: ModelConfig) -> ModelFacts:
        base_address(model.path)
        if model.adapters:
            raise ModelProblem("adapters need vLLM; name an adapter of the remote server with upstream_model")
        return ModelFacts(context_length=model.max_tokens)

    def plan(self, name: str, model: ModelConfig, socket: Path, placement: Placement | None = None) -> LaunchPlan:
        del socket, placement  # no process to start
        headers = {"authorization": f"Bearer {model.api_key}"} if model.api_key else {}
        return LaunchPlan(
            argv=[],
            address=base_address(model.path),
            upstream_model=model.upstream_model or name,
            headers=headers,
        )

    async def wait_ready(self, plan: LaunchPlan) -> None:
        """Return at once: a remote server has no start to wait for."""

    def explain_failure(self, log_tail: str, exit_code: int | None) -> str:
        del log_tail, exit_code
        return "the remote server cannot be reached"


def base_address(url: str) -> str:
    """Return the URL without its final `/v1`, which requests add. Raises `ModelProblem` unless it is http(s)."""
    parts = urlsplit(url)
    try:
        is_usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_usable = False
    if not is_usable or parts.query or parts.fragment:
        raise ModelProblem("the model's path is not a usable URL; give one such as http://host:port/v1")
    if parts.username or parts.password:
        raise ModelProblem("the model's URL must not contain a password; use api_key")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"
