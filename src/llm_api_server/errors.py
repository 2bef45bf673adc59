"""The exception tree, and the JSON bodies of its errors. Pure.

    ServerError
    ├── ConfigError                    the configuration is unusable; lists all problems; exit code 2
    ├── ControlError                   the manager is unreachable or refused a command
    ├── Unreachable                    no server responds at an address; exit code 3
    ├── StoreError                     the database is unusable, perhaps only for now
    ├── DownloadError                  a model cannot be downloaded
    └── ApiError                       has status, type, code, message, param
        ├── InvalidRequest         400 type invalid_request_error
        │   ├── ContextLengthExceeded  code context_length_exceeded
        │   ├── NotSupported           code not_supported (the model or engine cannot do it)
        │   ├── InvalidConfiguration   code invalid_configuration (the file cannot be reloaded)
        │   ├── InvalidKeyField        a field of a key has a wrong value; has field, reason
        │   ├── KeyInConfiguration     the configuration file is the place to change this key
        │   └── KeyRevoked             a revoked key stays revoked
        ├── InvalidKey             401 code invalid_api_key
        ├── PermissionDenied       403 code permission_denied
        ├── UnknownEndpoint        404 code unknown_url
        ├── ModelNotFound          404 code model_not_found
        ├── LogNotFound            404 code log_not_found
        ├── DownloadNotFound       404 code pull_not_found
        ├── KeyNotFound            404 code key_not_found
        ├── MethodNotAllowed       405 code method_not_allowed
        ├── BodyTimeout            408 code body_timeout
        ├── ModelNotLoaded         409 code model_not_loaded
        ├── NotRemovable           409 code model_not_removable (the message says what to do)
        ├── NameTaken              409 code name_taken
        ├── RequestTooLarge        413 code request_too_large
        ├── RateLimited            429 code rate_limit_exceeded
        ├── SlowDown               429 code slow_down (too many requests of this key are queued)
        ├── InsufficientQuota      429 code insufficient_quota (a token budget is spent)
        ├── InternalError          500 code internal_error (a bug in this server; details are in the log)
        ├── EngineError            500 code engine_error
        │   └── BadEngineResponse  502 code engine_error (what came is no response, or not a whole one)
        ├── ModelLoadFailed        503 code model_load_failed
        ├── ModelLoading           503 code model_loading (the model will not be ready in time)
        ├── ServerOverloaded       503 code server_overloaded (too many requests are queued)
        ├── EngineUnavailable      503 code engine_unavailable
        ├── IssuerUnavailable      503 code issuer_unavailable (an identity provider's keys are unavailable)
        ├── StoreUnavailable       503 code store_unavailable (the database is unreachable)
        ├── ShuttingDown           503 code server_shutting_down
        └── RequestTimeout         504 code timeout

A `code` is stable; a message may change. `tests/unit/test_errors.py` compares the diagram with the classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class ServerError(Exception):
    """Root of the tree."""


class ConfigError(ServerError):
    """`problems` are complete sentences for a person, one per problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ControlError(ServerError):
    """The manager did not respond, or refused a command."""


class Unreachable(ServerError):
    """No server responds at an address."""


class StoreError(ServerError):
    """The database is unusable, perhaps only for now. The message holds no password."""


class DownloadError(ServerError):
    """A model cannot be downloaded; the message gives the reason and the remedy."""


class ApiError(ServerError):
    """An error that is rendered to a client.

    `retry_after` (seconds) becomes a `Retry-After` header, rounded up. `should_retry=False` becomes
    `x-should-retry: false`, which the official SDKs honour: waiting does not help.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        message = _encodable(message)
        super().__init__(message)
        self.message = message
        self.param = param and _encodable(param)
        self.retry_after = retry_after
        self.should_retry = should_retry
        #: `ipc.quota_messages.RateLimits` of the key, if they are the reason.
        self.rate_limits: Any = None
        #: Position of the request in the queue of its model, or the one it would have had.
        self.position: int | None = None

    @property
    def kind(self) -> str:
        """The name of the error in logs and the ledger; a message may repeat a client's text."""
        return self.code or self.type


class InvalidRequest(ApiError):
    status, type = 400, "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class NotSupported(InvalidRequest):
    code = "not_supported"


class InvalidConfiguration(InvalidRequest):
    code = "invalid_configuration"


