"""Garbage collection without long pauses, for processes that must respond quickly."""

from __future__ import annotations

import gc

#: Requests leave few cycles behind, so collections may be rarer than by default (700, 10, 10).
_THRESHOLDS = (20_000, 20, 50)


def tune_gc() -> None:
    """Exclude the objects of the start from collection: scanning them costs pauses of tens of milliseconds."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
