"""Measures this server alone: the cost of many keys, many models and more workers, and the start."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench import idle
from bench.speed import modes
from bench.speed.contenders import Engine, ours
from bench.speed.modes import Figures, run
from bench.speed.processes import GATEWAY_CORE, LOAD_CORE

#: Number of keys that send requests, whatever the number of existing keys.
_CALLERS = 10
_NOBODY = Engine(0, Path())
#: Seconds per turn of the compared servers.
_TURN = 1.0
FEW, MANY = "10 keys, 1 model", "100,000 keys, 1,000 models"

Measure = Callable[[Path, float], dict[str, Figures]]


def _compared(sizes: dict[str, tuple[int, int]]) -> Measure:
    """Measure running servers with these numbers of keys and models in turns, so that noise hits all alike."""

    def measure(folder: Path, seconds: float) -> dict[str, Figures]:
        mode = replace(modes.MODES["plain-64"], warmup=_TURN / 4)
        seen: dict[str, list[Figures]] = {name: [] for name in sizes}
        with contextlib.ExitStack() as stack:
            servers = {}
            for name, (keys, models) in sizes.items():
                home = Path(tempfile.mkdtemp(dir=folder))
                made = [f"sk-bench-{number:035}" for number in range(keys)]
                server = stack.enter_context(ours(_NOBODY, home, keys=made, models=models))
                servers[name] = (server, home, made[:: keys // _CALLERS][:_CALLERS])
            for _ in range(max(1, round(seconds / _TURN))):
                for name, (server, home, used) in servers.items():
                    seen[name].append(run(mode, server, home, _TURN, used))
        return {
            name: {figure: median(one[figure] for one in turns) for figure in turns[0]} for name, turns in seen.items()
        }

    return measure


def _workers(folder: Path, seconds: float) -> dict[str, Figures]:
    """Measure on all cores, which engine and load share, so only CPU per request can be compared."""
    found = {}
    for count in (1, 2):
        cores = str(GATEWAY_CORE) if count == 1 else f"{LOAD_CORE},{GATEWAY_CORE}"
        with ours(_NOBODY, folder, workers=count, core=cores) as running:
            found[f"{count} worker{'s' if count > 1 else ''}"] = run(modes.MODES["plain-64"], running, folder, seconds)
    return found


def _start(folder: Path, seconds: float) -> dict[str, Figures]:  # noqa: ARG001 - all are called alike
    seen = idle.measure(1)
    memory = sum(process.pss for process in seen.processes) / 1e6
    return {"ours": {"start_s": seen.start_seconds, "idle_memory_mb": memory}}


MODES: dict[str, tuple[str, Measure]] = {
    "keys": (
        "how many keys there are",
        _compared({"10 keys": (10, 1), "1,000 keys": (1000, 1), "100,000 keys": (100_000, 1)}),
    ),
    "models": (
        "how many models there are",
        _compared({"1 model": (10, 1), "100 models": (10, 100), "1,000 models": (10, 1000)}),
    ),
    "many": ("few or many keys and models", _compared({FEW: (10, 1), MANY: (100_000, 1000)})),
    "workers": ("one worker and two", _workers),
    "start": ("from the command to readiness; memory of all processes, idle", _start),
}
