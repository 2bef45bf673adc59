"""Messages about leases: an instance has slots, one for each request that it works on at a time.

`Granted` gives one request a slot, and may lend the worker more: it may start requests on these without asking, until
`RevokeSlots` names the instance. `ReturnSlots` gives slots back and counts them, so that a grant under way at that
moment is not lost. Slots lent for one request go back when it ends; slots lent until they are revoked go back together
once they have been idle for a while.

Field names and tags are a wire format between versions: `rename` keeps the encoded name of a renamed field.
"""

from __future__ import annotations

import msgspec

from llm_api_server.types import EngineName, Task


class InstanceInfo(msgspec.Struct, frozen=True):
    """Address and properties of an instance that a worker sends requests to.

    `address` is `unix:/path` or an `http(s)://host[:port][/prefix]` URL. `upstream_model` replaces `model` in the body
    when it is set. `headers` are sent with every request (a remote's own key). `model` is the configured name, also
    for that model's embedding instance; `tasks` distinguishes the two.
    """

    id: str
    model: str
    engine: EngineName
    address: str
    upstream_model: str | None = None
    headers: dict[str, str] = {}
    context_length: int | None = None
    tasks: tuple[Task, ...] | None = None


class Claim(msgspec.Struct, frozen=True, omit_defaults=True, rename={"cost": "work", "prefill_tokens": "reads"}):
    """Properties of a request that scheduling depends on: its key, its estimated cost and the length of its prompt.

    Keys share an instance by `weight`. Batch requests come after all others. A light request costs nothing and needs
    no slot.
    """

    key_id: str = ""
    weight: float = 1.0
    cost: int = 1
    prefill_tokens: int = 0
    is_batch: bool = False
    is_light: bool = False


NO_CLAIM = Claim()


class Acquire(msgspec.Struct, tag="acquire"):
    """Request a slot on an instance of `model` (a configured name, aliases resolved) that supports `task`, if given.

    The reply is `Granted` or `Refused`; `Queued` may come before it.
    """

    request: int
    model: str
    task: Task | None = None
    claim: Claim = NO_CLAIM


class Cancel(msgspec.Struct, tag="cancel"):
    """Withdraw an `Acquire`. The worker returns the slot of a `Granted` that is already under way as usual."""

    request: int


class PrefillDone(msgspec.Struct, tag="read", rename={"request": "number"}):
    """The request has its first token, so another prompt may be admitted to the instance."""

    request: int


class EndedRequest(msgspec.Struct, frozen=True, array_like=True):
    """A request that has ended. `extra_cost` is its cost beyond that of its claim; below zero if it cost less."""

    key_id: str
    extra_cost: int = 0


class ReturnSlots(msgspec.Struct, tag="release", omit_defaults=True, rename={"slots": "places"}):
    """Give `slots` back. `ended` lists the requests that ran on slots granted for one request each."""

    instance: str
    slots: int
    ended: list[EndedRequest] = []


class ReportInFlight(msgspec.Struct, tag="report"):
    """Requests in flight per instance id; `blocked` counts those whose clients do not read what has been sent.

    Sent at most a few times a second, only when changed.
    """

    in_flight: dict[str, int]
    blocked: dict[str, int] = {}


class Granted(msgspec.Struct, tag="granted", omit_defaults=True, rename={"slots": "places", "until_revoked": "keeps"}):
    """Grant `slots` on an instance, one of them for the request.

    With `until_revoked` the worker may reuse them until `RevokeSlots`; otherwise they go back when the request ends.
    `key_id` is that of the claim, for a worker whose client has disconnected meanwhile.
    """

    request: int
    instance: InstanceInfo
    slots: int = 1
    until_revoked: bool = False
    key_id: str = ""


class Queued(msgspec.Struct, tag="queued"):
    """Position of a waiting request in the queue, from 1.

    The field is `number` and not `request`, for this message does not complete the request.
    """

    number: int
    position: int


class RevokeSlots(msgspec.Struct, tag="reclaim"):
    """Return the free slots of this instance now, and every other one when its request ends.

    Sent when other requests wait for a slot, or the instance is about to be unloaded.
    """

    instance: str
