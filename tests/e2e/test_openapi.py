"""The server does what its own OpenAPI description says, whatever it is sent. `make fuzz` does so for an hour."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.openapi import fuzz
from tests.running import running

SEED = 20
#: Per endpoint and phase; some phases try what the description names, whatever this says.
EXAMPLES = 4


@pytest.mark.timeout(900)
def test_no_answer_that_the_description_does_not_allow(tmp_path: Path, smollm2_gguf: Path) -> None:
    with running(tmp_path, fuzz.config(smollm2_gguf)) as server:
        done = fuzz.run(server, "--seed", str(SEED), "--max-examples", str(EXAMPLES))
        found = fuzz.figures(done.stdout)
        assert done.returncode == 0, done.stdout
        assert found["failures"] == 0
        assert found["cases"] > 2000
        assert "Traceback" not in server.output()
