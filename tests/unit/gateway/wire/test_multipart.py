"""Multipart forms: text fields are read and replaced, the file stays, other bodies are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_api_server.errors import InvalidRequest
from llm_api_server.gateway.wire.multipart import Form

TYPE = "multipart/form-data; boundary=XX"


def form(**fields: bytes) -> bytes:
    parts = [
        f'--XX\r\nContent-Disposition: form-data; name="{name}"; filename="n\\"ame=x"\r\n\r\n'.encode()
        + value
        + b"\r\n"
        for name, value in fields.items()
    ]
    return b"".join(parts) + b"--XX--\r\n"


def test_model_and_stream_are_read() -> None:
    facts = Form(TYPE, form(file=b"\x00\r\n--X", model=b"whisper", stream=b"true")).read()
    assert (facts.model, facts.stream) == ("whisper", True)


def test_an_absent_or_empty_model_is_none() -> None:
    assert Form(TYPE, form(file=b"x")).read().model is None
    assert Form(TYPE, form(model=b"", file=b"x")).read().model is None


def test_a_quoted_boundary_is_accepted() -> None:
    assert Form('Multipart/Form-Data; charset=x; Boundary="XX"', form(file=b"x", model=b"m")).read().model == "m"


@given(content=st.binary(max_size=200), model=st.text("abc", max_size=5))
def test_replacing_the_model_keeps_the_file(content: bytes, model: str) -> None:
    if b"\r\n--XX" in content:
        return
    body = form(file=content, model=model.encode(), language=b"en")
    changed = Form(TYPE, body).with_fields({"model": "own"})
    assert changed == form(file=content, model=b"own", language=b"en")


def test_an_absent_field_is_added() -> None:
    changed = Form(TYPE, form(file=b"x")).with_fields({"model": "own"})
    assert Form(TYPE, changed).read().model == "own"
    assert changed.endswith(form(file=b"x"))


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", form(file=b"x")),
        (TYPE, b""),
        (TYPE, form(file=b"x")[:-10]),
        (TYPE, b"--XX\r\nno end of head"),
        (TYPE, form(model=b"m")),
        (TYPE, form(file=b"x", model=b"\xff")),
        (TYPE, form(file=b"x", model=b"m" * 5000)),
        (TYPE, form(**{f"f{number}": b"" for number in range(100)})),
    ],
)
def test_an_invalid_form_is_refused(content_type: str, body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        Form(content_type, body).read()
