"""`/metrics`: what the whole server counts, in Prometheus' text format. Needs `metrics`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from llm_api_server.errors import PermissionDenied
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.metering.usage_reporter import UsageReporter
from llm_api_server.gateway.routes.public import KeyDependency
from llm_api_server.ipc import messages

_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class _Text(Response):
    media_type = _TEXT


def metrics_routes(link: ManagerLink, usage: UsageReporter) -> APIRouter:
    router = APIRouter(tags=["system"])

    @router.get("/metrics", summary="Counters and gauges of all processes", response_class=_Text)
    async def metrics(key: KeyDependency) -> Response:
        if not key.may("metrics"):
            raise PermissionDenied("Your key has no permission for the metrics ('metrics').")
        usage.report()  # else what has just ended would be missing; other workers' comes within half a second
        answer = await link.call(messages.GetMetrics(link.next_number()))
        assert isinstance(answer, messages.MetricsText), "what the manager answers to that"
        return _Text(answer.text)

    return router
