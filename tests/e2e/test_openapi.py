"""Responses to generated requests conform to the OpenAPI description. `make fuzz` does the same for an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.openapi import fuzz
from tests.running import running

SEED = 20
#: Per endpoint and phase; some phases add examples of the description.
EXAMPLES = 4


@pytest.mark.timeout(900)
def test_every_response_conforms_to_the_description(tmp_path: Path, smollm2_gguf: Path) -> None:
    with running(tmp_path, fuzz.config(smollm2_gguf)) as server:
        done = fuzz.run(server, "--seed", str(SEED), "--max-examples", str(EXAMPLES))
        found = fuzz.figures(done.stdout)
        assert done.returncode == 0, done.stdout
        assert found["failures"] == 0
        assert found["cases"] > 2000
        assert "Traceback" not in server.output()
