"""Programs that tests need: without them tests are skipped, or fail where the environment requires the program."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

#: Names of required programs, separated by commas; set in continuous integration.
NEED_VARIABLE = "LLM_API_SERVER_TESTS_NEED"


def missing(name: str, reason: str) -> NoReturn:
    """Fail if the variable requires `name`, else skip."""
    if name in os.environ.get(NEED_VARIABLE, "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)
