"""Decisions that hold for all requests with one head, so that a repeated head is decided once.

Kept in `RequestHead.cached`: for one request, or for as long as a connection repeats its head.
"""

from __future__ import annotations

from collections.abc import Mapping

from llm_api_server.auth.access import Key
from llm_api_server.auth.authenticator import KnownCaller
from llm_api_server.errors import PermissionDenied
from llm_api_server.gateway.http.body_limit import check_encoding
from llm_api_server.gateway.http.request_head import RequestHead
from llm_api_server.gateway.proxy.model_catalog import Found, ModelCatalog
from llm_api_server.gateway.wire.endpoints import ENDPOINTS, Endpoint
from llm_api_server.ipc.model_status import ModelStatus


class ResolvedModel:
    """Model that a name stands for, and the heads of requests for it, by instance.

    Valid as long as key, model statuses and configuration stay the same objects.
    """

    __slots__ = (
        "adapter", "context_length", "heads", "is_checked", "key", "knows_developer", "model", "models", "name",
        "revision", "status",
    )  # fmt: skip

    def __init__(self, found: Found, key: Key, models: Mapping[str, ModelStatus], catalog: ModelCatalog) -> None:
        self.model, self.adapter, self.name = found.model, found.adapter, found.name
        self.key = key
        self.models = models
        self.revision = catalog.revision
        self.knows_developer = catalog.knows_developer_role(found.model)
        self.status = models.get(found.model)
        self.context_length = self.status.context_length if self.status is not None else None
        #: Whether the endpoint is known to suit the model.
        self.is_checked = False
        #: First lines of the requests that instances get, by instance id.
        self.heads: dict[str, bytes] = {}


class HeadDecisions:
    """Endpoint, sender and models of the requests with one head."""

    __slots__ = ("endpoint", "key_changes", "known", "permitted", "resolved")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        #: Sender, valid while the authenticator counts `key_changes` changes.
        self.known: KnownCaller | None = None
        self.key_changes = -1
        #: Key that is known to be permitted what the head asks for.
        self.permitted: Key | None = None
        #: By the model name of the request.
        self.resolved: dict[str | None, ResolvedModel] = {}

    def check_permission(self, key: Key, head: RequestHead) -> None:
        """Raise `ApiError` if `key` is not permitted what the head asks for, or the body is compressed."""
        endpoint = self.endpoint
        if not key.may(endpoint.permission):
            raise PermissionDenied(f"Your key has no permission for {endpoint.path} ('{endpoint.permission}').")
        check_encoding(head.raw)
        self.permitted = key

    def resolve(
        self, wanted: str | None, key: Key, models: Mapping[str, ModelStatus], catalog: ModelCatalog
    ) -> ResolvedModel:
        """Return the model that `wanted` stands for. Raises `ApiError` if there is none, or none for this key."""
        resolved = self.resolved.get(wanted)
        if (
            resolved is None
            or resolved.key is not key
            or resolved.models is not models
            or resolved.revision != catalog.revision
        ):
            resolved = self.resolved[wanted] = ResolvedModel(catalog.find(wanted, key), key, models, catalog)
        return resolved


def decisions_of(head: RequestHead) -> HeadDecisions:
    """Return the decisions cached on `head`, which is one of an engine endpoint."""
    if head.cached is None:
        head.cached = HeadDecisions(ENDPOINTS[head.path])
    decisions: HeadDecisions = head.cached
    return decisions
