"""Reading of a YAML file into plain data with the line of every value, and its problems as sentences.

The declaration comes from the caller. Values from the environment, keys and other secrets are never shown.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llm_api_server.errors import ConfigError
from llm_api_server.redaction import Redactor, one_line

KeyPath = tuple[str | int, ...]
ModelT = TypeVar("ModelT", bound=BaseModel)

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_VARIABLE = re.compile(
    r"\$(?P<escaped>\$\{)|\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}|\$\{(?P<wrong>[^}]*)\}?"
)
_MERGE_TAG = "tag:yaml.org,2002:merge"
_COLLECTION_TAGS = frozenset({"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"})
_TEXT_TAG = "tag:yaml.org,2002:str"
#: Numbers that YAML 1.1 reads in base 8 or 60, and other readers of YAML, and people, in base 10 or as a time.
_AMBIGUOUS_NUMBER = re.compile(r"[-+]?0[0-7_]+|.*:.*")
_NUMBER_TAGS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})
_TIME_TAG = "tag:yaml.org,2002:timestamp"
#: Maximum number of values that a file may have beyond those it spells out, by its aliases.
_MAX_ALIASED_VALUES = 100_000
_MAX_PASSES = 10
#: Replacement of a missing required text; satisfies the `min_length` of every option.
_PLACEHOLDER = "unusable"
_MAX_SHOWN = 80
#: Last parts of key paths whose values are secrets.
_SECRET_NAMES = frozenset({"key", "secret_key", "api_key"})

#: Text between a collection and the keys of its entries.
_JOINTS: Mapping[str, str] = {str(dict): ".NAME.", str(list): "[]."}

_MESSAGES: Mapping[str, str] = {
    "string_type": "must be text; put it in quotes",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list, as in [a, b]",
    "dict_type": "must be a section with keys of its own",
    "model_type": "must be a section with keys of its own",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}


class ConfigDocument:
    """Data of one file and the problems found so far. `dropped` holds the paths of unusable values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: Any = {}
        self.expanded: set[KeyPath] = set()
        self.dropped: list[KeyPath] = []
        self._lines: dict[KeyPath, int] = {}
        self._sources: dict[KeyPath, str] = {}
        self._problems: list[tuple[int, str]] = []
        self._redact = Redactor()

    @property
    def problems(self) -> list[str]:
        """Problems in the order of the file."""
        return [text for _, text in sorted(self._problems, key=lambda problem: problem[0])]

    def add_problem(self, path: KeyPath, sentence: str, *, line: int | None = None) -> None:
        """Add a problem at `line`, or at the line of `path` or of its nearest enclosing entry."""
        location, line = self._locate(path, line)
        text = f"{location}: {dotted(path)}: {sentence}" if path else f"{location}: {sentence}"
        problem = (line, self._redact(one_line(text)))
        if problem not in self._problems:
            self._problems.append(problem)

    def reject(self, path: KeyPath, sentence: str, line: int) -> None:
        """Add a problem and drop the value at `path`."""
        self.add_problem(path, sentence, line=line)
        self.dropped.append(path)

    def set_line(self, path: KeyPath, line: int) -> None:
        self._lines[path] = line

    def override(self, path: KeyPath, value: str, source: str) -> None:
        """Replace the value at `path` with `value`; its problems name `source` instead of a line."""
        if _put(self.data, path, value):
            self._sources[path] = source

    def validate(self, model: type[ModelT]) -> ModelT:
        """Build `model` from the usable part of the data, and add a problem for each unusable value.

        A required value that is missing or unusable becomes a placeholder, so that its section stays usable.
        """
        for name, field in model.model_fields.items():
            if field.exclude and isinstance(self.data, dict) and name in self.data:
                self.add_problem((name,), _unknown_key(model, (name,)))
                self.dropped.append((name,))
        data = _without(self.data, self.dropped)
        for attempt in range(_MAX_PASSES):
            try:
                return model.model_validate(data)
            except ValidationError as error:
                details = error.errors(include_url=False)
                if attempt == 0:
                    self._explain_all(model, data, details)
                missing = [item["loc"] for item in details if item["type"] == "missing"]
                unusable = [_existing(data, item["loc"]) for item in details if item["type"] != "missing"]
                self.dropped += [*missing, *unusable]
                data = _without(data, unusable)
                for path in missing:
                    _put(data, path, _PLACEHOLDER)
        return model.model_validate({})

    def depends_on_dropped(self, path: KeyPath) -> bool:
        """Return whether the value at `path`, a part of it or its section was dropped as unusable."""
        return any(
            dropped[: len(path)] == path[: len(dropped)] and len(dropped) <= len(path) + 1 for dropped in self.dropped
        )

    def _locate(self, path: KeyPath, line: int | None) -> tuple[str, int]:
        if path in self._sources:
            return self._sources[path], 0
        while line is None and path:
            line = self._lines.get(path)
            path = path[:-1]
        return (f"{self.path}:{line}", line) if line else (str(self.path), 0)

    def _explain_all(self, model: type[BaseModel], data: Any, details: list[ErrorDetails]) -> None:
        # Each member of a union reports its own error about the same value; only the first is shown.
        first = {
            (_existing(data, item["loc"]), item["type"] == "missing" and item["loc"]): item for item in details[::-1]
        }
        for (path, _), item in reversed(first.items()):
            self._explain(model, item, path)

    def _explain(self, model: type[BaseModel], item: ErrorDetails, path: KeyPath) -> None:
        kind, context = item["type"], item.get("ctx", {})
        if kind == "extra_forbidden":
            self.add_problem(path, _unknown_key(model, path))
        elif kind == "missing":
            if item["loc"] not in self.dropped:
                self.add_problem(path, f"'{item['loc'][-1]}' is missing")
        elif kind == "literal_error":
            allowed = re.findall(r"'([^']*)'", str(context.get("expected", "")))
            self.add_problem(
                path, f"{self._shown(path, item['input'])} is not allowed{suggest(item['input'], allowed)}"
            )
        elif kind == "value_error":
            self.add_problem(path, str(context.get("error", item["msg"])))
        else:
            wanted = _MESSAGES[kind].format_map(context) if kind in _MESSAGES else item["msg"]
            is_collection = isinstance(item["input"], dict | list)
            actual = "" if is_collection else f"; it is {self._shown(path, item['input'])}"
            self.add_problem(path, f"{wanted}{actual}")

    def _shown(self, path: KeyPath, value: Any) -> str:
        is_secret = not _SECRET_NAMES.isdisjoint(path) or "env" in path
        if is_secret or path in self.expanded or not path:
            return "the value given"
        text = "null" if value is None else str(value)
        return f"'{text[:_MAX_SHOWN]}{'…' if len(text) > _MAX_SHOWN else ''}'"


