"""Prints which tool-call and reasoning parsers vLLM registers. A script: standard library and vLLM only, run by vLLM's
interpreter; `installed_vllm.py` starts it.

vLLM lists its parsers in two modules that need nothing but the manager they register with. They are run with a
stand-in for that: milliseconds, where an import of vLLM takes many seconds. Older versions register parsers as they
are imported, and plugins of others may add some: then vLLM is imported, unless the argument `quick` forbids it.

The last line is JSON: `{"tool", "reasoning", "files"}`, `{"missing": true}` without vLLM, `{"slow": true}` when only an
import could tell. `files` are those that change when vLLM or its plugins do.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple


class _Place(NamedTuple):
    """A package whose `__init__` registers parsers, and the module in it that has their manager."""

    package: str
    module: str
    manager: str

    def file(self, root: Path) -> Path:
        return root.joinpath(*self.package.split(".")[1:], "__init__.py")


#: The newest first.
_PLACES = {
    "tool": (
        _Place("vllm.tool_parsers", "abstract_tool_parser", "ToolParserManager"),
        _Place("vllm.entrypoints.openai.tool_parsers", "abstract_tool_parser", "ToolParserManager"),
    ),
    "reasoning": (_Place("vllm.reasoning", "abs_reasoning_parsers", "ReasoningParserManager"),),
}


def main() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        print(json.dumps({"missing": True}))
        return
    root = Path(next(iter(spec.submodule_search_locations)))
    found = {kind: place for kind, places in _PLACES.items() for place in places[::-1] if place.file(root).exists()}
    if set(found) != set(_PLACES):
        raise SystemExit("this version has its parsers elsewhere")
    try:
        names = _read(root, found)
    except Exception:  # noqa: BLE001 - whatever the stand-ins lack, an import has it
        if "quick" in sys.argv[1:]:
            print(json.dumps({"slow": True}))
            return
        names = _import(found)
    files = [root.parent, *(place.file(root) for place in found.values())]
    print(json.dumps({**names, "files": [str(file) for file in files]}))


def _read(root: Path, found: dict[str, _Place]) -> dict[str, list[str]]:
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(not plugin.value.startswith("vllm.") for plugin in plugins):
        raise LookupError("plugins may register parsers")
    return {kind: sorted(_run(root, place)) for kind, place in found.items()}


def _run(root: Path, place: _Place) -> set[str]:
    """Names that the package registers. Whatever else of vLLM it imports is missing."""
    names: set[str] = set()

    def register(name: str, *_: Any, **__: Any) -> None:
        names.add(name)

    module: Any = types.ModuleType(f"{place.package}.{place.module}")
    module.__getattr__ = lambda _: object
    setattr(module, place.manager, type(place.manager, (), {"register_lazy_module": staticmethod(register)}))
    sys.modules[module.__name__] = module
    parts = place.package.split(".")
    for end in range(1, len(parts) + 1):
        parent = types.ModuleType(".".join(parts[:end]))
        parent.__path__ = []
        sys.modules[parent.__name__] = parent
    source = place.file(root)
    code = compile(source.read_bytes(), str(source), "exec")
    try:
        exec(code, {"__name__": place.package, "__package__": place.package})  # noqa: S102 - vLLM's own
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]
    if not names:
        raise LookupError("nothing was registered")
    return names


def _import(found: dict[str, _Place]) -> dict[str, list[str]]:
    with suppress(ImportError):
        importlib.import_module("vllm.plugins").load_general_plugins()
    names: dict[str, list[str]] = {}
    for kind, place in found.items():
        manager = getattr(importlib.import_module(place.package), place.manager)
        names[kind] = sorted({*getattr(manager, f"{kind}_parsers"), *getattr(manager, "lazy_parsers", ())})
    return names


if __name__ == "__main__":
    main()
