"""Log file that several processes write and rotate, in loguru's terms, and the files of engine logs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loguru._file_sink
from loguru import logger

#: loguru has rotation and retention only in its file sink; called directly, the sink can run under a lock.
_FileSink: Any = loguru._file_sink.FileSink  # noqa: SLF001
#: Level below that of every other sink.
_PROBE_LEVEL = 0

Rule = str | int | None


class SharedLogFile:
    """Sink of loguru. Each write holds a lock beside the file, so that no line is lost in a rotation; a
    character that UTF-8 cannot carry is escaped.

    Raises `OSError` if the file cannot be written.
    """

    def __init__(self, path: Path, rotation: Rule, retention: Rule) -> None:
        self._path = path
        self._open: Callable[[], Any] = lambda: _FileSink(
            path, rotation=rotation, retention=retention, mode="a", errors="backslashreplace"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._sink = self._open()
        self._inode = _inode(path)

    def write(self, message: str) -> None:
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            if _inode(self._path) != self._inode:
                # Another process has rotated the file; a new sink takes size and age from the new file.
                self._sink.stop()
                self._sink = self._open()
            self._sink.write(message)
            self._inode = _inode(self._path)
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def stop(self) -> None:
        self._sink.stop()
        os.close(self._lock)


def engine_log(log_dir: Path, model: str) -> Path:
    """Return the path of the log of a model's engine."""
    return log_dir / "engines" / f"{model.replace('/', '_')}.log"


def format_problem(text: str) -> str | None:
    """Return the reason why loguru cannot use `text` as a format, or None."""
    probe = logger.bind(is_probe=True)
    try:
        handler = logger.add(
            lambda _: None, format=text, level=_PROBE_LEVEL, catch=False,
            filter=lambda record: "is_probe" in record["extra"],
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        return str(error)
    try:
        probe.log(_PROBE_LEVEL, "probe")
    except KeyError as error:
        return f"there is no field {error}; fields are time, level, message, name, function, line, process, thread, …"
    except (ValueError, AttributeError, IndexError, TypeError) as error:
        return str(error)
    finally:
        logger.remove(handler)
    return None


def rotation_problem(rule: Rule) -> str | None:
    """Return the reason why loguru cannot use `rule` as `rotation`, or None."""
    return _refusal(rotation=rule)


def retention_problem(rule: Rule) -> str | None:
    """Return the reason why loguru cannot use `rule` as `retention`, or None."""
    return _refusal(retention=rule)


def _refusal(**rules: Rule) -> str | None:
    try:
        _FileSink("unused", delay=True, **rules)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0
