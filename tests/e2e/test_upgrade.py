"""A server of the version before is upgraded under load: `restart` from the new code loses no request and no engine.

The test protects the formats between processes of two versions: control messages, adoption files, the snapshot of
limits, names of modules and scripts.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.e2e.test_reload import MODEL, Stream, body
from tests.e2e.test_restart import LIMIT, LIMITED_KEY, Load, config
from tests.running import ROOT, Server, running
from tests.waiting import wait_until

#: The last commit of the version before.
BEFORE = "42dacb5"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installation from which all processes of the test run; it holds the version before."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", BEFORE, "src"], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode != 0:
        needs.missing("history", f"the repository lacks commit {BEFORE}: a shallow clone or no clone")
    folder = tmp_path / "installed"
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    monkeypatch.setenv("PYTHONPATH", str(folder / "src"))
    return folder


def upgrade(installed: Path) -> None:
    """Replace the version before by the current one."""
    new = installed / "new"
    shutil.copytree(ROOT / "src", new, ignore=shutil.ignore_patterns("__pycache__"))
    (installed / "src").rename(installed / "old")
    new.rename(installed / "src")


def complete(server: Server, key: str) -> int:
    with server.client(key) as client:
        return client.post("/v1/completions", json=body()).status_code


def counted_requests(server: Server) -> int:
    with server.client() as client:
        total = client.get("/admin/api/usage").raise_for_status().json()["total"]
    return int(total["requests"])


def started(folder: Path, settings: dict[str, Any]) -> Any:
    folder.mkdir()
    return running(folder, settings, command=[sys.executable, "-m", "llm_api_server", "serve"])


@pytest.mark.parametrize("first", [pytest.param("workers", marks=pytest.mark.story), "manager"])
def test_restart_into_this_version_loses_no_request(
    tmp_path: Path, installed: Path, smollm2_gguf: Path, first: str
) -> None:
    """`manager`: the old manager is killed once the new code is there, so that old workers meet a new manager."""
    with started(tmp_path / "s", config(smollm2_gguf, workers=2)) as server:
        wait_until(lambda: server.models()[MODEL]["state"] == "ready")
        (engine,) = server.engines()
        manager = server.manager()
        load, stream = [Load(server) for _ in range(2)], Stream(server, tokens=300)
        wait_until(lambda: all(one.outcomes for one in load))
        began = time.monotonic()
        assert [complete(server, LIMITED_KEY) for _ in range(LIMIT - 1)] == [200] * (LIMIT - 1)
        upgrade(installed)
        if first == "manager":
            manager.kill()
            wait_until(lambda: server.has_manager() and server.manager() != manager)
        done = server.command("restart")
        assert done.stdout.endswith("Restarted.\n"), done.stderr
        assert stream.ends_whole()
        total = sum((one.stop() for one in load), Counter[str]())
        assert set(total) == {"200 True"}, total
        assert server.engines() == [engine]
        assert server.manager() != manager
        # A busy machine may take longer than the minute of the limit.
        assert [complete(server, LIMITED_KEY) for _ in range(2)] == [200, 429] or time.monotonic() - began > 60
        wait_until(lambda: counted_requests(server) >= total.total() + LIMIT + 1)
        assert re.findall(r"\w*(?:Decode|Validation|ModuleNotFound|Import|Attribute)Error", server.output()) == []
