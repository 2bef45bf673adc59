"""Default location of the run directory, and its creation as a directory of this user alone."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llm_api_server.errors import ConfigError


def default_run_dir(config_file: Path) -> Path:
    """Return one path per user and configuration file, in `$XDG_RUNTIME_DIR` if that is private, else in `/tmp`."""
    name = hashlib.sha256(os.fsencode(config_file.absolute())).hexdigest()[:8]
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and _is_private(Path(runtime)):
        return Path(runtime) / "llm-api-server" / name
    return Path(tempfile.gettempdir()) / f"llm-api-server-{os.getuid()}" / name


def make_private(folders: Sequence[Path]) -> None:
    """Create the folders, outermost first. Raises `ConfigError` if that fails or other users could write to one."""
    path = folders[-1]
    try:
        for folder in folders:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = f"The run directory {path} cannot be made: {error.strerror}. Set server.run_dir."
        raise ConfigError([reason]) from error
    for folder in folders:
        if not _is_private(folder):
            reason = f"The run directory {folder} is another user's, or others may write to it. Set server.run_dir."
            raise ConfigError([reason])


def _is_private(folder: Path) -> bool:
    """Return whether `folder` is a real directory of this user that no other user may write to."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
