"""Edits of the text of a configuration file: add or remove a model, and keep every other line.

The new text is parsed and compared with the intended data before it is written, so an unusual file is refused rather
than damaged.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llm_api_server.errors import DownloadError

_INDENT = 2


def entry_text(name: str, entry: dict[str, Any], indent: int = 0) -> str:
    """Return the entry as YAML, each line indented."""
    text = yaml.safe_dump({name: entry}, sort_keys=False, allow_unicode=True, width=1000, indent=_INDENT)
    return "".join(f"{' ' * indent}{line}\n" for line in text.splitlines())


def with_model(text: str, name: str, entry: dict[str, Any]) -> str:
    """Return the text with a new entry. Raises `DownloadError` if the name is taken or the layout is not supported."""
    before = _data(text)
    models = before.get("models") or {}
    if name in (models.get("available") or {}):
        raise DownloadError(f"The configuration has a model {name!r} already; choose another name with --name.")
    after = {**before, "models": {**models, "available": {**(models.get("available") or {}), name: entry}}}
    return _checked(_insert(text, name, entry), after)


def without_model(text: str, name: str) -> str:
    """Return the text without an entry. Raises `DownloadError` if there is none or the layout is not supported."""
    before = _data(text)
    models = before.get("models") or {}
    if name not in (models.get("available") or {}):
        raise DownloadError(f"The configuration has no model {name!r}.")
    kept = {other: entry for other, entry in models["available"].items() if other != name}
    after = {**before, "models": {**models, "available": kept}}
    return _checked(_delete(text, name, is_last=not kept), after)


def edit(path: Path, change: Callable[[str], str]) -> None:
    """Replace the file atomically by its changed text; keeps links, owner and mode. Raises `DownloadError`."""
    path = path.resolve()
    try:
        text = change(path.read_text(encoding="utf-8"))
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        new, status = Path(name), path.stat()
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            new.chmod(status.st_mode)
            with contextlib.suppress(PermissionError):
                os.chown(new, status.st_uid, status.st_gid)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise DownloadError(f"{path} cannot be changed: {error.strerror}.") from error


def _data(text: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DownloadError(
            "The configuration file is not valid YAML; `llm-api-server check-config` shows where."
        ) from error
    if data is not None and not isinstance(data, dict):
        raise DownloadError("The configuration file is not a mapping; see `llm-api-server check-config`.")
    return data or {}


def _checked(text: str, wanted: dict[str, Any]) -> str:
    try:
        if _data(text) == wanted:
            return text
    except DownloadError:
        pass
    raise DownloadError("The layout of the configuration file is not supported; edit it by hand.")


def _insert(text: str, name: str, entry: dict[str, Any]) -> str:
    if text and not text.endswith("\n"):
        text += "\n"
    lines = text.splitlines(keepends=True)
    models = _find(yaml.compose(text), "models")
    if models is None:
        return f"{text}models:\n{' ' * _INDENT}available:\n{entry_text(name, entry, 2 * _INDENT)}"
    if not isinstance(models[1], yaml.MappingNode):  # `models:` without a value
        block = f"{' ' * _INDENT}available:\n{entry_text(name, entry, 2 * _INDENT)}"
        return _insert_block(lines, models[0].start_mark.line + 1, block)
    available = _find(models[1], "available")
    if available is None:
        indent = models[1].value[0][0].start_mark.column
        block = f"{' ' * indent}available:\n{entry_text(name, entry, indent + _INDENT)}"
        return _insert_block(lines, _last_line(models[1]) + 1, block)
    key, node = available
    if isinstance(node, yaml.MappingNode) and node.value and not node.flow_style:
        return _insert_block(lines, _last_line(node) + 1, entry_text(name, entry, node.value[0][0].start_mark.column))
    line = key.start_mark.line  # `available:`, or `available: {}`
    head = text.splitlines()[line][: key.end_mark.column]
    if node.end_mark.line > line + 1 or getattr(node, "value", None):
        raise DownloadError("models.available is written in braces: add the entry by hand.")
    return _insert_block(
        [*lines[:line], f"{head}:\n", *lines[line + 1 :]],
        line + 1,
        entry_text(name, entry, key.start_mark.column + _INDENT),
    )


def _delete(text: str, name: str, *, is_last: bool) -> str:
    lines = text.splitlines(keepends=True)
    models = _find(yaml.compose(text), "models")
    available = _find(models[1], "available") if models else None
    found = _find(available[1], name) if available else None
    if available is None or found is None or available[1].flow_style:
        raise DownloadError("models.available is written in braces: remove the entry by hand.")
    first, last = found[0].start_mark.line, _last_line(found[1])
    kept = [*lines[:first], *lines[last + 1 :]]
    if is_last:
        line = available[0].start_mark.line
        kept[line] = f"{lines[line][: available[0].end_mark.column]}: {{}}\n"
    return "".join(kept)


def _find(node: Any, name: str) -> tuple[yaml.Node, Any] | None:
    """Return the key node and the value node of an entry."""
    if not isinstance(node, yaml.MappingNode):
        return None
    return next(((key, value) for key, value in node.value if key.value == name), None)


def _last_line(node: yaml.Node) -> int:
    """Return the last line of a value, without the comments after it."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style and node.value:
        return _last_line(node.value[-1][1])
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _last_line(node.value[-1])
    return node.end_mark.line - (1 if node.end_mark.column == 0 else 0)


def _insert_block(lines: list[str], at: int, block: str) -> str:
    return "".join([*lines[:at], block, *lines[at:]])