class InvalidKeyField(InvalidRequest):
    """`reason` is a sentence that gives the allowed values of `field`."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"Invalid '{field}': {reason}", param=field)
        self.field = field
        self.reason = reason


class KeyInConfiguration(InvalidRequest): ...


class KeyRevoked(InvalidRequest): ...


class InvalidKey(ApiError):
    status, type, code = 401, "invalid_request_error", "invalid_api_key"


class PermissionDenied(ApiError):
    status, type, code = 403, "invalid_request_error", "permission_denied"


class UnknownEndpoint(ApiError):
    status, type, code = 404, "invalid_request_error", "unknown_url"


class ModelNotFound(ApiError):
    status, type, code = 404, "invalid_request_error", "model_not_found"


class LogNotFound(ApiError):
    status, type, code = 404, "invalid_request_error", "log_not_found"


class DownloadNotFound(ApiError):
    status, type, code = 404, "invalid_request_error", "pull_not_found"


class KeyNotFound(ApiError):
    status, type, code = 404, "invalid_request_error", "key_not_found"


class MethodNotAllowed(ApiError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class ModelNotLoaded(ApiError):
    status, type, code = 409, "invalid_request_error", "model_not_loaded"


class NotRemovable(ApiError):
    status, type, code = 409, "invalid_request_error", "model_not_removable"


class NameTaken(ApiError):
    status, type, code = 409, "invalid_request_error", "name_taken"


class RequestTooLarge(ApiError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class RateLimited(ApiError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class SlowDown(ApiError):
    status, type, code = 429, "rate_limit_error", "slow_down"


class InsufficientQuota(ApiError):
    status, type, code = 429, "insufficient_quota", "insufficient_quota"


class InternalError(ApiError):
    status, code = 500, "internal_error"


class EngineError(ApiError):
    status, code = 500, "engine_error"


class BadEngineResponse(EngineError):
    status = 502


class ModelLoadFailed(ApiError):
    status, type, code = 503, "service_unavailable_error", "model_load_failed"


class ModelLoading(ApiError):
    status, type, code = 503, "service_unavailable_error", "model_loading"


class ServerOverloaded(ApiError):
    status, type, code = 503, "service_unavailable_error", "server_overloaded"


class EngineUnavailable(ApiError):
    status, type, code = 503, "service_unavailable_error", "engine_unavailable"


class IssuerUnavailable(ApiError):
    status, type, code = 503, "service_unavailable_error", "issuer_unavailable"


class StoreUnavailable(ApiError):
    status, type, code = 503, "service_unavailable_error", "store_unavailable"


class ShuttingDown(ApiError):
    status, type, code = 503, "service_unavailable_error", "server_shutting_down"


class BodyTimeout(ApiError):
    """The client does not send the rest of its request. The connection cannot be used again."""

    status, type, code = 408, "timeout_error", "body_timeout"


class RequestTimeout(ApiError):
    status, type, code = 504, "timeout_error", "timeout"


def _encodable(text: str) -> str:
    """Return `text` with lone surrogates, which a client's JSON may contain, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_body(message: str, type_: str, code: str | None = None, param: str | None = None) -> bytes:
    """Return OpenAI's error body (openai-openapi `Error`): all four fields, `code` and `param` a string or null."""
    error: dict[str, Any] = {"message": message, "type": type_, "param": param, "code": code}
    return msgspec.json.encode({"error": error})


#: Anthropic's error types by status (docs.anthropic.com/en/api/errors); anything else is `api_error`.
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error_body(status: int, message: str) -> bytes:
    """Return the error body that `/v1/messages` clients parse."""
    kind = _ANTHROPIC_TYPES.get(status, "api_error")
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})


def render(error: ApiError, *, anthropic: bool = False) -> bytes:
    """Return the JSON body of `error`."""
    if anthropic:
        return anthropic_error_body(error.status, error.message)
    return error_body(error.message, error.type, error.code, error.param)


def error_from_code(code: str, message: str, **options: Any) -> ApiError:
    """Return the error that the manager sent as `code`; `EngineUnavailable` for an unknown code."""
    return _BY_CODE.get(code, EngineUnavailable)(message, **options)


#: Without `InternalError`: a bug in the manager becomes `EngineUnavailable`, which clients retry.
_BY_CODE = {
    error.code: error
    for error in tuple(vars().values())
    if isinstance(error, type)
    and issubclass(error, ApiError)
    and error.code
    and error not in (InternalError, BadEngineResponse)
}
