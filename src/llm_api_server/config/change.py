"""Change of an option between two configurations, as `reload` reports it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Effect = Literal["now", "model", "restart"]

_NOTES: dict[Effect, str] = {"now": "", "model": " (affected models load again)", "restart": " (after a restart)"}


class Change(msgspec.Struct, frozen=True):
    """Change of one option, by a path such as `models.available.NAME.max_tokens`; null: absent. Secrets are hidden."""

    path: str
    before: str | None
    after: str | None
    effect: Annotated[
        Effect,
        msgspec.Meta(
            description="now: applies to requests from now on; model: the affected models are loaded again after their "
            "requests; restart: applies after the next start of the server."
        ),
    ]

    def __str__(self) -> str:
        note = _NOTES[self.effect]
        if self.before is None:
            return f"{self.path}: added: {self.after}{note}"
        if self.after is None:
            return f"{self.path}: removed: {self.before}{note}"
        return f"{self.path}: {self.before} -> {self.after}{note}"
