"""The server's log files: which there are, their last lines, and what is added to them while others rotate them."""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Self

from llm_api_server.config.models import Config
from llm_api_server.log_file import engine_log
from llm_api_server.redaction import one_line

#: Shown when nothing is named.
DEFAULT = ("gateway", "manager")
_PROCESSES = (*DEFAULT, "zygote")
_BLOCK = 64 * 1024
#: How lines begin unless `logging.format` says otherwise; texts in their order are times in theirs.
_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?")
#: Engines colour their lines.
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


class Line(NamedTuple):
    """`time` is that of the last line with one, so that the lines of a traceback stay with their message."""

    time: str
    source: str
    text: str


class Tail:
    """One file, which need not exist yet. A context: it keeps the file open, and so finds the end of a rotated one."""

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

    def last(self, count: int) -> list[Line]:
        """The last lines, also one without its end, as a process leaves that is killed. `read` goes on behind them."""
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
        return self._lines(lines[max(0, len(lines) - count) :])

    def read(self) -> list[Line]:
        """Whole lines that were added since, also to the file that has taken its place."""
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
            now = self._path.stat()
        except FileNotFoundError:
            return False
        return self._file is None or not os.path.samestat(now, os.fstat(self._file.fileno()))

    def _added(self) -> list[Line]:
        if self._file is None:
            return []
        if os.fstat(self._file.fileno()).st_size < self._file.tell():  # somebody has emptied it
            self._file.seek(0)
            self._rest = b""
        *whole, self._rest = (self._rest + self._file.read()).split(b"\n")
        return self._lines(whole)

    def _lines(self, lines: Iterable[bytes]) -> list[Line]:
        made = []
        for line in lines:
            text = one_line(_COLOUR.sub("", line.decode("utf-8", "replace").rstrip("\r")))
            if found := _TIME.match(text):
                self._time = found[0]
            made.append(Line(self._time, self._source, text))
        return made


def merged(parts: Sequence[Sequence[Line]]) -> list[Line]:
    """Those of several files by time; where the format of the log has none, one file after the other."""
    return list(heapq.merge(*parts, key=lambda line: line.time))


def known(config: Config) -> Mapping[str, Path]:
    """Files by name: of the processes, the configured models, and engines that have left one."""
    found = {process: config.log_dir / f"{process}.log" for process in _PROCESSES}
    for model in config.models.available:
        found.setdefault(model, engine_log(config.log_dir, model))
    left = sorted(set((config.log_dir / "engines").glob("*.log")) - set(found.values()))
    return found | {path.stem: path for path in left if path.stem not in found}


def find(config: Config, files: Mapping[str, Path], name: str) -> Path | None:
    """By one of the names of `known`, or by an alias or adapter of a model."""
    for model, entry in config.models.available.items():
        if name in {*entry.aliases, *entry.adapters} and name not in files:
            return files[model]
    return files.get(name)
