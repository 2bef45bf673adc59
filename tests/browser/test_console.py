"""The console in a real browser, against a real server, a real engine and a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.hub import Repo, hub
from tests.needs import missing
from tests.running import KEY, ROOT, running

STORY = Path(__file__).with_name("story.mjs")
REPO = "tests/starter-GGUF"
#: Limit of the console's first load in bytes, as transferred.
MOST_BYTES = 300_000


@pytest.mark.browser
@pytest.mark.timeout(900)
def test_the_whole_story(
    tmp_path: Path, smollm2_gguf: Path, node_browser: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("chromium") is None:
        missing("chromium", "Chromium is not installed (apt-get install chromium)")
    out = ROOT / ".cache" / "screenshots"
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(STORY, node_browser)
    models = {"max_loaded": 1, "min_loaded_time": 0, "available": {"other": {"path": str(smollm2_gguf)}}}
    config: dict[str, Any] = {"models": models}
    with hub() as here:
        here.repos[REPO] = Repo({"model-Q4_K_M.gguf": smollm2_gguf.read_bytes()})
        for name, value in here.environment().items():
            monkeypatch.setenv(name, value)
        with running(tmp_path, config) as server:
            environment = {**os.environ, "URL": server.url, "KEY": KEY, "SOURCE": REPO, "OUT": str(out)}
            done = subprocess.run(
                ["node", STORY.name], cwd=node_browser, env=environment, capture_output=True, text=True, check=False
            )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bytes"] < MOST_BYTES
