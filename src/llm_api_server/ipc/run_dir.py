"""The run directory: where the processes of one server meet."""

from __future__ import annotations

from pathlib import Path


class RunDir:
    """Names in the run directory: mode 0700, one per configuration file, short enough for unix socket paths."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lock(self) -> Path:
        """Held (flock) by the manager for as long as it lives; engines' guards watch it."""
        return self.path / "manager.lock"

    @property
    def socket(self) -> Path:
        return self.path / "manager.sock"

    @property
    def minutes(self) -> Path:
        """What keys used in the last minute."""
        return self.path / "minutes"

    @property
    def engines(self) -> Path:
        """`ID.json` (record for adoption) and `ID.sock` per instance."""
        return self.path / "engines"
