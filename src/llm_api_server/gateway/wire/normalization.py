"""Harmless forms of a request that engines refuse or misread, in the form that every engine reads. Pure.

Each function returns changes of top-level members, for `rewrite`; a request without such forms has none.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.wire import schemas

#: Members in which null says something: an assistant that only called tools has no text.
_MEANINGFUL_NULLS = frozenset({"content"})


class _DecodedMessages(msgspec.Struct):
    messages: list[dict[str, Any]]


def normalized(content: Any, kind: type[schemas.Request]) -> Any:
    """Return a decoded body without nulls in nullable members and with whole numbers as integers.

    Values of a client's own (schemas, metadata) are left alone below the top level. Equal values are not copied.
    """
    if not isinstance(content, dict):
        return content
    return _normalized({name: value for name, value in content.items() if value is not None}, _type_of(kind))


@cache
def _type_of(kind: type[schemas.Request]) -> inspect.Type:
    return inspect.type_info(kind)


def _normalized(value: Any, kind: inspect.Type) -> Any:
    if isinstance(kind, inspect.UnionType):
        found = _alternative(value, kind)
        return value if found is None else _normalized(value, found)
    if isinstance(kind, inspect.StructType) and isinstance(value, dict):
        changed = dict(value)
        for member in kind.fields:
            name = member.encode_name
            if name not in value:
                continue
            if value[name] is None and not member.required and name not in _MEANINGFUL_NULLS:
                del changed[name]
            else:
                changed[name] = _normalized(value[name], member.type)
        return changed if _differs(changed, value) else value
    if isinstance(kind, inspect.ListType) and isinstance(value, list):
        items = [_normalized(item, kind.item_type) for item in value]
        return items if any(one is not other for one, other in zip(items, value, strict=True)) else value
    if isinstance(kind, inspect.IntType) and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _differs(changed: dict[str, Any], value: dict[str, Any]) -> bool:
    return len(changed) != len(value) or any(changed[name] is not value[name] for name in changed)


def _alternative(value: Any, kind: inspect.UnionType) -> inspect.Type | None:
    """Return the member of the union that `value` can be normalized to; None: it is as it should be."""
    wanted: type[inspect.Type]
    if isinstance(value, dict):
        wanted = inspect.StructType
    elif isinstance(value, list):
        wanted = inspect.ListType
    elif isinstance(value, float) and not any(isinstance(one, inspect.FloatType) for one in kind.types):
        wanted = inspect.IntType
    else:
        return None
    return next((one for one in kind.types if isinstance(one, wanted)), None)


def member_changes(content: dict[str, Any], normal: dict[str, Any]) -> dict[str, Any]:
    """Return the members of `normal` that are not those of `content`; `msgspec.UNSET` marks a removed one."""
    found = {name: normal.get(name, msgspec.UNSET) for name in content}
    return {name: value for name, value in found.items() if value is not content[name]}


def without_empty_stops(given: str | list[str]) -> Any:
    """Return the stop texts that are not empty, as engines end at once at an empty one; `msgspec.UNSET`: none."""
    if isinstance(given, str):
        return given or msgspec.UNSET
    return [text for text in given if text] or msgspec.UNSET


def replayed_changes(body: bytes, messages: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Return `messages` as models with strict templates can read them, or none. Raises `InvalidRequest`.

    Refusals become text, and calls without arguments get `{}`. `messages` are the body's, where already decoded.
    """
    found = msgspec.json.decode(body, type=_DecodedMessages).messages if messages is None else messages
    changes = [_replay(message, f"messages[{index}]") for index, message in enumerate(found)]
    return {"messages": found} if any(changes) else {}


def _replay(message: dict[str, Any], param: str) -> bool:
    """Mend a message of the history in place; return whether it changed."""
    changed = False
    parts: Any = message.get("content")
    for index, part in enumerate(parts if isinstance(parts, list) else ()):
        if isinstance(part, dict) and part.get("type") == "refusal":
            parts[index] = {"type": "text", "text": part["refusal"]}
            changed = True
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function")
        if isinstance(function, dict) and _mend_arguments(function, f"{param}.tool_calls[{index}].function"):
            changed = True
    return changed


def replayed_items(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `input` of `/v1/responses` with the arguments of its calls mended. Raises `InvalidRequest`."""
    calls = [(index, item) for index, item in enumerate(items) if item.get("type") == "function_call"]
    changes = [_mend_arguments(call, f"input[{index}]") for index, call in calls]
    return {"input": items} if any(changes) else {}


def _mend_arguments(call: dict[str, Any], param: str) -> bool:
    """Give a call without arguments `{}`; return whether it changed. Raises `InvalidRequest` if they are no object."""
    given = call.get("arguments")
    if isinstance(given, dict):
        return False
    text = given.strip() if isinstance(given, str) else given
    if text in (None, "", "null"):
        call["arguments"] = "{}"
        return True
    if not isinstance(text, str) or not _is_object(text):
        place = f"{param}.arguments"
        raise InvalidRequest(
            f"Invalid '{place}': expected a JSON object as text, such as '{{}}'. Repair or remove this call.",
            param=place,
        )
    return False


def _is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError):
        return False
