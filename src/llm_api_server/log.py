"""Logging of gateway and manager: loguru sinks as configured, with the standard library's logging passed to them.

Set up once per process. No key or token reaches a sink, whatever the level.
"""

from __future__ import annotations

import inspect
import logging
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from loguru import logger

from llm_api_server.config.models import AuthConfig, Config, ModelsConfig
from llm_api_server.log_file import SharedLogFile
from llm_api_server.redaction import Redactor, one_line

if TYPE_CHECKING:  # loguru defines them for type checkers only
    from loguru import Message, Record

Process = Literal["gateway", "manager"]

#: Loggers of servers that install handlers of their own, and access logs that repeat the request lines.
_FOREIGN = ("uvicorn", "uvicorn.error", "uvicorn.asgi", "gunicorn", "gunicorn.error")
_SILENCED = ("uvicorn.access", "gunicorn.access")
#: Libraries whose INFO messages do not help an operator.
_QUIET = ("alembic",)
#: Separator of lines that are logged as one message. Messages contain no control characters.
_SEPARATOR = "\x1e"
_LINES = "lines"


def setup_logging(config: Config, process: Process) -> None:
    """Log to the console and to `<path>/<process>.log`, as configured. Replaces an earlier setup.

    If the log file cannot be written, log a warning and use the console.
    """
    options = config.logging
    logger.remove()
    logger.configure(patcher=_Cleaner(_secrets(config.auth, config.models)))
    common: dict[str, Any] = {"level": options.level, "format": options.format, "backtrace": False, "diagnose": False}
    path = config.log_dir / f"{process}.log"
    reason = None
    try:
        sink = SharedLogFile(path, options.rotation, options.retention)
        logger.add(_Lines(sink), **common)
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None or options.console:
        logger.add(_Lines(sys.stderr), colorize=sys.stderr.isatty(), **common)
    if reason is not None:
        logger.warning("cannot write the log file {}: {}; logging to standard error", path, reason)
    _intercept_standard_logging(options.level)


def log_lines(level: str, lines: Sequence[str]) -> None:
    """Log each of `lines` as a message with the same time, at little more than the cost of one message."""
    logger.bind(**{_LINES: True}).log(level, "{}", _SEPARATOR.join(map(one_line, lines)))


class _Writable(Protocol):
    def write(self, message: str, /) -> Any: ...


class _Lines:
    """Sink in front of another one; splits the messages of `log_lines` and writes their lines in one call."""

    def __init__(self, sink: _Writable) -> None:
        self._sink = sink

    def write(self, message: Message) -> None:
        text = message.record["message"]
        if _SEPARATOR in text:
            before, _, after = message.partition(text)
            record = message.record
            message = type(message)("".join(f"{before}{line}{after}" for line in text.split(_SEPARATOR)))
            message.record = record
        self._sink.write(message)

    def flush(self) -> None:
        if hasattr(self._sink, "flush"):
            self._sink.flush()

    def stop(self) -> None:
        if hasattr(self._sink, "stop"):
            self._sink.stop()


class InterceptHandler(logging.Handler):
    """Handler that passes records of the standard library's logging to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level: str | int = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        logger.opt(depth=_depth_of_caller(), exception=record.exc_info).log(level, "{}", record.getMessage())


class _Cleaner:
    """Patcher of loguru: removes secrets and line breaks from message, extra fields and traceback.

    Only lines of a traceback start a new line, indented, so that no message can forge an entry.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        self._redact = Redactor(secrets)

    def __call__(self, record: Record) -> None:
        if _LINES in record["extra"]:
            del record["extra"][_LINES]
            record["message"] = self._redact(record["message"])
            return
        message = self._redact(one_line(record["message"]))
        exception = record["exception"]
        if exception is not None:
            lines = traceback.format_exception(exception.type, exception.value, exception.traceback)
            redacted = self._redact("".join(lines)).splitlines()
            message = "\n    ".join([message, *(one_line(line) for line in redacted)])
            record["exception"] = None
        record["message"] = message
        for name, value in record["extra"].items():
            record["extra"][name] = self._redact(one_line(str(value)))


def _secrets(auth: AuthConfig, models: ModelsConfig) -> list[str]:
    plain = [entry.key for entry in auth.api_keys if not entry.is_hashed]
    remote = [model.api_key for model in models.available.values() if model.api_key]
    return [*plain, *remote, *([auth.secret_key] if auth.secret_key else [])]


def _intercept_standard_logging(level: str) -> None:
    logging.captureWarnings(capture=True)
    logging.basicConfig(handlers=[InterceptHandler()], level=logger.level(level).no, force=True)
    for name in _FOREIGN:
        foreign = logging.getLogger(name)
        foreign.handlers, foreign.propagate = [], True
        foreign.setLevel(logging.NOTSET)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SILENCED:
        silenced = logging.getLogger(name)
        silenced.handlers, silenced.propagate = [], False


def _depth_of_caller() -> int:
    """Return the depth of the stack frame that logged, seen from `InterceptHandler.emit`."""
    frame, depth = inspect.currentframe(), 0
    while frame is not None and (depth == 0 or frame.f_code.co_filename in {__file__, logging.__file__}):
        frame, depth = frame.f_back, depth + 1
    return max(depth - 1, 0)
