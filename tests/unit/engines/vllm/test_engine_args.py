"""Arguments of vLLM on its command line."""

from __future__ import annotations

from typing import Any

import pytest

from llm_api_server.engines.vllm.engine_args import command_line


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"a_b": "x"}, ["--a-b", "x"]),
        ({"a": True, "b": False, "c": None}, ["--a", "--no-b"]),
        ({"a": {"k": [1]}}, ["--a", '{"k": [1]}']),
        ({"a": ["x", 2]}, ["--a", "x", "2"]),
        ({"a": -1}, ["--a=-1"]),
    ],
)
def test_options_become_arguments(options: dict[str, Any], expected: list[str]) -> None:
    assert command_line(options) == expected
