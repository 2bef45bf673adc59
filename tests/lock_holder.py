"""A process that holds a server's lock, as a running server does."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HOLDER = """
import signal, sys
from pathlib import Path
from llm_api_server.lifecycle.server_lock import ServerLock
ServerLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
signal.sigwait({signal.SIGTERM})
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run another process that holds the lock until SIGTERM."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()
