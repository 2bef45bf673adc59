"""Whose turn it is: shares by weight, no credit for idleness, batches last, positions that come true."""

from __future__ import annotations

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.ipc.lease_messages import Claim
from llm_api_server.manager.scheduling.fair_queue import ACTIVE_TIME, BATCH_PATIENCE, FairQueue, Waiter


class Line:
    """A queue that names its waiters by key and number: `x1` is the first of `x`."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.names: dict[int, str] = {}
        self._ids = count(1)

    def ask(
        self, key: str, times: int = 1, *, now: float = 0, weight: float = 1, work: int = 10, batch: bool = False
    ) -> None:
        for _ in range(times):
            waiter = next(self._ids)
            self.names[waiter] = f"{key}{1 + sum(name[: len(key)] == key for name in self.names.values())}"
            self.queue.add(Waiter(waiter, now, Claim(key, weight, work, is_batch=batch)))

    def serve(self, times: int, now: float = 0) -> list[str]:
        turns = [self.queue.pop(now, lambda _: True) for _ in range(times)]
        return [self.names[turn.id] for turn in turns if turn is not None]


def test_one_key_is_served_in_the_order_it_came() -> None:
    line = Line()
    line.ask("x", 3)
    assert line.serve(4) == ["x1", "x2", "x3"]


def test_a_flood_does_not_delay_who_asks_for_little() -> None:
    line = Line()
    line.ask("x", 50)
    assert line.serve(10) == [f"x{i}" for i in range(1, 11)]
    line.ask("y", 2)
    assert line.serve(4) == ["y1", "x11", "x12", "y2"]


def test_turns_are_shared_by_weight() -> None:
    line = Line()
    line.ask("x", 40)
    line.ask("y", 40, weight=3)
    served = line.serve(40)
    assert sum(name.startswith("y") for name in served) == 30


def test_shares_are_of_work_not_of_requests() -> None:
    line = Line()
    line.ask("x", 40, work=30)
    line.ask("y", 40, work=10)
    assert sum(name.startswith("y") for name in line.serve(40)) == 30


def test_what_a_request_made_of_work_beyond_its_claim_counts() -> None:
    line = Line()
    line.ask("x", 20)
    line.ask("y", 20)
    assert line.serve(2) == ["x1", "y1"]
    line.queue.charge("x", 90)
    assert line.serve(10) == [f"y{i}" for i in range(2, 11)] + ["x2"]


def test_idleness_earns_no_credit() -> None:
    line = Line()
    line.ask("x", 100)
    line.serve(50)
    line.ask("y", 50)
    assert sum(name.startswith("y") for name in line.serve(20)) == 10


def test_batches_come_last_until_their_patience_ends() -> None:
    line = Line()
    line.ask("b", 2, now=0, batch=True)
    line.ask("x", 3, now=1)
    assert line.serve(2, now=2) == ["x1", "x2"]
    assert line.queue.since() == 1
    assert line.serve(1, now=BATCH_PATIENCE) == ["b1"]
    assert line.serve(2, now=BATCH_PATIENCE) == ["b2", "x3"]


def test_who_may_not_begin_is_passed_over() -> None:
    line = Line()
    line.ask("x", 2)
    line.ask("y", 1)
    turn = line.queue.pop(0, lambda claim: claim.key_id == "y")
    assert turn is not None
    assert line.names[turn.id] == "y1"
    assert line.queue.pop(0, lambda claim: claim.key_id == "y") is None
    assert len(line.queue) == 2


def test_other_keys_count_as_active_for_a_while() -> None:
    queue = FairQueue()
    queue.mark_active("x", 0)
    assert not queue.has_other_keys("x", 0)
    assert queue.has_other_keys("y", 0)
    queue.mark_active("y", 10)
    assert queue.has_other_keys("x", 10 + ACTIVE_TIME)
    assert not queue.has_other_keys("x", 10.1 + ACTIVE_TIME)


def test_the_time_between_turns_is_measured_while_somebody_waits() -> None:
    line = Line()
    line.ask("x", 5)
    for now in (0, 4, 8, 12, 16):
        line.serve(1, now=now)
    assert line.queue.interval == 4
    line.ask("x", 2, now=1000)
    line.serve(2, now=1000)
    assert line.queue.interval is not None
    assert 0 < line.queue.interval < 4


asked = st.tuples(st.sampled_from("xyz"), st.integers(1, 50), st.booleans(), st.sampled_from([0.5, 1.0, 4.0]))


@given(st.lists(asked, max_size=30), st.integers(0, 20))
def test_positions_tell_the_order_that_comes(requests: list[tuple[str, int, bool, float]], before: int) -> None:
    line = Line()
    weights: dict[str, float] = {}
    for now, (key, work, batch, weight) in enumerate(requests):
        line.ask(key, now=now / 100, work=work, batch=batch, weight=weights.setdefault(key, weight))
    line.serve(before, now=1)
    told = sorted(line.queue.positions(1).items(), key=lambda pair: pair[1])
    assert [position for _, position in told] == list(range(1, len(told) + 1))
    assert line.serve(len(told), now=1) == [line.names[waiter] for waiter, _ in told]


@given(st.lists(asked, max_size=30), st.data())
def test_who_leaves_is_forgotten(requests: list[tuple[str, int, bool, float]], data: st.DataObject) -> None:
    line = Line()
    for key, work, batch, weight in requests:
        line.ask(key, work=work, batch=batch, weight=weight)
    left = data.draw(st.sets(st.sampled_from(sorted(line.names)))) if line.names else set()
    for waiter in left:
        line.queue.remove(waiter)
        line.queue.remove(waiter)
    assert sorted(line.queue) == sorted(line.names.keys() - left)
    assert sum(line.queue.count_of(key) for key in "xyz") == len(line.queue)
    assert sorted(line.serve(99)) == sorted(line.names[w] for w in line.names.keys() - left)
    assert line.queue.since() is None
