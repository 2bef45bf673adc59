"""Commands of administrators about models, carried out by the manager."""

from __future__ import annotations

from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.ipc.messages import (
    Command,
    Explained,
    ExplainModel,
    ListModels,
    LoadModel,
    Models,
    PinModel,
    UnloadModel,
)
from llm_api_server.ipc.model_status import Explanation, ModelStatus


class ModelCommands:
    """Sends commands, and returns the state of all models afterwards. Raises the manager's refusal as an `ApiError`."""

    def __init__(self, link: ManagerLink) -> None:
        self._link = link

    async def load(self, model: str, *, wait: bool) -> list[ModelStatus]:
        return await self._models_after(LoadModel(self._link.next_number(), model, wait))

    async def unload(self, model: str, *, wait: bool) -> list[ModelStatus]:
        return await self._models_after(UnloadModel(self._link.next_number(), model, wait))

    async def pin(self, model: str, *, is_pinned: bool) -> list[ModelStatus]:
        """Pin a loaded model, or unpin it."""
        return await self._models_after(PinModel(self._link.next_number(), model, is_pinned))

    async def list_models(self) -> list[ModelStatus]:
        """Return fresh figures (memory, in flight), where `Leases.models` has those of the last change of a state."""
        return await self._models_after(ListModels(self._link.next_number()))

    async def explain(self, model: str) -> Explanation:
        """Return whether the model would fit now."""
        response = await self._link.call(ExplainModel(self._link.next_number(), model), repeats=False)
        assert isinstance(response, Explained)
        return response.explanation

    async def _models_after(self, command: Command) -> list[ModelStatus]:
        response = await self._link.call(command, repeats=False)
        assert isinstance(response, Models)
        return response.models
