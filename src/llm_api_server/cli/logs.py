"""Command `logs`: the last lines of the server's log files, and lines added to them while the files are rotated."""

from __future__ import annotations

import heapq
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, NamedTuple, Self

import typer

from llm_api_server.cli import base
from llm_api_server.cli.base import ConfigOption, JsonOption
from llm_api_server.redaction import one_line
from llm_api_server.types import ExitCode

if TYPE_CHECKING:
    from llm_api_server.config.models import ModelConfig

_POLL_INTERVAL = 0.2
#: Logs that are shown if no name is given.
_DEFAULT = ("gateway", "manager")
_BLOCK = 64 * 1024
#: Start of a line unless `logging.format` differs. Such times sort as text.
_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?")
_COLOR = re.compile(r"\x1b\[[\d;]*m")


def logs(
    *,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="gateway|manager|zygote|MODEL", help="Log to show. Default: gateway and manager, merged by time."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing new lines until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, metavar="LINES", help="Number of lines to show.")] = 50,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Show the last lines of the server's logs. A model's log is the output of its engine.

    With --json, print one object per line.
    """
    with base.running_server(config) as loaded:
        paths = _chosen(loaded.models.available, loaded.log_dir, name)
        if not follow and not any(path.exists() for path in paths.values()):
            base.fail(_nothing_yet(loaded.log_dir, name), ExitCode.FAILED)
        with ExitStack() as stack:
            tails = [stack.enter_context(Tail(path, source)) for source, path in paths.items()]
            last = _merged([tail.last(lines) for tail in tails])
            show = _as_json if as_json else _labelled if len(tails) > 1 else _plain
            _print(last[max(0, len(last) - lines) :], show)
            if follow:
                with suppress(KeyboardInterrupt):
                    while True:
                        _print(_merged([tail.read() for tail in tails]), show)
                        time.sleep(_POLL_INTERVAL)


def _chosen(available: Mapping[str, ModelConfig], log_dir: Path, name: str | None) -> Mapping[str, Path]:
    """Return the log files to show, by name."""
    files = _log_files(available, log_dir)
    if name is None:
        return {process: files[process] for process in _DEFAULT}
    path = files.get(name)
    if path is None:
        model = next((model for model, entry in available.items() if name in {*entry.aliases, *entry.adapters}), None)
        if model is None:
            base.fail(f"There is no log '{name}'. Logs: {', '.join(files)}.", ExitCode.FAILED)
        path = files[model]
    return {name: path}


def _log_files(models: Iterable[str], log_dir: Path) -> Mapping[str, Path]:
    """Return the log files by name: processes, configured models, and engines that left a log."""
    from llm_api_server.log_file import engine_log

    files = {process: log_dir / f"{process}.log" for process in (*_DEFAULT, "zygote")}
    for model in models:
        files.setdefault(model, engine_log(log_dir, model))
    others = sorted(set((log_dir / "engines").glob("*.log")) - set(files.values()))
    return files | {path.stem: path for path in others if path.stem not in files}


def _nothing_yet(log_dir: Path, name: str | None) -> str:
    if name is None or name in {"gateway", "manager"}:
        return f"There are no logs in {log_dir} yet: the server writes them (`llm-api-server serve`)."
    return f"There is no log of {name} yet: its first load writes one (`llm-api-server models load NAME`)."


class LogLine(NamedTuple):
    """Line of a log. `time` is that of the last line with a time, so that tracebacks stay with their message."""

    time: str
    source: str
    text: str


class Tail:
    """End of one log file, which need not exist yet. Its context keeps the file open, so rotation loses no line."""

    def __init__(self, path: Path, source: str) -> None:
        self._path = path
        self._source = source
        self._file: IO[bytes] | None = None
        self._rest = b""
        self._time = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def last(self, count: int) -> list[LogLine]:
        """Return the last lines, including an incomplete one of a killed process. `read` continues after them."""
        self._open()
        if self._file is None:
            return []
        data, start = b"", self._file.seek(0, os.SEEK_END)
        while start > 0 and data.count(b"\n") <= count:
            size = min(_BLOCK, start)
            start -= size
            self._file.seek(start)
            data = self._file.read(size) + data
        self._file.seek(0, os.SEEK_END)
        lines = data.removesuffix(b"\n").split(b"\n") if data else []
        return self._parse(lines[max(0, len(lines) - count) :])

    def read(self) -> list[LogLine]:
        """Return the complete lines added since the last call, also to a file that has replaced this one."""
        lines = self._added()
        if self._is_replaced():
            self._open()
            lines += self._added()
        return lines

    def _open(self) -> None:
        if self._file is not None:
            self._file.close()
        self._rest = b""
        try:
            self._file = self._path.open("rb")
        except FileNotFoundError:
            self._file = None

    def _is_replaced(self) -> bool:
        try:
            current = self._path.stat()
        except FileNotFoundError:
            return False
        return self._file is None or not os.path.samestat(current, os.fstat(self._file.fileno()))

    def _added(self) -> list[LogLine]:
        if self._file is None:
            return []
        if os.fstat(self._file.fileno()).st_size < self._file.tell():  # the file was truncated
            self._file.seek(0)
            self._rest = b""
        *complete, self._rest = (self._rest + self._file.read()).split(b"\n")
        return self._parse(complete)

    def _parse(self, lines: Iterable[bytes]) -> list[LogLine]:
        parsed = []
        for line in lines:
            text = one_line(_COLOR.sub("", line.decode("utf-8", "replace").rstrip("\r")))
            if found := _TIME.match(text):
                self._time = found[0]
            parsed.append(LogLine(self._time, self._source, text))
        return parsed


def _merged(parts: Sequence[Sequence[LogLine]]) -> list[LogLine]:
    """Return the lines of several files by time; without times, one file after the other."""
    return list(heapq.merge(*parts, key=lambda line: line.time))


def _print(lines: Sequence[LogLine], show: Callable[[LogLine], str]) -> None:
    for line in lines:
        typer.echo(show(line))


def _plain(line: LogLine) -> str:
    return line.text


def _labelled(line: LogLine) -> str:
    return f"{line.source:7} | {line.text}"


def _as_json(line: LogLine) -> str:
    return json.dumps(line._asdict(), ensure_ascii=False)
