"""Headers as lines of a head, and back."""

from __future__ import annotations

from llm_api_server.gateway.http.header_lines import CachedLines, headers_of, lines_of

HEADERS = [(b"content-type", b"text/plain"), (b"x-colon", b"a: b"), (b"x-empty", b"")]
LINES = b"content-type: text/plain\r\nx-colon: a: b\r\nx-empty: \r\n"


def test_headers_become_lines_and_lines_become_the_same_headers() -> None:
    assert lines_of(HEADERS) == LINES
    assert headers_of(LINES) == HEADERS
    assert (lines_of([]), headers_of(b"")) == (b"", [])


def test_lines_are_built_again_only_for_another_list() -> None:
    cached = CachedLines()
    first = cached.of(HEADERS)
    assert first == LINES
    assert cached.of(HEADERS) is first
    assert cached.of([(b"server", b"uvicorn")]) == b"server: uvicorn\r\n"
