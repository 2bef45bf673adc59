"""Errors as the real engines send them, and their translations."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from llm_api_server.errors import RateLimited
from llm_api_server.gateway.wire.engine_errors import MAX_RETRY_AFTER, retry_after_seconds, translate_error
from llm_api_server.gateway.wire.error_response import error_response

LLAMA_CONTEXT = {
    "error": {
        "code": 400,
        "message": "request (3031 tokens) exceeds the available context size (512 tokens), try increasing it",
        "type": "exceed_context_size_error",
        "n_prompt_tokens": 3031,
        "n_ctx": 512,
    }
}
VLLM_CONTEXT = {
    "error": {
        "message": "This model's maximum context length is 2048 tokens. However, you requested 3000 tokens.",
        "type": "BadRequestError",
        "param": "input_tokens",
        "code": 400,
    }
}


def llama(code: int, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "type": "x"}}


@pytest.mark.parametrize(
    ("status", "body", "expected", "code"),
    [
        (400, LLAMA_CONTEXT, 400, "context_length_exceeded"),
        (400, VLLM_CONTEXT, 400, "context_length_exceeded"),
        (500, llama(500, "input (900 tokens) is too large to process. increase the physical batch size"), 400,
         "context_length_exceeded"),
        (500, llama(500, "image input is not supported - hint: provide the mmproj"), 400, "not_supported"),
        (501, llama(501, "This server does not support reranking."), 400, "not_supported"),
        (500, llama(500, "Failed to parse tools: Missing tool function"), 400, None),
        (500, llama(500, "'messages' is required"), 400, None),
        (500, llama(500, "vector::_M_range_check: __n (which is 99) >= this->size() (which is 9)"), 400, None),
        (404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}, 400, "not_supported"),
        (404, {"detail": "Not Found"}, 400, "not_supported"),
        (405, {"detail": "Method Not Allowed"}, 400, "not_supported"),
        (422, {"detail": [{"loc": ["body", "prompt"], "msg": "Field required"}]}, 400, None),
        (400, {"object": "error", "message": "bad", "type": "BadRequestError", "code": 400}, 400, None),
        (401, {"error": {"message": "Incorrect API key provided: sk-remote"}}, 500, "engine_error"),
        (403, {}, 500, "engine_error"),
        (429, {"error": {"message": "slow down"}}, 429, "rate_limit_exceeded"),
        (500, llama(500, "boom"), 500, "engine_error"),
        (502, "<html>Bad Gateway</html>", 500, "engine_error"),
        (500, llama(500, "Image size (200000000 pixels) exceeds limit of 178956970 pixels"), 400, None),
        (503, llama(503, "Loading model"), 503, "engine_unavailable"),
        (400, [1, 2], 400, None),
        (500, None, 500, "engine_error"),
    ],
)  # fmt: skip
def test_an_engine_error_is_translated(status: int, body: Any, expected: int, code: str | None) -> None:
    raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    error = translate_error(status, raw)
    assert (error.status, error.code) == (expected, code)
    assert error.message
    assert "sk-remote" not in error.message


def test_the_member_that_llama_cpp_names_becomes_the_param() -> None:
    body = json.dumps(llama(400, "Field 'n': Value must be between 1 <= value <= 2, but got 9")).encode()
    assert translate_error(400, body).param == "n"


def test_paths_of_validation_errors_are_kept() -> None:
    body = json.dumps({"detail": [{"loc": ["body", "prompt"], "msg": "Field required"}]}).encode()
    assert translate_error(422, body).message == "prompt: Field required"


@pytest.mark.parametrize(
    "message",
    ["cannot open /home/me/models/x.gguf", "error in '/opt/venv/lib/python3.11/site-packages/vllm/x.py'",
     'Traceback (most recent call last):\n File "/a/b.py"'],
)  # fmt: skip
def test_paths_and_tracebacks_are_removed(message: str) -> None:
    shown = translate_error(500, json.dumps({"error": {"message": message}}).encode()).message
    assert "/" not in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "At most 16 image(s) may be provided in one prompt. (parameter=image)",
            "At most 16 image(s) may be provided in one prompt.",
        ),
        ("Unsupported part. (parameter=type, value=pic)ture\n)", "Unsupported part."),
        (
            "Failed to load image: cannot identify image file <_io.BytesIO object at 0x7f1c>",
            "Failed to load image: cannot identify image file",
        ),
        ("Say (parameter=x) twice.", "Say (parameter=x) twice."),
    ],
)
def test_suffixes_of_vllm_are_removed(message: str, shown: str) -> None:
    assert translate_error(400, json.dumps(llama(400, message)).encode()).message == shown


def test_urls_and_fractions_are_not_paths() -> None:
    message = "tokens/s is 3/4; see https://docs.test/a/b"
    assert translate_error(400, json.dumps({"error": {"message": message}}).encode()).message == message


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("12", 12), ("0.5", 0.5), ("-5", 0), ("inf", None), ("Infinity", None), ("1e999", None), ("nan", None),
     ("1e300", MAX_RETRY_AFTER), ("soon", None), ("", None), (None, None),
     ("Wed, 21 Oct 2026 07:28:00 GMT", 60), ("Wednesday, 21-Oct-26 07:28:00 GMT", 60),
     ("Wed, 21 Oct 2026 07:00:00 GMT", 0), ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER),
     ("Wed, 99 Oct 2026 07:28:00 GMT", None)],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date_and_never_beyond_its_bound(
    header: str | None, seconds: float | None
) -> None:
    now = datetime(2026, 10, 21, 7, 27, tzinfo=UTC).timestamp()
    assert retry_after_seconds(header, now) == seconds


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_error_response_never_fails_for_its_retry_after(value: float) -> None:
    status, headers, _ = error_response(RateLimited("later", retry_after=value), "/v1/chat/completions")
    assert (status, dict(headers).get(b"retry-after")) == (429, None)


@pytest.mark.parametrize(
    ("status", "expected", "code"),
    [(408, 504, "timeout"), (504, 504, "timeout"), (524, 504, "timeout"), (409, 503, "engine_unavailable"),
     (425, 503, "engine_unavailable"), (499, 503, "engine_unavailable"), (503, 503, "engine_unavailable"),
     (529, 503, "engine_unavailable"), (521, 503, "engine_unavailable")],
)  # fmt: skip
def test_what_may_be_retried_stays_retryable(status: int, expected: int, code: str) -> None:
    error = translate_error(status, b'{"error":{"message":"Invalid state: model is not supported"}}', retry_after=7)
    assert (error.status, error.code, error.retry_after) == (expected, code, 7)


@pytest.mark.parametrize(
    "body",
    [
        [{"error": {"code": 400, "message": "bad part", "status": "INVALID_ARGUMENT"}}],
        {"success": False, "errors": [{"code": 5006, "message": "bad part"}], "result": None},
        {"errors": ["bad part"]},
        {"error": [{"message": "bad part"}]},
        {"error": None, "message": "bad part"},
    ],
)
def test_error_lists_keep_their_words(body: Any) -> None:
    assert translate_error(400, json.dumps(body).encode()).message == "bad part"


def test_a_refusal_of_the_content_is_the_clients_matter() -> None:
    error = translate_error(403, b'{"error":{"message":"Your input was flagged by moderation"}}')
    assert (error.status, error.message) == (400, "Your input was flagged by moderation")


def test_a_missing_chat_template_error_names_the_option() -> None:
    message = "As of transformers v4.44, you must provide a chat template if the tokenizer does not define one."
    error = translate_error(400, json.dumps({"error": {"message": message}}).encode())
    assert (error.status, error.code) == (400, "not_supported")
    assert "engine_args: {chat_template: FILE}" in error.message
