"""Where the server is, and how the scripts of this folder report their findings.

Each script is run by tests/e2e/test_clients.py with the interpreter of .venv-clients.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

URL = os.environ["TEST_URL"]
KEY = os.environ["TEST_KEY"]
MODEL = os.environ["TEST_MODEL"]
WRONG_KEY = "sk-nobody-has-this-key"
LONG = "Count from one to one thousand, one number per line."


def error_of(call: Callable[[], Any]) -> str:
    """Return the class of the error that `call` raises."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 its name is the finding
        return type(error).__name__
    return "none"


def report(**facts: Any) -> None:
    print(json.dumps(facts))
