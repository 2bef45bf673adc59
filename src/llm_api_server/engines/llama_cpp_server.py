"""Old place of `llama_cpp/llama_cpp_server.py`: a manager of version 0.1 starts it from here until it is replaced."""

from __future__ import annotations

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("llama_cpp") / "llama_cpp_server.py"), run_name="__main__")
