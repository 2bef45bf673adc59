"""Blocking client of the manager, for the command line and shutdown hooks: one command per connection."""

from __future__ import annotations

import socket
from typing import TypeVar

from llm_api_server.errors import ControlError
from llm_api_server.ipc.framing import encode
from llm_api_server.ipc.messages import Command, CommandResponse, Refused, to_client_decoder
from llm_api_server.ipc.run_dir import RunDir

ResponseT = TypeVar("ResponseT", bound=CommandResponse)


def call(run_dir: RunDir, command: Command, response: type[ResponseT], *, timeout: float | None) -> ResponseT:
    """Send one command to a running manager and return its response.

    Raises `ControlError` if the manager does not respond within `timeout` seconds, or refuses.
    """
    decoder = to_client_decoder()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(run_dir.socket))
            connection.sendall(encode(command))
            while data := connection.recv(65536):
                for message in decoder.feed(data):
                    if isinstance(message, response) and message.request == command.request:
                        return message
                    if isinstance(message, Refused):
                        raise ControlError(message.message)
        except OSError as error:
            raise ControlError(f"no manager responds at {run_dir.socket}: {error}") from error
    raise ControlError("the manager closed the connection without a response")
