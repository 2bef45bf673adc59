"""Messages about limits of keys: the manager counts them for all workers.

A request of a limited key is counted with `Admit` before it acquires a slot; `Settle` reports the tokens it used. While
a key is far from its limits, `Admitted` grants the worker quota in advance, from which it admits requests without
asking. `ReportQuota` reports what was used of it and returns what is not needed, or what `RevokeQuota` asks for.

Field names and tags are a wire format between versions: `rename` keeps the encoded name of a renamed field.
"""

from __future__ import annotations

import msgspec

from llm_api_server.auth.access import Limits


class RateLimit(msgspec.Struct, frozen=True):
    """A limit per minute. `remaining` can be used now; the whole `limit` is available again in `reset` seconds."""

    limit: int
    remaining: int
    reset: float


class RateLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """State of a key's limits per minute, for `x-ratelimit-*` headers; None for a limit that the key does not have."""

    requests: RateLimit | None = None
    tokens: RateLimit | None = None


class QuotaGrant(msgspec.Struct, frozen=True, omit_defaults=True, rename={"concurrent": "places"}):
    """Quota of a key lent to a worker: requests and tokens per minute, and concurrent requests.

    A limit that the key does not have is not granted, and no grant is needed for it.
    """

    requests: int = 0
    tokens: int = 0
    concurrent: int = 0


NO_GRANT = QuotaGrant()


class AdmittedRequest(msgspec.Struct, frozen=True):
    """An admitted request of a worker, by the worker's own number, and the tokens reserved for it."""

    request: int
    key_id: str
    reserved: int


class Admit(msgspec.Struct, tag="admit", rename={"optional_tokens": "spare"}):
    """Count a request of a limited key. The reply is `Admitted` or `Refused`.

    At least `tokens` are reserved, and up to `optional_tokens` more if the limits leave them. With `counts=False`
    nothing is counted: the reply only has the state of the key's limits.
    """

    request: int
    key_id: str
    name: str
    limits: Limits
    tokens: int = 0
    optional_tokens: int = 0
    counts: bool = True


class Settle(msgspec.Struct, tag="settle"):
    """An admitted request has ended or is abandoned; it used `tokens` of those that were reserved."""

    request: int
    tokens: int


class ReportQuota(
    msgspec.Struct, tag="spend", omit_defaults=True, rename={"returned": "back", "is_reply": "is_answer"}
):
    """Quota used since the last report: requests admitted, and tokens of requests that ended. `returned` goes back.

    `is_reply` marks the reply to a `RevokeQuota`.
    """

    key_id: str
    requests: int = 0
    tokens: int = 0
    returned: QuotaGrant = NO_GRANT
    is_reply: bool = False


class Admitted(msgspec.Struct, tag="admitted", rename={"rate_limits": "standing", "grant": "share"}):
    """Admit the request. `rate_limits` count this request; `grant` is quota for further requests of the key."""

    request: int
    rate_limits: RateLimits
    reserved: int = 0
    grant: QuotaGrant = NO_GRANT


class RevokeQuota(msgspec.Struct, tag="recall"):
    """Return what is left of the key's quota now, and the rest when its requests end: another worker needs it."""

    key_id: str
