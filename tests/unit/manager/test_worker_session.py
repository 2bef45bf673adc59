"""Slots and requests of a worker, as the manager counts them."""

from __future__ import annotations

from llm_api_server.ipc.lease_messages import EndedRequest
from llm_api_server.ipc.messages import Hello, KeysChanged
from llm_api_server.manager.worker_session import WorkerSession, WorkerSessions
from tests.manager_doubles import FakeWorkerSession


def new_session() -> WorkerSession:
    return WorkerSession(lambda _: None)


def test_slots_are_taken_back_only_as_far_as_they_are_held() -> None:
    session = new_session()
    session.lend("i", 3)
    assert session.take_back("i", 2) == 2
    assert session.has_slots("i")
    assert session.take_back("i", 2) == 1
    assert not session.has_slots("i")
    assert session.take_back("i", 1) == 0


def test_a_disconnected_worker_gives_back_its_slots_with_the_requests_that_did_not_end() -> None:
    session = new_session()
    session.lend("i", 4)
    for request, key_id in enumerate(("ann", "bob", "ann")):
        session.lend_for(request, key_id, "j", 10 + request)
    session.take_back("j", 1, [EndedRequest("ann"), EndedRequest("unknown")])
    assert session.end_prefill(1) == ("j", 11)
    assert session.end_prefill(1) is None
    assert session.end_all_prefills() == [("j", 10), ("j", 12)]
    assert list(session.take_all_back()) == [("i", 4, []), ("j", 2, [EndedRequest("bob"), EndedRequest("ann")])]
    assert list(session.take_all_back()) == []


def test_slots_count_as_one_request_in_flight_until_the_first_report() -> None:
    session = new_session()
    session.lend("i", 100)
    assert session.in_flight("i") == 1
    session.report({"i": 7}, {})
    assert session.in_flight("i") == 7
    session.take_back("i", 100)
    assert session.in_flight("i") == 0


def test_an_instance_has_readers_unless_all_clients_are_blocked() -> None:
    sessions, first, second = WorkerSessions(), new_session(), new_session()
    sessions.add(first)
    sessions.add(second)
    first.report({"i": 2}, {"i": 2})
    assert not sessions.has_readers("i")
    second.report({"i": 2}, {"i": 1})
    assert sessions.has_readers("i")
    assert sessions.in_flight("i") == 4


def test_only_workers_are_published_to() -> None:
    sessions, worker, command_line = WorkerSessions(), FakeWorkerSession(), FakeWorkerSession()
    command_line.is_worker = False
    worker.register(Hello(7, worker="w"))
    for session in (worker, command_line):
        sessions.add(session)
    sessions.publish(KeysChanged())
    assert (worker.sent, command_line.sent, sessions.names) == ([KeysChanged()], [], {"w"})
    sessions.remove(worker)
    assert sessions.workers == []