def read_document(path: Path) -> ConfigDocument:
    """Read the file at `path`. Raises `ConfigError` if it is not readable YAML; the document keeps other problems."""
    document = ConfigDocument(path)
    _fill(document, path.read_bytes, expands=True)
    return document


def parse_document(text: str, path: Path) -> ConfigDocument:
    """Read `text`, of the file at `path`, and leave variables in it as they are. Raises `ConfigError`."""
    document = ConfigDocument(path)
    _fill(document, text.encode, expands=False)
    return document


def compose(text: str) -> yaml.Node | None:
    """Return the nodes of `text`, which `parse_document` has read."""
    node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return node


def _fill(document: ConfigDocument, read: Callable[[], bytes], *, expands: bool) -> None:
    sentence, line = _unreadable(document, read, expands=expands)
    if sentence is not None:
        document.add_problem((), sentence, line=line)
        raise ConfigError(document.problems)


def _unreadable(document: ConfigDocument, read: Callable[[], bytes], *, expands: bool) -> tuple[str | None, int | None]:
    """Fill `document` with what `read` returns. Return the reason and line if that is unreadable."""
    try:
        _parse(read().decode("utf-8-sig"), document, expands=expands)
    except FileNotFoundError:
        return "there is no such file. Create one with `llm-api-server init`, or give its path with --config", None
    except OSError as error:
        return f"the file cannot be read: {error.strerror}", None
    except UnicodeDecodeError as error:
        return "the file is not UTF-8 text", error.object[: error.start].count(b"\n") + 1
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        return f"not valid YAML: {reason}", mark.line + 1 if mark else None
    except yaml.YAMLError as error:
        return f"not valid YAML: {getattr(error, 'reason', error)}", None
    except RecursionError:
        return "not valid YAML: nested too deeply", None
    return None, None


def _parse(text: str, document: ConfigDocument, *, expands: bool) -> None:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return
        _check_size(node)
        data = _Reader(document, loader, expands=expands).value(node, ())
        document.data = {} if data is None else data
    finally:
        loader.dispose()


