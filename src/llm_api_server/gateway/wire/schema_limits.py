"""Bounds in JSON schemas and grammars that contradict themselves. Pure; `openai.py` calls it with decoded bodies.

llama.cpp builds `"minItems": 5, "maxItems": 2` by counting from 2 down to 5: it takes all memory of the machine until
the kernel ends it. So no engine gets to see such bounds, wherever in a body they stand.
"""

from __future__ import annotations

import re
from typing import Any

from llm_api_server.errors import InvalidRequest

#: Larger ones wrap around in engines that count with 32 bits.
_LARGEST = 2**31 - 1
_PAIRS = (("minItems", "maxItems"), ("minLength", "maxLength"), ("minProperties", "maxProperties"))
_TEXTS = ("pattern", "grammar")  # a schema's regular expression; llama.cpp's own member of a body
_REPETITION = re.compile(r"\{\s*(\d+)\s*,\s*(\d+)\s*\}")


def may_have_bounds(body: bytes) -> bool:
    """False: `check_bounds` has nothing to find. An escape may hide a key."""
    find = body.find  # as in media.py
    return (
        find(b'"pattern"') >= 0 or find(b'"grammar"') >= 0 or find(b"\\u") >= 0 or find(b'Items"') >= 0
        or find(b'Length"') >= 0 or find(b'Properties"') >= 0
    )  # fmt: skip


def check_bounds(content: Any) -> None:
    """Raises `InvalidRequest` for a lower bound above its upper one, or one that no answer could reach."""
    _walk(content, "")


def _walk(value: Any, param: str) -> None:
    if isinstance(value, list):
        for index, item in enumerate(value):
            _walk(item, f"{param}[{index}]")
    elif isinstance(value, dict):
        _check(value, param)
        for key, item in value.items():
            if isinstance(item, dict | list):
                _walk(item, f"{param}.{key}" if param else key)


def _check(schema: dict[str, Any], param: str) -> None:
    for low_name, high_name in _PAIRS:
        low, high = _bound(schema, low_name, param), _bound(schema, high_name, param)
        if low is not None and high is not None and low > high:
            raise _impossible(f"'{low_name}' is greater than '{high_name}'", param)
    for name in _TEXTS:
        text = schema.get(name)
        for low, high in _REPETITION.findall(text) if isinstance(text, str) else ():
            if float(low) > float(high):
                raise _impossible(f"'{name}' repeats at least {low} and at most {high} times", param)


def _bound(schema: dict[str, Any], name: str, param: str) -> float | None:
    """None where there is none; what is no number at all the engine refuses itself."""
    bound = schema.get(name)
    if not isinstance(bound, int | float) or isinstance(bound, bool):
        return None
    if not 0 <= bound <= _LARGEST:
        raise _impossible(f"'{name}' must be between 0 and {_LARGEST}", param)
    return bound


def _impossible(reason: str, param: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid schema: {reason[:200]}.", param=param[:200] or None)
