"""The rules of the code base that a linter cannot state. import-linter holds the layers (`make check`)."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "src"
FILES = sorted(SOURCE.rglob("*.py"))
CHILD = SOURCE / "llm_api_server" / "engines" / "llama_cpp" / "llama_cpp_server.py"

#: No I/O, no clock, no tasks: time is an argument and effects leave through a Protocol.
PURE = (
    "types.py",
    "errors.py",
    "manager/scheduling/scheduler.py",
    "gateway/wire/request.py",
    "gateway/wire/validation.py",
    "gateway/wire/rewrite.py",
    "gateway/wire/stream_reader.py",
    "gateway/tools/forced_tool_choice.py",
)
IMPURE_MODULES = {"asyncio", "os", "random", "signal", "socket", "subprocess", "tempfile", "threading", "time"}

modules = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Top-level names of every module that `path` imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@modules
def test_module_says_what_it_owns(path: Path) -> None:
    docstring = ast.get_docstring(tree(path))
    if path.name == "__init__.py" and not path.read_text().strip():
        return
    assert docstring, "a module opens with what it owns"


@modules
def test_no_global_statement(path: Path) -> None:
    found = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Global)]
    assert not found, f"state lives in objects, not in modules: lines {found}"


@modules
def test_module_level_state_is_constant(path: Path) -> None:
    """A lower-case name bound to a fresh list, dict or set at module level is state waiting to be shared."""
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    found: list[str] = []
    for node in tree(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, mutable):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [target.id for target in targets if isinstance(target, ast.Name)]
    assert not [name for name in found if name.strip("_").islower() and not name.startswith("__")]


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_have_no_effects_to_import(name: str) -> None:
    path = SOURCE / "llm_api_server" / name
    assert path.exists(), "renamed? then this list has to follow"
    assert not imported(path) & IMPURE_MODULES


def test_the_code_inside_an_engine_knows_nothing_of_ours() -> None:
    assert imported(CHILD) <= sys.stdlib_module_names | {"xllamacpp"}
    for script in ("zygote.py", "vllm_parsers.py"):
        assert imported(CHILD.parents[2] / "engines" / "vllm" / script) <= sys.stdlib_module_names


def test_importing_a_module_has_no_effect(tmp_path: Path) -> None:
    """In one fresh process: no output, no thread, no file, no child, no signal handler, no engine library."""
    names = [module_name(path) for path in FILES if path != CHILD and path.name != "__main__.py"]
    program = f"""
import importlib, signal, sys, threading
handlers = [signal.getsignal(number) for number in signal.valid_signals()]
for name in {names!r}:
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
assert handlers == [signal.getsignal(number) for number in signal.valid_signals()], "signal handlers changed"
heavy = {{"xllamacpp", "vllm", "torch", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = _run(program, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_manager_is_loaded_without_a_web_framework(tmp_path: Path) -> None:
    program = """
import sys
import llm_api_server.manager.main
web = {"fastapi", "starlette", "uvicorn", "gunicorn", "httpx"} & set(sys.modules)
assert not web, web
"""
    result = _run(program, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def _run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        cwd=folder, env={"PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
