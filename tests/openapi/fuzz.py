"""`make fuzz SECONDS=3600`: sends a server valid and invalid requests, generated from its OpenAPI description.

All checks of schemathesis, all endpoints, a real llama.cpp engine. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.models import smollm2_gguf
from tests.openapi.hooks import MODEL
from tests.running import BIN, KEY, Server, running

HERE = Path(__file__).parent
#: A short context, since many requests matter more than long ones.
CONTEXT = 128


def config(model: Path) -> dict[str, Any]:
    return {
        "server": {"timeout": 100, "max_body_bytes": 1 << 20},
        "auth": {"secret_key": "dY0p7Qm2Zx9Lr4Wv6Tb8Nc1Kf3Hs5Ga0Ej"},
        "models": {
            "default": MODEL,
            "preload": [MODEL],
            "available": {MODEL: {"path": str(model), "max_tokens": CONTEXT}},
        },
        "inference": {"max_total_tokens": CONTEXT // 2},
    }


def run(server: Server, *options: str) -> subprocess.CompletedProcess[str]:
    """Run schemathesis."""
    command = [str(BIN / "schemathesis"), "--config-file", str(HERE / "schemathesis.toml"), "run"]
    command += [f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}"]
    command += ["--checks", "all", "--continue-on-failure", "--no-shrink", "--request-timeout", "150"]
    command += ["--max-response-time", "120", *options]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.openapi.hooks", "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(command, cwd=server.folder, env=environment, capture_output=True, text=True, check=False)


def figures(output: str) -> dict[str, int]:
    """Return the figures of the summary."""
    cases = re.search(r"(\d+) generated", output)
    failures = [int(number) for number in re.findall(r"❌ ST\d+ .*: (\d+)", output)]
    return {"cases": int(cases[1]) if cases else 0, "failures": sum(failures)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), config(smollm2_gguf())) as server:
        done = run(server, "--seed", str(given.seed), "--max-time", str(given.seconds))
        server_errors = server.output().count("Traceback")
    sys.stdout.write(done.stdout + done.stderr)
    result = {**figures(done.stdout), "tracebacks": server_errors, "exit_code": done.returncode}
    print(json.dumps(result))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
