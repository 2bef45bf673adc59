"""Admission of requests to the limits of their keys, on the worker's loop.

Keys without limits cost no message. While a key is far from its limits, requests are admitted from quota that the
manager has granted in advance; otherwise the manager decides on each. Quota that no request uses goes back.
"""

from __future__ import annotations

import asyncio

from llm_api_server.auth.access import NO_LIMITS, Key
from llm_api_server.errors import ApiError
from llm_api_server.event_loop.eager_task import ensure_task
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering.quota_grant import HeldQuota
from llm_api_server.gateway.metering.ratelimit_headers import ratelimit_headers
from llm_api_server.gateway.metering.request_record import RequestRecord
from llm_api_server.ipc.messages import Hello
from llm_api_server.ipc.quota_messages import (
    NO_GRANT,
    Admit,
    Admitted,
    AdmittedRequest,
    ReportQuota,
    RevokeQuota,
    Settle,
)
from llm_api_server.ipc.usage_events import Usage

#: Seconds between two reports of used quota.
REPORT_INTERVAL = 0.5
#: Seconds that a response waits for its rate-limit headers.
PEEK_TIMEOUT = 1.0


class AdmissionClient:
    """Admitted requests of one worker, and the quota that it holds."""

    def __init__(self, link: ManagerLink, report_interval: float = REPORT_INTERVAL) -> None:
        self._link = link
        self._report_interval = report_interval
        self._pending: dict[int, RequestRecord] = {}
        #: Keys of requests that were cancelled before the manager decided. Its reply may bring a grant.
        self._cancelled: dict[int, Key] = {}
        self._admitted: dict[int, AdmittedRequest] = {}
        self._held: dict[str, HeldQuota] = {}
        #: Requests admitted from held quota, with the tokens that each reserved.
        self._taken: dict[int, tuple[HeldQuota, int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        link.register({Admitted: self._on_admitted, RevokeQuota: self._on_revoke}, on_connect=self._on_connect)

    async def admit(self, record: RequestRecord, tokens: int, optional_tokens: int) -> None:
        """Count a request against its key's limits and set its rate-limit headers. Raises the manager's refusal.

        `tokens` are reserved, and up to `optional_tokens` more if the limits leave them.
        """
        if self.admit_from_held(record, tokens + optional_tokens):
            return
        key = record.key
        assert key is not None
        number = self._link.next_number()
        self._pending[number] = record
        try:
            await self._link.call(Admit(number, key.key_id, key.name, key.limits, tokens, optional_tokens))
        except ApiError as error:
            self._pending.pop(number, None)
            record.limit_lines = ratelimit_headers(error.rate_limits) if error.rate_limits is not None else None
            raise
        except asyncio.CancelledError:
            if self._pending.pop(number, None) is not None:
                self._cancelled[number] = key
            self._admitted.pop(number, None)
            self._link.send(Settle(number, 0))
            raise

    def admit_from_held(self, record: RequestRecord, tokens: int) -> bool:
        """Admit a request if its key has no limits or the quota held for it suffices."""
        key = record.key
        assert key is not None
        held = self._held.get(key.key_id)
        if held is None or (held.limits is not key.limits and held.limits != key.limits):
            return key.limits == NO_LIMITS
        if (lines := held.take(tokens)) is None:
            return False
        record.limit_lines = lines
        number = record.admission = next(self._link.numbers)
        self._taken[number] = held, tokens
        return True

    async def peek(self, key: Key) -> bytes | None:
        """Return rate-limit headers without counting a request; None if the key has no limit per minute.

        Also None if the manager does not reply within `PEEK_TIMEOUT`.
        """
        limits = key.limits
        if limits.requests_per_minute is None and limits.tokens_per_minute is None:
            return None
        await ensure_task()
        message = Admit(self._link.next_number(), key.key_id, key.name, limits, counts=False)
        try:
            async with asyncio.timeout(PEEK_TIMEOUT):
                response = await self._link.call(message, repeats=False)
        except (ApiError, TimeoutError):
            return None
        return ratelimit_headers(response.rate_limits)

    def settle(self, number: int, usage: Usage) -> None:
        """Report the tokens that an admitted request used. Has no effect on a request that is already settled."""
        tokens = usage.prompt_tokens + usage.completion_tokens
        if (taken := self._taken.pop(number, None)) is not None:
            held, reserved = taken
            held.settle(reserved, tokens)
            if held.is_revoked:
                self._return(held)
        elif self._admitted.pop(number, None) is not None:
            self._link.send(Settle(number, tokens))

    def close(self) -> None:
        """Report the quota that was used."""
        if self._timer is not None:
            self._timer.cancel()
        self._report()

    def _on_admitted(self, message: Admitted) -> None:
        """Apply the manager's reply as it arrives: a `RevokeQuota` may follow before the caller resumes."""
        number = message.request
        record = self._pending.pop(number, None)
        key = record.key if record is not None else self._cancelled.pop(number, None)
        if key is None:
            return
        held = self._held.get(key.key_id)
        if message.grant != NO_GRANT:
            held = self._add(key, message)
        elif held is not None:
            held.update(message.rate_limits)
        if record is not None:
            record.admission = number
            record.limit_lines = held.headers() if held is not None else ratelimit_headers(message.rate_limits)
            self._admitted[number] = AdmittedRequest(number, key.key_id, message.reserved)

    def _add(self, key: Key, message: Admitted) -> HeldQuota:
        held = self._held.get(key.key_id)
        if held is not None and held.limits != key.limits:  # the limits were changed meanwhile
            held.is_revoked = True
            self._return(held)
            held = None
        if held is None:
            held = self._held[key.key_id] = HeldQuota(key.key_id, key.limits)
        held.add(message.grant, message.rate_limits)
        self._plan_report()
        return held

    def _on_revoke(self, message: RevokeQuota) -> None:
        held = self._held.get(message.key_id)
        if held is None:
            self._link.send(ReportQuota(message.key_id, is_reply=True))
            return
        held.is_revoked = True
        self._return(held, is_reply=True)

    def _return(self, held: HeldQuota, *, is_reply: bool = False) -> None:
        """Give free quota back, and forget it once no request runs on it."""
        if (report := held.report(returns=True, is_reply=is_reply)) is not None:
            self._link.send(report)
        if not held.is_running and self._held.get(held.key_id) is held:
            del self._held[held.key_id]

    def _plan_report(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._report_interval, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._report()
        if self._held:
            self._plan_report()

    def _report(self) -> None:
        for held in list(self._held.values()):
            if held.is_idle:
                self._return(held)
            elif (report := held.report(returns=held.is_revoked)) is not None:
                self._link.send(report)

    def _on_connect(self, hello: Hello) -> None:
        """Give up all held quota, which a new manager does not know: requests admitted from it are announced singly."""
        for number, (held, reserved) in self._taken.items():
            self._admitted[number] = AdmittedRequest(number, held.key_id, reserved)
        self._taken.clear()
        self._held.clear()
        self._cancelled.clear()
        hello.admitted = list(self._admitted.values())
