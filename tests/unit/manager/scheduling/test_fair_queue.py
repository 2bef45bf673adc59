"""Order of the fair queue: shares by weight, no credit for idle keys, batches last, positions that come true."""

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

    def add(
        self, key: str, times: int = 1, *, now: float = 0, weight: float = 1, cost: int = 10, batch: bool = False
    ) -> None:
        for _ in range(times):
            waiter = next(self._ids)
            self.names[waiter] = f"{key}{1 + sum(name[: len(key)] == key for name in self.names.values())}"
            self.queue.add(Waiter(waiter, now, Claim(key, weight, cost, is_batch=batch)))

    def serve(self, times: int, now: float = 0) -> list[str]:
        served = [self.queue.pop(now, lambda _: True) for _ in range(times)]
        return [self.names[waiter.id] for waiter in served if waiter is not None]


def test_one_key_is_served_in_order_of_arrival() -> None:
    line = Line()
    line.add("x", 3)
    assert line.serve(4) == ["x1", "x2", "x3"]


def test_a_flood_does_not_delay_a_modest_key() -> None:
    line = Line()
    line.add("x", 50)
    assert line.serve(10) == [f"x{i}" for i in range(1, 11)]
    line.add("y", 2)
    assert line.serve(4) == ["y1", "x11", "x12", "y2"]


def test_keys_share_by_weight() -> None:
    line = Line()
    line.add("x", 40)
    line.add("y", 40, weight=3)
    served = line.serve(40)
    assert sum(name.startswith("y") for name in served) == 30


def test_keys_share_by_cost_and_not_by_requests() -> None:
    line = Line()
    line.add("x", 40, cost=30)
    line.add("y", 40, cost=10)
    assert sum(name.startswith("y") for name in line.serve(40)) == 30


def test_cost_beyond_the_claim_is_charged() -> None:
    line = Line()
    line.add("x", 20)
    line.add("y", 20)
    assert line.serve(2) == ["x1", "y1"]
    line.queue.charge("x", 90)
    assert line.serve(10) == [f"y{i}" for i in range(2, 11)] + ["x2"]


def test_an_idle_key_earns_no_credit() -> None:
    line = Line()
    line.add("x", 100)
    line.serve(50)
    line.add("y", 50)
    assert sum(name.startswith("y") for name in line.serve(20)) == 10


def test_batches_come_last_until_their_patience_ends() -> None:
    line = Line()
    line.add("b", 2, now=0, batch=True)
    line.add("x", 3, now=1)
    assert line.serve(2, now=2) == ["x1", "x2"]
    assert line.queue.since() == 1
    assert line.serve(1, now=BATCH_PATIENCE) == ["b1"]
    assert line.serve(2, now=BATCH_PATIENCE) == ["b2", "x3"]


def test_a_request_that_may_not_start_is_passed_over() -> None:
    line = Line()
    line.add("x", 2)
    line.add("y", 1)
    waiter = line.queue.pop(0, lambda claim: claim.key_id == "y")
    assert waiter is not None
    assert line.names[waiter.id] == "y1"
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


def test_the_interval_between_requests_is_measured_while_some_wait() -> None:
    line = Line()
    line.add("x", 5)
    for now in (0, 4, 8, 12, 16):
        line.serve(1, now=now)
    assert line.queue.interval == 4
    line.add("x", 2, now=1000)
    line.serve(2, now=1000)
    assert line.queue.interval is not None
    assert 0 < line.queue.interval < 4


requests_of_keys = st.tuples(
    st.sampled_from("xyz"), st.integers(1, 50), st.booleans(), st.sampled_from([0.5, 1.0, 4.0])
)


@given(st.lists(requests_of_keys, max_size=30), st.integers(0, 20))
def test_positions_predict_the_order(requests: list[tuple[str, int, bool, float]], before: int) -> None:
    line = Line()
    weights: dict[str, float] = {}
    for now, (key, cost, batch, weight) in enumerate(requests):
        line.add(key, now=now / 100, cost=cost, batch=batch, weight=weights.setdefault(key, weight))
    line.serve(before, now=1)
    positions = sorted(line.queue.positions(1).items(), key=lambda pair: pair[1])
    assert [position for _, position in positions] == list(range(1, len(positions) + 1))
    assert line.serve(len(positions), now=1) == [line.names[waiter] for waiter, _ in positions]


@given(st.lists(requests_of_keys, max_size=30), st.data())
def test_removed_requests_leave_no_trace(requests: list[tuple[str, int, bool, float]], data: st.DataObject) -> None:
    line = Line()
    for key, cost, batch, weight in requests:
        line.add(key, cost=cost, batch=batch, weight=weight)
    left = data.draw(st.sets(st.sampled_from(sorted(line.names)))) if line.names else set()
    for waiter in left:
        line.queue.remove(waiter)
        line.queue.remove(waiter)
    assert sorted(line.queue) == sorted(line.names.keys() - left)
    assert sum(line.queue.count_of(key) for key in "xyz") == len(line.queue)
    assert sorted(line.serve(99)) == sorted(line.names[w] for w in line.names.keys() - left)
    assert line.queue.since() is None