def _check_size(root: yaml.Node) -> None:
    """Raise `yaml.MarkedYAMLError` if aliases multiply the values of the file ("billion laughs")."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known is not None:
            return known
        sizes[id(node)] = 0  # of a node that contains itself, which the reader refuses
        children: Iterable[yaml.Node] = ()
        if isinstance(node, yaml.MappingNode):
            children = (child for entry in node.value for child in entry)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        total = sizes[id(node)] = 1 + sum(map(size, children))
        if total > len(sizes) + _MAX_ALIASED_VALUES:
            problem = f"aliases repeat more than {_MAX_ALIASED_VALUES:,} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return total

    size(root)


class _Reader:
    """Converter of YAML nodes into data; records the line of each value."""

    def __init__(self, document: ConfigDocument, loader: Any, *, expands: bool) -> None:
        self._document = document
        self._loader = loader
        self._expands = expands
        self._open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if id(node) in self._open:
            self._document.reject(path, "refers to itself", _line(node))
            return None
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTION_TAGS:
            self._document.reject(path, f"not a value of type '{node.tag}'", _line(node))
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self._item(child, (*path, index)) for index, child in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self._open.discard(id(node))

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self._document.set_line(path, _line(node))
        return self.value(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[Any, Any]:
        self._check_duplicates(node, path)
        self._loader.flatten_mapping(node)
        data: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is not None:
                self._document.set_line((*path, key), _line(key_node))
                data[key] = self.value(value_node, (*path, key))
        return data

    def _check_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE_TAG:
                continue
            if key.value in lines:
                sentence = f"given twice, first in line {lines[key.value]}; keep one of them"
                self._document.add_problem((*path, key.value), sentence, line=_line(key))
            lines.setdefault(key.value, _line(key))

    def _key(self, node: yaml.Node, path: KeyPath) -> str | None:
        """Return the key as text, even if YAML reads it as a number or a boolean."""
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        self._document.add_problem(path, "a key must be text", line=_line(node))
        return None

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        if node.tag == _TEXT_TAG:
            text = str(node.value)
            return self._expand(text, node, path) if self._expands else text
        try:
            value = self._loader.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError, LookupError):
            kind = "a date or time that exists" if node.tag == _TIME_TAG else f"a value of type '{node.tag}'"
            self._document.reject(path, f"not {kind}", _line(node))
            return None
        if node.tag in _NUMBER_TAGS and _AMBIGUOUS_NUMBER.fullmatch(str(node.value)):
            sentence = f"YAML reads {node.value} as the number {value}; write that number, or put text in quotes"
            self._document.reject(path, sentence, _line(node))
            return None
        return value

    def _expand(self, text: str, node: yaml.Node, path: KeyPath) -> str:
        """Replace `${NAME}` and `${NAME:-default}` from the environment, and `$${` with `${`."""

        def replace(match: re.Match[str]) -> str:
            if match["escaped"]:
                return "${"
            self._document.expanded.add(path)
            if match["wrong"] is not None:
                sentence = "a variable is written ${NAME} or ${NAME:-default}; for a literal ${ write $${"
                self._document.reject(path, sentence, _line(node))
                return ""
            value = os.environ.get(match["name"])
            if value or (value is not None and match["default"] is None):
                return value
            if match["default"] is None:
                sentence = f"the environment variable {match['name']} is not set; set it, or give ${{NAME:-default}}"
                self._document.reject(path, sentence, _line(node))
                return ""
            return match["default"]

        return _VARIABLE.sub(replace, text) if "${" in text else text


def dotted(path: KeyPath) -> str:
    """Return `auth.api_keys[0]` for `("auth", "api_keys", 0)`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def suggest(word: Any, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'? Allowed: …`, the end of a sentence."""
    names = list(allowed)
    lower = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(str(word).lower(), lower, n=1)
    hint = f"; did you mean '{lower[close[0]]}'?" if close else "."
    return f"{hint} Allowed: {', '.join(names)}" if names else hint.rstrip(".")


def _unknown_key(model: type[BaseModel], path: KeyPath) -> str:
    here = _fields_at(model, path[:-1])
    sentence = f"unknown key{suggest(path[-1], here)}"
    if "did you mean" not in sentence:
        for elsewhere in _paths(model):
            if elsewhere.rpartition(".")[2] == path[-1]:
                return f"unknown key here; it belongs at {elsewhere}. Allowed here: {', '.join(here)}"
    return sentence


def _fields_at(model: type[BaseModel], path: KeyPath) -> list[str]:
    """Return the keys that the declaration allows at `path`."""
    annotation: Any = model
    for part in path:
        field = annotation.model_fields.get(part) if _is_model(annotation) else None
        annotation = field.annotation if field else next(_models_in(annotation), None)
    return [name for name, field in annotation.model_fields.items() if not field.exclude] if annotation else []


def _paths(annotation: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in annotation.model_fields.items():
        if field.exclude:
            continue
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _paths(inner, f"{prefix}{name}{_JOINTS.get(str(get_origin(field.annotation)), '.')}")


def _models_in(annotation: Any) -> Iterator[Any]:
    if _is_model(annotation):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _existing(data: Any, location: KeyPath) -> KeyPath:
    """Return the part of pydantic's location that exists in the file, without union members and missing keys."""
    for index, part in enumerate(location):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return location[:index]
    return location


def _put(data: Any, path: KeyPath, value: str) -> bool:
    """Set the value at `path`. Return False if an enclosing value is no section."""
    for part in path[:-1]:
        if isinstance(data, dict) and data.get(part) is None:
            data[part] = {}
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return False
    if not isinstance(data, dict):
        return False
    data[path[-1]] = value
    return True


def _without(data: Any, paths: Iterable[KeyPath]) -> Any:
    """Return a copy of `data` without the values at `paths`; `()` is all of it."""
    unwanted = set(paths)

    def copy(value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {k: copy(v, (*path, k)) for k, v in value.items() if (*path, k) not in unwanted}
        if isinstance(value, list):
            return [copy(v, (*path, i)) for i, v in enumerate(value) if (*path, i) not in unwanted]
        return value

    return {} if () in unwanted else copy(data, ())


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
