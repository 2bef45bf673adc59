"""Sessions of the connected workers: the process, the slots and the requests in flight of each.

Only the manager's loop changes it, by the methods here. A command line has a session too, which holds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from llm_api_server.ipc.lease_messages import EndedRequest
from llm_api_server.ipc.messages import Hello, ToClient


@dataclass
class _LentSlots:
    """Slots of one instance. `key_ids` has the key of each request on a slot that was granted for it alone."""

    count: int = 0
    key_ids: list[str] = field(default_factory=list)


class WorkerSession:
    """Connection of a worker, and what the manager knows of it. `send` writes a message to it.

    `name` is unique for the life of the worker, over connections. `config_digest` identifies the configuration it uses.
    """

    def __init__(self, send: Callable[[ToClient], None]) -> None:
        self.send = send
        self.is_worker = False
        self.pid = 0
        self.name = ""
        self.config_digest = ""
        self._lent: dict[str, _LentSlots] = {}
        #: By the worker's number of a request in prefill: the instance, and the scheduler's number of the request.
        self._prefilling: dict[int, tuple[str, int]] = {}
        self._in_flight: dict[str, int] = {}
        self._blocked: dict[str, int] = {}

    def register(self, hello: Hello) -> None:
        """Make it the session of the worker that sent `hello`."""
        self.is_worker = True
        self.pid, self.name, self.config_digest = hello.pid, hello.worker, hello.config
        self._in_flight = hello.in_flight

    def restore(self, instance: str, slots: int) -> None:
        """Lend the slots that an earlier manager lent."""
        self._lent[instance] = _LentSlots(slots)

    def lend(self, instance: str, slots: int) -> None:
        """Lend slots until they are revoked."""
        self._lent.setdefault(instance, _LentSlots()).count += slots

    def lend_for(self, request: int, key_id: str, instance: str, waiter: int) -> None:
        """Lend one slot for one request, which begins with its prefill. `waiter` is the scheduler's number of it."""
        self.lend(instance, 1)
        self._lent[instance].key_ids.append(key_id)
        self._prefilling[request] = (instance, waiter)

    def end_prefill(self, request: int) -> tuple[str, int] | None:
        """Return the instance and the scheduler's number; None for a request that another manager granted."""
        return self._prefilling.pop(request, None)

    def end_all_prefills(self) -> list[tuple[str, int]]:
        prefills, self._prefilling = list(self._prefilling.values()), {}
        return prefills

    def take_back(self, instance: str, slots: int, ended: Iterable[EndedRequest] = ()) -> int:
        """Count slots that the worker returns, and return how many of them it held."""
        lent = self._lent.get(instance, _LentSlots())
        slots = min(lent.count, slots)
        lent.count -= slots
        for one in ended:
            if one.key_id in lent.key_ids:
                lent.key_ids.remove(one.key_id)
        if lent.count == 0:
            self._lent.pop(instance, None)
            self._in_flight.pop(instance, None)
        return slots

    def take_all_back(self) -> Iterator[tuple[str, int, list[EndedRequest]]]:
        """Yield, for each instance, the slots that a disconnected worker held and the requests that ran on them."""
        lent, self._lent = self._lent, {}
        for instance, one in lent.items():
            yield instance, one.count, [EndedRequest(key_id) for key_id in one.key_ids]

    def forget(self, instance: str) -> None:
        """Drop the slots of an instance that has ended."""
        self._lent.pop(instance, None)

    def report(self, in_flight: dict[str, int], blocked: dict[str, int]) -> None:
        """Apply the worker's report of its requests in flight, and of those whose clients do not read."""
        self._in_flight, self._blocked = in_flight, blocked

    def has_slots(self, instance: str) -> bool:
        return instance in self._lent

    def in_flight(self, instance: str) -> int:
        """Return the requests in flight; slots whose first report is still to come count as one."""
        return self._in_flight.get(instance, 1 if instance in self._lent else 0)

    def has_readers(self, instance: str) -> bool:
        """Return whether some request in flight has a client that reads its response."""
        return self._in_flight.get(instance, 0) > self._blocked.get(instance, 0)


class WorkerSessions:
    """Open sessions."""

    def __init__(self) -> None:
        self._sessions: set[WorkerSession] = set()

    def add(self, session: WorkerSession) -> None:
        self._sessions.add(session)

    def remove(self, session: WorkerSession) -> None:
        self._sessions.discard(session)

    @property
    def workers(self) -> list[WorkerSession]:
        """Sessions of workers, without those of command lines."""
        return [session for session in self._sessions if session.is_worker]

    @property
    def names(self) -> set[str]:
        return {session.name for session in self.workers}

    def publish(self, message: ToClient) -> None:
        """Send a message to every worker."""
        for session in self.workers:
            session.send(message)

    def holding(self, instance: str) -> list[WorkerSession]:
        """Return the sessions with slots of the instance."""
        return [session for session in self._sessions if session.has_slots(instance)]

    def forget(self, instance: str) -> None:
        """Drop the slots of an instance that has ended."""
        for session in self._sessions:
            session.forget(instance)

    def in_flight(self, instance: str) -> int:
        return sum(session.in_flight(instance) for session in self._sessions)

    def has_readers(self, instance: str) -> bool:
        """Return whether requests are in flight on the instance whose clients read their responses."""
        return any(session.has_readers(instance) for session in self._sessions)
