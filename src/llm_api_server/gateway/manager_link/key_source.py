"""Keys of the store, looked up by the manager, on the worker's loop."""

from __future__ import annotations

from collections.abc import Callable, Collection

from llm_api_server.auth.access import Key
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.ipc.messages import FindKey, KeyFound, KeysChanged


class KeySource:
    """Source of the keys that an `Authenticator` caches."""

    def __init__(self, link: ManagerLink) -> None:
        self._link = link
        self._forget: Callable[[Collection[str] | None], None] = lambda _: None
        # Changes may have been missed while disconnected.
        link.register({KeysChanged: self._on_changed}, on_connected=lambda: self._forget(None))

    def when_changed(self, forget: Callable[[Collection[str] | None], None]) -> None:
        """Call `forget` with the ids of changed keys; None: any key may have changed."""
        self._forget = forget

    async def find(self, *, digest: str | None = None, key_id: str | None = None) -> Key | None:
        """Look a key up by the hex SHA-256 of its secret or by its id. Raises `ApiError` if the manager cannot."""
        response = await self._link.call(FindKey(self._link.next_number(), digest, key_id))
        assert isinstance(response, KeyFound)
        return response.key

    def _on_changed(self, message: KeysChanged) -> None:
        self._forget(message.ids)
