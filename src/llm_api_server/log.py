"""Where the log lines of gateway and manager go: loguru's sinks as configured, with everything else led into them.

`setup_logging` is called once per process, by whoever starts it. No key or token reaches a sink, whatever the level.
Lines that come by the thousand are written together (`log_lines`).
"""

from __future__ import annotations

import inspect
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from loguru import logger

from llm_api_server.config.models import Config
from llm_api_server.log_file import SharedLogFile
from llm_api_server.redaction import Redactor, one_line

if TYPE_CHECKING:  # loguru has them for type checkers only
    from loguru import Message, Record

Process = Literal["gateway", "manager"]

#: Servers that bring handlers of their own, and chatter that repeats what our request lines say.
_FOREIGN = ("uvicorn", "uvicorn.error", "uvicorn.asgi", "gunicorn", "gunicorn.error")
_SILENCED = ("uvicorn.access", "gunicorn.access")
#: Libraries whose information is of interest to their own makers.
_QUIET = ("alembic",)
#: Between lines that are logged together. It is a control character, so no message has it.
_SEPARATOR = "\x1e"
_LINES = "lines"


def setup_logging(config: Config, process: Process) -> None:
    """Write to the console and `<path>/<process>.log`, as configured. Called again, it replaces what it set.

    A log directory that cannot be written is a warning on the console, not an end.
    """
    options = config.logging
    logger.remove()
    logger.configure(patcher=_Cleaner(config))
    shown: dict[str, Any] = {"level": options.level, "format": options.format, "backtrace": False, "diagnose": False}
    path = config.log_dir / f"{process}.log"
    reason = _add_file(path, config, shown)
    if reason is not None or options.console:
        logger.add(_Lines(sys.stderr), colorize=sys.stderr.isatty(), **shown)
    if reason is not None:
        logger.warning("cannot write the log file {}: {}; logging to standard error", path, reason)
    _lead_standard_logging(options.level)


def log_lines(level: str, lines: Sequence[str]) -> None:
    """Log each of `lines` as a message of its own, all with the same time: for the cost of little more than one."""
    logger.bind(**{_LINES: True}).log(level, "{}", _SEPARATOR.join(map(one_line, lines)))


class _Writable(Protocol):
    def write(self, message: str, /) -> Any: ...


class _Lines:
    """A sink in front of another: what was logged together becomes lines of their own, written at once."""

    def __init__(self, sink: _Writable) -> None:
        self._sink = sink

    def write(self, message: Message) -> None:
        together = message.record["message"]
        if _SEPARATOR in together:
            before, _, after = message.partition(together)
            record = message.record
            message = type(message)("".join(f"{before}{line}{after}" for line in together.split(_SEPARATOR)))
            message.record = record
        self._sink.write(message)

    def flush(self) -> None:
        if hasattr(self._sink, "flush"):
            self._sink.flush()

    def stop(self) -> None:
        if hasattr(self._sink, "stop"):
            self._sink.stop()


class InterceptHandler(logging.Handler):
    """Hands records of the standard library's logging to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level: str | int = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        logger.opt(depth=_depth_of_caller(), exception=record.exc_info).log(level, "{}", record.getMessage())


class _Cleaner:
    """Loguru's patcher: takes secrets out of message, extra fields and traceback, and keeps a line a line.

    Only lines of a traceback begin new lines, and those are indented, so that no message can forge an entry.
    """

    def __init__(self, config: Config) -> None:
        self._redact = Redactor(_secrets(config))

    def __call__(self, record: Record) -> None:
        if _LINES in record["extra"]:
            del record["extra"][_LINES]
            record["message"] = self._redact(record["message"])
            return
        message = self._redact(one_line(record["message"]))
        exception = record["exception"]
        if exception is not None:
            lines = traceback.format_exception(exception.type, exception.value, exception.traceback)
            shown = self._redact("".join(lines)).splitlines()
            message = "\n    ".join([message, *(one_line(line) for line in shown)])
            record["exception"] = None
        record["message"] = message
        for name, value in record["extra"].items():
            record["extra"][name] = self._redact(one_line(str(value)))


def _secrets(config: Config) -> list[str]:
    plain = [entry.key for entry in config.auth.api_keys if not entry.is_hashed]
    remote = [model.api_key for model in config.models.available.values() if model.api_key]
    return [*plain, *remote, *([config.auth.secret_key] if config.auth.secret_key else [])]


def _add_file(path: Path, config: Config, shown: dict[str, Any]) -> str | None:
    """Why the file cannot be written, or None."""
    try:
        sink = SharedLogFile(path, config.logging.rotation, config.logging.retention)
    except OSError as error:
        return error.strerror or str(error)
    logger.add(_Lines(sink), **shown)
    return None


def _lead_standard_logging(level: str) -> None:
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
    """How far up the stack the code is that logged, seen from `InterceptHandler.emit`."""
    frame, depth = inspect.currentframe(), 0
    while frame is not None and (depth == 0 or frame.f_code.co_filename in {__file__, logging.__file__}):
        frame, depth = frame.f_back, depth + 1
    return max(depth - 1, 0)
