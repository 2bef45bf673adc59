"""Programs that tests cannot do without: they are skipped without them, and fail where that would hide a failure."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

#: What the tests must not be without, separated by commas: set in continuous integration.
NEED_VARIABLE = "LLM_API_SERVER_TESTS_NEED"


def missing(name: str, reason: str) -> NoReturn:
    """`name` is what the variable calls it."""
    if name in os.environ.get(NEED_VARIABLE, "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)
