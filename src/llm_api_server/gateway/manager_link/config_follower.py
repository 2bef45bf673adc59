"""Follows the configuration that the manager sends, on the worker's loop."""

from __future__ import annotations

from collections.abc import Callable

from loguru import logger

from llm_api_server.config.models import Config
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.ipc.messages import Configure, Configured, Hello
from llm_api_server.lifecycle.config_handover import digest, pack, unpack


class ConfigFollower:
    """Applies each new configuration with `follow`, for requests that arrive from then on."""

    def __init__(self, config: Config, link: ManagerLink, follow: Callable[[Config], None]) -> None:
        self._link = link
        self._follow = follow
        self._digest = digest(pack(config))
        link.register({Configure: self._on_configure}, on_connect=self._on_connect)

    def _on_connect(self, hello: Hello) -> None:
        hello.config = self._digest

    def _on_configure(self, message: Configure) -> None:
        self._follow(unpack(message.config))
        self._digest = digest(message.config)
        self._link.send(Configured(self._digest))
        logger.info("following the changed configuration")
