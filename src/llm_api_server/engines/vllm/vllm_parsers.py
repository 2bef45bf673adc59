"""Print the tool-call and reasoning parsers that vLLM registers. A script of the standard library and vLLM only.

Current versions list their parsers in two modules that need nothing but the manager they register with. The script
runs these with a stand-in for the manager, which takes milliseconds where an import of vLLM takes many seconds. Older
versions register parsers as they are imported, and plugins may add some: then vLLM is imported, unless the argument
is `quick`.

The last line is JSON: `{"tool", "reasoning", "files"}`, `{"missing": true}` without vLLM, or `{"slow": true}` if only
an import could list the parsers. `files` change when vLLM or its plugins change.
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


class _Registry(NamedTuple):
    """Package whose `__init__` registers parsers, and the module in it with their manager."""

    package: str
    module: str
    manager: str

    def file(self, root: Path) -> Path:
        return root.joinpath(*self.package.split(".")[1:], "__init__.py")


#: Locations of the registries, newest version first.
_REGISTRIES = {
    "tool": (
        _Registry("vllm.tool_parsers", "abstract_tool_parser", "ToolParserManager"),
        _Registry("vllm.entrypoints.openai.tool_parsers", "abstract_tool_parser", "ToolParserManager"),
    ),
    "reasoning": (_Registry("vllm.reasoning", "abs_reasoning_parsers", "ReasoningParserManager"),),
}


def main() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        print(json.dumps({"missing": True}))
        return
    root = Path(next(iter(spec.submodule_search_locations)))
    found = {kind: one for kind, known in _REGISTRIES.items() for one in known[::-1] if one.file(root).exists()}
    if set(found) != set(_REGISTRIES):
        raise SystemExit("this version has its parsers elsewhere")
    try:
        names = _list(root, found)
    except Exception:  # noqa: BLE001 - whatever the stand-ins lack, an import provides
        if "quick" in sys.argv[1:]:
            print(json.dumps({"slow": True}))
            return
        names = _import(found)
    files = [root.parent, *(registry.file(root) for registry in found.values())]
    print(json.dumps({**names, "files": [str(file) for file in files]}))


def _list(root: Path, found: dict[str, _Registry]) -> dict[str, list[str]]:
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(not plugin.value.startswith("vllm.") for plugin in plugins):
        raise LookupError("plugins may register parsers")
    return {kind: sorted(_run(root, registry)) for kind, registry in found.items()}


def _run(root: Path, registry: _Registry) -> set[str]:
    """Run the package's `__init__` without the rest of vLLM. Return the names it registers."""
    names: set[str] = set()

    def register(name: str, *_: Any, **__: Any) -> None:
        names.add(name)

    module: Any = types.ModuleType(f"{registry.package}.{registry.module}")
    module.__getattr__ = lambda _: object
    setattr(module, registry.manager, type(registry.manager, (), {"register_lazy_module": staticmethod(register)}))
    sys.modules[module.__name__] = module
    parts = registry.package.split(".")
    for end in range(1, len(parts) + 1):
        parent = types.ModuleType(".".join(parts[:end]))
        parent.__path__ = []
        sys.modules[parent.__name__] = parent
    source = registry.file(root)
    code = compile(source.read_bytes(), str(source), "exec")
    try:
        exec(code, {"__name__": registry.package, "__package__": registry.package})  # noqa: S102 - vLLM's own
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]
    if not names:
        raise LookupError("nothing was registered")
    return names


def _import(found: dict[str, _Registry]) -> dict[str, list[str]]:
    with suppress(ImportError):
        importlib.import_module("vllm.plugins").load_general_plugins()
    names: dict[str, list[str]] = {}
    for kind, registry in found.items():
        manager = getattr(importlib.import_module(registry.package), registry.manager)
        names[kind] = sorted({*getattr(manager, f"{kind}_parsers"), *getattr(manager, "lazy_parsers", ())})
    return names


if __name__ == "__main__":
    main()
