"""Keeps the garbage collector from long pauses. Called by processes that are to answer quickly, when they are ready."""

from __future__ import annotations

import gc

#: Requests leave few cycles behind: more objects than usual may come together before they are looked through.
_THRESHOLDS = (20_000, 20, 50)


def tune_gc() -> None:
    """What is there now stays: looked through again and again it would cost pauses of tens of milliseconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
