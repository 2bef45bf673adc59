"""Edits of the text of a configuration file: add or remove a model, and keep every other byte.

The file is read by the reader of the configuration (`config/document.py`). The new text is read again and compared with
the intended data before it is written, so an unusual file is refused rather than damaged.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from llm_api_server.config.document import compose, parse_document
from llm_api_server.errors import ConfigError, DownloadError

_INDENT = 2
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
        before = path.read_bytes()
        mark = _BYTE_ORDER_MARK if before.startswith(_BYTE_ORDER_MARK) else b""
        after = mark + change(before.removeprefix(mark).decode()).encode()
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        new, status = Path(name), path.stat()
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(after)
                file.flush()
                os.fsync(descriptor)
            new.chmod(status.st_mode)
            with contextlib.suppress(PermissionError):
                os.chown(new, status.st_uid, status.st_gid)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except UnicodeDecodeError as error:
        raise DownloadError(f"{path} cannot be changed: it is not UTF-8 text.") from error
    except OSError as error:
        raise DownloadError(f"{path} cannot be changed: {error.strerror}.") from error


def _data(text: str) -> dict[str, Any]:
    try:
        data = parse_document(text, Path("config.yaml")).data
    except ConfigError as error:
        raise DownloadError(
            "The configuration file is not valid YAML; `llm-api-server check-config` shows where."
        ) from error
    if not isinstance(data, dict):
        raise DownloadError("The configuration file is not a mapping; see `llm-api-server check-config`.")
    return data


def _checked(text: str, wanted: dict[str, Any]) -> str:
    try:
        if _data(text) == wanted:
            return text
    except DownloadError:
        pass
    raise DownloadError("The layout of the configuration file is not supported; edit it by hand.")


def _insert(text: str, name: str, entry: dict[str, Any]) -> str:
    lines = text.splitlines(keepends=True)
    models = _find(compose(text), "models")
    if models is None:
        return _insert_block(lines, len(lines), f"models:\n{_available(name, entry, _INDENT)}")
    if not isinstance(models[1], yaml.MappingNode):  # `models:` without a value
        return _insert_block(lines, models[0].start_mark.line + 1, _available(name, entry, _INDENT))
    available = _find(models[1], "available")
    if available is None:
        block = _available(name, entry, models[1].value[0][0].start_mark.column)
        return _insert_block(lines, _last_line(models[1]) + 1, block)
    key, node = available
    if isinstance(node, yaml.MappingNode) and node.value and not node.flow_style:
        return _insert_block(lines, _last_line(node) + 1, entry_text(name, entry, node.value[0][0].start_mark.column))
    line = key.start_mark.line  # `available:`, or `available: {}`
    if node.end_mark.line > line + 1 or getattr(node, "value", None):
        raise DownloadError("models.available is written in braces: add the entry by hand.")
    if node.start_mark.line == node.end_mark.line == line:
        lines[line] = f"{lines[line][: key.end_mark.column]}:{lines[line][node.end_mark.column :]}"
    return _insert_block(lines, line + 1, entry_text(name, entry, key.start_mark.column + _INDENT))


def _available(name: str, entry: dict[str, Any], indent: int) -> str:
    return f"{' ' * indent}available:\n{entry_text(name, entry, indent + _INDENT)}"


def _delete(text: str, name: str, *, is_last: bool) -> str:
    lines = text.splitlines(keepends=True)
    models = _find(compose(text), "models")
    available = _find(models[1], "available") if models else None
    found = _find(available[1], name) if available else None
    if available is None or found is None or available[1].flow_style:
        raise DownloadError("models.available is written in braces: remove the entry by hand.")
    first, last = found[0].start_mark.line, _last_line(found[1])
    kept = [*lines[:first], *lines[last + 1 :]]
    if is_last:
        line, end = available[0].start_mark.line, available[0].end_mark.column
        kept[line] = f"{lines[line][:end]}: {{}}{lines[line][end:].partition(':')[2]}"
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
    """Insert lines in front of line `at`, with the line ends of the first line."""
    end = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    before = "".join(lines[:at])
    if before and not before.endswith(("\n", "\r")):  # the file's last line has no end
        before += end
    return before + block.replace("\n", end) + "".join(lines[at:])
