"""Hooks that bring schemathesis past the first checks: every second valid body names a model and has no nulls."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode

MODEL = "m"


@schemathesis.hook
def before_call(context: Any, case: Any, **kwargs: Any) -> None:
    """Change every second valid body; leave the others as they are."""
    body = case.body
    is_valid = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
    if not is_valid or not isinstance(body, dict) or not _is_chosen(body):
        return
    case.body = {name: value for name, value in body.items() if value is not None}
    if "model" in body:
        case.body["model"] = MODEL


def _is_chosen(body: Any) -> bool:
    """Choose half of all bodies, always the same ones, so that a failure can be repeated."""
    return hashlib.sha256(json.dumps(body, default=repr, sort_keys=True).encode()).digest()[0] % 2 == 0
