"""The decisions of the scheduler, as data. The manager carries them out in order. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from llm_api_server.engines.base import NO_PLACEMENT, Placement


@dataclass(frozen=True)
class Start:
    """Start an instance. `on_ready` or `on_exited` follows."""

    instance: str
    model: str
    placement: Placement = NO_PLACEMENT


@dataclass(frozen=True)
class Revoke:
    """Ask the workers to return their free slots on the instance and to use no more of them without asking."""

    instance: str


@dataclass(frozen=True)
class Sleep:
    """Free the device memory and keep the process. `on_slept` or `on_sleep_failed` follows.

    Level 1 keeps the weights in RAM, level 2 drops them. From level 1 to 2 the instance wakes in between.
    """

    instance: str
    level: int
    from_level: int = 0


@dataclass(frozen=True)
class Wake:
    """Wake a sleeping instance. `on_ready` or `on_sleep_failed` follows."""

    instance: str
    level: int


@dataclass(frozen=True)
class Stop:
    """End the process. `on_stopped` follows in any case."""

    instance: str


@dataclass(frozen=True)
class Grant:
    """Grant a request a slot. `slots` counts it and those that the worker may reuse `until_revoked`."""

    waiter: int
    instance: str
    slots: int = 1
    until_revoked: bool = False
    key_id: str = ""


@dataclass(frozen=True)
class Done:
    """A load or unload command has completed."""

    waiter: int


@dataclass(frozen=True)
class Refuse:
    """Refuse a request or a command. `code` is one of `errors.py`; `retry_after` in seconds."""

    waiter: int
    code: str
    message: str
    retry_after: float | None = None
    position: int | None = None


Decision = Start | Revoke | Sleep | Wake | Stop | Grant | Done | Refuse
