"""The exception tree: its diagram, its codes, and the bodies of its errors."""

from __future__ import annotations

import json
import re

import pytest

from llm_api_server import errors
from llm_api_server.errors import ApiError, EngineUnavailable, InternalError, InvalidKeyField, ServerError

_LINE = re.compile(
    r"^ {4}(?P<indent>[ │├└─]*)(?P<name>\w+)(?: +(?P<status>\d{3}))?(?: .*\bcode (?P<code>\w+))?.*$", re.MULTILINE
)
CLASSES = {one.__name__: one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, ServerError)}
API_ERRORS = [one for one in CLASSES.values() if issubclass(one, ApiError)]


def diagram() -> dict[str, tuple[str | None, int | None, str | None]]:
    """Parent, status and code of each class in the module's docstring."""
    found: dict[str, tuple[str | None, int | None, str | None]] = {}
    parents: list[str] = []
    for line in _LINE.finditer(errors.__doc__ or ""):
        depth = len(line["indent"]) // 4
        parents[depth:] = [line["name"]]
        status = int(line["status"]) if line["status"] else None
        found[line["name"]] = (parents[depth - 1] if depth else None, status, line["code"])
    return found


def test_the_diagram_names_every_class_once_under_its_parent() -> None:
    assert {name: parent for name, (parent, _, _) in diagram().items()} == {
        name: one.__bases__[0].__name__ if one is not ServerError else None for name, one in CLASSES.items()
    }


@pytest.mark.parametrize("error", API_ERRORS, ids=lambda one: one.__name__)
def test_the_diagram_has_the_status_and_code_of_each_api_error(error: type[ApiError]) -> None:
    _, status, code = diagram()[error.__name__]
    assert code == error.code
    assert status in {error.status, None}


def test_each_code_names_one_class() -> None:
    codes = [error.code for error in API_ERRORS if error.code is not None and "code" in vars(error)]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("error", [one for one in API_ERRORS if vars(one).get("code")], ids=lambda one: one.__name__)
def test_a_code_from_the_manager_becomes_its_error(error: type[ApiError]) -> None:
    expected = EngineUnavailable if error is InternalError else error
    received = errors.error_from_code(error.code or "", "message", retry_after=2)
    assert (type(received), received.message, received.retry_after) == (expected, "message", 2)


def test_an_unknown_code_from_the_manager_is_retryable() -> None:
    assert type(errors.error_from_code("from_a_later_version", "message")) is EngineUnavailable


def test_an_invalid_key_field_names_the_field() -> None:
    error = InvalidKeyField("priority", "give a number.")
    assert json.loads(errors.render(error))["error"] == {
        "message": "Invalid 'priority': give a number.",
        "type": "invalid_request_error",
        "param": "priority",
        "code": None,
    }


def test_anthropic_clients_get_their_own_error_types() -> None:
    body = json.loads(errors.render(EngineUnavailable("down"), anthropic=True))
    assert body == {"type": "error", "error": {"type": "overloaded_error", "message": "down"}}


@pytest.mark.parametrize("text", ["\ud83d", "a\udfffb", "\udc00\ud800"])
@pytest.mark.parametrize("is_anthropic", [False, True])
def test_a_lone_surrogate_in_a_message_is_escaped(text: str, is_anthropic: bool) -> None:
    body = errors.render(errors.InvalidRequest(f"not {text}", param=text), anthropic=is_anthropic)
    assert json.loads(body)["error"]["message"] == f"not {text.encode('ascii', 'backslashreplace').decode()}"
