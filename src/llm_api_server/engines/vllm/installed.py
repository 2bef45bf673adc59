"""Parsers of the installed vLLM, listed by its own interpreter (`vllm_parsers.py`) and cached on disk.

An entry of the cache is valid until vLLM's files change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from threading import Lock

import msgspec

_SCRIPT = Path(__file__).with_name("vllm_parsers.py")
_QUICK_TIMEOUT = 10.0
_IMPORT_TIMEOUT = 180.0


class VllmNotInstalled(Exception):
    """The interpreter is missing or has no vLLM."""


class ParserNames(msgspec.Struct, frozen=True):
    """Parsers that vLLM registers, by registry."""

    tool: frozenset[str]
    reasoning: frozenset[str]


class _Output(msgspec.Struct):
    """Output of the script. `files` change when vLLM changes."""

    tool: frozenset[str] = frozenset()
    reasoning: frozenset[str] = frozenset()
    files: list[str] = []
    missing: bool = False
    slow: bool = False


class _CacheEntry(msgspec.Struct):
    python: str
    stamps: dict[str, tuple[int, int]]
    names: ParserNames


class InstalledVllm:
    """The vLLM of one interpreter. `cache` is the folder of the disk cache."""

    def __init__(self, python: str, cache: Path | None = None) -> None:
        self.python = python
        self._file = (cache or cache_folder()) / f"vllm-{hashlib.sha256(python.encode()).hexdigest()[:16]}.json"
        self._lock = Lock()
        self._entry: _CacheEntry | None = None
        self._has_failed = False

    def parser_names(self, *, may_import: bool) -> ParserNames | None:
        """Return the parsers that vLLM registers, or None if they cannot be listed. Raises `VllmNotInstalled`.

        Blocking: call it in a thread. It takes 0.1 s, or nothing if cached. A version that lists its parsers only
        after an import takes many seconds, and is not started without `may_import`.
        """
        with self._lock:
            entry = self._entry or self._read()
            if entry is None or entry.python != self._resolved or entry.stamps != _stamps(entry.stamps):
                entry = None if self._has_failed else self._list(may_import=may_import)
            self._entry, self._has_failed = entry, entry is None and may_import
            return entry.names if entry else None

    @property
    def _resolved(self) -> str:
        return shutil.which(self.python) or self.python

    def _list(self, *, may_import: bool) -> _CacheEntry | None:
        python = self._resolved
        output = _run(python, "quick", _QUICK_TIMEOUT)
        if output is not None and output.slow and may_import:
            output = _run(python, "import", _IMPORT_TIMEOUT)
        if output is not None and output.missing:
            raise VllmNotInstalled
        if output is None or output.slow:
            return None
        entry = _CacheEntry(python, _stamps(output.files), ParserNames(output.tool, output.reasoning))
        self._write(entry)
        return entry

    def _read(self) -> _CacheEntry | None:
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._file.read_bytes(), type=_CacheEntry)
        return None

    def _write(self, entry: _CacheEntry) -> None:
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(msgspec.json.encode(entry))
            temporary.replace(self._file)


def cache_folder() -> Path:
    """Return the user's cache folder for this program (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "llm-api-server"  # noqa: PTH117


def _run(python: str, mode: str, timeout: float) -> _Output | None:
    """Run the script and return its output, or None if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        # Passed as text, because modules of its folder could hide those of the standard library.
        result = subprocess.run(
            [python, "-c", _SCRIPT.read_text("utf-8"), mode],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd="/", env=environment, timeout=timeout, check=True,
        )  # fmt: skip
        return msgspec.json.decode(result.stdout.splitlines()[-1], type=_Output)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise VllmNotInstalled from None
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError, IndexError):
        return None


def _stamps(files: list[str] | dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return modification time and size of each file; zeros for a missing one."""
    stamps = {}
    for file in files:
        try:
            stat = Path(file).stat()
            stamps[file] = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            stamps[file] = (0, 0)
    return stamps
