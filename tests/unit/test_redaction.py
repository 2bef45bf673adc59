"""Keys and tokens are removed from any text; similar words stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.auth.access import new_key
from llm_api_server.redaction import MASK, Redactor, one_line


@given(st.text(max_size=40), st.text(max_size=40).filter(lambda text: not text[:1].isalnum() and text[:1] not in "_-"))
def test_a_new_key_is_removed_anywhere(before: str, after: str) -> None:
    key = new_key()
    separator = "" if not before[-1:].isalnum() else " "
    assert key not in Redactor()(before + separator + key + after)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Authorization: Bearer abcdef123456", f"Authorization: Bearer {MASK}"),
        ("{'x-api-key': 'abcdef123456'}", f"{{'x-api-key': '{MASK}'}}"),
        ("secret_key=abcdef123456&a=1", f"secret_key={MASK}&a=1"),
        ("a eyJhbGciOi.eyJzdWIi.c2ln b", f"a eyJ{MASK} b"),
        ("sk-abcdef123456, sk-abcdef654321", f"sk-{MASK}, sk-{MASK}"),
        ("task-abcdef123456 and sk-8", "task-abcdef123456 and sk-8"),
    ],
)
def test_forms_of_secrets(text: str, expected: str) -> None:
    assert Redactor()(text) == expected


def test_known_secrets_are_removed_in_any_form() -> None:
    redact = Redactor(["a+b (c)", "a+b (c) and more", ""])
    assert redact("x a+b (c) and more y a+b (c)") == f"x {MASK} y {MASK}"
    assert Redactor([])("") == ""


@given(st.text())
def test_one_line_has_no_line_break(text: str) -> None:
    assert len(one_line(text).splitlines()) <= 1
    assert "\x1b" not in one_line(text)
