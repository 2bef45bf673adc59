"""Sentences for clients: short, without paths of this machine."""

from __future__ import annotations

import pytest

from llm_api_server.engines.explain import without_paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot open /home/me/models/x.gguf", "cannot open x.gguf"),
        ("cannot open '/home/me/models/x.gguf': no", "cannot open 'x.gguf': no"),
        ("in ~/models/ and ../up/file", "in models and file"),
        ("about 3/4 of org/name at https://host/docs", "about 3/4 of org/name at https://host/docs"),
        ("two\n  lines", "two lines"),
    ],
)
def test_paths_lose_their_folders(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_long_text_is_truncated() -> None:
    assert len(without_paths("word " * 1000)) <= 400
