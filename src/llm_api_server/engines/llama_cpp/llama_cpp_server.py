"""The llama.cpp engine process: one model behind llama.cpp's own HTTP server on a unix socket.

A script of the standard library and xllamacpp only, run isolated (`-I`) so that modules of this folder do not hide
those of the standard library. Its argument is JSON: `params`, fields of `CommonParams` by dotted name, enums by name;
`notes`, lines for the log; `memory_limit`, bytes it may allocate, or null. SIGTERM ends it with exit code 0; while the
model loads, the signal itself ends it. The last line of a failure is `llama.cpp: ` and the reason.
"""

from __future__ import annotations

import difflib
import enum
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

EXIT_BAD_ARGUMENT = 2
EXIT_LOAD_FAILED = 3


class BadArgument(Exception):
    """A field is unknown or its value unusable; the message gives the field and the allowed values."""


def main() -> int:
    """Serve until a signal. Return the exit code if the server cannot start."""
    job = json.loads(sys.argv[1])
    _raise_oom_score()
    if job["memory_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (job["memory_limit"], job["memory_limit"]))
    # The socket is for this user only, and llama.cpp has no option for its mode.
    os.umask(0o177)
    try:
        import xllamacpp  # noqa: PLC0415 - after the umask, and a missing wheel is reported
    except ImportError as error:
        return _fail(f"the engine's Python cannot import xllamacpp: {error}", EXIT_BAD_ARGUMENT)
    try:
        params = build_params(xllamacpp, job["params"])
    except BadArgument as error:
        return _fail(str(error), EXIT_BAD_ARGUMENT)
    for note in job["notes"]:
        _log(note)
    socket = job["params"]["hostnames"][0]
    _unlink(socket)
    try:
        # Keep a reference: the server ends with the object.
        server = xllamacpp.Server(params)
    except Exception as error:  # noqa: BLE001 - whatever the extension raises is the reason of the failure
        _unlink(socket)
        return _fail(str(error), EXIT_LOAD_FAILED)
    _log(f"listening on {server.listening_address}")
    return _serve_until_signal(socket)


def _serve_until_signal(socket: str) -> NoReturn:
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    signal.sigwait(signals)
    _unlink(socket)
    _log("stopped")
    # Destroying the server would wait for its requests; the sender of the signal has drained them or gives them up.
    os._exit(0)


def _raise_oom_score() -> None:
    """Make the kernel end this process before the server when memory runs out: it can be started again."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def build_params(library: Any, fields: dict[str, Any]) -> Any:
    """Return a `CommonParams` with the given fields. Raises `BadArgument`."""
    params = library.CommonParams()
    for name, value in fields.items():
        *path, last = name.split(".")
        target = params
        for step in path:
            _check_name(target, step, name)
            target = getattr(target, step)
        _check_name(target, last, name)
        _set_field(library, target, last, name, value)
    return params


def _check_name(target: Any, step: str, full_name: str) -> None:
    known = [n for n in dir(target) if not n.startswith("_") and not callable(getattr(target, n, None))]
    if step in known:
        return
    close = difflib.get_close_matches(step, known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise BadArgument(f"engine_args: llama.cpp has no option {full_name!r}{hint}")


def _set_field(library: Any, target: Any, field: str, full_name: str, value: Any) -> None:
    current = getattr(target, field)
    try:
        setattr(target, field, _converted(library, field, current, value))
    except (TypeError, ValueError, OverflowError, KeyError) as error:
        raise BadArgument(f"engine_args: {full_name} cannot be {value!r}: {error}") from None


def _converted(library: Any, field: str, current: Any, value: Any) -> Any:
    """Convert a JSON value to the type of `current`, the field's default: an enum, a set, an adapter."""
    if isinstance(current, enum.Enum):
        return _enum_member(type(current), value)
    if field == "lora_adapters":
        return [_lora_adapter(library, entry) for entry in value]
    if isinstance(current, bool):
        if not isinstance(value, bool):
            raise TypeError("it is true or false")
        return value
    if isinstance(current, float) and isinstance(value, int):
        return float(value)
    if isinstance(current, set):
        return set(value)
    return value


def _enum_member(kind: type[enum.Enum], value: Any) -> enum.Enum:
    """Return a member by its full name, by the end of its name (`q8_0` of `GGML_TYPE_Q8_0`) or by its number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return kind(value)
    wanted = str(value).upper()
    # All members of an enum share a prefix such as GGML_TYPE_.
    common = os.path.commonprefix(list(kind.__members__))  # noqa: RUF071 - of words, not of paths
    prefix = common[: common.rfind("_") + 1]
    for name, member in kind.__members__.items():
        if wanted in {name, name[len(prefix) :]}:
            return member
    words = ", ".join(name[len(prefix) :].lower() for name in kind.__members__)
    raise ValueError(f"it is one of {words}")


def _lora_adapter(library: Any, entry: Any) -> Any:
    adapter = library.CommonAdapterLoraInfo()
    path, scale = (entry, 1.0) if isinstance(entry, str) else (entry["path"], float(entry.get("scale", 1.0)))
    adapter.path, adapter.scale = path, scale
    return adapter


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _log(text: str) -> None:
    """Write to standard output, the engine's log file. Ignore failures: the disk may be full."""
    with suppress(OSError):
        os.write(1, f"llama.cpp: {text}\n".encode())


def _fail(reason: str, code: int) -> int:
    _log(reason)
    return code


if __name__ == "__main__":
    sys.exit(main())
