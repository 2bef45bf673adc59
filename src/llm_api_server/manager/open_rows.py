"""Rows of the ledger that are not settled, as far as this manager knows: what counts when a worker is lost. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from llm_api_server.usage import NO_USAGE, WORKER_LOST, Batch, Ended, Usage


@dataclass
class _Row:
    """`key_id` and `at` are unknown of rows that an earlier manager heard of first."""

    key_id: str | None = None
    at: float | None = None
    usage: Usage = NO_USAGE


class OpenRows:
    """By worker, by row."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, _Row]] = {}

    def workers(self) -> set[str]:
        return set(self._rows)

    def note(self, worker: str, batch: Batch) -> None:
        rows = self._rows.setdefault(worker, {})
        for started in batch.started:
            rows[started.row] = _Row(started.key_id, started.at)
        for progress in batch.progress:
            rows.setdefault(progress.row, _Row()).usage = progress.usage
        for ended in batch.ended:
            rows.pop(ended.row, None)

    def lose(self, worker: str, now: float) -> tuple[list[Ended], Counter[str]]:
        """What settles a lost worker's rows at `now` (Unix seconds), and their tokens by key."""
        ended = []
        tokens: Counter[str] = Counter()
        for name, row in self._rows.pop(worker, {}).items():
            duration = now - row.at if row.at is not None else 0.0
            ended.append(Ended(name, 0, WORKER_LOST, None, row.usage, None, None, duration))
            if row.key_id is not None:
                tokens[row.key_id] += row.usage.prompt_tokens + row.usage.completion_tokens
        return ended, tokens
