"""What a hub is to `pull.py`, and how the errors of its library become words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from llm_api_server.downloads.choice import RemoteFile
from llm_api_server.errors import DownloadError

#: Called with bytes that have come, or that were there already; negative: they were given up.
OnBytes = Callable[[int], None]

#: Of one request, in seconds.
TIMEOUT = 30.0


class Hub(Protocol):
    """`revision` is the one that was found, where there are revisions."""

    revision: str | None

    def files(self) -> list[RemoteFile]:
        """What is there. Raises `DownloadError`."""

    def fetch(self, file: RemoteFile, folder: Path, on_bytes: OnBytes) -> None:
        """Put it at its path under `folder`, going on with what is there of it. Raises `DownloadError`."""


@contextmanager
def hub_errors(hub: str, explain: Callable[..., str | None], *what: str | None) -> Iterator[None]:
    """`explain(error, *what)` knows the library's own errors; the others are the disk's or the network's."""
    try:
        yield
    except DownloadError:
        raise
    except Exception as error:
        raise DownloadError(explain(error, *what) or of_disk(error) or unreachable(hub, error)) from error


def of_disk(error: Exception) -> str | None:
    is_of_network = isinstance(error, ConnectionError | TimeoutError)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None and not is_of_network:
        return f"The model cannot be written: {error.strerror}."
    return None


def unreachable(whom: str, error: object) -> str:
    return (
        f"{whom} cannot be reached: {reason_of(error)}. Check the network and proxy settings; what has come is kept, "
        "and the same command goes on with it."
    )


def reason_of(error: object) -> str:
    """What the operating system said, where it did; libraries wrap it in much else."""
    cause = error if isinstance(error, BaseException) else None
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        reason = getattr(cause, "reason", None)
        cause = reason if isinstance(reason, BaseException) else cause.__cause__ or cause.__context__
    return first_line(error)


def first_line(error: object) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
