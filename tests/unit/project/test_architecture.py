"""Rules of the code base that a linter cannot state. import-linter checks layers and purity (`make check`)."""

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
ENGINES = SOURCE / "llm_api_server" / "engines"
LLAMA_CPP_SERVER = ENGINES / "llama_cpp" / "llama_cpp_server.py"

modules = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Return the top-level names of all modules that `path` imports."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@modules
def test_module_has_a_docstring(path: Path) -> None:
    if path.name != "__init__.py" or path.read_text().strip():
        assert ast.get_docstring(tree(path)), "a module opens with what it owns"


@modules
def test_no_global_statement(path: Path) -> None:
    found = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Global)]
    assert not found, f"state lives in objects, not in modules: lines {found}"


@modules
def test_module_level_state_is_constant(path: Path) -> None:
    """No lower-case name is bound to a list, dict or set at module level."""
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    found: list[str] = []
    for node in tree(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, mutable):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [target.id for target in targets if isinstance(target, ast.Name)]
    assert not [name for name in found if name.strip("_").islower() and not name.startswith("__")]


def test_names_of_classes_are_unique() -> None:
    owners: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                owners.setdefault(node.name, []).append(str(path.relative_to(SOURCE)))
    assert {name: paths for name, paths in owners.items() if len(paths) > 1} == {}


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name == "__init__.py"], ids=lambda path: str(path.relative_to(SOURCE))
)
def test_packages_re_export_nothing(path: Path) -> None:
    """An import in `__init__.py` would load modules that a process does not need; idle memory has a limit."""
    assert not imported(path)


@pytest.mark.parametrize(
    ("script", "libraries"),
    [
        (LLAMA_CPP_SERVER, {"xllamacpp"}),
        (ENGINES / "vllm" / "zygote.py", set()),
        (ENGINES / "vllm" / "vllm_parsers.py", set()),
        (SOURCE / "llm_api_server" / "manager" / "instances" / "guard.py", set()),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_scripts_of_other_interpreters_import_only_the_standard_library(script: Path, libraries: set[str]) -> None:
    assert imported(script) <= sys.stdlib_module_names | libraries


def test_importing_a_module_has_no_effect(tmp_path: Path) -> None:
    """In one fresh process: no output, no thread, no file, no child, no signal handler, no engine library."""
    names = [module_name(path) for path in FILES if path != LLAMA_CPP_SERVER and path.name != "__main__.py"]
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


def test_the_manager_imports_no_web_framework(tmp_path: Path) -> None:
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
