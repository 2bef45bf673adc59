"""Server of the OpenAI API that responds as the test wants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tiny_api import TinyApi, words

MODELS = [{"id": "embedder", "tasks": ["embed"]}, {"id": "talker", "tasks": ["generate"]}]


@pytest.fixture
def api() -> Iterator[TinyApi]:
    with TinyApi(lambda _: words("Hel", "lo"), MODELS) as server:
        yield server
