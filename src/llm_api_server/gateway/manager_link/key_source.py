"""Keys of the store, asked of the manager, and its word that some have changed. A part of the worker's link to it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from llm_api_server.auth.access import Key
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.ipc import messages


class KeySource:
    """The source behind the cache of the `Authenticator`, whose `forget` is to be given to `when_changed`."""

    def __init__(self, link: ManagerLink) -> None:
        self._link = link
        self._forget: Callable[[Collection[str] | None], None] = lambda _: None
        self.handlers: dict[type, Callable[[Any], None]] = {messages.KeysChanged: self._on_changed}
        link.add(self)

    def when_changed(self, forget: Callable[[Collection[str] | None], None]) -> None:
        """Call it with the ids of changed keys; None: any may have changed."""
        self._forget = forget

    async def find(self, *, digest: str | None = None, key_id: str | None = None) -> Key | None:
        """By the hex SHA-256 of its secret or by its id. Raises `ApiError` when nobody can tell."""
        answer = await self._link.ask(messages.FindKey(self._link.number(), digest, key_id))
        assert isinstance(answer, messages.KeyFound), "what the manager answers to that"
        return answer.key

    def _on_changed(self, changed: messages.KeysChanged) -> None:
        self._forget(changed.ids)

    def greet(self, hello: messages.Hello) -> None:
        """Nothing survives a connection."""

    def connected(self) -> None:
        """Changes may have been missed."""
        self._forget(None)
