"""Waits for conditions, with a limit that only keeps a broken test from hanging."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


def wait_until(condition: Callable[..., object], *, timeout: float = 120) -> None:
    """Block until `condition()` is true. Raise TimeoutError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        _check(condition, end, timeout)
        time.sleep(0.05)


async def until(condition: Callable[..., object], *, timeout: float = 120) -> None:
    """Suspend until `condition()` is true. Raise TimeoutError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        _check(condition, end, timeout)
        await asyncio.sleep(0.01)


def _check(condition: Callable[..., object], end: float, timeout: float) -> None:
    if time.monotonic() > end:
        raise TimeoutError(f"not true within {timeout} s: {condition}")
