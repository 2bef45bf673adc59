"""The llama.cpp engine process: one model behind llama.cpp's own HTTP server on a unix socket. Started by its adapter.

Standard library and xllamacpp only; run as a script, isolated (`-I`), because this folder's modules share names with
the standard library's. The one argument is JSON: `params`, fields of `CommonParams` by dotted name, enums by name;
`notes`, lines for the log; `memory_limit`, bytes it may allocate, or null. SIGTERM ends it with code 0 (while it still
loads: by the signal, as nothing can answer). A failure's last line is `llama.cpp: ` and the reason.
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
    """The message names the field and what it may be."""


def main() -> int:
    """Serve until a signal; returns only when that cannot be, with the exit code."""
    job = json.loads(sys.argv[1])
    _volunteer_for_the_kernel()
    if job["memory_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (job["memory_limit"], job["memory_limit"]))
    # The socket is for this user only, and llama.cpp cannot be told a mode.
    os.umask(0o177)
    try:
        import xllamacpp  # noqa: PLC0415 - the umask comes first, and a missing wheel is explained
    except ImportError as error:
        return _fail(f"the engine's Python cannot import xllamacpp: {error}", EXIT_BAD_ARGUMENT)
    try:
        params = build_params(xllamacpp, job["params"])
    except BadArgument as error:
        return _fail(str(error), EXIT_BAD_ARGUMENT)
    for note in job["notes"]:
        _say(note)
    socket = job["params"]["hostnames"][0]
    _unlink(socket)
    try:
        # Held in a name: the server ends with the object.
        server = xllamacpp.Server(params)
    except Exception as error:  # noqa: BLE001 - whatever the extension raises, the process ends with its words
        _unlink(socket)
        return _fail(str(error), EXIT_LOAD_FAILED)
    _say(f"listening on {server.listening_address}")
    return _wait_and_leave(socket)


def _wait_and_leave(socket: str) -> NoReturn:
    wanted = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    signal.sigwait(wanted)
    _unlink(socket)
    _say("stopped")
    # Taking a running server apart waits for its requests; whoever sent the signal has drained them or will not.
    os._exit(0)


def _volunteer_for_the_kernel() -> None:
    """When memory runs out, this process is to go, not the server: it can be started again."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def build_params(library: Any, fields: dict[str, Any]) -> Any:
    """A `CommonParams` with the given fields. Raises `BadArgument`."""
    params = library.CommonParams()
    for name, value in fields.items():
        *path, last = name.split(".")
        target = params
        for step in path:
            _check_name(target, step, name)
            target = getattr(target, step)
        _check_name(target, last, name)
        setattr_checked(library, target, last, name, value)
    return params


def _check_name(target: Any, step: str, full_name: str) -> None:
    known = [n for n in dir(target) if not n.startswith("_") and not callable(getattr(target, n, None))]
    if step in known:
        return
    close = difflib.get_close_matches(step, known, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise BadArgument(f"engine_args: llama.cpp has no option {full_name!r}{hint}")


def setattr_checked(library: Any, target: Any, field: str, full_name: str, value: Any) -> None:
    current = getattr(target, field)
    try:
        setattr(target, field, _converted(library, field, current, value))
    except (TypeError, ValueError, OverflowError, KeyError) as error:
        raise BadArgument(f"engine_args: {full_name} cannot be {value!r}: {error}") from None


def _converted(library: Any, field: str, current: Any, value: Any) -> Any:
    """JSON has no enums, sets or adapters; `current`, the field's default, tells what is wanted."""
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
    """A member by its full name, by the end of its name (`q8_0` of `GGML_TYPE_Q8_0`) or by its number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return kind(value)
    wanted = str(value).upper()
    # All members of one kind begin with its name, say GGML_TYPE_.
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


def _say(text: str) -> None:
    """Standard output is the engine's log file. It goes on where that cannot be written: the disk may be full."""
    with suppress(OSError):
        os.write(1, f"llama.cpp: {text}\n".encode())


def _fail(reason: str, code: int) -> int:
    _say(reason)
    return code


if __name__ == "__main__":
    sys.exit(main())
