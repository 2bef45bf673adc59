"""ASGI app of an API worker: its parts, the order of its layers, its start and its end."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import compile_path
from starlette.types import ASGIApp

from llm_api_server.auth.accepted_tokens import token_issuers, token_signer
from llm_api_server.auth.authenticator import Authenticator
from llm_api_server.auth.keys import KeyRing
from llm_api_server.config.models import Config
from llm_api_server.errors import ApiError, InternalError, InvalidRequest
from llm_api_server.event_loop.gc_tuning import tune_gc
from llm_api_server.gateway.http.body_limit import BODY_TIMEOUT
from llm_api_server.gateway.http.responder import REQUEST_HANDLER
from llm_api_server.gateway.manager_link.config_follower import ConfigFollower
from llm_api_server.gateway.manager_link.key_source import KeySource
from llm_api_server.gateway.manager_link.leases import Leases
from llm_api_server.gateway.manager_link.link import ManagerLink, ManagerProcess
from llm_api_server.gateway.manager_link.model_commands import ModelCommands
from llm_api_server.gateway.metering.access_log import AccessLog
from llm_api_server.gateway.metering.admission import AdmissionClient
from llm_api_server.gateway.metering.completion import RequestCompletion
from llm_api_server.gateway.metering.request_record import RequestRecord, record_of
from llm_api_server.gateway.metering.usage_reporter import UsageReporter
from llm_api_server.gateway.middleware import (
    AuthenticationMiddleware,
    Dispatcher,
    ErrorMiddleware,
    RequestIdMiddleware,
    method_not_allowed,
)
from llm_api_server.gateway.proxy.front_door import EngineProxy
from llm_api_server.gateway.proxy.model_catalog import ModelCatalog
from llm_api_server.gateway.proxy.running_requests import RunningRequests
from llm_api_server.gateway.routes import openapi
from llm_api_server.gateway.routes.admin_downloads import download_routes
from llm_api_server.gateway.routes.admin_keys import key_routes
from llm_api_server.gateway.routes.admin_models import admin_model_routes
from llm_api_server.gateway.routes.admin_requests import live_request_routes
from llm_api_server.gateway.routes.admin_server import server_routes
from llm_api_server.gateway.routes.console import ConsoleFiles, console_routes
from llm_api_server.gateway.routes.public import PUBLIC_PATHS, metrics_routes, model_routes, system_routes, token_routes
from llm_api_server.gateway.routes.store_access import StoreAccess
from llm_api_server.gateway.routes.usage import admin_usage_routes, usage_routes
from llm_api_server.gateway.wire.endpoints import ENDPOINTS
from llm_api_server.gateway.wire.error_response import INTERNAL_ERROR, error_response
from llm_api_server.gateway.wire.known_paths import unknown_url
from llm_api_server.http_client.client import HttpClient
from llm_api_server.ipc.run_dir import RunDir
from llm_api_server.lifecycle.config_handover import joined_config
from llm_api_server.log import setup_logging

CONSOLE_FILES = ConsoleFiles()
_EXPOSED_HEADERS = [
    "x-request-id",
    "openai-processing-ms",
    "retry-after",
    "x-should-retry",
    "x-queue-position",
    *(f"x-ratelimit-{part}-{what}" for what in ("requests", "tokens") for part in ("limit", "remaining", "reset")),
]


def create_app(config: Config | None = None) -> ASGIApp:
    """Return the app of one worker.

    Without `config` the worker follows the server that it joins, or else reads the file named by the environment.
    Raises `ConfigError`.
    """
    if config is None:
        config = joined_config()
    setup_logging(config, "gateway")
    run_dir = RunDir(config.ensure_run_dir())
    process = ManagerProcess(config)

    def follow(config: Config) -> None:
        setup_logging(config, "gateway")
        process.config = config

    return build_app(config, Leases(ManagerLink(run_dir, process.ensure_started)), HttpClient(), follow)


def build_app(
    config: Config,
    leases: Leases,
    client: HttpClient,
    follow_first: Callable[[Config], None] = lambda _: None,
    *,
    running: RunningRequests | None = None,
    body_timeout: float = BODY_TIMEOUT,
) -> ASGIApp:
    """Return the app around the given parts. A changed configuration goes to `follow_first` before them."""
    store = StoreAccess(config.storage_url, config.auth, config.source)
    worker = build_worker(config, leases, client, running or RunningRequests(), body_timeout)
    authenticator = worker.authenticator

    def follow(config: Config) -> None:
        follow_first(config)
        worker.configure(config)
        store.configure(config.auth)

    ConfigFollower(config, leases.link, follow)
    # The layers, innermost first.
    app: ASGIApp = Dispatcher(
        dict.fromkeys(ENDPOINTS, worker.proxy.serve),
        _routes(worker, store, _lifespan(worker, store)),
        body_timeout,
    )
    app = AuthenticationMiddleware(app, authenticator=authenticator, public=PUBLIC_PATHS | CONSOLE_FILES.paths)
    app = ErrorMiddleware(app)
    if config.server.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.server.cors_origins,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=_EXPOSED_HEADERS,
        )
    return RequestIdMiddleware(app, worker.completion)


@dataclass(frozen=True)
class Worker:
    """Parts of a worker that live as long as it does."""

    leases: Leases
    client: HttpClient
    authenticator: Authenticator | None
    catalog: ModelCatalog
    admission: AdmissionClient
    usage: UsageReporter
    completion: RequestCompletion
    running: RunningRequests
    proxy: EngineProxy

    async def start(self) -> None:
        await self.leases.link.start()
        self.running.start()

    async def close(self) -> None:
        """End all requests, and send the last reports before the connection to the manager closes."""
        self.running.close()
        self.completion.log.flush()
        self.usage.close()
        self.admission.close()
        self.leases.close()
        await self.leases.link.close()
        self.client.close()

    def configure(self, config: Config) -> None:
        """Apply a changed configuration to requests from now on."""
        self.catalog.configure(config.models, _written_at(config.source))
        if self.authenticator is not None:
            self.authenticator.configure(
                KeyRing(config.auth), token_signer(config.auth), token_issuers(config.auth, config.folder)
            )
        self.proxy.configure(config)


def build_worker(
    config: Config,
    leases: Leases,
    client: HttpClient,
    running: RunningRequests,
    body_timeout: float = BODY_TIMEOUT,
) -> Worker:
    """Return the parts of a worker, which need no app around them."""
    link = leases.link
    authenticator = _authenticator(config, link) if config.auth.enabled else None
    catalog = ModelCatalog(config.models, _written_at(config.source))
    admission, usage = AdmissionClient(link), UsageReporter(link)
    completion = RequestCompletion(AccessLog(), admission, usage)
    proxy = EngineProxy(
        config,
        authenticator=authenticator,
        catalog=catalog,
        leases=leases,
        client=client,
        admission=admission,
        usage=usage,
        completion=completion,
        running=running,
        body_timeout=body_timeout,
    )
    return Worker(leases, client, authenticator, catalog, admission, usage, completion, running, proxy)


def _authenticator(config: Config, link: ManagerLink) -> Authenticator:
    source = KeySource(link)
    ring, tokens = KeyRing(config.auth), token_signer(config.auth)
    authenticator = Authenticator(ring, source, tokens=tokens, issuers=token_issuers(config.auth, config.folder))
    source.when_changed(authenticator.invalidate)
    return authenticator


def _written_at(file: Path) -> int:
    """Return when the configuration was written: `created` of all models, the same in all workers."""
    try:
        return int(file.stat().st_mtime)
    except OSError:
        return 0


_Lifespan = Callable[[FastAPI], contextlib.AbstractAsyncContextManager[Mapping[str, Any]]]


def _lifespan(worker: Worker, store: StoreAccess) -> _Lifespan:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        await worker.start()
        tune_gc()
        try:
            yield {REQUEST_HANDLER: worker.proxy}
        finally:
            await worker.close()
            store.close()

    return lifespan


def _routes(worker: Worker, store: StoreAccess, lifespan: _Lifespan) -> FastAPI:
    catalog, leases, link = worker.catalog, worker.leases, worker.leases.link
    app = FastAPI(docs_url=None, redoc_url=None, lifespan=lifespan, redirect_slashes=False)
    app.openapi = lambda: openapi.describe(app)  # type: ignore[method-assign] # FastAPI's documented way
    docs_page = resources.files(__package__).joinpath("docs.html").read_text()
    app.include_router(system_routes(link, docs_page))
    app.include_router(metrics_routes(link, worker.usage))
    app.include_router(model_routes(catalog, leases))
    app.include_router(token_routes(worker.authenticator))
    app.include_router(admin_model_routes(catalog, ModelCommands(link)))
    app.include_router(console_routes(CONSOLE_FILES))
    app.include_router(download_routes(link))
    app.include_router(server_routes(link))
    app.include_router(live_request_routes(link))
    app.include_router(key_routes(store))
    app.include_router(usage_routes(store))
    app.include_router(admin_usage_routes(store))
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(RequestValidationError, _on_error)
    app.add_exception_handler(Exception, _on_error)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    """Return the error response of a route. FastAPI raises unexpected errors again afterwards, for the log."""
    record = record_of(request.scope)
    if isinstance(error, HTTPException) and error.status_code == 405 and record.method == "OPTIONS":  # noqa: PLR2004
        return Response(status_code=204, headers={"allow": _allowed(request)})
    known = _as_api_error(error, request, record)
    record.error = known.kind
    status, headers, body = error_response(known, request.url.path)
    return Response(body, status, {name.decode(): value.decode() for name, value in headers})


def _as_api_error(error: Exception, request: Request, record: RequestRecord) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _as_invalid_request(error)
    if isinstance(error, HTTPException) and error.status_code == 404:  # noqa: PLR2004
        return unknown_url(record.method, request.scope["path"], _known_paths(request))
    if isinstance(error, HTTPException) and error.status_code == 405:  # noqa: PLR2004
        return method_not_allowed(record.method, _allowed(request), record)
    if isinstance(error, HTTPException) and error.status_code < 500:  # noqa: PLR2004
        return InvalidRequest(str(error.detail))
    return InternalError(INTERNAL_ERROR)


def _known_paths(request: Request) -> set[str]:
    """Return the paths of all routes and engine endpoints that name no single thing."""
    paths = {str(route.path) for route in iter_route_contexts(request.app.routes)}
    return {path for path in paths if "{" not in path} | ENDPOINTS.keys()


def _allowed(request: Request) -> str:
    """Return the methods of this path, each of which has a route of its own."""
    routes = [route for route in iter_route_contexts(request.app.routes) if route.path is not None]
    matching = [route for route in routes if compile_path(str(route.path))[0].match(request.url.path)]
    return ", ".join(sorted({method for route in matching for method in route.methods or ()}))


def _as_invalid_request(error: RequestValidationError) -> InvalidRequest:
    """Return the first problem, with OpenAI's `param`."""
    problem = error.errors()[0]
    param = ".".join(str(part) for part in problem["loc"][1:]) or None
    if problem["type"] == "json_invalid":
        return InvalidRequest("We could not parse the JSON body of your request.")
    return InvalidRequest(f"Invalid '{param}': {problem['msg']}." if param else f"{problem['msg']}.", param=param)
