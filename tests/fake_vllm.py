"""Interpreters with a fake vLLM: packages that register parsers as versions of vLLM do or did."""

from __future__ import annotations

import sys
from pathlib import Path

_MANAGER = """
class {base}:
    pass
class {manager}:
    {kind}_parsers = {{}}
    lazy_parsers = {{}}
    @classmethod
    def register_lazy_module(cls, name, module_path, class_name):
        cls.lazy_parsers[name] = (module_path, class_name)
"""
_LAZY = """
from {package}.{module} import {base}, {manager}
for name in {names!r}:
    {manager}.register_lazy_module(name, "{package}." + name, name.title())
"""
_EAGER = """
from .{module} import {base}, {manager}
from .all_parsers import *
"""
_ALL = """
import vllm.weight
from .{module} import {manager}
{manager}.{kind}_parsers.update(dict.fromkeys({names!r}))
"""


def fake_vllm(
    folder: Path,
    tool: list[str],
    reasoning: list[str],
    *,
    package: str = "vllm.tool_parsers",
    is_eager: bool = False,
) -> Path:
    """Return the interpreter. `folder/imports` gets a line for each module of vLLM that is imported."""
    _write(folder / "site", "vllm", f"open({str(folder / 'imports')!r}, 'a').write('vllm\\n')")
    (folder / "site/vllm/weight.py").write_text("")
    _register(folder, package, "tool", ["abstract_tool_parser", "ToolParser", "ToolParserManager"], tool, is_eager)
    words = ["abs_reasoning_parsers", "ReasoningParser", "ReasoningParserManager"]
    _register(folder, "vllm.reasoning", "reasoning", words, reasoning, is_eager)
    return interpreter(folder)


def interpreter(folder: Path) -> Path:
    """Return an interpreter that sees `folder/site`. `folder/starts` gets a line for each of its starts."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho >> {folder}/starts\nPYTHONPATH={folder}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def add_plugin(folder: Path, name: str) -> None:
    """Add a package that registers one more tool parser when vLLM loads its plugins."""
    site = folder / "site"
    info = site / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nplugin = plugin:register\n")
    (site / "plugin.py").write_text(
        f"from vllm.tool_parsers import ToolParserManager as m\ndef register(): m.tool_parsers[{name!r}] = None\n"
    )
    _write(
        site,
        "vllm.plugins",
        "import importlib.metadata as m\n"
        "def load_general_plugins(): [e.load()() for e in m.entry_points(group='vllm.general_plugins')]",
    )


def _register(folder: Path, package: str, kind: str, words: list[str], names: list[str], is_eager: bool) -> None:
    module, base, manager = words
    values = {"package": package, "module": module, "base": base, "manager": manager, "kind": kind, "names": names}
    _write(folder / "site", package, (_EAGER if is_eager else _LAZY).format(**values))
    target = folder / "site" / package.replace(".", "/")
    (target / f"{module}.py").write_text("import vllm.weight\n" + _MANAGER.format(**values))
    (target / "all_parsers.py").write_text(_ALL.format(**values))


def _write(site: Path, package: str, content: str) -> None:
    target = site
    for part in package.split("."):
        target /= part
        target.mkdir(parents=True, exist_ok=True)
        if not (target / "__init__.py").exists():
            (target / "__init__.py").write_text("")
    (target / "__init__.py").write_text(content)
