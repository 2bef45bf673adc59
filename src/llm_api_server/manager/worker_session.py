"""Who asks the manager, and for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llm_api_server.ipc.lease_messages import Claim
from llm_api_server.ipc.messages import ToClient
from llm_api_server.types import Task


class WorkerSession(Protocol):
    """A connected worker or command line."""

    is_worker: bool
    #: Of a worker.
    pid: int
    #: Places it holds per instance, the keys of those that were asked for, and what it says is in flight there.
    grants: dict[str, int]
    running: dict[str, list[str]]
    #: By the client's number of a request that reads its prompt: the instance, and the scheduler's number.
    reading: dict[int, tuple[str, int]]
    in_flight: dict[str, int]
    #: Of those, what waits for its client to read.
    blocked: dict[str, int]

    def send(self, message: ToClient) -> None: ...


@dataclass(frozen=True)
class Query:
    """What a client asks for. `model` is a configured name, for a command also a twin's; a request has a claim."""

    request: int
    model: str
    task: Task | None = None
    claim: Claim | None = None
