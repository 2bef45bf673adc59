"""Interface of the hubs, and error messages for what their libraries raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from llm_api_server.downloads.choice import RemoteFile
from llm_api_server.errors import DownloadError

#: Receives the number of bytes that arrived, or were on disk already; a negative one if they were discarded.
OnBytes = Callable[[int], None]

#: Seconds that one read of a response may take.
TIMEOUT = 30.0


class Hub(Protocol):
    """Repository or file on the network. `revision` is the one that was found, if there are revisions."""

    revision: str | None

    def files(self) -> list[RemoteFile]:
        """Return the files of the source. Raises `DownloadError`."""

    def fetch(self, file: RemoteFile, folder: Path, on_bytes: OnBytes) -> None:
        """Download a file to its path under `folder`, resuming a partial one. Raises `DownloadError`."""


@contextmanager
def hub_errors(hub: str, explain: Callable[..., str | None], *details: str | None) -> Iterator[None]:
    """Raise `DownloadError` for any error: `explain(error, *details)` covers the library's own ones."""
    try:
        yield
    except DownloadError:
        raise
    except Exception as error:
        message = explain(error, *details) or _disk_error(error) or unreachable(hub, error)
        raise DownloadError(message) from error


def _disk_error(error: Exception) -> str | None:
    is_network_error = isinstance(error, ConnectionError | TimeoutError)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None and not is_network_error:
        return f"The model cannot be written: {error.strerror}."
    return None


def unreachable(hub: str, error: object) -> str:
    return (
        f"{hub} cannot be reached: {_reason(error)}. Check the network and proxy settings, then run the same command "
        "again to resume: downloaded data is kept."
    )


def _reason(error: object) -> str:
    """Return the operating system's message from the chain of causes, else the first line of the error."""
    cause = error if isinstance(error, BaseException) else None
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        reason = getattr(cause, "reason", None)
        cause = reason if isinstance(reason, BaseException) else cause.__cause__ or cause.__context__
    return first_line(error)


def first_line(error: object) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
