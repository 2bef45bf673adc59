"""Records of requests as the gateway's layers leave them."""

from __future__ import annotations

import time

from llm_api_server.auth.access import Key, Limits
from llm_api_server.gateway.metering.request_record import RequestRecord

LIMITS = Limits(requests_per_minute=10)


def new_record(limits: Limits = LIMITS) -> RequestRecord:
    record = RequestRecord("req", "POST", "/v1/chat/completions", time.monotonic())
    record.key = Key("ann", "id-of-ann", frozenset({"all"}), limits=limits)
    record.model = "m"
    return record
