"""`{...:name}` in the path of a route: a name that may have slashes, before the commands that may follow it."""

from __future__ import annotations

from starlette.convertors import Convertor, register_url_convertor


class _Name(Convertor[str]):
    """What is or ends like a command is that command, whatever the method: such names are told by other means."""

    regex = r"(?!pull$)(?:(?!/(?:explain|load|pin|revoke|rotate|unload|unpin)$).)+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


def register() -> None:
    """To be called before routes are made."""
    register_url_convertor("name", _Name())
