"""Sixteen clients request three models at random in one slot: each gets a whole response within three swaps.

`SWAPS=100 make test-all ARGS=tests/e2e/test_random_swaps.py` runs longer. A thousand swaps with an injected clock
are in `tests/unit/manager/scheduling/test_traffic.py`.
"""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.running import Server, running

SWAPS = int(os.environ.get("SWAPS", "12"))
MODELS = ("a", "b", "c")
CLIENTS = 16
KEYS = [{"key": f"sk-client-{number:02}-0123456789", "name": f"client-{number}"} for number in range(CLIENTS)]


def config(model: Path) -> dict[str, Any]:
    entry = {"path": str(model), "max_tokens": 512}
    models = {"max_loaded": 1, "available": {name: dict(entry) for name in MODELS}}
    # Loads without a warm-up are short.
    return {
        "server": {"timeout": 600},
        "auth": {"api_keys": KEYS},
        "models": models,
        "inference": {"optimize_first_token": False},
    }


class Watch(threading.Thread):
    """The end of each load."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._is_over = False
        self.loads: set[tuple[float, str]] = set()
        self.start()

    def run(self) -> None:
        with self._server.client(KEYS[0]["key"]) as client:
            while not self._is_over:
                for model in client.get("/admin/api/models").json()["data"]:
                    if model["loaded_at"] is not None:
                        self.loads.add((model["loaded_at"], model["id"]))
                time.sleep(0.05)

    def stop(self) -> list[float]:
        self._is_over = True
        self.join()
        return [at for at, _ in sorted(self.loads)]


def ask_until_enough(server: Server, watch: Watch, number: int) -> list[float]:
    """Send requests until there were enough swaps; return the seconds of each until its response began."""
    chance = random.Random(number)
    waits = []
    with server.client(KEYS[number]["key"], timeout=600) as client:
        while len(watch.loads) <= SWAPS:
            is_stream = chance.random() < 0.5
            body = {"model": chance.choice(MODELS), "prompt": "Once upon", "max_tokens": 8, "ignore_eos": True}
            began = time.monotonic()
            with client.stream("POST", "/v1/completions", json={**body, "stream": is_stream}) as response:
                assert response.status_code == 200, response.read()
                lines: list[str] = []
                for line in response.iter_lines():
                    if not lines and line and not line.startswith(":"):
                        waits.append(time.monotonic() - began)
                    lines.append(line)
            text = "\n".join(lines)
            assert text.count('"finish_reason":"length"') == 1, text
            assert "data: [DONE]" in text or not is_stream, text
    return waits


@pytest.mark.timeout(3600)
def test_every_request_gets_its_response_within_three_swaps(tmp_path: Path, smollm2_gguf: Path) -> None:
    with running(tmp_path, config(smollm2_gguf)) as server:
        watch = Watch(server)
        with ThreadPoolExecutor(CLIENTS) as pool:
            all_waits = list(pool.map(lambda number: ask_until_enough(server, watch, number), range(CLIENTS)))
        loads = watch.stop()
    waits = [wait for one in all_waits for wait in one]
    turns = [after - before for before, after in pairwise(loads)]
    print(
        f"{len(waits)} requests, {len(turns)} swaps, longest wait {max(waits):.1f} s, longest turn {max(turns):.1f} s"
    )
    assert len(turns) >= SWAPS
    assert max(waits) <= 3 * max(turns)
