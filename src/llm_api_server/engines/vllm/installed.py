"""What the installed vLLM offers, asked of its own interpreter (`vllm_parsers.py`) and remembered on disk.

Used by the vLLM adapter and by the checks of a configuration. An answer holds until vLLM's files change.
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
    tool: frozenset[str]
    reasoning: frozenset[str]


class _Answer(msgspec.Struct):
    """The script's; `files` tell that vLLM has changed."""

    tool: frozenset[str] = frozenset()
    reasoning: frozenset[str] = frozenset()
    files: list[str] = []
    missing: bool = False
    slow: bool = False


class _Remembered(msgspec.Struct):
    python: str
    stamps: dict[str, tuple[int, int]]
    names: ParserNames


class InstalledVllm:
    """The vLLM of one interpreter. `cache` is the folder to remember in."""

    def __init__(self, python: str, cache: Path | None = None) -> None:
        self.python = python
        self._file = (cache or cache_folder()) / f"vllm-{hashlib.sha256(python.encode()).hexdigest()[:16]}.json"
        self._lock = Lock()
        self._known: _Remembered | None = None
        self._is_silent = False

    def parser_names(self, *, may_import: bool) -> ParserNames | None:
        """The parsers that vLLM registers; None when it does not tell. Waits: call it in a thread.

        A tenth of a second, nothing when remembered; a version that must be imported for it takes many, or is not
        asked without `may_import`. Raises `VllmNotInstalled`.
        """
        with self._lock:
            known = self._known or self._read()
            if known is None or known.python != self._resolved or known.stamps != _stamps(known.stamps):
                known = None if self._is_silent else self._ask(may_import=may_import)
            self._known, self._is_silent = known, known is None and may_import
            return known.names if known else None

    @property
    def _resolved(self) -> str:
        return shutil.which(self.python) or self.python

    def _ask(self, *, may_import: bool) -> _Remembered | None:
        python = self._resolved
        answer = _run(python, "quick", _QUICK_TIMEOUT)
        if answer is not None and answer.slow and may_import:
            answer = _run(python, "import", _IMPORT_TIMEOUT)
        if answer is not None and answer.missing:
            raise VllmNotInstalled
        if answer is None or answer.slow:
            return None
        known = _Remembered(python, _stamps(answer.files), ParserNames(answer.tool, answer.reasoning))
        self._write(known)
        return known

    def _read(self) -> _Remembered | None:
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._file.read_bytes(), type=_Remembered)
        return None

    def _write(self, known: _Remembered) -> None:
        """Where nothing can be written, vLLM is asked again the next time."""
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._file.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(msgspec.json.encode(known))
            temporary.replace(self._file)


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "llm-api-server"  # noqa: PTH117


def _run(python: str, mode: str, timeout: float) -> _Answer | None:
    """The script's answer, or None when it fails. It is handed over as text: beside it are modules with the names of
    the standard library's.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        result = subprocess.run(
            [python, "-c", _SCRIPT.read_text("utf-8"), mode],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd="/", env=environment, timeout=timeout, check=True,
        )  # fmt: skip
        return msgspec.json.decode(result.stdout.splitlines()[-1], type=_Answer)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise VllmNotInstalled from None
    except (OSError, subprocess.SubprocessError, msgspec.DecodeError, IndexError):
        return None


def _stamps(files: list[str] | dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Time of change and size of each; zeros for what is not there."""
    stamps = {}
    for file in files:
        try:
            stat = Path(file).stat()
            stamps[file] = (stat.st_mtime_ns, stat.st_size)
        except OSError:
            stamps[file] = (0, 0)
    return stamps
