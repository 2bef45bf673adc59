"""`/admin/api/reload`: the configuration file, read again. Needs `admin`."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from llm_api_server.config.change import Effect
from llm_api_server.gateway.manager_link.link import ManagerLink
from llm_api_server.gateway.routes.admin_models import require_admin
from llm_api_server.ipc import messages


class ConfigChange(BaseModel):
    """One option. Secrets are hidden; null: it is not there."""

    path: str
    before: str | None
    after: str | None
    effect: Effect = Field(
        description="now; model: when what it concerns has been loaded anew, which has begun; restart: not before that."
    )


class ReloadReport(BaseModel):
    """What changed, or, with `applied: false`, what would."""

    applied: bool
    late_workers: int = Field(description="API workers that had not followed in time.")
    changes: list[ConfigChange]


def config_routes(link: ManagerLink) -> APIRouter:
    router = APIRouter(prefix="/admin/api", tags=["admin"], dependencies=[Depends(require_admin)])

    @router.post("/reload", summary="Follow the configuration file as it is now")
    async def reload(*, dry_run: bool = False) -> ReloadReport:
        answer = await link.call(messages.ReloadConfig(link.next_number(), dry_run), repeats=False)
        assert isinstance(answer, messages.Reloaded), "what the manager answers to that"
        changes = [ConfigChange(**msgspec.to_builtins(change)) for change in answer.changes]
        return ReloadReport(applied=answer.applied, late_workers=answer.late, changes=changes)

    return router
