"""The run directory: mode 0700, one per configuration file, with a path short enough for unix sockets."""

from __future__ import annotations

from pathlib import Path


class RunDir:
    """Paths in the run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lock(self) -> Path:
        """Locked by the manager for as long as it lives (an OFD record lock); the guards of engines watch it."""
        return self.path / "manager.lock"

    @property
    def socket(self) -> Path:
        return self.path / "manager.sock"

    @property
    def minutes(self) -> Path:
        """Snapshot of what keys used in the last minute."""
        return self.path / "minutes"

    @property
    def engines(self) -> Path:
        """Folder with `ID.json` (adoption record) and `ID.sock` per instance."""
        return self.path / "engines"
