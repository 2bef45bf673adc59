"""Brings schemathesis past the first checks: every second valid body names a model that there is, and has no nulls."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode

MODEL = "m"


@schemathesis.hook
def before_call(context: Any, case: Any, **kwargs: Any) -> None:
    """What is to be refused stays as it is."""
    body = case.body
    is_valid = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
    if not is_valid or not isinstance(body, dict) or not _is_chosen(body):
        return
    case.body = {name: value for name, value in body.items() if value is not None}
    if "model" in body:
        case.body["model"] = MODEL


def _is_chosen(body: Any) -> bool:
    """The same body always gets the same answer: what failed can be repeated."""
    return hashlib.sha256(json.dumps(body, default=repr, sort_keys=True).encode()).digest()[0] % 2 == 0
