"""A worker follows the configuration that the manager gives it. A part of the worker's link to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loguru import logger

from llm_api_server.config.models import Config
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.ipc import messages
from llm_api_server.lifecycle.config_handover import digest, pack, unpack


class ConfigFollower:
    """`follow` makes the worker do what a configuration says, for requests that come from then on."""

    def __init__(self, config: Config, link: ManagerLink, follow: Callable[[Config], None]) -> None:
        self._link = link
        self._follow = follow
        self._digest = digest(pack(config))
        self.handlers: dict[type, Callable[[Any], None]] = {messages.Configure: self._on_configure}
        link.add(self)

    def greet(self, hello: messages.Hello) -> None:
        hello.config = self._digest

    def connected(self) -> None:
        """The manager sends another configuration where it has one."""

    def _on_configure(self, message: messages.Configure) -> None:
        self._follow(unpack(message.config))
        self._digest = digest(message.config)
        self._link.send(messages.Configured(self._digest))
        logger.info("following the configuration as it is now")
