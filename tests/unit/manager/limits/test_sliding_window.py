"""The sum over the last minute."""

from __future__ import annotations

from itertools import pairwise

from llm_api_server.manager.limits.sliding_window import SlidingWindow


def test_a_busy_minute_takes_few_entries() -> None:
    window = SlidingWindow()
    for step in range(100_000):
        window.add(step / 1000, 1)
    assert len(window._entries) <= 1000
    window.total(99.999)
    assert len(window._entries) <= 601
    assert all(first.at < second.at for first, second in pairwise(window._entries))
