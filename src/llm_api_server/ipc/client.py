"""One command to a running manager and its answer, for the command line and shutdown hooks: blocking."""

from __future__ import annotations

import socket
from typing import TypeVar

from llm_api_server.errors import ControlError
from llm_api_server.ipc.framing import encode
from llm_api_server.ipc.messages import Command, CommandResponse, Refused, to_client_decoder
from llm_api_server.ipc.run_dir import RunDir

AnswerT = TypeVar("AnswerT", bound=CommandResponse)


def call(run_dir: RunDir, command: Command, answer: type[AnswerT], *, timeout: float | None) -> AnswerT:
    """Send one command to a running manager and wait for its `answer`.

    Raises `ControlError` when no manager answers within `timeout` seconds or it refuses.
    """
    decoder = to_client_decoder()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(run_dir.socket))
            connection.sendall(encode(command))
            while data := connection.recv(65536):
                for message in decoder.feed(data):
                    if isinstance(message, answer) and message.request == command.request:
                        return message
                    if isinstance(message, Refused):
                        raise ControlError(message.message)
        except OSError as error:
            raise ControlError(f"no manager answers at {run_dir.socket}: {error}") from error
    raise ControlError("the manager closed the connection without an answer")
