"""Old place of `instances/guard.py`: a manager of version 0.1 starts guards from here until `restart` replaces it."""

from __future__ import annotations

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("instances") / "guard.py"), run_name="__main__")
